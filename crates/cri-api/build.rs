//! Compiles `proto/runtime/v1` with protox, so that no protoc is needed.

use std::path::{Path, PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    println!("cargo:rerun-if-changed={}", proto.join("runtime").display());
    let set = protox::compile([proto.join("runtime/v1/api.proto")], [proto])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), set.encode_to_vec())?;
    tonic_prost_build::configure()
        // Ordered maps: what we encode, hash and store is the same bytes every time.
        .btree_map(".")
        // Holds credentials; its Debug is written by hand in lib.rs.
        .skip_debug([".runtime.v1.AuthConfig"])
        .compile_fds(set)?;
    Ok(())
}
