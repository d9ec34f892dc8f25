//! A network configuration list, and what each plugin of it is told (CNI spec, sections 1 and 4).

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::version::Version;

/// A network: a chain of plugins that are executed one after the other. Serialises as the
/// configuration list that it was read from, less what only the loader needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Network {
    pub name: String,
    /// The version that plugins are spoken to in.
    #[serde(rename = "cniVersion")]
    pub version: String,
    #[serde(default, rename = "disableGC")]
    pub disable_gc: bool,
    pub plugins: Vec<Map<String, Value>>,
}

/// The file as people write it.
#[derive(Deserialize)]
struct List {
    name: Option<String>,
    #[serde(rename = "cniVersion")]
    version: Option<String>,
    #[serde(default, rename = "cniVersions")]
    versions: Vec<String>,
    #[serde(default, rename = "disableGC")]
    disable_gc: bool,
    #[serde(default)]
    plugins: Vec<Map<String, Value>>,
}

impl Network {
    /// Parses a configuration list (`.conflist`). The error says what is wrong with it.
    pub fn from_list(text: &[u8]) -> Result<Self, String> {
        let list: List = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let version = choose_version(list.version.iter().chain(&list.versions))?;
        let name = list.name.ok_or("has no name")?;
        Self {
            name,
            version,
            disable_gc: list.disable_gc,
            plugins: list.plugins,
        }
        .checked()
    }

    /// Parses the configuration of a single plugin (`.conf`, `.json`) as a chain of one.
    pub fn from_single(text: &[u8]) -> Result<Self, String> {
        let plugin: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let string = |key: &str| plugin.get(key).and_then(Value::as_str).map(str::to_owned);
        let version = choose_version(string("cniVersion").iter())?;
        let name = string("name").ok_or("has no name")?;
        Self {
            name,
            version,
            disable_gc: false,
            plugins: vec![plugin],
        }
        .checked()
    }

    /// The version; what we were given back is checked like what was read.
    pub fn version(&self) -> Result<Version, String> {
        choose_version([&self.version].into_iter())?;
        Version::parse(&self.version).ok_or_else(|| "has no version".to_owned())
    }

    pub fn checked(self) -> Result<Self, String> {
        self.version()?;
        if !is_name(&self.name) {
            return Err(format!(
                "name {:?} is not of letters, digits, `_`, `.`, `-`",
                self.name
            ));
        }
        if self.plugins.is_empty() {
            return Err("has no plugins".into());
        }
        for plugin in &self.plugins {
            let kind = plugin_type(plugin);
            // It is joined to a directory and executed (CVE-2021-20206).
            if kind.is_empty() || kind.contains(['/', '\0']) || kind == "." || kind == ".." {
                return Err(format!("plugin type {kind:?} is not the name of a file"));
            }
        }
        Ok(self)
    }
}

/// The name of the executable; empty when there is none.
pub fn plugin_type(plugin: &Map<String, Value>) -> &str {
    plugin
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// Network names and container ids (CNI spec: start alphanumeric, then also `_`, `.`, `-`).
fn is_name(name: &str) -> bool {
    let byte = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    name.bytes()
        .next()
        .is_some_and(|first| first.is_ascii_alphanumeric())
        && name.bytes().all(byte)
}

/// The newest of the offered versions that we speak.
fn choose_version<'a>(offered: impl Iterator<Item = &'a String>) -> Result<String, String> {
    let mut seen = Vec::new();
    let known = offered
        .inspect(|text| seen.push((*text).clone()))
        .filter_map(|text| Version::parse(text))
        .filter(|version| version.supported())
        .max();
    known.map(|version| version.to_string()).ok_or_else(|| {
        let (oldest, newest) = (Version::OLDEST, Version::NEWEST);
        format!("cniVersion {seen:?} has none of {oldest} to {newest}")
    })
}

