//! How the server listens and what it bounds.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::tls::Certificate;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where to listen; port 0 takes any that is free.
    pub address: SocketAddr,
    /// TLS and what to present; without it the server speaks plain HTTP.
    pub tls: Option<Certificate>,
    /// A connection on which nothing moves for so long is closed.
    pub idle_timeout: Duration,
    /// Time that a client may take nothing of what waits for it after its command, its container or
    /// its connection into the pod has ended.
    pub drain_timeout: Duration,
    /// Time that a client has, after the upgrade, to open the streams it asked for.
    pub creation_timeout: Duration,
    /// Time that a client has for its TLS handshake, and again for its request.
    pub request_timeout: Duration,
    /// Time that a client has to come for what it was granted.
    pub token_lifetime: Duration,
    /// Requests that may wait for their client.
    pub max_waiting: usize,
    /// Sessions that may be open.
    pub max_sessions: usize,
    /// Connections that may be open beside them, of clients that did not show a token yet. One more
    /// pushes out the one that has been there longest.
    pub max_strangers: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            tls: None,
            idle_timeout: Duration::from_secs(4 * 60 * 60),
            drain_timeout: Duration::from_secs(10 * 60),
            creation_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(10),
            token_lifetime: Duration::from_secs(60),
            max_waiting: 1000,
            max_sessions: 1000,
            max_strangers: 256,
        }
    }
}
