//! Drives the OCI runtime binary (runc, crun, youki) and reads its JSON log; sync.
//!
//! [`Runtime`] builds command lines and this crate parses what comes back. It does not decide who
//! waits: the shim spawns an [`Invocation`] and its reaper sees it end, while the daemon probes a
//! binary with [`Runtime::version`] and [`Runtime::features`], which wait under a deadline.

pub mod command;
pub mod error;
pub mod features;
pub mod flavour;
mod floor;
pub mod log;
pub mod probe;

pub use command::{Exec, Invocation, Run, Runtime};
pub use error::Error;
pub use features::Features;
pub use flavour::{Flavour, Version};
pub use probe::State;
