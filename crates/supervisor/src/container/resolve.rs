//! The reading that has to be done before a spec can be built: root file system, host, pod.
//!
//! Image content is not trusted: files are opened beneath the root, and only regular files of a
//! bounded size are read (CVE-2026-47262).

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use gantry_cri_api::v1 as cri;
use gantry_images::Image;
use gantry_spec::resolved::{
    Cgroup, KnownCapabilities, Namespace, Namespaces, PodFiles, Resolved, Seccomp, SelinuxLabels,
};
use gantry_spec::security::Profile;
use gantry_spec::user::User;
use gantry_sys::fs::OFlags;

use super::devices;
use super::root::Owners;
use crate::cgroup::Place;
use crate::pod::Asked;
use crate::registry::{ContainerFacts, PodFacts};
use crate::{Context, Error};

/// passwd and group of an image.
const MAX_ACCOUNTS: u64 = 10 << 20;

/// Whether the container's PID namespace is its own.
pub(super) fn own_pid_namespace(config: &cri::ContainerConfig, pod: Asked) -> bool {
    pid_mode(config, pod) == cri::NamespaceMode::Container
}

/// POD means whatever the pod has; a pod without a namespace to share gives each its own.
fn pid_mode(config: &cri::ContainerConfig, pod: Asked) -> cri::NamespaceMode {
    let asked = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|security| security.namespace_options.as_ref())
        .map(cri::NamespaceOption::pid);
    match asked {
        Some(cri::NamespaceMode::Pod) | None => pod.pid,
        Some(mode) => mode,
    }
}

/// The container whose PID namespace is asked for, if one is.
pub(super) fn target_id(config: &cri::ContainerConfig) -> Option<&str> {
    let options = config
        .linux
        .as_ref()?
        .security_context
        .as_ref()?
        .namespace_options
        .as_ref()?;
    (options.pid() == cri::NamespaceMode::Target).then_some(options.target_id.as_str())
}

/// Everything that a spec is built from, but the user.
pub(super) struct Sources<'a> {
    pub ctx: &'a Context,
    pub pod: &'a PodFacts,
    pub container: &'a ContainerFacts,
    pub image: &'a Image,
    pub place: &'a Place,
    pub owners: &'a Owners,
    /// First process of the target container.
    pub target_pid: Option<i32>,
}

/// Labels of a container; `None` where SELinux is off, and then options are checked all the same.
pub(super) fn selinux(
    ctx: &Context,
    pod: &PodFacts,
    config: &cri::ContainerConfig,
) -> Result<Option<SelinuxLabels>, Error> {
    let linux = config.linux.as_ref();
    let security = linux.and_then(|linux| linux.security_context.as_ref());
    let own = security.and_then(|security| security.selinux_options.as_ref());
    let step = Error::step("resolve SELinux labels");
    let Some(defaults) = &ctx.settings.host.selinux else {
        own.map_or(Ok(()), gantry_spec::selinux::check)
            .map_err(step)?;
        return Ok(None);
    };
    let pods = crate::pod::selinux_options(&pod.config);
    let privileged = security.is_some_and(|security| security.privileged);
    gantry_spec::selinux::labels(defaults, pods, own, &pod.id, privileged)
        .map(Some)
        .map_err(step)
}

