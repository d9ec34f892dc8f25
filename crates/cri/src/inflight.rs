//! The calls under way: which, on what, and since when. A call is on the list from its arrival to
//! the last byte of its answer, also one that waits for the daemon's recovery or has hung.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest text that a client can put on the list.
const LONGEST: usize = 128;

tokio::task_local! {
    /// The call that this task serves.
    pub(crate) static CURRENT: Tag;
}

/// The calls under way. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Calls(Arc<Mutex<BTreeMap<u64, Entry>>>);

#[derive(Debug)]
struct Entry {
    method: String,
    about: String,
    began: Instant,
}

/// A call under way.
#[derive(Clone, Debug)]
pub struct Call {
    /// As in the log.
    pub id: u64,
    /// `runtime.v1.RuntimeService/Version`.
    pub method: String,
    /// What it is about: an id as the client gave it, a pod's name, a reference. May be empty.
    pub about: String,
    pub age: Duration,
}

/// One call; off the list when dropped.
#[derive(Debug)]
pub(crate) struct Listed {
    calls: Calls,
    id: u64,
}

/// Names a call on the list.
#[derive(Clone, Debug)]
pub(crate) struct Tag {
    calls: Calls,
    id: u64,
}

impl Calls {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self, id: u64, method: &str, began: Instant) -> Listed {
        let entry = Entry {
            method: bounded(method),
            about: String::new(),
            began,
        };
        self.lock().insert(id, entry);
        Listed {
            calls: self.clone(),
            id,
        }
    }

    /// The calls under way, the oldest first.
    pub fn under_way(&self) -> Vec<Call> {
        let now = Instant::now();
        let mut calls: Vec<_> = self
            .lock()
            .iter()
            .map(|(id, entry)| Call {
                id: *id,
                method: entry.method.clone(),
                about: entry.about.clone(),
                age: now.saturating_duration_since(entry.began),
            })
            .collect();
        calls.sort_by_key(|call| std::cmp::Reverse(call.age));
        calls
    }

    pub fn count(&self) -> usize {
        self.lock().len()
    }
}

impl Listed {
    pub(crate) fn tag(&self) -> Tag {
        Tag {
            calls: self.calls.clone(),
            id: self.id,
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.calls.lock().remove(&self.id);
    }
}

/// Says what the call that this task serves is about; outside of one it says nothing.
pub(crate) fn about(what: &str) {
    // Fails outside of a call, as in a test of a handler.
    let _ = CURRENT.try_with(|tag| {
        if let Some(entry) = tag.calls.lock().get_mut(&tag.id) {
            entry.about = bounded(what);
        }
    });
}

fn bounded(text: &str) -> String {
    text.chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_is_listed_with_what_it_is_about_until_it_ends() {
        let calls = Calls::default();
        let listed = calls.begin(7, "a.B/C", Instant::now());
        let long = "x".repeat(10 * LONGEST);
        CURRENT.scope(listed.tag(), async { about(&long) }).await;
        about("nobody's");
        let under_way = calls.under_way();
        assert_eq!(under_way.len(), 1);
        assert_eq!(
            (under_way[0].id, under_way[0].method.as_str()),
            (7, "a.B/C")
        );
        assert_eq!(under_way[0].about.len(), LONGEST);
        drop(listed);
        assert_eq!(calls.count(), 0);
    }
}
