//! What a plugin answers (CNI spec, section 5).

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::version::Version;

/// Parses the result of ADD and brings it to the version that the chain is spoken to in: an older
/// plugin may answer in another, and the next one reads it as `prevResult`.
pub fn parse(stdout: &[u8], version: Version) -> Result<Value, String> {
    let mut result: Map<String, Value> =
        serde_json::from_slice(stdout).map_err(|error| error.to_string())?;
    let answered = result.get("cniVersion").and_then(Value::as_str);
    if let Some(unknown) = answered.filter(|it| !Version::parse(it).is_some_and(Version::supported))
    {
        return Err(format!("cniVersion {unknown:?} is not one we know"));
    }
    result.insert("cniVersion".into(), version.to_string().into());
    let addresses = result.get_mut("ips").and_then(Value::as_array_mut);
    for address in addresses
        .into_iter()
        .flatten()
        .filter_map(Value::as_object_mut)
    {
        convert_address(address, version);
    }
    Ok(Value::Object(result))
}

/// Before 1.0 each address says its family; after it none does.
fn convert_address(address: &mut Map<String, Value>, version: Version) {
    if version >= Version::V1_0 {
        address.remove("version");
    } else if !address.contains_key("version") {
        let text = address.get("address").and_then(Value::as_str);
        let family = if text.is_some_and(|text| text.contains(':')) {
            "6"
        } else {
            "4"
        };
        address.insert("version".into(), family.into());
    }
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Address>,
}

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct Address {
    address: String,
    interface: Option<i64>,
}

/// Addresses of the pod's interface, in the plugin's order: the first decides the pod's family.
/// Those of other interfaces, such as a bridge of the host, are not the pod's.
pub fn addresses(result: &Value, ifname: &str) -> Result<Vec<IpAddr>, String> {
    let answer = Answer::deserialize(result).map_err(|error| error.to_string())?;
    let mut found = Vec::new();
    for address in &answer.ips {
        let interface = address.interface.map(|index| {
            usize::try_from(index)
                .ok()
                .and_then(|index| answer.interfaces.get(index))
                .ok_or_else(|| format!("address {} is of no listed interface", address.address))
        });
        if let Some(interface) = interface {
            let interface = interface?;
            if interface.sandbox.is_empty() || interface.name != ifname {
                continue;
            }
        }
        let text = address.address.split('/').next().unwrap_or_default();
        let ip = text
            .parse()
            .map_err(|_| format!("{:?} is no address", address.address))?;
        found.push(ip);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn v(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    #[test]
    fn addresses_keep_their_order_and_leave_the_hosts_out() {
        let result = json!({
            "interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": "/x"},
                           {"name": "net1", "sandbox": "/x"}],
            "ips": [
                {"address": "fd00::2/64", "interface": 1},
                {"address": "10.0.0.1/24", "interface": 0},
                {"address": "10.0.0.2/24", "interface": 1},
                {"address": "10.9.0.2/24", "interface": 2},
                {"address": "10.0.0.3/24"},
            ],
        });
        let found = addresses(&result, "eth0").unwrap();
        let text: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["fd00::2", "10.0.0.2", "10.0.0.3"]);
    }

    #[test]
    fn junk_is_an_error() {
        for junk in [
            json!({"ips": [{"address": "nonsense"}]}),
            json!({"ips": [{"address": "10.0.0.2/24", "interface": 7}]}),
            json!({"ips": [{"address": "10.0.0.2/24", "interface": -1}]}),
            json!({"ips": [{}]}),
            json!({"ips": "none"}),
        ] {
            assert!(addresses(&junk, "eth0").is_err(), "{junk}");
        }
        for junk in ["", "[]", "null", "{", r#"{"cniVersion": "7.0.0"}"#] {
            assert!(parse(junk.as_bytes(), v("1.0.0")).is_err(), "{junk}");
        }
    }

    #[test]
    fn results_are_brought_to_the_version_of_the_chain() {
        let old = br#"{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.0.0.2/24"}]}"#;
        assert_eq!(
            parse(old, v("1.0.0")).unwrap(),
            json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}]})
        );
        let new = br#"{"cniVersion":"1.0.0","ips":[{"address":"fd00::2/64"}]}"#;
        assert_eq!(
            parse(new, v("0.4.0")).unwrap(),
            json!({"cniVersion": "0.4.0", "ips": [{"version": "6", "address": "fd00::2/64"}]})
        );
    }
}
