//! Signals as readable events (signalfd(2)).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask,
};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Numbers of signals (signal(7)).
pub const SIGKILL: i32 = Signal::SIGKILL as i32;
pub const SIGCHLD: i32 = Signal::SIGCHLD as i32;
pub const SIGSTOP: i32 = Signal::SIGSTOP as i32;
/// The highest.
pub const SIGRTMAX: i32 = 64;

/// Ends of children, as a readable event.
#[derive(Debug)]
pub struct ChildSignal(SignalFd);

impl ChildSignal {
    /// Blocks SIGCHLD in the calling thread and makes it readable.
    pub fn block() -> io::Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self(SignalFd::with_flags(&set, flags)?))
    }

    /// Whether children may have ended since the last call.
    pub fn take(&self) -> io::Result<bool> {
        Ok(self.0.read_signal()?.is_some())
    }
}

impl AsFd for ChildSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Every signal but those of a fault of our own, as readable events.
#[derive(Debug)]
pub struct AllSignals(SignalFd);

/// A signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    pub signal: i32,
    /// Sent by the kernel and not by a process: the terminal's keys, a change of its size.
    pub from_kernel: bool,
}

impl AllSignals {
    /// Blocks the signals in the calling thread and makes them readable.
    pub fn block() -> io::Result<Self> {
        let mut set = SigSet::all();
        // Blocked, one that an instruction of ours raises would kill us just the same.
        for fault in [
            Signal::SIGBUS,
            Signal::SIGFPE,
            Signal::SIGILL,
            Signal::SIGSEGV,
            Signal::SIGSYS,
            Signal::SIGTRAP,
        ] {
            set.remove(fault);
        }
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?))
    }

    /// Waits for the next.
    pub fn wait(&mut self) -> io::Result<Received> {
        loop {
            if let Some(info) = self.0.read_signal()? {
                return Ok(Received {
                    signal: i32::try_from(info.ssi_signo).map_err(io::Error::other)?,
                    from_kernel: info.ssi_code == libc::SI_KERNEL,
                });
            }
        }
    }
}

/// Runs `work`, such as a spawn, with no signal blocked: a child inherits the mask, and what it
/// executes may never think of unblocking. A SIGCHLD that comes meanwhile is lost to
/// [`ChildSignal`]; reap afterwards.
pub fn with_none_blocked<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    let mut old = SigSet::empty();
    sigprocmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::empty()),
        Some(&mut old),
    )?;
    let result = work();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&old), None)?;
    Ok(result)
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// Makes the signals that would end the calling process do nothing. By a handler, which execve(2)
/// takes away, and not by SIG_IGN, which would be handed on to every container.
pub fn survive_signals() -> io::Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGALRM,
    ] {
        // SAFETY: the handler does nothing, which is safe in any signal context.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Blocks every signal that can be blocked, for a process that only SIGKILL shall end.
pub fn block_all() -> io::Result<()> {
    Ok(sigprocmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::all()),
        None,
    )?)
}

/// The kernel reaps our children by itself from now on (wait(2), NOTES: SIGCHLD ignored).
pub fn ignore_children() -> io::Result<()> {
    // SAFETY: SIG_IGN is no handler of ours: no code runs in signal context.
    let old = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    if old == libc::SIG_ERR {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
