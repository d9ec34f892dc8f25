//! Moves bytes between a client's streams and a process's pipes or terminal.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::time::Duration;

use bytes::Buf;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use tokio::io::AsyncWriteExt;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::backend::{Input, Output};

/// Bytes that are read from a process, or taken from the client, at a time: what a pipe holds. The
/// memory for them is there only while they move.
const BUFFER: usize = 64 * 1024;

/// How a process's output is drained after its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drain {
    /// Longest that whoever still holds the output open may write nothing.
    pub silence: Duration,
    /// Longest that the client may take nothing of it.
    pub stall: Duration,
}

/// Our ends of a process's streams; those that it does not have, or nobody wants, are `None`.
pub struct ProcessIo {
    stdin: Option<AsyncFd<OwnedFd>>,
    stdout: Option<AsyncFd<OwnedFd>>,
    stderr: Option<AsyncFd<OwnedFd>>,
}

impl ProcessIo {
    /// The ends of pipes. They are made non-blocking, which the process's ends do not notice.
    pub fn pipes(
        stdin: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) -> io::Result<Self> {
        Ok(Self {
            stdin: stdin.map(non_blocking).transpose()?,
            stdout: stdout.map(non_blocking).transpose()?,
            stderr: stderr.map(non_blocking).transpose()?,
        })
    }

    /// The master of a pseudoterminal, which carries both directions.
    pub fn terminal(master: OwnedFd) -> io::Result<Self> {
        let other = master.try_clone()?;
        Self::pipes(Some(other), Some(master), None)
    }
}

fn non_blocking(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe; an OwnedFd owns its descriptor"
    )]
    AsyncFd::new(fd)
}

/// Relays until `exit` resolves, which is the process's end, and its output has reached the client;
/// returns what `exit` gave.
///
/// - The client's half-close closes the process's stdin (a terminal has none of its own).
/// - A client that is gone, or reads no more, closes the process's output: its next write fails.
/// - A descendant that holds the output open after the process's end is waited for as long as it is
///   never silent for [`Drain::silence`], and its client as long as it takes some of the output
///   within each [`Drain::stall`].
pub async fn relay<T>(
    (stdin, stdout, stderr): (Option<Input>, Option<Output>, Option<Output>),
    process: ProcessIo,
    exit: impl Future<Output = T>,
    drain: Drain,
) -> T {
    let (exited, exiting) = watch::channel(false);
    let mut ended = exiting.clone();
    let input = async {
        let (Some(from), Some(to)) = (stdin, process.stdin) else {
            return;
        };
        // What a process that has ended did not read is discarded, so that its client is heard.
        tokio::select! {
            _ = send(from, to) => {}
            _ = ended.wait_for(|exited| *exited) => {}
        }
    };
    let streams = async {
        tokio::join!(
            input,
            receive(process.stdout, stdout, exiting.clone(), drain),
            receive(process.stderr, stderr, exiting, drain),
        )
    };
    let (mut streams, mut exit) = (pin!(streams), pin!(exit));
    let value = tokio::select! {
        value = &mut exit => {
            exited.send_replace(true);
            streams.await;
            value
        }
        _ = &mut streams => exit.await,
    };
    value
}

/// Writes all that the client sends to `to`, a pipe or a terminal, until either is at its end, and
/// closes both. True if it was the client who ended it.
pub async fn feed(from: Input, to: OwnedFd) -> io::Result<bool> {
    Ok(send(from, non_blocking(to)?).await)
}

/// See [`feed`].
async fn send(mut from: Input, to: AsyncFd<OwnedFd>) -> bool {
    loop {
        // A client that is gone has nothing more to say either.
        let Ok(Some(mut bytes)) = from.receive(BUFFER).await else {
            return true;
        };
        while !bytes.is_empty() {
            match write(&to, &bytes).await {
                Ok(count) => bytes.advance(count),
                // It reads no more.
                Err(_) => return false,
            }
        }
    }
}

/// From the process. Ends, and closes both, when either is at its end.
async fn receive(
    from: Option<AsyncFd<OwnedFd>>,
    to: Option<Output>,
    mut exiting: watch::Receiver<bool>,
    drain: Drain,
) {
    let (Some(from), Some(mut to)) = (from, to) else {
        return;
    };
    // Resolves so long after the process's end.
    let mut after_exit = async move |limit: Duration| {
        // The sender outlives this.
        let _ = exiting.wait_for(|exited| *exited).await;
        sleep(limit).await;
    };
    loop {
        let buffer = tokio::select! {
            biased;
            // A terminal whose last process is gone fails with EIO.
            read = read(&from) => match read {
                Ok(bytes) if !bytes.is_empty() => bytes,
                Ok(_) | Err(_) => return,
            },
            () = after_exit(drain.silence) => return,
        };
        let mut rest = &buffer[..];
        while !rest.is_empty() {
            tokio::select! {
                biased;
                written = to.write(rest) => match written {
                    Ok(count) => rest = &rest[count..],
                    Err(_) => return,
                },
                () = after_exit(drain.stall) => return,
            }
        }
    }
}

/// What can be read, nothing at the end.
async fn read(fd: &AsyncFd<OwnedFd>) -> io::Result<Vec<u8>> {
    loop {
        let mut ready = fd.readable().await?;
        let mut buffer = Vec::with_capacity(BUFFER);
        let read = |fd: &AsyncFd<OwnedFd>| {
            let room = rustix::buffer::spare_capacity(&mut buffer);
            Ok(rustix::io::read(fd.as_fd(), room)?)
        };
        match ready.try_io(read) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result.map(|_| buffer),
            // It was not readable after all.
            Err(_) => {}
        }
    }
}

async fn write(fd: &AsyncFd<OwnedFd>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        let mut ready = fd.writable().await?;
        match ready.try_io(|fd| Ok(rustix::io::write(fd.as_fd(), bytes)?)) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
            // It was not writable after all.
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{Channel, WINDOW};
    use std::sync::Arc;
    use tokio::sync::Notify;

    const PATIENT: Drain = Drain {
        silence: Duration::from_secs(60),
        stall: Duration::from_secs(60),
    };

    #[tokio::test]
    async fn what_a_process_that_has_ended_did_not_read_holds_nobody_up() {
        let (channel, input, output) = Channel::new(Arc::new(Notify::new()));
        channel.deliver(&vec![0; WINDOW * 2]);
        // Nobody reads the one pipe, and a descendant keeps the other open.
        let (_unread, stdin) = io::pipe().unwrap();
        let (stdout, held) = io::pipe().unwrap();
        let process = ProcessIo::pipes(Some(stdin.into()), Some(stdout.into()), None).unwrap();
        let (exit, exited) = tokio::sync::oneshot::channel();
        let ends = (Some(input), Some(output), None);
        let relay = tokio::spawn(relay(ends, process, exited, PATIENT));
        sleep(Duration::from_millis(50)).await;
        assert!(channel.over_window());
        exit.send(7).unwrap();
        while channel.over_window() {
            sleep(Duration::from_millis(1)).await;
        }
        assert!(!relay.is_finished());
        drop(held);
        assert_eq!(relay.await.unwrap(), Ok(7));
    }
}
