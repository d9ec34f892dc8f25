//! CRI configuration and resolved facts to an OCI runtime spec; pure.
//!
//! Making a container takes three passes. *Resolve* reads: image config, passwd, mounts, devices,
//! namespaces; its result is [`Resolved`]. *Build* is this crate and touches nothing: it can be
//! tested as a function. *Apply* makes directories, relabels and writes `config.json`.

mod annotations;
pub mod capabilities;
pub mod cdi;
mod container;
mod devices;
pub mod error;
pub mod init;
pub mod mounts;
mod namespaces;
mod path;
pub mod process;
pub mod resolved;
pub mod resources;
pub mod rlimit;
pub mod seccomp;
pub mod security;
pub mod selinux;
pub mod signal;
pub mod sysctl;
pub mod user;
pub mod userns;

pub use annotations::SANDBOX_ID;
pub use container::container;
pub use error::Error;
pub use resolved::Resolved;
pub use user::User;
