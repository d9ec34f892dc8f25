//! Whether the kernel's OOM killer struck a container's cgroup.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The OOM counter of one container: `memory.events` on cgroup v2, `memory.oom_control` on v1.
/// Held open from the start, because systemd may remove the cgroup before we look; and read on
/// each change where the kernel tells (v2), because a removed cgroup cannot be read any more.
#[derive(Debug, Default)]
pub struct Oom {
    file: Option<File>,
    kills: u64,
}

impl Oom {
    /// A file that cannot be opened means that no verdict will be given: the container may have
    /// ended, and its cgroup with it, before its start was announced.
    pub fn open(path: &str) -> Self {
        if path.is_empty() {
            return Self::default();
        }
        let mut oom = Self {
            file: File::open(Path::new(path)).ok(),
            kills: 0,
        };
        // The first read arms the kernel's notification (cgroup-v2.rst, kernfs poll).
        oom.update();
        oom
    }

    /// Reads the counter; true if it grew.
    pub fn update(&mut self) -> bool {
        let Some(file) = &self.file else { return false };
        let mut buffer = [0; 512];
        let Ok(len) = file.read_at(&mut buffer, 0) else {
            return false;
        };
        let before = self.kills;
        self.kills = self.kills.max(parse(&buffer[..len]).unwrap_or(0));
        self.kills > before
    }

    pub fn struck(&self) -> bool {
        self.kills > 0
    }

    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|file| file.as_fd())
    }

    pub fn close(&mut self) {
        self.file = None;
    }
}

/// The value of the line `oom_kill N`, which both files have.
fn parse(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text)
        .ok()?
        .lines()
        .find_map(|line| match line.split_once(' ') {
            Some(("oom_kill", count)) => count.trim().parse().ok(),
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_are_read() {
        let v2 = b"low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n";
        assert_eq!(parse(v2), Some(2));
        assert_eq!(
            parse(b"oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"),
            Some(7)
        );
        assert_eq!(parse(b"oom_kill_disable 0\nunder_oom 0\n"), None);
    }

    #[test]
    fn the_verdict_outlives_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory.events");
        std::fs::write(&path, "oom_kill 0\n").unwrap();
        let mut oom = Oom::open(path.to_str().unwrap());
        assert!(!oom.update() && !oom.struck());
        std::fs::write(&path, "oom_kill 1\n").unwrap();
        assert!(oom.update());
        std::fs::write(&path, "").unwrap();
        assert!(!oom.update() && oom.struck());
        assert!(!Oom::open("/nonexistent").struck());
    }
}
