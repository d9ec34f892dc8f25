//! The error of this crate.

use std::io;

use gantry_types::{ErrorKind, Kind};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request that no client could use.
    #[error("{field}: {reason}")]
    Invalid {
        field: &'static str,
        reason: &'static str,
    },

    #[error("more than {limit} {what}")]
    TooMany { what: &'static str, limit: usize },

    /// A certificate or key that cannot be served with.
    #[error("{what}: {reason}")]
    Tls { what: String, reason: String },

    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Error::Io {
            what: what.into(),
            source,
        }
    }

    pub(crate) fn tls(what: impl Into<String>, reason: impl ToString) -> Self {
        Error::Tls {
            what: what.into(),
            reason: reason.to_string(),
        }
    }
}

impl Kind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Error::Invalid { .. } => ErrorKind::InvalidArgument,
            Error::TooMany { .. } => ErrorKind::ResourceExhausted,
            Error::Tls { .. } => ErrorKind::FailedPrecondition,
            Error::Io { source, .. } => Kind::kind(source),
        }
    }
}
