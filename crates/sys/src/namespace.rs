//! Working in another namespace, and preparing a new one from inside.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, OFlags};

/// Runs `work` in the network namespace at `path` (a pin or `/proc/PID/ns/net`) on a thread of
/// its own that joins the namespace and ends with it, so that no other thread ever changes.
pub fn in_netns<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let netns = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                set_net(&netns)?;
                Ok(work())
            })?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `work` on a thread of its own with a private copy of all mounts: what it mounts nobody
/// else sees, and all of it is gone when it ends. A detached mount that `work` returns stays.
pub fn in_own_mounts<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    use rustix::mount::MountPropagationFlags;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("mounts".into())
            .spawn_scoped(scope, || {
                unshare_mounts()?;
                let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
                rustix::mount::mount_change("/", private)?;
                Ok(work())
            })?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn unshare_mounts() -> io::Result<()> {
    // SAFETY: unshare(2) of the mount namespace takes no memory; it moves the calling thread alone
    // and gives it a root and working directory of its own (CLONE_FS is implied).
    match unsafe { libc::unshare(libc::CLONE_NEWNS) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set_net(netns: &OwnedFd) -> io::Result<()> {
    // SAFETY: setns(2) on an open descriptor; CLONE_NEWNET moves the calling thread alone and the
    // kernel refuses a descriptor of another kind.
    let result = unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Raises the loopback interface of the current network namespace (netdevice(7)).
pub fn raise_loopback() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is plain data for which all zeroes is a value: an empty name, no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads a struct ifreq from the pointer, which is valid for the call.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// sethostname(2) in the current UTS namespace; at most 64 bytes.
pub fn set_hostname(name: &str) -> io::Result<()> {
    Ok(rustix::system::sethostname(name.as_bytes())?)
}

/// Exchanges the root of this process, which must be alone in its mount namespace, for an empty
/// read-only file system; nothing of the old one stays mounted here.
pub fn enter_empty_root() -> io::Result<()> {
    use rustix::mount::{self as rm, MountFlags, MountPropagationFlags, UnmountFlags};
    // Before anything else: what is changed here must not reach the host's mounts.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rm::mount_change("/", private)?;
    // Any directory that every host has and that a mapped root may enter serves as mount point.
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rm::mount(
        "tmpfs",
        "/proc",
        "tmpfs",
        flags,
        c"size=4k,nr_inodes=2,mode=0555",
    )?;
    let root = rustix::fs::openat(
        CWD,
        "/proc",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    rustix::process::fchdir(&root)?;
    // The old root lands on top of the new one, where it is the next to be taken off
    // (pivot_root(2), "pivot_root(".", ".")").
    rustix::process::pivot_root(".", ".")?;
    rm::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    Ok(rm::mount_remount(
        "/",
        flags | MountFlags::BIND | MountFlags::RDONLY,
        c"",
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_in_a_namespace_leaves_other_threads_alone() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP work_in_a_namespace_leaves_other_threads_alone: needs root");
            return;
        }
        let mine = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let mut child = std::process::Command::new("unshare")
            .args(["-n", "sh", "-c", "echo; exec sleep 60"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let path = format!("/proc/{}/ns/net", child.id());
        let theirs = std::fs::read_link(&path).unwrap();
        let seen = in_netns(Path::new(&path), || {
            raise_loopback().unwrap();
            std::fs::read_link("/proc/thread-self/ns/net").unwrap()
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(seen.unwrap(), theirs);
        assert_ne!(mine, theirs);
        assert_eq!(
            std::fs::read_link("/proc/thread-self/ns/net").unwrap(),
            mine
        );
        assert!(in_netns(Path::new("/proc/self/ns/uts"), || ()).is_err());
    }
}
