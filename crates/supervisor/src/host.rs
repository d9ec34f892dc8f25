//! What the kernel of this node has to confine containers with.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use gantry_spec::resolved::{AppArmor, KernelVersion};
use gantry_spec::selinux::{self, Defaults};

/// Name of the profile that RuntimeDefault means; the file is in `deploy/apparmor`.
pub const APPARMOR_DEFAULT: &str = "gantry-default";

/// First kernel whose overlayfs takes idmapped layers.
const IDMAPPED_LAYERS: KernelVersion = KernelVersion::new(5, 19);

/// Facts that last as long as the kernel runs, and where to look up those that do not.
#[derive(Clone, Debug)]
pub struct Host {
    /// `/`, or a directory that stands for it in a test.
    root: PathBuf,
    pub kernel: KernelVersion,
    /// System calls can be filtered (CONFIG_SECCOMP_FILTER).
    pub seccomp: bool,
    pub apparmor: bool,
    /// The contexts that containers start from; `None` where SELinux is off.
    pub selinux: Option<Defaults>,
}

/// What a handler can be given where layers cannot be mapped.
const COPIES: &str = "snapshotter \"native\" gives copies their owners instead";

impl Host {
    /// Looks at the machine whose files are below `root`: `/` for this one.
    ///
    /// # Errors
    /// The kernel's version cannot be read; SELinux is on and its policy names no contexts for
    /// containers. Either would leave containers less confined than they ask to be.
    pub fn look(root: &Path) -> io::Result<Self> {
        let invalid = |path: &Path, text: &str| {
            let message = format!("{}: {text}", path.display());
            io::Error::new(io::ErrorKind::InvalidData, message)
        };
        let release = root.join("proc/sys/kernel/osrelease");
        let text = fs::read_to_string(&release)?;
        let kernel =
            KernelVersion::parse(&text).ok_or_else(|| invalid(&release, "no kernel version"))?;
        let status = fs::read_to_string(root.join("proc/self/status"))?;
        let enabled = fs::read_to_string(root.join("sys/module/apparmor/parameters/enabled"));
        let selinux = if root.join("sys/fs/selinux/enforce").exists() {
            let contexts = contexts_file(root);
            let text = fs::read_to_string(&contexts)?;
            Some(selinux::defaults(&text).ok_or_else(|| invalid(&contexts, "no contexts"))?)
        } else {
            None
        };
        Ok(Self {
            root: root.to_owned(),
            kernel,
            // proc_pid_status(5): the line is there if the kernel was built with seccomp.
            seccomp: status.lines().any(|line| line.starts_with("Seccomp:")),
            apparmor: enabled.is_ok_and(|text| text.trim() == "Y"),
            selinux,
        })
    }

    /// Why filters cannot be had; `None` when they can. `runtime` can install them.
    pub fn no_seccomp(&self, runtime: bool) -> Option<String> {
        if !self.seccomp {
            Some("the kernel is built without seccomp".to_owned())
        } else if !runtime {
            Some("the runtime handler is built without seccomp".to_owned())
        } else {
            None
        }
    }

    /// Why pods cannot have user namespaces; `None` when they can. `layers`: where the layers are
    /// that an overlay takes through id-mapped mounts; `None` without these.
    pub fn no_user_namespaces(&self, layers: Option<&Path>) -> Option<String> {
        let path = self.root.join("proc/sys/user/max_user_namespaces");
        // 0 is how an administrator switches them off; a kernel without them has no such file.
        let most = fs::read_to_string(&path).unwrap_or_default();
        if most.trim().parse::<u64>().unwrap_or_default() == 0 {
            return Some(format!("{} allows none", path.display()));
        }
        let layers = layers?;
        if self.kernel < IDMAPPED_LAYERS {
            return Some(format!(
                "overlayfs on idmapped layers needs Linux 5.19; {COPIES}"
            ));
        }
        match gantry_sys::fs::is_overlay(layers) {
            Ok(false) => None,
            Ok(true) => Some(format!(
                "{} is on overlayfs, which has no idmapped mounts; {COPIES}",
                layers.display()
            )),
            Err(error) => Some(format!("{}: {error}", layers.display())),
        }
    }

    /// AppArmor with the profiles that are loaded now.
    ///
    /// # Errors
    /// The list is there and cannot be read.
    pub fn apparmor(&self) -> io::Result<AppArmor> {
        if !self.apparmor {
            return Ok(AppArmor::Disabled);
        }
        let path = self.root.join("sys/kernel/security/apparmor/profiles");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // A node that is a container itself (kind) has no securityfs: AppArmor is out of reach.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(AppArmor::Disabled),
            Err(error) => {
                let message = format!("{}: {error}", path.display());
                return Err(io::Error::new(error.kind(), message));
            }
        };
        // `NAME (MODE)`, and a name may have blanks.
        let names = text.lines().filter_map(|line| line.rsplit_once(" ("));
        Ok(AppArmor::Enabled {
            runtime_default: APPARMOR_DEFAULT.to_owned(),
            loaded: names.map(|(name, _)| name.to_owned()).collect(),
        })
    }
}

