//! What the supervisor answers when it cannot.

use gantry_types::{ErrorKind, Kind};

/// Cloned to every caller who joined the same operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{what} {id:?} not found")]
    NotFound { what: &'static str, id: String },
    #[error("{what} id {prefix:?} is ambiguous")]
    Ambiguous { what: &'static str, prefix: String },
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    /// The object's state does not allow the request.
    #[error("{what} {id}: {reason}")]
    State {
        what: &'static str,
        id: String,
        reason: String,
    },
    #[error("{what} name {name:?} is in use by {id} with another configuration")]
    NameInUse {
        what: &'static str,
        name: String,
        id: String,
    },
    #[error("{step}: {message}")]
    Failed {
        step: &'static str,
        kind: ErrorKind,
        message: String,
    },
    #[error("pod sandbox {pod}: its shim does not answer: {reason}")]
    Shim { pod: String, reason: String },
    #[error("{what} did not end within {seconds} s")]
    Deadline { what: String, seconds: u64 },
    #[error("gantryd is shutting down")]
    ShuttingDown,
}

impl Error {
    /// A step that failed for a reason that another crate can name.
    pub fn step<E: Kind + std::fmt::Display>(step: &'static str) -> impl Fn(E) -> Error {
        move |error| Error::Failed {
            step,
            kind: error.kind(),
            message: error.to_string(),
        }
    }

    /// A file operation that failed.
    pub fn io(step: &'static str, path: &std::path::Path, error: &std::io::Error) -> Error {
        Error::Failed {
            step,
            kind: Kind::kind(error),
            message: format!("{}: {error}", path.display()),
        }
    }

    pub fn internal(step: &'static str, message: impl ToString) -> Error {
        Error::Failed {
            step,
            kind: ErrorKind::Internal,
            message: message.to_string(),
        }
    }
}

impl Kind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Error::NotFound { .. } => ErrorKind::NotFound,
            Error::Ambiguous { .. } | Error::Invalid { .. } => ErrorKind::InvalidArgument,
            Error::State { .. } => ErrorKind::FailedPrecondition,
            Error::NameInUse { .. } => ErrorKind::AlreadyExists,
            Error::Failed { kind, .. } => *kind,
            Error::Shim { .. } | Error::ShuttingDown => ErrorKind::Unavailable,
            Error::Deadline { .. } => ErrorKind::DeadlineExceeded,
        }
    }
}
