//! Plain files of the cgroup hierarchies: join, list, kill, remove.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use gantry_sys::pidfd::PidFd;
use gantry_sys::signal::SIGKILL;

use crate::error::Error;

/// Rounds of killing before we leave a v1 cgroup to the next attempt: a fork bomb can be faster
/// than a list of its processes.
const ROUNDS: u32 = 32;

/// Cgroups below one that are looked into.
const DEPTH: u32 = 8;

/// Refuses a path that would depend on where we are.
pub fn check(dirs: &[PathBuf]) -> Result<(), Error> {
    match dirs.iter().find(|dir| !dir.is_absolute()) {
        Some(dir) => {
            let message = format!("cgroup directory {dir:?} is not absolute");
            Err(Error::InvalidArgument(message))
        }
        None => Ok(()),
    }
}

/// Makes a cgroup with all parents.
pub fn make(dir: &Path) -> Result<(), Error> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        make(parent)?;
    }
    match std::fs::create_dir(dir) {
        // Made by someone else meanwhile.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        result => result.map_err(Error::io("make cgroup", dir))?,
    }
    // A v1 cpuset starts empty, and then no process can join it (cpuset(7)).
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let file = dir.join(name);
        let (Some(parent), Ok(own)) = (dir.parent(), std::fs::read_to_string(&file)) else {
            continue;
        };
        if own.trim().is_empty() && !dir.join("cgroup.controllers").exists() {
            let inherited = std::fs::read_to_string(parent.join(name))
                .map_err(Error::io("read", &parent.join(name)))?;
            std::fs::write(&file, inherited.trim()).map_err(Error::io("write", &file))?;
        }
    }
    Ok(())
}

/// Moves a process into a cgroup.
pub fn join(dir: &Path, pid: i32) -> Result<(), Error> {
    let file = dir.join("cgroup.procs");
    std::fs::write(&file, pid.to_string()).map_err(Error::io("write", &file))
}

/// Every process of a cgroup and of those below it. A cgroup that is gone has none.
pub fn processes(dir: &Path) -> Vec<i32> {
    let mut found = Vec::new();
    collect(dir, DEPTH, &mut found);
    found
}

fn collect(dir: &Path, depth: u32, found: &mut Vec<i32>) {
    if let Ok(text) = std::fs::read_to_string(dir.join("cgroup.procs")) {
        // 0 stands for a process of a PID namespace that we do not see.
        found.extend(
            text.lines()
                .filter_map(|line| line.parse::<i32>().ok())
                .filter(|&p| p > 0),
        );
    }
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth, found);
        }
    }
}

/// Sends a signal to every process of a cgroup but one. Each is pinned before the list is read
/// again and only those still on it are hit, so that a reused pid never draws the signal elsewhere.
pub fn signal_others(dir: &Path, signal: i32, except: i32) {
    let pinned: Vec<(i32, PidFd)> = processes(dir)
        .into_iter()
        .filter(|&pid| pid != except)
        .filter_map(|pid| PidFd::open(pid).ok().map(|fd| (pid, fd)))
        .collect();
    if pinned.is_empty() {
        return;
    }
    let now = processes(dir);
    for (pid, process) in pinned {
        if now.contains(&pid) {
            // One that has ended in between needs no signal.
            let _ = process.signal(signal);
        }
    }
}

/// Kills every process of a cgroup, without waiting for them to end.
pub fn kill(dir: &Path) {
    if dir.as_os_str().is_empty() || std::fs::write(dir.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    // v1, or v2 before Linux 5.14. A round hits the dying ones again; it is over when a round
    // meets nobody or only those that the round before had met.
    let mut before = Vec::new();
    for _ in 0..ROUNDS {
        let mut now = processes(dir);
        now.sort_unstable();
        if now.is_empty() || now == before {
            return;
        }
        signal_others(dir, SIGKILL, 0);
        before = now;
    }
}

/// Removes cgroups whose processes have been killed, waiting a little for them to be gone.
pub fn remove(dirs: &[PathBuf], patience: Duration) {
    let deadline = Instant::now() + patience;
    for dir in dirs {
        loop {
            match std::fs::remove_dir(dir) {
                Ok(()) => break,
                Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                Err(e) if e.raw_os_error() == Some(EBUSY) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(e) => {
                    crate::report!("remove cgroup {}: {e}", dir.display());
                    break;
                }
            }
        }
    }
}

const EBUSY: i32 = 16;
