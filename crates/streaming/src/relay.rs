//! Moves bytes between a client's streams and a process's pipes or terminal.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::backend::{Input, Output};

/// Bytes that are in a process's stream's way between pipe and client.
const BUFFER: usize = 32 * 1024;

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
///   never silent for `silence`.
pub async fn relay<T>(
    (stdin, stdout, stderr): (Option<Input>, Option<Output>, Option<Output>),
    process: ProcessIo,
    exit: impl Future<Output = T>,
    silence: Duration,
) -> T {
    let (exited, exiting) = watch::channel(false);
    let mut ended = exiting.clone();
    let input = async {
        let (Some(from), Some(to)) = (stdin, process.stdin) else {
            return;
        };
        // What a process that has ended did not read is discarded, so that its client is heard.
        tokio::select! {
            () = send(from, to) => {}
            _ = ended.wait_for(|exited| *exited) => {}
        }
    };
    let streams = async {
        tokio::join!(
            input,
            receive(process.stdout, stdout, exiting.clone(), silence),
            receive(process.stderr, stderr, exiting, silence),
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

/// To the process. Ends, and closes both, when either is at its end.
async fn send(mut from: Input, to: AsyncFd<OwnedFd>) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = match from.read(&mut buffer).await {
            // A client that is gone has nothing more to say either.
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            match write(&to, rest).await {
                Ok(count) => rest = &rest[count..],
                // It reads no more.
                Err(_) => return,
            }
        }
    }
}

/// From the process. Ends, and closes both, when either is at its end.
async fn receive(
    from: Option<AsyncFd<OwnedFd>>,
    to: Option<Output>,
    mut exiting: watch::Receiver<bool>,
    silence: Duration,
) {
    let (Some(from), Some(mut to)) = (from, to) else {
        return;
    };
    let mut buffer = vec![0; BUFFER];
    loop {
        let silent = async {
            // The sender outlives this.
            let _ = exiting.wait_for(|exited| *exited).await;
            sleep(silence).await;
        };
        let count = tokio::select! {
            biased;
            // A terminal whose last process is gone fails with EIO.
            read = read(&from, &mut buffer) => match read {
                Ok(0) | Err(_) => return,
                Ok(count) => count,
            },
            () = silent => return,
        };
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

async fn read(fd: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = fd.readable().await?;
        let read = |fd: &AsyncFd<OwnedFd>| Ok(rustix::io::read(fd.as_fd(), &mut *buffer)?);
        match ready.try_io(read) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
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
        let relay = tokio::spawn(relay(ends, process, exited, Duration::from_secs(60)));
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
