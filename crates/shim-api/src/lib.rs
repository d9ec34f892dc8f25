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

/// What this side speaks; `Hello.protocol` and `Bootstrap.protocol`. Neither side refuses the other
/// for it: a request is made of shims that know it, and what comes without being known is passed
/// over. What the shims of a version speak is frozen in `proto/shim/v1/frozen`, since those that run
/// are not replaced with the daemon.
///
/// | version | since it |
/// |---|---|
/// | 1 | |
/// | 2 | another shim can take over what one that has died leaves: `KeepHolder`, `Custody`, `Adopt`, `Bootstrap.adopt`; `Bootstrap.open_files`, `ExitRecord.unknown` |
pub const PROTOCOL: u32 = 2;

/// Version from which on a shim's pod can be taken over by another.
pub const ADOPTION: u32 = 2;

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
