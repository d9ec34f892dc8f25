//! Compiles `proto/containerd` with protox, so that no protoc is needed.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto/containerd");
    println!("cargo:rerun-if-changed={}", proto.display());
    let files = ["containers.proto", "tasks.proto", "version.proto"];
    let set = protox::compile(files.map(|file| proto.join(file)), [&proto])?;
    tonic_prost_build::configure().compile_fds(set)?;
    Ok(())
}
