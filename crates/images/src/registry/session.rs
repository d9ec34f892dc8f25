//! All that one pull asks of a registry and its mirrors.

use bytes::Bytes;
use gantry_types::Digest;
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderMap};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Settings;
use super::exchange::{self, Endpoint, Failure, Outcome, Request};
use crate::content::{Content, Ingest};
use crate::document::{ACCEPT, DOCUMENT_MAX};
use crate::hash;
use crate::reference::Reference;
use crate::{Error, Result};

/// Bytes that are handed to the disk at once.
const BATCH: usize = 1 << 20;
/// A connection that brought this much was of use: its end does not count as a failed try.
const USEFUL: u64 = 1 << 20;

pub struct Session {
    reference: Reference,
    endpoints: Vec<Endpoint>,
    settings: Settings,
    /// The pull has failed: downloads end.
    cancel: watch::Sender<bool>,
}

/// A manifest or index as served.
#[derive(Debug)]
pub struct Served {
    pub bytes: Vec<u8>,
    pub media_type: String,
    /// Computed from the bytes.
    pub digest: Digest,
}

/// What to ask for.
#[derive(Clone, Copy)]
enum Wanted<'a> {
    Tag(&'a str),
    Digest(&'a Digest),
}

impl Wanted<'_> {
    fn path(self) -> String {
        match self {
            Wanted::Tag(tag) => format!("manifests/{tag}"),
            Wanted::Digest(digest) => format!("manifests/{digest}"),
        }
    }
}

impl Session {
    pub fn new(reference: Reference, endpoints: Vec<Endpoint>, settings: Settings) -> Self {
        Self {
            reference,
            endpoints,
            settings,
            cancel: watch::Sender::new(false),
        }
    }

    /// Ends downloads under way. They are to be waited for, not dropped: a writing thread would
    /// outlive them.
    pub fn cancel(&self) {
        self.cancel.send_replace(true);
    }

    /// Returns once [`Session::cancel`] was called.
    pub async fn cancelled(&self) -> Error {
        // The sender lives as long as `self`.
        let _ = self
            .cancel
            .subscribe()
            .wait_for(|&cancelled| cancelled)
            .await;
        Error::Worker {
            what: "layer download",
        }
    }

