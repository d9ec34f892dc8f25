//! Mounting: through the file-system-context calls where the kernel takes one layer at a time
//! (`lowerdir+`, Linux 6.7), else through mount(2), whose options must fit one page.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use gantry_ports::Error;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags};

/// The directories of one overlay mount.
pub struct Overlay {
    /// Topmost first.
    pub lower: Vec<PathBuf>,
    /// Without it nobody can write: the file system itself is read-only.
    pub writable: Option<Writable>,
    /// SELinux context of every file.
    pub label: Option<String>,
}

pub struct Writable {
    pub upper: PathBuf,
    pub work: PathBuf,
}

/// FSCONFIG_SET_STRING takes at most 256 bytes including the NUL (fs/fsopen.c).
const STRING_MAX: usize = 255;

/// The options of mount(2) are one page including the NUL; 4096 is the smallest page.
const PAGE_MAX: usize = 4095;

pub fn overlay(dirs: &Overlay, target: &Path) -> Result<(), Error> {
    match with_context(dirs, target) {
        // The kernel knows neither the calls (ENOSYS) nor the parameter (EINVAL).
        Err(Failure {
            errno: Errno::NOSYS | Errno::INVAL,
            step: "fsopen" | "lowerdir+",
            ..
        }) => with_page(dirs, target),
        other => other,
    }
    .map_err(|failure| failure.at(target))
}

/// A failed step of a mount, with what the kernel had to say about it.
#[derive(Debug)]
struct Failure {
    step: &'static str,
    errno: Errno,
    log: String,
}

impl Failure {
    fn new(step: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self {
            step,
            errno,
            log: String::new(),
        }
    }

    fn at(self, target: &Path) -> Error {
        Error::io(
            format_args!(
                "mount overlay at {}: {}{}",
                target.display(),
                self.step,
                self.log
            ),
            self.errno.into(),
        )
    }
}

/// Reads the messages that a file system context has collected (`fsopen(2)`: read(2) gives one a
/// call, prefixed by severity).
fn context_log(context: &OwnedFd) -> String {
    let mut text = String::new();
    let mut message = [0; 512];
    for _ in 0..8 {
        match rustix::io::read(context, &mut message) {
            Ok(n) if n > 0 => {
                text.push_str(": ");
                text.push_str(String::from_utf8_lossy(&message[..n]).trim());
            }
            _ => break,
        }
    }
    text
}

fn with_context(dirs: &Overlay, target: &Path) -> Result<(), Failure> {
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(Failure::new("fsopen"))?;
    // Descriptors behind /proc/self/fd names must live until the mount is made.
    let mut held = Vec::new();
    let mut set = |key: &'static str, value: &Path| {
        let short = match value.as_os_str().len() {
            0..=STRING_MAX => value.to_owned(),
            _ => hold(value, &mut held).map_err(Failure::new(key))?,
        };
        rustix::mount::fsconfig_set_string(&context, key, short.as_path()).map_err(|errno| {
            Failure {
                step: key,
                errno,
                log: context_log(&context),
            }
        })
    };
    set("source", Path::new("overlay"))?;
    for dir in &dirs.lower {
        set("lowerdir+", dir)?;
    }
    if let Some(Writable { upper, work }) = &dirs.writable {
        set("upperdir", upper)?;
        set("workdir", work)?;
    }
    if knows_index() {
        set("index", Path::new("off"))?;
    }
    if let Some(label) = &dirs.label {
        set("context", Path::new(label))?;
    }
    rustix::mount::fsconfig_create(&context).map_err(|errno| Failure {
        step: "create",
        errno,
        log: context_log(&context),
    })?;
    let mount = rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .map_err(Failure::new("fsmount"))?;
    rustix::mount::move_mount(
        mount,
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(Failure::new("move_mount"))
}

