//! The configuration directory: which network pods get, and noticing when that changes.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use inotify::{Inotify, WatchMask};

use crate::config::Network;

/// Largest configuration file that is read.
const MAX_FILE: u64 = 1 << 20;
/// Files are written in several steps: looked at once nothing has happened for so long.
const QUIET: Duration = Duration::from_millis(100);
/// Looked at all the same when it never gets quiet.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between attempts to watch a directory that cannot be watched.
const RETRY: Duration = Duration::from_secs(5);

/// A network and the file that it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    pub network: Network,
    pub file: PathBuf,
}

/// The first file in lexical order that holds a network, as every runtime chooses. Broken files
/// before it are passed over with a warning; the error names them when there is no other.
pub fn load(dir: &Path) -> Result<Loaded, String> {
    let files = list(dir).map_err(|error| format!("read {}: {error}", dir.display()))?;
    let mut broken = Vec::new();
    for file in files {
        match read(&file) {
            Ok(network) => {
                if !broken.is_empty() {
                    let broken = broken.join("; ");
                    tracing::warn!(broken, used = %file.display(), "CNI configuration passed over");
                }
                return Ok(Loaded { network, file });
            }
            Err(reason) => broken.push(format!("{}: {reason}", file.display())),
        }
    }
    if broken.is_empty() {
        Err(format!("no CNI configuration in {}", dir.display()))
    } else {
        Err(broken.join("; "))
    }
}

fn list(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("conflist" | "conf" | "json")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<Network, String> {
    // Asked before opening: a FIFO would block.
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("is not a file".into());
    }
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut text = Vec::new();
    file.take(MAX_FILE + 1)
        .read_to_end(&mut text)
        .map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("is larger than {MAX_FILE} bytes"));
    }
    if path
        .extension()
        .is_some_and(|extension| extension == "conflist")
    {
        Network::from_list(&text)
    } else {
        Network::from_single(&text)
    }
}

/// Calls `changed` whenever the directory's content may have changed. Never returns: a directory
/// that vanishes is waited for.
pub async fn watch(dir: &Path, changed: impl Fn()) {
    let mut complained = false;
    loop {
        match watch_once(dir, &changed).await {
            Ok(()) => complained = false,
            Err(error) if !complained => {
                tracing::warn!(dir = %dir.display(), %error, "cannot watch CNI configuration");
                complained = true;
            }
            Err(_) => {}
        }
        // Whatever happened while nobody watched.
        changed();
        tokio::time::sleep(RETRY).await;
    }
}

/// Watches until the directory is removed, renamed or unmounted.
async fn watch_once(dir: &Path, changed: &impl Fn()) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let inotify = Inotify::init()?;
    inotify.watches().add(
        dir,
        WatchMask::CLOSE_WRITE
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR,
    )?;
    let mut events = inotify.into_event_stream([0; 4096])?;
    // What changed between the last look and the watch.
    changed();
    while let Some(first) = events.next().await {
        let mut gone = is_gone(&first?);
        let patience = tokio::time::sleep(PATIENCE);
        tokio::pin!(patience);
        while !gone {
            tokio::select! {
                event = events.next() => match event {
                    Some(event) => gone = is_gone(&event?),
                    None => break,
                },
                () = tokio::time::sleep(QUIET) => break,
                () = &mut patience => break,
            }
        }
        if gone {
            return Ok(());
        }
        changed();
    }
    Ok(())
}

fn is_gone<S>(event: &inotify::Event<S>) -> bool {
    use inotify::EventMask;
    event.mask.intersects(
        EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED | EventMask::UNMOUNT,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) {
        std::fs::write(dir.join(name), text).unwrap();
    }

    fn list_of(name: &str) -> String {
        format!(r#"{{"cniVersion":"1.0.0","name":"{name}","plugins":[{{"type":"x"}}]}}"#)
    }

    #[test]
    fn the_first_usable_file_in_lexical_order_is_taken() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        assert!(load(dir).unwrap_err().contains("no CNI configuration"));
        assert!(load(&dir.join("none")).unwrap_err().contains("none"));

        write(dir, "00-notes.txt", "not ours");
        write(dir, "10-broken.conflist", "{");
        std::fs::create_dir(dir.join("15-dir.conf")).unwrap();
        let error = load(dir).unwrap_err();
        assert!(
            error.contains("10-broken.conflist") && error.contains("15-dir.conf"),
            "{error}"
        );

        write(dir, "30-c.conflist", &list_of("third"));
        assert_eq!(load(dir).unwrap().network.name, "third");
        write(
            dir,
            "20-b.conf",
            r#"{"cniVersion":"0.4.0","name":"second","type":"ptp"}"#,
        );
        let loaded = load(dir).unwrap();
        assert_eq!(loaded.network.name, "second");
        assert_eq!(loaded.file, dir.join("20-b.conf"));
    }

    #[test]
    fn a_fifo_does_not_block_and_a_giant_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let fifo = temp.path().join("10-a.conflist");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(load(temp.path()).unwrap_err().contains("is not a file"));
        std::fs::remove_file(&fifo).unwrap();
        std::fs::File::create(&fifo)
            .unwrap()
            .set_len(MAX_FILE + 1)
            .unwrap();
        assert!(load(temp.path()).unwrap_err().contains("larger than"));
    }
}
