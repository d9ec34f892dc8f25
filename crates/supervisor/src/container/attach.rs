//! Attach: a client between a running container's own streams. Its output comes through pipes that
//! the shim writes to beside the log; its input is written to directly.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use gantry_shim_api::v1::{self, request};
use gantry_types::{ErrorKind, Kind};
use nix::fcntl::OFlag;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::exec::TerminalSize;
use crate::registry::ContainerView;
use crate::shim::Shim;
use crate::{Context, Error, Stdio};

const STEP: &str = "attach";

/// How far a client may lag behind before the shim cuts it off. The kernel takes the memory as it
/// is used, and allows less to those without CAP_SYS_RESOURCE if so configured.
const LAG: usize = 1 << 20;

/// Longest reason that a shim gives.
const REASON: u64 = 4096;

/// A connection to a container's streams.
pub struct Attachment {
    /// Reading ends of what was asked for; a terminal's output is stdout.
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// What writes to the container's input; `None` when it was not asked for or the container has none
    /// to give. Closing it is the end of the container's input if that was made with `stdin_once` and
    /// no terminal.
    pub stdin: Option<OwnedFd>,
    pub end: AttachmentEnd,
    pub terminal: ContainerTerminal,
}

/// Tells when an attachment ends; dropping it detaches.
pub struct AttachmentEnd(pipe::Receiver);

impl AttachmentEnd {
    /// Resolves when the container has ended, or with why the shim ended the attachment.
    pub async fn wait(self) -> Result<(), Error> {
        let mut reason = String::new();
        let mut pipe = self.0.take(REASON);
        let read = pipe.read_to_string(&mut reason);
        read.await.map_err(|error| Error::internal(STEP, error))?;
        if reason.is_empty() {
            return Ok(());
        }
        Err(Error::Failed {
            step: STEP,
            kind: ErrorKind::ResourceExhausted,
            message: reason,
        })
    }
}

/// The terminal of a container's first process, to be told its size.
pub struct ContainerTerminal {
    shim: Arc<Shim>,
    container: String,
    limit: Duration,
}

impl ContainerTerminal {
    pub async fn resize(&self, size: TerminalSize) -> Result<(), Error> {
        let body = v1::ResizePty {
            container_id: self.container.clone(),
            exec_id: String::new(),
            width: size.width.into(),
            height: size.height.into(),
        };
        let body = request::Body::ResizePty(body);
        self.shim.done(body, self.limit).await
    }
}

pub(crate) async fn attach(
    ctx: &Arc<Context>,
    shim: Arc<Shim>,
    view: Arc<ContainerView>,
    stdio: Stdio,
) -> Result<Attachment, Error> {
    begin(shim, view, stdio, ctx.settings.timeouts.shim_call).await
}

async fn begin(
    shim: Arc<Shim>,
    view: Arc<ContainerView>,
    stdio: Stdio,
    limit: Duration,
) -> Result<Attachment, Error> {
    let failed = |error: io::Error| Error::internal(STEP, error);
    let attach = v1::Attach {
        container_id: view.facts.id.to_string(),
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
    };
    let (pipe, theirs) = output().map_err(failed)?;
    let pipe = pipe::Receiver::from_owned_fd(pipe).map_err(failed)?;
    let mut pipes = vec![theirs];
    let (mut stdout, mut stderr) = (None, None);
    for (wanted, ours) in [(stdio.stdout, &mut stdout), (stdio.stderr, &mut stderr)] {
        if wanted {
            let (read, write) = output().map_err(failed)?;
            if let Err(error) = gantry_sys::io::set_pipe_size(&write, LAG) {
                tracing::debug!(%error, "clients of attach may lag behind less");
            }
            *ours = Some(read);
            pipes.push(write);
        }
    }
    let stdin = shim.attach(attach, pipes, limit).await.map_err(too_old)?;
    Ok(Attachment {
        stdout,
        stderr,
        stdin,
        end: AttachmentEnd(pipe),
        terminal: ContainerTerminal {
            shim,
            container: view.facts.id.to_string(),
            limit,
        },
    })
}

/// A pipe of which we keep the reading end, which does not block.
fn output() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    gantry_sys::io::set_nonblocking(&read)?;
    Ok((read, write))
}

/// The shims of running pods are those that they were started with.
fn too_old(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Unimplemented => Error::Failed {
            step: STEP,
            kind: ErrorKind::Unimplemented,
            message: "the pod runs under an older gantry-shim that cannot; a new pod can"
                .to_owned(),
        },
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::ContainerFacts;
    use gantry_shim_api::v1::message;
    use gantry_testkit::fake_shim::{Answer, FakeShim};
    use gantry_types::{ContainerId, ContainerState, PodId};
    use tokio::sync::mpsc;

    #[tokio::test]
    async fn an_older_shim_is_named_as_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let (pod, limit) = (PodId::from_random([7; 32]), Duration::from_secs(10));
        let socket = dir.path().join("shim.sock");
        // What a shim answers to a request that it does not know.
        let _fake = FakeShim::start(&socket, pod.as_str(), |_| {
            Answer::Body(message::Body::Error(v1::Error {
                kind: v1::ErrorKind::Unimplemented.into(),
                message: "this shim does not know the request".to_owned(),
            }))
        })
        .unwrap();
        let (mailbox, _messages) = mpsc::channel(8);
        let (shim, _) = Shim::connect(&Arc::default(), &pod, &socket, limit, mailbox)
            .await
            .unwrap();
        let facts = ContainerFacts {
            id: ContainerId::from_random([8; 32]),
            pod,
            config: Default::default(),
            record: Default::default(),
        };
        let view = ContainerView {
            facts: Arc::new(facts),
            state: ContainerState::Created,
            resources: None,
            user: None,
            in_custody: false,
        };
        let stdio = Stdio {
            stdout: true,
            ..Stdio::default()
        };
        let error = begin(shim, Arc::new(view), stdio, limit)
            .await
            .err()
            .unwrap();
        assert_eq!(error.kind(), ErrorKind::Unimplemented);
        assert!(error.to_string().contains("older gantry-shim"), "{error}");
    }
}
