//! A connection from the daemon.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use gantry_shim_api::{Decoder, encode, v1};

/// Most bytes that wait for a daemon that does not read; then it is cut off, and asks State when
/// it comes back.
const BACKLOG: usize = 1 << 20;

struct Outgoing {
    bytes: Vec<u8>,
    /// Attached to the first byte; empty once it is sent.
    fds: Vec<OwnedFd>,
    sent: usize,
}

pub struct Conn {
    pub stream: UnixStream,
    pub decoder: Decoder,
    /// It has said Hello.
    pub greeted: bool,
    /// The loop watches for room to write.
    pub watched_for_write: bool,
    outgoing: VecDeque<Outgoing>,
    backlog: usize,
}

impl Conn {
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            decoder: Decoder::new(),
            greeted: false,
            watched_for_write: false,
            outgoing: VecDeque::new(),
            backlog: 0,
        }
    }

    /// Sends or queues a message; an error ends the connection.
    pub fn send(&mut self, message: &v1::Message, fds: Vec<OwnedFd>) -> io::Result<()> {
        let bytes = encode(message).map_err(io::Error::other)?;
        if self.backlog + bytes.len() > BACKLOG {
            return Err(io::Error::other("the daemon does not read"));
        }
        self.backlog += bytes.len();
        self.outgoing.push_back(Outgoing {
            bytes,
            fds,
            sent: 0,
        });
        self.flush()
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) -> io::Result<()> {
        while let Some(next) = self.outgoing.front_mut() {
            let fds: Vec<_> = next.fds.iter().map(AsFd::as_fd).collect();
            match gantry_sys::socket::send_with_fds(&self.stream, &next.bytes[next.sent..], &fds) {
                Ok(count) => {
                    next.sent += count;
                    self.backlog -= count;
                    next.fds = Vec::new();
                    if next.sent == next.bytes.len() {
                        self.outgoing.pop_front();
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    pub fn wants_write(&self) -> bool {
        !self.outgoing.is_empty()
    }
}
