//! What the core needs from the outside, as traits. Implementations live under `plugins/`.

pub mod error;
pub mod network;
pub mod scopes;
pub mod snapshotter;
#[cfg(feature = "testsuite")]
pub mod testsuite;

pub use error::Error;
pub use network::Network;
pub use scopes::Scopes;
pub use snapshotter::{Snapshotter, Snapshotters};
