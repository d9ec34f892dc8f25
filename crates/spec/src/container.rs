//! The spec of a container: one visible list of steps, each a small function.

use std::collections::BTreeMap;

use gantry_cri_api::v1::{ContainerConfig, LinuxContainerSecurityContext, PodSandboxConfig};
use oci_spec::runtime::{Hooks, Linux, Mount, Process, Root, Spec};

use crate::{Error, Resolved};
use crate::{
    annotations, capabilities, cdi, devices, init, mounts, namespaces, process, seccomp, security,
};

/// Version of the runtime specification that we write. Nothing here needs a newer one, and older
/// crun releases refuse versions that they have not heard of.
const OCI_VERSION: &str = "1.1.0";

/// In the order they run. Where two could not change places, the reason stands beside them.
const STEPS: [Step; 20] = [
    // First, because every other step may rely on `privileged` being allowed.
    check_privileged,
    root,
    process::args,
    process::env,
    process::cwd,
    process::user,
    process::terminal,
    process::limits,
    capabilities::capabilities,
    namespaces::namespaces,
    // Defaults before those of the request, which replace defaults at the same place.
    mounts::defaults,
    // After the defaults: a later mount covers an earlier one.
    mounts::requested,
    // After arguments and mounts: it goes before the one and is the last of the other.
    init::init,
    devices::devices,
    // After what it overrides: a device's variables, mounts and hooks are the vendor's word.
    cdi::edits,
    // After devices: it adds to the resources that hold the device rules.
    cgroup,
    // After mounts: masking /proc/kcore needs /proc to be in the list.
    security::paths,
    security::profiles,
    // After capabilities: the default profile opens what they permit.
    seccomp::seccomp,
    annotations::annotations,
];

type Step = fn(&Input<'_>, &mut Draft) -> Result<(), Error>;

/// Builds the OCI spec of a container.
///
/// # Errors
/// InvalidArgument naming the field, for what cannot be honoured; FailedPrecondition for what
/// this node lacks.
pub fn container(
    config: &ContainerConfig,
    sandbox: &PodSandboxConfig,
    resolved: &Resolved,
) -> Result<Spec, Error> {
    let input = Input::new(config, sandbox, resolved);
    let mut draft = Draft::blank();
    for step in STEPS {
        step(&input, &mut draft)?;
    }
    Ok(draft.finish())
}

/// What the steps read.
pub(crate) struct Input<'a> {
    pub config: &'a ContainerConfig,
    pub sandbox: &'a PodSandboxConfig,
    pub resolved: &'a Resolved,
    /// The request's, or that of a request that asks for nothing.
    pub security: LinuxContainerSecurityContext,
}

impl<'a> Input<'a> {
    fn new(
        config: &'a ContainerConfig,
        sandbox: &'a PodSandboxConfig,
        resolved: &'a Resolved,
    ) -> Self {
        let linux = config.linux.as_ref();
        let security = linux
            .and_then(|linux| linux.security_context.clone())
            .unwrap_or_default();
        Self {
            config,
            sandbox,
            resolved,
            security,
        }
    }

    pub fn privileged(&self) -> bool {
        self.security.privileged
    }
}

/// What the steps write: a spec whose parts are always there.
pub(crate) struct Draft {
    pub root: Root,
    pub process: Process,
    pub mounts: Vec<Mount>,
    pub linux: Linux,
    pub annotations: BTreeMap<String, String>,
    pub hooks: Option<Hooks>,
}

impl Draft {
    /// Empties what oci-spec presets: its defaults are those of an interactive shell.
    fn blank() -> Self {
        let mut process = Process::default();
        process
            .set_args(None)
            .set_env(None)
            .set_no_new_privileges(None)
            .set_capabilities(None)
            .set_rlimits(None);
        let mut linux = Linux::default();
        linux
            .set_resources(None)
            .set_namespaces(None)
            .set_masked_paths(None)
            .set_readonly_paths(None);
        Self {
            root: Root::default(),
            process,
            mounts: Vec::new(),
            linux,
            annotations: BTreeMap::new(),
            hooks: None,
        }
    }

    fn finish(self) -> Spec {
        let mut spec = Spec::default();
        // No host name: the UTS namespace belongs to the pod and carries it already.
        spec.set_version(OCI_VERSION.into())
            .set_hostname(None)
            .set_root(Some(self.root))
            .set_process(Some(self.process))
            .set_mounts(Some(self.mounts))
            .set_linux(Some(self.linux))
            .set_hooks(self.hooks)
            .set_annotations(Some(self.annotations.into_iter().collect()));
        spec
    }
}

/// A pod that was not made privileged has no privileged containers.
fn check_privileged(input: &Input<'_>, _: &mut Draft) -> Result<(), Error> {
    let sandbox = input
        .sandbox
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let allowed = sandbox.is_some_and(|context| context.privileged);
    if input.privileged() && !allowed {
        return Err(Error::invalid(
            "linux.security_context.privileged",
            "the sandbox is not privileged",
        ));
    }
    Ok(())
}

fn root(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    draft
        .root
        .set_path(input.resolved.rootfs.clone())
        .set_readonly(Some(input.security.readonly_rootfs));
    Ok(())
}

fn cgroup(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let cgroup = &input.resolved.cgroup;
    let linux = input.config.linux.as_ref();
    let asked = linux
        .and_then(|linux| linux.resources.clone())
        .unwrap_or_default();
    let mut resources = crate::resources::create(&asked, cgroup.node)?;
    if let Some(rules) = draft
        .linux
        .resources()
        .as_ref()
        .and_then(|set| set.devices().clone())
    {
        resources.set_devices(Some(rules));
    }
    draft
        .linux
        .set_cgroups_path(Some(cgroup.path.clone().into()))
        .set_resources(Some(resources));
    Ok(())
}
