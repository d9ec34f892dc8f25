//! ExecSync: the output comes through pipes that the daemon made, never through the shim.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use gantry_shim_api::v1::{self, request};
use gantry_types::ErrorKind;
use nix::fcntl::OFlag;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::pod::blocking;
use crate::registry::ContainerView;
use crate::shim::Shim;
use crate::{Context, Error};

/// What one stream may answer; the rest is read and dropped, so that the command goes on
/// (CVE-2022-31030).
const STREAM_LIMIT: usize = 16 << 20;

/// Size of a terminal in characters; zero by zero is none that is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

/// What a command left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub code: i32,
}

/// Runs a command in a running container. At `limit` (zero: none) the whole process tree is
/// killed and the answer is [`Error::Deadline`]. A background child that keeps the streams open
/// is waited for no longer than the drain limit: the answer is what the command wrote by then.
pub(crate) async fn exec_sync(
    ctx: &Arc<Context>,
    shim: Arc<Shim>,
    view: Arc<ContainerView>,
    command: Vec<String>,
    limit: Duration,
) -> Result<ExecOutput, Error> {
    const STEP: &str = "exec";
    let bundle = ctx.records.dirs.container(&view.facts.id);
    let process = blocking(move || process_json(&bundle, command, None)).await?;
    let pipe_error = |error: std::io::Error| Error::internal(STEP, error);
    let null = std::fs::File::open("/dev/null").map_err(pipe_error)?;
    let (stdout, stdout_end) = output_pipe().map_err(pipe_error)?;
    let (stderr, stderr_end) = output_pipe().map_err(pipe_error)?;

    let exec_id = exec_id();
    let mut guard = ExecGuard::new(ctx, &shim, &view, &exec_id);
    let exit = shim.exec_exit(&exec_id);
    let body = v1::Exec {
        container_id: view.facts.id.to_string(),
        exec_id: exec_id.clone(),
        process_json: process,
        tty: false,
        // Nobody else takes up its output.
        grace_ms: Some(0),
    };
    let (stop, stopped) = watch::channel(false);
    let stdout = tokio::spawn(collect(stdout, stopped.clone()));
    let stderr = tokio::spawn(collect(stderr, stopped));
    let started = shim.started(
        request::Body::Exec(body),
        vec![OwnedFd::from(null), stdout_end, stderr_end],
        ctx.settings.timeouts.runtime * 2,
    );
    let run = async {
        started.await?;
        exit.await.map_err(|_| Error::Shim {
            pod: view.facts.pod.to_string(),
            reason: "lost while a command ran".to_owned(),
        })
    };
    let outcome = if limit.is_zero() {
        Some(run.await)
    } else {
        tokio::time::timeout(limit, run).await.ok()
    };
    let Some(outcome) = outcome else {
        // Dropping the guard kills the tree.
        return Err(Error::Deadline {
            what: "command".to_owned(),
            seconds: limit.as_secs(),
        });
    };
    guard.armed = outcome.is_err();
    let code = outcome?;
    let drain = ctx.settings.timeouts.exec_drain;
    tokio::spawn(async move {
        tokio::time::sleep(drain).await;
        let _ = stop.send(true);
    });
    let collected = |joined: Result<Vec<u8>, tokio::task::JoinError>| {
        joined.map_err(|error| Error::internal(STEP, error))
    };
    Ok(ExecOutput {
        stdout: collected(stdout.await)?,
        stderr: collected(stderr.await)?,
        code,
    })
}

/// A name for an exec that no other has.
pub(super) fn exec_id() -> String {
    gantry_types::ContainerId::from_random(crate::random())
        .short()
        .to_owned()
}

/// Kills the command's tree unless it has ended: on a deadline, and when the caller goes away.
pub(super) struct ExecGuard {
    shim: Arc<Shim>,
    container: String,
    exec_id: String,
    limit: Duration,
    pub(super) armed: bool,
}

impl ExecGuard {
    pub(super) fn new(
        ctx: &Context,
        shim: &Arc<Shim>,
        view: &ContainerView,
        exec_id: &str,
    ) -> Self {
        Self {
            shim: Arc::clone(shim),
            container: view.facts.id.to_string(),
            exec_id: exec_id.to_owned(),
            limit: ctx.settings.timeouts.shim_call,
            armed: true,
        }
    }

    /// Kills the command's tree now.
    pub(super) async fn kill(&mut self) -> Result<(), Error> {
        let body = v1::KillExec {
            container_id: self.container.clone(),
            exec_id: self.exec_id.clone(),
        };
        let body = request::Body::KillExec(body);
        self.shim.done(body, self.limit).await?;
        self.armed = false;
        Ok(())
    }
}

impl Drop for ExecGuard {
    fn drop(&mut self) {
        self.shim.forget_exec(&self.exec_id);
        if !self.armed {
            return;
        }
        let (shim, limit) = (Arc::clone(&self.shim), self.limit);
        let body = v1::KillExec {
            container_id: std::mem::take(&mut self.container),
            exec_id: std::mem::take(&mut self.exec_id),
        };
        tokio::spawn(async move {
            if let Err(error) = shim.done(request::Body::KillExec(body), limit).await {
                tracing::warn!(%error, "a command that was given up is not killed");
            }
        });
    }
}

/// The daemon's end, which does not block, and the command's, which does.
fn output_pipe() -> std::io::Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    nix::fcntl::fcntl(&read, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((pipe::Receiver::from_owned_fd(read)?, write))
}

/// Reads to the end, or until told to stop; keeps the first `STREAM_LIMIT` bytes.
async fn collect(mut pipe: pipe::Receiver, mut stopped: watch::Receiver<bool>) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let read = tokio::select! {
            biased;
            read = pipe.read(&mut buffer) => read,
            // Also when the sender is gone: nobody waits any more.
            _ = stopped.wait_for(|stopped| *stopped) => break,
        };
        match read {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                let room = STREAM_LIMIT - kept.len();
                kept.extend_from_slice(&buffer[..n.min(room)]);
            }
        }
    }
    kept
}

/// The OCI process object: the container's own with another command, and with a terminal of the
/// size given if it is to have one.
pub(super) fn process_json(
    bundle: &std::path::Path,
    command: Vec<String>,
    terminal: Option<TerminalSize>,
) -> Result<Vec<u8>, Error> {
    const STEP: &str = "exec";
    let path = bundle.join("config.json");
    let bytes = std::fs::read(&path).map_err(|error| Error::io(STEP, &path, &error))?;
    let spec: oci_spec::runtime::Spec =
        serde_json::from_slice(&bytes).map_err(|error| Error::internal(STEP, error))?;
    let mut process = spec
        .process()
        .as_ref()
        .ok_or_else(|| Error::internal(STEP, "the container's spec has no process"))
        .and_then(|own| {
            let with_terminal = terminal.is_some();
            gantry_spec::process::exec(own, &command, with_terminal).map_err(Error::step(STEP))
        })?;
    if let Some(size) = terminal.filter(|size| *size != TerminalSize::default()) {
        let console = oci_spec::runtime::BoxBuilder::default()
            .width(u64::from(size.width))
            .height(u64::from(size.height))
            .build()
            .map_err(|error| Error::internal(STEP, error))?;
        process.set_console_size(Some(console));
    }
    serde_json::to_vec(&process).map_err(|error| Error::Failed {
        step: STEP,
        kind: ErrorKind::Internal,
        message: error.to_string(),
    })
}
