//! What had to be read from image, host and pod before a spec can be built. Whoever fills this
//! does the I/O; everything after it is pure.

use std::path::PathBuf;

use gantry_types::{ContainerId, PodId};
use oci_spec::runtime::{Capabilities, PosixRlimit};

use crate::user::User;

/// All facts of one container.
#[derive(Clone, Debug)]
pub struct Resolved {
    pub pod: PodId,
    pub container: ContainerId,
    pub image: Image,
    /// From [`crate::user::resolve`].
    pub user: User,
    /// The mounted root file system, absolute.
    pub rootfs: PathBuf,
    pub cgroup: Cgroup,
    pub namespaces: Namespaces,
    /// The pod's host name, for `HOSTNAME`; the node's own with host network.
    pub hostname: String,
    pub files: PodFiles,
    /// One for each of the request's `mounts`, in their order.
    pub mounts: Vec<HostMount>,
    /// Image VOLUMEs, those of [`crate::mounts::volumes`].
    pub volumes: Vec<Volume>,
    /// The request's `devices`, expanded: a directory gives one for each node below it.
    pub devices: Vec<Device>,
    /// What the request's CDI devices change, from [`crate::cdi::find`]; their nodes are among
    /// `devices`.
    pub cdi: Vec<crate::cdi::Edits>,
    /// gantry-shim, which is also the init for containers that ask for one; static.
    pub init: PathBuf,
    /// All devices of the host: what a privileged container gets. May be empty otherwise.
    pub host_devices: Vec<Device>,
    pub capabilities: KnownCapabilities,
    /// The lowest OOM score adjustment that we may set: -1000, or our own in a user namespace.
    pub oom_score_adj_floor: i32,
    /// Empty leaves the limits that the runtime itself runs under.
    pub rlimits: Vec<PosixRlimit>,
    pub seccomp: Seccomp,
    pub apparmor: AppArmor,
    /// `None` where SELinux is off.
    pub selinux: Option<SelinuxLabels>,
    /// The handler can make recursive read-only mounts (`runtime features`: mount option `rro`).
    pub recursive_read_only: bool,
    /// Names of annotations of pod and container that reach the spec; a trailing `*` stands for
    /// any ending.
    pub annotations: Vec<String>,
}

/// The image's configuration (OCI image-spec config.md), as far as a process needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// The name for annotations, as the pod's author knows it.
    pub name: String,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub working_dir: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupVersion {
    V1,
    V2,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// `linux.cgroupsPath`: a path, or `slice:prefix:id` under the systemd driver.
    pub path: String,
    pub node: CgroupNode,
}

/// What the node's cgroups can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupNode {
    pub version: CgroupVersion,
    /// The hugetlb controller is there.
    pub hugetlb: bool,
    /// Swap is accounted (v2 `memory.swap.max`, v1 `memory.memsw.limit_in_bytes`).
    pub swap: bool,
}

/// Where a container lives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Namespace {
    #[default]
    Host,
    /// The container's own.
    New,
    /// Path of the namespace to join.
    Join(PathBuf),
}

/// Mount and, where due, cgroup namespaces are always the container's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    pub network: Namespace,
    pub ipc: Namespace,
    pub uts: Namespace,
    pub pid: Namespace,
    /// `New` means nothing here: the pod's user namespace is joined, as it owns the others.
    pub user: Namespace,
}

/// Files of the pod that a container sees unless the request mounts something there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFiles {
    /// For /etc/hosts. A kubelet mounts its own.
    pub hosts: Option<PathBuf>,
    /// For /etc/hostname.
    pub hostname: Option<PathBuf>,
    /// For /etc/resolv.conf.
    pub resolv_conf: Option<PathBuf>,
    /// For /dev/shm: the pod's tmpfs, or the host's /dev/shm with host IPC.
    pub shm: Option<PathBuf>,
}

/// The source of one mount of the request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostMount {
    /// Host path with symbolic links resolved, or where the image volume is mounted.
    pub source: PathBuf,
    /// Where on the host the mount that holds `source` is mounted; empty when the request's
    /// propagation is private and nobody looked.
    pub point: PathBuf,
    /// The mount that holds `source` is shared (`shared:` in mountinfo).
    pub shared: bool,
    /// It is a slave (`master:` in mountinfo).
    pub slave: bool,
}

/// A VOLUME of the image, with its content copied up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Absolute path in the container.
    pub destination: PathBuf,
    pub source: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Block,
    Character,
}

/// A device node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Absolute path in the container.
    pub path: PathBuf,
    pub kind: DeviceKind,
    pub major: u32,
    pub minor: u32,
    /// Permission bits of the node.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Any of `r`, `w`, `m`: what the cgroup allows.
    pub access: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownCapabilities {
    /// What a container gets that asks for nothing; see [`crate::capabilities::default_set`].
    pub default: Capabilities,
    /// All that there are for us to give: those that we hold ourselves, see
    /// [`crate::capabilities::from_mask`]. Usually that is what the kernel knows, but not where
    /// we run in a container ourselves.
    pub all: Capabilities,
}

/// A kernel's version as far as profiles ask for it; in text `6.12`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct KernelVersion {
    major: u32,
    minor: u32,
}

impl KernelVersion {
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// Of a release as uname(2) tells it: `6.12.9-amd64`.
    pub fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        let mut number = || numbers.next()?.parse().ok();
        Some(Self::new(number()?, number()?))
    }
}

impl TryFrom<String> for KernelVersion {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("{text:?} is no kernel version"))
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seccomp {
    /// Why no filter can be had: the kernel or the runtime is built without. `None`: both can.
    pub unsupported: Option<String>,
    /// The machine's, as Rust spells it (`std::env::consts::ARCH`).
    pub architecture: String,
    pub kernel: KernelVersion,
    /// Content of the file that a Localhost profile names; read by the resolver with a size cap.
    pub localhost: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AppArmor {
    /// The kernel has no AppArmor.
    #[default]
    Disabled,
    Enabled {
        /// Name of the profile that RuntimeDefault means.
        runtime_default: String,
        /// Names of the profiles that the kernel has now.
        loaded: Vec<String>,
    },
}

impl AppArmor {
    /// RuntimeDefault can be honoured, if only because there is nothing to honour.
    pub fn has_default(&self) -> bool {
        match self {
            Self::Disabled => true,
            Self::Enabled {
                runtime_default,
                loaded,
            } => loaded.contains(runtime_default),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SelinuxLabels {
    pub process: String,
    pub mount: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_parsed() {
        assert_eq!(
            KernelVersion::parse("6.12.9-amd64"),
            Some(KernelVersion::new(6, 12))
        );
        assert_eq!(KernelVersion::parse("4.8"), Some(KernelVersion::new(4, 8)));
        assert_eq!(
            KernelVersion::parse("6.1-rc3+"),
            Some(KernelVersion::new(6, 1))
        );
        assert!(KernelVersion::new(5, 4) > KernelVersion::new(4, 18));
        for junk in ["", "6", "x.y", "six"] {
            assert_eq!(KernelVersion::parse(junk), None);
        }
    }
}
