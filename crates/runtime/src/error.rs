//! What can go wrong with a runtime call that we wait for.

use std::path::PathBuf;
use std::time::Duration;

use gantry_types::{ErrorKind, Kind};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot execute OCI runtime {binary:?}: {source}")]
    Spawn {
        binary: PathBuf,
        source: std::io::Error,
    },
    #[error("OCI runtime {binary:?} {command} did not end within {after:?} and was killed")]
    Timeout {
        binary: PathBuf,
        command: String,
        after: Duration,
    },
    /// The runtime refused; the message is its own.
    #[error("OCI runtime {binary:?} {command} failed with code {code}: {message}")]
    Failed {
        binary: PathBuf,
        command: String,
        code: i32,
        message: String,
    },
    #[error("OCI runtime {binary:?} {command} printed what cannot be read: {why}")]
    Output {
        binary: PathBuf,
        command: String,
        why: String,
    },
}

impl Kind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Error::Spawn { source, .. } => Kind::kind(source),
            Error::Timeout { .. } => ErrorKind::DeadlineExceeded,
            Error::Failed { .. } | Error::Output { .. } => ErrorKind::Internal,
        }
    }
}
