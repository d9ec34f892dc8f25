//! File systems on a disk: made and mounted as on any node.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

/// Which file system, with options that make what is not synced stay in memory for longer than a
/// workload takes: what is durable by luck on a node that syncs every five seconds is not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
}

impl Kind {
    fn make(self, path: &Path) -> Command {
        let mut command = Command::new(match self {
            Kind::Ext4 => "mkfs.ext4",
            Kind::Xfs => "mkfs.xfs",
        });
        match self {
            // All tables are made now, so that the kernel writes none of them in the background.
            Kind::Ext4 => command.args(["-q", "-F", "-E", "lazy_itable_init=0,nodiscard"]),
            Kind::Xfs => command.args(["-q", "-f", "-K"]),
        };
        command.arg(path);
        command
    }

    fn options(self) -> &'static str {
        match self {
            // Without auto_da_alloc a rename does not write the data of the renamed file.
            Kind::Ext4 => "noatime,commit=600,noauto_da_alloc",
            Kind::Xfs => "noatime",
        }
    }

    /// Bytes of a small disk.
    fn bytes(self) -> u64 {
        match self {
            Kind::Ext4 => 512 << 20,
            // mkfs.xfs makes no smaller ones.
            Kind::Xfs => 320 << 20,
        }
    }

    /// Makes a disk with an empty file system, a sparse file at `path`.
    pub fn format(self, path: &Path) -> io::Result<()> {
        File::create_new(path)?.set_len(self.bytes())?;
        crate::succeed(&mut self.make(path))
    }

    /// Mounts the file system in `image` at `point`, by a loop device that goes when it is
    /// unmounted.
    pub fn mount(self, image: &Path, point: &Path) -> io::Result<Mounted> {
        let mut command = Command::new("mount");
        command
            .args(["-t", &self.to_string(), "-o"])
            .arg(format!("loop,{}", self.options()))
            .args([image, point]);
        crate::succeed(&mut command)?;
        Ok(Mounted {
            point: point.to_owned(),
        })
    }

    /// Why no such file system can be made and mounted here.
    pub fn unable(self) -> Option<String> {
        let program = self.make(Path::new("/")).get_program().to_owned();
        let found = ["/usr/sbin", "/sbin", "/usr/bin"]
            .iter()
            .any(|dir| Path::new(dir).join(&program).exists());
        if !found {
            return Some(format!("{} is not installed", program.display()));
        }
        let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let of_kernel = |name: &str| {
            known
                .lines()
                .any(|line| line.split('\t').nth(1) == Some(name))
        };
        // A module may be loaded by its first mount.
        let name = self.to_string();
        if !of_kernel(&name) && !modprobe(&name) {
            return Some(format!("the kernel has no {name}"));
        }
        None
    }
}

/// Whether the kernel could load a module.
pub fn modprobe(name: &str) -> bool {
    let loaded = Command::new("modprobe").args(["-q", name]).status();
    loaded.is_ok_and(|status| status.success())
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
        })
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "ext4" => Ok(Kind::Ext4),
            "xfs" => Ok(Kind::Xfs),
            other => Err(format!("{other}: neither ext4 nor xfs")),
        }
    }
}

/// A mounted file system; unmounted when this is dropped.
#[derive(Debug)]
pub struct Mounted {
    point: PathBuf,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.point) {
            println!("unmount {}: {error}", self.point.display());
        }
    }
}

/// How long the last users of a file system may take to let it go.
const PATIENCE: Duration = Duration::from_secs(10);

/// Unmounts once nobody uses it any more: a mount namespace goes some time after its last process,
/// a loop device some time after its file system. In the end it is taken out of sight.
pub fn unmount(point: &Path) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match umount2(point, MntFlags::empty()) {
            Err(Errno::EBUSY) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => {
                umount2(point, MntFlags::MNT_DETACH)?;
                return Err(error.into());
            }
            Ok(()) => return Ok(()),
        }
    }
}
