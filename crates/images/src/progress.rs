//! How far a pull is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one pull, which its pipeline adds to and anybody may read. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    total: AtomicU64,
    fetched: AtomicU64,
    layers: AtomicU64,
    unpacked: AtomicU64,
}

/// What the counters say at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stand {
    /// Bytes of blobs that had or have to be fetched, as far as that is known: not those that were
    /// here, and again those that had to be fetched again.
    pub total: u64,
    /// Of those, bytes that are here.
    pub fetched: u64,
    /// Layers that were or are to be unpacked, and how many of them are.
    pub layers: u64,
    pub unpacked: u64,
}

impl Progress {
    pub fn stand(&self) -> Stand {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stand {
            total: get(&self.0.total),
            fetched: get(&self.0.fetched),
            layers: get(&self.0.layers),
            unpacked: get(&self.0.unpacked),
        }
    }

    pub(crate) fn to_fetch(&self, bytes: u64) {
        self.0.total.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn fetched(&self, bytes: u64) {
        self.0.fetched.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn to_unpack(&self, layers: usize) {
        self.0.layers.fetch_add(layers as u64, Ordering::Relaxed);
    }

    pub(crate) fn unpacked(&self) {
        self.0.unpacked.fetch_add(1, Ordering::Relaxed);
    }
}
