//! Compiles `proto/runtime/v1` with protox, so that no protoc is needed.

use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    println!("cargo:rerun-if-changed={}", proto.join("runtime").display());
    let mut compiler = protox::Compiler::new([&proto])?;
    compiler
        .include_imports(true)
        .open_file(proto.join("runtime/v1/api.proto"))?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    // Not by way of prost-types, which drops options that it does not know (`debug_redact`).
    std::fs::write(
        out.join("descriptors.bin"),
        compiler.encode_file_descriptor_set(),
    )?;
    tonic_prost_build::configure()
        // Ordered maps: what we encode, hash and store is the same bytes every time.
        .btree_map(".")
        // Holds credentials; its Debug is written by hand in lib.rs.
        .skip_debug([".runtime.v1.AuthConfig"])
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
