//! How long a kind of work takes, counted without a lock: cheap enough to be always on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets in seconds: from a flush on a fast disk to a pull.
pub const BOUNDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];

/// Counts of what has ended, by how long it took.
#[derive(Debug, Default)]
pub struct Times {
    /// One for each of [`BOUNDS`], and one for what took longer.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanos: AtomicU64,
    failed: AtomicU64,
}

/// What [`Times`] say at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// Upper bound in seconds, infinite in the last, and how many took no longer than it but longer
    /// than the one before.
    pub buckets: Vec<(f64, u64)>,
    /// All of them together.
    pub seconds: f64,
    pub count: u64,
    /// Those of them that failed.
    pub failed: u64,
}

impl Times {
    /// Something has ended that took so long.
    pub fn note(&self, took: Duration, ok: bool) {
        let seconds = took.as_secs_f64();
        let bucket = BOUNDS.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        // Wraps after five centuries.
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
        if !ok {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn read(&self) -> Reading {
        let bounds = BOUNDS.into_iter().chain([f64::INFINITY]);
        let counts = self.buckets.iter().map(|n| n.load(Ordering::Relaxed));
        let buckets: Vec<_> = bounds.zip(counts).collect();
        Reading {
            // Of the buckets: the sum must be that of what is shown with it.
            count: buckets.iter().map(|(_, count)| count).sum(),
            buckets,
            seconds: Duration::from_nanos(self.nanos.load(Ordering::Relaxed)).as_secs_f64(),
            failed: self.failed.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_once_and_in_its_bucket() {
        let times = Times::default();
        times.note(Duration::from_millis(1), true);
        times.note(Duration::from_millis(2), false);
        times.note(Duration::from_secs(3600), true);
        let reading = times.read();
        assert_eq!((reading.count, reading.failed), (3, 1));
        assert!((reading.seconds - 3600.003).abs() < 1e-6);
        assert_eq!(reading.buckets[0], (0.001, 1));
        assert_eq!(reading.buckets[1], (0.0025, 1));
        assert_eq!(reading.buckets.last(), Some(&(f64::INFINITY, 1)));
    }
}
