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

/// A command that was started for a client.
pub struct Exec {
    pub io: ExecIo,
    pub terminal: Option<Terminal>,
    pub process: ExecProcess,
}

/// Our ends of a command's streams.
#[derive(Debug)]
pub enum ExecIo {
    /// Pipes, as far as they were asked for.
    Pipes {
        stdin: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    },
    /// The terminal's master. Its processes get SIGHUP when it is closed and the [`Terminal`] is.
    Terminal(OwnedFd),
}

/// A command's terminal, to be told its size.
#[derive(Debug)]
pub struct Terminal(OwnedFd);

impl Terminal {
    pub fn resize(&self, size: TerminalSize) -> Result<(), Error> {
        gantry_sys::pty::resize(&self.0, size.width, size.height)
            .map_err(|error| Error::internal("resize the terminal", error))
    }
}

/// The process of a command. Dropped before its end, the whole process tree is killed.
pub struct ExecProcess {
    guard: ExecGuard,
    exit: oneshot::Receiver<i32>,
    code: Option<i32>,
    pod: String,
}

impl ExecProcess {
    /// The exit code, 128 + n after signal n, once the command has ended. May be dropped and called
    /// again.
    pub async fn exit(&mut self) -> Result<i32, Error> {
        if let Some(code) = self.code {
            return Ok(code);
        }
        let code = (&mut self.exit).await.map_err(|_| Error::Shim {
            pod: self.pod.clone(),
            reason: "lost while a command ran".to_owned(),
        })?;
        self.guard.armed = false;
        self.code = Some(code);
        Ok(code)
    }

    /// Kills the process and all that it began, as far as that can still be told once the process
    /// has ended: what is in its session.
    pub async fn kill(&mut self) -> Result<(), Error> {
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
) -> Result<Exec, Error> {
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
    let grace = ctx.settings.timeouts.exec_grace;
    let guard = ExecGuard::new(ctx, &shim, &view, &exec_id);
    let exit = shim.exec_exit(&exec_id);
    let body = v1::Exec {
        container_id: view.facts.id.to_string(),
        exec_id,
        process_json: process,
        tty: terminal.is_some(),
        grace_ms: Some(u32::try_from(grace.as_millis()).unwrap_or(u32::MAX)),
    };
    let limit = ctx.settings.timeouts.runtime * 2;
    let (_, master) = shim.started(request::Body::Exec(body), fds, limit).await?;
    let process = ExecProcess {
        guard,
        exit,
        code: None,
        pod: view.facts.pod.to_string(),
    };
    let (io, terminal) = match (io, master) {
        (Some(pipes), _) => (pipes, None),
        (None, Some(master)) => {
            let copy = master.try_clone();
            let copy = copy.map_err(|error| Error::internal(STEP, error))?;
            (ExecIo::Terminal(master), Some(Terminal(copy)))
        }
        (None, None) => return Err(Error::internal(STEP, "the shim sent no terminal")),
    };
    Ok(Exec {
        io,
        terminal,
        process,
    })
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