fn with_page(dirs: &Overlay, target: &Path) -> Result<(), Failure> {
    let mut held = Vec::new();
    let mut options = Vec::new();
    // Names through descriptors are short, and free of the characters that options give a
    // meaning to (`:` `,` `\`).
    let mut push = |prefix: &str, dir: &Path| -> Result<(), Failure> {
        options.extend_from_slice(prefix.as_bytes());
        let name = hold(dir, &mut held).map_err(Failure::new("open"))?;
        options.extend_from_slice(name.as_os_str().as_encoded_bytes());
        Ok(())
    };
    for (n, dir) in dirs.lower.iter().enumerate() {
        push(if n == 0 { "lowerdir=" } else { ":" }, dir)?;
    }
    if let Some(Writable { upper, work }) = &dirs.writable {
        push(",upperdir=", upper)?;
        push(",workdir=", work)?;
    }
    if knows_index() {
        options.extend_from_slice(b",index=off");
    }
    if let Some(label) = &dirs.label {
        // In quotes: the categories of a context are separated by commas.
        options.extend_from_slice(format!(",context=\"{label}\"").as_bytes());
    }
    if options.len() > PAGE_MAX {
        return Err(Failure {
            step: "mount",
            errno: Errno::TOOBIG,
            log: format!(": {} layers are too many for this kernel", dirs.lower.len()),
        });
    }
    let options =
        std::ffi::CString::new(options).map_err(|_| Failure::new("mount")(Errno::INVAL))?;
    rustix::mount::mount(
        "overlay",
        target,
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .map_err(Failure::new("mount"))
}

/// A short name for `dir` that lasts as long as `held`.
fn hold(dir: &Path, held: &mut Vec<OwnedFd>) -> Result<PathBuf, Errno> {
    let fd = rustix::fs::open(
        dir,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let name = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    held.push(fd);
    Ok(name)
}

/// `index` makes the kernel refuse an upper directory that some other mount namespace still has
/// mounted, so it is switched off; kernels before 4.13 do not know the option.
fn knows_index() -> bool {
    Path::new("/sys/module/overlay/parameters/index").exists()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use gantry_snapshotter_directories::mounts::{is_mount_point, unmount};

    use super::*;

    fn dirs(root: &Path, layers: usize) -> Overlay {
        let lower: Vec<_> = (0..layers)
            .rev()
            .map(|n| root.join(format!("l{n}")))
            .collect();
        for (n, dir) in lower.iter().rev().enumerate() {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join(format!("f{n}")), "x").unwrap();
            fs::write(dir.join("top"), n.to_string()).unwrap();
        }
        let (upper, work) = (root.join("upper"), root.join("work"));
        fs::create_dir(&upper).unwrap();
        fs::create_dir(&work).unwrap();
        let writable = Some(Writable { upper, work });
        Overlay {
            lower,
            writable,
            label: None,
        }
    }

    fn check(
        mount: fn(&Overlay, &Path) -> Result<(), Failure>,
        layers: usize,
        name: &str,
    ) -> Result<(), Failure> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP {name}: mounting needs root");
            return Ok(());
        }
        let work = tempfile::tempdir().unwrap();
        let target = work.path().join("target");
        fs::create_dir(&target).unwrap();
        mount(&dirs(work.path(), layers), &target)?;
        let names = fs::read_dir(&target).unwrap().count();
        let top = fs::read_to_string(target.join("top")).unwrap();
        unmount(&target).unwrap();
        assert_eq!((names, top), (layers + 1, (layers - 1).to_string()));
        Ok(())
    }

    /// Without SELinux no file system takes a context: better no mount than one without its label.
    #[test]
    fn a_label_is_handed_to_the_kernel() {
        const NAME: &str = "a_label_is_handed_to_the_kernel";
        if !rustix::process::geteuid().is_root() {
            println!("SKIP {NAME}: mounting needs root");
            return;
        }
        let work = tempfile::tempdir().unwrap();
        let mut dirs = dirs(work.path(), 2);
        let target = work.path().join("target");
        fs::create_dir_all(&target).unwrap();
        dirs.label = Some("system_u:object_r:container_file_t:s0:c1,c2".to_owned());
        let made = overlay(&dirs, &target);
        if Path::new("/sys/fs/selinux/enforce").exists() {
            made.unwrap();
            unmount(&target).unwrap();
            return;
        }
        let error = made.unwrap_err().to_string();
        assert!(
            error.contains("context") || error.contains("mount"),
            "{error}"
        );
        assert!(!is_mount_point(&target).unwrap());
    }

    #[test]
    fn three_hundred_layers_are_mounted() {
        match check(with_context, 300, "three_hundred_layers_are_mounted") {
            Err(Failure {
                step: "fsopen" | "lowerdir+",
                ..
            }) => {
                println!("SKIP three_hundred_layers_are_mounted: kernel without lowerdir+");
            }
            other => other.unwrap(),
        }
    }

    #[test]
    fn an_old_kernel_mounts_128_layers() {
        check(with_page, 128, "an_old_kernel_mounts_128_layers").unwrap();
    }

    #[test]
    fn too_many_layers_for_a_page_are_an_error_that_says_so() {
        let name = "too_many_layers_for_a_page_are_an_error_that_says_so";
        if rustix::process::geteuid().is_root() {
            let failure = check(with_page, 300, name).unwrap_err();
            assert!(
                failure
                    .at(Path::new("/t"))
                    .to_string()
                    .contains("300 layers")
            );
        } else {
            println!("SKIP {name}: mounting needs root");
        }
    }

    #[test]
    fn a_failed_mount_names_the_target_and_what_the_kernel_said() {
        let missing = Overlay {
            lower: vec!["/nonexistent/lower".into()],
            writable: Some(Writable {
                upper: "/nonexistent/upper".into(),
                work: "/nonexistent/work".into(),
            }),
            label: None,
        };
        if !rustix::process::geteuid().is_root() {
            println!("SKIP a_failed_mount_names_the_target: mounting needs root");
            return;
        }
        let text = overlay(&missing, Path::new("/nonexistent/t"))
            .unwrap_err()
            .to_string();
        assert!(text.contains("/nonexistent/t"), "{text}");
    }
}
