//! CPU rates from samples of CPU time.
//!
//! A rate needs two samples that are far enough apart: over a few milliseconds it would be noise.
//! Of each cgroup two are kept, at least [`SPAN`] apart, and the rate is taken against the newest
//! that is at least as old as that. Whoever asks again sooner adds no sample: clients at different
//! intervals do not disturb each other.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a rate is taken over at least.
pub const SPAN: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    usage: u64,
}

#[derive(Debug)]
struct Samples {
    latest: Sample,
    /// At least [`SPAN`] older.
    before: Option<Sample>,
}

/// One cgroup's CPU time as it was read.
#[derive(Clone, Copy, Debug)]
pub struct Observed<'a> {
    pub id: &'a str,
    pub at: Instant,
    /// In nanoseconds.
    pub usage: u64,
}

/// By id of container or pod. Its lock is held for look-ups alone.
#[derive(Default)]
pub struct Rates {
    samples: Mutex<HashMap<String, Samples>>,
}

impl Rates {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Samples>> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what was read, and says how many nanoseconds of CPU time a second each used
    /// of late; `None` while that cannot be known.
    pub fn observe(&self, observed: &[Observed<'_>]) -> Vec<Option<u64>> {
        let mut samples = self.lock();
        let rates = observed.iter().map(|seen| {
            let now = Sample {
                at: seen.at,
                usage: seen.usage,
            };
            match samples.get_mut(seen.id) {
                Some(known) => known.observe(now),
                None => {
                    let first = Samples {
                        latest: now,
                        before: None,
                    };
                    samples.insert(seen.id.to_owned(), first);
                    None
                }
            }
        });
        rates.collect()
    }

    /// Those of `ids` of which there is no sample, or none younger than `age`.
    pub fn older<'a>(&self, ids: impl Iterator<Item = &'a str>, age: Duration) -> HashSet<&'a str> {
        let samples = self.lock();
        let is_old = |id: &&str| match samples.get(*id) {
            Some(known) => known.latest.at.elapsed() >= age,
            None => true,
        };
        ids.filter(is_old).collect()
    }

    /// Forgets all but these.
    pub fn retain(&self, ids: &HashSet<&str>) {
        self.lock().retain(|id, _| ids.contains(id.as_str()));
    }
}

impl Samples {
    fn observe(&mut self, now: Sample) -> Option<u64> {
        let age = now.at.saturating_duration_since(self.latest.at);
        let is_old = age >= SPAN;
        let base = match is_old {
            true => Some(self.latest),
            false => self.before,
        };
        // Time that goes backwards is another cgroup's: begin anew.
        if now.usage < self.latest.usage && age > Duration::ZERO {
            *self = Self {
                latest: now,
                before: None,
            };
            return None;
        }
        if is_old {
            self.before = Some(self.latest);
            self.latest = now;
        }
        let base = base?;
        let over = now.at.saturating_duration_since(base.at).as_nanos();
        let used = u128::from(now.usage.checked_sub(base.usage)?);
        u64::try_from((used * 1_000_000_000).checked_div(over)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Observes `(milliseconds, usage in milliseconds)` one after the other.
    fn rates(observed: &[(u64, u64)]) -> Vec<Option<u64>> {
        let rates = Rates::default();
        let begin = Instant::now();
        let one = |&(at, usage): &(u64, u64)| {
            let seen = Observed {
                id: "c",
                at: begin + Duration::from_millis(at),
                usage: usage * 1_000_000,
            };
            rates.observe(&[seen])[0]
        };
        observed.iter().map(one).collect()
    }

    const CORE: u64 = 1_000_000_000;

    #[test]
    fn a_rate_needs_two_samples_that_are_apart() {
        assert_eq!(rates(&[(0, 0)]), [None]);
        assert_eq!(rates(&[(0, 0), (50, 50)]), [None, None]);
        assert_eq!(rates(&[(0, 0), (1000, 500)]), [None, Some(CORE / 2)]);
        assert_eq!(rates(&[(0, 0), (0, 0)]), [None, None]);
    }

    #[test]
    fn a_caller_soon_after_another_gets_the_rate_over_the_same_time() {
        // Half a core for ten seconds, and then a burst of 50 ms.
        let seen = rates(&[(0, 0), (10_000, 5000), (10_050, 5050), (10_100, 5100)]);
        assert_eq!(seen[1], Some(CORE / 2));
        for rate in &seen[2..] {
            let rate = rate.unwrap();
            assert!((CORE / 2..CORE * 6 / 10).contains(&rate), "{rate}");
        }
    }

    #[test]
    fn callers_at_different_intervals_do_not_disturb_each_other() {
        // One asks every 10 s, another every 300 ms: a fifth of a core all the time.
        let seen: Vec<_> = (0..100).map(|n| (n * 300, n * 60)).collect();
        for (n, rate) in rates(&seen).into_iter().enumerate().skip(4) {
            assert_eq!(rate, Some(CORE / 5), "{n}");
        }
    }

    #[test]
    fn what_goes_backwards_begins_anew() {
        let seen = rates(&[(0, 1000), (1000, 1500), (2000, 10), (2500, 20), (3000, 510)]);
        assert_eq!(seen[2..], [None, None, Some(CORE / 2)]);
    }

    #[test]
    fn what_has_gone_is_forgotten() {
        let rates = Rates::default();
        let seen = |id| Observed {
            id,
            at: Instant::now(),
            usage: 1,
        };
        rates.observe(&[seen("a"), seen("b")]);
        let age = Duration::from_secs(3600);
        let ids = ["a", "b", "c"];
        assert_eq!(rates.older(ids.into_iter(), age), HashSet::from(["c"]));
        assert_eq!(rates.older(ids.into_iter(), Duration::ZERO).len(), 3);
        rates.retain(&HashSet::from(["b"]));
        assert_eq!(rates.older(ids.into_iter(), age), HashSet::from(["a", "c"]));
    }
}
