//! What the supervisor is told at start and never changes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::cgroup::Cgroups;
use crate::host::Host;

/// An OCI runtime under the name that a RuntimeClass uses.
#[derive(Clone, Debug)]
pub struct Handler {
    /// Absolute path of the binary.
    pub binary: PathBuf,
    /// `--root` of the runtime.
    pub root: PathBuf,
    pub features: HandlerFeatures,
    /// Name of the snapshotter that makes its containers' roots; one of the node's.
    pub snapshotter: String,
    /// Names of annotations that reach the OCI spec; a trailing `*` stands for any ending.
    pub annotations: Vec<String>,
}

/// What the runtime said of itself at start (`features` and `--version`).
#[derive(Clone, Debug, Default)]
pub struct HandlerFeatures {
    /// As `--version` tells it.
    pub version: String,
    pub recursive_read_only_mounts: bool,
    /// Why pods cannot have user namespaces: runtime, kernel or file system; `None` when they can.
    pub no_user_namespaces: Option<String>,
    /// It can install system call filters, as far as it tells.
    pub seccomp: bool,
    /// Advisories that this version is too old for, by its number; `None` if none is known.
    pub known_holes: Option<String>,
    /// Why the runtime cannot be used; `None` when it can.
    pub unusable: Option<String>,
}

#[derive(Clone, Debug)]
pub struct Settings {
    /// `/var/lib/gantry`: records, images, layers.
    pub root: PathBuf,
    /// Where images and layers are kept; may be below `root`.
    pub image_root: PathBuf,
    /// `/run/gantry`: run directories, on a tmpfs.
    pub state: PathBuf,
    /// Directory of pinned network namespaces, `/var/run/netns`.
    pub netns_dir: PathBuf,
    /// Path of gantry-shim.
    pub shim: PathBuf,
    /// By name; the default handler is also found under its own name.
    pub handlers: BTreeMap<String, Handler>,
    pub default_handler: String,
    pub cgroups: Cgroups,
    /// What the node's cgroups can do.
    pub cgroup_node: gantry_spec::resolved::CgroupNode,
    /// What the kernel has to confine containers with.
    pub host: Host,
    /// Directories of CDI specs; the devices of a later one go before those of an earlier.
    pub cdi_dirs: Vec<PathBuf>,
    /// Device nodes belong to the user that a container is asked to run as.
    pub device_ownership: bool,
    /// What containers get; empty: what the shim has.
    pub rlimits: Vec<oci_spec::runtime::PosixRlimit>,
    /// OOM score adjustment of each shim; clamped to what the kernel lets us write.
    pub shim_oom_score_adj: i32,
    /// Soft limit of open files that shims and containers inherit: ours before we raised it.
    pub open_files: u64,
    /// Pods with a network of their own may bind low ports without a capability.
    pub unprivileged_ports: bool,
    /// And send pings.
    pub unprivileged_icmp: bool,
    pub timeouts: Timeouts,
    /// Identifies this boot (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
    /// Pods that recovery works on at the same time.
    pub recovery_parallelism: usize,
}

#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// From starting a shim to its Ready.
    pub shim_start: Duration,
    /// A request that a shim answers from memory.
    pub shim_call: Duration,
    /// One call of the OCI runtime.
    pub runtime: Duration,
    /// How long a container may take to die of SIGKILL.
    pub kill: Duration,
    /// After an ExecSync's process ended: how long its output may stay open.
    pub exec_drain: Duration,
    /// After the client of an Exec has gone: how long the command may take to end by itself.
    pub exec_grace: Duration,
    /// Recovery of one pod.
    pub recovery: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            shim_start: Duration::from_secs(10),
            shim_call: Duration::from_secs(5),
            runtime: Duration::from_secs(60),
            kill: Duration::from_secs(10),
            exec_drain: Duration::from_secs(2),
            exec_grace: Duration::from_secs(5),
            recovery: Duration::from_secs(10),
        }
    }
}

impl Settings {
    /// The handler of a request; the empty name means the default one.
    pub fn handler(&self, name: &str) -> Option<&Handler> {
        let name = if name.is_empty() {
            &self.default_handler
        } else {
            name
        };
        self.handlers.get(name)
    }
}
