//! The HTTP endpoint. It answers GET /metrics and nothing else, and bounds what a client can take:
//! connections, the size of a head, and the time that either side may have. A client beyond the
//! bound takes the place of the one that has had its own for longest, so that a few that never end
//! their request keep nobody out.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::AbortHandle;

use super::Metrics;
use crate::config::MetricsAddress;
use crate::socket;

/// Connections at a time: a scraper has one.
const CONNECTIONS: usize = 16;

/// From accept to the last byte. A scrape takes milliseconds.
const LIMIT: Duration = Duration::from_secs(10);

/// For the head of a request.
const HEAD_LIMIT: Duration = Duration::from_secs(5);

/// hyper's least; the head of a scrape has a few hundred bytes.
const HEAD_BYTES: usize = 8192;

/// Between attempts to listen where another listens, and to accept when descriptors have run out.
const PAUSE: Duration = Duration::from_secs(5);

const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

enum Listener {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        _path: Removed,
    },
}

/// A socket's path, removed in the end: of one that we listen on, never of another's.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "socket not removed");
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    async fn bind(address: &MetricsAddress) -> std::io::Result<Self> {
        match address {
            MetricsAddress::Tcp(address) => TcpListener::bind(address).await.map(Self::Tcp),
            MetricsAddress::Unix(path) => {
                let listener = socket::listen(path).await?;
                let _path = Removed(path.clone());
                Ok(Self::Unix { listener, _path })
            }
        }
    }

    async fn accept(&self) -> std::io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, _): (_, SocketAddr) = listener.accept().await?;
                Box::new(stream)
            }
            Self::Unix { listener, .. } => Box::new(listener.accept().await?.0),
        })
    }
}

/// Serves until it is aborted, which removes its socket. An address that cannot be had is no reason not to supervise: it is tried again.
pub async fn serve(address: MetricsAddress, metrics: Arc<Metrics>) {
    let mut told = false;
    let listener = loop {
        match Listener::bind(&address).await {
            Ok(listener) => break listener,
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(?address, %error, "metrics are not served yet");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    };
    tracing::info!(?address, "metrics");
    let mut connections = VecDeque::<AbortHandle>::new();
    loop {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "metrics: accept");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        connections.retain(|connection| !connection.is_finished());
        if connections.len() >= CONNECTIONS
            && let Some(oldest) = connections.pop_front()
        {
            oldest.abort();
        }
        let connection = tokio::spawn(connection(stream, Arc::clone(&metrics)));
        connections.push_back(connection.abort_handle());
    }
}

async fn connection(stream: Box<dyn Stream>, metrics: Arc<Metrics>) {
    let service = service_fn(move |request| {
        let metrics = Arc::clone(&metrics);
        async move { Ok::<_, Infallible>(answer(&request, &metrics)) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(HEAD_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(LIMIT, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "metrics: connection"),
        Err(_) => tracing::debug!("metrics: a client took too long"),
    }
}

fn answer(request: &Request<Incoming>, metrics: &Metrics) -> Response<Full<Bytes>> {
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    if request.method() != Method::GET {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        let headers = response.headers_mut();
        headers.insert(header::ALLOW, header::HeaderValue::from_static("GET"));
        return response;
    }
    match metrics.text() {
        Ok(text) => {
            let mut response = Response::new(Full::from(text));
            let value = header::HeaderValue::from_static(TYPE);
            response.headers_mut().insert(header::CONTENT_TYPE, value);
            response
        }
        Err(error) => {
            tracing::error!(%error, "metrics cannot be written");
            plain(StatusCode::INTERNAL_SERVER_ERROR, "see gantryd's log\n")
        }
    }
}

fn plain(code: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = code;
    response
}
