//! Cgroups that a service manager makes around processes that exist already.

use async_trait::async_trait;

use crate::Error;

/// A scope: a cgroup with a name that the service manager knows (systemd.scope(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Name of the unit; ends with `.scope`.
    pub name: String,
    /// The unit it lies in; ends with `.slice`. Made if it is missing.
    pub slice: String,
    /// For people who list units.
    pub description: String,
    /// The process to be moved into it.
    pub pid: i32,
}

/// Every call is bounded in time by the implementation: a service manager that hangs must not
/// keep more than the one pod that asks.
#[async_trait]
pub trait Scopes: Send + Sync + 'static {
    /// Makes a scope; its process is in it when this returns. After an error it may still come to
    /// be: the caller owes a `stop`.
    async fn start(&self, scope: &Scope) -> Result<(), Error>;

    /// Ends a scope, killing what is left in it, and waits until it is gone. One that is not there
    /// is success.
    async fn stop(&self, name: &str) -> Result<(), Error>;
}
