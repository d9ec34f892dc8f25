//! What happens to pods and containers, as it is published, for whoever wants to hear of it.
//!
//! An event is made where a new view of a pod takes the place of the last one, by comparing the
//! two, under the lock under which readers see it. So nothing is shown that is not told, what is
//! told can be read, and all subscribers hear of everything in one order.
//!
//! Nobody waits for a subscriber. Each has a queue of [`QUEUE`] events; one that falls behind gets
//! what is in it and is then told that it was dropped. The kubelet lists everything when that
//! happens, and subscribes anew.
//!
//! While nobody is subscribed, above all between the start of the daemon and the kubelet's return,
//! events are kept for [`KEPT`], without the statuses, which are read when the first subscriber
//! comes. What happened while there was no daemon is among them: recovery publishes against what
//! was on record.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gantry_types::{ContainerId, ContainerState, ErrorKind, Kind, PodId};
use tokio::sync::mpsc;

use crate::Error;
use crate::clock::now_ns;
use crate::registry::PodView;

/// Events that wait for one subscriber. A full node's kubelet hears of some hundreds in a second
/// when it drains.
const QUEUE: usize = 1024;

/// Who asks for more does not want to know: each costs memory and is told everything.
const SUBSCRIBERS: usize = 64;

/// How long an event waits for somebody to hear of it, and how long ago an exit may be that is told
/// again after a restart, because the daemon may have ended before it told. The period after which
/// a kubelet that relies on events lists everything anyhow.
const KEPT: Duration = Duration::from_secs(300);

/// Events that are kept while nobody is subscribed; of more the oldest go.
const UNHEARD: usize = 1024;

/// What became of a pod or a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    Created,
    Started,
    Stopped,
    Deleted,
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// Of the container, or of the pod itself.
    pub id: String,
    pub kind: EventKind,
    /// Nanoseconds since the epoch; each event's is greater than that of the one before.
    pub at: i64,
    /// The pod as it was published then. Of a pod that was deleted: as it was last.
    pub pod: Arc<PodView>,
}

/// Why no further event comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The subscriber read more slowly than things happened.
    #[error("more than {QUEUE} events were not read: subscribe anew, and list what is there")]
    Behind,
    #[error("gantryd is shutting down")]
    Closed,
}

impl Kind for Ended {
    fn kind(&self) -> ErrorKind {
        match self {
            Ended::Behind => ErrorKind::ResourceExhausted,
            Ended::Closed => ErrorKind::Unavailable,
        }
    }
}

/// Everything that happens from now on, and what nobody has heard of before.
pub struct Subscription {
    unheard: VecDeque<Event>,
    events: mpsc::Receiver<Event>,
    behind: Arc<AtomicBool>,
}

impl Subscription {
    /// The next event, or why there is none any more.
    pub async fn next(&mut self) -> Result<Event, Ended> {
        if let Some(event) = self.unheard.pop_front() {
            return Ok(event);
        }
        let behind = || match self.behind.load(Ordering::Acquire) {
            true => Ended::Behind,
            false => Ended::Closed,
        };
        self.events.recv().await.ok_or_else(behind)
    }
}

/// What subscribers know of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    pub ready: bool,
    pub containers: BTreeMap<ContainerId, Life>,
}

/// How far a container is in its life, as subscribers know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Life {
    started: bool,
    stopped: bool,
}

impl Life {
    pub fn of(state: &ContainerState) -> Self {
        match state {
            ContainerState::Creating | ContainerState::Created => Self::default(),
            // What cannot be seen any more has run.
            ContainerState::Running { .. } | ContainerState::Unknown { .. } => Self {
                started: true,
                stopped: false,
            },
            ContainerState::Exited { started_at, .. } => Self {
                started: *started_at > 0,
                stopped: true,
            },
        }
    }

    /// As [`Life::of`] what is on record, at a time in nanoseconds since the epoch: an exit may have
    /// been recorded by a daemon that ended before it told.
    pub fn of_record(state: &ContainerState, now: i64) -> Self {
        let mut life = Self::of(state);
        if let ContainerState::Exited { exit, .. } = state {
            let age = now.saturating_sub(exit.finished_at);
            life.stopped = u128::try_from(age).is_ok_and(|age| age > KEPT.as_nanos());
        }
        life
    }
}

impl Told {
    pub fn of(view: &PodView) -> Self {
        let containers = view.containers.iter();
        let containers = containers.map(|view| (view.facts.id.clone(), Life::of(&view.state)));
        Self {
            ready: view.state.is_ready(),
            containers: containers.collect(),
        }
    }
}

