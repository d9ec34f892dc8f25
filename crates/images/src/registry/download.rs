//! Blobs: resumed, in ranges, from the first host that gives what the digest names.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, HeaderMap};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::task::JoinHandle;

use super::exchange::{self, Endpoint, Failure, Outcome, Request};
use super::failures::Failures;
use super::session::Session;
use crate::content::Content;
use crate::document::Descriptor;
use crate::partial::{BLOCK, Partial};
use crate::{Error, Result};

/// Bytes that are handed to the disk at once.
const BATCH: usize = 512 << 10;
/// A connection that brought this much was of use: its end does not count as a failed try.
const USEFUL: u64 = 1 << 20;
/// A transfer on which nothing came for so long gives up its place among the node's.
const QUIET: Duration = Duration::from_millis(20);
/// How long the end of a pull waits for the disk to take what has come.
const LAST_WRITE: Duration = Duration::from_secs(1);

/// What the reader of a blob came to.
pub enum Followed<T> {
    /// All of it is what the digest names; with what the reader made of it.
    Whole(Result<T>),
    /// It is not: whatever was made of it is gone.
    Other,
    /// The reader did not get to the end, for a reason that is not the blob's.
    Ended(Error),
}

/// The spans of a blob that are still to be asked for, and how its transfers hear of each other.
struct Work {
    /// What no transfer has begun yet, and how much one takes of it. No list: how long that would be
    /// is for a manifest to say.
    rest: Mutex<Range<u64>>,
    step: u64,
    /// Whether the host honours ranges; `None` until it has answered.
    honoured: watch::Sender<Option<bool>>,
    /// No further span is begun.
    stop: AtomicBool,
    /// The host has honoured ranges and now does not.
    fickle: AtomicBool,
}

impl Work {
    fn new(rest: Range<u64>, step: u64) -> Self {
        Self {
            rest: Mutex::new(rest),
            step,
            honoured: watch::Sender::new(None),
            stop: AtomicBool::new(false),
            fickle: AtomicBool::new(false),
        }
    }

    fn next(&self) -> Option<Range<u64>> {
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        let end = rest.start.saturating_add(self.step.max(BLOCK)) / BLOCK * BLOCK;
        let end = end.min(rest.end);
        let span = rest.start..end;
        rest.start = end;
        (!span.is_empty()).then_some(span)
    }

    /// One transfer brings everything.
    fn take_all(&self) {
        *self.rest.lock().unwrap_or_else(PoisonError::into_inner) = 0..0;
        self.honoured.send_replace(Some(false));
    }
}

