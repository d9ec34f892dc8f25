//! The HTTP server: grants URLs, takes each once, upgrades the connection and runs its session.
//!
//! One task a connection, from accept to its end: TLS, one request, then the session that it was
//! upgraded to. Nothing of it outlives the task, and [`Server::shutdown`] waits for all of them.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{ALLOW, CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY};
use http::header::{SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::backend::{AttachRequest, Backend, ExecRequest, PortForwardRequest, Stdio};
use crate::config::Config;
use crate::conn::{self, Conn, Transport, Upgraded};
use crate::error::{Error, Result};
use crate::lobby::{Guest, Lobby};
use crate::negotiate::{self, Encoding, Forward, Refusal, Upgrade, Version};
use crate::portforward;
use crate::remotecommand::{self, Command};
use crate::session::{End, stopped};
use crate::tls::Tls;
use crate::tokens::{Taken, Tokens};
use crate::tunnel::Tunnel;
use crate::websocket;

/// Most ports of a request; WebSocket clients have two channels for each.
const MAX_PORTS: usize = 64;

/// Largest request head.
const MAX_HEAD: usize = 16 * 1024;

/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The part of the configuration that sessions need.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub idle_timeout: Duration,
    pub drain_timeout: Duration,
    pub creation_timeout: Duration,
    request_timeout: Duration,
}

/// What a token stands for.
enum Grant {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward(PortForwardRequest),
}

impl Grant {
    /// The first element of its URL's path.
    fn path(&self) -> &'static str {
        match self {
            Grant::Exec(_) => "exec",
            Grant::Attach(_) => "attach",
            Grant::PortForward(_) => "portforward",
        }
    }
}

/// The streaming server, running. Dropping it closes every connection.
pub struct Server {
    address: SocketAddr,
    base: String,
    tokens: Arc<Tokens<Grant>>,
    stop: watch::Sender<bool>,
    /// `None` once it was shut down.
    accepting: Mutex<Option<JoinHandle<()>>>,
}

/// What connections share.
struct Shared {
    tokens: Arc<Tokens<Grant>>,
    backend: Arc<dyn Backend>,
    limits: Limits,
    tls: Option<Tls>,
    /// One for each session.
    slots: Arc<Semaphore>,
    stop: watch::Receiver<bool>,
}

impl Server {
    /// Listens and serves. Needs a tokio runtime with I/O and time.
    pub async fn bind(config: Config, backend: Arc<dyn Backend>) -> Result<Self> {
        let failed = |error| Error::io(format!("listening on {}", config.address), error);
        let listener = TcpListener::bind(config.address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let host = advertised(address);
        let tls = config
            .tls
            .map(|certificate| Tls::new(certificate, vec![host.ip().to_string()]));
        let tls = tls.transpose()?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let tokens = Arc::new(Tokens::new(config.token_lifetime, config.max_waiting));
        let (stop, stopping) = watch::channel(false);
        let shared = Arc::new(Shared {
            tokens: tokens.clone(),
            backend,
            limits: Limits {
                idle_timeout: config.idle_timeout,
                drain_timeout: config.drain_timeout,
                creation_timeout: config.creation_timeout,
                request_timeout: config.request_timeout,
            },
            tls,
            slots: Arc::new(Semaphore::new(config.max_sessions)),
            stop: stopping,
        });
        let lobby = Lobby::new(config.max_strangers);
        Ok(Self {
            address,
            base: format!("{scheme}://{host}"),
            tokens,
            stop,
            accepting: Mutex::new(Some(tokio::spawn(accept(listener, lobby, shared)))),
        })
    }

    /// Where it listens, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL at which a client may run a command, once.
    pub fn exec(&self, request: ExecRequest) -> Result<String> {
        check(request.stdio)?;
        if request.command.is_empty() {
            return Err(invalid("cmd", "nothing to run"));
        }
        self.grant(Grant::Exec(request))
    }

    /// The URL at which a client may attach, once.
    pub fn attach(&self, request: AttachRequest) -> Result<String> {
        check(request.stdio)?;
        self.grant(Grant::Attach(request))
    }

    /// The URL at which a client may reach a pod's ports, once.
    pub fn port_forward(&self, request: PortForwardRequest) -> Result<String> {
        if request.ports.contains(&0) {
            return Err(invalid("port", "0 is not a port"));
        }
        if request.ports.len() > MAX_PORTS {
            return Err(Error::TooMany {
                what: "ports",
                limit: MAX_PORTS,
            });
        }
        self.grant(Grant::PortForward(request))
    }

    fn grant(&self, grant: Grant) -> Result<String> {
        let path = grant.path();
        let token = self.tokens.insert(grant, Instant::now())?;
        Ok(format!("{}/{path}/{token}", self.base))
    }

    /// Closes every connection, tells backends that their clients are gone, and waits up to `limit`
    /// for what they do about it. What is left then goes on for as long as the process does: dropped
    /// before, a backend's session is one that was given up, which is another end than ours.
    pub async fn shutdown(&self, limit: Duration) {
        self.stop.send_replace(true);
        let Some(mut accepting) = self.take_accepting() else {
            return;
        };
        if timeout(limit, &mut accepting).await.is_err() {
            tracing::warn!("streaming sessions were cut off");
        }
    }

    fn take_accepting(&self) -> Option<JoinHandle<()>> {
        let mut accepting = self
            .accepting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        accepting.take()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(accepting) = self.take_accepting() {
            accepting.abort();
        }
    }
}

/// What clients are told to connect to: an address that means every interface is none that the
/// kubelet can dial.
fn advertised(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        ip if ip.is_unspecified() => (IpAddr::from(Ipv4Addr::LOCALHOST), address.port()).into(),
        _ => address,
    }
}

