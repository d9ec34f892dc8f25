//! One request to one host: authentication, redirects, retries.

use std::ops::Range;
use std::time::{Duration, SystemTime};

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE};
use reqwest::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Method, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::{Mutex, OnceCell};

use super::Settings;
use super::challenge::{self, Challenge};
use super::hosts::{Host, url_host};
use crate::credentials::Credentials;
use crate::keychain::Keychain;
use crate::reference::Reference;

const REDIRECTS_MAX: usize = 10;
/// Most bytes of a token endpoint's answer.
const TOKEN_MAX: usize = 4 << 20;
/// Most bytes of an error's body that are looked at.
const DETAIL_MAX: usize = 64 << 10;

/// Why a host did not give what was asked of it.
#[derive(Debug)]
pub enum Failure {
    /// No connection, no answer in time, or an answer that says "later".
    Unavailable(String),
    /// An answer that is final.
    Answer {
        status: u16,
        request: String,
        detail: String,
    },
    /// The host does not keep to the protocol, or serves what was not asked for.
    Broken(String),
    /// Not the host's fault: another one would not help.
    Local(crate::Error),
}

pub type Outcome<T> = std::result::Result<T, Failure>;

/// A host with the client for it and what was learned in talking to it.
pub struct Endpoint {
    pub host: Host,
    /// `host[:port]`.
    pub name: String,
    client: reqwest::Client,
    /// For where it leads to, in redirects and token realms, if that is another host: its trust
    /// without its client certificate.
    elsewhere: reqwest::Client,
    /// Those of the request, only if they are for this host.
    given: Option<Credentials>,
    /// Those of the node.
    keychain: Keychain,
    found: OnceCell<Option<Credentials>>,
    /// `Authorization` that was accepted last.
    authorization: Mutex<Option<HeaderValue>>,
}

/// What is asked of a host, below its base URL and the repository.
pub struct Request<'a> {
    pub method: Method,
    /// `manifests/latest`, `blobs/sha256:...`.
    pub path: String,
    pub accept: Option<&'a str>,
    /// The bytes wanted, if not all.
    pub range: Option<Range<u64>>,
}

