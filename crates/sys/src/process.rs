//! What `/proc` says about processes, the reaper, and settings of the calling process.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;

use gantry_types::ProcessRef;
use rustix::process as rp;

/// What we read of `/proc/PID/stat` (proc_pid_stat(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    pub pid: i32,
    /// Field 3: `R`, `S`, `Z`, ...
    pub state: u8,
    pub ppid: i32,
    pub session: i32,
    /// Field 22, clock ticks since boot.
    pub start_time: u64,
}

impl Stat {
    /// Reads the entry of `pid`, which may be a thread's id; no such process is `NotFound`.
    pub fn read(pid: i32) -> io::Result<Self> {
        let text = match std::fs::read(format!("/proc/{pid}/stat")) {
            // The process ended between open and read (proc(5)).
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
                return Err(io::ErrorKind::NotFound.into());
            }
            text => text?,
        };
        Self::parse(pid, &text).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/{pid}/stat is malformed"),
            )
        })
    }

    fn parse(pid: i32, text: &[u8]) -> Option<Self> {
        // Field 2 is the command in parentheses and may itself hold spaces and parentheses, so
        // count from the last one.
        let end = text.iter().rposition(|&b| b == b')')?;
        let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        let ppid = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        let start_time = fields.nth(15)?.parse().ok()?;
        Some(Self {
            pid,
            state,
            ppid,
            session,
            start_time,
        })
    }

    pub fn is_zombie(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }

    pub fn process(&self) -> ProcessRef {
        ProcessRef {
            pid: self.pid,
            start_time: self.start_time,
        }
    }
}

/// The status, as wait(2) gives it, of a process that has ended and that nobody has reaped: field
/// 52 of `/proc/PID/stat`, which is 0 for who may not trace it (proc_pid_stat(5)).
pub(crate) fn zombie_status(process: ProcessRef) -> Option<i32> {
    let text = std::fs::read(format!("/proc/{}/stat", process.pid)).ok()?;
    let stat = Stat::parse(process.pid, &text)?;
    if stat.start_time != process.start_time || !stat.is_zombie() {
        return None;
    }
    let end = text.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
    // Field 3 is the first of the rest.
    rest.split_ascii_whitespace().nth(49)?.parse().ok()
}

/// The process that has this pid now.
pub fn process_ref(pid: i32) -> io::Result<ProcessRef> {
    Ok(Stat::read(pid)?.process())
}

/// The calling process.
pub fn own_process() -> io::Result<ProcessRef> {
    process_ref(rp::getpid().as_raw_nonzero().get())
}

/// Whether exactly this process still runs; a zombie does not.
pub fn alive(process: ProcessRef) -> bool {
    Stat::read(process.pid)
        .is_ok_and(|stat| stat.start_time == process.start_time && !stat.is_zombie())
}

/// The id of this boot (random(4), `/proc/sys/kernel/random/boot_id`): pids, start times and
/// namespace paths mean nothing in another one.
pub fn boot_id() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(text.trim_end().to_owned())
}

/// A child that ended, as the reaper saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    pub pid: i32,
    /// Exit code; 128 + n after signal n.
    pub code: i32,
    /// The signal that killed it.
    pub signal: Option<i32>,
}

/// Reaps one child, whichever ended, without blocking. `None`: no child has ended. For the one
/// place in a process that reaps: anyone else's children are taken too.
pub fn reap_any() -> io::Result<Option<Ended>> {
    loop {
        return match rp::wait(rp::WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => {
                let signal = status.terminating_signal();
                let code = match (status.exit_status(), signal) {
                    (Some(code), _) => code,
                    (None, Some(signal)) => 128 + signal,
                    // Not asked for stops and continuations, so this cannot come.
                    (None, None) => continue,
                };
                Ok(Some(Ended {
                    pid: pid.as_raw_nonzero().get(),
                    code,
                    signal,
                }))
            }
            Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(None),
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => Err(errno.into()),
        };
    }
}

/// Sends a signal to every process of the group; a group without a process is success.
pub fn kill_group(pgid: i32, signal: i32) -> io::Result<()> {
    if pgid <= 1 {
        // kill(2) reads 0 and -1 as our own group and everybody.
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: kill(2) takes plain numbers and touches no memory of ours.
    let result = unsafe { libc::kill(-pgid, signal) };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            e => Err(e),
        },
    }
}

/// Closes every descriptor from `first` on (close_range(2)). For the very start of a process,
/// when nothing it inherited is wanted.
pub fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: no memory is touched. Closing descriptors under their owner would break I/O
    // safety; the documented use is before any owner above `first` exists.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes `fd` the standard input, output or error (0, 1 or 2) of this process.
