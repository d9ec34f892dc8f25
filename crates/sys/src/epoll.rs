//! Readiness of many descriptors: epoll(7) with tokens.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;
pub use rustix::event::epoll::EventFlags;

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
        let timeout = timeout.map(crate::io::timespec);
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
