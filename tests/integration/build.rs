//! Compiles the frozen definitions of what older shims speak.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    let frozen = proto.join("shim/v1/frozen/protocol-1.proto");
    println!("cargo:rerun-if-changed={}", frozen.display());
    let set = protox::compile([frozen], [proto])?;
    prost_build::Config::new()
        .btree_map(["."])
        .compile_fds(set)?;
    Ok(())
}
