//! The socket by which the OCI runtime hands over a terminal's master (runc, docs/terminals.md).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// A listening console socket; its file goes when this is dropped.
#[derive(Debug)]
pub struct Console {
    listener: UnixListener,
    file: PathBuf,
    /// What the runtime is told: short enough for a socket address however deep the file is.
    pub address: PathBuf,
    /// Keeps `address` valid.
    _directory: OwnedFd,
}

impl Console {
    pub fn open(directory: &Path, name: &str) -> Result<Self, Error> {
        let file = directory.join(name);
        let handle =
            gantry_sys::fs::open_root(directory).map_err(Error::io("open directory", directory))?;
        // Through our own entry in /proc, not `self`: it is the runtime that resolves it.
        let address = PathBuf::from(format!(
            "/proc/{}/fd/{}/{name}",
            std::process::id(),
            handle.as_raw_fd()
        ));
        let listener = gantry_sys::socket::listen(&file)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(Error::io("listen on console socket", &file))?;
        Ok(Self {
            listener,
            file,
            address,
            _directory: handle,
        })
    }

    /// The master, once the runtime has succeeded: by then it has sent it, so nothing is waited
    /// for.
    pub fn receive(&self) -> Result<OwnedFd, Error> {
        let receive = || {
            let (stream, _) = self.listener.accept()?;
            stream.set_nonblocking(true)?;
            let (mut fds, mut bytes) = (Vec::new(), [0; 256]);
            gantry_sys::socket::recv_with_fds(&stream, &mut bytes, &mut fds)?;
            let master = fds.into_iter().next();
            let master = master.ok_or_else(|| io::Error::other("no descriptor came with it"))?;
            if !gantry_sys::pty::is_terminal(master.as_fd()) {
                return Err(io::Error::other("the descriptor is no terminal"));
            }
            Ok(master)
        };
        receive().map_err(Error::call("receive the terminal from the OCI runtime"))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}
