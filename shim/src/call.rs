//! One execution of the OCI runtime, from spawn to the reaper.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use gantry_runtime::Invocation;
use gantry_types::ProcessRef;

use crate::console::Console;
use crate::error::Error;

/// Who gets an answer: a connection and the request's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    pub conn: u32,
    pub request: u64,
}

/// What to do when the runtime has ended.
pub enum Purpose {
    /// Make and start a container; `rest` is what is still to be executed.
    Start {
        container: u32,
        asker: Asker,
        rest: Vec<Invocation>,
    },
    /// Remove what a failed start left; then answer with its error.
    Undo {
        container: u32,
        asker: Asker,
        error: Error,
    },
    Exec {
        container: u32,
        asker: Asker,
        exec: PendingExec,
    },
    Delete {
        container: u32,
        force: bool,
    },
    Update {
        asker: Asker,
    },
}

/// An exec whose process does not run yet.
pub struct PendingExec {
    pub id: String,
    pub process_file: PathBuf,
    pub pid_file: PathBuf,
    pub console: Option<Console>,
    /// See [`crate::container::Exec`].
    pub grace: Option<Duration>,
}

impl Purpose {
    /// The runtime's subcommand, for messages.
    pub fn command(&self) -> &'static str {
        match self {
            Purpose::Start { .. } => "create",
            Purpose::Undo { .. } | Purpose::Delete { .. } => "delete",
            Purpose::Exec { .. } => "exec",
            Purpose::Update { .. } => "update",
        }
    }
}

pub struct Call {
    pub process: ProcessRef,
    pub deadline: Instant,
    pub timed_out: bool,
    /// JSON log of this execution alone.
    pub log: PathBuf,
    pub purpose: Purpose,
}

/// Standard streams of an execution.
pub struct Streams {
    pub stdin: Stdio,
    pub stdout: Stdio,
    pub stderr: Stdio,
}

impl Streams {
    pub fn null() -> Self {
        Self {
            stdin: Stdio::null(),
            stdout: Stdio::null(),
            stderr: Stdio::null(),
        }
    }
}

/// Executes the runtime in a process group of its own, so that a deadline can take its helpers
/// along. For [`crate::shim::Shim::spawn`], which sees to it that it is reaped.
pub fn spawn(call: &Invocation, streams: Streams) -> Result<ProcessRef, Error> {
    gantry_sys::failpoint::at("runtime::before").map_err(Error::call("execute the OCI runtime"))?;
    let mut command = call.command();
    command
        .stdin(streams.stdin)
        .stdout(streams.stdout)
        .stderr(streams.stderr)
        .process_group(0);
    // Containers decide about huge pages themselves, but the setting passes through execve; the
    // child has executed, or failed to, when spawn returns.
    let _ = gantry_sys::process::set_thp_disabled(false);
    let result = gantry_sys::signal::with_none_blocked(|| command.spawn());
    let _ = gantry_sys::process::set_thp_disabled(true);
    let result = result.and_then(|spawned| spawned);
    let child =
        result.map_err(|e| Error::Runtime(format!("execute {}: {e}", call.program.display())))?;
    let pid = child.id() as i32;
    // A child that nobody has reaped keeps its entry, even if it has ended.
    gantry_sys::process::process_ref(pid).map_err(Error::call("read the OCI runtime's start time"))
}