/// What happened between two views of a pod, in the order in which it must have.
fn changes(pod: &PodId, before: Option<&Told>, after: &Told) -> Vec<(String, EventKind)> {
    use EventKind::{Created, Deleted, Started, Stopped};
    let mut changes = Vec::new();
    let mut tell = |id: &str, kind| changes.push((id.to_owned(), kind));
    let new = before.is_none();
    if new {
        tell(pod.as_str(), Created);
        if after.ready {
            tell(pod.as_str(), Started);
        }
    }
    let known = |id| before.and_then(|before| before.containers.get(id));
    for (id, now) in &after.containers {
        let was = known(id).copied().unwrap_or_else(|| {
            tell(id.as_str(), Created);
            Life::default()
        });
        if now.started && !was.started {
            tell(id.as_str(), Started);
        }
        if now.stopped && !was.stopped {
            tell(id.as_str(), Stopped);
        }
    }
    for id in before.iter().flat_map(|before| before.containers.keys()) {
        if !after.containers.contains_key(id) {
            tell(id.as_str(), Deleted);
        }
    }
    if !after.ready && before.is_none_or(|before| before.ready) {
        tell(pod.as_str(), Stopped);
    }
    changes
}

struct Subscriber {
    events: mpsc::Sender<Event>,
    behind: Arc<AtomicBool>,
}

/// An event that nobody has heard of.
struct Unheard {
    pod: PodId,
    id: String,
    kind: EventKind,
    at: i64,
}

#[derive(Default)]
struct State {
    subscribers: Vec<Subscriber>,
    unheard: VecDeque<Unheard>,
    /// Time of the last event.
    last: i64,
    closed: bool,
}

/// Who is told. Its lock is held while queues are filled, and never across a wait.
#[derive(Default)]
pub(crate) struct Events {
    state: Mutex<State>,
}

impl Events {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pod is shown as `view`, of which `before` was told and `after` is to be.
    pub fn published(&self, before: Option<&Told>, after: &Told, view: &Arc<PodView>) {
        let changes = changes(&view.facts.id, before, after);
        if !changes.is_empty() {
            self.tell(changes, view);
        }
    }

    /// A pod is no longer shown; `view` was the last of it.
    pub fn removed(&self, view: &Arc<PodView>) {
        let containers = view.containers.iter();
        let ids = containers.map(|container| container.facts.id.as_str());
        let ids = ids.chain([view.facts.id.as_str()]);
        let changes = ids.map(|id| (id.to_owned(), EventKind::Deleted));
        self.tell(changes.collect(), view);
    }

    fn tell(&self, changes: Vec<(String, EventKind)>, view: &Arc<PodView>) {
        let mut state = self.state();
        let state = &mut *state;
        state.subscribers.retain(|each| !each.events.is_closed());
        for (id, kind) in changes {
            // The wall clock may stand or go back; the order may not.
            let at = now_ns().max(state.last.saturating_add(1));
            state.last = at;
            if state.subscribers.is_empty() {
                if state.unheard.len() == UNHEARD {
                    state.unheard.pop_front();
                }
                let pod = view.facts.id.clone();
                state.unheard.push_back(Unheard { pod, id, kind, at });
                continue;
            }
            let event = Event {
                id,
                kind,
                at,
                pod: Arc::clone(view),
            };
            state.subscribers.retain(|each| {
                let full = each.events.try_send(event.clone()).is_err();
                if full {
                    each.behind.store(true, Ordering::Release);
                }
                !full
            });
        }
    }

    /// Everything from now on. `view` gives a pod as it is now, for what nobody has heard of yet; the
    /// caller lets none change meanwhile.
    pub fn subscribe(
        &self,
        view: impl Fn(&PodId) -> Option<Arc<PodView>>,
    ) -> Result<Subscription, Error> {
        let mut state = self.state();
        state.subscribers.retain(|each| !each.events.is_closed());
        if state.subscribers.len() >= SUBSCRIBERS {
            return Err(Error::Failed {
                step: "subscribe to events",
                kind: ErrorKind::ResourceExhausted,
                message: format!("{SUBSCRIBERS} subscribers are there already"),
            });
        }
        let (sender, events) = mpsc::channel(QUEUE);
        let behind = Arc::new(AtomicBool::new(false));
        let subscriber = Subscriber {
            events: sender,
            behind: Arc::clone(&behind),
        };
        if !state.closed {
            state.subscribers.push(subscriber);
        }
        let now = now_ns();
        let recent = |each: &Unheard| {
            u128::try_from(now.saturating_sub(each.at)).is_ok_and(|age| age <= KEPT.as_nanos())
        };
        let unheard = std::mem::take(&mut state.unheard);
        let unheard = unheard.into_iter().filter(recent);
        let unheard = unheard.filter_map(|Unheard { pod, id, kind, at }| {
            let pod = view(&pod)?;
            Some(Event { id, kind, at, pod })
        });
        Ok(Subscription {
            unheard: unheard.collect(),
            events,
            behind,
        })
    }

