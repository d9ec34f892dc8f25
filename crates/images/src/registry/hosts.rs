//! `hosts.toml` directories, in containerd's format (containerd docs/hosts.md).
//!
//! They are read anew for each pull, so that an edit needs no restart.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use serde::Deserialize;

use crate::reference::DEFAULT_HOST;
use crate::{Error, Result};

/// Where Docker Hub's API is.
const DEFAULT_SERVER: &str = "registry-1.docker.io";
const FILE: &str = "hosts.toml";
const FILE_MAX: u64 = 1 << 20;

/// A host that may serve an image, with how to talk to it.
#[derive(Clone)]
pub struct Host {
    /// Scheme, authority and path prefix up to and without `/<repository>`.
    pub base: Url,
    pub resolve: bool,
    pub pull: bool,
    /// It stands in for another registry, which it is told as `?ns=`.
    pub is_mirror: bool,
    /// It is the registry itself, by default or as `server` names it.
    pub is_server: bool,
    pub tls: Tls,
    pub header: Vec<(String, String)>,
    pub dial_timeout: Option<Duration>,
}

/// Header values may be secrets.
impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.header.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("Host")
            .field("base", &self.base.as_str())
            .field("resolve", &self.resolve)
            .field("pull", &self.pull)
            .field("is_mirror", &self.is_mirror)
            .field("tls", &self.tls)
            .field("header", &names)
            .finish_non_exhaustive()
    }
}

/// Trust and identity beyond the system's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// PEM bundles trusted besides the system's.
    pub ca: Vec<PathBuf>,
    /// Client certificate and key; one file may hold both.
    pub client: Vec<(PathBuf, PathBuf)>,
    pub skip_verify: bool,
}

#[derive(Deserialize)]
struct RawFile {
    server: Option<String>,
    #[serde(flatten)]
    own: RawHost,
    #[serde(default)]
    host: toml::Table,
}

#[derive(Deserialize, Default)]
struct RawHost {
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    ca: OneOrMany,
    client: Option<toml::Value>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    override_path: bool,
    #[serde(default)]
    header: std::collections::BTreeMap<String, OneOrMany>,
    dial_timeout: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(untagged)]
enum OneOrMany {
    #[default]
    None,
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMany::None => Vec::new(),
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

/// The hosts to try for images of `registry` (`host[:port]` of a reference), in order. The
/// registry itself comes last.
pub fn hosts(certs_d: Option<&Path>, registry: &str) -> Result<Vec<Host>> {
    for name in certs_d.into_iter().flat_map(|_| directory_names(registry)) {
        let dir = certs_d.unwrap_or(Path::new("")).join(name);
        if !dir.is_dir() {
            continue;
        }
        let path = dir.join(FILE);
        return match fs::metadata(&path) {
            Ok(meta) if meta.len() > FILE_MAX => Err(Error::Hosts {
                path,
                reason: format!("larger than {FILE_MAX} bytes"),
            }),
            Ok(_) => {
                let text = fs::read_to_string(&path)
                    .map_err(|e| Error::io(format_args!("read {}", path.display()), e))?;
                parse(&text, &dir, registry).map_err(|reason| Error::Hosts { path, reason })
            }
            // A link that leads nowhere, as while a mounted directory is exchanged, is a file that
            // cannot be read: without it the pull would pass the mirrors by.
            Err(e) if e.kind() == io::ErrorKind::NotFound && !path.is_symlink() => {
                let mut host = default_host(registry)?;
                host.tls = docker_certificates(&dir)?;
                Ok(vec![host])
            }
            Err(e) => Err(Error::io(format_args!("stat {}", path.display()), e)),
        };
    }
    Ok(vec![default_host(registry)?])
}

/// `host_port_` is for file systems that dislike colons.
fn directory_names(registry: &str) -> Vec<String> {
    let with_port = registry
        .rsplit_once(':')
        .filter(|(_, port)| !port.ends_with(']'));
    with_port
        .map(|(host, port)| format!("{host}_{port}_"))
        .into_iter()
        .chain([registry.to_owned(), "_default".to_owned()])
        .collect()
}

/// Docker's layout of the same directory: `*.crt` are authorities, `X.cert` with `X.key` clients.
fn docker_certificates(dir: &Path) -> Result<Tls> {
    let fail = |e| Error::io(format_args!("read {}", dir.display()), e);
    let mut tls = Tls::default();
    for entry in fs::read_dir(dir).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => tls.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                if !key.exists() {
                    let reason = format!("no {} beside it", key.display());
                    return Err(Error::Hosts { path, reason });
                }
                tls.client.push((path, key));
            }
            _ => {}
        }
    }
    tls.ca.sort();
    tls.client.sort();
    Ok(tls)
}