impl Session {
    /// Downloads a blob. `follow` reads it on a thread of its own, while it comes if not too many
    /// others do, and says whether it is whole; what it made of a blob that is not is thrown away.
    /// The first host that has the blob wins; a transfer that breaks off goes on where it was.
    pub async fn blob<T: Send + 'static>(
        &self,
        blob: &Descriptor,
        content: &Content,
        follow: impl Fn(&Partial) -> Followed<T> + Send + Sync + 'static,
    ) -> Result<T> {
        let follow = Arc::new(follow);
        let start = |partial: &Arc<Partial>, leave: Option<OwnedSemaphorePermit>| {
            let (partial, follow) = (partial.clone(), follow.clone());
            tokio::task::spawn_blocking(move || {
                let _leave = leave;
                follow(&partial)
            })
        };
        let mut failures = Failures::default();
        let mut partial = open(content, blob, None).await?;
        self.progress.to_fetch(partial.absent());
        let mut reader = None;
        let mut hosts = self.endpoints.iter().filter(|host| host.host.pull);
        let mut host = hosts.next();
        // What is here came from elsewhere, at least in part.
        let mut mixed = partial.resumed;
        loop {
            let got = match host {
                _ if partial.missing(0..partial.size).is_none() => Ok(()),
                Some(host) => {
                    let download = self.download(host, &partial);
                    tokio::pin!(download);
                    // Not before there is something to read: it costs a thread.
                    tokio::select! {
                        got = &mut download => got,
                        () = partial.begun(), if reader.is_none() => {
                            let leave = self.budget.reader();
                            reader = leave.map(|leave| start(&partial, Some(leave)));
                            download.await
                        }
                    }
                }
                None => break,
            };
            if let Err(failure) = got {
                let local = matches!(failure, Failure::Local(_));
                let kept = match host {
                    Some(host) => failures.add(host, failure),
                    None => Ok(()),
                };
                if local {
                    let followed =
                        give_up(&partial, reader, self.settings.progress_timeout).await?;
                    // A reader that wants no more knows better why.
                    return match (followed, kept) {
                        (Some(error), _) if partial.is_unwanted() => Err(error),
                        (_, Err(error)) => Err(error),
                        (_, Ok(())) => Err(Error::Cancelled),
                    };
                }
                mixed = true;
                host = hosts.next();
                continue;
            }
            let last = reader.take().unwrap_or_else(|| start(&partial, None));
            match read(last).await? {
                Followed::Whole(value) => {
                    let verified = verified(content, &partial).await;
                    let done = verified.and_then(|()| crate::failpoint::at("pull::after-blob"));
                    return match done {
                        Ok(()) => value,
                        Err(error) => {
                            drop_elsewhere(value).await;
                            Err(error)
                        }
                    };
                }
                Followed::Ended(error) => return Err(error),
                Followed::Other => {}
            }
            partial = open(content, blob, Some(partial)).await?;
            self.progress.to_fetch(partial.absent());
            // The fault may be with what was here before: then the host may try alone.
            if !std::mem::take(&mut mixed) {
                let reason = format!("{}: the content has another digest", blob.digest);
                match host {
                    Some(broken) => {
                        let reason = format!("{}: {reason}", broken.name);
                        failures.add(broken, Failure::Broken(reason))?;
                        host = hosts.next();
                    }
                    None => return Err(failures.into_error(&self.reference)),
                }
                if blob.size == 0 {
                    // There is nothing to ask a host for.
                    return Err(Error::mismatch(&blob.digest, "the blob is empty"));
                }
            }
        }
        give_up(&partial, reader, self.settings.progress_timeout).await?;
        Err(failures.into_error(&self.reference))
    }

    /// Brings what is missing of a blob.
    async fn download(&self, endpoint: &Endpoint, partial: &Arc<Partial>) -> Outcome<()> {
        let part = self.settings.range_bytes.max(1);
        let mut divide = self.settings.ranges > 1;
        while let Some(gap) = partial.missing(0..partial.size) {
            if !divide || gap.end - gap.start < part.saturating_mul(2) {
                let work = Work::new(0..0, part);
                self.transfer(endpoint, partial, gap, &work).await?;
                continue;
            }
            let work = Work::new(gap, part);
            let workers =
                (0..self.settings.ranges).map(|n| self.worker(n, endpoint, partial, &work));
            // All are waited for: none may write after the blob has been given up.
            let ended = futures::future::join_all(workers).await;
            ended.into_iter().collect::<Outcome<()>>()?;
            divide = !work.fickle.into_inner();
        }
        Ok(())
    }

    /// Takes span after span. The first worker finds out whether the host honours ranges.
    async fn worker(
        &self,
        n: usize,
        endpoint: &Endpoint,
        partial: &Arc<Partial>,
        work: &Work,
    ) -> Outcome<()> {
        if n > 0 {
            let mut honoured = work.honoured.subscribe();
            // The sender outlives this.
            let known = honoured.wait_for(Option::is_some).await;
            if !known.is_ok_and(|known| *known == Some(true)) {
                return Ok(());
            }
        }
        while let Some(span) = work.next() {
            if work.stop.load(Ordering::Relaxed) {
                break;
            }
            let done = self.transfer(endpoint, partial, span, work).await;
            if done.is_err() {
                work.stop.store(true, Ordering::Relaxed);
                // Nobody waits for an answer that does not come.
                work.honoured.send_if_modified(|known| {
                    let unknown = known.is_none();
                    *known = known.or(Some(false));
                    unknown
                });
                return done;
            }
        }
        Ok(())
    }

    /// Brings one span, with as many requests as it takes.
    async fn transfer(
        &self,
        endpoint: &Endpoint,
        partial: &Arc<Partial>,
        span: Range<u64>,
        work: &Work,
    ) -> Outcome<()> {
        let mut failed = 0;
        while let Some(missing) = partial.missing(span.clone()) {
            // The whole of it is asked for without a range: not every host knows them.
            let range = (missing != (0..partial.size)).then(|| missing.clone());
            let request = Request {
                method: Method::GET,
                path: format!("blobs/{}", partial.digest),
                accept: None,
                range: range.clone(),
            };
            let answer = tokio::select! {
                answer = endpoint.send(&self.reference, &request, &self.settings) => answer?,
                error = self.cancel.cancelled() => return Err(Failure::Local(error)),
            };
            let comes = place(&answer, range.as_ref(), partial.size)
                .map_err(|reason| Failure::Broken(format!("{}: {reason}", endpoint.name)))?;
            if answer.status() == StatusCode::PARTIAL_CONTENT {
                work.honoured
                    .send_if_modified(|known| known.replace(true).is_none());
            } else if *work.honoured.borrow() == Some(true) {
                // Other transfers are at it: this one would write what is theirs.
                work.stop.store(true, Ordering::Relaxed);
                work.fickle.store(true, Ordering::Relaxed);
                return Ok(());
            } else {
                // All of it comes, from the start: what is here already stays.
                work.take_all();
            }
            match self.receive(endpoint, answer, partial, comes).await {
                Ok(()) => failed = 0,
                Err((Failure::Unavailable(reason), came)) => {
                    failed = if came >= USEFUL { 0 } else { failed + 1 };
                    if failed >= endpoint.attempts(&self.settings) {
                        return Err(Failure::Unavailable(reason));
                    }
                    tracing::debug!(digest = %partial.digest, %reason, came, "download is resumed");
                }
                Err((other, _)) => return Err(other),
            }
        }
        Ok(())
    }

    /// Writes a body that brings the bytes `comes`. Fails with `Unavailable` if it ends early; the
    /// number is of the bytes that came.
    async fn receive(
        &self,
        endpoint: &Endpoint,
        mut response: Response,
        partial: &Arc<Partial>,
        comes: Range<u64>,
    ) -> std::result::Result<(), (Failure, u64)> {
        let late = |reason: String| Failure::Unavailable(format!("{}: {reason}", endpoint.name));
        let limit = self.settings.progress_timeout;
        let mut writer = Writer::new(partial.clone(), comes.start);
        let mut place = self.budget.place();
        let ended = loop {
            if partial.is_unwanted() {
                break Err(Failure::Local(Error::Cancelled));
            }
            let quiet = QUIET.min(limit);
            let chunk = tokio::select! {
                chunk = tokio::time::timeout(quiet, response.chunk()) => chunk,
                error = self.cancel.cancelled() => break Err(Failure::Local(error)),
            };
            let chunk = match chunk {
                Err(_) if quiet < limit => {
                    place.give_up();
                    tokio::select! {
                        chunk = tokio::time::timeout(limit - quiet, response.chunk()) => chunk,
                        error = self.cancel.cancelled() => break Err(Failure::Local(error)),
                    }
                }
                chunk => chunk,
            };
            match chunk {
                Ok(Ok(Some(chunk))) => {
                    if writer.at + chunk.len() as u64 > comes.end {
                        break Err(Failure::Broken(format!(
                            "{}: more than the {} bytes that were to come",
                            endpoint.name,
                            comes.end - comes.start
                        )));
                    }
                    let allowed = async {
                        place.take().await;
                        self.budget.received(chunk.len()).await;
                        self.progress.fetched(chunk.len() as u64);
                        let written = tokio::time::timeout(limit, writer.write(chunk)).await;
                        written.unwrap_or_else(|_| Err(disk_hangs(partial, limit)))
                    };
                    tokio::select! {
                        written = allowed => if let Err(failure) = written {
                            break Err(failure);
                        },
                        error = self.cancel.cancelled() => break Err(Failure::Local(error)),
                    }
                }
                Ok(Ok(None)) if writer.at < comes.end => {
                    let reason = format!("the body ended at byte {} of {}", writer.at, comes.end);
                    break Err(late(reason));
                }
                Ok(Ok(None)) => break Ok(()),
                Ok(Err(error)) => break Err(late(exchange::chain(error))),
                Err(_) => break Err(late(format!("no progress within {limit:?}"))),
            }
        };
        let came = writer.at - comes.start;
        let patience = match self.cancel.is_cancelled() {
            true => LAST_WRITE,
            false => limit,
        };
        let flushed = tokio::time::timeout(patience, writer.flush()).await;
        let flushed = flushed.unwrap_or_else(|_| Err(disk_hangs(partial, patience)));
        // Why it ended goes before what became of the rest.
        match ended {
            Err(local @ Failure::Local(_)) => Err((local, came)),
            ended => flushed.and(ended).map_err(|failure| (failure, came)),
        }
    }
}