    fn wanted(&self) -> Wanted<'_> {
        match (self.reference.digest(), self.reference.tag()) {
            (Some(digest), _) => Wanted::Digest(digest),
            (None, Some(tag)) => Wanted::Tag(tag),
            (None, None) => Wanted::Tag("latest"),
        }
    }

    /// Digest of what the reference names now, as the registry says; `None` if it does not say.
    pub async fn head(&self) -> Result<Option<Digest>> {
        let wanted = self.wanted();
        let request = Request {
            method: Method::HEAD,
            path: wanted.path(),
            accept: Some(ACCEPT),
            from: 0,
        };
        let mut failures = Failures::default();
        for endpoint in self.usable(wanted) {
            match endpoint
                .send(&self.reference, &request, &self.settings)
                .await
            {
                Ok(response) => return Ok(said_digest(response.headers())),
                // Some registries do not know HEAD of a manifest.
                Err(Failure::Answer { status: 405, .. }) => return Ok(None),
                Err(failure) => failures.add(endpoint, failure)?,
            }
        }
        Err(failures.into_error(&self.reference))
    }

    /// The manifest or index that the reference names.
    pub async fn resolve(&self) -> Result<Served> {
        self.manifest(self.wanted()).await
    }

    /// A manifest or index by digest.
    pub async fn manifest_by_digest(&self, digest: &Digest) -> Result<Served> {
        self.manifest(Wanted::Digest(digest)).await
    }

    async fn manifest(&self, wanted: Wanted<'_>) -> Result<Served> {
        let request = Request {
            method: Method::GET,
            path: wanted.path(),
            accept: Some(ACCEPT),
            from: 0,
        };
        let mut failures = Failures::default();
        for endpoint in self.usable(wanted) {
            let served = async {
                let response = endpoint
                    .send(&self.reference, &request, &self.settings)
                    .await?;
                self.served(endpoint, wanted, response).await
            };
            match served.await {
                Ok(served) => return Ok(served),
                Err(failure) => failures.add(endpoint, failure)?,
            }
        }
        Err(failures.into_error(&self.reference))
    }

    async fn served(
        &self,
        endpoint: &Endpoint,
        wanted: Wanted<'_>,
        response: Response,
    ) -> Outcome<Served> {
        let broken = |reason: &str| {
            Failure::Broken(format!("{}: {}: {reason}", endpoint.name, wanted.path()))
        };
        let said = said_digest(response.headers());
        let media_type = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        let limit = usize::try_from(DOCUMENT_MAX).unwrap_or(usize::MAX);
        let bytes = exchange::body(response, limit, &self.settings)
            .await
            .map_err(|e| broken(&e))?;
        let digest = match wanted {
            Wanted::Digest(digest) if hash::matches(&bytes, digest) => digest.clone(),
            Wanted::Digest(_) => return Err(broken("the body has another digest")),
            Wanted::Tag(_) => match said {
                Some(digest) if hash::matches(&bytes, &digest) => digest,
                Some(_) => return Err(broken("the body is not what Docker-Content-Digest says")),
                None => hash::sha256(&bytes),
            },
        };
        Ok(Served {
            bytes,
            media_type,
            digest,
        })
    }

    fn usable(&self, wanted: Wanted<'_>) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.iter().filter(move |endpoint| match wanted {
            Wanted::Tag(_) => endpoint.host.resolve,
            Wanted::Digest(_) => endpoint.host.pull,
        })
    }

    /// Downloads a blob into the content store, verified. The first host that has it wins; a
    /// cut transfer goes on where it ended.
    pub async fn blob(&self, digest: &Digest, size: u64, content: &Content) -> Result<()> {
        let mut failures = Failures::default();
        for endpoint in self.endpoints.iter().filter(|endpoint| endpoint.host.pull) {
            match self.download(endpoint, digest, size, content).await {
                Ok(()) => return Ok(()),
                Err(failure) => failures.add(endpoint, failure)?,
            }
        }
        Err(failures.into_error(&self.reference))
    }

    async fn download(
        &self,
        endpoint: &Endpoint,
        digest: &Digest,
        size: u64,
        content: &Content,
    ) -> Outcome<()> {
        let mut writer = Writer::new(content.ingest(digest).map_err(Failure::Local)?);
        let mut failed = 0;
        loop {
            let from = writer.written;
            let request = Request {
                method: Method::GET,
                path: format!("blobs/{digest}"),
                accept: None,
                from,
            };
            let answer = tokio::select! {
                answer = endpoint.send(&self.reference, &request, &self.settings) => answer,
                error = self.cancelled() => Err(Failure::Local(error)),
            };
            let response = match answer {
                // Nothing is left to send: the last try ended with the last byte.
                Err(Failure::Answer { status: 416, .. }) if from > 0 && from == size => {
                    return writer.finish(digest, size).await;
                }
                other => other?,
            };
            if from > 0 && !continues(&response, from) {
                // The server ignores Range and sends all of it again.
                writer = writer.restart(digest).await?;
            }
            match self.receive(endpoint, response, &mut writer, size).await {
                Ok(()) => return writer.finish(digest, size).await,
                Err(Failure::Unavailable(reason)) => {
                    failed = if writer.written >= from + USEFUL {
                        0
                    } else {
                        failed + 1
                    };
                    if failed >= endpoint.attempts(&self.settings) {
                        return Err(Failure::Unavailable(reason));
                    }
                    tracing::debug!(%digest, %reason, at = writer.written, "download is resumed");
                }
                Err(other) => return Err(other),
            }
        }
    }

    /// Writes a body; ends with `Unavailable` if it ends early.
    async fn receive(
        &self,
        endpoint: &Endpoint,
        mut response: Response,
        writer: &mut Writer,
        size: u64,
    ) -> Outcome<()> {
        let late = |reason: String| Failure::Unavailable(format!("{}: {reason}", endpoint.name));
        let limit = self.settings.progress_timeout;
        let ended = loop {
            let chunk = tokio::select! {
                chunk = tokio::time::timeout(limit, response.chunk()) => chunk,
                error = self.cancelled() => break Err(Failure::Local(error)),
            };
            match chunk {
                Ok(Ok(Some(chunk))) => {
                    if writer.written + chunk.len() as u64 > size {
                        break Err(Failure::Broken(format!(
                            "{}: more than the {size} bytes of the blob",
                            endpoint.name
                        )));
                    }
                    writer.write(chunk).await?;
                }
                Ok(Ok(None)) if writer.written < size => {
                    let reason = format!("the body ended after {} of {size} bytes", writer.written);
                    break Err(late(reason));
                }
                Ok(Ok(None)) => break Ok(()),
                Ok(Err(error)) => break Err(late(exchange::chain(error))),
                Err(_) => break Err(late(format!("no progress within {limit:?}"))),
            }
        };
        writer.flush().await?;
        ended
    }
}

/// Whether the answer starts at byte `from`.
fn continues(response: &Response, from: u64) -> bool {
    let range = response
        .headers()
        .get(CONTENT_RANGE)
        .and_then(|value| value.to_str().ok());
    let start = range
        .and_then(|range| range.trim().strip_prefix("bytes "))
        .and_then(|range| range.split('-').next())
        .and_then(|start| start.trim().parse::<u64>().ok());
    response.status() == StatusCode::PARTIAL_CONTENT && start == Some(from)
}

