//! A container's output on its way to the log.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use gantry_sys::epoll::{Epoll, EventFlags};
use gantry_sys::memory::PageBuffer;

use crate::clock::{self, Clock};
use crate::log::{self, Kind, LogFile, Writer};

/// Most bytes taken from one stream before others get their turn; what a pipe holds.
const READ: usize = 64 << 10;

/// Working memory of all streams of the shim. Touched memory is given back when output pauses.
#[derive(Debug)]
pub struct Buffers {
    pub input: PageBuffer,
    records: PageBuffer,
    clock: Clock,
    /// Something was touched since the last release.
    pub used: bool,
}

impl Buffers {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            input: PageBuffer::new(READ)?,
            records: PageBuffer::new(log::BATCH)?,
            clock: Clock::new(),
            used: false,
        })
    }

    pub fn release(&mut self) {
        self.input.release();
        self.records.release();
        self.used = false;
    }
}

/// What a turn with a stream gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pumped {
    /// So many bytes, in `Buffers::input`; there may be more.
    Some(usize),
    /// Nothing waits now.
    Empty,
    /// Nothing will come any more.
    End,
}

/// One output stream: a pipe's reading end or a terminal's master, non-blocking.
#[derive(Debug)]
pub struct Stream {
    pub fd: OwnedFd,
    pub kind: Kind,
    /// The unfinished last line, at most `log::MAX_LINE` bytes; no memory when empty.
    partial: Vec<u8>,
    watched: Option<Rc<Epoll>>,
}

impl Stream {
    pub fn new(fd: OwnedFd, kind: Kind) -> Self {
        Self {
            fd,
            kind,
            partial: Vec::new(),
            watched: None,
        }
    }

    /// Has `epoll` tell when something can be read.
    pub fn watch(&mut self, epoll: &Rc<Epoll>, token: u64) -> io::Result<()> {
        epoll.add(&self.fd, token, EventFlags::IN)?;
        self.watched = Some(Rc::clone(epoll));
        Ok(())
    }

    /// Takes one read's worth to the log; without a log the output is read and dropped. Writing
    /// to a slow disk takes its time here, and meanwhile the pipe fills up and the container
    /// waits: output is never gathered in our memory.
    pub fn pump(&mut self, log: Option<&mut LogFile>, buffers: &mut Buffers) -> Pumped {
        let len = match gantry_sys::io::read(&self.fd, &mut buffers.input) {
            Ok(0) => return Pumped::End,
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Pumped::Empty,
            // EIO from a terminal's master: the last process has closed the other end (pty(7)).
            Err(_) => return Pumped::End,
        };
        buffers.used = true;
        if let Some(log) = log {
            let stamp = buffers.clock.format(clock::now());
            Writer::new(log, &mut buffers.records, stamp, self.kind)
                .lines(&mut self.partial, &buffers.input[..len]);
        }
        Pumped::Some(len)
    }

    /// Writes an unterminated last line.
    pub fn finish(&mut self, log: Option<&mut LogFile>, buffers: &mut Buffers) {
        if let Some(log) = log
            && !self.partial.is_empty()
        {
            buffers.used = true;
            let stamp = buffers.clock.format(clock::now());
            Writer::new(log, &mut buffers.records, stamp, self.kind).end(&mut self.partial);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // The daemon may have a duplicate, for which the kernel would go on telling us.
        if let Some(epoll) = &self.watched {
            let _ = epoll.remove(&self.fd);
        }
    }
}
