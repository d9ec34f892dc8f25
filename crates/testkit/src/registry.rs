//! A read-only registry on the loopback that can misbehave.
//!
//! ```text
//! let registry = Registry::start().await?;
//! registry.add("library/app", "v1", &image);
//! registry.behave(|b| b.cut_after = Some((1000, 1)));
//! pull(&format!("{}/library/app:v1", registry.host())).await?;
//! assert_eq!(registry.count("GET", "/blobs/"), 2);
//! ```

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::Stream;
use gantry_types::Digest;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::image::{Blob, Image};

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, io::Error>;

/// How clients must prove who they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    #[default]
    None,
    Basic {
        user: String,
        password: String,
    },
    /// Tokens from `/token` of this registry. `user` empty: anybody gets one. `refresh` is the
    /// OAuth2 refresh token that also gets one.
    Bearer {
        user: String,
        password: String,
        refresh: String,
    },
}

/// What goes wrong. Counters go down as they are used.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// Before every answer.
    pub latency: Duration,
    pub auth: Auth,
    /// Realm to name in the challenge instead of this registry's own `/token`.
    pub realm: Option<String>,
    /// This many requests for manifests and blobs are answered with a status, and `Retry-After`.
    pub fail: Option<(u16, u32, Option<u64>)>,
    /// Blob bodies are cut after so many bytes, this many times.
    pub cut_after: Option<(usize, u32)>,
    /// Blob bodies stop after so many bytes but stay open, this many times.
    pub stall_after: Option<(usize, u32)>,
    /// Blob bodies of more than so many bytes and 2000 stop after so many but stay open.
    pub stall_layers: Option<usize>,
    /// Every blob has one byte changed.
    pub wrong_bytes: bool,
    /// `Docker-Content-Digest` of manifests names something else.
    pub wrong_digest_header: bool,
    /// A request for a range is answered with all of it.
    pub ignore_range: bool,
    /// So are requests for a range after the first so many.
    pub ranges_honoured: Option<u32>,
    /// Content-Range says this instead of what comes.
    pub content_range: Option<String>,
    /// Blob answers say so many bytes more than they have (or fewer).
    pub wrong_length: i64,
    /// Blob bodies come in pieces of so many bytes with a pause between them.
    pub trickle: Option<(usize, Duration)>,
    /// Requests for blobs are sent to this base URL; the path is kept.
    pub redirect: Option<String>,
    /// Body of `/token` instead of a token.
    pub token_body: Option<Bytes>,
}

/// A request that came in.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub query: String,
    pub authorization: Option<String>,
    pub range: Option<String>,
    /// All headers but the above, by lower-case name.
    pub headers: HashMap<String, String>,
    /// Body of a POST.
    pub body: String,
    /// The client said by certificate who it is.
    pub client_certificate: bool,
}

#[derive(Default)]
struct State {
    /// By repository and reference (tag or digest).
    manifests: HashMap<(String, String), Blob>,
    blobs: HashMap<(String, String), Bytes>,
    behaviour: Behaviour,
    seen: Vec<Seen>,
    /// Tokens given out so far; only the last one is good.
    tokens: u64,
}

/// A certificate with its key, PEM, for a client to say who it is.
pub fn client_identity() -> io::Result<String> {
    let names = vec!["node".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).map_err(io::Error::other)?;
    Ok(made.cert.pem() + &made.signing_key.serialize_pem())
}

/// Asks every client for a certificate, takes any, and does without.
#[derive(Debug)]
struct AnyClient(Arc<rustls::crypto::CryptoProvider>);

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The server; it stops when this is dropped.
pub struct Registry {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    server: JoinHandle<()>,
    ca: Option<String>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Registry {
    /// Serves plain HTTP on a free port of 127.0.0.1.
    pub async fn start() -> io::Result<Self> {
        Self::serve(None).await
    }

    /// Serves HTTPS with a certificate for `localhost` and 127.0.0.1; see [`Registry::ca`].
    pub async fn start_tls() -> io::Result<Self> {
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).map_err(io::Error::other)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .and_then(|builder| {
                builder
                    .with_client_cert_verifier(Arc::new(AnyClient(provider)))
                    .with_single_cert(vec![made.cert.der().clone()], key)
            })
            .map_err(io::Error::other)?;
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        Self::serve(Some((acceptor, made.cert.pem()))).await
    }

