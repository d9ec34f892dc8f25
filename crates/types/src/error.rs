//! The one list of error kinds. Each crate's error enum maps to it by an exhaustive match, and
//! `gantry-cri` maps it to a gRPC code in one place.

/// What went wrong, as far as a caller can act on it. The names are those of gRPC codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request itself is wrong and repeating it cannot help.
    InvalidArgument,
    NotFound,
    AlreadyExists,
    /// The request is fine but the object is not in a state that allows it.
    FailedPrecondition,
    /// Try again: recovery under way, shim lost, peer not reachable.
    Unavailable,
    /// A bound of ours or of the machine was hit (disk full, too many entries).
    ResourceExhausted,
    DeadlineExceeded,
    /// The caller may not (registry credentials).
    PermissionDenied,
    Unimplemented,
    Internal,
    /// Text that the kubelet parses by prefix (`RegistryUnavailable`, ...) travels under this code.
    Unknown,
}

/// An error that knows its kind.
pub trait Kind {
    fn kind(&self) -> ErrorKind;
}

/// The kind of an I/O error: only what a caller can act on is told apart.
impl Kind for std::io::Error {
    fn kind(&self) -> ErrorKind {
        use std::io::ErrorKind as Io;
        match std::io::Error::kind(self) {
            Io::NotFound => ErrorKind::NotFound,
            Io::AlreadyExists => ErrorKind::AlreadyExists,
            Io::StorageFull | Io::QuotaExceeded => ErrorKind::ResourceExhausted,
            Io::TimedOut => ErrorKind::DeadlineExceeded,
            _ => ErrorKind::Internal,
        }
    }
}
