//! Pipes, single reads and writes, and a bounded wait for one descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

pub(crate) fn timespec(duration: Duration) -> Timespec {
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

/// Makes reads and writes of this open file description return `WouldBlock` instead of waiting.
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::io::ioctl_fionbio(fd, true)?)
}

/// Lets a pipe hold so many bytes, rounded up (F_SETPIPE_SZ, fcntl(2)); returns what it holds now.
/// `PermissionDenied`: more than the system allows.
pub fn set_pipe_size(pipe: impl AsFd, bytes: usize) -> io::Result<usize> {
    Ok(rustix::pipe::fcntl_setpipe_size(pipe, bytes)?)
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
