//! Why a request was not done, and how that is told to the daemon.

use std::io;
use std::path::Path;

use gantry_shim_api::v1;
use gantry_types::{ErrorKind, Kind};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what} {id:?} is not known")]
    NotFound { what: &'static str, id: String },
    #[error("{what} {id:?} exists already")]
    AlreadyExists { what: &'static str, id: String },
    #[error("{0}")]
    FailedPrecondition(String),
    #[error("{0}")]
    InvalidArgument(String),
    #[error("OCI runtime {command} did not end within {seconds} s and was killed")]
    Deadline { command: &'static str, seconds: u64 },
    #[error("{0}")]
    Unimplemented(String),
    #[error("{0}")]
    Exhausted(String),
    /// The runtime's own message.
    #[error("{0}")]
    Runtime(String),
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
}

impl Error {
    /// For `map_err`: what was being done, to which path.
    pub fn io(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let what = format!("{what} {}", path.display());
        move |source| Error::Io { what, source }
    }

    /// For `map_err` where there is no path.
    pub fn call(what: &str) -> impl FnOnce(io::Error) -> Self {
        let what = what.to_owned();
        move |source| Error::Io { what, source }
    }

    pub fn wire(&self) -> v1::Error {
        let kind = match self {
            Error::Runtime(_) => v1::ErrorKind::Runtime,
            other => match other.kind() {
                ErrorKind::NotFound => v1::ErrorKind::NotFound,
                ErrorKind::AlreadyExists => v1::ErrorKind::AlreadyExists,
                ErrorKind::FailedPrecondition => v1::ErrorKind::FailedPrecondition,
                ErrorKind::InvalidArgument => v1::ErrorKind::InvalidArgument,
                ErrorKind::DeadlineExceeded => v1::ErrorKind::DeadlineExceeded,
                ErrorKind::Unimplemented => v1::ErrorKind::Unimplemented,
                ErrorKind::ResourceExhausted => v1::ErrorKind::ResourceExhausted,
                ErrorKind::Unavailable
                | ErrorKind::PermissionDenied
                | ErrorKind::Internal
                | ErrorKind::Unknown => v1::ErrorKind::Internal,
            },
        };
        v1::Error {
            kind: kind.into(),
            message: self.to_string(),
        }
    }
}

impl Kind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Error::NotFound { .. } => ErrorKind::NotFound,
            Error::AlreadyExists { .. } => ErrorKind::AlreadyExists,
            Error::FailedPrecondition(_) => ErrorKind::FailedPrecondition,
            Error::InvalidArgument(_) => ErrorKind::InvalidArgument,
            Error::Deadline { .. } => ErrorKind::DeadlineExceeded,
            Error::Unimplemented(_) => ErrorKind::Unimplemented,
            Error::Exhausted(_) => ErrorKind::ResourceExhausted,
            Error::Runtime(_) => ErrorKind::Internal,
            // A path of ours that is missing or in the way is not the object asked for: only
            // what the caller can act on keeps its kind.
            Error::Io { source, .. } => match Kind::kind(source) {
                ErrorKind::ResourceExhausted => ErrorKind::ResourceExhausted,
                ErrorKind::NotFound
                | ErrorKind::AlreadyExists
                | ErrorKind::InvalidArgument
                | ErrorKind::FailedPrecondition
                | ErrorKind::Unavailable
                | ErrorKind::DeadlineExceeded
                | ErrorKind::PermissionDenied
                | ErrorKind::Unimplemented
                | ErrorKind::Internal
                | ErrorKind::Unknown => ErrorKind::Internal,
            },
        }
    }
}
