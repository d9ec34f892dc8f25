//! What an OCI runtime and the kernel say that they can.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// What critest's own skips depend on. Asked of the runtime and the kernel, never of gantry: a
/// gantry that denies a feature must not excuse itself from its specs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    pub apparmor: bool,
    pub idmap: bool,
    pub rro: bool,
}

impl Facts {
    pub fn ask(binary: &Path) -> Result<Self> {
        let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
        let output = Command::new(binary)
            .arg("features")
            .output()
            .with_context(|| format!("run {}", binary.display()))?;
        // A runtime without that command is an old one that can none of it.
        let features = match output.status.success() {
            true => serde_json::from_slice(&output.stdout)
                .with_context(|| format!("{} features", binary.display()))?,
            false => Value::Null,
        };
        Ok(Self {
            apparmor: enabled.is_ok_and(|text| text.starts_with('Y')),
            ..Self::of(&features)
        })
    }

    /// From the document of OCI runtime-spec, features.md.
    fn of(features: &Value) -> Self {
        let idmap = &features["linux"]["mountExtensions"]["idmap"]["enabled"];
        let options = features["mountOptions"].as_array();
        Self {
            apparmor: false,
            idmap: idmap.as_bool() == Some(true),
            rro: options.is_some_and(|options| options.iter().any(|option| option == "rro")),
        }
    }
}

/// First line of `BINARY --version`.
pub fn version(binary: &Path) -> Result<String> {
    let output = Command::new(binary)
        .arg("--version")
        .output()
        .with_context(|| format!("run {}", binary.display()))?;
    ensure!(
        output.status.success(),
        "{}: {}",
        binary.display(),
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn absent_features_are_none() {
        let none = Facts::of(&Value::Null);
        assert!(!none.idmap && !none.rro);
        let all = Facts::of(&json!({
            "mountOptions": ["ro", "rro"],
            "linux": {"mountExtensions": {"idmap": {"enabled": true}}},
        }));
        assert!(all.idmap && all.rro);
    }
}