/// Says where a file is wrong without a word of it: a header may be a secret, and errors of pulls are
/// told to everybody who may see the pod.
fn misread(text: &str, error: &toml::de::Error) -> String {
    let what = error
        .message()
        .split(['"', '\''])
        .next()
        .unwrap_or_default();
    let what = what
        .split(", expected")
        .next()
        .unwrap_or_default()
        .trim_end();
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) => format!("line {}: {what}", before.matches('\n').count() + 1),
        None => what.to_owned(),
    }
}

fn parse(text: &str, dir: &Path, registry: &str) -> std::result::Result<Vec<Host>, String> {
    let file: RawFile = toml::from_str(text).map_err(|e| misread(text, &e))?;
    let mut hosts = Vec::new();
    for (url, table) in file.host {
        let raw: RawHost = table
            .try_into()
            .map_err(|e| format!("host {url:?}: {}", misread("", &e)))?;
        let mut host = host(&url, raw, dir)?;
        host.is_mirror = url_host(&host.base) != canonical(registry);
        hosts.push(host);
    }
    let mut server = match file.server {
        Some(server) if !server.is_empty() => host(&server, file.own, dir)?,
        _ => {
            let mut default = default_host(registry).map_err(|e| e.to_string())?;
            let own = host(
                default.base.as_str(),
                RawHost {
                    override_path: true,
                    ..file.own
                },
                dir,
            )?;
            (default.tls, default.header) = (own.tls, own.header);
            default.dial_timeout = own.dial_timeout;
            default
        }
    };
    server.is_mirror = url_host(&server.base) != canonical(registry);
    server.is_server = true;
    hosts.push(server);
    Ok(hosts)
}

fn host(url: &str, raw: RawHost, dir: &Path) -> std::result::Result<Host, String> {
    let full = if url.contains("://") {
        url.to_owned()
    } else {
        format!("{}://{url}", scheme(url))
    };
    let mut base = Url::parse(&full).map_err(|e| format!("host {url:?}: {e}"))?;
    if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
        return Err(format!("host {url:?} is not an http or https URL"));
    }
    if !base.username().is_empty() || base.password().is_some() || base.query().is_some() {
        return Err("a host's URL has user info or a query in it".to_owned());
    }
    let path = base.path().trim_end_matches('/').to_owned();
    let path = if raw.override_path || path.ends_with("/v2") {
        path
    } else {
        format!("{path}/v2")
    };
    base.set_path(&path);
    let capabilities = raw.capabilities.as_deref();
    let can = |name: &str| capabilities.is_none_or(|list| list.iter().any(|c| c == name));
    for capability in capabilities.unwrap_or_default() {
        let known = ["pull", "resolve", "push", "referrers"];
        if !known.contains(&capability.as_str()) {
            return Err(format!(
                "host {url:?}: capability {capability:?} is not known"
            ));
        }
    }
    let at = |path: String| dir.join(path);
    let header = raw.header.into_iter().flat_map(|(name, values)| {
        values
            .into_vec()
            .into_iter()
            .map(move |value| (name.clone(), value))
    });
    Ok(Host {
        resolve: can("resolve"),
        pull: can("pull"),
        is_mirror: false,
        is_server: false,
        tls: Tls {
            ca: raw.ca.into_vec().into_iter().map(at).collect(),
            client: clients(raw.client, dir).map_err(|e| format!("host {url:?}: {e}"))?,
            skip_verify: raw.skip_verify,
        },
        header: header.collect(),
        dial_timeout: raw.dial_timeout.as_deref().map(duration).transpose()?,
        base,
    })
}

/// One file, a list of files, or a list of pairs of certificate and key.
fn clients(
    value: Option<toml::Value>,
    dir: &Path,
) -> std::result::Result<Vec<(PathBuf, PathBuf)>, String> {
    use toml::Value;
    let wrong = || "client is not a file, a list of files or a list of pairs".to_owned();
    let list = match value {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    let pair = |value: Value| match value {
        Value::String(both) => Ok((dir.join(&both), dir.join(both))),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(both)] => Ok((dir.join(both), dir.join(both))),
            [Value::String(certificate), Value::String(key)] if key.is_empty() => {
                Ok((dir.join(certificate), dir.join(certificate)))
            }
            [Value::String(certificate), Value::String(key)] => {
                Ok((dir.join(certificate), dir.join(key)))
            }
            _ => Err(wrong()),
        },
        _ => Err(wrong()),
    };
    list.into_iter().map(pair).collect()
}

