//! One flush for all who wait: a writer that arrives while a flush runs joins the next one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use gantry_types::times::Times;
use gantry_types::{ErrorKind, Kind};

/// Why a flush failed: told to everybody who waited for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    pub kind: ErrorKind,
    pub message: String,
}

#[derive(Default)]
struct State {
    /// Flushes begun so far.
    begun: u64,
    /// Newest flush that ended, with its error; older outcomes are no longer asked for.
    ended: u64,
    /// Since when one is under way.
    running: Option<Instant>,
    /// Writers that wait for one, also for the one under way.
    waiting: usize,
    /// Outcome of the flush numbered `ended`.
    error: Option<Failed>,
}

/// Coalesces concurrent flushes.
#[derive(Default)]
pub struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    pub times: Times,
}

impl Shared {
    /// Since when a flush is under way, and how many writers wait for one.
    pub fn now(&self) -> (Option<Instant>, usize) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (state.running, state.waiting)
    }

    /// Returns after a flush that began after this call. Its error goes to all who waited for it.
    pub fn flush<E: Kind + std::fmt::Display>(
        &self,
        flush: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), Failed> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // The one under way may have begun before our write: only the next counts.
        let wanted = state.begun + 1;
        state.waiting += 1;
        while state.running.is_some() && state.ended < wanted {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        if state.ended >= wanted {
            return match &state.error {
                Some(error) => Err(error.clone()),
                None => Ok(()),
            };
        }
        let began = Instant::now();
        state.running = Some(began);
        state.begun += 1;
        let number = state.begun;
        drop(state);
        // sled can panic on damage: who waits would wait for ever if that left `running` behind.
        let failed = |kind, message| Failed { kind, message };
        let outcome = catch_unwind(AssertUnwindSafe(flush))
            .map_err(|_| failed(ErrorKind::Internal, "the store panicked".to_owned()))
            .and_then(|outcome| outcome.map_err(|error| failed(error.kind(), error.to_string())));
        self.times.note(began.elapsed(), outcome.is_ok());
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running = None;
        state.ended = number;
        state.error = outcome.clone().err();
        self.changed.notify_all();
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn waiting_writers_share_a_flush() {
        let shared = Shared::default();
        let flushes = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    shared
                        .flush(|| {
                            flushes.fetch_add(1, Ordering::SeqCst);
                            std::thread::sleep(std::time::Duration::from_millis(30));
                            Ok::<_, std::io::Error>(())
                        })
                        .unwrap();
                });
            }
        });
        let flushes = flushes.load(Ordering::SeqCst);
        assert!(
            (1..16).contains(&flushes),
            "{flushes} flushes for 16 writers"
        );
    }

    #[test]
    fn an_error_reaches_the_writer_and_the_next_flush_is_tried() {
        let shared = Shared::default();
        let full = || Err(std::io::Error::from(std::io::ErrorKind::StorageFull));
        let failed = shared.flush(full).unwrap_err();
        assert_eq!(failed.kind, ErrorKind::ResourceExhausted, "{failed:?}");
        assert_eq!(shared.flush(|| Ok::<_, std::io::Error>(())), Ok(()));
    }

    #[test]
    fn a_panic_is_an_error_and_the_next_flush_is_tried() {
        let shared = Shared::default();
        let panics = || -> std::io::Result<()> { panic!("damage") };
        assert!(shared.flush(panics).is_err());
        assert_eq!(shared.flush(|| Ok::<_, std::io::Error>(())), Ok(()));
    }
}
