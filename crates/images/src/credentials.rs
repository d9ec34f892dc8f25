//! Registry credentials as CRI's `AuthConfig` brings them.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// CRI `AuthConfig`. Lives as long as the pull; never written down, never shown.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials {
    pub username: String,
    pub password: String,
    /// Base64 of `username:password`; used if those two are empty.
    pub auth: String,
    /// OAuth2 refresh token: exchanged at the token endpoint.
    pub identity_token: String,
    /// Bearer token that is sent as it is.
    pub registry_token: String,
    /// The host that all this is for, as URL or `host[:port]`; empty means the host of the image.
    pub server_address: String,
}

/// Says which fields are set, not what they hold.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = |text: &str| if text.is_empty() { "" } else { "<set>" };
        f.debug_struct("Credentials")
            .field("username", &set(&self.username))
            .field("password", &set(&self.password))
            .field("auth", &set(&self.auth))
            .field("identity_token", &set(&self.identity_token))
            .field("registry_token", &set(&self.registry_token))
            .field("server_address", &self.server_address)
            .finish()
    }
}

impl Credentials {
    pub fn is_empty(&self) -> bool {
        self.username.is_empty()
            && self.password.is_empty()
            && self.auth.is_empty()
            && self.identity_token.is_empty()
            && self.registry_token.is_empty()
    }

    /// User name and password; `None` if there are none or `auth` is not what it should be.
    pub(crate) fn basic(&self) -> Option<(String, String)> {
        if !self.username.is_empty() || !self.password.is_empty() {
            return Some((self.username.clone(), self.password.clone()));
        }
        // Docker's configuration files pad with NULs at times.
        let text = self.auth.trim_end_matches('\0');
        let decoded = STANDARD.decode(text).ok()?;
        let (user, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
        let password = password.trim_end_matches('\0');
        (!user.is_empty()).then(|| (user.to_owned(), password.to_owned()))
    }

    /// Whether these are for `host` (`host[:port]`), when the image's registry is `registry`.
    pub(crate) fn are_for(&self, host: &str, registry: &str) -> bool {
        let owner = match self.server_address.trim() {
            "" => registry,
            address => {
                let address = address.split_once("://").map_or(address, |(_, rest)| rest);
                address.split('/').next().unwrap_or_default()
            }
        };
        canonical(host) == canonical(owner)
    }
}

/// Docker Hub has one name in references, another for its API and a third in old configurations.
pub(crate) fn canonical(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    match host.strip_suffix(":443").unwrap_or(&host) {
        "registry-1.docker.io" | "index.docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_secret() {
        let secret = "hunter2".to_owned();
        let credentials = Credentials {
            username: secret.clone(),
            password: secret.clone(),
            auth: secret.clone(),
            identity_token: secret.clone(),
            registry_token: secret.clone(),
            server_address: "r.io".to_owned(),
        };
        let text = format!("{credentials:?} {credentials:#?}");
        assert!(!text.contains(&secret), "{text}");
    }

    #[test]
    fn auth_is_the_older_spelling_of_user_and_password() {
        let pair = |auth: &str| {
            Credentials {
                auth: auth.to_owned(),
                ..Default::default()
            }
            .basic()
        };
        assert_eq!(pair("dTpwOnc="), Some(("u".into(), "p:w".into())));
        assert_eq!(pair("dTpw\0"), Some(("u".into(), "p".into())));
        assert_eq!(pair("not base64!"), None);
        assert_eq!(pair("dXA="), None);
    }

    #[test]
    fn credentials_are_bound_to_their_host() {
        let of = |server: &str| Credentials {
            server_address: server.into(),
            ..Default::default()
        };
        assert!(of("").are_for("r.io:5000", "r.io:5000"));
        assert!(!of("").are_for("mirror.io", "r.io"));
        assert!(of("https://r.io/v1/").are_for("r.io", "r.io"));
        assert!(of("https://index.docker.io/v1/").are_for("registry-1.docker.io", "docker.io"));
        assert!(!of("https://other.io").are_for("r.io", "r.io"));
        assert!(!of("r.io").are_for("r.io:5000", "r.io:5000"));
    }
}
