//! Processes by descriptor (pidfd_open(2)): a signal cannot reach a stranger with a reused pid.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use gantry_types::ProcessRef;
use rustix::process as rp;

use crate::process::Ended;

#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// The process that has `pid` now. Safe from reuse only for a child that nobody has reaped.
    pub fn open(pid: i32) -> io::Result<Self> {
        let pid = rp::Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self(rp::pidfd_open(pid, rp::PidfdFlags::empty())?))
    }

    /// Exactly this process; `NotFound` when it is gone or its pid has a new owner.
    pub fn open_process(process: ProcessRef) -> io::Result<Self> {
        let fd = match Self::open(process.pid) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
                return Err(io::ErrorKind::NotFound.into());
            }
            fd => fd?,
        };
        // Checked after opening: the descriptor pins whoever had the pid then.
        if crate::process::process_ref(process.pid)? == process {
            Ok(fd)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// pidfd_send_signal(2); a process that has ended is `NotFound`.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: the descriptor is open as we own it; a null siginfo asks for the one that
        // kill(2) would send, and flags must be 0 (pidfd_send_signal(2)).
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match result {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ESRCH) => Err(io::ErrorKind::NotFound.into()),
                e => Err(e),
            },
        }
    }

    /// Waits until the process, which must be a child, ends, and reaps it (waitid(2)).
    pub fn wait(&self) -> io::Result<Ended> {
        loop {
            match rp::waitid(rp::WaitId::PidFd(self.0.as_fd()), rp::WaitIdOptions::EXITED) {
                Ok(Some(status)) => {
                    let signal = status.terminating_signal();
                    let code = status
                        .exit_status()
                        .or(signal.map(|n| 128 + n))
                        .unwrap_or(-1);
                    return Ok(Ended {
                        pid: 0,
                        code,
                        signal,
                    });
                }
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits at most `timeout` for the process to end, without reaping it.
    pub fn wait_ended(&self, timeout: std::time::Duration) -> io::Result<bool> {
        crate::io::readable_within(self.0.as_fd(), timeout)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for PidFd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    #[expect(clippy::zombie_processes, reason = "reaped through the descriptor")]
    fn signals_reach_exactly_the_process() {
        let child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let process = crate::process::process_ref(child.id() as i32).unwrap();
        let stranger = ProcessRef {
            start_time: process.start_time + 1,
            ..process
        };
        let error = PidFd::open_process(stranger).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let fd = PidFd::open_process(process).unwrap();
        assert!(!fd.wait_ended(Duration::ZERO).unwrap());
        fd.signal(libc::SIGKILL).unwrap();
        let ended = fd.wait().unwrap();
        assert_eq!((ended.code, ended.signal), (137, Some(9)));
        assert_eq!(fd.signal(0).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