/// What a plugin reads on stdin: its own configuration with name and version of the network, the
/// capabilities it declared turned into their values, and the result of the plugin before it.
pub fn execution_config(
    network: &Network,
    plugin: &Map<String, Value>,
    runtime_config: Option<&Map<String, Value>>,
    previous: Option<&Value>,
) -> Map<String, Value> {
    let mut config = plugin.clone();
    // Ours to set; a file that holds them must not speak for us.
    config.retain(|key, _| {
        !matches!(
            key.as_str(),
            "capabilities" | "runtimeConfig" | "prevResult" | "cniVersions"
        ) && !key.starts_with("cni.dev/")
    });
    config.insert("name".into(), network.name.clone().into());
    config.insert("cniVersion".into(), network.version.clone().into());
    if let Some(runtime_config) = runtime_config.filter(|values| !values.is_empty()) {
        config.insert("runtimeConfig".into(), runtime_config.clone().into());
    }
    if let Some(previous) = previous {
        config.insert("prevResult".into(), previous.clone());
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn list(value: Value) -> Result<Network, String> {
        Network::from_list(value.to_string().as_bytes())
    }

    #[test]
    fn a_list_is_read() {
        let network = list(json!({
            "cniVersion": "0.4.0", "cniVersions": ["1.0.0", "1.1.0", "9.0.0"],
            "name": "pods", "disableGC": true, "plugins": [{"type": "bridge"}],
        }))
        .unwrap();
        assert_eq!(
            (network.name.as_str(), network.version.as_str()),
            ("pods", "1.1.0")
        );
        assert!(network.disable_gc);
        // What is recorded reads back as the same.
        let text = serde_json::to_vec(&network).unwrap();
        assert_eq!(Network::from_list(&text).unwrap(), network);
    }

    #[test]
    fn bad_lists_say_what_is_wrong() {
        for (value, what) in [
            (
                json!({"cniVersion": "1.0.0", "plugins": [{"type": "a"}]}),
                "name",
            ),
            (
                json!({"cniVersion": "1.0.0", "name": "a/b", "plugins": [{"type": "a"}]}),
                "name",
            ),
            (
                json!({"cniVersion": "1.0.0", "name": "n", "plugins": []}),
                "no plugins",
            ),
            (
                json!({"cniVersion": "1.0.0", "name": "n", "plugins": [{}]}),
                "type",
            ),
            (
                json!({"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "../../bin/sh"}]}),
                "type",
            ),
            (
                json!({"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": ".."}]}),
                "type",
            ),
            (
                json!({"cniVersion": "0.2.0", "name": "n", "plugins": [{"type": "a"}]}),
                "0.2.0",
            ),
            (
                json!({"name": "n", "plugins": [{"type": "a"}]}),
                "cniVersion",
            ),
            (json!([]), "invalid"),
        ] {
            let error = list(value.clone()).unwrap_err();
            assert!(error.contains(what), "{value}: {error}");
        }
    }

    #[test]
    fn a_single_plugin_is_a_chain_of_one() {
        let text = json!({"cniVersion": "0.3.1", "name": "one", "type": "ptp"}).to_string();
        let network = Network::from_single(text.as_bytes()).unwrap();
        assert_eq!(network.plugins.len(), 1);
        assert!(Network::from_single(br#"{"cniVersion": "0.3.1", "name": "x"}"#).is_err());
    }

    #[test]
    fn a_plugin_is_told_the_network_and_not_the_loaders_words() {
        let network = list(json!({
            "cniVersion": "1.0.0", "name": "pods",
            "plugins": [{
                "type": "portmap", "snat": true, "name": "x", "capabilities": {"portMappings": true},
                "prevResult": {"fake": 1}, "runtimeConfig": {"fake": 1}, "cni.dev/x": 1,
            }],
        }))
        .unwrap();
        let values = json!({"portMappings": []});
        let config = execution_config(
            &network,
            &network.plugins[0],
            values.as_object(),
            Some(&json!({"ips": []})),
        );
        assert_eq!(
            Value::from(config),
            json!({
                "type": "portmap", "snat": true, "name": "pods", "cniVersion": "1.0.0",
                "runtimeConfig": {"portMappings": []}, "prevResult": {"ips": []},
            })
        );
    }
}