impl Sources<'_> {
    /// Reads all facts. The root must be mounted.
    pub fn resolve(&self) -> Result<Resolved, Error> {
        let ctx = self.ctx;
        let rootfs = ctx.records.dirs.rootfs(&self.container.id);
        let config = &self.container.config;
        let security = config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref());
        let privileged = security.is_some_and(|security| security.privileged);
        let user = self.user(&rootfs)?;
        let cdi = super::cdi::find(&ctx.settings.cdi_dirs, config)?;
        let mut devices = devices::asked(config, ctx.settings.device_ownership)?;
        devices.extend(super::cdi::devices(&cdi)?);
        let etc = ctx.records.dirs.etc(&self.pod.id);
        let asked = Asked::of(&self.pod.config);
        let handler = ctx.settings.handler(&self.pod.record.runtime_handler);
        let bounding = bounding_capabilities()?;
        let image = &self.image.config;
        Ok(Resolved {
            pod: self.pod.id.clone(),
            container: self.container.id.clone(),
            image: gantry_spec::resolved::Image {
                name: image_name(config),
                entrypoint: image.entrypoint.clone(),
                cmd: image.cmd.clone(),
                env: image.env.clone(),
                working_dir: image.working_dir.clone(),
            },
            user,
            rootfs,
            cgroup: Cgroup {
                path: self.place.oci_path.clone(),
                node: ctx.settings.cgroup_node,
            },
            namespaces: self.namespaces(asked)?,
            hostname: crate::pod::hostname(&self.pod.config),
            files: PodFiles {
                hosts: Some(etc.join("hosts")),
                hostname: Some(etc.join("hostname")),
                resolv_conf: Some(etc.join("resolv.conf")),
                shm: Some(if asked.host_ipc {
                    PathBuf::from("/dev/shm")
                } else {
                    ctx.records.dirs.shm(&self.pod.id)
                }),
            },
            mounts: super::mounts::resolve(ctx, self.container, self.owners)?,
            volumes: Vec::new(),
            devices,
            cdi,
            init: ctx.settings.shim.clone(),
            // In a user namespace their owners have no names and their drivers no trust.
            host_devices: if privileged && asked.user.is_none() {
                devices::of_host(Path::new("/dev"))?
            } else {
                Vec::new()
            },
            capabilities: KnownCapabilities {
                default: gantry_spec::capabilities::default_set(),
                all: gantry_spec::capabilities::from_mask(bounding),
            },
            oom_score_adj_floor: gantry_sys::oom::clamp_oom_score_adj(-1000),
            rlimits: ctx.settings.rlimits.clone(),
            seccomp: Seccomp {
                unsupported: ctx
                    .settings
                    .host
                    .no_seccomp(handler.is_some_and(|handler| handler.features.seccomp)),
                architecture: std::env::consts::ARCH.to_owned(),
                kernel: ctx.settings.host.kernel,
                localhost: seccomp_profile(security)?,
            },
            apparmor: ctx
                .settings
                .host
                .apparmor()
                .map_err(|error| Error::internal("look at AppArmor", error))?,
            selinux: selinux(ctx, self.pod, config)?,
            recursive_read_only: handler
                .is_some_and(|handler| handler.features.recursive_read_only_mounts),
            annotations: handler
                .map(|handler| handler.annotations.clone())
                .unwrap_or_default(),
        })
    }

    fn user(&self, rootfs: &Path) -> Result<User, Error> {
        let passwd = account_file(rootfs, "etc/passwd")?;
        let group = account_file(rootfs, "etc/group")?;
        let security = self
            .container
            .config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref());
        let files = gantry_spec::user::Files {
            passwd: &passwd,
            group: &group,
        };
        gantry_spec::user::resolve(security, &self.image.config.user, files)
            .map_err(Error::step("resolve user"))
    }

    fn namespaces(&self, asked: Asked) -> Result<Namespaces, Error> {
        let pins = self.ctx.records.dirs.pins(&self.pod.id);
        let join = |host: bool, path: PathBuf| {
            if host {
                Namespace::Host
            } else {
                Namespace::Join(path)
            }
        };
        let pid = match pid_mode(&self.container.config, asked) {
            cri::NamespaceMode::Pod => Namespace::Join(pins.join("pid")),
            cri::NamespaceMode::Container => Namespace::New,
            cri::NamespaceMode::Node => Namespace::Host,
            cri::NamespaceMode::Target => {
                let pid = self.target_pid.ok_or_else(|| Error::Invalid {
                    field: "linux.security_context.namespace_options.target_id".to_owned(),
                    reason: "is not a running container of this pod".to_owned(),
                })?;
                Namespace::Join(PathBuf::from(format!("/proc/{pid}/ns/pid")))
            }
        };
        Ok(Namespaces {
            network: join(
                asked.host_network,
                PathBuf::from(&self.pod.record.netns_path),
            ),
            ipc: join(asked.host_ipc, pins.join("ipc")),
            uts: join(asked.host_network, pins.join("uts")),
            pid,
            user: match asked.user {
                Some(_) => Namespace::Join(pins.join("user")),
                None => Namespace::Host,
            },
        })
    }
}

/// The image's name as the pod's author wrote it.
fn image_name(config: &cri::ContainerConfig) -> String {
    config
        .image
        .as_ref()
        .map(|image| {
            if image.user_specified_image.is_empty() {
                image.image.clone()
            } else {
                image.user_specified_image.clone()
            }
        })
        .unwrap_or_default()
}

