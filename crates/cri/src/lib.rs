//! CRI's gRPC services over the supervisor and the image service: validate, convert, call, map
//! errors. The only crate, beside the generated code, that knows gRPC.

mod admin;
mod containerd;
mod convert;
mod image;
mod inflight;
mod json;
mod layer;
mod node;
mod runtime;
mod state;
mod status;
mod stream;

pub use admin::Admin;
pub use containerd::ContainerdFace;
pub use image::Images;
pub use inflight::{Call, Calls};
pub use layer::{Gate, Observer, RpcLayer};
pub use node::Node;
pub use runtime::{Conditions, Runtime};
pub use state::State;