fn invalid(field: &'static str, reason: &'static str) -> Error {
    Error::Invalid { field, reason }
}

fn check(stdio: Stdio) -> Result<()> {
    if stdio.tty && stdio.stderr {
        return Err(invalid("stderr", "comes with stdout when there is a tty"));
    }
    if !(stdio.stdin || stdio.stdout || stdio.stderr) {
        return Err(invalid("stdin, stdout, stderr", "one of them must be true"));
    }
    Ok(())
}

/// Accepts until the server stops, and then until every connection has ended.
async fn accept(listener: TcpListener, lobby: Arc<Lobby>, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    let mut stop = shared.stop.clone();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((tcp, _)) => {
                    connections.spawn(connection(tcp, shared.clone(), lobby.enter()));
                }
                Err(error) => {
                    tracing::warn!(%error, "streaming: accept failed");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a streaming session ended badly");
                }
            }
            () = stopped(&mut stop) => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// What a request was upgraded to.
enum Plan {
    SpdyCommand(Command, Version),
    WebSocketCommand(Command, (Version, Encoding)),
    SpdyForward(PortForwardRequest),
    WebSocketForward(PortForwardRequest, Forward),
}

/// One connection, from accept to end.
async fn connection(tcp: TcpStream, shared: Arc<Shared>, guest: Guest) {
    let admitted = tokio::select! {
        // Who has used up its token in this moment cannot come again.
        biased;
        admitted = admit(tcp, &shared, &guest) => admitted,
        () = guest.pushed_out() => {
            return tracing::warn!("too many streaming connections without a token: the oldest is closed");
        }
    };
    drop(guest);
    let Some(Admitted {
        plan,
        upgrade,
        _slot,
    }) = admitted
    else {
        return;
    };
    let upgraded = match upgrade.await {
        Ok(upgraded) => upgraded,
        Err(error) => return tracing::debug!(%error, "streaming: upgrade"),
    };
    match upgraded.downcast::<TokioIo<Conn>>() {
        Ok(parts) => {
            let io = Upgraded::new(parts.io.into_inner(), parts.read_buf);
            match run(io, plan, &shared).await {
                End::Broken(reason) => {
                    tracing::info!(reason, "a streaming client broke the protocol")
                }
                end => tracing::debug!(?end, "streaming session ended"),
            }
        }
        // hyper gives back what it was given.
        Err(_) => tracing::error!("streaming: a connection was lost in its upgrade"),
    }
}

/// A client that has shown its token.
struct Admitted {
    plan: Plan,
    upgrade: OnUpgrade,
    _slot: OwnedSemaphorePermit,
}

