//! References, registry client, content store, pull pipeline, unpack, import and export.
//!
//! [`Images`] is the face of it. Around an image three things are kept: its blobs in the content
//! store, an OCI image layout that describes itself; its layers, unpacked, with the snapshotter;
//! and its record in the store, an index over the other two. A pull makes them in this order, so
//! that no record is written over data that is not on disk. A removal deletes the record last: what
//! it left half done when it was killed is still known, and is finished at the next start.

mod archive;
mod audit;
mod budget;
mod cancel;
mod catalog;
mod collect;
mod compare;
mod content;
mod credentials;
mod decompress;
mod document;
mod error;
mod failpoint;
mod hash;
mod image;
mod index;
mod inspect;
mod install;
mod joined;
mod keychain;
mod lease;
mod partial;
mod platform;
mod progress;
mod pull;
pub mod reference;
pub mod registry;
mod service;
mod tar;
pub mod unpack;
mod verify;

pub use audit::{Fate, Item, ItemKind, LayerHolders};
pub use credentials::Credentials;
pub use decompress::Expansion;
pub use document::{ImageConfig, Platform};
pub use error::{Error, Result};
pub use image::Image;
pub use joined::Pulling;
pub use keychain::{HostCredentials, Keychain, is_helper_name};
pub use platform::Accepted;
pub use progress::{Progress, Stand};
pub use service::{FsInfo, ImageInUse, Images, LayersInUse, Options, PullRequest};
pub use verify::{Fault, Faulty, Verified};
