//! SPDY/3.1, the server's side (draft-mbelshe-httpbis-spdy-00 and the SPDY/3.1 flow control note),
//! as far as Kubernetes uses it: the client opens streams over an upgraded connection, and each
//! carries bytes both ways.
//!
//! [`frame`] and [`headers`] decode and encode without doing any I/O; `core` is the protocol as a
//! state machine over byte buffers; `session` runs one over a connection,
//! [`replay`] over bytes that a test or a fuzzer made.

pub(crate) mod core;
mod dictionary;
pub mod frame;
pub mod headers;
mod replay;
pub(crate) mod session;
mod window;

pub use frame::{Decoder, Frame};
pub use headers::{HeaderReader, HeaderWriter, Headers};
pub use replay::{Held, check, replay};
