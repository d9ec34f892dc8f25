//! User namespaces of pods: which ids of the host stand for those inside.

use gantry_cri_api::v1::{IdMapping, NamespaceMode, NamespaceOption};

use crate::Error;

const FIELD: &str = "linux.security_context.namespace_options.userns_options";

/// Ids from 0 on inside are ids from `host_uid` and `host_gid` on outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub host_uid: u32,
    pub host_gid: u32,
    /// How many user ids there are inside.
    pub uids: u32,
    /// How many group ids.
    pub gids: u32,
}

/// The user namespace that a pod asks for; `None`: the host's.
///
/// # Errors
/// InvalidArgument for anything but exactly one mapping of user ids and one of group ids, which
/// begin at root and end before the last id; for other modes than POD and NODE; for a pod that
/// shares the host's PIDs or IPC, which its root would have no power over and could not mount.
pub fn of_pod(options: &NamespaceOption) -> Result<Option<Mapping>, Error> {
    let Some(asked) = &options.userns_options else {
        return Ok(None);
    };
    match asked.mode() {
        NamespaceMode::Node if asked.uids.is_empty() && asked.gids.is_empty() => return Ok(None),
        NamespaceMode::Node => {
            return Err(Error::invalid(FIELD, "mode NODE has no mappings"));
        }
        NamespaceMode::Pod => {}
        NamespaceMode::Container | NamespaceMode::Target => {
            return Err(Error::invalid(
                format!("{FIELD}.mode"),
                "is POD or NODE: all containers of a pod share one",
            ));
        }
    }
    for (name, mode) in [("pid", options.pid()), ("ipc", options.ipc())] {
        if mode == NamespaceMode::Node {
            return Err(Error::invalid(
                format!("linux.security_context.namespace_options.{name}"),
                "is the host's, which a user namespace cannot be combined with",
            ));
        }
    }
    let (host_uid, uids) = one("uids", &asked.uids)?;
    let (host_gid, gids) = one("gids", &asked.gids)?;
    Ok(Some(Mapping {
        host_uid,
        host_gid,
        uids,
        gids,
    }))
}

/// First host id and length of the only mapping.
fn one(name: &str, mappings: &[IdMapping]) -> Result<(u32, u32), Error> {
    let invalid = |reason: String| Error::invalid(format!("{FIELD}.{name}"), reason);
    let [mapping] = mappings else {
        return Err(invalid(format!(
            "{} mappings, of which there must be one",
            mappings.len()
        )));
    };
    if mapping.container_id != 0 {
        return Err(invalid("does not map id 0".to_owned()));
    }
    // The last id, -1 to setuid(2), belongs to nobody.
    let end = mapping.host_id.checked_add(mapping.length);
    if mapping.length == 0 || end.is_none() {
        return Err(invalid(format!(
            "{} ids from {} on are not a range of ids",
            mapping.length, mapping.host_id
        )));
    }
    Ok((mapping.host_id, mapping.length))
}

/// Checks that a container asks for the user namespace of its pod, or for none in particular.
///
/// # Errors
/// InvalidArgument for another one.
pub fn check_container(pod: &NamespaceOption, container: &NamespaceOption) -> Result<(), Error> {
    let Some(asked) = &container.userns_options else {
        return Ok(());
    };
    let same = match &pod.userns_options {
        Some(of_pod) => of_pod == asked,
        None => {
            asked.mode() == NamespaceMode::Node && asked.uids.is_empty() && asked.gids.is_empty()
        }
    };
    if same {
        Ok(())
    } else {
        Err(Error::invalid(FIELD, "is not that of the pod sandbox"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_cri_api::v1::UserNamespace;

    fn map(host_id: u32, container_id: u32, length: u32) -> IdMapping {
        IdMapping {
            host_id,
            container_id,
            length,
        }
    }

    fn options(mode: NamespaceMode, uids: &[IdMapping], gids: &[IdMapping]) -> NamespaceOption {
        NamespaceOption {
            userns_options: Some(UserNamespace {
                mode: mode.into(),
                uids: uids.to_vec(),
                gids: gids.to_vec(),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_has_one_mapping_of_each_kind_or_none() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let (one, two) = (map(65_536, 0, 65_536), map(131_072, 65_536, 65_536));
        assert_eq!(of_pod(&NamespaceOption::default()).unwrap(), None);
        assert_eq!(of_pod(&options(Node, &[], &[])).unwrap(), None);
        let expected = Mapping {
            host_uid: 65_536,
            host_gid: 1,
            uids: 65_536,
            gids: 7,
        };
        let given = options(Pod, &[one], &[map(1, 0, 7)]);
        assert_eq!(of_pod(&given).unwrap(), Some(expected));
        for bad in [
            options(Pod, &[], &[]),
            options(Pod, &[one], &[]),
            options(Pod, &[], &[one]),
            options(Pod, &[one, two], &[one]),
            options(Pod, &[one], &[one, two]),
            options(Pod, &[two], &[two]),
            options(Pod, &[map(0, 0, 0)], &[one]),
            options(Pod, &[map(u32::MAX - 1, 0, 2)], &[one]),
            options(Node, &[one], &[one]),
            options(Container, &[one], &[one]),
            options(Target, &[one], &[one]),
        ] {
            let error = of_pod(&bad).unwrap_err().to_string();
            assert!(error.contains("userns_options"), "{error}");
        }
        for host in ["pid", "ipc"] {
            let mut bad = options(Pod, &[one], &[one]);
            match host {
                "pid" => bad.pid = Node.into(),
                _ => bad.ipc = Node.into(),
            }
            let error = of_pod(&bad).unwrap_err().to_string();
            assert!(error.contains(&format!(".{host}:")), "{error}");
        }
    }

    #[test]
    fn a_container_has_the_mapping_of_its_pod() {
        use NamespaceMode::{Node, Pod};
        let (one, other) = (map(65_536, 0, 65_536), map(131_072, 0, 65_536));
        let pod = options(Pod, &[one], &[one]);
        let none = NamespaceOption::default();
        assert!(check_container(&pod, &pod).is_ok());
        assert!(check_container(&pod, &none).is_ok());
        assert!(check_container(&none, &options(Node, &[], &[])).is_ok());
        assert!(check_container(&none, &pod).is_err());
        assert!(check_container(&pod, &options(Node, &[], &[])).is_err());
        assert!(check_container(&pod, &options(Pod, &[one], &[other])).is_err());
    }
}