    /// Lets all subscribers go, and whoever comes later.
    pub fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.subscribers.clear();
    }
}

#[cfg(test)]
mod tests {
    use gantry_types::{Exit, PodState, ProcessRef};

    use super::EventKind::{Created, Deleted, Started, Stopped};
    use super::*;
    use crate::registry::PodFacts;

    const PROCESS: ProcessRef = ProcessRef {
        pid: 7,
        start_time: 9,
    };

    fn exited(started_at: i64, finished_at: i64) -> ContainerState {
        let exit = Exit {
            code: 3,
            finished_at,
            oom_killed: false,
            reason: String::new(),
            message: String::new(),
        };
        ContainerState::Exited { exit, started_at }
    }

    fn running() -> ContainerState {
        ContainerState::Running {
            process: PROCESS,
            started_at: 1,
        }
    }

    fn unknown() -> ContainerState {
        ContainerState::Unknown { why: String::new() }
    }

    fn told(ready: bool, states: &[ContainerState]) -> Told {
        let containers = states.iter().zip(1..);
        let containers =
            containers.map(|(state, n)| (ContainerId::from_random([n; 32]), Life::of(state)));
        Told {
            ready,
            containers: containers.collect(),
        }
    }

    fn pod() -> PodId {
        PodId::from_random([9; 32])
    }

    fn view(ready: bool) -> Arc<PodView> {
        let facts = PodFacts {
            id: pod(),
            config: Default::default(),
            record: Default::default(),
        };
        let state = match ready {
            true => PodState::Ready {
                shim: PROCESS,
                holder: PROCESS,
            },
            false => PodState::NotReady {
                reason: String::new(),
            },
        };
        Arc::new(PodView {
            facts: Arc::new(facts),
            state,
            half_made: false,
            ips: Vec::new(),
            network_result: Vec::new(),
            shim_adoptions: 0,
            holder_kept: false,
            overhead: None,
            resources: None,
            containers: Vec::new(),
        })
    }

