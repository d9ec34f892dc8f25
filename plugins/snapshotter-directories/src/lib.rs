//! Layers and snapshots as directories: what the snapshotters that keep them so have in common.
//!
//! ```text
//! <root>/layers/<hex of chain id>/{fs,usage}   committed layers
//!        stages/<serial>/                      layers and snapshots being made
//!        snapshots/<container id>/fs           what is the container's own
//!                                volumes/      what is mounted into that container
//!        trash/                                renamed away, being deleted
//! ```
//!
//! `snapshots` may be below a root of its own, with `stages` and `trash` of its own: images on one
//! file system, what containers write on another.
//!
//! Every directory above a layer's `fs` is 0700: files of images keep their owners and set-id bits,
//! so no other user of the host may reach them (CVE-2021-41103).
//! A directory appears under `layers` or `snapshots` by rename of a finished one, so that what is
//! seen there is whole.

pub mod layers;
mod layout;
mod measure;
pub mod mounts;
pub mod snapshots;

pub use layout::{Layout, entries, remove_tree};
pub use measure::measure;
