//! What all pulls of the node together may take, so that a burst of them starves no pod.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// How long a transfer may keep its place before it stands in line again.
const SLICE: Duration = Duration::from_millis(250);
/// Most threads that wait for bytes of blobs, however many registries hang.
const READERS: usize = 64;

/// Shared by all pulls. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Budget {
    /// Transfers on which bytes move.
    downloads: Arc<Semaphore>,
    places: usize,
    waiting: Arc<AtomicUsize>,
    /// Threads that read blobs which are still coming.
    readers: Arc<Semaphore>,
    pub turns: Turns,
    rate: Option<Arc<Rate>>,
}

impl Budget {
    /// `bandwidth` in bytes a second.
    pub fn new(downloads: usize, unpacks: usize, bandwidth: Option<NonZeroU64>) -> Self {
        let places = downloads.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            downloads: Arc::new(Semaphore::new(places)),
            places,
            waiting: Arc::default(),
            readers: Arc::new(Semaphore::new(READERS)),
            turns: Turns::new(unpacks.max(1)),
            rate: bandwidth.map(|bytes| Arc::new(Rate::new(bytes))),
        }
    }

    /// Transfers that have a place, and those that wait for one.
    pub fn transfers(&self) -> (usize, usize) {
        let free = self.downloads.available_permits();
        let waiting = self.waiting.load(Ordering::Relaxed);
        (self.places.saturating_sub(free), waiting)
    }

    /// For a transfer, which has no place yet.
    pub fn place(&self) -> Place {
        Place {
            places: self.downloads.clone(),
            waiting: self.waiting.clone(),
            held: None,
        }
    }

    /// Leave to follow a blob that is still coming, on a thread that waits for its bytes; kept until
    /// it is dropped. `None`: there are enough of them, and the blob is read once it is here.
    pub fn reader(&self) -> Option<OwnedSemaphorePermit> {
        self.readers.clone().try_acquire_owned().ok()
    }

    /// Returns when `bytes` that have come are within the bandwidth. Until then no more are read:
    /// the rest waits at the sender.
    pub async fn received(&self, bytes: usize) {
        if let Some(rate) = &self.rate {
            rate.take(bytes).await;
        }
    }
}

/// A transfer's place among those of the node. It is taken for bytes that have come, and given up
/// when none come for a moment; also a transfer on which they never cease to trickle has it but for a
/// while, after which whoever waits longest goes first. So a slow registry delays only the pulls that
/// need it.
#[derive(Debug)]
pub struct Place {
    places: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    held: Option<(OwnedSemaphorePermit, Instant)>,
}

/// Counts a transfer that waits, also one that is given up.
struct Waits<'a>(&'a AtomicUsize);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Place {
    /// Returns once the transfer has a place.
    pub async fn take(&mut self) {
        if let Some((_, since)) = &self.held {
            if since.elapsed() < SLICE {
                return;
            }
            self.held = None;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waits = Waits(&self.waiting);
        // It fails only when closed, which nobody does.
        let permit = self.places.clone().acquire_owned().await.ok();
        self.held = permit.map(|permit| (permit, Instant::now()));
    }

    pub fn give_up(&mut self) {
        self.held = None;
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

    #[tokio::test(start_paused = true)]
    async fn a_place_is_for_a_while() {
        let budget = Budget::new(1, 1, None);
        let (mut slow, mut other) = (budget.place(), budget.place());
        slow.take().await;
        let wait = tokio::time::timeout(SLICE * 2, async {
            tokio::join!(other.take(), async {
                for _ in 0..100 {
                    tokio::time::sleep(SLICE / 10).await;
                    slow.take().await;
                }
            })
        });
        // Bytes never cease to come for the one, and the other has its turn.
        assert!(wait.await.is_err());
        assert!(other.held.is_some() && slow.held.is_none());
        other.give_up();
        slow.take().await;
        assert!(slow.held.is_some());
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
