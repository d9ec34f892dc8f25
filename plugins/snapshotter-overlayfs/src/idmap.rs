//! Root file systems whose files belong to the ids of a user namespace.
//!
//! overlayfs itself cannot be an idmapped mount, but its layers can be (Linux 5.19). Each layer is
//! mounted over itself, idmapped, in a mount namespace that lives for this one call; the overlay
//! made there keeps them. What the container writes lies in the upper directory under the ids of
//! the host, as the upper directory itself does.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use gantry_ports::Error;
use gantry_sys::mount::{attach, detached, idmapped};
use gantry_types::ErrorKind;

use crate::mount::{Overlay, overlay};

fn failed(what: &str, path: &Path, error: io::Error) -> Error {
    Error::io(format_args!("{what} {}", path.display()), error)
}

/// Mounts `dirs` at `target` as the user namespace at `namespace` sees it.
pub fn mount(dirs: &Overlay, target: &Path, namespace: &Path) -> Result<(), Error> {
    let user = File::open(namespace).map_err(|e| failed("open", namespace, e))?;
    let made = gantry_sys::namespace::in_own_mounts(|| -> Result<OwnedFd, Error> {
        for layer in &dirs.lower {
            let tree = map(layer, &user)?;
            attach(tree, layer).map_err(|e| failed("mount", layer, e))?;
        }
        // The root of what the container sees is the upper directory's.
        if let (Some(top), Some(writable)) = (dirs.lower.first(), &dirs.writable) {
            top.metadata()
                .and_then(|top| chown(&writable.upper, Some(top.uid()), Some(top.gid())))
                .map_err(|e| failed("chown", &writable.upper, e))?;
        }
        overlay(dirs, target)?;
        detached(target).map_err(|e| failed("take", target, e))
    });
    let tree = made.map_err(|e| failed("make a mount namespace for", target, e))??;
    attach(tree, target).map_err(|e| failed("mount at", target, e))
}

fn map(dir: &Path, user: &File) -> Result<OwnedFd, Error> {
    idmapped(dir, user.as_fd()).map_err(|error| match error.raw_os_error() {
        Some(code) if UNABLE.contains(&code) => Error::new(
            ErrorKind::FailedPrecondition,
            format!(
                "user namespaces need idmapped mounts, which the kernel or the file system of {} \
                 does not have: {error}; snapshotter \"native\" gives copies their owners instead",
                dir.display()
            ),
        ),
        _ => Error::io(format_args!("map ids of {}", dir.display()), error),
    })
}

/// EINVAL from the file system, ENOSYS from the kernel, EPERM inside a user namespace.
const UNABLE: [i32; 3] = [
    rustix::io::Errno::INVAL.raw_os_error(),
    rustix::io::Errno::NOSYS.raw_os_error(),
    rustix::io::Errno::PERM.raw_os_error(),
];

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_types::Kind;
    use std::fs;
    use std::process::{Child, Command, Stdio};

    const BASE: u32 = 300_000;

    /// A process that lives in a user namespace of its own.
    struct Namespace(Child);

    impl Namespace {
        fn new() -> io::Result<Self> {
            let mut child = Command::new("unshare")
                .args(["--user", "sh", "-c", "echo; exec cat"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0])?;
            let this = Self(child);
            for file in ["uid_map", "gid_map"] {
                let path = format!("/proc/{}/{file}", this.0.id());
                fs::write(path, format!("0 {BASE} 65536"))?;
            }
            Ok(this)
        }

        fn path(&self) -> std::path::PathBuf {
            format!("/proc/{}/ns/user", self.0.id()).into()
        }
    }

    impl Drop for Namespace {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn files_belong_to_the_ids_of_the_user_namespace() {
        const NAME: &str = "files_belong_to_the_ids_of_the_user_namespace";
        if !rustix::process::geteuid().is_root() {
            println!("SKIP {NAME}: mounting needs root");
            return;
        }
        let Ok(namespace) = Namespace::new() else {
            println!("SKIP {NAME}: no user namespace can be made here");
            return;
        };
        let work = tempfile::tempdir().unwrap();
        let at = |name: &str| work.path().join(name);
        for dir in ["base", "top", "upper", "work", "target"] {
            fs::create_dir(at(dir)).unwrap();
        }
        fs::write(at("base/of-root"), "").unwrap();
        fs::write(at("top/of-web"), "").unwrap();
        chown(at("top/of-web"), Some(33), Some(33)).unwrap();
        let dirs = Overlay {
            lower: vec![at("top"), at("base")],
            writable: Some(crate::mount::Writable {
                upper: at("upper"),
                work: at("work"),
            }),
            label: None,
        };
        // Other tests mount meanwhile: ours have the directory's name in them.
        let name = work.path().file_name().unwrap().to_str().unwrap();
        let mounts = || -> Vec<String> {
            let all = fs::read_to_string("/proc/self/mountinfo").unwrap();
            let ours = all.lines().filter(|line| line.contains(name));
            ours.map(str::to_owned).collect()
        };
        let before = mounts();
        match mount(&dirs, &at("target"), &namespace.path()) {
            Err(error) if error.kind() == ErrorKind::FailedPrecondition => {
                println!("SKIP {NAME}: {error}");
                return;
            }
            made => made.unwrap(),
        }
        let owner = |name: &str| {
            let metadata = fs::metadata(at(name)).unwrap();
            (metadata.uid(), metadata.gid())
        };
        let seen = [
            owner("target"),
            owner("target/of-root"),
            owner("target/of-web"),
        ];
        // Copied up with the owner that is seen.
        fs::write(at("target/of-web"), "written").unwrap();
        let copied = owner("upper/of-web");
        gantry_snapshotter_directories::mounts::unmount(&at("target")).unwrap();
        assert_eq!(seen, [(BASE, BASE), (BASE, BASE), (BASE + 33, BASE + 33)]);
        assert_eq!(copied, (BASE + 33, BASE + 33));
        assert_eq!((owner("top/of-web"), owner("base")), ((33, 33), (0, 0)));
        assert_eq!(before, mounts(), "layers are mounted nowhere");

        let error = mount(&dirs, &at("target"), Path::new("/proc/self/ns/net")).unwrap_err();
        assert!(error.to_string().contains("map ids") || error.to_string().contains("idmapped"));
    }
}