/// Where the policy in force keeps the contexts of containers (selinux_lxc_contexts_path(3)).
fn contexts_file(root: &Path) -> PathBuf {
    let config = fs::read_to_string(root.join("etc/selinux/config")).unwrap_or_default();
    let policy = config
        .lines()
        .find_map(|line| line.trim().strip_prefix("SELINUXTYPE="))
        .map_or("targeted", str::trim);
    root.join("etc/selinux")
        .join(policy)
        .join("contexts/lxc_contexts")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn machine() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "proc/sys/kernel/osrelease", "6.1.0-9-amd64\n");
        write(dir.path(), "proc/self/status", "Name:\tx\nSeccomp:\t0\n");
        dir
    }

    #[test]
    fn a_kernel_without_security_modules_has_none() {
        let dir = machine();
        let host = Host::look(dir.path()).unwrap();
        assert_eq!(host.kernel, KernelVersion::new(6, 1));
        assert!(host.seccomp && !host.apparmor && host.selinux.is_none());
        assert_eq!(host.apparmor().unwrap(), AppArmor::Disabled);
        assert_eq!(host.no_seccomp(true), None);
        assert!(host.no_seccomp(false).unwrap().contains("handler"));
        write(dir.path(), "proc/self/status", "Name:\tx\n");
        let host = Host::look(dir.path()).unwrap();
        assert!(host.no_seccomp(true).unwrap().contains("kernel"));
    }

    #[test]
    fn user_namespaces_need_kernel_permission_and_file_system() {
        let dir = machine();
        let host = Host::look(dir.path()).unwrap();
        let why = |host: &Host| {
            host.no_user_namespaces(Some(dir.path()))
                .unwrap_or_default()
        };
        assert!(why(&host).contains("allows none"));
        write(dir.path(), "proc/sys/user/max_user_namespaces", "0\n");
        assert!(why(&host).contains("allows none"));
        write(dir.path(), "proc/sys/user/max_user_namespaces", "1000\n");
        assert!(!why(&host).contains("allows none"));
        let old = Host {
            kernel: KernelVersion::new(5, 18),
            ..host.clone()
        };
        assert!(why(&old).contains("5.19"));
        assert_eq!(old.no_user_namespaces(None), None, "copies need no mapping");
        let none = host.no_user_namespaces(Some(Path::new("/nonexistent")));
        assert!(none.unwrap().contains("/nonexistent"));
    }

    #[test]
    fn apparmor_tells_what_is_loaded() {
        let dir = machine();
        write(dir.path(), "sys/module/apparmor/parameters/enabled", "Y\n");
        let host = Host::look(dir.path()).unwrap();
        assert_eq!(
            host.apparmor().unwrap(),
            AppArmor::Disabled,
            "no securityfs"
        );
        let list = "gantry-default (enforce)\nmy profile (complain)\n/usr/bin/x (enforce)\n";
        write(dir.path(), "sys/kernel/security/apparmor/profiles", list);
        let loaded = ["gantry-default", "my profile", "/usr/bin/x"];
        let expected = AppArmor::Enabled {
            runtime_default: APPARMOR_DEFAULT.into(),
            loaded: loaded.map(str::to_owned).into(),
        };
        assert_eq!(host.apparmor().unwrap(), expected);
        write(dir.path(), "sys/module/apparmor/parameters/enabled", "N\n");
        assert!(!Host::look(dir.path()).unwrap().apparmor);
    }

    #[test]
    fn selinux_needs_the_contexts_of_its_policy() {
        let dir = machine();
        write(dir.path(), "sys/fs/selinux/enforce", "1");
        assert!(Host::look(dir.path()).is_err());
        let contexts = "process = \"system_u:system_r:container_t:s0\"\n\
            file = \"system_u:object_r:container_file_t:s0\"\n";
        write(dir.path(), "etc/selinux/config", "# x\nSELINUXTYPE=mls\n");
        write(
            dir.path(),
            "etc/selinux/mls/contexts/lxc_contexts",
            contexts,
        );
        let host = Host::look(dir.path()).unwrap();
        assert_eq!(host.selinux, selinux::defaults(contexts));
        write(dir.path(), "etc/selinux/mls/contexts/lxc_contexts", "junk");
        assert!(Host::look(dir.path()).is_err());
    }
}
