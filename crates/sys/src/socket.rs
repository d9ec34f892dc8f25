//! Unix stream sockets: descriptors along with bytes (SCM_RIGHTS, unix(7)), and paths of any
//! length.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net as rn;

/// Most descriptors that one message may bring.
pub const MAX_FDS: usize = 8;

/// How long a socket may outlive the process that listened on it: whoever looks at its descriptors
/// (proc_pid_fd(5)) holds them for a moment, as does a child of its between fork and exec.
const LINGER: Duration = Duration::from_secs(1);

/// sendmsg(2) with descriptors attached to the first byte. Returns how many bytes were taken; the
/// descriptors went with them. Never raises SIGPIPE.
pub fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "too many descriptors",
        ));
    }
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = rn::SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(rn::SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "too many descriptors",
        ));
    }
    loop {
        let flags = rn::SendFlags::NOSIGNAL;
        match rn::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Bytes that a TCP socket has taken and its peer's machine has not acknowledged (tcp(7), SIOCOUTQ).
pub fn unsent(socket: impl AsFd) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: TIOCOUTQ, which is SIOCOUTQ's number, writes one int through the pointer, and `count`
    // is one that lives past the call; the descriptor is borrowed for as long.
    let done = unsafe {
        libc::ioctl(
            socket.as_fd().as_raw_fd(),
            libc::TIOCOUTQ,
            std::ptr::from_mut(&mut count),
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    usize::try_from(count).map_err(io::Error::other)
}

/// recvmsg(2): bytes, and the descriptors that came with them in `fds`. `Ok(0)` is the end.
/// Descriptors that did not fit are an error, since a message without them means something else.
pub fn recv_with_fds(
    socket: impl AsFd,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = rn::RecvAncillaryBuffer::new(&mut space);
    loop {
        let mut slices = [IoSliceMut::new(buffer)];
        let flags = rn::RecvFlags::CMSG_CLOEXEC;
        let message = match rn::recvmsg(&socket, &mut slices, &mut control, flags) {
            Err(rustix::io::Errno::INTR) => continue,
            message => message?,
        };
        for part in control.drain() {
            if let rn::RecvAncillaryMessage::ScmRights(received) = part {
                fds.extend(received);
            }
        }
        if message.flags.contains(rn::ReturnFlags::CTRUNC) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "descriptors were cut off",
            ));
        }
        return Ok(message.bytes);
    }
}

/// sun_path holds 108 bytes with the final NUL (unix(7)).
const PATH_MAX: usize = 107;

/// A path to the same socket that fits into an address: through a descriptor of its directory,
/// which the caller keeps for as long as the path is used.
fn short(path: &Path) -> io::Result<(PathBuf, Option<OwnedFd>)> {
    if path.as_os_str().len() <= PATH_MAX {
        return Ok((path.to_owned(), None));
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory = crate::fs::open_root(parent)?;
    Ok((
        crate::fs::proc_fd(directory.as_fd()).join(name),
        Some(directory),
    ))
}

/// Listens at `path` with mode 0600. A socket there that nobody listens on any more is replaced;
/// anything else there is `AddrInUse`, after [`LINGER`] if it is a socket. For a process's start:
/// changes the umask for a moment.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let (address, _directory) = short(path)?;
    let bind = || {
        let old = crate::fs::umask(0o177);
        let listener = UnixListener::bind(&address);
        crate::fs::umask(old);
        listener
    };
    let give_up = Instant::now() + LINGER;
    loop {
        match bind() {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_socket(path) => {
                let stale = UnixStream::connect(&address)
                    .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
                if stale {
                    std::fs::remove_file(path)?;
                    return bind();
                }
                if Instant::now() >= give_up {
                    return Err(e);
                }
                std::thread::sleep(LINGER / 20);
            }
            result => return result,
        }
    }
}

fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    path.symlink_metadata()
        .is_ok_and(|meta| meta.file_type().is_socket())
}

/// Connects to the socket at `path`, however long the path is.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let (address, _directory) = short(path)?;
    UnixStream::connect(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn descriptors_arrive_with_their_bytes() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = crate::fs::memfd("x", b"content").unwrap();
        send_with_fds(&a, b"plain", &[]).unwrap();
        send_with_fds(&a, b"with", &[file.as_fd(), file.as_fd()]).unwrap();
        let (mut got, mut fds) = (Vec::new(), Vec::new());
        let mut buffer = [0; 64];
        while got.len() < 9 {
            let n = recv_with_fds(&b, &mut buffer, &mut fds).unwrap();
            got.extend_from_slice(&buffer[..n]);
        }
        assert_eq!(got, b"plainwith");
        assert_eq!(fds.len(), 2);
        let mut text = String::new();
        std::fs::File::from(fds.remove(0))
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "content");
        let many = vec![file.as_fd(); MAX_FDS + 1];
        assert!(send_with_fds(&a, b"x", &many).is_err());
    }

    #[test]
    fn a_long_path_is_bound_connected_and_taken_over_only_when_stale() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("shim.sock");
        let listener = listen(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        connect(&path).unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        // It goes while another waits for it.
        let holder = std::thread::spawn(move || {
            std::thread::sleep(LINGER / 10);
            drop(listener);
        });
        listen(&path).unwrap();
        holder.join().unwrap();
        std::fs::write(deep.join("file"), "precious").unwrap();
        assert!(listen(&deep.join("file")).is_err());
        assert!(deep.join("file").exists());
    }
}
