//! What is being disturbed, so that the errors of a call can be judged by when it was made.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// For how long after a disturbance a call may still meet what it has left: a runtime or plugin
/// that hangs until its deadline, a step that is being taken back.
pub const AFTERMATH: Duration = Duration::from_secs(15);

/// What there was around a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// Nothing, and nothing for a while before: an error is a fault.
    Calm,
    /// A disturbance ended not long before: an error may be, and must not stay.
    Aftermath,
    /// A disturbance during the call.
    Trouble,
}

#[derive(Debug, Default)]
struct State {
    windows: u32,
    /// Disturbances so far.
    count: u64,
    last_end: Option<Instant>,
    /// Starts of the daemon so far.
    starts: u64,
    /// Pods whose shim was killed, or held for longer than the daemon waits.
    lost: BTreeSet<String>,
    disk_full: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Trouble(Arc<Mutex<State>>);

/// A disturbance, until it is dropped.
#[must_use]
#[derive(Debug)]
pub struct Window(Trouble);

/// The moment at which a call began.
#[derive(Clone, Copy, Debug)]
pub struct Begun {
    count: u64,
    troubled: bool,
    aftermath: bool,
}

impl Trouble {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn begin(&self) -> Window {
        let mut state = self.state();
        state.windows += 1;
        state.count += 1;
        Window(self.clone())
    }

    /// To be taken before a call.
    pub fn now(&self) -> Begun {
        let state = self.state();
        let recent = |end: Instant| end.elapsed() < AFTERMATH;
        Begun {
            count: state.count,
            troubled: state.windows > 0,
            aftermath: state.last_end.is_some_and(recent),
        }
    }

    /// To be asked when the call has ended.
    pub fn since(&self, begun: Begun) -> Weather {
        if begun.troubled || self.state().count != begun.count {
            Weather::Trouble
        } else if begun.aftermath {
            Weather::Aftermath
        } else {
            Weather::Calm
        }
    }

    /// From now on this pod may have come to its end. To be said before it is done.
    pub fn lose(&self, pod: &str) {
        self.state().lost.insert(pod.to_owned());
    }

    pub fn is_lost(&self, pod: &str) -> bool {
        self.state().lost.contains(pod)
    }

    pub fn set_disk_full(&self, full: bool) {
        self.state().disk_full = full;
    }

    pub fn disk_is_full(&self) -> bool {
        self.state().disk_full
    }

    pub fn started(&self) {
        self.state().starts += 1;
    }

    pub fn starts(&self) -> u64 {
        self.state().starts
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.windows -= 1;
        state.last_end = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_judged_by_what_it_overlaps() {
        let trouble = Trouble::default();
        let calm = trouble.now();
        assert_eq!(trouble.since(calm), Weather::Calm);
        let window = trouble.begin();
        assert_eq!(
            trouble.since(calm),
            Weather::Trouble,
            "it began in the call"
        );
        let during = trouble.now();
        drop(window);
        assert_eq!(
            trouble.since(during),
            Weather::Trouble,
            "the call began in it"
        );
        let after = trouble.now();
        assert_eq!(trouble.since(after), Weather::Aftermath);
    }
}
