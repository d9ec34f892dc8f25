//! Killing a process with everything that came from it.

use std::path::Path;

use gantry_sys::pidfd::PidFd;
use gantry_sys::process::Stat;
use gantry_sys::signal::{SIGKILL, SIGSTOP};
use gantry_types::ProcessRef;

/// Looks for new members before we stop looking: each round stops whom it finds, and a stopped
/// process makes no children, so that only a chain of forks as fast as we read can go on.
const ROUNDS: u32 = 16;

/// Kills `root`, its descendants, and every process of the session that `root` leads. Whoever
/// is found is stopped first, so that nobody forks away while we look, and killed when nobody
/// new is found.
///
/// `root` may have ended: those of its session are still found, its orphans are not. Searched is
/// the cgroup `within`, or the whole machine without one. A process that left the session and
/// whose parents have all ended cannot be told from others of the container and survives.
pub fn kill(root: ProcessRef, within: Option<&Path>) {
    let mut members: Vec<(i32, PidFd)> = Vec::new();
    for _ in 0..ROUNDS {
        let mut grew = false;
        for pid in candidates(within).into_iter().chain([root.pid]) {
            if members.iter().any(|(member, _)| *member == pid) {
                continue;
            }
            let Ok(process) = PidFd::open(pid) else {
                continue;
            };
            // Read after the descriptor pinned the process: this is about whoever it holds.
            let Ok(stat) = Stat::read(pid) else { continue };
            if belongs(&stat, root, &members) {
                // It may have ended in between; then there is nothing left to stop.
                let _ = process.signal(SIGSTOP);
                members.push((pid, process));
                grew = true;
            }
        }
        if !grew {
            break;
        }
    }
    for (_, process) in &members {
        let _ = process.signal(SIGKILL);
    }
}

fn belongs(stat: &Stat, root: ProcessRef, members: &[(i32, PidFd)]) -> bool {
    if stat.is_zombie() {
        return false;
    }
    if stat.pid == root.pid {
        return stat.start_time == root.start_time;
    }
    // Nobody is older than its ancestor: an older process in a session of that number is of a
    // leader that had the pid before.
    stat.start_time >= root.start_time
        && (stat.session == root.pid || members.iter().any(|(member, _)| *member == stat.ppid))
}

fn candidates(within: Option<&Path>) -> Vec<i32> {
    match within {
        Some(cgroup) => crate::cgroup::processes(cgroup),
        None => std::fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_sys::process::{alive, process_ref};
    use std::time::{Duration, Instant};

    #[test]
    fn children_grandchildren_and_the_session_die_and_strangers_live() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let mut stranger = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        // A child, a child with a session of its own, and one that outlives its parent within
        // the session.
        let script = format!(
            "sleep 600 & echo $! >> {0}; setsid sleep 600 & echo $! >> {0}; \
             sh -c 'sleep 600 & echo $! >> {0}'; echo done >> {0}; wait",
            pids.display()
        );
        let mut root = std::process::Command::new("setsid")
            .args(["sh", "-c", &script])
            .spawn()
            .unwrap();
        let started = Instant::now();
        let text = loop {
            let text = std::fs::read_to_string(&pids).unwrap_or_default();
            if text.contains("done") {
                break text;
            }
            assert!(started.elapsed() < Duration::from_secs(60), "{text}");
            std::thread::sleep(Duration::from_millis(5));
        };
        let members: Vec<_> = text
            .lines()
            .filter_map(|l| process_ref(l.parse().ok()?).ok())
            .collect();
        assert_eq!(members.len(), 3);
        kill(process_ref(root.id() as i32).unwrap(), None);
        root.wait().unwrap();
        while members.iter().any(|&member| alive(member)) {
            assert!(started.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    #[test]
    fn a_reused_pid_is_left_alone() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let process = process_ref(child.id() as i32).unwrap();
        kill(
            ProcessRef {
                start_time: process.start_time + 1,
                ..process
            },
            None,
        );
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