/// All that comes before a session. `None` when the connection ends with that.
async fn admit(tcp: TcpStream, shared: &Shared, guest: &Guest) -> Option<Admitted> {
    if let Err(error) = conn::prepare(&tcp) {
        tracing::debug!(%error, "streaming: a connection that was over at once");
        return None;
    }
    let limit = shared.limits.request_timeout;
    let mut stop = shared.stop.clone();
    let conn = match &shared.tls {
        None => Conn::Plain(tcp),
        Some(tls) => match tokio::select! {
            accepted = timeout(limit, tls.acceptor().accept(tcp)) => accepted,
            () = stopped(&mut stop) => return None,
        } {
            Ok(Ok(tls)) => Conn::Tls(Box::new(tls)),
            Ok(Err(error)) => {
                tracing::debug!(%error, "streaming: TLS handshake");
                return None;
            }
            Err(_) => {
                tracing::debug!("streaming: TLS handshake took too long");
                return None;
            }
        },
    };
    request(conn, shared, guest).await
}

/// Reads and answers one request. `None` when the connection ends with that.
async fn request(conn: Conn, shared: &Shared, guest: &Guest) -> Option<Admitted> {
    let accepted = Mutex::new(None);
    let service = service_fn(|request: Request<Incoming>| {
        let response = match answer(request, shared, guest) {
            Ok((admitted, response)) => {
                *accepted.lock().unwrap_or_else(PoisonError::into_inner) = Some(admitted);
                response
            }
            Err(response) => *response,
        };
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let mut stop = shared.stop.clone();
    let mut http = http1::Builder::new();
    http.max_buf_size(MAX_HEAD)
        .timer(TokioTimer::new())
        .header_read_timeout(shared.limits.request_timeout);
    let served = async {
        let served = http
            .serve_connection(TokioIo::new(conn), service)
            .with_upgrades();
        // Longer than for its head alone: a client may also be slow to take the answer.
        match timeout(shared.limits.request_timeout * 2, served).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "streaming: a request that failed"),
            Err(_) => tracing::debug!("streaming: a request that took too long"),
        }
    };
    tokio::select! {
        () = served => {}
        () = stopped(&mut stop) => return None,
    }
    accepted
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
}

type Answer = Response<Full<Bytes>>;

/// An answer after which the connection is closed. An upgrade must not say so: Go's HTTP client
/// takes `Connection: Upgrade, close` for no upgrade, which is why keep-alive is not switched off.
fn refuse(status: StatusCode, text: impl Into<Bytes>) -> Box<Answer> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("close"));
    Box::new(response)
}

/// Decides about a request. The token is used up by whoever presents it, whatever is wrong with the
/// rest of the request; only where there is no room for a session it stays good.
fn answer(
    mut request: Request<Incoming>,
    shared: &Shared,
    guest: &Guest,
) -> std::result::Result<(Admitted, Answer), Box<Answer>> {
    let not_found = || refuse(StatusCode::NOT_FOUND, "not found\n");
    let path = request.uri().path().strip_prefix('/').unwrap_or_default();
    let (kind, token) = path.split_once('/').ok_or_else(not_found)?;
    if request.method() != Method::GET && request.method() != Method::POST {
        let mut refusal = refuse(StatusCode::METHOD_NOT_ALLOWED, "GET or POST\n");
        refusal
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, POST"));
        return Err(refusal);
    }
    let slot = || shared.slots.clone().try_acquire_owned().ok();
    let (grant, slot) = match shared.tokens.take(token, Instant::now(), slot) {
        Taken::Grant(grant, slot) if grant.path() == kind => (grant, slot),
        Taken::Grant(..) | Taken::Unknown => return Err(not_found()),
        Taken::NoPlace => {
            tracing::warn!("too many streaming sessions");
            let text = "too many streaming sessions\n";
            return Err(refuse(StatusCode::SERVICE_UNAVAILABLE, text));
        }
    };
    guest.known();
    let (plan, response) = plan(grant, &request).map_err(refusal)?;
    let admitted = Admitted {
        plan,
        upgrade: hyper::upgrade::on(&mut request),
        _slot: slot,
    };
    Ok((admitted, response))
}

fn refusal(refusal: Refusal) -> Box<Answer> {
    match refusal {
        Refusal::Bad(reason) => refuse(StatusCode::BAD_REQUEST, format!("{reason}\n")),
        Refusal::Unknown { asked, accepted } => {
            let text = format!("none of {asked:?} is among {accepted:?}\n");
            let mut response = refuse(StatusCode::FORBIDDEN, text);
            for name in accepted {
                let headers = response.headers_mut();
                headers.append(negotiate::ACCEPTED_VERSIONS, HeaderValue::from_static(name));
            }
            response
        }
    }
}

