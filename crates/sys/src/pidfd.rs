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

    /// How a process ended that is not our child: `process` is the one that this descriptor is of,
    /// and it must have ended. `None`: the kernel has not kept it.
    ///
    /// A zombie shows it in `/proc/PID/stat` to who may trace it; once it is reaped the descriptor
    /// has it (PIDFD_GET_INFO, since Linux 6.15). The kernel notes it there before it takes the
    /// entry in /proc away, so that looking in this order misses nothing.
    pub fn exit_of(&self, process: ProcessRef) -> Option<Ended> {
        let status = crate::process::zombie_status(process).or_else(|| self.exit_status())?;
        let signal = libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status));
        let code = signal.map_or_else(|| libc::WEXITSTATUS(status), |n| 128 + n);
        Some(Ended {
            pid: process.pid,
            code,
            signal,
        })
    }

    /// The status, as wait(2) gives it, of a process that was reaped.
    fn exit_status(&self) -> Option<i32> {
        let mut info = Info {
            mask: INFO_EXIT,
            ..Info::default()
        };
        // SAFETY: the number says that the kernel reads and writes one `Info` through the pointer,
        // which is that of a live one with the layout of linux/pidfd.h; the descriptor is ours.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), GET_INFO as _, &raw mut info) };
        (result == 0 && info.mask & INFO_EXIT != 0).then_some(info.exit_code)
    }

    /// Waits at most `timeout` for the process to end, without reaping it.
    pub fn wait_ended(&self, timeout: std::time::Duration) -> io::Result<bool> {
        crate::io::readable_within(self.0.as_fd(), timeout)
    }
}

/// struct pidfd_info of linux/pidfd.h in its first version (PIDFD_INFO_SIZE_VER0).
#[repr(C)]
#[derive(Debug, Default)]
struct Info {
    /// What is asked for, and then what was given.
    mask: u64,
    cgroupid: u64,
    pid: u32,
    tgid: u32,
    ppid: u32,
    ids: [u32; 8],
    exit_code: i32,
}

const _: () = assert!(size_of::<Info>() == 64);

/// PIDFD_INFO_EXIT.
const INFO_EXIT: u64 = 1 << 3;

/// PIDFD_GET_INFO: `_IOWR(0xFF, 11, struct pidfd_info)` (asm-generic/ioctl.h, which x86-64 and
/// aarch64 use).
const GET_INFO: u32 = (3 << 30) | ((size_of::<Info>() as u32) << 16) | (0xff << 8) | 11;

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

    #[test]
    fn the_exit_of_another_ones_child_is_learnt_before_and_after_it_is_reaped() {
        for (script, code, signal) in [("exit 7", 7, None), ("kill -9 $$", 137, Some(9))] {
            let mut child = std::process::Command::new("sh")
                .args(["-c", script])
                .spawn()
                .unwrap();
            let pid = child.id() as i32;
            let fd = PidFd::open(pid).unwrap();
            let process = crate::process::process_ref(pid).unwrap();
            assert!(fd.wait_ended(Duration::from_secs(10)).unwrap());
            let expected = Some(Ended { pid, code, signal });
            assert_eq!(fd.exit_of(process), expected, "a zombie");
            child.wait().unwrap();
            match fd.exit_of(process) {
                None => println!("SKIP exit of a reaped process: this kernel keeps none"),
                exit => assert_eq!(exit, expected, "reaped"),
            }
        }
    }

    #[test]
    fn a_process_that_runs_has_no_exit() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let fd = PidFd::open(pid).unwrap();
        let process = crate::process::process_ref(pid).unwrap();
        assert_eq!(fd.exit_of(process), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