impl Request<'_> {
    fn label(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Endpoint {
    pub fn new(
        host: Host,
        name: String,
        [client, elsewhere]: [reqwest::Client; 2],
        given: Option<Credentials>,
        keychain: Keychain,
    ) -> Self {
        Self {
            host,
            name,
            client,
            elsewhere,
            given,
            keychain,
            found: OnceCell::new(),
            authorization: Mutex::new(None),
        }
    }

    /// Tries of a request: only the last host, behind which there is no other, gets several.
    pub fn attempts(&self, settings: &Settings) -> u32 {
        if self.host.is_server {
            settings.attempts.max(1)
        } else {
            1
        }
    }

    /// Sends until there is a success, a final answer or no try left.
    pub async fn send(
        &self,
        reference: &Reference,
        request: &Request<'_>,
        settings: &Settings,
    ) -> Outcome<Response> {
        let mut wait = settings.retry_wait;
        let mut attempt = 1;
        loop {
            let (reason, after) = match self.authorized(reference, request, settings).await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if is_temporary(response.status()) => {
                    let text = format!("{} answered {}", self.name, response.status());
                    (text, retry_after(response.headers()))
                }
                Ok(response) => return Err(self.answer(request, response, settings).await),
                Err(Failure::Unavailable(reason)) => (reason, None),
                Err(other) => return Err(other),
            };
            if attempt >= self.attempts(settings) {
                return Err(Failure::Unavailable(reason));
            }
            tracing::debug!(host = %self.name, %reason, attempt, "registry request is tried again");
            tokio::time::sleep(after.unwrap_or(wait).min(settings.retry_wait_max)).await;
            wait = wait.saturating_mul(2);
            attempt += 1;
        }
    }

    /// One request; a 401 is answered once, with credentials or an anonymous token.
    async fn authorized(
        &self,
        reference: &Reference,
        request: &Request<'_>,
        settings: &Settings,
    ) -> Outcome<Response> {
        let known = self
            .authorization
            .lock()
            .await
            .clone()
            .or_else(|| self.ready_made());
        let (response, own) = self
            .follow(reference, request, known.as_ref(), settings)
            .await?;
        if response.status() != StatusCode::UNAUTHORIZED || !own {
            return Ok(response);
        }
        let challenges: Vec<Challenge> = response
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(challenge::parse)
            .collect();
        let mut authorization = self.authorization.lock().await;
        // Another request may have been given a token while this one waited for its answer.
        if authorization.is_none() || *authorization == known {
            match self.authorize(reference, &challenges, settings).await? {
                Some(value) if Some(&value) != known.as_ref() => *authorization = Some(value),
                // Nothing to say that was not said.
                _ => return Ok(response),
            }
        }
        let value = authorization.clone();
        drop(authorization);
        Ok(self
            .follow(reference, request, value.as_ref(), settings)
            .await?
            .0)
    }

    /// A bearer token that CRI brought needs no challenge.
    fn ready_made(&self) -> Option<HeaderValue> {
        let token = &self.given.as_ref()?.registry_token;
        if token.is_empty() {
            None
        } else {
            bearer(token)
        }
    }

    /// What there is to answer a challenge of this host with: what the request brought, else what
    /// the node has, which is looked for once.
    async fn credentials(&self, reference: &Reference) -> Outcome<Option<&Credentials>> {
        if self.given.is_some() {
            return Ok(self.given.as_ref());
        }
        let look = async || {
            let own = self.keychain.find(&self.name, reference).await?;
            // The configured server is the registry, whatever it is called; a mirror is not.
            match own {
                None if self.host.is_server => {
                    self.keychain.find(reference.host(), reference).await
                }
                own => Ok(own),
            }
        };
        let found = self.found.get_or_try_init(look).await;
        let found = found.map_err(|error: crate::Error| {
            // Another host may do without.
            Failure::Broken(format!("{}: {error}", self.name))
        })?;
        Ok(found.as_ref())
    }

    /// Sends and follows redirects. Also says whether the answer is of the host itself, whose
    /// challenges count, or of another that it led to.
    async fn follow(
        &self,
        reference: &Reference,
        request: &Request<'_>,
        authorization: Option<&HeaderValue>,
        settings: &Settings,
    ) -> Outcome<(Response, bool)> {
        let base = self.host.base.as_str().trim_end_matches('/');
        let url = format!("{base}/{}/{}", reference.path(), request.path);
        let mut url = Url::parse(&url).map_err(|e| Failure::Broken(e.to_string()))?;
        if self.host.is_mirror {
            url.query_pairs_mut().append_pair("ns", reference.host());
        }
        let origin = url.clone();
        for _ in 0..=REDIRECTS_MAX {
            let own = same_host(&origin, &url);
            let headers = self.headers(request, authorization.filter(|_| own), own)?;
            let sent = self
                .client_for(&url)
                .request(request.method.clone(), url.clone())
                .headers(headers);
            let response = self.answered(sent, settings).await?;
            if !response.status().is_redirection() {
                return Ok((response, own));
            }
            let location = response
                .headers()
                .get(LOCATION)
                .and_then(|value| value.to_str().ok());
            let next = location
                .and_then(|location| url.join(location).ok())
                .ok_or_else(|| {
                    Failure::Broken(format!(
                        "{}: a redirect without a usable Location",
                        self.name
                    ))
                })?;
            let downgrade = url.scheme() == "https" && next.scheme() != "https";
            if downgrade || !matches!(next.scheme(), "http" | "https") {
                return Err(Failure::Broken(format!(
                    "{}: a redirect to {}://{} is not followed",
                    self.name,
                    next.scheme(),
                    url_host(&next)
                )));
            }
            url = next;
            // What a URL carries besides the query is not for the next host's log.
            let _ = url.set_username("");
            let _ = url.set_password(None);
        }
        Err(Failure::Broken(format!(
            "{}: more than {REDIRECTS_MAX} redirects",
            self.name
        )))
    }

    /// A client certificate tells who the node is: that is for the configured host alone.
    fn client_for(&self, url: &Url) -> &reqwest::Client {
        match same_host(&self.host.base, url) {
            true => &self.client,
            false => &self.elsewhere,
        }
    }

    /// `own`: the request goes to the configured host, so its headers may go along.
    fn headers(
        &self,
        request: &Request<'_>,
        authorization: Option<&HeaderValue>,
        own: bool,
    ) -> Outcome<HeaderMap> {
        let mut headers = HeaderMap::new();
        if own {
            for (name, value) in &self.host.header {
                let bad =
                    || Failure::Broken(format!("{}: header {name:?} is not valid", self.name));
                let mut value = HeaderValue::from_str(value).map_err(|_| bad())?;
                value.set_sensitive(true);
                headers.append(HeaderName::try_from(name).map_err(|_| bad())?, value);
            }
        }
        if let Some(value) = authorization {
            headers.insert(AUTHORIZATION, value.clone());
        }
        if let Some(accept) = request
            .accept
            .and_then(|text| HeaderValue::from_str(text).ok())
        {
            headers.insert(ACCEPT, accept);
        }
        if let Some(range) = &request.range
            && let Ok(value) =
                HeaderValue::from_str(&format!("bytes={}-{}", range.start, range.end - 1))
        {
            headers.insert(RANGE, value);
        }
        Ok(headers)
    }

    async fn answered(
        &self,
        request: reqwest::RequestBuilder,
        settings: &Settings,
    ) -> Outcome<Response> {
        match tokio::time::timeout(settings.header_timeout, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Failure::Unavailable(format!(
                "{}: {}",
                self.name,
                chain(error)
            ))),
            Err(_) => Err(Failure::Unavailable(format!(
                "{}: no answer within {:?}",
                self.name, settings.header_timeout
            ))),
        }
    }

    /// Something to answer the challenges with; `None` if there is nothing.
    async fn authorize(
        &self,
        reference: &Reference,
        challenges: &[Challenge],
        settings: &Settings,
    ) -> Outcome<Option<HeaderValue>> {
        let credentials = match challenges {
            [] => None,
            _ => self.credentials(reference).await?,
        };
        let basic = credentials.and_then(Credentials::basic);
        for challenge in challenges {
            match challenge {
                Challenge::Bearer {
                    realm,
                    service,
                    scope,
                } => {
                    if let Some(ready) = credentials.map(|c| &c.registry_token)
                        && !ready.is_empty()
                    {
                        return Ok(bearer(ready));
                    }
                    let token = self
                        .token(reference, (realm, service, scope), credentials, settings)
                        .await?;
                    return Ok(bearer(&token));
                }
                Challenge::Basic => {
                    if let Some((user, password)) = &basic {
                        return Ok(basic_header(user, password));
                    }
                }
            }
        }
        Ok(None)
    }

    async fn token(
        &self,
        reference: &Reference,
        (realm, service, scope): (&str, &str, &str),
        credentials: Option<&Credentials>,
        settings: &Settings,
    ) -> Outcome<String> {
        let broken = |what: &str| Failure::Broken(format!("{}: token realm: {what}", self.name));
        let mut url = Url::parse(realm).map_err(|_| broken("not a URL"))?;
        // Over plain HTTP a realm would show the password to everybody on the way; a registry
        // that is plain HTTP itself has made that choice.
        if url.scheme() != "https" && !(url.scheme() == "http" && self.host.base.scheme() == "http")
        {
            return Err(broken("not https"));
        }
        let default_scope = format!("repository:{}:pull", reference.path());
        let scope = if scope.is_empty() {
            &default_scope
        } else {
            scope
        };
        let identity = credentials.map(|c| c.identity_token.as_str());
        let request = match identity.filter(|token| !token.is_empty()) {
            Some(token) => {
                // The serializer that writes a query writes a form as well.
                let mut form = url.clone();
                form.query_pairs_mut().clear().extend_pairs([
                    ("grant_type", "refresh_token"),
                    ("service", service),
                    ("scope", scope),
                    ("client_id", "gantry"),
                    ("refresh_token", token),
                ]);
                let form = form.query().unwrap_or_default().to_owned();
                self.client_for(&url)
                    .post(url.clone())
                    .header("content-type", "application/x-www-form-urlencoded")
                    .body(form)
            }
            None => {
                {
                    let mut query = url.query_pairs_mut();
                    if !service.is_empty() {
                        query.append_pair("service", service);
                    }
                    query.append_pair("scope", scope);
                }
                let request = self.client_for(&url).get(url.clone());
                match credentials.and_then(Credentials::basic) {
                    Some((user, password)) => request.basic_auth(user, Some(password)),
                    None => request,
                }
            }
        };
        let response = self.answered(request, settings).await?;
        let status = response.status();
        let realm = format!("token request to {}", url_host(&url));
        if is_temporary(status) {
            return Err(Failure::Unavailable(format!(
                "{}: {realm}: {status}",
                self.name
            )));
        }
        if !status.is_success() {
            let detail = detail(response, settings).await;
            return Err(Failure::Answer {
                status: status.as_u16(),
                request: realm,
                detail,
            });
        }
        let body = body(response, TOKEN_MAX, settings)
            .await
            .map_err(|reason| Failure::Broken(format!("{}: {realm}: {reason}", self.name)))?;
        let token: Token = serde_json::from_slice(&body)
            .map_err(|_| Failure::Broken(format!("{}: {realm}: not a token", self.name)))?;
        let text = token
            .token
            .or(token.access_token)
            .filter(|token| !token.is_empty());
        text.ok_or_else(|| Failure::Broken(format!("{}: {realm}: an empty token", self.name)))
    }

    async fn answer(
        &self,
        request: &Request<'_>,
        response: Response,
        settings: &Settings,
    ) -> Failure {
        let status = response.status().as_u16();
        Failure::Answer {
            status,
            request: request.label(),
            detail: detail(response, settings).await,
        }
    }
}