pub fn replace_stdio(fd: impl AsFd, which: u32) -> io::Result<()> {
    let fd = fd.as_fd();
    match which {
        0 => Ok(rustix::stdio::dup2_stdin(fd)?),
        1 => Ok(rustix::stdio::dup2_stdout(fd)?),
        2 => Ok(rustix::stdio::dup2_stderr(fd)?),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Orphaned descendants become our children (PR_SET_CHILD_SUBREAPER(2const)).
pub fn set_child_subreaper() -> io::Result<()> {
    // Any pid but none switches it on: the kernel takes a boolean.
    Ok(rp::set_child_subreaper(Some(rp::getpid()))?)
}

/// Name of the calling thread, at most 15 bytes (PR_SET_NAME(2const)).
pub fn set_name(name: &CStr) -> io::Result<()> {
    Ok(rustix::thread::set_name(name)?)
}

/// The calling thread gets the CPU when nobody else wants it (nice 19; on Linux a thread has a
/// priority of its own, setpriority(2)).
pub fn lower_thread_priority() -> io::Result<()> {
    Ok(rp::setpriority_process(None, 19)?)
}

/// Whether this process, and what it executes from now on, gets no transparent huge pages
/// (PR_SET_THP_DISABLE(2const)). Inherited through execve: lift it around a spawn.
pub fn set_thp_disabled(disabled: bool) -> io::Result<()> {
    Ok(rustix::thread::disable_transparent_huge_pages(disabled)?)
}

/// execve(2) can no longer raise privileges (PR_SET_NO_NEW_PRIVS(2const)); a seccomp filter
/// without CAP_SYS_ADMIN needs it.
pub fn set_no_new_privs() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Closes `/proc/PID/exe`, `mem` and the like of the calling process to whoever lacks
/// CAP_SYS_PTRACE (PR_SET_DUMPABLE(2const)). execve(2) undoes it.
pub fn set_not_dumpable() -> io::Result<()> {
    Ok(rp::set_dumpable_behavior(
        rp::DumpableBehavior::NotDumpable,
    )?)
}

/// A new session (setsid(2)); EPERM for the leader of a process group.
pub fn setsid() -> io::Result<()> {
    rp::setsid()?;
    Ok(())
}

/// Real, effective and saved user and group id 0 in a new user namespace whose maps are written.
pub fn become_root() -> io::Result<()> {
    // SAFETY: setresgid(2) and setresuid(2) take plain numbers. Called through the system call,
    // they change this thread only; the caller is a fresh clone with one thread.
    let gid = unsafe { libc::syscall(libc::SYS_setresgid, 0, 0, 0) };
    if gid != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let uid = unsafe { libc::syscall(libc::SYS_setresuid, 0, 0, 0) };
    if uid == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Lets this process open as many files as its hard limit allows (RLIMIT_NOFILE, getrlimit(2)).
/// Returns the soft limit that it had; children inherit the new one.
pub fn raise_open_files() -> io::Result<u64> {
    let limit = rp::getrlimit(rp::Resource::Nofile);
    let raised = rp::Rlimit {
        current: limit.maximum,
        ..limit
    };
    rp::setrlimit(rp::Resource::Nofile, raised)?;
    Ok(limit.current.unwrap_or(u64::MAX))
}

/// Sets the soft limit of open files, at most to the hard one.
pub fn set_open_files(soft: u64) -> io::Result<()> {
    let limit = rp::getrlimit(rp::Resource::Nofile);
    let soft = limit.maximum.map_or(soft, |hard| soft.min(hard));
    let limit = rp::Rlimit {
        current: (soft != u64::MAX).then_some(soft),
        ..limit
    };
    Ok(rp::setrlimit(rp::Resource::Nofile, limit)?)
}

/// Our own hard limit of a resource by its name in getrlimit(2); `u64::MAX` when there is none.
pub fn hard_limit(name: &str) -> io::Result<u64> {
    use rp::Resource;
    let resource = match name {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    Ok(rp::getrlimit(resource).maximum.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_parentheses_and_spaces_is_skipped() {
        let line = b"7 (a) b) c) S 1 7 6 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 9876 1000 5";
        let stat = Stat::parse(7, line).unwrap();
        assert_eq!(
            stat,
            Stat {
                pid: 7,
                state: b'S',
                ppid: 1,
                session: 6,
                start_time: 9876
            }
        );
        assert_eq!(Stat::parse(7, b"7 (x) S 1"), None);
        assert_eq!(Stat::parse(7, b""), None);
    }

    #[test]
    fn a_process_is_alive_until_it_ends_and_never_by_pid_alone() {
        let me = own_process().unwrap();
        assert!(alive(me));
        assert!(!alive(ProcessRef {
            start_time: me.start_time + 1,
            ..me
        }));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = process_ref(child.id() as i32).unwrap();
        child.wait().unwrap();
        assert!(!alive(process));
    }

    #[test]
    fn the_boot_id_is_a_uuid() {
        assert_eq!(boot_id().unwrap().len(), 36);
    }

    #[test]
    fn everybody_is_not_a_group() {
        assert!(kill_group(1, 0).is_err());
        assert!(kill_group(0, 0).is_err());
        assert!(kill_group(-1, 0).is_err());
    }
}
