//! The JSON log that runtimes write with `--log FILE --log-format json`.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use serde::Deserialize;

/// Only the end of a log is read: the error is in its last lines.
const TAIL: u64 = 64 << 10;

/// Longest message that is passed on, in bytes.
const MESSAGE: usize = 4 << 10;

/// One line. runc and crun have `msg`; youki, which logs through tracing, has `fields.message`.
#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    fields: Fields,
}

#[derive(Default, Deserialize)]
struct Fields {
    #[serde(default)]
    message: String,
    #[serde(default)]
    error: String,
}

/// The last error in a log, `None` if it holds none. Lines that are not JSON are passed over: a
/// runtime that dies writes what it likes.
pub fn last_error(log: &str) -> Option<String> {
    log.lines().rev().find_map(|line| {
        let line: Line = serde_json::from_str(line).ok()?;
        let level = line.level.to_ascii_lowercase();
        if !matches!(level.as_str(), "error" | "fatal" | "panic") {
            return None;
        }
        let mut message = [line.msg, line.message, line.fields.message]
            .into_iter()
            .find(|message| !message.is_empty())
            .unwrap_or_default();
        if !line.fields.error.is_empty() {
            message = format!("{message}: {}", line.fields.error);
        }
        (!message.is_empty()).then(|| shorten(message))
    })
}

fn shorten(mut message: String) -> String {
    if message.len() > MESSAGE {
        let cut = (0..=MESSAGE)
            .rev()
            .find(|&at| message.is_char_boundary(at))
            .unwrap_or(0);
        message.truncate(cut);
    }
    message
}

/// [`last_error`] of a log file; absent or unreadable is `None`, as a runtime that failed early
/// made no log.
pub fn last_error_in(path: &Path) -> Option<String> {
    last_error(&read_tail(path).ok()?)
}

fn read_tail(path: &Path) -> io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_each_flavour_is_found() {
        let runc = concat!(
            r#"{"level":"warning","msg":"cannot toggle freezer","time":"2024-01-01T00:00:00Z"}"#,
            "\n",
            r#"{"level":"error","msg":"first","time":"2024-01-01T00:00:00Z"}"#,
            "\n",
            r#"{"level":"error","msg":"runc run failed: exec: \"nope\": not found","time":"x"}"#,
            "\n",
            r#"{"level":"info","msg":"bye","time":"2024-01-01T00:00:00Z"}"#,
            "\n",
        );
        assert_eq!(
            last_error(runc).as_deref(),
            Some(r#"runc run failed: exec: "nope": not found"#)
        );
        let crun =
            r#"{"msg":"executable file `nope` not found in $PATH","level":"error","time":"x"}"#;
        assert_eq!(
            last_error(crun).as_deref(),
            Some("executable file `nope` not found in $PATH")
        );
        let youki = concat!(
            r#"{"timestamp":"t","level":"ERROR","fields":{"message":"failed to create","#,
            r#""error":"no such file"},"target":"youki"}"#
        );
        assert_eq!(
            last_error(youki).as_deref(),
            Some("failed to create: no such file")
        );
    }

    #[test]
    fn what_is_no_error_is_none() {
        assert_eq!(last_error(""), None);
        assert_eq!(
            last_error("panic: runtime error\n{\"level\":\"info\",\"msg\":\"x\"}"),
            None
        );
        assert_eq!(last_error_in(Path::new("/nonexistent/log")), None);
    }

    #[test]
    fn a_long_log_is_read_from_its_end_and_a_long_message_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let filler = format!(
            "{{\"level\":\"info\",\"msg\":\"{}\"}}\n",
            "x".repeat(200_000)
        );
        let error = format!(
            "{{\"level\":\"error\",\"msg\":\"{}\"}}\n",
            "é".repeat(5_000)
        );
        std::fs::write(&path, filler + &error).unwrap();
        let message = last_error_in(&path).unwrap();
        assert!(message.len() <= MESSAGE && message.starts_with("éé"));
    }
}