    /// First digit of the id and first letter of the kind of each change.
    fn text(changes: &[(String, EventKind)]) -> String {
        let words = changes.iter().map(|(id, kind)| {
            let letter = match kind {
                Created => 'c',
                Started => 'r',
                Stopped => 's',
                Deleted => 'd',
            };
            format!("{}{letter}", &id[1..2])
        });
        words.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn every_transition_is_told_once_and_in_the_order_of_a_life() {
        use ContainerState::Created as Made;
        let all = |states: &[ContainerState]| told(true, states);
        let cases = [
            (None, all(&[]), "9c 9r"),
            (None, told(false, &[]), "9c 9s"),
            (Some(all(&[])), all(&[]), ""),
            (Some(all(&[])), all(&[Made]), "1c"),
            (Some(all(&[Made])), all(&[running()]), "1r"),
            (Some(all(&[running()])), all(&[running()]), ""),
            (Some(all(&[running()])), all(&[exited(1, 2)]), "1s"),
            (Some(all(&[exited(1, 2)])), all(&[]), "1d"),
            // What was not seen in between has been all the same.
            (Some(all(&[Made])), all(&[exited(1, 2)]), "1r 1s"),
            (Some(all(&[])), all(&[exited(1, 2)]), "1c 1r 1s"),
            // A start that failed.
            (Some(all(&[Made])), all(&[exited(0, 2)]), "1s"),
            (Some(all(&[])), all(&[exited(0, 2)]), "1c 1s"),
            (Some(all(&[running()])), all(&[unknown()]), ""),
            (Some(all(&[unknown()])), all(&[exited(1, 2)]), "1s"),
            (Some(all(&[running()])), told(false, &[running()]), "9s"),
            (
                Some(told(false, &[running()])),
                told(false, &[exited(1, 2)]),
                "1s",
            ),
            (
                Some(all(&[running(), Made])),
                told(false, &[exited(1, 2), exited(0, 2)]),
                "1s 2s 9s",
            ),
        ];
        for (before, after, expected) in cases {
            let changes = changes(&pod(), before.as_ref(), &after);
            assert_eq!(text(&changes), expected, "{before:?} to {after:?}");
        }
    }

    #[test]
    fn an_exit_on_record_is_told_again_while_it_is_new() {
        let now = 1_000_000_000_000_000;
        let kept = i64::try_from(KEPT.as_nanos()).unwrap();
        let stopped = |finished_at| Life::of_record(&exited(1, finished_at), now).stopped;
        assert!(!stopped(now) && !stopped(now - kept) && stopped(now - kept - 1));
        // By a clock that was set back since.
        assert!(!stopped(now + 1));
        assert_eq!(Life::of_record(&running(), now), Life::of(&running()));
    }

    /// Of the events that are there already.
    fn drain(subscription: &mut Subscription) -> Vec<(String, EventKind, i64)> {
        let mut events = Vec::new();
        while let Some(Ok(event)) = futures::FutureExt::now_or_never(subscription.next()) {
            events.push((event.id, event.kind, event.at));
        }
        events
    }

    fn next(subscription: &mut Subscription) -> Option<Result<EventKind, Ended>> {
        let next = futures::FutureExt::now_or_never(subscription.next());
        next.map(|next| next.map(|event| event.kind))
    }

    #[test]
    fn all_hear_the_same_in_one_order_with_rising_times() {
        let events = Events::default();
        let mut first = events.subscribe(|_| None).unwrap();
        let mut second = events.subscribe(|_| None).unwrap();
        let (ready, gone) = (Told::of(&view(true)), Told::of(&view(false)));
        events.published(None, &ready, &view(true));
        events.published(Some(&ready), &ready, &view(true));
        events.published(Some(&ready), &gone, &view(false));
        events.removed(&view(false));
        let heard = drain(&mut first);
        let kinds: Vec<_> = heard.iter().map(|(_, kind, _)| *kind).collect();
        assert_eq!(kinds, [Created, Started, Stopped, Deleted]);
        assert!(heard.is_sorted_by(|(_, _, a), (_, _, b)| a < b));
        assert_eq!(heard, drain(&mut second));
    }

    #[test]
    fn who_falls_behind_is_told_and_dropped_and_holds_up_nobody() {
        let events = Events::default();
        let mut slow = events.subscribe(|_| None).unwrap();
        let mut good = events.subscribe(|_| None).unwrap();
        for n in 0..=QUEUE {
            events.removed(&view(false));
            assert_eq!(drain(&mut good).len(), 1, "event {n}");
        }
        for _ in 0..QUEUE {
            assert_eq!(next(&mut slow), Some(Ok(Deleted)));
        }
        assert_eq!(next(&mut slow), Some(Err(Ended::Behind)));
        assert_eq!(next(&mut good), None);
        events.close();
        assert_eq!(next(&mut good), Some(Err(Ended::Closed)));
        let mut late = events.subscribe(|_| None).unwrap();
        assert_eq!(next(&mut late), Some(Err(Ended::Closed)));
    }

    #[test]
    fn what_nobody_has_heard_of_waits_for_the_first_who_asks() {
        let events = Events::default();
        events.published(None, &Told::of(&view(true)), &view(true));
        // With the pod as it is when it is told.
        let now = view(false);
        let mut first = events.subscribe(|_| Some(Arc::clone(&now))).unwrap();
        assert_eq!(next(&mut first), Some(Ok(Created)));
        let event = futures::FutureExt::now_or_never(first.next());
        let event = event.unwrap().unwrap();
        assert!(event.kind == Started && !event.pod.state.is_ready());
        let mut second = events.subscribe(|_| Some(Arc::clone(&now))).unwrap();
        assert_eq!(next(&mut second), None);
        drop((first, second));
        for _ in 0..2 * UNHEARD {
            events.removed(&view(false));
        }
        assert_eq!(events.state().unheard.len(), UNHEARD);
        // Of what is no more there is nothing to tell.
        let mut third = events.subscribe(|_| None).unwrap();
        assert_eq!(next(&mut third), None);
    }

    #[test]
    fn subscribers_are_bounded_and_who_has_gone_does_not_count() {
        let events = Events::default();
        let subscribe = || events.subscribe(|_| None);
        let many: Vec<_> = (0..SUBSCRIBERS).map(|_| subscribe().unwrap()).collect();
        let refused = subscribe().err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::ResourceExhausted);
        drop(many);
        subscribe().unwrap();
    }
}