/// The part of a blob; `instead` of one that was not the blob, whose reader has ended.
async fn open(
    content: &Content,
    blob: &Descriptor,
    instead: Option<Arc<Partial>>,
) -> Result<Arc<Partial>> {
    let (content, digest, size) = (content.clone(), blob.digest.clone(), blob.size);
    let opened = tokio::task::spawn_blocking(move || {
        if let Some(old) = instead {
            content.scrap(&old)?;
        }
        content.part(&digest, size)
    });
    opened.await.unwrap_or(Err(GONE)).map(Arc::new)
}

async fn verified(content: &Content, partial: &Arc<Partial>) -> Result<()> {
    let (content, partial) = (content.clone(), partial.clone());
    let verified = tokio::task::spawn_blocking(move || content.verified(&partial));
    verified.await.unwrap_or(Err(GONE))
}

/// Ends the reader of a blob that will not come; what it says of it, if it did not get to its end.
async fn give_up<T: Send + 'static>(
    partial: &Partial,
    reader: Option<JoinHandle<Followed<T>>>,
    limit: Duration,
) -> Result<Option<Error>> {
    partial.end();
    let Some(reader) = reader else {
        return Ok(None);
    };
    // One that unpacks to a disk that hangs ends when the disk does, and then clears up by itself.
    let Ok(followed) = tokio::time::timeout(limit, read(reader)).await else {
        return Ok(None);
    };
    match followed? {
        Followed::Ended(error) => Ok(Some(error)),
        Followed::Whole(value) => {
            drop_elsewhere(value).await;
            Ok(None)
        }
        Followed::Other => Ok(None),
    }
}

