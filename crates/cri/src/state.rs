//! What the daemon knows of the node and is at, all at once: for `gantryctl state` and for the dump
//! on SIGUSR1. Everything is read from memory; nothing that hangs is asked.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use gantry_supervisor::Supervisor;
use gantry_supervisor::activity::UnderWay;
use gantry_supervisor::registry::{DriverView, PodView};
use gantry_types::{ContainerState, PodState};
use serde_json::{Value, json};

use crate::inflight::{Call, Calls};
use crate::layer::Gate;

/// What is older than this is listed as stuck. Pulls, stops with a grace, execs and streams may last.
const STUCK: Duration = Duration::from_secs(10);

/// Most entries of a list: each is counted all the same.
const MOST: usize = 1000;

/// Where the state is read from. Cheap to clone.
#[derive(Clone)]
pub struct State {
    pub supervisor: Supervisor,
    pub calls: Calls,
    pub gate: Gate,
    /// When the daemon began.
    pub began: Instant,
    /// Where its configuration is from.
    pub config: Vec<String>,
}

impl State {
    /// As JSON: ages in seconds, ids in full.
    pub fn read(&self) -> Value {
        let drivers = self.supervisor.registry().drivers();
        let activity = self.supervisor.activity();
        let steps = activity.under_way();
        let calls = self.calls.under_way();
        let pulls = self.supervisor.images().pulls();
        let store = self.supervisor.store_now();
        let (recovered, found) = activity.recovery();
        let (moving, waiting) = self.supervisor.images().transfers();
        let shims = &activity.shims;
        let count = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
        let views: Vec<_> = drivers
            .iter()
            .filter_map(|driver| driver.view.as_deref())
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "uptime": seconds(self.began.elapsed()),
            "ready": self.gate.is_open(),
            "recovery": { "pods": found, "done": recovered },
            "config": self.config,
            "pods": count_by(views.iter().map(|pod| pod_state(&pod.state))),
            "podsBeingMade": drivers.len() - views.len(),
            "containers": count_by(views.iter().flat_map(|pod| &pod.containers).map(|container| {
                match container.state {
                    ContainerState::Creating | ContainerState::Created => "created",
                    ContainerState::Running { .. } => "running",
                    ContainerState::Exited { .. } => "exited",
                    ContainerState::Unknown { .. } => "unknown",
                }
            })),
            "images": self.supervisor.images().list().len(),
            "calls": list(calls.iter().map(call)),
            "callsCount": calls.len(),
            "steps": list(steps.iter().map(|step| json!({
                "step": step.what,
                "pod": step.of.pod,
                "container": step.of.container,
                "handler": step.of.handler,
                "age": seconds(step.age),
            }))),
            "stepsCount": steps.len(),
            "drivers": list(drivers.iter().map(driver)),
            "driversCount": drivers.len(),
            "pulls": list(pulls.iter().map(|pull| json!({
                "reference": pull.reference,
                "age": seconds(pull.age),
                "waiters": pull.waiters,
                "fetchedBytes": pull.stand.fetched,
                "totalBytes": pull.stand.total,
                "unpackedLayers": pull.stand.unpacked,
                "layers": pull.stand.layers,
            }))),
            "transfers": { "moving": moving, "waiting": waiting },
            "store": {
                "flushAge": store.flushing.map(seconds),
                "waitingWriters": store.waiting,
                "flushes": store.flushes.count,
                "failedFlushes": store.flushes.failed,
                "flushSeconds": store.flushes.seconds,
            },
            "shims": {
                "adoptions": count(&shims.adopted),
                "lost": count(&shims.lost),
                "missedDeadlines": count(&shims.missed),
                "killed": count(&shims.killed),
            },
            "stuck": list(self.stuck(&drivers).into_iter().map(Value::from)),
        })
    }

    /// A line for each thing that takes longer than it should.
    fn stuck(&self, drivers: &[DriverView]) -> Vec<String> {
        let mut stuck = Vec::new();
        for step in self.supervisor.activity().under_way() {
            if is_stuck(&step) {
                let of = match step.of.container.as_str() {
                    "" => format!("pod {}", step.of.pod),
                    id => format!("pod {} container {id}", step.of.pod),
                };
                let age = step.age.as_secs();
                stuck.push(format!("{}: {of}: for {age} s", step.what));
            }
        }
        for driver in drivers {
            if let Some(age) = driver.handling.filter(|age| *age >= Duration::from_secs(1)) {
                let age = age.as_secs();
                stuck.push(format!(
                    "driver of pod {}: one message for {age} s",
                    driver.pod
                ));
            }
        }
        let store = self.supervisor.store_now();
        if let Some(age) = store.flushing.filter(|age| *age >= STUCK) {
            stuck.push(format!("store: a flush for {} s", age.as_secs()));
        }
        stuck
    }
}

/// Whether a step has taken longer than it should: a stop may take as long as its grace.
fn is_stuck(step: &UnderWay) -> bool {
    step.age >= step.may_last.map_or(STUCK, |last| last.max(STUCK))
}

fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e3).round() / 1e3
}

fn list(entries: impl Iterator<Item = Value>) -> Vec<Value> {
    entries.take(MOST).collect()
}

fn count_by<'a>(states: impl Iterator<Item = &'a str>) -> Value {
    let mut counts = std::collections::BTreeMap::<_, u64>::new();
    for state in states {
        *counts.entry(state).or_default() += 1;
    }
    json!(counts)
}

fn call(call: &Call) -> Value {
    json!({
        "id": call.id,
        "method": call.method,
        "about": call.about,
        "age": seconds(call.age),
    })
}

fn pod_state(state: &PodState) -> &'static str {
    match state {
        PodState::Creating => "creating",
        PodState::Ready { .. } => "ready",
        PodState::NotReady { .. } => "notready",
    }
}

fn driver(driver: &DriverView) -> Value {
    let view = driver.view.as_deref();
    let metadata = view.and_then(|view| view.facts.config.metadata.clone());
    let metadata = metadata.unwrap_or_default();
    let shim = |view: &PodView| match view.state {
        PodState::Ready { shim, .. } => shim.pid,
        PodState::Creating | PodState::NotReady { .. } => 0,
    };
    let busy = driver
        .busy
        .iter()
        .map(|(id, what, age)| json!({ "container": id, "with": what, "age": seconds(*age) }));
    json!({
        "pod": driver.pod.as_str(),
        "namespace": metadata.namespace,
        "name": metadata.name,
        "state": view.map_or("creating", |view| pod_state(&view.state)),
        "containers": view.map_or(0, |view| view.containers.len()),
        "shim": view.map_or(0, shim),
        "shimAdoptions": view.map_or(0, |view| view.shim_adoptions),
        "outlivesShim": view.is_some_and(|view| view.holder_kept),
        "waitingMessages": driver.waiting,
        "handling": driver.handling.map(seconds),
        "busy": busy.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_is_stuck_when_its_grace_and_the_kill_are_over() {
        let step = |what, age, may_last: Option<u64>| UnderWay {
            what,
            of: gantry_supervisor::activity::Of::default(),
            age: Duration::from_secs(age),
            may_last: may_last.map(Duration::from_secs),
        };
        for (step, stuck) in [
            (step("network ADD", 9, None), false),
            (step("network ADD", 10, None), true),
            (step("stop container", 600, Some(610)), false),
            (step("stop container", 610, Some(610)), true),
            // Without a grace nothing is stuck before its time.
            (step("stop container", 9, Some(0)), false),
        ] {
            assert_eq!(is_stuck(&step), stuck, "{step:?}");
        }
    }
}