/// What the connection becomes, and the answer that says so.
fn plan(grant: Grant, request: &Request<Incoming>) -> std::result::Result<(Plan, Answer), Refusal> {
    let headers = request.headers();
    let command = match grant {
        Grant::Exec(request) => Command::Exec(request),
        Grant::Attach(request) => Command::Attach(request),
        Grant::PortForward(forward) => {
            return match negotiate::upgrade(headers)? {
                Upgrade::Spdy => {
                    let (name, ()) = negotiate::spdy(headers, negotiate::PORT_FORWARD_SPDY)?;
                    Ok((Plan::SpdyForward(forward), spdy_answer(name)))
                }
                Upgrade::WebSocket => {
                    let table = negotiate::PORT_FORWARD_WEBSOCKET;
                    let (name, form) = negotiate::websocket(headers, table)?;
                    if matches!(form, Forward::Channels(_)) && forward.ports.is_empty() {
                        return Err(Refusal::Bad("no ports were asked for over CRI"));
                    }
                    if form == Forward::Channels(Encoding::Base64)
                        && forward.ports.len() * 2 > websocket::BASE64_CHANNELS
                    {
                        return Err(Refusal::Bad(
                            "base64 has channels for 40 ports, and more were asked for over CRI",
                        ));
                    }
                    let answer = websocket_answer(request, name)?;
                    Ok((Plan::WebSocketForward(forward, form), answer))
                }
            };
        }
    };
    match negotiate::upgrade(headers)? {
        Upgrade::Spdy => {
            let (name, version) = negotiate::spdy(headers, negotiate::REMOTE_COMMAND_SPDY)?;
            Ok((Plan::SpdyCommand(command, version), spdy_answer(name)))
        }
        Upgrade::WebSocket => {
            let table = negotiate::REMOTE_COMMAND_WEBSOCKET;
            let (name, protocol) = negotiate::websocket(headers, table)?;
            let answer = websocket_answer(request, name)?;
            Ok((Plan::WebSocketCommand(command, protocol), answer))
        }
    }
}

fn switching(to: &'static str) -> Answer {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(to));
    response
}

fn spdy_answer(protocol: &'static str) -> Answer {
    let mut response = switching("SPDY/3.1");
    let name = HeaderValue::from_static(protocol);
    response
        .headers_mut()
        .insert(negotiate::PROTOCOL_VERSION, name);
    response
}

/// The handshake of RFC 6455, 4.2.
fn websocket_answer(
    request: &Request<Incoming>,
    protocol: &'static str,
) -> std::result::Result<Answer, Refusal> {
    let headers = request.headers();
    if request.method() != Method::GET {
        return Err(Refusal::Bad("WebSocket is asked for by GET"));
    }
    if headers
        .get(SEC_WEBSOCKET_VERSION)
        .is_none_or(|version| version != "13")
    {
        return Err(Refusal::Bad("the version of WebSocket is 13"));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY);
    let key = key.ok_or(Refusal::Bad("the header Sec-WebSocket-Key is missing"))?;
    let accept = derive_accept_key(key.as_bytes());
    let accept = HeaderValue::try_from(accept)
        .map_err(|_| Refusal::Bad("the header Sec-WebSocket-Key is not one"))?;
    let mut response = switching("websocket");
    let headers = response.headers_mut();
    headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    if !protocol.is_empty() {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
    Ok(response)
}

/// Runs what the connection became.
async fn run<T: Transport>(io: T, plan: Plan, shared: &Shared) -> End {
    let (limits, stop) = (&shared.limits, shared.stop.clone());
    let backend = &shared.backend;
    match plan {
        Plan::SpdyCommand(command, version) => {
            remotecommand::spdy(io, version, command, &**backend, limits, stop).await
        }
        Plan::WebSocketCommand(command, protocol) => {
            remotecommand::websocket(io, protocol, command, &**backend, limits, stop).await
        }
        Plan::SpdyForward(request) => {
            portforward::spdy(io, request.pod, backend.clone(), limits, stop).await
        }
        Plan::WebSocketForward(request, Forward::Tunnel) => {
            let tunnel = Tunnel::new(websocket::wrap(io).await);
            portforward::spdy(tunnel, request.pod, backend.clone(), limits, stop).await
        }
        Plan::WebSocketForward(request, Forward::Channels(encoding)) => {
            portforward::websocket(io, encoding, request, backend.clone(), limits, stop).await
        }
    }
}
