//! Whoever calls the daemon: makes a call, waits for it or goes away from it, and judges its error
//! by what was disturbed meanwhile.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use gantry_testkit::cri::{self, Client};
use tonic::{Code, Status};

use crate::history::{History, Run};
use crate::rng::Rng;
use crate::trouble::{Trouble, Weather};

/// Within which every call is answered, whatever happens.
const ANSWER: Duration = Duration::from_secs(60);

/// A request that is repeated must succeed within this time, and so many tries, that lie in no
/// disturbance.
const PATIENCE: Duration = Duration::from_secs(30);
const TRIES: u32 = 40;

/// What a run shares among its parts.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    pub trouble: Trouble,
    pub history: History,
}

/// How a call ended.
#[derive(Debug)]
pub enum Answer<T> {
    Done(T),
    /// An error that may be, where and when it was.
    Failed(Status),
    /// The caller did not wait.
    Cut,
}

impl<T> Answer<T> {
    pub fn done(self) -> Option<T> {
        match self {
            Self::Done(value) => Some(value),
            Self::Failed(_) | Self::Cut => None,
        }
    }

    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done(_))
    }
}

pub struct Actor {
    pub who: String,
    pub rng: Rng,
    pub shared: Shared,
    socket: PathBuf,
    client: Client,
    /// Start of the daemon to which `client` is connected.
    start: u64,
    /// Requests that failed outside of disturbances, since when and how often.
    failing: BTreeMap<String, (Instant, u32)>,
}

impl Actor {
    pub fn new(who: &str, rng: Rng, shared: &Shared, socket: &Path) -> std::io::Result<Self> {
        Ok(Self {
            who: who.to_owned(),
            rng,
            shared: shared.clone(),
            socket: socket.to_owned(),
            client: Client::connect(socket)?,
            start: shared.trouble.starts(),
            failing: BTreeMap::new(),
        })
    }

    /// A moment after which the next call is given up, of many calls.
    pub fn cut(&mut self) -> Option<Duration> {
        let cut = self.rng.percent(20);
        // Spread over what calls take: some a few milliseconds, others hundreds.
        let longest = *self.rng.one(&[20, 100, 300]);
        let moment = self.rng.millis(0..longest);
        cut.then_some(moment)
    }

    /// One call. An error in calm weather ends the run unless `excused` says why it may be.
    pub async fn call<T>(
        &mut self,
        what: &str,
        cut: Option<Duration>,
        excused: impl Fn(&Status) -> bool,
        call: impl AsyncFnOnce(&Client) -> cri::Result<T>,
    ) -> Run<Answer<T>> {
        let shared = self.shared.clone();
        let (trouble, history) = (&shared.trouble, &shared.history);
        history.check()?;
        let starts = trouble.starts();
        if starts != self.start {
            // The old connection would only be found broken by a call.
            self.client = Client::connect(&self.socket)
                .map_err(|error| history.fault(&self.who, format!("connect: {error}")))?;
            self.start = starts;
        }
        let begun = trouble.now();
        let began = Instant::now();
        let limit = cut.unwrap_or(ANSWER);
        let answer = tokio::time::timeout(limit, call(&self.client)).await;
        let took = began.elapsed();
        let weather = trouble.since(begun);
        history.count("calls");
        let status = match answer {
            Ok(Ok(value)) => {
                history.note(&self.who, format!("{what}: done in {took:.0?}"));
                self.failing.remove(what);
                return Ok(Answer::Done(value));
            }
            Err(_) if cut.is_some() => {
                history.note(&self.who, format!("{what}: cut after {took:.0?}"));
                history.count("calls cut short");
                return Ok(Answer::Cut);
            }
            Err(_) => {
                let fault = format!("{what}: no answer within {ANSWER:?}, {weather:?}");
                return Err(history.fault(&self.who, fault));
            }
            Ok(Err(status)) => status,
        };
        let (code, message) = (status.code(), status.message());
        let text = format!("{what}: {code:?} after {took:.0?}, {weather:?}: {message}");
        history.note(&self.who, &text);
        history.count("calls failed");
        if excused(&status) || weather == Weather::Trouble {
            return Ok(Answer::Failed(status));
        }
        if weather == Weather::Calm {
            return Err(history.fault(&self.who, text));
        }
        let failing = self.failing.entry(what.to_owned());
        let (since, times) = failing.or_insert((Instant::now(), 0));
        *times += 1;
        if *times >= TRIES && since.elapsed() >= PATIENCE {
            let text = format!("{text}; so for {times} times in {:?}", since.elapsed());
            return Err(history.fault(&self.who, text));
        }
        Ok(Answer::Failed(status))
    }

    /// Repeats a call until it succeeds, which it must.
    pub async fn insist<T>(
        &mut self,
        what: &str,
        call: impl AsyncFn(&Client) -> cri::Result<T>,
    ) -> Run<T> {
        loop {
            if let Answer::Done(value) = self.call(what, None, |_| false, &call).await? {
                return Ok(value);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A promise that this caller relies on was broken.
    pub fn expect<T>(&self, about: &str, outcome: Result<T, String>) -> Run<T> {
        outcome.map_err(|error| {
            let text = format!("{about} {error}");
            self.shared.history.fault(&self.who, text)
        })
    }

    pub async fn pause(&mut self, millis: std::ops::Range<u64>) {
        tokio::time::sleep(self.rng.millis(millis)).await;
    }
}

/// The errors of a call that meets another one about the same thing.
pub fn is_conflict(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::Cancelled
    )
}