fn said_digest(headers: &HeaderMap) -> Option<Digest> {
    headers
        .get("docker-content-digest")?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Hands batches to a blocking thread, one behind the network.
struct Writer {
    ingest: Option<Ingest>,
    busy: Option<JoinHandle<Result<Ingest>>>,
    batch: Vec<Bytes>,
    batched: usize,
    /// Bytes taken, batches under way included.
    written: u64,
}

impl Writer {
    fn new(ingest: Ingest) -> Self {
        Self {
            ingest: Some(ingest),
            busy: None,
            batch: Vec::new(),
            batched: 0,
            written: 0,
        }
    }

    async fn write(&mut self, chunk: Bytes) -> Outcome<()> {
        self.written += chunk.len() as u64;
        self.batched += chunk.len();
        self.batch.push(chunk);
        if self.batched < BATCH {
            return Ok(());
        }
        let mut ingest = self.idle().await?;
        let batch = std::mem::take(&mut self.batch);
        self.batched = 0;
        self.busy = Some(tokio::task::spawn_blocking(move || {
            for chunk in &batch {
                ingest.write(chunk)?;
            }
            Ok(ingest)
        }));
        Ok(())
    }

    /// Waits for the batch under way.
    async fn idle(&mut self) -> Outcome<Ingest> {
        let gone = || {
            Failure::Local(Error::Worker {
                what: "blob writer",
            })
        };
        if let Some(busy) = self.busy.take() {
            return busy.await.map_err(|_| gone())?.map_err(Failure::Local);
        }
        self.ingest.take().ok_or_else(gone)
    }

    async fn flush(&mut self) -> Outcome<()> {
        let mut ingest = self.idle().await?;
        let batch = std::mem::take(&mut self.batch);
        self.batched = 0;
        let written = tokio::task::spawn_blocking(move || {
            for chunk in &batch {
                ingest.write(chunk)?;
            }
            Ok(ingest)
        });
        self.busy = Some(written);
        self.ingest = Some(self.idle().await?);
        Ok(())
    }

    async fn restart(mut self, digest: &Digest) -> Outcome<Self> {
        let ingest = self.idle().await?;
        Ok(Self::new(ingest.restart(digest).map_err(Failure::Local)?))
    }

    async fn finish(mut self, digest: &Digest, size: u64) -> Outcome<()> {
        let ingest = self.idle().await?;
        let digest = digest.clone();
        let done = tokio::task::spawn_blocking(move || ingest.finish(&digest, size)).await;
        match done {
            Ok(Ok(())) => Ok(()),
            // What this host served is not the blob; another may have it.
            Ok(Err(Error::Mismatch { what, reason })) => {
                Err(Failure::Broken(format!("{what}: {reason}")))
            }
            Ok(Err(error)) => Err(Failure::Local(error)),
            Err(_) => Err(Failure::Local(Error::Worker {
                what: "blob writer",
            })),
        }
    }
}

/// What each host said; the last, the registry itself, decides the kind.
#[derive(Default)]
struct Failures {
    earlier: Vec<String>,
    last: Option<(String, Failure)>,
}

impl Failures {
    /// Keeps a failure, unless no other host could do better.
    fn add(&mut self, endpoint: &Endpoint, failure: Failure) -> Result<()> {
        if let Failure::Local(error) = failure {
            return Err(error);
        }
        if let Some((host, failure)) = self.last.take() {
            let reason = match failure {
                Failure::Unavailable(reason) | Failure::Broken(reason) => reason,
                Failure::Answer {
                    status, request, ..
                } => {
                    format!("{host} answered {status} to {request}")
                }
                Failure::Local(error) => error.to_string(),
            };
            tracing::warn!(%host, %reason, "registry host failed: trying the next");
            self.earlier.push(reason);
        }
        self.last = Some((endpoint.name.clone(), failure));
        Ok(())
    }

    fn into_error(self, reference: &Reference) -> Error {
        let reference = reference.to_string();
        let before = match self.earlier.as_slice() {
            [] => String::new(),
            earlier => format!(" (before that: {})", earlier.join("; ")),
        };
        match self.last {
            None => Error::Protocol {
                host: reference,
                reason: "no host of its hosts.toml has the capability to serve it".to_owned(),
            },
            Some((_, Failure::Unavailable(reason))) => Error::RegistryUnavailable {
                reference,
                reason: format!("{reason}{before}"),
            },
            Some((
                host,
                Failure::Answer {
                    status,
                    request,
                    detail,
                },
            )) => {
                let detail = format!("{detail}{before}");
                match status {
                    404 | 410 => Error::NotFound {
                        reference,
                        host,
                        status,
                        request,
                        detail,
                    },
                    401 | 403 => Error::Denied {
                        reference,
                        host,
                        status,
                        request,
                        detail,
                    },
                    _ => Error::Answer {
                        reference,
                        host,
                        status,
                        request,
                        detail,
                    },
                }
            }
            Some((host, Failure::Broken(reason))) => Error::Protocol {
                host,
                reason: format!("{reason}{before}"),
            },
            Some((_, Failure::Local(error))) => error,
        }
    }
}
