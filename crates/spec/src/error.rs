//! What can be wrong with a request for a container.

use gantry_types::{ErrorKind, Kind};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A field of the request, or of the image's configuration, that cannot be honoured.
    #[error("{field}: {reason}")]
    InvalidArgument {
        /// CRI's path of the field, such as `linux.security_context.run_as_group`, or
        /// `image config` and the field there.
        field: String,
        reason: String,
    },
    /// Fine by itself, but this node lacks what it needs.
    #[error("{field}: {reason}")]
    FailedPrecondition { field: String, reason: String },
    /// Recursive read-only mounts are asked for and the handler cannot make them. The kubelet
    /// parses the prefix of the text.
    #[error("RROUnsupported: {field}: {reason}")]
    RroUnsupported { field: String, reason: String },
    /// The facts do not belong to the request: a fault of ours.
    #[error("{field}: {reason}")]
    Internal { field: String, reason: String },
}

impl Error {
    pub fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidArgument {
            field: field.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn precondition(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::FailedPrecondition {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

impl Kind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidArgument { .. } => ErrorKind::InvalidArgument,
            Self::FailedPrecondition { .. } => ErrorKind::FailedPrecondition,
            Self::RroUnsupported { .. } => ErrorKind::Unknown,
            Self::Internal { .. } => ErrorKind::Internal,
        }
    }
}
