//! Reading container logs in CRI's format.

use std::path::Path;

/// `TIME STREAM TAG TEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub time: String,
    pub stream: String,
    /// The line goes on in the next record.
    pub partial: bool,
    pub text: String,
}

/// All records of a log file; one that is absent has none. A record that is none fails the test.
pub fn read(path: &Path) -> Vec<Line> {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete
        .lines()
        .map(|line| parse(line).unwrap_or_else(|| panic!("{line:?}")))
        .collect()
}

fn parse(line: &str) -> Option<Line> {
    let mut fields = line.splitn(4, ' ');
    let (time, stream, tag) = (fields.next()?, fields.next()?, fields.next()?);
    // RFC 3339 with nanoseconds: kubectl and crictl take no other.
    let shape = time.len() >= "2006-01-02T15:04:05.000000000Z".len() && time.contains('T');
    let known = matches!(stream, "stdout" | "stderr") && matches!(tag, "P" | "F");
    (shape && known).then(|| Line {
        time: time.to_owned(),
        stream: stream.to_owned(),
        partial: tag == "P",
        text: fields.next().unwrap_or_default().to_owned(),
    })
}

/// What was written to one stream.
pub fn text(lines: &[Line], stream: &str) -> String {
    let mut text = String::new();
    for line in lines.iter().filter(|line| line.stream == stream) {
        text.push_str(&line.text);
        if !line.partial {
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_joined_by_their_tag() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let time = "2024-01-01T00:00:00.000000001Z";
        let records = format!(
            "{time} stdout P ab\n{time} stderr F e\n{time} stdout F c d\n{time} stdout F \n{time} std"
        );
        std::fs::write(&path, records).unwrap();
        let lines = read(&path);
        assert_eq!(
            lines.len(),
            4,
            "a record that is being written is not there yet"
        );
        assert_eq!(text(&lines, "stdout"), "abc d\n\n");
        assert_eq!(text(&lines, "stderr"), "e\n");
        assert!(parse("now stdout F x").is_none() && parse(&format!("{time} stdin F x")).is_none());
    }
}
