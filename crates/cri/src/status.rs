//! The one place where an error becomes a gRPC status.

use gantry_types::{ErrorKind, Kind};
use tonic::{Code, Status};

/// The code of each kind. The kubelet acts on NotFound, DeadlineExceeded and Unimplemented; all
/// else is text to it.
pub fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::FailedPrecondition => Code::FailedPrecondition,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::ResourceExhausted => Code::ResourceExhausted,
        ErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorKind::PermissionDenied => Code::PermissionDenied,
        ErrorKind::Unimplemented => Code::Unimplemented,
        ErrorKind::Internal => Code::Internal,
        ErrorKind::Unknown => Code::Unknown,
    }
}

/// Longest message sent: it travels in an HTTP header, which peers bound.
const MESSAGE_LIMIT: usize = 4096;

/// The status of an error: its kind and its one line.
pub fn status(error: impl Kind + std::fmt::Display) -> Status {
    let mut message = error.to_string();
    if message.len() > MESSAGE_LIMIT {
        let cut = (0..=MESSAGE_LIMIT)
            .rev()
            .find(|at| message.is_char_boundary(*at));
        message.truncate(cut.unwrap_or_default());
        message.push_str(" ...");
    }
    Status::new(code(error.kind()), message)
}

/// A field that cannot be used as given.
pub fn invalid(field: &str, reason: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {reason}"))
}

/// A call that is routed and refused, whoever makes it.
pub fn unimplemented(call: &str, why: &str) -> Status {
    Status::unimplemented(format!("{call} is refused: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_code() {
        let table = [
            (ErrorKind::InvalidArgument, Code::InvalidArgument),
            (ErrorKind::NotFound, Code::NotFound),
            (ErrorKind::AlreadyExists, Code::AlreadyExists),
            (ErrorKind::FailedPrecondition, Code::FailedPrecondition),
            (ErrorKind::Unavailable, Code::Unavailable),
            (ErrorKind::ResourceExhausted, Code::ResourceExhausted),
            (ErrorKind::DeadlineExceeded, Code::DeadlineExceeded),
            (ErrorKind::PermissionDenied, Code::PermissionDenied),
            (ErrorKind::Unimplemented, Code::Unimplemented),
            (ErrorKind::Internal, Code::Internal),
            (ErrorKind::Unknown, Code::Unknown),
        ];
        for (kind, expected) in table {
            assert_eq!(code(kind), expected, "{kind:?}");
        }
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let error = gantry_supervisor::Error::Invalid {
            field: "ä".repeat(5000),
            reason: "x".into(),
        };
        let status = status(error);
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().len() <= MESSAGE_LIMIT + 4);
    }
}
