//! Compiles `proto/shim/v1` with protox, so that no protoc is needed.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    println!("cargo:rerun-if-changed={}", proto.join("shim").display());
    let set = protox::compile([proto.join("shim/v1/shim.proto")], [proto])?;
    prost_build::Config::new()
        .btree_map(["."])
        .compile_fds(set)?;
    Ok(())
}
