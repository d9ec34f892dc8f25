//! What is under way and since when, and how long what has ended took. A step is on the list from
//! its first moment, whoever waits for it: so what hangs is seen without asking what hangs.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gantry_types::times::{Reading, Times};
use gantry_types::{ContainerId, PodId};

use tracing::Instrument;

use crate::registry::PodFacts;

/// Target of the spans of steps: they are for traces, and the log passes them over.
pub const TRACE: &str = "gantry::trace";

/// What a step is of. Empty is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Of {
    pub pod: String,
    pub container: String,
    /// Runtime handler, for which times are kept; none for what has nothing to do with one.
    pub handler: Option<String>,
}

impl Of {
    pub(crate) fn pod(facts: &PodFacts) -> Self {
        Self {
            pod: facts.id.to_string(),
            container: String::new(),
            handler: Some(facts.record.runtime_handler.clone()),
        }
    }

    pub(crate) fn container(pod: &PodFacts, id: &ContainerId) -> Self {
        Self {
            container: id.to_string(),
            ..Self::pod(pod)
        }
    }

    pub(crate) fn shim(pod: &PodId) -> Self {
        Self {
            pod: pod.to_string(),
            ..Self::default()
        }
    }
}

/// A step under way.
#[derive(Clone, Debug)]
pub struct UnderWay {
    pub what: &'static str,
    pub of: Of,
    pub age: Duration,
    /// How long it may last in all, where that is more or less than steps commonly take.
    pub may_last: Option<Duration>,
}

/// The times of one kind of step.
#[derive(Clone, Debug)]
pub struct Timed {
    pub what: &'static str,
    pub handler: Option<String>,
    pub reading: Reading,
}

/// Counted from the start of the daemon.
#[derive(Debug, Default)]
pub struct ShimCounts {
    /// A new shim took a pod over from one that had died.
    pub adopted: AtomicU64,
    /// Nobody could: the pod was lost.
    pub lost: AtomicU64,
    /// A call was not answered in time.
    pub missed: AtomicU64,
    /// Killed for not answering again and again.
    pub killed: AtomicU64,
}

