//! Which OCI runtimes there are, and what each can do.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_runtime::Features;
use gantry_supervisor::{Handler, HandlerFeatures};

use crate::config;

/// Looked for, in this order, when the configuration names no handler.
const KNOWN: [&str; 3] = ["runc", "crun", "youki"];

/// Where sudo and systemd look too; a daemon may be started with a bare PATH.
const FALLBACK_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// The handlers by name, and the name of the default one. `state` is where the runtimes keep
/// theirs.
pub fn find(
    config: &config::Runtime,
    images: &config::Images,
    state: &Path,
) -> Result<(BTreeMap<String, Handler>, String), config::Error> {
    let mut handlers = BTreeMap::new();
    if config.handlers.is_empty() {
        for name in KNOWN {
            if let Some(binary) = in_path(Path::new(name)) {
                let handler = config::Handler::default();
                handlers.insert(
                    name.to_owned(),
                    probe(name, binary, &handler, images, state),
                );
            }
        }
    }
    for (name, handler) in &config.handlers {
        let binary = in_path(&handler.binary).ok_or_else(|| config::Error::Invalid {
            key: "runtime.handlers",
            reason: format!("{name}: {} is not an executable", handler.binary.display()),
        })?;
        let handler = probe(name, binary, handler, images, state);
        handlers.insert(name.clone(), handler);
    }
    let default = if !config.default.is_empty() {
        config.default.clone()
    } else {
        KNOWN
            .iter()
            .map(|name| (*name).to_owned())
            .find(|name| handlers.contains_key(name))
            .or_else(|| handlers.keys().next().cloned())
            .unwrap_or_default()
    };
    if !handlers.is_empty() && !handlers.contains_key(&default) {
        return Err(config::Error::Invalid {
            key: "runtime.default",
            reason: format!("no handler {default:?} was found"),
        });
    }
    Ok((handlers, default))
}

/// Asks a runtime what it is. One that does not answer is kept and reported, so that the node can
/// say why it is not ready.
fn probe(
    name: &str,
    binary: PathBuf,
    handler: &config::Handler,
    images: &config::Images,
    state: &Path,
) -> Handler {
    let root = state.join("runtime").join(name);
    let runtime = gantry_runtime::Runtime::new(&binary);
    let features = match runtime.version(PROBE_LIMIT) {
        Err(error) => HandlerFeatures {
            unusable: Some(format!("{}: {error}", binary.display())),
            ..Default::default()
        },
        Ok(version) => {
            let told = runtime.features(PROBE_LIMIT).inspect_err(|error| {
                tracing::info!(handler = name, %error, "the runtime does not tell its features");
            });
            let has = |feature: fn(&Features) -> bool| told.as_ref().is_ok_and(feature);
            HandlerFeatures {
                known_holes: version.known_holes(),
                version: version.version,
                recursive_read_only_mounts: has(Features::recursive_read_only_mounts),
                no_user_namespaces: match &told {
                    Ok(features) if features.user_namespaces() => None,
                    Ok(_) => Some("the runtime cannot map the ids of mounts".to_owned()),
                    Err(_) => Some("the runtime does not tell its features".to_owned()),
                },
                // Older ones than the command: they can, and their error says so if not.
                seccomp: told
                    .as_ref()
                    .map_or(true, |features| features.linux.seccomp.enabled),
                unusable: None,
            }
        }
    };
    if let Some(advisories) = &features.known_holes {
        tracing::warn!(
            handler = name,
            version = features.version,
            advisories,
            "the runtime's version is older than the fix of known holes"
        );
    }
    match &features.unusable {
        None => tracing::info!(
            handler = name,
            binary = %binary.display(),
            version = features.version,
            "runtime handler"
        ),
        Some(reason) => tracing::error!(handler = name, reason, "runtime handler cannot be used"),
    }
    Handler {
        binary,
        root,
        features,
        snapshotter: handler.snapshotter(images).as_str().to_owned(),
        annotations: handler.annotations.clone(),
    }
}

/// An absolute path as it is, a bare name as PATH has it; `None` unless it can be executed.
pub fn in_path(name: &Path) -> Option<PathBuf> {
    let executable = |path: &Path| {
        std::fs::metadata(path)
            .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    if name.is_absolute() {
        return executable(name).then(|| name.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(std::env::split_paths(FALLBACK_PATH))
        .map(|dir| dir.join(name))
        .find(|path| executable(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_executed_is_found() {
        assert_eq!(in_path(Path::new("/bin/sh")), Some("/bin/sh".into()));
        assert!(in_path(Path::new("sh")).is_some());
        assert_eq!(in_path(Path::new("/etc/passwd")), None);
        assert_eq!(in_path(Path::new("no-such-runtime")), None);
    }

    #[test]
    fn a_runtime_that_does_not_answer_is_kept_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let (asked, images) = (config::Handler::default(), config::Images::default());
        let handler = probe("false", "/bin/false".into(), &asked, &images, dir.path());
        assert!(handler.features.unusable.unwrap().contains("/bin/false"));
    }
}
