//! Compiles `proto/record/v1` with protox, so that no protoc is needed.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    println!("cargo:rerun-if-changed={}", proto.join("record").display());
    let files = ["envelope", "image", "pod", "container"]
        .map(|name| proto.join(format!("record/v1/{name}.proto")));
    let set = protox::compile(files, [proto])?;
    prost_build::Config::new()
        .btree_map(["."])
        .compile_fds(set)?;
    Ok(())
}
