//! A connection with a buffer for each way, moved by one task.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncWriteExt, ReadBuf};
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until, timeout};

use crate::conn::Transport;
use crate::session::{Farewell, LINGER, LOOK, stopped};

/// Bytes that one read takes at most.
const READ: usize = 16 * 1024;

pub(crate) struct Wire<T> {
    io: T,
    /// What was read and not used yet.
    pub input: BytesMut,
    buffer: Box<[u8]>,
    unflushed: bool,
    write_first: bool,
}

/// What one step did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Read(usize),
    /// The client sends no more.
    Closed,
    Wrote,
}

impl<T: Transport> Wire<T> {
    pub fn new(io: T) -> Self {
        Self {
            io,
            input: BytesMut::new(),
            buffer: vec![0; READ].into(),
            unflushed: false,
            write_first: false,
        }
    }

    pub fn peer_closed(&self) -> bool {
        self.io.peer_closed()
    }

    /// Reads a piece, if `read`, or writes a piece of `out`, whichever can be done; waits while
    /// neither can. May be dropped and called again without loss.
    pub async fn step(&mut self, read: bool, out: &mut BytesMut) -> io::Result<Step> {
        poll_fn(|cx| {
            // Taking turns, so that neither direction starves the other.
            self.write_first = !self.write_first;
            for write in [self.write_first, !self.write_first] {
                let polled = match write {
                    true => self.poll_out(cx, out),
                    false if read => self.poll_in(cx),
                    false => Poll::Pending,
                };
                if polled.is_ready() {
                    return polled;
                }
            }
            Poll::Pending
        })
        .await
    }

    fn poll_in(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Step>> {
        let mut buf = ReadBuf::new(&mut self.buffer);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut buf))?;
        let count = buf.filled().len();
        self.input.extend_from_slice(buf.filled());
        Poll::Ready(Ok(match count {
            0 => Step::Closed,
            count => Step::Read(count),
        }))
    }

    fn poll_out(&mut self, cx: &mut Context<'_>, out: &mut BytesMut) -> Poll<io::Result<Step>> {
        if !out.is_empty() {
            let count = ready!(Pin::new(&mut self.io).poll_write(cx, out))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            out.advance(count);
            self.unflushed = true;
        } else if self.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
        } else {
            return Poll::Pending;
        }
        Poll::Ready(Ok(Step::Wrote))
    }

    /// All that was handed to the connection has left it.
    pub fn flushed(&self) -> bool {
        !self.unflushed
    }

    /// Sends the rest of `out`, waits for it to reach the client and for the client to hang up, and
    /// closes the connection.
    pub async fn close(
        mut self,
        mut out: BytesMut,
        mut farewell: Farewell,
        stop: &mut watch::Receiver<bool>,
    ) {
        let (mut reading, mut hurried, mut shut) = (true, false, false);
        loop {
            farewell.left(out.len() + usize::from(self.unflushed) + self.io.unsent());
            tokio::select! {
                step = self.step(reading, &mut out) => match step {
                    Ok(Step::Read(_)) => self.input.clear(),
                    Ok(Step::Wrote) => {}
                    Ok(Step::Closed) if farewell.delivered() => break,
                    // It sends no more, and may still read.
                    Ok(Step::Closed) => {
                        reading = false;
                        farewell.hurry();
                    }
                    // Nobody is left who could be told.
                    Err(_) => return,
                },
                // A client that is silent is told by the connection too. For one that still sends, a
                // proxy would take that for the end of both ways, and lose what it has not passed on.
                () = sleep(LOOK), if !shut => if farewell.delivered() {
                    shut = true;
                    if self.io.shutdown().await.is_err() {
                        return;
                    }
                },
                () = sleep_until(farewell.deadline) => break,
                () = stopped(stop), if !hurried => {
                    hurried = true;
                    farewell.hurry();
                }
            }
        }
        let _ = timeout(LINGER, self.io.shutdown()).await;
    }
}
