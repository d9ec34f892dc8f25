//! What can be wrong with a frame.

use gantry_types::{ErrorKind, Kind};

use crate::MAX_MESSAGE;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("a message of {0} bytes exceeds the frame limit of {MAX_MESSAGE} bytes")]
    TooLarge(usize),
    /// The bytes of a frame are not the message that was expected.
    #[error("frame holds no valid {message}: {source}")]
    Malformed {
        message: &'static str,
        source: prost::DecodeError,
    },
    /// Descriptors came with bytes in which no frame begins.
    #[error("descriptors arrived in the middle of a frame")]
    StrayDescriptors,
    #[error("the peer closed the connection within a frame")]
    Truncated,
    #[error("cannot transfer a frame: {0}")]
    Io(#[from] std::io::Error),
}

impl Kind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Error::TooLarge(_) => ErrorKind::ResourceExhausted,
            Error::Malformed { .. } | Error::StrayDescriptors => ErrorKind::InvalidArgument,
            Error::Truncated => ErrorKind::Unavailable,
            Error::Io(error) => Kind::kind(error),
        }
    }
}
