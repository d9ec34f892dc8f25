//! Plugins that a killed daemon left running.
//!
//! Nobody waits for them any more, and nobody's deadline ends one that hangs. One that goes on
//! with its ADD after the next daemon's DEL would leave an address and an interface behind. So
//! each call has a file for as long as it lasts, whose path the plugin and its children have in
//! their environment. What a plugin left behind on purpose, a name server say, has none any more.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use gantry_sys::pidfd::PidFd;
use gantry_sys::signal::SIGKILL;

/// Names the call.
pub const CALL: &str = "GANTRY_CNI_CALL";

/// A process whose memory cannot be read, since the kernel is busy with it, must not keep a daemon
/// from starting.
const LIMIT: Duration = Duration::from_secs(5);

/// How long one that was killed may take to end.
const END: Duration = Duration::from_secs(1);

/// A call under way. Its file goes when it is dropped.
pub struct Noted(PathBuf);

impl Noted {
    /// Notes a call in `dir`; `None` without one, and where nothing can be written: a full disk must
    /// keep nobody from giving a network back.
    pub fn new(dir: &Path) -> Option<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if dir.as_os_str().is_empty() {
            return None;
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default().as_nanos();
        let path = dir.join(format!("{now}-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        match fs::write(&path, "") {
            Ok(()) => Some(Self(path)),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a CNI call is not noted");
                None
            }
        }
    }

    pub fn path(&self) -> &OsStr {
        self.0.as_os_str()
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "the note of a CNI call stays");
        }
    }
}

/// Kills what is left of the calls that an earlier daemon has noted in `dir`, which is made if
/// missing.
pub fn end(dir: &Path) -> io::Result<()> {
    if dir.as_os_str().is_empty() {
        return Ok(());
    }
    fs::create_dir_all(dir)?;
    let notes = fs::read_dir(dir)?.map(|entry| Ok(entry?.path()));
    let notes = notes.collect::<io::Result<Vec<PathBuf>>>()?;
    if notes.is_empty() {
        return Ok(());
    }
    let wanted = notes.iter().map(|note| variable(note)).collect();
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Fails when nobody waits any more.
        let _ = done.send(end_all(wanted));
    });
    match ended.recv_timeout(LIMIT) {
        Ok(ended) => {
            let count = ended?;
            if count > 0 {
                tracing::warn!(count, "CNI plugins of a killed gantryd were ended");
            }
        }
        // The notes stay for the next start.
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    }
    notes.iter().try_for_each(fs::remove_file)
}

fn variable(note: &Path) -> Vec<u8> {
    [CALL.as_bytes(), b"=", note.as_os_str().as_bytes()].concat()
}

fn end_all(wanted: Vec<Vec<u8>>) -> io::Result<usize> {
    let mut killed = Vec::new();
    // Again until none is found: one may have forked while it was looked at.
    for _ in 0..8 {
        let before = killed.len();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            if !is_wanted(pid, &wanted) {
                continue;
            }
            // The number may have passed to another since: the descriptor has not.
            let Ok(process) = PidFd::open(pid) else {
                continue;
            };
            if is_wanted(pid, &wanted) && process.signal(SIGKILL).is_ok() {
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

/// Whether a process has one of the variables; one that has ended has none.
fn is_wanted(pid: i32, wanted: &[Vec<u8>]) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let mut variables = environment.split(|byte| *byte == 0);
    variables.any(|variable| wanted.iter().any(|wanted| wanted == variable))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command};

    fn children(of: &Child) -> Vec<i32> {
        let path = format!("/proc/{0}/task/{0}/children", of.id());
        let text = fs::read_to_string(path).unwrap();
        text.split_whitespace()
            .map(|pid| pid.parse().unwrap())
            .collect()
    }

    /// A shell with a child.
    fn plugin(call: &OsStr) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & wait"]).env(CALL, call);
        let child = command.spawn().unwrap();
        while children(&child).is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    }

    #[test]
    fn plugins_of_calls_under_way_end_with_their_children_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let notes = dir.path().join("cni");
        end(&notes).unwrap();
        let (hung, over) = (Noted::new(&notes).unwrap(), Noted::new(&notes).unwrap());
        let (mut left, mut on_purpose) = (plugin(hung.path()), plugin(over.path()));
        let (child, other) = (children(&left)[0], children(&on_purpose)[0]);
        // That call has ended in good order, the daemon in the middle of the other.
        drop(over);
        std::mem::forget(hung);
        end(&notes).unwrap();
        assert_eq!(left.wait().unwrap().signal(), Some(SIGKILL));
        assert!(
            fs::read(format!("/proc/{child}/environ"))
                .unwrap_or_default()
                .is_empty()
        );
        assert_eq!(on_purpose.try_wait().unwrap(), None);
        assert_eq!(fs::read_dir(&notes).unwrap().count(), 0);
        on_purpose.kill().unwrap();
        on_purpose.wait().unwrap();
        PidFd::open(other).unwrap().signal(SIGKILL).unwrap();
        // Without a directory nothing is noted.
        assert!(Noted::new(Path::new("")).is_none());
        end(Path::new("")).unwrap();
    }
}
