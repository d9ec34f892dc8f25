//! Applying a layer's tar stream to a directory.
//!
//! The stream is hostile: every name is resolved by descriptor below the layer's root, as if that
//! were `/` (openat2(2), RESOLVE_IN_ROOT), and only last components are then named. No step
//! follows a link that it has not resolved so, so that not even a tree that changes under our
//! hands leads out of it.
//!
//! A layer is unpacked alone, without its parents, so that all layers of an image can be unpacked
//! at once. What it leaves unsaid is filled in by [`settle`] once its parents are there.

mod apply;
mod settle;
mod whiteout;
mod xattr;

use std::io::Read;
use std::path::{Path, PathBuf};

use gantry_ports::snapshotter::{Usage, Whiteouts};

use crate::decompress::Expansion;
use crate::{Error, Result};

pub use settle::settle;

/// Bounds on one layer.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most entries, and most inodes made for them.
    pub entries: u64,
    /// Longest path in bytes and in components.
    pub path_bytes: usize,
    pub path_depth: usize,
    /// Most bytes of names that must be remembered until the layer is done (directories whose
    /// times come last, whiteouts to compare).
    pub remembered_bytes: usize,
    pub expansion: Expansion,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 4_000_000,
            path_bytes: 4096,
            path_depth: 256,
            remembered_bytes: 256 << 20,
            expansion: Expansion {
                bytes: 1 << 40,
                ratio: 256,
                floor: 1 << 30,
            },
        }
    }
}

/// A layer as unpacked.
#[derive(Debug, Default)]
pub struct Unpacked {
    pub usage: Usage,
    /// Directories that had to be made but that the layer has no entry for, parents first; the
    /// empty path is the root.
    pub implicit: Vec<PathBuf>,
    /// The layer hides everything below it.
    pub opaque_root: bool,
}

/// Applies an uncompressed tar stream to the directory `root`. What follows the archive's end is
/// left in the stream.
pub fn apply(
    stream: &mut dyn Read,
    root: &Path,
    whiteouts: Whiteouts,
    limits: &Limits,
) -> Result<Unpacked> {
    let dir = gantry_sys::fs::open_root(root)
        .map_err(|e| Error::io(format_args!("open {}", root.display()), e))?;
    apply::Applier::new(dir, whiteouts, limits).run(stream)
}