/// A duration as Go writes it: numbers with their units, one after the other, `1m30s`.
fn duration(text: &str) -> std::result::Result<Duration, String> {
    let wrong = || format!("dial_timeout {text:?} is not a duration like 30s or 1m30s");
    let mut rest = text;
    let mut seconds = 0.0;
    while rest != "0" {
        let end = |text: &str, unit: bool| {
            let is_end = |c: char| (c.is_ascii_digit() || c == '.') == unit;
            text.find(is_end).unwrap_or(text.len())
        };
        let (number, unit) = rest.split_at(end(rest, false));
        let (unit, further) = unit.split_at(end(unit, true));
        let number: f64 = number.parse().map_err(|_| wrong())?;
        seconds += number
            * match unit {
                "ns" => 1e-9,
                "us" | "\u{b5}s" | "\u{3bc}s" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(wrong()),
            };
        if further.is_empty() {
            break;
        }
        rest = further;
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

/// The registry itself, without any configuration.
fn default_host(registry: &str) -> Result<Host> {
    let server = canonical(registry);
    let bad = |e: &dyn std::fmt::Display| Error::Reference {
        reference: registry.to_owned(),
        reason: format!("the host makes no URL: {e}"),
    };
    let base = Url::parse(&format!("{}://{server}/v2", scheme(&server))).map_err(|e| bad(&e))?;
    Ok(Host {
        base,
        resolve: true,
        pull: true,
        is_mirror: false,
        is_server: true,
        tls: Tls::default(),
        header: Vec::new(),
        dial_timeout: None,
    })
}

fn canonical(registry: &str) -> String {
    if registry == DEFAULT_HOST {
        DEFAULT_SERVER.to_owned()
    } else {
        registry.to_ascii_lowercase()
    }
}

/// `host[:port]` of a URL, as a reference would have it.
pub fn url_host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// Registries on the loopback speak plain HTTP: development registries have no certificate.
fn scheme(registry: &str) -> &'static str {
    if is_loopback(registry) {
        "http"
    } else {
        "https"
    }
}

/// Whether `host[:port]` is this machine.
pub fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => registry.split(':').next().unwrap_or_default(),
    };
    let address = host.parse::<std::net::IpAddr>();
    host == "localhost" || host.ends_with(".localhost") || address.is_ok_and(|a| a.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Vec<Host> {
        parse(text, Path::new("/certs"), "docker.io").unwrap()
    }

    fn bases(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|host| host.base.as_str()).collect()
    }

    #[test]
    fn what_is_wrong_is_told_without_a_secret() {
        for (text, line) in [
            ("[header]\nAuthorization = \"Basic c2VjcmV0\n", "line 2"),
            ("server = [\"c2VjcmV0\"]\n", "line 1"),
            (
                "[host.\"https://a\"]\nca = { x = \"c2VjcmV0\" }\nskip_verify = \"c2VjcmV0\"\n",
                "https://a",
            ),
        ] {
            let error = parse(text, Path::new("/certs"), "docker.io").unwrap_err();
            assert!(error.contains(line), "{error}");
            assert!(!error.contains("c2VjcmV0"), "{error}");
        }
    }

    #[test]
    fn durations_are_those_of_go() {
        for (text, milliseconds) in [
            ("1m30s", 90_000),
            ("1.5s", 1500),
            ("0", 0),
            ("1h0m0.5s", 3_600_500),
            ("2000us", 2),
        ] {
            let expected = Duration::from_millis(milliseconds);
            assert_eq!(duration(text).unwrap(), expected, "{text}");
        }
        for text in ["", "5", "s", "-1s", "1s-2s", "1d", "1.2.3s", "1e3s", "infs"] {
            assert!(duration(text).is_err(), "{text}");
        }
        // Of the registry itself, which `server` does not name.
        assert_eq!(
            parsed("dial_timeout = \"2s\"\n")[0].dial_timeout,
            Some(Duration::from_secs(2))
        );
    }

    #[test]
    fn a_file_that_is_a_link_to_nothing_is_no_absent_file() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("r.io");
        fs::create_dir(&own).unwrap();
        assert_eq!(hosts(Some(dir.path()), "r.io").unwrap().len(), 1);
        std::os::unix::fs::symlink("..data/hosts.toml", own.join(FILE)).unwrap();
        let error = hosts(Some(dir.path()), "r.io").unwrap_err();
        assert!(error.to_string().contains(FILE), "{error}");
    }

    #[test]
    fn without_a_file_the_registry_is_asked() {
        assert_eq!(
            bases(&hosts(None, "docker.io").unwrap()),
            ["https://registry-1.docker.io/v2"]
        );
        assert_eq!(
            bases(&hosts(None, "localhost:5000").unwrap()),
            ["http://localhost:5000/v2"]
        );
        assert_eq!(
            bases(&hosts(None, "[::1]:5000").unwrap()),
            ["http://[::1]:5000/v2"]
        );
        assert_eq!(
            bases(&hosts(None, "r.io:444").unwrap()),
            ["https://r.io:444/v2"]
        );
    }

    #[test]
    fn mirrors_keep_their_order_and_the_server_comes_last() {
        let hosts = parsed(
            r#"
            server = "https://registry-1.docker.io"
            [host."https://z.example"]
              capabilities = ["pull", "resolve", "referrers"]
              ca = "z.crt"
              [host."https://z.example".header]
                x-token = ["a", "b"]
            [host."http://a.example:5000/proxy/v2"]
              capabilities = ["pull"]
              skip_verify = true
              dial_timeout = "500ms"
            [host."https://m.example/raw"]
              override_path = true
              client = [["c.pem", "k.pem"]]
            "#,
        );
        assert_eq!(
            bases(&hosts),
            [
                "https://z.example/v2",
                "http://a.example:5000/proxy/v2",
                "https://m.example/raw",
                "https://registry-1.docker.io/v2",
            ]
        );
        assert_eq!(hosts[0].tls.ca, [Path::new("/certs/z.crt")]);
        assert_eq!(hosts[0].header.len(), 2);
        assert!(hosts[0].is_mirror && hosts[0].resolve && hosts[0].pull);
        assert!(!hosts[1].resolve && hosts[1].tls.skip_verify);
        assert_eq!(hosts[1].dial_timeout, Some(Duration::from_millis(500)));
        assert_eq!(
            hosts[2].tls.client,
            [("/certs/c.pem".into(), "/certs/k.pem".into())]
        );
        assert!(!hosts[3].is_mirror);
        assert!(
            !format!("{hosts:?}").contains("\"a\""),
            "header values are not shown"
        );
    }

    #[test]
    fn top_level_settings_are_the_servers() {
        let hosts = parsed("ca = [\"x.crt\"]\nskip_verify = true");
        assert_eq!(hosts[0].tls.ca, [Path::new("/certs/x.crt")]);
        assert!(hosts[0].tls.skip_verify);
        assert_eq!(bases(&hosts), ["https://registry-1.docker.io/v2"]);
    }

    #[test]
    fn mistakes_are_reported() {
        for bad in [
            "server = 7",
            "[host.\"ftp://x\"]",
            "[host.\"https://u:p@x\"]",
            "[host.\"https://x\"]\ncapabilities = [\"fly\"]",
            "[host.\"https://x\"]\nclient = 7",
            "dial_timeout = \"soon\"",
            "not toml",
        ] {
            let error = parse(bad, Path::new("/"), "r.io").err();
            assert!(error.is_some(), "{bad}");
        }
    }

    #[test]
    fn directories_are_found_under_each_spelling() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, server: &str| {
            let dir = dir.path().join(name);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join(FILE), format!("server = \"https://{server}\"")).unwrap();
        };
        let server = |registry: &str| {
            hosts(Some(dir.path()), registry)
                .unwrap()
                .pop()
                .unwrap()
                .base
                .to_string()
        };
        assert_eq!(server("r.io:5000"), "https://r.io:5000/v2");
        write("_default", "default.example");
        assert_eq!(server("r.io:5000"), "https://default.example/v2");
        write("r.io:5000", "colon.example");
        assert_eq!(server("r.io:5000"), "https://colon.example/v2");
        write("r.io_5000_", "under.example");
        assert_eq!(server("r.io:5000"), "https://under.example/v2");
        fs::create_dir(dir.path().join("d.io")).unwrap();
        fs::write(dir.path().join("d.io/ca.crt"), "x").unwrap();
        let docker = hosts(Some(dir.path()), "d.io").unwrap().remove(0);
        assert_eq!(docker.tls.ca, [dir.path().join("d.io/ca.crt")]);
    }
}
