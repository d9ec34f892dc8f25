//! All that one pull asks of a registry and its mirrors.

use gantry_types::Digest;
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{Method, Response};

use super::Settings;
use super::exchange::{self, Endpoint, Failure, Outcome, Request};
use super::failures::Failures;
use crate::Result;
use crate::budget::Budget;
use crate::cancel::Cancel;
use crate::document::{ACCEPT, DOCUMENT_MAX};
use crate::hash;
use crate::progress::Progress;
use crate::reference::Reference;

pub struct Session {
    pub(super) reference: Reference,
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) settings: Settings,
    pub(super) budget: Budget,
    /// The pull has failed or is not wanted any more: downloads end.
    pub cancel: Cancel,
    /// Of the pull that this is for.
    pub progress: Progress,
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
    pub fn new(
        reference: Reference,
        endpoints: Vec<Endpoint>,
        settings: Settings,
        budget: Budget,
        cancel: Cancel,
    ) -> Self {
        Self {
            reference,
            endpoints,
            settings,
            budget,
            cancel,
            progress: Progress::default(),
        }
    }

    /// The registry, as the reference names it.
    pub fn registry(&self) -> &str {
        self.reference.host()
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
        tokio::select! {
            said = self.ask_head() => said,
            error = self.cancel.cancelled() => Err(error),
        }
    }

    async fn ask_head(&self) -> Result<Option<Digest>> {
        let wanted = self.wanted();
        let request = Request {
            method: Method::HEAD,
            path: wanted.path(),
            accept: Some(ACCEPT),
            range: None,
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
        tokio::select! {
            served = self.ask_manifest(wanted) => served,
            error = self.cancel.cancelled() => Err(error),
        }
    }

    async fn ask_manifest(&self, wanted: Wanted<'_>) -> Result<Served> {
        let request = Request {
            method: Method::GET,
            path: wanted.path(),
            accept: Some(ACCEPT),
            range: None,
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
