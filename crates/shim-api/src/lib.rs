//! Messages and framing between gantryd and gantry-shim.
//!
//! A frame is a four-byte big-endian length and then one protobuf message, at most
//! [`MAX_MESSAGE`] bytes. Descriptors travel with the first byte of the frame they belong to.
//! Nothing here does I/O on its own terms: the shim reads with epoll, the daemon with tokio, and
//! both feed what they got to a [`Decoder`].

pub mod error;
pub mod frame;

/// Generated from `proto/shim/v1/shim.proto`.
pub mod v1 {
    #![allow(clippy::doc_markdown, clippy::large_enum_variant)]
    include!(concat!(env!("OUT_DIR"), "/gantry.shim.v1.rs"));
}

pub use error::Error;
pub use frame::{Decoder, Frame, MAX_MESSAGE, encode, read_frame, write_frame};

/// What this side speaks; `Hello.protocol` and `Bootstrap.protocol`.
pub const PROTOCOL: u32 = 1;

impl From<gantry_types::ProcessRef> for v1::Process {
    fn from(process: gantry_types::ProcessRef) -> Self {
        Self {
            pid: process.pid,
            start_time: process.start_time,
        }
    }
}

impl From<v1::Process> for gantry_types::ProcessRef {
    fn from(process: v1::Process) -> Self {
        Self {
            pid: process.pid,
            start_time: process.start_time,
        }
    }
}