/// passwd or group of the root; empty when there is none.
fn account_file(rootfs: &Path, name: &str) -> Result<Vec<u8>, Error> {
    const STEP: &str = "read accounts of the image";
    let path = Path::new("/").join(name);
    let root = gantry_sys::fs::open_root(rootfs).map_err(|e| Error::io(STEP, rootfs, &e))?;
    // Not blocking: a FIFO must not hold us up before it is found not to be a file.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match gantry_sys::fs::open_in_root(&root, Path::new(name), flags, 0) {
        Ok(file) => File::from(file),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        Err(error) => return Err(Error::io(STEP, &path, &error)),
    };
    let metadata = file
        .metadata()
        .map_err(|error| Error::io(STEP, &path, &error))?;
    if !metadata.is_file() || metadata.len() > MAX_ACCOUNTS {
        return Err(Error::Invalid {
            field: format!("image file {}", path.display()),
            reason: format!("is not a regular file of at most {MAX_ACCOUNTS} bytes"),
        });
    }
    let mut bytes = Vec::new();
    file.take(MAX_ACCOUNTS)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io(STEP, &path, &error))?;
    Ok(bytes)
}

/// What we may hand on ourselves: the runtime fails to set more, even for a privileged container.
fn bounding_capabilities() -> Result<u64, Error> {
    const PATH: &str = "/proc/self/status";
    let text = fs::read_to_string(PATH)
        .map_err(|error| Error::io("read capabilities", Path::new(PATH), &error))?;
    let mask = text
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))
        .unwrap_or_default();
    u64::from_str_radix(mask.trim(), 16)
        .map_err(|error| Error::internal("read capabilities", format!("CapBnd {mask:?}: {error}")))
}

/// The file that a Localhost profile names.
fn seccomp_profile(
    security: Option<&cri::LinuxContainerSecurityContext>,
) -> Result<Option<String>, Error> {
    let Some(security) = security else {
        return Ok(None);
    };
    let profile =
        gantry_spec::seccomp::asked(security).map_err(Error::step("resolve seccomp profile"))?;
    let Profile::Localhost(path) = profile else {
        return Ok(None);
    };
    read_profile(Path::new(&path))
        .map(Some)
        .map_err(|error| Error::Invalid {
            field: "linux.security_context.seccomp.localhost_ref".to_owned(),
            reason: format!("{path}: {error}"),
        })
}

/// A regular file of a bounded size: opened without waiting for whoever writes to a FIFO.
fn read_profile(path: &Path) -> io::Result<String> {
    use std::os::unix::fs::OpenOptionsExt;
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(invalid("is not a regular file".to_owned()));
    }
    let mut text = String::new();
    let limit = gantry_spec::seccomp::MAX_PROFILE;
    file.take(limit as u64 + 1).read_to_string(&mut text)?;
    if text.len() > limit {
        return Err(invalid(format!("is larger than {limit} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn account_files_are_read_only_from_beneath_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        assert!(account_file(&root, "etc/passwd").unwrap().is_empty());
        fs::write(dir.path().join("secret"), "host").unwrap();
        std::os::unix::fs::symlink("../../secret", root.join("etc/passwd")).unwrap();
        assert!(
            account_file(&root, "etc/passwd").unwrap().is_empty(),
            "`..` stays in the root"
        );
        fs::create_dir(root.join("etc/group")).unwrap();
        assert!(account_file(&root, "etc/group").is_err());
        fs::remove_file(root.join("etc/passwd")).unwrap();
        nix::unistd::mkfifo(&root.join("etc/passwd"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(
            account_file(&root, "etc/passwd").is_err(),
            "a FIFO must not block us"
        );
    }

    #[test]
    fn a_seccomp_profile_is_a_regular_file_of_a_bounded_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("profile.json");
        assert!(read_profile(&path).is_err());
        assert!(read_profile(dir.path()).is_err());
        fs::write(&path, "{}").unwrap();
        assert_eq!(read_profile(&path).unwrap(), "{}");
        let huge = File::options().write(true).open(&path).unwrap();
        huge.set_len(gantry_spec::seccomp::MAX_PROFILE as u64 + 1)
            .unwrap();
        let error = read_profile(&path).unwrap_err().to_string();
        assert!(error.contains("larger than"), "{error}");
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read_profile(&fifo).is_err(), "a FIFO must not block us");
    }
}
