//! What all pulls of the node together may take, so that a burst of them starves no pod.

use std::num::NonZeroU64;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// Shared by all pulls. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Budget {
    /// Transfers on which bytes move. One that has gone quiet gives its place up: a registry that
    /// hangs delays only the pulls that need it.
    downloads: Arc<Semaphore>,
    pub turns: Turns,
    rate: Option<Arc<Rate>>,
}

impl Budget {
    /// `bandwidth` in bytes a second.
    pub fn new(downloads: usize, unpacks: usize, bandwidth: Option<NonZeroU64>) -> Self {
        Self {
            downloads: Arc::new(Semaphore::new(downloads.clamp(1, Semaphore::MAX_PERMITS))),
            turns: Turns::new(unpacks.max(1)),
            rate: bandwidth.map(|bytes| Arc::new(Rate::new(bytes))),
        }
    }

    /// A place for a transfer; kept until it is dropped.
    pub async fn download(&self) -> Option<OwnedSemaphorePermit> {
        // It fails only when closed, which nobody does.
        self.downloads.clone().acquire_owned().await.ok()
    }

    /// Returns when `bytes` that have come are within the bandwidth. Until then no more are read:
    /// the rest waits at the sender.
    pub async fn received(&self, bytes: usize) {
        if let Some(rate) = &self.rate {
            rate.take(bytes).await;
        }
    }
}

/// Places for threads that decompress, hash and write files. A thread that waits for bytes to
/// come must not keep its turn.
#[derive(Clone, Debug)]
pub struct Turns(Arc<(Mutex<usize>, Condvar)>);

/// Given back when dropped.
#[derive(Debug)]
pub struct Turn(Turns);

impl Turns {
    fn new(places: usize) -> Self {
        Self(Arc::new((Mutex::new(places), Condvar::new())))
    }

    /// Blocks until there is a place.
    pub fn take(&self) -> Turn {
        let (free, freed) = &*self.0;
        let free = free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = freed
            .wait_while(free, |free| *free == 0)
            .unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Turn(self.clone())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (free, freed) = &*self.0.0;
        *free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        freed.notify_one();
    }
}

/// Bytes a second over all transfers, first come, first served.
#[derive(Debug)]
struct Rate {
    bytes_per_second: NonZeroU64,
    /// When all that was let through so far would have come at this rate.
    paid_until: Mutex<Instant>,
}

/// What may come at once after a pause.
const BURST: Duration = Duration::from_millis(100);

impl Rate {
    fn new(bytes_per_second: NonZeroU64) -> Self {
        Self {
            bytes_per_second,
            paid_until: Mutex::new(Instant::now()),
        }
    }

    async fn take(&self, bytes: usize) {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second.get() as f64);
        let due = {
            let mut paid = self
                .paid_until
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            *paid = (*paid).max(now.checked_sub(BURST).unwrap_or(now)) + cost;
            *paid
        };
        tokio::time::sleep_until(due).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bandwidth_is_shared_and_held() {
        let budget = Budget::new(1, 1, NonZeroU64::new(5000));
        let start = Instant::now();
        let one = async {
            for _ in 0..10 {
                budget.received(100).await;
            }
        };
        let two = async {
            for _ in 0..10 {
                budget.received(100).await;
            }
        };
        tokio::join!(one, two);
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(280), "{took:?}");
        let unlimited = Budget::new(1, 1, None);
        unlimited.received(usize::MAX).await;
    }

    #[test]
    fn a_turn_is_waited_for() {
        let turns = Turns::new(1);
        let held = turns.take();
        let (told, hears) = std::sync::mpsc::channel();
        let other = turns.clone();
        let thread = std::thread::spawn(move || {
            let _turn = other.take();
            told.send(()).unwrap();
        });
        assert!(hears.recv_timeout(Duration::from_millis(50)).is_err());
        drop(held);
        hears.recv_timeout(Duration::from_secs(10)).unwrap();
        thread.join().unwrap();
    }
}
