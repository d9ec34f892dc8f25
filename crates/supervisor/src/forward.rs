//! PortForward: connections from the node to the loopback of a pod's network.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use gantry_types::ErrorKind;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use crate::pod::blocking;
use crate::registry::PodView;
use crate::{Context, Error};

const STEP: &str = "port forward";

/// Connections into pods that may be open at a time, on the whole node.
pub(crate) const MAX_FORWARDS: usize = 4096;

/// How long one address may take to answer. It is the same machine.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A connection into a pod.
#[derive(Debug)]
pub struct Forward {
    pub stream: TcpStream,
    /// The connection counts for as long as this lives.
    pub permit: OwnedSemaphorePermit,
}

/// Connects to `port` on 127.0.0.1, and if nobody listens there on ::1.
pub(crate) async fn connect(ctx: &Context, pod: &PodView, port: u16) -> Result<Forward, Error> {
    let permit = Arc::clone(&ctx.forwards);
    let permit = permit.try_acquire_owned().map_err(|_| Error::Failed {
        step: STEP,
        kind: ErrorKind::ResourceExhausted,
        message: format!("{MAX_FORWARDS} connections into pods are open"),
    })?;
    let netns = match pod.facts.record.netns_path.as_str() {
        "" => None,
        path => Some(PathBuf::from(path)),
    };
    let mut failures = Vec::new();
    for address in [
        SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
    ] {
        let socket = open(netns.clone(), address.is_ipv6());
        let connected = async { socket.await?.connect(address).await };
        match timeout(CONNECT_LIMIT, connected).await {
            Ok(Ok(stream)) => {
                // Small writes of a client must not wait for the answer to the last one.
                stream
                    .set_nodelay(true)
                    .map_err(|error| Error::internal("forward to the pod", error))?;
                return Ok(Forward { stream, permit });
            }
            Ok(Err(error)) => failures.push(format!("{address}: {error}")),
            Err(_) => failures.push(format!("{address}: no answer within {CONNECT_LIMIT:?}")),
        }
    }
    Err(Error::Failed {
        step: STEP,
        kind: ErrorKind::Unavailable,
        message: failures.join("; "),
    })
}

/// A socket that belongs to a network namespace, whoever connects it later.
async fn open(netns: Option<PathBuf>, v6: bool) -> std::io::Result<TcpSocket> {
    let family = match v6 {
        true => AddressFamily::Inet6,
        false => AddressFamily::Inet,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let make = move || socket(family, SockType::Stream, flags, None);
    let made = blocking(move || {
        Ok(match netns {
            None => make().map_err(std::io::Error::from),
            Some(path) => gantry_sys::namespace::in_netns(&path, make).and_then(|made| Ok(made?)),
        })
    });
    let socket: OwnedFd = made.await.map_err(std::io::Error::other)??;
    Ok(TcpSocket::from_std_stream(socket.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_of_the_hosts_own_network_connects_to_both_loopbacks() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(address) else {
                println!("SKIP {address}: the machine has no such loopback");
                continue;
            };
            let address = listener.local_addr().unwrap();
            let socket = open(None, address.is_ipv6()).await.unwrap();
            socket.connect(address).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_namespace_that_is_not_there_is_an_error() {
        let error = open(Some("/nonexistent".into()), false).await.unwrap_err();
        assert!(error.to_string().contains("No such file"), "{error}");
    }
}
