//! What the hosts of one request said, and the error that it makes.

use super::exchange::{Endpoint, Failure};
use crate::reference::Reference;
use crate::{Error, Result};

/// What each host said; the last, the registry itself, decides the kind.
#[derive(Default)]
pub struct Failures {
    earlier: Vec<String>,
    last: Option<(String, Failure)>,
}

impl Failures {
    /// Keeps a failure, unless no other host could do better.
    pub fn add(&mut self, endpoint: &Endpoint, failure: Failure) -> Result<()> {
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

    pub fn into_error(self, reference: &Reference) -> Error {
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
            // The reason names the host.
            Some((_, Failure::Broken(reason))) => Error::Protocol {
                host: reference,
                reason: format!("{reason}{before}"),
            },
            Some((_, Failure::Local(error))) => error,
        }
    }
}
