//! Annotations of the spec: who the container is, for runtimes that group by pod and for node
//! agents. What the pod's author writes reaches a runtime only by the administrator's leave,
//! because runtimes act on annotations.

use crate::Error;
use crate::container::{Draft, Input};

/// Ours, with the names that containerd gave them: VM runtimes and agents read these.
const PREFIX: &str = "io.kubernetes.cri.";

/// The annotation that names a container's pod by its id.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// Would set any property of the container's systemd unit (CVE-2024-3154).
const SYSTEMD: &str = "org.systemd.property.";

/// Step.
pub(crate) fn annotations(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let container = input.config.metadata.as_ref();
    let container =
        container.ok_or_else(|| Error::invalid("metadata", "a container needs a name"))?;
    let pod = input.sandbox.metadata.as_ref();
    let pod = pod.ok_or_else(|| Error::invalid("sandbox_config.metadata", "is missing"))?;

    // The container's go after the pod's and thereby win.
    for (name, value) in input
        .sandbox
        .annotations
        .iter()
        .chain(&input.config.annotations)
    {
        if passes(name, &input.resolved.annotations) {
            draft.annotations.insert(name.clone(), value.clone());
        }
    }
    for (name, value) in [
        ("container-type", "container"),
        ("container-name", &container.name),
        ("image-name", &input.resolved.image.name),
        ("sandbox-name", &pod.name),
        ("sandbox-namespace", &pod.namespace),
        ("sandbox-uid", &pod.uid),
    ] {
        draft
            .annotations
            .insert(format!("{PREFIX}{name}"), value.to_owned());
    }
    let id = input.resolved.pod.to_string();
    draft.annotations.insert(SANDBOX_ID.to_owned(), id);
    Ok(())
}

fn passes(name: &str, patterns: &[String]) -> bool {
    let reserved = name.starts_with(PREFIX) || name.starts_with(SYSTEMD);
    let matches = |pattern: &String| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    };
    !reserved && patterns.iter().any(matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_allowed_passes_and_never_what_is_reserved() {
        let allowed = ["io.katacontainers.*".to_owned(), "example.com/x".to_owned()];
        assert!(passes("io.katacontainers.config", &allowed));
        assert!(passes("example.com/x", &allowed));
        assert!(!passes("example.com/xy", &allowed));
        assert!(!passes("other", &[]));
        let all = ["*".to_owned(), "org.systemd.property.X".to_owned()];
        assert!(passes("other", &all));
        assert!(!passes("org.systemd.property.X", &all));
        assert!(!passes("io.kubernetes.cri.sandbox-id", &all));
    }
}
