//! Exec: a command in a running container, whose streams go to a client.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use gantry_shim_api::v1::{self, request};
use nix::fcntl::OFlag;
use tokio::sync::oneshot;

use super::exec::{ExecGuard, TerminalSize, exec_id, process_json};
use crate::pod::blocking;
use crate::registry::ContainerView;
use crate::shim::Shim;
use crate::{Context, Error, Stdio};

const STEP: &str = "exec";

/// Our ends of a command's streams.
#[derive(Debug)]
pub enum ExecIo {
    /// Pipes, as far as they were asked for.
    Pipes {
        stdin: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    },
    /// The terminal's master. It hangs up when all copies are closed, that of [`Exec`] too.
    Terminal(OwnedFd),
}

/// A command that runs. Dropped before its end, its whole process tree is killed.
pub struct Exec {
    guard: ExecGuard,
    exit: oneshot::Receiver<i32>,
    terminal: Option<OwnedFd>,
    pod: String,
}

impl Exec {
    /// The exit code, 128 + n after signal n, once the command has ended. May be dropped and called
    /// again; after it has answered it is not to be called.
    pub async fn exit(&mut self) -> Result<i32, Error> {
        let code = (&mut self.exit).await.map_err(|_| Error::Shim {
            pod: self.pod.clone(),
            reason: "lost while a command ran".to_owned(),
        })?;
        self.guard.armed = false;
        Ok(code)
    }

    /// Tells the command's terminal its size. Without a terminal nothing happens.
    pub fn resize(&self, size: TerminalSize) -> Result<(), Error> {
        match &self.terminal {
            Some(terminal) => gantry_sys::pty::resize(terminal, size.width, size.height)
                .map_err(|error| Error::internal("resize the terminal", error)),
            None => Ok(()),
        }
    }

    /// Lets go of the terminal: with the last copy closed its processes get SIGHUP.
    pub fn hang_up(&mut self) {
        self.terminal = None;
    }

    /// Kills the command and all its descendants; its exit code follows.
    pub async fn kill(&self) -> Result<(), Error> {
        self.guard.kill().await
    }
}

pub(crate) async fn exec(
    ctx: &Arc<Context>,
    shim: Arc<Shim>,
    view: Arc<ContainerView>,
    command: Vec<String>,
    stdio: Stdio,
    terminal: Option<TerminalSize>,
) -> Result<(ExecIo, Exec), Error> {
    let bundle = ctx.records.dirs.container(&view.facts.id);
    let process = blocking(move || process_json(&bundle, command, terminal)).await?;
    let (fds, io) = match terminal {
        Some(_) => (Vec::new(), None),
        None => {
            let (fds, io) = pipes(stdio).map_err(|error| Error::internal(STEP, error))?;
            (fds, Some(io))
        }
    };
    let exec_id = exec_id();
    let guard = ExecGuard::new(ctx, &shim, &view, &exec_id);
    let exit = shim.exec_exit(&exec_id);
    let body = v1::Exec {
        container_id: view.facts.id.to_string(),
        exec_id,
        process_json: process,
        tty: terminal.is_some(),
    };
    let limit = ctx.settings.timeouts.runtime * 2;
    let (_, master) = shim.started(request::Body::Exec(body), fds, limit).await?;
    let mut exec = Exec {
        guard,
        exit,
        terminal: None,
        pod: view.facts.pod.to_string(),
    };
    let io = match (io, master) {
        (Some(pipes), _) => pipes,
        (None, Some(master)) => {
            let copy = master.try_clone();
            exec.terminal = Some(copy.map_err(|error| Error::internal(STEP, error))?);
            ExecIo::Terminal(master)
        }
        (None, None) => return Err(Error::internal(STEP, "the shim sent no terminal")),
    };
    Ok((io, exec))
}

/// Pipes for what is wanted and /dev/null for what is not: the command's ends of stdin, stdout and
/// stderr, and ours.
fn pipes(stdio: Stdio) -> io::Result<(Vec<OwnedFd>, ExecIo)> {
    let null = || -> io::Result<OwnedFd> {
        let null = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")?;
        Ok(null.into())
    };
    let pipe = || nix::unistd::pipe2(OFlag::O_CLOEXEC);
    let output = |wanted: bool| -> io::Result<(OwnedFd, Option<OwnedFd>)> {
        if !wanted {
            return Ok((null()?, None));
        }
        let (read, write) = pipe()?;
        Ok((write, Some(read)))
    };
    let (their_stdin, stdin) = if stdio.stdin {
        let (read, write) = pipe()?;
        (read, Some(write))
    } else {
        (null()?, None)
    };
    let (their_stdout, stdout) = output(stdio.stdout)?;
    let (their_stderr, stderr) = output(stdio.stderr)?;
    let io = ExecIo::Pipes {
        stdin,
        stdout,
        stderr,
    };
    Ok((vec![their_stdin, their_stdout, their_stderr], io))
}
