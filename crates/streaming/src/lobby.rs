//! Connections whose client has shown no token yet.
//!
//! They take no session's place, so that whoever opens connections and says nothing shuts out nobody
//! who was granted one. When there is no room, the one that has been here longest goes: a client
//! with a token shows it at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

pub(crate) struct Lobby {
    guests: Mutex<Guests>,
    capacity: usize,
}

#[derive(Default)]
struct Guests {
    /// Rises with every guest, so that the first is the oldest.
    next: u64,
    present: BTreeMap<u64, Arc<Notify>>,
}

/// A place in the lobby, until it is dropped.
pub(crate) struct Guest {
    lobby: Arc<Lobby>,
    number: u64,
    leave: Arc<Notify>,
}

impl Lobby {
    /// A lobby with room for `capacity` guests, and for one at least.
    pub fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self {
            guests: Mutex::default(),
            capacity: capacity.max(1),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn enter(self: &Arc<Self>) -> Guest {
        let leave = Arc::new(Notify::new());
        let mut guests = self.lock();
        while guests.present.len() >= self.capacity
            && let Some((_, oldest)) = guests.present.pop_first()
        {
            oldest.notify_one();
        }
        let number = guests.next;
        guests.next += 1;
        guests.present.insert(number, leave.clone());
        Guest {
            lobby: self.clone(),
            number,
            leave,
        }
    }
}

impl Guest {
    /// Resolves when another needs the place.
    pub async fn pushed_out(&self) {
        self.leave.notified().await;
    }

    /// Gives the place up: the client has shown its token.
    pub fn known(&self) {
        self.lobby.lock().present.remove(&self.number);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.known();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn the_oldest_makes_room_and_who_is_known_needs_none() {
        let lobby = Lobby::new(2);
        let (first, second) = (lobby.enter(), lobby.enter());
        assert!(first.pushed_out().now_or_never().is_none());
        let third = lobby.enter();
        assert!(first.pushed_out().now_or_never().is_some());
        second.known();
        let fourth = lobby.enter();
        for guest in [&second, &third, &fourth] {
            assert!(guest.pushed_out().now_or_never().is_none());
        }
        drop(first);
        drop((second, third, fourth));
        assert!(lobby.lock().present.is_empty());
    }
}
