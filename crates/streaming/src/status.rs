//! The last word of a remote command, on the error stream.
//!
//! From v4 on it is a `metav1.Status` in JSON, whatever the outcome; before, the text of an error,
//! and nothing after success.

use gantry_ports::Error;
use serde_json::{Value, json};

use crate::negotiate::Version;

/// What became of a remote command.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It ended, or an attached client is done.
    Success,
    /// It ended with another exit code than 0.
    Exit(i32),
    /// It could not be run, or what it was doing failed.
    Failed { what: &'static str, error: Error },
}

impl Outcome {
    /// The bytes for the error stream.
    pub fn encode(&self, version: Version) -> Vec<u8> {
        match version {
            Version::V4 | Version::V5 => self.status().to_string().into_bytes(),
            Version::V1 | Version::V2 | Version::V3 => self.message().into_bytes(),
        }
    }

    fn message(&self) -> String {
        match self {
            Outcome::Success => String::new(),
            Outcome::Exit(code) => {
                format!("command terminated with non-zero exit code: exit code {code}")
            }
            Outcome::Failed { what, error } => format!("Internal error occurred: {what}: {error}"),
        }
    }

    fn status(&self) -> Value {
        let message = self.message();
        match self {
            Outcome::Success => json!({ "metadata": {}, "status": "Success" }),
            // Clients read the exit code from the cause and print the message.
            Outcome::Exit(code) => json!({
                "metadata": {},
                "status": "Failure",
                "message": message,
                "reason": "NonZeroExitCode",
                "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
            }),
            Outcome::Failed { what, error } => json!({
                "metadata": {},
                "status": "Failure",
                "message": message,
                "reason": "InternalError",
                "details": { "causes": [{ "message": format!("{what}: {error}") }] },
                "code": 500,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed() -> Outcome {
        Outcome::Failed {
            what: "error executing command in container",
            error: Error::internal("no such file"),
        }
    }

    fn json(outcome: &Outcome) -> Value {
        serde_json::from_slice(&outcome.encode(Version::V4)).unwrap()
    }

    #[test]
    fn from_v4_on_an_exit_code_is_a_cause_of_a_status() {
        assert_eq!(json(&Outcome::Success)["status"], "Success");
        let exit = json(&Outcome::Exit(42));
        assert_eq!(exit["status"], "Failure");
        assert_eq!(exit["reason"], "NonZeroExitCode");
        assert_eq!(exit["details"]["causes"][0]["reason"], "ExitCode");
        assert_eq!(exit["details"]["causes"][0]["message"], "42");
        let failed = json(&failed());
        assert_eq!(failed["reason"], "InternalError");
        assert_eq!(failed["code"], 500);
        assert_eq!(
            failed["message"],
            "Internal error occurred: error executing command in container: no such file"
        );
    }

    #[test]
    fn before_v4_only_a_failure_is_told() {
        assert_eq!(Outcome::Success.encode(Version::V3), b"");
        assert!(
            Outcome::Exit(1)
                .encode(Version::V1)
                .ends_with(b"exit code 1")
        );
        assert!(failed().encode(Version::V2).ends_with(b"no such file"));
    }
}
