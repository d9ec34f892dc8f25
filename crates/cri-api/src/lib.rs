//! Generated CRI 1.36 types, client and server.

/// Package `runtime.v1`, the CRI of Kubernetes 1.36. Documentation of each item is that of
/// `proto/runtime/v1/api.proto`.
pub mod v1 {
    #![allow(clippy::all)]
    tonic::include_proto!("runtime.v1");
}

/// The encoded `FileDescriptorSet` of [`v1`], for reflection and for tests of the contract.
pub const FILE_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
