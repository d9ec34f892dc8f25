//! The client side of the OCI distribution specification.

mod challenge;
mod download;
mod exchange;
mod failures;
pub mod hosts;
mod session;
mod tls;

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use crate::Result;
use crate::budget::Budget;
use crate::cancel::Cancel;
use crate::credentials::Credentials;
use crate::keychain::Keychain;
use crate::reference::Reference;

pub use download::Followed;
pub use session::{Served, Session};

/// How registries are talked to.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Directory of `<host>/hosts.toml` directories.
    pub certs_d: Option<PathBuf>,
    /// For hosts that ask for credentials when the request brings none.
    pub keychain: Keychain,
    /// Time to connect, TLS included; a host's `dial_timeout` goes before it.
    pub dial_timeout: Duration,
    /// Time from a request to the headers of its answer.
    pub header_timeout: Duration,
    /// Time in which at least one byte of a body must come.
    pub progress_timeout: Duration,
    /// Tries of one request to the registry if it answers 408, 429, 5xx or not at all. Mirrors get
    /// one: there is another host behind them.
    pub attempts: u32,
    /// Wait before the second try; doubled for each further one. `Retry-After` goes before it.
    pub retry_wait: Duration,
    /// Longest wait that `Retry-After` may ask for.
    pub retry_wait_max: Duration,
    /// Transfers of one blob at once, where it is big and the host honours ranges.
    pub ranges: usize,
    /// Bytes that one of them asks for at a time; a blob of less than two such is not divided.
    pub range_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            certs_d: None,
            keychain: Keychain::default(),
            dial_timeout: Duration::from_secs(30),
            header_timeout: Duration::from_secs(60),
            progress_timeout: Duration::from_secs(60),
            attempts: 4,
            retry_wait: Duration::from_millis(250),
            retry_wait_max: Duration::from_secs(60),
            ranges: 4,
            range_bytes: 32 << 20,
        }
    }
}

/// Makes sessions; keeps the connections of hosts without a configuration of their own.
pub struct Client {
    settings: Settings,
    /// Made for the first pull: the system's certificates take memory that an idle node need not
    /// spend.
    shared: OnceLock<Shared>,
}

#[derive(Clone)]
struct Shared {
    /// With the system's trust and proxy.
    plain: reqwest::Client,
    /// For loopback hosts, which no proxy can reach.
    loopback: reqwest::Client,
}

impl Client {
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            shared: OnceLock::new(),
        }
    }

    fn shared(&self) -> Result<Shared> {
        if let Some(shared) = self.shared.get() {
            return Ok(shared.clone());
        }
        let config = tls::config(&hosts::Tls::default())?;
        let dial = self.settings.dial_timeout;
        let made = Shared {
            plain: tls::client(config.clone(), dial, true)?,
            loopback: tls::client(config, dial, false)?,
        };
        Ok(self.shared.get_or_init(|| made).clone())
    }

    /// What one pull needs: the hosts of the reference as configured now, and the credentials.
    /// Reads files: blocks.
    pub fn session(
        &self,
        reference: &Reference,
        credentials: &Credentials,
        budget: &Budget,
        cancel: &Cancel,
    ) -> Result<Session> {
        let hosts = hosts::hosts(self.settings.certs_d.as_deref(), reference.host())?;
        let mut endpoints = Vec::with_capacity(hosts.len());
        for host in hosts {
            let name = hosts::url_host(&host.base);
            let local = hosts::is_loopback(&name);
            let clients = if host.tls != hosts::Tls::default() || host.dial_timeout.is_some() {
                let dial = host.dial_timeout.unwrap_or(self.settings.dial_timeout);
                let client = tls::client(tls::config(&host.tls)?, dial, !local)?;
                if host.tls.client.is_empty() {
                    [client.clone(), client]
                } else {
                    let nobody = hosts::Tls {
                        client: Vec::new(),
                        ..host.tls.clone()
                    };
                    [client, tls::client(tls::config(&nobody)?, dial, !local)?]
                }
            } else if local {
                let client = self.shared()?.loopback;
                [client.clone(), client]
            } else {
                let client = self.shared()?.plain;
                [client.clone(), client]
            };
            // The configured server is the registry, whatever it is called; a mirror is not.
            let own = credentials.are_for(&name, reference.host())
                || host.is_server && credentials.are_for(reference.host(), reference.host());
            let credentials = (own && !credentials.is_empty()).then(|| credentials.clone());
            let keychain = self.settings.keychain.clone();
            let endpoint = exchange::Endpoint::new(host, name, clients, credentials, keychain);
            endpoints.push(endpoint);
        }
        Ok(Session::new(
            reference.clone(),
            endpoints,
            self.settings.clone(),
            budget.clone(),
            cancel.clone(),
        ))
    }
}
