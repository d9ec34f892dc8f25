//! The error of this crate.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use gantry_types::{Digest, ErrorKind, Kind};

pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong with an image. Texts name the host, the reference, the path or the digest;
/// URLs are shown without user info and query, credentials never.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("image reference {reference:?}: {reason}")]
    Reference { reference: String, reason: String },

    /// No host of the registry answered. The kubelet knows the text by its first word.
    #[error("RegistryUnavailable: {reference}: {reason}")]
    RegistryUnavailable { reference: String, reason: String },

    #[error("{reference}: {host} answered {status} to {request}{detail}")]
    NotFound {
        reference: String,
        host: String,
        status: u16,
        request: String,
        detail: String,
    },

    #[error("{reference}: {host} answered {status} to {request}{detail}")]
    Denied {
        reference: String,
        host: String,
        status: u16,
        request: String,
        detail: String,
    },

    /// Any other answer that is no success.
    #[error("{reference}: {host} answered {status} to {request}{detail}")]
    Answer {
        reference: String,
        host: String,
        status: u16,
        request: String,
        detail: String,
    },

    /// A registry broke the protocol: bad redirect, bad challenge, oversized body.
    #[error("{host}: {reason}")]
    Protocol { host: String, reason: String },

    /// What was served is not what its digest or size says.
    #[error("{what}: {reason}")]
    Mismatch { what: String, reason: String },

    /// Image data that this program cannot or will not take.
    #[error("{what}: {reason}")]
    Invalid { what: String, reason: String },

    #[error("{what}: {reason}")]
    Unsupported { what: String, reason: String },

    /// A blob that an image needs is not here any more, nor is what was unpacked from it.
    #[error("blob {blob} is missing on this node")]
    Gone { blob: Digest },

    /// What is wrong with an image that was to be pulled.
    #[error("image {reference}: {source}")]
    Image {
        reference: String,
        source: Box<Error>,
    },

    /// A bound on image data was hit.
    #[error("{what}: more than {limit} {unit}")]
    Limit {
        what: String,
        limit: u64,
        unit: &'static str,
    },

    #[error("hosts file {}: {reason}", path.display())]
    Hosts { path: PathBuf, reason: String },

    #[error("{name}: not an image of this node")]
    NoSuchImage { name: String },

    /// The unpacked layer is here, its compressed form is not.
    #[error(
        "image {image}: blob {blob} is not kept on this node (images.discard_unpacked_layers, or \
         another image's layer of the same content)"
    )]
    NotKept { image: String, blob: Digest },

    /// It was unpacked for another snapshotter, and what would be unpacked is gone.
    #[error(
        "image {image} is not unpacked for {snapshotter}, and its blob {blob} is not kept on this \
         node: pull the image again"
    )]
    NotUnpacked {
        image: String,
        snapshotter: &'static str,
        blob: Digest,
    },

    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },

    #[error(transparent)]
    Store(#[from] gantry_store::Error),

    #[error(transparent)]
    Snapshotter(#[from] gantry_ports::Error),

    /// A worker of ours panicked or was cancelled by the runtime's end.
    #[error("{what} ended early")]
    Worker { what: &'static str },

    /// The pull has failed elsewhere, or nobody waits for it any more.
    #[error("the pull was given up")]
    Cancelled,

    /// Credentials that the node itself has for a host could not be had.
    #[error("credentials for {host}: {reason}")]
    Credentials { host: String, reason: String },

    /// The failure of a pull that several callers wait for.
    #[error(transparent)]
    Joined(Arc<Error>),
}

impl Error {
    pub(crate) fn io(what: impl std::fmt::Display, source: io::Error) -> Self {
        Error::Io {
            what: what.to_string(),
            source,
        }
    }

    /// With the reference of the image that was asked for, if it is about content and says only which
    /// blob or file.
    pub(crate) fn of_image(self, reference: impl std::fmt::Display) -> Self {
        match self {
            Error::Mismatch { .. }
            | Error::Invalid { .. }
            | Error::Unsupported { .. }
            | Error::Limit { .. }
            | Error::Gone { .. }
            | Error::Io { .. } => Error::Image {
                reference: reference.to_string(),
                source: Box::new(self),
            },
            other => other,
        }
    }

    /// What could not be read of content whose digest is right, and which is all there, is wrong in
    /// the image and not on this node.
    pub(crate) fn of_content(self) -> Self {
        use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
        match self {
            Error::Io { what, source }
                if matches!(source.kind(), InvalidData | InvalidInput | UnexpectedEof) =>
            {
                Error::invalid(what, source)
            }
            other => other,
        }
    }

    pub(crate) fn invalid(what: impl std::fmt::Display, reason: impl std::fmt::Display) -> Self {
        Error::Invalid {
            what: what.to_string(),
            reason: reason.to_string(),
        }
    }

    pub(crate) fn mismatch(what: impl std::fmt::Display, reason: impl std::fmt::Display) -> Self {
        Error::Mismatch {
            what: what.to_string(),
            reason: reason.to_string(),
        }
    }
}

impl Kind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Error::Reference { .. } => ErrorKind::InvalidArgument,
            // Code Unknown is the one whose text reaches the kubelet's comparison unadorned.
            Error::RegistryUnavailable { .. } => ErrorKind::Unknown,
            Error::NotFound { .. } | Error::NoSuchImage { .. } => ErrorKind::NotFound,
            Error::Denied { .. } => ErrorKind::PermissionDenied,
            Error::Answer { .. } | Error::Protocol { .. } | Error::Mismatch { .. } => {
                ErrorKind::Internal
            }
            Error::Gone { .. } => ErrorKind::Unavailable,
            Error::Image { source, .. } => source.kind(),
            Error::Invalid { .. } | Error::Unsupported { .. } => ErrorKind::InvalidArgument,
            Error::Limit { .. } => ErrorKind::ResourceExhausted,
            Error::Hosts { .. }
            | Error::Credentials { .. }
            | Error::NotKept { .. }
            | Error::NotUnpacked { .. } => ErrorKind::FailedPrecondition,
            Error::Cancelled => ErrorKind::Unavailable,
            Error::Io { source, .. } => match Kind::kind(source) {
                // A file of ours that is missing is not the caller's "no such image".
                ErrorKind::NotFound | ErrorKind::AlreadyExists => ErrorKind::Internal,
                kind => kind,
            },
            Error::Store(error) => error.kind(),
            Error::Snapshotter(error) => error.kind(),
            Error::Worker { .. } => ErrorKind::Internal,
            Error::Joined(error) => error.kind(),
        }
    }
}
