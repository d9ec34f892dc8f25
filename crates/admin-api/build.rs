//! Compiles `proto/admin/v1` with protox, so that no protoc is needed.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    println!("cargo:rerun-if-changed={}", proto.join("admin").display());
    let set = protox::compile([proto.join("admin/v1/admin.proto")], [proto])?;
    tonic_prost_build::configure().compile_fds(set)?;
    Ok(())
}
