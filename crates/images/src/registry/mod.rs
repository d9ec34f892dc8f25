//! The client side of the OCI distribution specification.

mod challenge;
mod exchange;
pub mod hosts;
mod session;
mod tls;

use std::path::PathBuf;
use std::time::Duration;

use crate::Result;
use crate::credentials::Credentials;
use crate::reference::Reference;

pub use session::{Served, Session};

/// How registries are talked to.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Directory of `<host>/hosts.toml` directories.
    pub certs_d: Option<PathBuf>,
    /// Time to connect, TLS included; a host's `dial_timeout` goes before it.
    pub dial_timeout: Duration,
    /// Time from a request to the headers of its answer.
    pub header_timeout: Duration,
    /// Time in which at least one byte of a body must come.
    pub progress_timeout: Duration,
    /// Tries of one request to one host that answers 408, 429, 5xx or not at all.
    pub attempts: u32,
    /// Wait before the second try; doubled for each further one. `Retry-After` goes before it.
    pub retry_wait: Duration,
    /// Longest wait that `Retry-After` may ask for.
    pub retry_wait_max: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            certs_d: None,
            dial_timeout: Duration::from_secs(30),
            header_timeout: Duration::from_secs(60),
            progress_timeout: Duration::from_secs(60),
            attempts: 4,
            retry_wait: Duration::from_millis(250),
            retry_wait_max: Duration::from_secs(60),
        }
    }
}

/// Makes sessions; keeps the connections of hosts without a configuration of their own.
pub struct Client {
    settings: Settings,
    /// With the system's trust and proxy.
    plain: reqwest::Client,
    /// For loopback hosts, which no proxy can reach.
    loopback: reqwest::Client,
}

impl Client {
    pub fn new(settings: Settings) -> Result<Self> {
        let none = hosts::Tls::default();
        Ok(Self {
            plain: tls::client(&none, settings.dial_timeout, true)?,
            loopback: tls::client(&none, settings.dial_timeout, false)?,
            settings,
        })
    }

    /// What one pull needs: the hosts of the reference as configured now, and the credentials.
    /// Reads files: blocks for a moment.
    pub fn session(&self, reference: &Reference, credentials: &Credentials) -> Result<Session> {
        let hosts = hosts::hosts(self.settings.certs_d.as_deref(), reference.host())?;
        let mut endpoints = Vec::with_capacity(hosts.len());
        for host in hosts {
            let name = hosts::url_host(&host.base);
            let local = hosts::is_loopback(&name);
            let client = if host.tls != hosts::Tls::default() || host.dial_timeout.is_some() {
                let dial = host.dial_timeout.unwrap_or(self.settings.dial_timeout);
                tls::client(&host.tls, dial, !local)?
            } else if local {
                self.loopback.clone()
            } else {
                self.plain.clone()
            };
            let own = !credentials.is_empty() && credentials.are_for(&name, reference.host());
            let credentials = own.then(|| credentials.clone());
            endpoints.push(exchange::Endpoint::new(host, name, client, credentials));
        }
        Ok(Session::new(
            reference.clone(),
            endpoints,
            self.settings.clone(),
        ))
    }
}
