//! What can go wrong between us and a CNI plugin.

use std::path::PathBuf;
use std::time::Duration;

use gantry_types::{ErrorKind, Kind};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No usable configuration; the text is that of the `NetworkReady` condition.
    #[error("{0}")]
    NoNetwork(String),
    /// A value of the pod that cannot be handed to a plugin.
    #[error("{field}: {reason}")]
    Pod { field: String, reason: String },
    /// Intent or result handed back by the core is not what we wrote.
    #[error("network record: {0}")]
    Record(String),
    #[error("network {network}: plugin {plugin} is in none of {dirs:?}")]
    NotInstalled {
        network: String,
        plugin: String,
        dirs: Vec<PathBuf>,
    },
    #[error("network {network}: plugin {plugin}: {command}: {source}")]
    Exec {
        network: String,
        plugin: String,
        command: &'static str,
        source: std::io::Error,
    },
    #[error("network {network}: plugin {plugin}: {command} did not end within {limit:?}: killed")]
    Hung {
        network: String,
        plugin: String,
        command: &'static str,
        limit: Duration,
    },
    /// The plugin's own words; `code` is that of its error object (CNI spec, Error).
    #[error("network {network}: plugin {plugin}: {command} failed: {message}")]
    Failed {
        network: String,
        plugin: String,
        command: &'static str,
        code: Option<u64>,
        message: String,
    },
    /// It reported success with something that is no result.
    #[error("network {network}: plugin {plugin}: {command}: bad result: {reason}")]
    Result {
        network: String,
        plugin: String,
        command: &'static str,
        reason: String,
    },
    /// An attach that failed, and whose undoing failed too.
    #[error("{attach}; giving back what it took failed too: {detach}")]
    Undo {
        attach: Box<Error>,
        detach: Box<Error>,
    },
    /// Several plugins of a chain failed on the way back.
    #[error("{first}; {rest}")]
    Several { first: Box<Error>, rest: Box<Error> },
    /// What was given back may be taken again after a power loss.
    #[error("network {network}: sync {dir}: {source}", dir = dir.display())]
    Settle {
        network: String,
        dir: PathBuf,
        source: std::io::Error,
    },
    #[error("start the network: {0}")]
    Start(String),
}

/// Codes of the CNI specification that mean "not now".
const TRY_AGAIN: [u64; 3] = [11, 50, 51];

impl Kind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoNetwork(_) => ErrorKind::Unavailable,
            Self::Pod { .. } => ErrorKind::InvalidArgument,
            Self::NotInstalled { .. } => ErrorKind::FailedPrecondition,
            Self::Hung { .. } => ErrorKind::DeadlineExceeded,
            Self::Failed {
                code: Some(code), ..
            } if TRY_AGAIN.contains(code) => ErrorKind::Unavailable,
            Self::Exec { source, .. } | Self::Settle { source, .. } => Kind::kind(source),
            Self::Undo { attach: first, .. } | Self::Several { first, .. } => first.kind(),
            Self::Record(_) | Self::Failed { .. } | Self::Result { .. } | Self::Start(_) => {
                ErrorKind::Internal
            }
        }
    }
}

impl From<Error> for gantry_ports::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}
