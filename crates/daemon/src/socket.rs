//! The CRI socket: 0660, and never taken from a living daemon.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::net::UnixListener;

/// Listens at `path`. A socket that nobody listens on is what a killed daemon left and is
/// replaced; anything else in the way is an error.
pub async fn listen(path: &Path) -> io::Result<UnixListener> {
    listen_within(path, PATIENCE).await
}

async fn listen_within(path: &Path, patience: Duration) -> io::Result<UnixListener> {
    let path = path.to_owned();
    // It may wait, which keeps a worker from everything else.
    let bound = tokio::task::spawn_blocking(move || bind(&path, patience));
    UnixListener::from_std(bound.await.map_err(io::Error::other)??)
}

/// Blocks.
fn bind(path: &Path, patience: Duration) -> io::Result<std::os::unix::net::UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "is there and is no socket",
            ));
        }
        Ok(_) => remove_stale(path, patience)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    // As tokio wants it.
    listener.set_nonblocking(true)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// How long a socket may still be open in what a killed daemon left: a child between fork and
/// execve holds its descriptors.
const PATIENCE: Duration = Duration::from_secs(1);

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match UnixStream::connect(path) {
            Ok(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Ok(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "another process listens on it",
                ));
            }
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
                    // Its owner removed it and ended.
                    io::ErrorKind::NotFound => Ok(()),
                    _ => Err(error),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/gantry.sock");
        let first = listen(&path).await.unwrap();
        assert_eq!(
            listen(&path).await.unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
        // What a killed daemon left may hold it for a moment longer.
        let late = std::thread::spawn(move || {
            std::thread::sleep(PATIENCE / 10);
            drop(first);
        });
        let again = listen_within(&path, PATIENCE * 20).await.unwrap();
        late.join().unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        drop(again);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "a file").unwrap();
        assert_eq!(
            listen(&path).await.unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
    }
}
