//! Where a container lives: its own mount namespace, the pod's or the host's others.

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

use crate::Error;
use crate::container::{Draft, Input};
use crate::resolved::{CgroupVersion, Namespace};

/// Step.
pub(crate) fn namespaces(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let wanted = &input.resolved.namespaces;
    let mut list = vec![own(LinuxNamespaceType::Mount)];
    if wanted.user == Namespace::New {
        return Err(Error::Internal {
            field: "resolved.namespaces.user".into(),
            reason: "a container joins the user namespace of its pod and has none of its own"
                .into(),
        });
    }
    for (kind, namespace) in [
        (LinuxNamespaceType::User, &wanted.user),
        (LinuxNamespaceType::Network, &wanted.network),
        (LinuxNamespaceType::Ipc, &wanted.ipc),
        (LinuxNamespaceType::Uts, &wanted.uts),
        (LinuxNamespaceType::Pid, &wanted.pid),
    ] {
        match namespace {
            Namespace::Host => {}
            Namespace::New => list.push(own(kind)),
            Namespace::Join(path) => {
                let mut joined = own(kind);
                joined.set_path(Some(path.clone()));
                list.push(joined);
            }
        }
    }
    // Under v1 a cgroup namespace hides nothing of use; a privileged container manages the host's
    // cgroups and must see them.
    if input.resolved.cgroup.node.version == CgroupVersion::V2 && !input.privileged() {
        list.push(own(LinuxNamespaceType::Cgroup));
    }
    draft.linux.set_namespaces(Some(list));
    Ok(())
}

fn own(kind: LinuxNamespaceType) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind);
    namespace
}
