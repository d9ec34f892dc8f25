//! Plugins that a killed daemon left running.
//!
//! Nobody waits for them any more, and nobody's deadline ends one that hangs. One that goes on
//! with its ADD after the next daemon's DEL would leave an address and an interface behind. So
//! each plugin is told whose it is, in its environment, where its children have it from.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use gantry_sys::pidfd::PidFd;
use gantry_sys::signal::SIGKILL;

/// Names the daemon, by its root directory, of which there is one at a time.
pub const OWNER: &str = "GANTRY_OWNER";

/// A process whose memory cannot be read, since the kernel is busy with it, must not keep a daemon
/// from starting.
const LIMIT: Duration = Duration::from_secs(5);

/// How long one that was killed may take to end.
const END: Duration = Duration::from_secs(1);

/// Kills the plugins that an earlier daemon of this owner has left, and what they began.
pub fn end(owner: &OsStr) {
    if owner.is_empty() {
        return;
    }
    let wanted = [OWNER.as_bytes(), b"=", owner.as_bytes()].concat();
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Fails when nobody waits any more.
        let _ = done.send(end_all(&wanted));
    });
    match ended.recv_timeout(LIMIT) {
        Ok(Ok(0)) => {}
        Ok(Ok(count)) => tracing::warn!(count, "CNI plugins of a killed gantryd were ended"),
        Ok(Err(error)) => tracing::warn!(%error, "CNI plugins of a killed gantryd are not found"),
        Err(_) => tracing::warn!("the processes of this machine cannot be looked at in time"),
    }
}

fn end_all(wanted: &[u8]) -> std::io::Result<usize> {
    let mut killed = Vec::new();
    // Again until none is found: one may have forked while it was looked at.
    for _ in 0..8 {
        let before = killed.len();
        for entry in std::fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            if !is_ours(pid, wanted) {
                continue;
            }
            // The number may have passed to another since: the descriptor has not.
            let Ok(process) = PidFd::open(pid) else {
                continue;
            };
            if is_ours(pid, wanted) && process.signal(SIGKILL).is_ok() {
                killed.push(process);
            }
        }
        for process in &killed[before..] {
            process.wait_ended(END)?;
        }
        if killed.len() == before {
            break;
        }
    }
    Ok(killed.len())
}

/// Whether a process has the variable; one that has ended has none.
fn is_ours(pid: i32, wanted: &[u8]) -> bool {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment
        .split(|byte| *byte == 0)
        .any(|variable| variable == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    #[test]
    fn plugins_of_the_owner_end_with_their_children_and_no_others() {
        let owner = format!("/test/{}", std::process::id());
        let sleeper = |owner: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", "sleep 1000 & wait"]).env(OWNER, owner);
            command.spawn().unwrap()
        };
        let (mut own, mut other) = (sleeper(&owner), sleeper("/test/other"));
        let wanted = format!("{OWNER}={owner}").into_bytes();
        // The shell has forked.
        let children = || {
            let path = format!("/proc/{0}/task/{0}/children", own.id());
            std::fs::read_to_string(path).unwrap()
        };
        while children().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let child: i32 = children().trim().parse().unwrap();
        assert_eq!(end_all(&wanted).unwrap(), 2);
        assert_eq!(own.wait().unwrap().signal(), Some(SIGKILL));
        assert!(!is_ours(child, &wanted));
        assert_eq!(other.try_wait().unwrap(), None);
        let group = format!("/proc/{0}/task/{0}/children", other.id());
        let group = std::fs::read_to_string(group).unwrap();
        other.kill().unwrap();
        other.wait().unwrap();
        for child in group.split_whitespace() {
            let child = nix::unistd::Pid::from_raw(child.parse().unwrap());
            nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
    }
}
