//! Runtime calls that we wait for, under a deadline: for the daemon, never for the shim.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use gantry_sys::pidfd::PidFd;
use gantry_sys::process::kill_group;
use gantry_sys::signal::SIGKILL;
use serde::Deserialize;

use crate::{Error, Features, Invocation, Runtime, Version};

/// Most bytes of output that are looked at.
const OUTPUT: u64 = 1 << 20;

/// How a call that was waited for ended.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// What `state` prints (OCI runtime-spec, runtime.md).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct State {
    pub id: String,
    /// `creating`, `created`, `running`, `stopped`, or `paused`.
    pub status: String,
    #[serde(default)]
    pub pid: i32,
    pub bundle: String,
}

/// Runs to the end, or kills the whole process group at the deadline. Blocks the caller.
pub fn run_to_completion(call: &Invocation, timeout: Duration) -> Result<Output, Error> {
    let command = || {
        call.args
            .first()
            .map(|a| a.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    let spawn = |source| Error::Spawn {
        binary: call.program.clone(),
        source,
    };
    // Files in memory instead of pipes: nobody has to read while we wait, and a grandchild that
    // keeps them open cannot hold us up.
    let stdout = gantry_sys::fs::memfd("stdout", b"").map_err(spawn)?;
    let stderr = gantry_sys::fs::memfd("stderr", b"").map_err(spawn)?;
    let mut child = call
        .command()
        .stdin(Stdio::null())
        .stdout(stdout.try_clone().map_err(spawn)?)
        .stderr(stderr.try_clone().map_err(spawn)?)
        .process_group(0)
        .spawn()
        .map_err(spawn)?;
    let pid = child.id() as i32;
    let ended = PidFd::open(pid).and_then(|pidfd| pidfd.wait_ended(timeout));
    if !matches!(ended, Ok(true)) {
        // Our own child, not reaped yet: the group is still its.
        let _ = kill_group(pid, SIGKILL);
    }
    let status = child.wait().map_err(spawn)?;
    match ended {
        Err(source) => Err(spawn(source)),
        Ok(false) => Err(Error::Timeout {
            binary: call.program.clone(),
            command: command(),
            after: timeout,
        }),
        Ok(true) => Ok(Output {
            status,
            stdout: content(stdout).map_err(spawn)?,
            stderr: content(stderr).map_err(spawn)?,
        }),
    }
}

fn content(fd: std::os::fd::OwnedFd) -> std::io::Result<String> {
    use std::io::Seek;
    let mut file = std::fs::File::from(fd);
    // The child wrote through the same open file description and left it at the end.
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(OUTPUT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

impl Runtime {
    fn ask(&self, command: &str, arg: Option<&str>, timeout: Duration) -> Result<String, Error> {
        let output = run_to_completion(&self.probe(command, arg), timeout)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let message = crate::log::last_error(&output.stderr)
            .unwrap_or_else(|| output.stderr.lines().last().unwrap_or_default().to_owned());
        Err(Error::Failed {
            binary: self.binary.clone(),
            command: command.to_owned(),
            code: output.status.code().unwrap_or(-1),
            message,
        })
    }

    fn unreadable(&self, command: &str, why: impl std::fmt::Display) -> Error {
        let binary = self.binary.clone();
        Error::Output {
            binary,
            command: command.to_owned(),
            why: why.to_string(),
        }
    }

    /// `--version`.
    pub fn version(&self, timeout: Duration) -> Result<Version, Error> {
        let text = self.ask("--version", None, timeout)?;
        Version::parse(&text).ok_or_else(|| self.unreadable("--version", "no version in it"))
    }

    /// `features`; a runtime without that command is `Error::Failed`.
    pub fn features(&self, timeout: Duration) -> Result<Features, Error> {
        let text = self.ask("features", None, timeout)?;
        Features::parse(&text).map_err(|e| self.unreadable("features", e))
    }

    /// `state` of one container; unknown is `Error::Failed`.
    pub fn state(&self, id: &str, timeout: Duration) -> Result<State, Error> {
        let text = self.ask("state", Some(id), timeout)?;
        serde_json::from_str(&text).map_err(|e| self.unreadable("state", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_types::{ErrorKind, Kind};
    use std::path::Path;
    use std::time::Instant;

    const LONG: Duration = Duration::from_secs(60);

    /// Written by a process of its own: one that another test forks meanwhile would inherit a
    /// descriptor for writing, and executing the file would fail with ETXTBSY.
    fn script(dir: &Path, body: &str) -> Runtime {
        let path = dir.join("fake-runc");
        let mut writer = std::process::Command::new("sh")
            .args(["-c", "cat >\"$0\" && chmod 755 \"$0\""])
            .arg(&path)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = writer.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, format!("#!/bin/sh\n{body}\n").as_bytes()).unwrap();
        drop(input);
        assert!(writer.wait().unwrap().success());
        Runtime::new(path)
    }

    #[test]
    fn a_hung_runtime_is_killed_with_its_group() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let body = format!("sleep 600 & echo $! > {}; wait", pid_file.display());
        let runtime = script(dir.path(), &body);
        let started = Instant::now();
        // Enough for it to get to where it hangs.
        let error = runtime.version(Duration::from_secs(5)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
        assert!(started.elapsed() < LONG);
        let pid: i32 = std::fs::read_to_string(pid_file)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let gone = || gantry_sys::process::Stat::read(pid).map_or(true, |stat| stat.is_zombie());
        while !gone() {
            assert!(started.elapsed() < LONG, "the grandchild still runs");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_grandchild_with_the_output_does_not_hold_us() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = script(dir.path(), "sleep 3 & echo runc version 9");
        assert_eq!(runtime.version(LONG).unwrap().version, "9");
    }

    #[test]
    fn failures_say_what_the_runtime_said() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = script(dir.path(), "echo 'no such command' >&2; exit 3");
        match runtime.features(LONG).unwrap_err() {
            Error::Failed {
                code: 3, message, ..
            } => assert_eq!(message, "no such command"),
            error => panic!("{error}"),
        }
        let runtime = script(dir.path(), "echo nonsense {");
        assert!(matches!(runtime.features(LONG), Err(Error::Output { .. })));
        let absent = Runtime::new("/nonexistent/runc").version(LONG).unwrap_err();
        assert_eq!(absent.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn installed_runtimes_are_understood() {
        for (binary, flavour) in [
            ("/usr/sbin/runc", crate::Flavour::Runc),
            ("/usr/bin/crun", crate::Flavour::Crun),
        ] {
            if !Path::new(binary).exists() {
                println!("SKIP installed_runtimes_are_understood: no {binary}");
                continue;
            }
            let runtime = Runtime::new(binary);
            assert_eq!(runtime.version(LONG).unwrap().flavour, flavour);
            if let Ok(features) = runtime.features(LONG) {
                assert!(!features.oci_version_max.is_empty());
            }
        }
    }
}
