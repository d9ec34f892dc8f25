//! Image builder, local registry, fakes, failpoints, leak check.

pub mod image;
pub mod image_busybox;
pub mod registry;
