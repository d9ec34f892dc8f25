//! Layers and blobs that work under way holds on to.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gantry_types::Digest;

/// Digests with how many leases hold them.
#[derive(Clone, Debug, Default)]
pub struct Leases(Arc<Mutex<HashMap<Digest, usize>>>);

/// Keeps its digests from being collected until it is dropped.
#[derive(Debug)]
pub struct Lease {
    leases: Leases,
    held: Vec<Digest>,
}

impl Leases {
    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, usize>> {
        // The map is whole between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn lease(&self) -> Lease {
        Lease {
            leases: self.clone(),
            held: Vec::new(),
        }
    }

    pub fn held(&self) -> HashSet<Digest> {
        self.lock().keys().cloned().collect()
    }

    /// Runs `remove` unless somebody holds `digest`; nobody can take it meanwhile, so `remove`
    /// must be quick.
    pub fn unless_held<T>(&self, digest: &Digest, remove: impl FnOnce() -> T) -> Option<T> {
        let held = self.lock();
        (!held.contains_key(digest)).then(remove)
    }
}

impl Lease {
    /// Holds more. What is already there afterwards stays there.
    pub fn hold<'a>(&mut self, digests: impl IntoIterator<Item = &'a Digest>) {
        let mut map = self.leases.lock();
        for digest in digests {
            *map.entry(digest.clone()).or_default() += 1;
            self.held.push(digest.clone());
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut map = self.leases.lock();
        for digest in &self.held {
            if let Some(count) = map.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    map.remove(digest);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_not_removed() {
        let leases = Leases::default();
        let digest = Digest::sha256([1; 32]);
        let (mut first, mut second) = (leases.lease(), leases.lease());
        first.hold([&digest]);
        second.hold([&digest]);
        drop(first);
        assert!(leases.unless_held(&digest, || ()).is_none());
        drop(second);
        assert!(leases.unless_held(&digest, || ()).is_some());
        assert!(leases.held().is_empty());
    }
}
