//! Attach: a client between a running container's own streams. Its output comes through pipes that
//! the shim writes to beside the log; its input is written to directly.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use gantry_shim_api::v1::{self, request};
use gantry_types::{ErrorKind, Kind};
use nix::fcntl::OFlag;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt};
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

/// Bytes on their way to the container.
const BUFFER: usize = 16 << 10;

/// A connection to a container's streams.
pub struct Attachment {
    /// Reading ends of what was asked for; a terminal's output is stdout.
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// `None` when it was not asked for or the container has none to give.
    pub stdin: Option<AttachedInput>,
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

/// What writes to a container's input.
pub struct AttachedInput(AsyncFd<OwnedFd>);

impl AttachedInput {
    /// Writes all that comes to the container, until either is at its end, and lets go of it. That
    /// is the end of the container's input if it was made with `stdin_once` and no terminal. True
    /// if it was the client who ended it.
    pub async fn write_from(self, mut from: impl AsyncRead + Unpin) -> bool {
        let mut buffer = vec![0; BUFFER];
        loop {
            let mut rest = match from.read(&mut buffer).await {
                // A client that is gone has nothing more to say either.
                Ok(0) | Err(_) => return true,
                Ok(count) => &buffer[..count],
            };
            while !rest.is_empty() {
                match self.write(rest).await {
                    Ok(count) => rest = &rest[count..],
                    // The container has closed it or has ended.
                    Err(_) => return false,
                }
            }
        }
    }

    async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.writable().await?;
            // `Err`: it was not writable after all.
            if let Ok(written) = ready.try_io(|fd| gantry_sys::io::write(fd.as_fd(), bytes)) {
                return written;
            }
        }
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
    let input = shim.attach(attach, pipes, limit).await.map_err(too_old)?;
    let stdin = input.map(|input| -> io::Result<_> {
        gantry_sys::pty::set_nonblocking(&input)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; an OwnedFd owns its descriptor"
        )]
        Ok(AttachedInput(AsyncFd::new(input)?))
    });
    Ok(Attachment {
        stdout,
        stderr,
        stdin: stdin.transpose().map_err(failed)?,
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
    gantry_sys::pty::set_nonblocking(&read)?;
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
        let (shim, _) = Shim::connect(&pod, &socket, limit, mailbox).await.unwrap();
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
