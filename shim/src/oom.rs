//! Whether the kernel's OOM killer struck a container's cgroup.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The OOM counter of one container: `memory.events` on cgroup v2, `memory.oom_control` on v1.
/// Read on each change where the kernel tells (v2), because systemd removes a scope as soon as its
/// last process has ended, and the file of a removed cgroup reads ENODEV, also when it is open.
///
/// For the case that it is gone before we looked (the container ended before its start was
/// announced, or we waited for a disk) there is the counter of the pod, which on v2 counts for all
/// cgroups below it and stays: what it has grown by and no other container explains is ours.
#[derive(Debug, Default)]
pub struct Oom {
    file: Option<File>,
    kills: u64,
    pod: Option<Pod>,
}

#[derive(Debug)]
struct Pod {
    file: File,
    /// Kills that are not this container's.
    others: u64,
}

impl Oom {
    /// Before the container starts; `path` is the counter that it will have. Needed only where
    /// somebody else removes cgroups.
    pub fn watch_pod(&mut self, path: &str) {
        let pod = Path::new(path).parent().and_then(Path::parent);
        self.pod = pod
            .filter(|_| path.ends_with("/memory.events"))
            .and_then(|pod| File::open(pod.join("memory.events")).ok())
            .and_then(|file| read(&file).map(|others| Pod { file, others }));
    }

    /// Once the container runs. A file that cannot be opened is left to the pod's: the container
    /// may have ended, and its cgroup with it, before its start was announced.
    pub fn open(&mut self, path: &str) {
        if path.is_empty() {
            return;
        }
        self.file = File::open(Path::new(path)).ok();
        // The first read arms the kernel's notification (cgroup-v2.rst, kernfs poll).
        self.update();
    }

    /// Reads the counter; true if it grew.
    pub fn update(&mut self) -> bool {
        let before = self.kills;
        match (self.file.as_ref().and_then(read), &self.pod) {
            (Some(kills), _) => self.kills = self.kills.max(kills),
            (None, Some(pod)) => {
                let grown = read(&pod.file).is_some_and(|kills| kills > pod.others);
                self.kills = self.kills.max(u64::from(grown));
            }
            (None, None) => {}
        }
        self.kills > before
    }

    /// Another container of the pod was struck: the pod's counter tells nothing of this one.
    pub fn another_was_struck(&mut self) {
        if let Some(pod) = &mut self.pod
            && let Some(kills) = read(&pod.file)
        {
            pod.others = kills;
        }
    }

    pub fn struck(&self) -> bool {
        self.kills > 0
    }

    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|file| file.as_fd())
    }

    pub fn close(&mut self) {
        self.file = None;
        self.pod = None;
    }
}

/// The counter in a file; none once its cgroup has gone.
fn read(file: &File) -> Option<u64> {
    let mut buffer = [0; 512];
    let len = file.read_at(&mut buffer, 0).ok()?;
    parse(&buffer[..len])
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
        let mut oom = Oom::default();
        oom.open(path.to_str().unwrap());
        assert!(!oom.update() && !oom.struck());
        std::fs::write(&path, "oom_kill 1\n").unwrap();
        assert!(oom.update());
        std::fs::write(&path, "").unwrap();
        assert!(!oom.update() && oom.struck());
        let mut none = Oom::default();
        none.open("/nonexistent");
        assert!(!none.update() && !none.struck());
    }

    #[test]
    fn the_pods_counter_tells_of_a_cgroup_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("memory.events");
        let own = dir.path().join("container/memory.events");
        let kills = |count: u32| std::fs::write(&pod, format!("oom_kill {count}\n")).unwrap();
        kills(3);
        let gone = || {
            let mut oom = Oom::default();
            oom.watch_pod(own.to_str().unwrap());
            oom.open(own.to_str().unwrap());
            oom
        };
        let (mut first, mut second) = (gone(), gone());
        assert!(!first.update() && !second.update());
        kills(4);
        assert!(first.update() && first.struck());
        second.another_was_struck();
        assert!(!second.update() && !second.struck());
        // As long as the container has a counter of its own, that one counts.
        std::fs::create_dir(dir.path().join("container")).unwrap();
        std::fs::write(&own, "oom_kill 0\n").unwrap();
        let mut alive = gone();
        kills(5);
        assert!(!alive.update() && !alive.struck());
    }
}
