//! The only crate with unsafe code: clone3, pidfd, setns, mounts, close_range, subreaper, signalfd.
//!
//! Thin and synchronous: a function here is one system call, or the few that only make sense
//! together. Results are `std::io::Error` with the kernel's errno; the caller, who knows what the
//! path or process means, names it. Descriptors are owned or borrowed end to end and always
//! close-on-exec, unless a function says otherwise.

pub mod caps;
pub mod clone;
pub mod epoll;
pub mod failpoint;
pub mod fs;
pub mod io;
pub mod memory;
pub mod mount;
pub mod namespace;
pub mod oom;
pub mod pidfd;
pub mod process;
pub mod pty;
pub mod seccomp;
pub mod signal;
pub mod socket;
pub mod tree;
