//! The error that crosses a port.

use gantry_types::{ErrorKind, Kind};

/// A plugin's failure: a kind for the program, one line for people.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// Wraps an I/O error with what was being done and to which path; the kind is the error's own.
    pub fn io(what: impl std::fmt::Display, error: std::io::Error) -> Self {
        Self {
            kind: Kind::kind(&error),
            message: format!("{what}: {error}"),
            source: None,
        }
    }

    #[must_use]
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }
}

impl Kind for Error {
    fn kind(&self) -> ErrorKind {
        self.kind
    }
}
