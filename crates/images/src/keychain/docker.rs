//! docker's `config.json`: `auths`, `credHelpers`, `credsStore` (docker login(1),
//! containers-auth.json(5)).

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::read_file;
use crate::credentials::{Credentials, canonical};
use crate::document::or_default;
use crate::{Error, Result};

const FILE_MAX: u64 = 1 << 20;

/// What the file says about a host.
pub enum Found {
    Nothing,
    Credentials(Credentials),
    /// Name of the helper to ask.
    Helper(String),
}

#[derive(Deserialize, Default)]
pub struct Config {
    #[serde(default, deserialize_with = "or_default")]
    auths: BTreeMap<String, Auth>,
    #[serde(default, deserialize_with = "or_default", rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "or_default", rename = "credsStore")]
    store: String,
}

#[derive(Deserialize, Default)]
struct Auth {
    #[serde(default, deserialize_with = "or_default")]
    auth: String,
    #[serde(default, deserialize_with = "or_default")]
    username: String,
    #[serde(default, deserialize_with = "or_default")]
    password: String,
    #[serde(default, deserialize_with = "or_default")]
    identitytoken: String,
    #[serde(default, deserialize_with = "or_default")]
    registrytoken: String,
}

impl Config {
    /// An absent file is an empty one.
    pub fn read(path: &Path) -> Result<Self> {
        let text = match read_file(path, FILE_MAX) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            text => text?,
        };
        // serde_json's texts quote what they could not use, and that may be a secret.
        serde_json::from_str(&text).map_err(|e| {
            let place = format!(
                "line {} column {} is not as it should be",
                e.line(),
                e.column()
            );
            Error::invalid(path.display(), place)
        })
    }

    /// `host` is `host[:port]`; `image` the same with the repository's path.
    pub fn find(self, host: &str, image: &str) -> Found {
        let helper = self
            .helpers
            .iter()
            .find(|(name, _)| canonical(&server(name)) == host);
        if let Some((_, name)) = helper {
            return Found::Helper(name.clone());
        }
        // The longest name that the image is below: one file may have several for one host.
        let best = self
            .auths
            .into_iter()
            .map(|(name, auth)| (scope(&name), Credentials::from(auth)))
            .filter(|(scope, credentials)| {
                let rest = image.strip_prefix(scope.as_str());
                let within = rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
                within && !credentials.is_empty()
            })
            .max_by_key(|(scope, _)| scope.len());
        match best {
            Some((_, credentials)) => Found::Credentials(credentials),
            None if self.store.is_empty() => Found::Nothing,
            None => Found::Helper(self.store),
        }
    }
}

impl From<Auth> for Credentials {
    fn from(auth: Auth) -> Self {
        Self {
            username: auth.username,
            password: auth.password,
            auth: auth.auth,
            identity_token: auth.identitytoken,
            registry_token: auth.registrytoken,
            server_address: String::new(),
        }
    }
}

fn without_scheme(name: &str) -> &str {
    name.split_once("://").map_or(name, |(_, rest)| rest)
}

fn server(name: &str) -> String {
    let name = without_scheme(name);
    name.split('/').next().unwrap_or_default().to_owned()
}

/// `host[:port][/path]` that an entry is for. What follows the host of a URL is the API's
/// version.
fn scope(name: &str) -> String {
    let rest = without_scheme(name).trim_end_matches('/');
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    match path {
        "" | "v1" | "v2" => canonical(host),
        path => format!("{}/{path}", canonical(host)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str, host: &str, path: &str) -> Found {
        let config: Config = serde_json::from_str(text).unwrap();
        config.find(host, &format!("{host}/{path}"))
    }

    fn user(found: Found) -> String {
        match found {
            Found::Credentials(credentials) => credentials.username,
            Found::Helper(name) => format!("helper {name}"),
            Found::Nothing => "nothing".to_owned(),
        }
    }

    #[test]
    fn the_entry_of_the_host_is_found() {
        let text = r#"{"auths": {
            "https://index.docker.io/v1/": {"username": "hub"},
            "r.io:5000": {"username": "port"},
            "r.io": {"username": "all"},
            "r.io/team": {"username": "team"},
            "empty.io": {}
        }, "HttpHeaders": {"x": "y"}}"#;
        for (host, path, wanted) in [
            ("docker.io", "library/busybox", "hub"),
            ("r.io:5000", "a", "port"),
            ("r.io", "a", "all"),
            ("r.io", "team/a", "team"),
            ("r.io", "teamster/a", "all"),
            ("r.io.evil.example", "a", "nothing"),
            ("empty.io", "a", "nothing"),
            ("other.io", "a", "nothing"),
        ] {
            assert_eq!(user(find(text, host, path)), wanted, "{host}/{path}");
        }
    }

    #[test]
    fn a_helper_of_the_host_goes_before_all_and_the_store_comes_last() {
        let text = r#"{"auths": {"a.io": {"username": "file"}, "b.io": {"username": "file"}, "c.io": {}},
            "credHelpers": {"a.io": "own", "https://index.docker.io/v1/": "hub"}, "credsStore": "all"}"#;
        for (host, wanted) in [
            ("a.io", "helper own"),
            ("b.io", "file"),
            ("c.io", "helper all"),
            ("docker.io", "helper hub"),
        ] {
            assert_eq!(user(find(text, host, "x")), wanted, "{host}");
        }
    }

    #[test]
    fn a_broken_file_is_named_and_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        assert!(matches!(
            Config::read(&path).unwrap().find("a", "a/b"),
            Found::Nothing
        ));
        std::fs::write(
            &path,
            r#"{"auths": {"a.io": {"auth": 7, "password": "hunter2"}}"#,
        )
        .unwrap();
        let error = Config::read(&path).err().unwrap();
        let text = format!("{error} {error:?}");
        assert!(
            text.contains("config.json") && text.contains("line 1"),
            "{text}"
        );
        assert!(!text.contains("hunter2"));
        std::fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
        assert!(matches!(Config::read(&path), Err(Error::Limit { .. })));
    }

    #[test]
    fn null_is_nothing() {
        let text = r#"{"auths": null, "credHelpers": null, "credsStore": null}"#;
        assert!(matches!(find(text, "r.io", "x"), Found::Nothing));
        let text = r#"{"auths": {"r.io": {"auth": null, "username": "u", "password": "p"}}}"#;
        assert!(matches!(find(text, "r.io", "x"), Found::Credentials(_)));
    }
}
