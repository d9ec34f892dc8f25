//! Values for the capabilities that plugins declare (CNI CONVENTIONS.md): facts of the pod that
//! no file can know.

use gantry_ports::network::{Attachment, PortMapping, Protocol};
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::quantity;

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// Bits per second that the annotations may ask for, as kubelets have always bounded them.
const BANDWIDTH: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// `runtimeConfig` for a plugin: those of its declared capabilities that the pod has values for.
pub fn runtime_config(
    plugin: &Map<String, Value>,
    pod: &Attachment,
) -> Result<Map<String, Value>, Error> {
    let mut values = Map::new();
    let declared = plugin.get("capabilities").and_then(Value::as_object);
    for (capability, enabled) in declared.into_iter().flatten() {
        if enabled != &Value::Bool(true) {
            continue;
        }
        if let Some(value) = value(capability, pod)? {
            values.insert(capability.clone(), value);
        }
    }
    Ok(values)
}

fn value(capability: &str, pod: &Attachment) -> Result<Option<Value>, Error> {
    Ok(match capability {
        "portMappings" => {
            let mapped = pod
                .port_mappings
                .iter()
                .filter(|mapping| mapping.host_port != 0);
            let list: Vec<Value> = mapped.map(port_mapping).collect();
            (!list.is_empty()).then(|| list.into())
        }
        "bandwidth" => bandwidth(pod)?,
        "dns" => pod.dns.as_ref().map(
            |dns| json!({"servers": dns.servers, "searches": dns.searches, "options": dns.options}),
        ),
        "cgroupPath" => (!pod.cgroup_parent.is_empty()).then(|| pod.cgroup_parent.clone().into()),
        "io.kubernetes.cri.pod-annotations" => Some(json!(pod.annotations)),
        // Declared for other runtimes (ips, mac, aliases, ...): a pod says nothing of them.
        _ => None,
    })
}

fn port_mapping(mapping: &PortMapping) -> Value {
    let protocol = match mapping.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    json!({
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": protocol,
        "hostIP": mapping.host_ip,
    })
}

fn bandwidth(pod: &Attachment) -> Result<Option<Value>, Error> {
    let mut values = Map::new();
    for (annotation, direction) in [(INGRESS, "ingress"), (EGRESS, "egress")] {
        let Some(text) = pod.annotations.get(annotation) else {
            continue;
        };
        let rate = quantity::parse(text).filter(|rate| BANDWIDTH.contains(rate));
        let rate = rate.ok_or_else(|| Error::Pod {
            field: format!("annotations[{annotation}]"),
            reason: format!("{text:?} is not a quantity from 1k to 1P"),
        })?;
        values.insert(format!("{direction}Rate"), rate.into());
        // The plugin demands a burst; the largest it takes shapes by rate alone.
        values.insert(format!("{direction}Burst"), u32::MAX.into());
    }
    Ok((!values.is_empty()).then(|| values.into()))
}
