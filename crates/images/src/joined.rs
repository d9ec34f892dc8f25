//! Pulls under way, and who waits for them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use gantry_types::times::{Reading, Times};

use tracing::Instrument;

use crate::cancel::Cancel;
use crate::credentials::Credentials;
use crate::progress::{Progress, Stand};
use crate::pull;
use crate::reference::Reference;
use crate::service::{Inner, PullRequest};
use crate::{Error, Result};

type Outcome = std::result::Result<String, Arc<Error>>;
/// Normalised reference, credentials, and whom it is unpacked for beside the first snapshotter.
/// Credentials are part of it: whoever cannot pull an image by himself must not get it by somebody
/// else's.
type Key = (String, Credentials, Option<&'static str>);

#[derive(Clone)]
struct Joinable {
    outcome: Shared<BoxFuture<'static, Outcome>>,
    cancel: Cancel,
    progress: Progress,
    waiters: usize,
    began: Instant,
    /// Tells this pull from a later one under the same key.
    serial: u64,
}

#[derive(Default)]
pub struct Pulls(Mutex<State>, Times);

/// A pull under way.
#[derive(Clone, Debug)]
pub struct Pulling {
    pub reference: String,
    pub age: Duration,
    /// Callers who wait for it.
    pub waiters: usize,
    pub stand: Stand,
}

#[derive(Default)]
struct State {
    pulls: HashMap<Key, Joinable>,
    serial: u64,
}

impl Pulls {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is whole when the lock is given back.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pulls under way, the oldest first.
    pub fn under_way(&self) -> Vec<Pulling> {
        let mut pulls: Vec<_> = self
            .lock()
            .pulls
            .iter()
            .map(|((reference, ..), pull)| Pulling {
                reference: reference.clone(),
                age: pull.began.elapsed(),
                waiters: pull.waiters,
                stand: pull.progress.stand(),
            })
            .collect();
        pulls.sort_by_key(|pull| std::cmp::Reverse(pull.age));
        pulls
    }

    /// How long those took that have ended.
    pub fn times(&self) -> Reading {
        self.1.read()
    }

    /// Takes a pull out that has ended or that nobody may join any more.
    fn forget(&self, key: &Key, serial: u64) {
        let mut state = self.lock();
        if state
            .pulls
            .get(key)
            .is_some_and(|pull| pull.serial == serial)
        {
            state.pulls.remove(key);
        }
    }
}

/// A caller's interest in a pull; the last one that is dropped ends the pull.
struct Waiter {
    inner: Arc<Inner>,
    key: Key,
    serial: u64,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut state = self.inner.pulls.lock();
        let Some(pull) = state.pulls.get_mut(&self.key) else {
            return;
        };
        if pull.serial != self.serial {
            return;
        }
        pull.waiters -= 1;
        if pull.waiters == 0 {
            // Whoever asks from now on starts anew: this one is about to end.
            pull.cancel.cancel();
            state.pulls.remove(&self.key);
        }
    }
}

/// Joins the pull of this reference with these credentials, or starts it. `watch` is given its
/// counters.
pub async fn pull(
    inner: &Arc<Inner>,
    request: PullRequest,
    watch: impl FnOnce(Progress),
) -> Result<String> {
    let reference: Reference = request.reference.parse()?;
    let also = match request.snapshotter.as_deref() {
        None => None,
        Some(name) => {
            let none =
                || Error::invalid(format_args!("snapshotter {name:?}"), "there is none such");
            Some(inner.snapshotters.named(name).ok_or_else(none)?.name())
        }
    };
    let also = also.filter(|name| *name != inner.snapshotters.first().name());
    let key = (reference.to_string(), request.credentials, also);
    let (outcome, _waiter) = {
        let mut state = inner.pulls.lock();
        state.serial += 1;
        let serial = state.serial;
        let pull = state.pulls.entry(key.clone()).or_insert_with(|| {
            let (cancel, progress) = (Cancel::default(), Progress::default());
            let task = run(
                inner.clone(),
                reference,
                key.clone(),
                serial,
                (cancel.clone(), progress.clone()),
            );
            let task = tokio::spawn(task.instrument(tracing::Span::current()));
            let ended = Error::Worker { what: "image pull" };
            let outcome = task.map(|done| done.unwrap_or(Err(Arc::new(ended))));
            Joinable {
                outcome: outcome.boxed().shared(),
                cancel,
                progress,
                waiters: 0,
                began: Instant::now(),
                serial,
            }
        });
        pull.waiters += 1;
        watch(pull.progress.clone());
        let waiter = Waiter {
            inner: inner.clone(),
            serial: pull.serial,
            key,
        };
        (pull.outcome.clone(), waiter)
    };
    outcome.await.map_err(Error::Joined)
}

/// A task of its own: callers come and go.
async fn run(
    inner: Arc<Inner>,
    reference: Reference,
    key: Key,
    serial: u64,
    (cancel, progress): (Cancel, Progress),
) -> Outcome {
    // Taken out of the map also if the pull panics.
    struct Leave(Arc<Inner>, Key, u64);
    impl Drop for Leave {
        fn drop(&mut self) {
            self.0.pulls.forget(&self.1, self.2);
        }
    }
    let leave = Leave(inner.clone(), key, serial);
    let (_, credentials, also) = &leave.1;
    let watch = (&cancel, &progress);
    let began = Instant::now();
    let result = pull::pull(&inner, &reference, credentials, watch, also.as_slice()).await;
    inner.pulls.1.note(began.elapsed(), result.is_ok());
    result.map_err(Arc::new)
}
