//! Image builder, local registry, fakes, failpoints, leak check.

pub mod cni_plugin;
pub mod cri;
pub mod daemon;
pub mod docker_registry;
pub mod fake_shim;
pub mod faults;
pub mod image;
pub mod image_busybox;
pub mod leakcheck;
pub mod netns;
pub mod oci_runtime;
pub mod process;
pub mod registry;
pub mod stats;
