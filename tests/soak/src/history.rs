//! What was done, for whoever has to find out why it went wrong.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Operations that are shown with a fault, and disturbances.
const KEPT: usize = 150;
const DISTURBANCES: usize = 60;

/// The run ends: a fault was found, by this part or by another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

/// Result of whatever ends when a fault was found.
pub type Run<T> = Result<T, Stopped>;

#[derive(Debug)]
struct State {
    since: Instant,
    last: VecDeque<String>,
    disturbances: VecDeque<String>,
    faults: Vec<String>,
    counts: BTreeMap<&'static str, u64>,
}

#[derive(Clone, Debug)]
pub struct History(Arc<Mutex<State>>);

impl Default for History {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            since: Instant::now(),
            last: VecDeque::new(),
            disturbances: VecDeque::new(),
            faults: Vec::new(),
            counts: BTreeMap::new(),
        })))
    }
}

impl History {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what somebody did.
    pub fn note(&self, who: &str, what: impl std::fmt::Display) {
        let mut state = self.state();
        let line = format!("{:9.3} {who}: {what}", state.since.elapsed().as_secs_f64());
        keep(&mut state.last, KEPT, line);
    }

    /// Notes what was done to the node.
    pub fn disturbance(&self, of: &str, what: impl std::fmt::Display) {
        self.note(of, &what);
        let mut state = self.state();
        let line = format!("{:9.3} {of}: {what}", state.since.elapsed().as_secs_f64());
        keep(&mut state.disturbances, DISTURBANCES, line);
    }

    pub fn count(&self, what: &'static str) {
        *self.state().counts.entry(what).or_default() += 1;
    }

    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.state().counts.clone()
    }

    /// A promise was broken. Ends the run.
    pub fn fault(&self, who: &str, what: impl std::fmt::Display) -> Stopped {
        let what = format!("{who}: {what}");
        self.note("FAULT", &what);
        self.state().faults.push(what);
        Stopped
    }

    /// Whether the run goes on.
    pub fn check(&self) -> Run<()> {
        if self.state().faults.is_empty() {
            Ok(())
        } else {
            Err(Stopped)
        }
    }

    pub fn faults(&self) -> Vec<String> {
        self.state().faults.clone()
    }

    /// For whoever has to find out what happened.
    pub fn story(&self) -> String {
        let state = self.state();
        let lines = |of: &VecDeque<String>| -> String {
            of.iter().map(|line| format!("{line}\n")).collect()
        };
        format!(
            "the last disturbances:\n{}the last operations:\n{}",
            lines(&state.disturbances),
            lines(&state.last)
        )
    }
}

fn keep(lines: &mut VecDeque<String>, limit: usize, line: String) {
    if lines.len() == limit {
        lines.pop_front();
    }
    lines.push_back(line);
}