/// Drops what may be a tree on disk on a thread that may block.
async fn drop_elsewhere<T: Send + 'static>(value: T) {
    // A panic in it has been told.
    let _ = tokio::task::spawn_blocking(move || drop(value)).await;
}

fn disk_hangs(partial: &Partial, after: Duration) -> Failure {
    let reason = format!("the disk took nothing within {after:?}");
    let source = std::io::Error::new(std::io::ErrorKind::TimedOut, reason);
    Failure::Local(Error::io(
        format_args!("write {}", partial.path().display()),
        source,
    ))
}

const GONE: Error = Error::Worker {
    what: "blob writer",
};

async fn read<T>(reader: JoinHandle<Followed<T>>) -> Result<Followed<T>> {
    reader.await.map_err(|_| Error::Worker {
        what: "blob reader",
    })
}

/// Where the body of an answer belongs.
fn place(
    response: &Response,
    asked: Option<&Range<u64>>,
    size: u64,
) -> std::result::Result<Range<u64>, String> {
    match (response.status(), asked) {
        (StatusCode::PARTIAL_CONTENT, Some(asked)) => {
            let said = response
                .headers()
                .get(CONTENT_RANGE)
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default();
            content_range(said, size)
                .filter(|comes| comes.start == asked.start && comes.end <= asked.end)
                .ok_or_else(|| {
                    let said: String = said.chars().filter(|c| !c.is_control()).take(80).collect();
                    format!(
                        "Content-Range {said:?} in answer to bytes={}-{} of {size}",
                        asked.start,
                        asked.end - 1
                    )
                })
        }
        (StatusCode::PARTIAL_CONTENT, None) => {
            Err("status 206 to a request for the whole blob".to_owned())
        }
        _ => match content_length(response.headers()) {
            Some(length) if length != size => Err(format!(
                "serves {length} bytes of a blob that has {size} bytes"
            )),
            _ => Ok(0..size),
        },
    }
}

/// `bytes first-last/size` (RFC 9110, section 14.4).
fn content_range(text: &str, size: u64) -> Option<Range<u64>> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => size,
        total => total.parse().ok()?,
    };
    (total == size && first <= last && last < size).then(|| first..last + 1)
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Hands batches to a blocking thread, one behind the network.
struct Writer {
    partial: Arc<Partial>,
    busy: Option<JoinHandle<Result<()>>>,
    batch: Vec<Bytes>,
    batched: usize,
    /// Where the next byte belongs, batches under way included.
    at: u64,
}

impl Writer {
    fn new(partial: Arc<Partial>, at: u64) -> Self {
        Self {
            partial,
            busy: None,
            batch: Vec::new(),
            batched: 0,
            at,
        }
    }

    async fn write(&mut self, chunk: Bytes) -> Outcome<()> {
        self.at += chunk.len() as u64;
        self.batched += chunk.len();
        self.batch.push(chunk);
        if self.batched < BATCH {
            return Ok(());
        }
        self.hand_over().await
    }

    async fn hand_over(&mut self) -> Outcome<()> {
        self.idle().await?;
        let batch = std::mem::take(&mut self.batch);
        let start = self.at - self.batched as u64;
        self.batched = 0;
        let partial = self.partial.clone();
        let write = move || partial.write_at(start, &batch);
        self.busy = Some(tokio::task::spawn_blocking(write));
        Ok(())
    }

    /// Waits for the batch under way.
    async fn idle(&mut self) -> Outcome<()> {
        match self.busy.take() {
            None => Ok(()),
            // A caller that does not wait leaves it to itself: the file is its alone until it ends.
            Some(busy) => busy.await.unwrap_or(Err(GONE)).map_err(Failure::Local),
        }
    }

    async fn flush(&mut self) -> Outcome<()> {
        if !self.batch.is_empty() {
            self.hand_over().await?;
        }
        self.idle().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(content_range("bytes 0-9/100", 100), Some(0..10));
        assert_eq!(content_range("bytes 90-99/*", 100), Some(90..100));
        for bad in [
            "",
            "bytes 0-9",
            "bytes 0-100/100",
            "bytes 9-0/100",
            "bytes 0-9/99",
            "bytes */100",
            "bytes -9/100",
            "items 0-9/100",
            "bytes 0-18446744073709551615/18446744073709551615",
        ] {
            assert_eq!(content_range(bad, 100), None, "{bad}");
        }
    }
}