/// Step and runtime handler.
type Kind = (&'static str, Option<String>);

#[derive(Debug, Default)]
pub struct Activity {
    steps: Mutex<Steps>,
    /// By step and runtime handler: as many as there are kinds of steps and handlers configured.
    times: Mutex<BTreeMap<Kind, Arc<Times>>>,
    /// The handler of pods that name none.
    default_handler: String,
    pub shims: ShimCounts,
    /// Pods whose recovery has ended, of so many.
    recovered: AtomicUsize,
    to_recover: AtomicUsize,
}

#[derive(Debug, Default)]
struct Steps {
    next: u64,
    under_way: BTreeMap<u64, Listed>,
}

#[derive(Debug)]
struct Listed {
    what: &'static str,
    of: Of,
    began: Instant,
    may_last: Option<Duration>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is whole when the lock is given back.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Activity {
    pub(crate) fn new(default_handler: &str) -> Arc<Self> {
        Arc::new(Self {
            default_handler: default_handler.to_owned(),
            ..Self::default()
        })
    }

    /// Puts a step on the list, until what is returned is dropped.
    pub(crate) fn begin(self: &Arc<Self>, what: &'static str, mut of: Of) -> Step {
        if of.handler.as_deref() == Some("") {
            of.handler = Some(self.default_handler.clone());
        }
        let began = Instant::now();
        let span = tracing::info_span!(
            target: TRACE,
            "step",
            otel.name = what,
            pod = of.pod,
            container = of.container,
            otel.status_code = tracing::field::Empty,
        );
        let times = {
            let mut times = lock(&self.times);
            let key = (what, of.handler.clone());
            Arc::clone(times.entry(key).or_default())
        };
        let mut steps = lock(&self.steps);
        let number = steps.next;
        steps.next += 1;
        let listed = Listed {
            what,
            of,
            began,
            may_last: None,
        };
        steps.under_way.insert(number, listed);
        drop(steps);
        Step {
            activity: Arc::clone(self),
            times,
            number,
            began,
            ok: false,
            span,
        }
    }

    /// Does `work` as a step.
    pub(crate) async fn during<T, E>(
        self: &Arc<Self>,
        what: &'static str,
        of: Of,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let step = self.begin(what, of);
        let outcome = work.instrument(step.span.clone()).await;
        step.end(outcome.is_ok());
        outcome
    }

    /// The steps under way, the oldest first.
    pub fn under_way(&self) -> Vec<UnderWay> {
        let steps = lock(&self.steps);
        let now = Instant::now();
        let under_way = steps.under_way.values();
        let mut list: Vec<_> = under_way
            .map(|step| UnderWay {
                what: step.what,
                of: step.of.clone(),
                age: now.saturating_duration_since(step.began),
                may_last: step.may_last,
            })
            .collect();
        drop(steps);
        list.sort_by_key(|step| std::cmp::Reverse(step.age));
        list
    }

    pub fn times(&self) -> Vec<Timed> {
        let times = lock(&self.times).clone();
        let timed = times.into_iter().map(|((what, handler), times)| Timed {
            what,
            handler,
            reading: times.read(),
        });
        timed.collect()
    }

    /// Pods that recovery is done with, and how many it found.
    pub fn recovery(&self) -> (usize, usize) {
        let done = self.recovered.load(Ordering::Relaxed);
        (done, self.to_recover.load(Ordering::Relaxed))
    }

    pub(crate) fn to_recover(&self, pods: usize) {
        self.to_recover.store(pods, Ordering::Relaxed);
    }

    pub(crate) fn recovered(&self) {
        self.recovered.fetch_add(1, Ordering::Relaxed);
    }
}

/// A step under way. Dropped before its end it was cut short, which counts as failed.
#[derive(Debug)]
pub(crate) struct Step {
    activity: Arc<Activity>,
    times: Arc<Times>,
    number: u64,
    began: Instant,
    ok: bool,
    span: tracing::Span,
}

impl Step {
    /// It is no surprise if the step lasts until then. What was said before is forgotten.
    pub(crate) fn may_last_until(&self, end: Instant) {
        let may_last = end.saturating_duration_since(self.began);
        if let Some(listed) = lock(&self.activity.steps).under_way.get_mut(&self.number) {
            listed.may_last = Some(may_last);
        }
    }

    pub(crate) fn end(mut self, ok: bool) {
        self.ok = ok;
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        lock(&self.activity.steps).under_way.remove(&self.number);
        self.times.note(self.began.elapsed(), self.ok);
        if !self.ok {
            self.span.record("otel.status_code", "ERROR");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_step_is_listed_while_it_lasts_and_counted_when_it_ends() {
        let activity = Activity::new("runc");
        let of = Of {
            pod: "p".to_owned(),
            handler: Some(String::new()),
            ..Of::default()
        };
        let first = activity.begin("network ADD", of.clone());
        std::thread::sleep(Duration::from_millis(2));
        let second = activity.begin("start shim", Of::default());
        let listed = activity.under_way();
        assert_eq!(
            listed.iter().map(|step| step.what).collect::<Vec<_>>(),
            ["network ADD", "start shim"]
        );
        assert_eq!(listed[0].of.handler.as_deref(), Some("runc"));
        assert!(listed[0].age >= Duration::from_millis(2));
        assert_eq!((listed[0].may_last, listed[1].may_last), (None, None));
        let began = second.began;
        for minutes in [2, 1] {
            let last = Duration::from_secs(60 * minutes);
            second.may_last_until(began + last);
            assert_eq!(activity.under_way()[1].may_last, Some(last));
        }
        first.end(true);
        // Cut short.
        drop(second);
        assert!(activity.under_way().is_empty());
        let failed = activity
            .during("network ADD", of, async { Err::<(), _>(()) })
            .await;
        assert_eq!(failed, Err(()));
        let counts: Vec<_> = activity
            .times()
            .into_iter()
            .map(|timed| {
                let reading = timed.reading;
                (timed.what, timed.handler, reading.count, reading.failed)
            })
            .collect();
        assert_eq!(
            counts,
            [
                ("network ADD", Some("runc".to_owned()), 2, 1),
                ("start shim", None, 1, 1)
            ]
        );
    }
}
