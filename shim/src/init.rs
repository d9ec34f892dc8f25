//! The init of a container that asks for one (annotation `gantry.io/init`): this same program,
//! mounted into the container and started there under its name [`NAME`] with the command as
//! arguments.
//!
//! It starts the command, hands every signal on to it, reaps whatever else ends, and ends as the
//! command did. In a PID namespace that it does not lead it adopts the orphans of its own. It stays
//! in the command's process group, so that a terminal speaks to the command without its help.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use gantry_sys::pidfd::PidFd;
use gantry_sys::process;
use gantry_sys::signal::{self, AllSignals, SIGCHLD};

use crate::report;

/// File name under which the container has it.
const NAME: &str = "gantry-init";

/// Exit codes of shells for a command that is not there, and for one that cannot be run.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// The command, if this is the init.
pub fn command() -> Option<Vec<OsString>> {
    let mut args = std::env::args_os();
    let own = args.next()?;
    let name = Path::new(&own).file_name()?;
    (name.as_bytes() == NAME.as_bytes()).then(|| args.collect())
}

pub fn run(command: &[OsString]) -> ExitCode {
    match start_and_wait(command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let name = command.first().cloned().unwrap_or_default();
            report!("{}: {error}", name.to_string_lossy());
            match error.kind() {
                std::io::ErrorKind::NotFound => ExitCode::from(NOT_FOUND),
                _ => ExitCode::from(NOT_EXECUTABLE),
            }
        }
    }
}

fn start_and_wait(command: &[OsString]) -> std::io::Result<u8> {
    let (program, args) = command
        .split_first()
        .ok_or(std::io::ErrorKind::InvalidInput)?;
    // The kernel delivers to the first process of a namespace only what that blocks or handles.
    // During the spawn, when the mask is open for the command to inherit, a signal does what it
    // would do to a program that has just begun.
    let mut signals = AllSignals::block()?;
    process::set_child_subreaper()?;
    let mut child = Command::new(program);
    child.args(args).arg0(program);
    let child = signal::with_none_blocked(|| child.spawn())??;
    let pid = i32::try_from(child.id()).map_err(std::io::Error::other)?;
    let handle = PidFd::open(pid)?;
    loop {
        // First without waiting: the signal of an early end may have come with the mask open.
        while let Some(ended) = process::reap_any()? {
            if ended.pid == pid {
                // 128 + n after signal n. Codes have eight bits (wait(2)).
                return Ok(u8::try_from(ended.code & 0xff).unwrap_or(u8::MAX));
            }
        }
        let received = signals.wait()?;
        // What the terminal's keys and size send, the whole group gets from the kernel.
        if received.signal != SIGCHLD && !received.from_kernel {
            // It may have ended a moment ago; the next look tells.
            let _ = handle.signal(received.signal);
        }
    }
}
