//! CRI configuration and resolved facts to an OCI runtime spec; pure.
//!
//! Making a container takes three passes. *Resolve* reads: image config, passwd, mounts, devices,
//! namespaces; its result is [`Resolved`]. *Build* is this crate and touches nothing: it can be
//! tested as a function. *Apply* makes directories, relabels and writes `config.json`.

pub mod error;
pub mod resolved;
pub mod signal;
pub mod sysctl;
pub mod user;

pub use error::Error;
pub use resolved::Resolved;
pub use user::User;
