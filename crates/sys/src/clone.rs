//! clone3(2): a child in new namespaces, born inside its cgroup.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::pidfd::PidFd;

/// Namespaces that a child gets of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    pub user: bool,
    pub net: bool,
    pub ipc: bool,
    pub uts: bool,
    pub pid: bool,
    pub mount: bool,
}

impl Namespaces {
    fn flags(self) -> i32 {
        [
            (self.user, libc::CLONE_NEWUSER),
            (self.net, libc::CLONE_NEWNET),
            (self.ipc, libc::CLONE_NEWIPC),
            (self.uts, libc::CLONE_NEWUTS),
            (self.pid, libc::CLONE_NEWPID),
            (self.mount, libc::CLONE_NEWNS),
        ]
        .into_iter()
        .filter_map(|(wanted, flag)| wanted.then_some(flag))
        .fold(0, |flags, flag| flags | flag)
    }
}

#[derive(Debug)]
pub struct Child {
    pub pid: i32,
    pub pidfd: PidFd,
}

/// CLONE_INTO_CGROUP (clone(2), since Linux 5.7); libc has it as a C int that it overflows.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Makes a child process in new `namespaces`, on cgroup v2 inside the cgroup whose directory is
/// `cgroup`, that runs `body` and exits with what it returns.
///
/// Refused (`Unsupported`) in a process with more than one thread: the child would hold a copy of
/// locks whose owners do not exist in it.
pub fn spawn(
    namespaces: Namespaces,
    cgroup: Option<BorrowedFd<'_>>,
    body: impl FnOnce() -> i32,
) -> io::Result<Child> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "only a process with one thread may clone without executing",
        ));
    }
    let mut pidfd: libc::c_int = -1;
    let mut flags = libc::CLONE_PIDFD as u64 | namespaces.flags() as u64;
    if cgroup.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    // struct clone_args of linux/sched.h up to `cgroup` (CLONE_ARGS_SIZE_VER2).
    let arguments: [u64; 11] = [
        flags,
        &raw mut pidfd as u64,
        0, // child_tid
        0, // parent_tid
        libc::SIGCHLD as u64,
        0, // stack: as fork, a copy of ours
        0, // stack_size
        0, // tls
        0, // set_tid
        0, // set_tid_size
        cgroup.map_or(0, |fd| fd.as_raw_fd() as u64),
    ];
    // SAFETY: `arguments` has the layout and size of clone_args, `pidfd` outlives the call, and
    // without CLONE_VM the child has its own copy of all memory, so that returning twice is what
    // fork does. There is one thread (checked above), hence no lock that another one holds.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            arguments.as_ptr(),
            std::mem::size_of_val(&arguments),
        )
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = body();
            // SAFETY: _exit(2) never returns and runs no handler that belongs to the parent.
            unsafe { libc::_exit(code) }
        }
        pid => {
            // SAFETY: the kernel stored a new descriptor there (CLONE_PIDFD), owned by nobody yet.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Child {
                pid: pid as i32,
                pidfd: pidfd.into(),
            })
        }
    }
}
