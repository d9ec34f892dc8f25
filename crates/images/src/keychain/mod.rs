//! Credentials that the node itself has: for pulls whose request brings none.
//!
//! Everything is read anew for each pull, so that a rotated secret needs no restart; nothing is
//! kept, and nothing of it is ever shown. A host's credentials are looked for only once it has
//! asked for some.

mod docker;
mod helper;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::credentials::{Credentials, canonical};
use crate::reference::Reference;
use crate::service::blocking;
use crate::{Error, Result};

pub use helper::is_name as is_helper_name;

/// Most bytes of a file with a secret.
const SECRET_MAX: u64 = 64 << 10;

/// Where credentials come from; the first place that has some for a host wins.
#[derive(Clone, Debug, Default)]
pub struct Keychain {
    /// By `host[:port]`.
    pub hosts: BTreeMap<String, HostCredentials>,
    /// A `config.json` of docker's.
    pub docker_config: Option<PathBuf>,
    /// Where `docker-credential-*` programs are; without it they are looked for in PATH.
    pub helper_dir: Option<PathBuf>,
}

/// The credentials of one host, by reference: secrets stay in files of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCredentials {
    pub username: String,
    pub password_file: Option<PathBuf>,
    /// OAuth2 refresh token.
    pub identity_token_file: Option<PathBuf>,
    /// Bearer token.
    pub registry_token_file: Option<PathBuf>,
    /// Name of a credential helper: `ecr-login` is the program `docker-credential-ecr-login`.
    pub helper: Option<String>,
}

impl Keychain {
    /// Credentials for `host` (`host[:port]`) when it is asked for `reference`.
    pub(crate) async fn find(
        &self,
        host: &str,
        reference: &Reference,
    ) -> Result<Option<Credentials>> {
        let wanted = canonical(host);
        let own = self
            .hosts
            .iter()
            .find(|(name, _)| canonical(name) == wanted);
        if let Some((_, own)) = own {
            return match &own.helper {
                Some(name) => self.ask(name, host).await,
                None => {
                    let own = own.clone();
                    let read = blocking("credentials", move || own.read().map(Some));
                    read.await
                }
            };
        }
        let Some(path) = self.docker_config.clone() else {
            return Ok(None);
        };
        let path_of_image = format!("{wanted}/{}", reference.path());
        let found = blocking("credentials", move || {
            docker::Config::read(&path).map(|config| config.find(&wanted, &path_of_image))
        });
        match found.await? {
            docker::Found::Nothing => Ok(None),
            docker::Found::Credentials(credentials) => Ok(Some(credentials)),
            docker::Found::Helper(name) => self.ask(&name, host).await,
        }
    }

    async fn ask(&self, name: &str, host: &str) -> Result<Option<Credentials>> {
        helper::get(self.helper_dir.as_deref(), name, host)
            .await
            .map_err(|reason| Error::Credentials {
                host: host.to_owned(),
                reason,
            })
    }
}

impl HostCredentials {
    fn read(&self) -> Result<Credentials> {
        let secret = |file: &Option<PathBuf>| match file {
            None => Ok(String::new()),
            Some(path) => read_file(path, SECRET_MAX).map(|text| text.trim_end().to_owned()),
        };
        Ok(Credentials {
            username: self.username.clone(),
            password: secret(&self.password_file)?,
            identity_token: secret(&self.identity_token_file)?,
            registry_token: secret(&self.registry_token_file)?,
            ..Credentials::default()
        })
    }
}

/// A text file of at most `limit` bytes. The error names the file and shows nothing of it.
fn read_file(path: &Path, limit: u64) -> Result<String> {
    use std::io::Read;
    let fail = |e| Error::io(format_args!("read {}", path.display()), e);
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(fail)?;
    file.take(limit + 1)
        .read_to_string(&mut text)
        .map_err(fail)?;
    if text.len() as u64 > limit {
        return Err(Error::Limit {
            what: format!("read {}", path.display()),
            limit,
            unit: "bytes",
        });
    }
    Ok(text)
}
