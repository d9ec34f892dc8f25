//! How far a transfer is: a line on standard error that is written over, on a terminal alone.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Between two lines.
const PAUSE: Duration = Duration::from_millis(100);

/// Columns of the bar.
const WIDTH: u64 = 30;

pub struct Progress {
    what: &'static str,
    done: u64,
    /// Bytes in all, if that is known.
    total: Option<u64>,
    shown: Option<Instant>,
    terminal: bool,
}

impl Progress {
    pub fn new(what: &'static str, total: Option<u64>) -> Self {
        Self {
            what,
            done: 0,
            total: total.filter(|&total| total > 0),
            shown: None,
            terminal: std::io::stderr().is_terminal(),
        }
    }

    pub fn add(&mut self, bytes: usize) {
        self.set(self.done + bytes as u64, self.total);
    }

    /// As far as somebody else has counted.
    pub fn set(&mut self, done: u64, total: Option<u64>) {
        self.done = done;
        self.total = total.filter(|&total| total > 0);
        let due = self.shown.is_none_or(|shown| shown.elapsed() >= PAUSE);
        if self.terminal && due {
            self.shown = Some(Instant::now());
            // Who does not read the terminal misses nothing.
            let _ = write!(std::io::stderr(), "\r{}\x1b[K", self.line());
        }
    }

    fn line(&self) -> String {
        let megabytes = |bytes: u64| format!("{}.{} MB", bytes / 1_000_000, bytes / 100_000 % 10);
        let (what, done) = (self.what, megabytes(self.done));
        match self.total {
            None => format!("{what} {done}"),
            Some(total) => {
                // A file may grow while it is read.
                let filled = u128::from(self.done.min(total)) * u128::from(WIDTH);
                let filled = usize::try_from(filled / u128::from(total)).unwrap_or_default();
                let bar = format!("{:<1$}", "#".repeat(filled), WIDTH as usize);
                format!("{what} [{bar}] {done} of {}", megabytes(total))
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(done: u64, total: Option<u64>) -> String {
        let mut progress = Progress::new("import", total);
        progress.terminal = false;
        progress.done = done;
        progress.line()
    }

    #[test]
    fn a_line_says_how_much_and_of_what() {
        assert_eq!(line(1_250_000, None), "import 1.2 MB");
        assert_eq!(line(5, Some(0)), "import 0.0 MB", "a pipe has no size");
        let half = format!(
            "import [{}{}] 1.0 MB of 2.0 MB",
            "#".repeat(15),
            " ".repeat(15)
        );
        assert_eq!(line(1_000_000, Some(2_000_000)), half);
        let more = format!("import [{}] 3.0 MB of 2.0 MB", "#".repeat(30));
        assert_eq!(line(3_000_000, Some(2_000_000)), more);
        assert!(line(u64::MAX, Some(u64::MAX)).contains(&"#".repeat(30)));
    }
}