    async fn serve(tls: Option<(tokio_rustls::TlsAcceptor, String)>) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = Arc::new(Mutex::new(State::default()));
        let (acceptor, ca) = match tls {
            Some((acceptor, ca)) => (Some(acceptor), Some(ca)),
            None => (None, None),
        };
        let scheme = if acceptor.is_some() { "https" } else { "http" };
        let own = format!("{scheme}://{address}");
        let shared = state.clone();
        let server = tokio::spawn(async move {
            // Connections end with the server, whatever they were waiting for.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (state, acceptor, own) = (shared.clone(), acceptor.clone(), own.clone());
                connections.spawn(async move {
                    let service = |certificate| {
                        service_fn(move |request| {
                            answer(state.clone(), own.clone(), certificate, request)
                        })
                    };
                    let http = hyper::server::conn::http1::Builder::new();
                    // A client that leaves in the middle is none of a test's business.
                    match acceptor {
                        Some(acceptor) => {
                            if let Ok(stream) = acceptor.accept(stream).await {
                                let told = stream.get_ref().1.peer_certificates().is_some();
                                let service = service(told);
                                let _ = http.serve_connection(TokioIo::new(stream), service).await;
                            }
                        }
                        None => {
                            let service = service(false);
                            let _ = http.serve_connection(TokioIo::new(stream), service).await;
                        }
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self {
            address,
            state,
            server,
            ca,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// `127.0.0.1:PORT`, as a reference names it.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// `http://127.0.0.1:PORT` or with `https`.
    pub fn url(&self) -> String {
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// The certificate to trust, PEM; only with TLS.
    pub fn ca(&self) -> Option<&str> {
        self.ca.as_deref()
    }

    /// Serves an image under a tag and by digest.
    pub fn add(&self, repository: &str, tag: &str, image: &Image) {
        self.add_manifest(repository, tag, &image.manifest);
        for blob in image.layers.iter().chain([&image.config]) {
            self.add_blob(repository, blob);
        }
    }

    /// Serves a manifest or index under a tag and by digest.
    pub fn add_manifest(&self, repository: &str, tag: &str, manifest: &Blob) {
        let mut state = self.lock();
        for reference in [tag.to_owned(), manifest.digest.to_string()] {
            state
                .manifests
                .insert((repository.to_owned(), reference), manifest.clone());
        }
    }

    pub fn add_blob(&self, repository: &str, blob: &Blob) {
        self.serve_as(repository, &blob.digest, blob.data.clone());
    }

    /// Serves any bytes under a digest.
    pub fn serve_as(&self, repository: &str, digest: &Digest, data: Vec<u8>) {
        let key = (repository.to_owned(), digest.to_string());
        self.lock().blobs.insert(key, data.into());
    }

    /// Changes how the registry behaves from now on.
    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.lock().behaviour);
    }

    /// Requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.lock().seen.clone()
    }

    pub fn forget_seen(&self) {
        self.lock().seen.clear();
    }

    /// How many requests of this method had `part` in their path.
    pub fn count(&self, method: &str, part: &str) -> usize {
        let state = self.lock();
        state
            .seen
            .iter()
            .filter(|s| s.method == method && s.path.contains(part))
            .count()
    }

    /// Makes tokens given so far worthless.
    pub fn expire_tokens(&self) {
        self.lock().tokens += 1;
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn full(data: impl Into<Bytes>) -> Body {
    http_body_util::Full::new(data.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

fn status(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    response
}

async fn answer(
    state: Arc<Mutex<State>>,
    own: String,
    client_certificate: bool,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = match body.collect().await {
        Ok(body) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
        Err(_) => String::new(),
    };
    let text = |name: header::HeaderName| {
        parts
            .headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    let seen = Seen {
        method: parts.method.to_string(),
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        authorization: text(header::AUTHORIZATION),
        range: text(header::RANGE),
        headers: parts
            .headers
            .iter()
            .filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())))
            .collect(),
        body,
        client_certificate,
    };
    let latency = {
        let mut state = lock(&state);
        state.seen.push(seen.clone());
        state.behaviour.latency
    };
    tokio::time::sleep(latency).await;
    Ok(respond(&mut lock(&state), &own, &parts.method, &seen))
}

fn respond(state: &mut State, own: &str, method: &Method, seen: &Seen) -> Response<Body> {
    if seen.path == "/token" {
        return token(state, seen);
    }
    if let Some(refused) = refuse(state, own, seen) {
        return refused;
    }
    let Some(rest) = seen.path.strip_prefix("/v2/") else {
        return status(StatusCode::NOT_FOUND, "");
    };
    if rest.is_empty() {
        return status(StatusCode::OK, "{}");
    }
    if let Some((code, times, after)) = &mut state.behaviour.fail
        && *times > 0
    {
        *times -= 1;
        let code = StatusCode::from_u16(*code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status(code, "");
        if let Some(after) = after {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, (*after).into());
        }
        return response;
    }
    if method != Method::GET && method != Method::HEAD {
        return status(StatusCode::METHOD_NOT_ALLOWED, "");
    }
    if let Some((repository, reference)) = rest.split_once("/manifests/") {
        manifest(state, method, repository, reference)
    } else if let Some((repository, digest)) = rest.split_once("/blobs/") {
        blob(state, seen, repository, digest)
    } else {
        status(StatusCode::NOT_FOUND, "")
    }
}

/// The challenge that a request without the right proof gets.
fn refuse(state: &State, own: &str, seen: &Seen) -> Option<Response<Body>> {
    let given = seen.authorization.as_deref().unwrap_or_default();
    let (good, challenge) = match &state.behaviour.auth {
        Auth::None => return None,
        Auth::Basic { user, password } => {
            let wanted = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
            (given == wanted, "Basic realm=\"testkit\"".to_owned())
        }
        Auth::Bearer { .. } => {
            let own_realm = format!("{own}/token");
            let realm = state.behaviour.realm.as_ref().unwrap_or(&own_realm);
            let repository = seen.path.trim_start_matches("/v2/");
            let repository = repository.split("/manifests/").next().unwrap_or_default();
            let repository = repository.split("/blobs/").next().unwrap_or_default();
            let challenge = format!(
                "Bearer realm=\"{realm}\",service=\"testkit\",scope=\"repository:{repository}:pull\""
            );
            (given == format!("Bearer token-{}", state.tokens), challenge)
        }
    };
    if good {
        return None;
    }
    let body = r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
    let mut response = status(StatusCode::UNAUTHORIZED, body);
    if let Ok(value) = challenge.parse() {
        response
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, value);
    }
    Some(response)
}

fn token(state: &mut State, seen: &Seen) -> Response<Body> {
    if let Some(body) = &state.behaviour.token_body {
        return Response::new(full(body.clone()));
    }
    let Auth::Bearer {
        user,
        password,
        refresh,
    } = &state.behaviour.auth
    else {
        return status(StatusCode::NOT_FOUND, "");
    };
    let basic = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
    let by_refresh = !refresh.is_empty()
        && seen.method == "POST"
        && seen.body.contains("grant_type=refresh_token")
        && seen.body.contains(&format!("refresh_token={refresh}"));
    let good = user.is_empty() && refresh.is_empty()
        || by_refresh
        || !user.is_empty() && seen.authorization.as_deref() == Some(basic.as_str());
    if !good {
        return status(StatusCode::UNAUTHORIZED, "{}");
    }
    let body = serde_json::json!({"token": format!("token-{}", state.tokens)});
    Response::new(full(body.to_string()))
}

fn manifest(state: &State, method: &Method, repository: &str, reference: &str) -> Response<Body> {
    let key = (repository.to_owned(), reference.to_owned());
    let Some(manifest) = state.manifests.get(&key) else {
        let body = r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
        return status(StatusCode::NOT_FOUND, body);
    };
    let mut said = manifest.digest.to_string();
    if state.behaviour.wrong_digest_header {
        said = crate::image::digest(b"something else").to_string();
    }
    let data = if method == Method::HEAD {
        Vec::new()
    } else {
        manifest.data.clone()
    };
    let mut response = Response::new(full(data));
    let headers = response.headers_mut();
    for (name, text) in [
        ("content-type", manifest.media_type.as_str()),
        ("docker-content-digest", &said),
    ] {
        if let Ok(value) = text.parse() {
            headers.insert(name, value);
        }
    }
    if method == Method::HEAD {
        headers.insert(header::CONTENT_LENGTH, manifest.data.len().into());
    }
    response
}

fn blob(state: &mut State, seen: &Seen, repository: &str, digest: &str) -> Response<Body> {
    if let Some(base) = &state.behaviour.redirect {
        let mut response = status(StatusCode::TEMPORARY_REDIRECT, "");
        if let Ok(location) = format!("{base}{}", seen.path).parse() {
            response.headers_mut().insert(header::LOCATION, location);
        }
        return response;
    }
    let Some(data) = state.blobs.get(&(repository.to_owned(), digest.to_owned())) else {
        return status(
            StatusCode::NOT_FOUND,
            r#"{"errors":[{"code":"BLOB_UNKNOWN"}]}"#,
        );
    };
    let mut data = data.clone();
    if state.behaviour.wrong_bytes {
        let mut changed = data.to_vec();
        if let Some(last) = changed.last_mut() {
            *last ^= 1;
        }
        data = changed.into();
    }
    let total = data.len();
    let behaviour = &mut state.behaviour;
    let mut range = seen.range.as_deref().and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        let last = match last {
            "" => usize::MAX,
            last => last.parse().ok()?,
        };
        Some((first.parse::<usize>().ok()?, last))
    });
    if let (Some(_), Some(left)) = (range, &mut behaviour.ranges_honoured) {
        match left.checked_sub(1) {
            Some(less) => *left = less,
            None => range = None,
        }
    }
    let range = range.filter(|_| !behaviour.ignore_range);
    if range.is_some_and(|(from, _)| from >= total) {
        return status(StatusCode::RANGE_NOT_SATISFIABLE, "");
    }
    let data = match range {
        Some((from, last)) => data.slice(from..last.saturating_add(1).min(total)),
        None => data,
    };
    let length = data.len();
    let body = match (&mut behaviour.cut_after, &mut behaviour.stall_after) {
        (Some((after, times)), _) if *times > 0 => {
            *times -= 1;
            pieces(data.slice(..(*after).min(length)), false)
        }
        (_, Some((after, times))) if *times > 0 => {
            *times -= 1;
            pieces(data.slice(..(*after).min(length)), true)
        }
        _ if behaviour
            .stall_layers
            .is_some_and(|after| length > after + 2000) =>
        {
            pieces(data.slice(..behaviour.stall_layers.unwrap_or(0)), true)
        }
        _ => match behaviour.trickle {
            Some((piece, pause)) => trickle(data, piece, pause),
            // A body of known length would be set right.
            None if behaviour.wrong_length != 0 => trickle(data, 1 << 20, Duration::ZERO),
            None => full(data),
        },
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    // A body that is not as long as it says ends the connection: hyper holds to it.
    let said = u64::try_from(length).unwrap_or(0);
    headers.insert(
        header::CONTENT_LENGTH,
        said.saturating_add_signed(behaviour.wrong_length).into(),
    );
    if let Some((from, _)) = range {
        let said = format!("bytes {from}-{}/{total}", from + length.saturating_sub(1));
        let said = behaviour.content_range.clone().unwrap_or(said);
        if let Ok(value) = said.parse() {
            headers.insert(header::CONTENT_RANGE, value);
        }
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    response
}

/// A body that comes slowly.
fn trickle(data: Bytes, piece: usize, pause: Duration) -> Body {
    let stream = futures::stream::unfold(data, move |mut data| async move {
        if data.is_empty() {
            return None;
        }
        tokio::time::sleep(pause).await;
        let piece = data.split_to(piece.min(data.len()));
        Some((Ok(Frame::data(piece)), data))
    });
    StreamBody::new(stream).boxed_unsync()
}

/// A body that gives `data` and then breaks, or hangs.
fn pieces(data: Bytes, hang: bool) -> Body {
    StreamBody::new(broken(data, hang)).boxed_unsync()
}

fn broken(data: Bytes, hang: bool) -> impl Stream<Item = io::Result<Frame<Bytes>>> {
    futures::stream::unfold(Some(data), move |data| async move {
        match data {
            Some(data) => Some((Ok(Frame::data(data)), None)),
            None => {
                // What was written must leave before the connection is closed under it.
                tokio::time::sleep(Duration::from_millis(20)).await;
                if hang {
                    std::future::pending::<()>().await;
                }
                Some((Err(io::Error::other("cut on purpose")), None))
            }
        }
    })
}
