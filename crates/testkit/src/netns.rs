//! A network namespace for one fixture: bridges, firewall rules and sysctls of a test stay in it
//! and end with it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use gantry_sys::namespace::{in_netns, raise_loopback};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::registry::Registry;

/// A network namespace pinned at a file; unpinned when this is dropped.
#[derive(Debug)]
pub struct Netns {
    path: PathBuf,
}

impl Netns {
    /// Makes a namespace with its loopback raised and pins it at `path`, which must not exist.
    pub fn make(path: &Path) -> io::Result<Self> {
        File::create_new(path)?;
        let pinned = std::thread::scope(|scope| {
            let pin = || {
                // The thread alone moves, and ends here.
                unshare(CloneFlags::CLONE_NEWNET)?;
                let own = "/proc/thread-self/ns/net";
                Ok(mount(
                    Some(own),
                    path,
                    None::<&str>,
                    MsFlags::MS_BIND,
                    None::<&str>,
                )?)
            };
            scope
                .spawn(pin)
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("netns thread")))
        });
        pinned.inspect_err(|_| drop(std::fs::remove_file(path)))?;
        let netns = Self {
            path: path.to_owned(),
        };
        netns.run(raise_loopback)??;
        Ok(netns)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` on a thread inside the namespace. Sockets and children made there stay in it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        in_netns(&self.path, work)
    }

    /// `net:[INODE]`, as `/proc/PID/ns/net` of a process inside reads.
    pub fn link(&self) -> io::Result<String> {
        self.run(|| std::fs::read_link("/proc/thread-self/ns/net"))?
            .map(|link| link.to_string_lossy().into_owned())
    }

    /// Names of the network interfaces inside.
    pub fn interfaces(&self) -> io::Result<Vec<String>> {
        let table = self.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
        let names = table
            .lines()
            .skip(2)
            .filter_map(|line| line.split_once(':'));
        Ok(names.map(|(name, _)| name.trim().to_owned()).collect())
    }

    /// Starts a registry on the loopback in there.
    pub fn registry(&self) -> io::Result<LocalRegistry> {
        let (tell, told) = mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let path = self.path.clone();
        let thread = std::thread::spawn(move || {
            let serve = || -> io::Result<()> {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                let registry = runtime.block_on(Registry::start());
                // Nobody listens when the fixture has gone.
                let _ = tell.send(registry);
                let _ = runtime.block_on(stopped);
                Ok(())
            };
            let _ = in_netns(&path, serve);
        });
        let registry = told.recv().map_err(io::Error::other)??;
        Ok(LocalRegistry {
            registry,
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A [`Registry`] with a thread of its own, so that a test may block beside it.
pub struct LocalRegistry {
    registry: Registry,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl std::ops::Deref for LocalRegistry {
    type Target = Registry;

    fn deref(&self) -> &Registry {
        &self.registry
    }
}

impl Drop for LocalRegistry {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
