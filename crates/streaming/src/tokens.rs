//! One-use tokens: what a client was granted over CRI waits here until it comes for it.
//!
//! Whoever knows a token may use it, once: it is random, short-lived, and the only thing that guards
//! the server.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::Error;

/// Random bytes in a token, which has four characters for three bytes.
const RANDOM: usize = 18;

pub(crate) struct Tokens<T> {
    waiting: Mutex<HashMap<String, Entry<T>>>,
    lifetime: Duration,
    capacity: usize,
}

struct Entry<T> {
    grant: T,
    expires: Instant,
}

impl<T> Tokens<T> {
    pub fn new(lifetime: Duration, capacity: usize) -> Self {
        Self {
            waiting: Mutex::default(),
            lifetime,
            capacity,
        }
    }

    /// Keeps `grant` for whoever comes with the token in time.
    pub fn insert(&self, grant: T, now: Instant) -> Result<String, Error> {
        let mut random = [0; RANDOM];
        let filled = getrandom(&mut random, GetRandomFlags::empty())
            .map_err(|error| Error::io("drawing a token", error.into()))?;
        if filled != RANDOM {
            return Err(Error::io(
                "drawing a token",
                std::io::ErrorKind::UnexpectedEof.into(),
            ));
        }
        let token = URL_SAFE_NO_PAD.encode(random);
        let expires = now + self.lifetime;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, entry| entry.expires > now);
        if waiting.len() >= self.capacity {
            return Err(Error::TooMany {
                what: "requests that wait for their client",
                limit: self.capacity,
            });
        }
        waiting.insert(token.clone(), Entry { grant, expires });
        Ok(token)
    }

    /// Takes what the token stands for, if `place` finds a place for it; the token is used up then,
    /// whatever comes of it.
    pub fn take<P>(
        &self,
        token: &str,
        now: Instant,
        place: impl FnOnce() -> Option<P>,
    ) -> Taken<T, P> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((token, entry)) = waiting.remove_entry(token) else {
            return Taken::Unknown;
        };
        if entry.expires <= now {
            return Taken::Unknown;
        }
        match place() {
            Some(place) => Taken::Grant(entry.grant, place),
            None => {
                waiting.insert(token, entry);
                Taken::NoPlace
            }
        }
    }
}

/// What a token was good for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken<T, P> {
    Grant(T, P),
    /// Nothing, or nothing any more.
    Unknown,
    /// Something for which there is no room now: it is good for another try.
    NoPlace,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn tokens(capacity: usize) -> Tokens<u32> {
        Tokens::new(Duration::from_secs(60), capacity)
    }

    fn take(tokens: &Tokens<u32>, token: &str, now: Instant) -> Option<u32> {
        match tokens.take(token, now, || Some(())) {
            Taken::Grant(grant, ()) => Some(grant),
            Taken::Unknown => None,
            Taken::NoPlace => panic!("there is a place"),
        }
    }

    #[test]
    fn a_token_that_finds_no_place_stays_good() {
        let (tokens, now) = (tokens(10), Instant::now());
        let token = tokens.insert(7, now).unwrap();
        let none = tokens.take(&token, now, || None::<()>);
        assert_eq!(none, Taken::NoPlace);
        assert_eq!(take(&tokens, &token, now), Some(7));
        // Who has none does not even ask.
        let never = || -> Option<()> { panic!("asked") };
        assert_eq!(tokens.take(&token, now, never), Taken::Unknown);
    }

    #[test]
    fn a_token_is_good_once() {
        let (tokens, now) = (tokens(10), Instant::now());
        let token = tokens.insert(7, now).unwrap();
        assert_eq!(take(&tokens, "guess", now), None);
        assert_eq!(take(&tokens, &token, now), Some(7));
        assert_eq!(take(&tokens, &token, now), None);
    }

    #[test]
    fn a_token_is_good_for_a_minute() {
        let (tokens, now) = (tokens(10), Instant::now());
        let (early, late) = (
            tokens.insert(1, now).unwrap(),
            tokens.insert(2, now).unwrap(),
        );
        assert_eq!(
            take(&tokens, &early, now + Duration::from_secs(59)),
            Some(1)
        );
        assert_eq!(take(&tokens, &late, now + Duration::from_secs(60)), None);
    }

    #[test]
    fn as_many_wait_as_there_is_room_until_they_expire() {
        let (tokens, now) = (tokens(1000), Instant::now());
        let all: HashSet<_> = (0..1000).map(|n| tokens.insert(n, now).unwrap()).collect();
        assert_eq!(all.len(), 1000);
        let error = tokens.insert(0, now).unwrap_err();
        assert_eq!(
            gantry_types::Kind::kind(&error),
            gantry_types::ErrorKind::ResourceExhausted
        );
        take(&tokens, all.iter().next().unwrap(), now).unwrap();
        tokens.insert(0, now).unwrap();
        assert!(tokens.insert(0, now + Duration::from_secs(30)).is_err());
        tokens.insert(0, now + Duration::from_secs(61)).unwrap();
        assert_eq!(tokens.waiting.lock().unwrap().len(), 1);
    }

    #[test]
    fn tokens_are_long_and_fit_a_url() {
        let token = tokens(1).insert(0, Instant::now()).unwrap();
        assert_eq!(token.len(), 24);
        assert!(
            token
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        );
    }
}
