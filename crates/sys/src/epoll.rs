//! Readiness: epoll(7) with tokens, and a bounded wait for one descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

pub use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, Timespec, epoll};

#[derive(Debug)]
pub struct Epoll(OwnedFd);

/// What became ready: the token given to [`Epoll::add`] and how.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    pub token: u64,
    pub flags: EventFlags,
}

/// Events handled in one turn.
const BATCH: usize = 32;

impl Epoll {
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches `fd`, level-triggered unless `flags` say otherwise. The kernel forgets it when its
    /// last duplicate is closed; one that is passed on must be removed.
    pub fn add(&self, fd: impl AsFd, token: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(
            &self.0,
            fd,
            epoll::EventData::new_u64(token),
            flags,
        )?)
    }

    pub fn modify(&self, fd: impl AsFd, token: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(
            &self.0,
            fd,
            epoll::EventData::new_u64(token),
            flags,
        )?)
    }

    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Waits for events, at most `timeout` if given. Returns early without any on a signal.
    pub fn wait(&self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> io::Result<()> {
        let mut events: [std::mem::MaybeUninit<epoll::Event>; BATCH] =
            [const { std::mem::MaybeUninit::uninit() }; BATCH];
        let timeout = timeout.map(timespec);
        ready.clear();
        match epoll::wait(&self.0, &mut events[..], timeout.as_ref()) {
            Ok((events, _)) => {
                ready.extend(events.iter().map(|e| Ready {
                    token: e.data.u64(),
                    flags: e.flags,
                }));
                Ok(())
            }
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs().min(i32::MAX as u64) as i64,
        tv_nsec: duration.subsec_nanos().into(),
    }
}

fn poll_within(fd: BorrowedFd<'_>, flags: PollFlags, timeout: Duration) -> io::Result<bool> {
    let deadline = std::time::Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
        match rustix::event::poll(&mut fds, Some(&timespec(left))) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether `fd` can be read, or has ended, within `timeout`.
pub fn readable_within(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    poll_within(fd, PollFlags::IN, timeout)
}

/// Whether a write to `fd` would not block within `timeout`.
pub fn writable_within(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    poll_within(fd, PollFlags::OUT, timeout)
}

/// A pipe, reading end first; that end is non-blocking if asked for.
pub fn pipe(nonblocking_reader: bool) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    if nonblocking_reader {
        rustix::io::ioctl_fionbio(&reader, true)?;
    }
    Ok((reader, writer))
}

/// Reads what is there: `Ok(0)` is the end, `WouldBlock` says that nothing waits.
pub fn read(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::io::read(&fd, &mut *buffer) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// One write(2), repeated only when interrupted.
pub fn write(fd: impl AsFd, buffer: &[u8]) -> io::Result<usize> {
    loop {
        match rustix::io::write(&fd, buffer) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}