/// Statuses that a later try may not meet again.
fn is_temporary(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS
    ) || status.is_server_error()
}

/// Seconds, or the time until a date (RFC 9110, section 10.2.3); a date that is past asks for no wait.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

fn same_host(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme()
        && a.host() == b.host()
        && a.port_or_known_default() == b.port_or_known_default()
}

fn bearer(token: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn basic_header(user: &str, password: &str) -> Option<HeaderValue> {
    use base64::Engine;
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    let mut value = HeaderValue::from_str(&format!("Basic {pair}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// An error with its causes and without its URL, whose query may be a signature.
pub fn chain(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A body of at most `limit` bytes.
pub async fn body(
    mut response: Response,
    limit: usize,
    settings: &Settings,
) -> std::result::Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    loop {
        match tokio::time::timeout(settings.progress_timeout, response.chunk()).await {
            Ok(Ok(Some(chunk))) => bytes.extend_from_slice(&chunk),
            Ok(Ok(None)) => return Ok(bytes),
            Ok(Err(error)) => return Err(chain(error)),
            Err(_) => {
                return Err(format!(
                    "no progress within {:?}",
                    settings.progress_timeout
                ));
            }
        }
        if bytes.len() > limit {
            return Err(format!("a body of more than {limit} bytes"));
        }
    }
}

#[derive(Deserialize)]
struct Errors {
    #[serde(default)]
    errors: Vec<OneError>,
}

#[derive(Deserialize)]
struct OneError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// What the registry says about an error (distribution specification, Error Codes), made fit for
/// one line: `: CODE: message`, or nothing.
async fn detail(response: Response, settings: &Settings) -> String {
    let Ok(body) = body(response, DETAIL_MAX, settings).await else {
        return String::new();
    };
    let Ok(errors) = serde_json::from_slice::<Errors>(&body) else {
        return String::new();
    };
    let Some(first) = errors.errors.first() else {
        return String::new();
    };
    let clean = |text: &str| {
        text.chars()
            .filter(|c| !c.is_control())
            .take(200)
            .collect::<String>()
    };
    match (clean(&first.code), clean(&first.message)) {
        (code, message) if message.is_empty() => format!(": {code}"),
        (code, message) => format!(": {code}: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_seconds_or_a_date() {
        let after = |text: &str| {
            let headers =
                HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_str(text).unwrap())]);
            retry_after(&headers)
        };
        assert_eq!(after(" 7 "), Some(Duration::from_secs(7)));
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        let wait = after(&later).unwrap();
        assert!((90..=100).contains(&wait.as_secs()), "{wait:?}");
        // The other two forms that were once in use (RFC 9110, section 5.6.7), both long past.
        for past in ["Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"] {
            assert_eq!(after(past), Some(Duration::ZERO), "{past}");
        }
        for bad in ["", "-1", "soon", "Sun, 06 Nov 1994"] {
            assert_eq!(after(bad), None, "{bad}");
        }
    }
}
