//! The vocabulary that every other crate shares: ids, digests, states, error kinds.
//!
//! Nothing here does I/O, spawns or awaits, so that all of it can be tested as plain functions.

pub mod digest;
pub mod error;
pub mod id;
pub mod process;
pub mod state;
pub mod times;

pub use digest::Digest;
pub use error::{ErrorKind, Kind};
pub use id::{ContainerId, IdError, PodId};
pub use process::{Exit, ProcessRef};
pub use state::{ContainerState, Decision, PodState};
