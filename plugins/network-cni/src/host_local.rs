//! What a power loss does to the files of host-local, which keeps the addresses of most networks,
//! one file each, `<dataDir>/<network>/<address>` with the id of the container in it.
//!
//! It syncs nothing. A file that was made shortly before the power went is there afterwards without
//! what was written to it: empty, or on ext4 of its right length and full of zeros. No DEL ever finds
//! it, and that address would never be given out again. And a file that was deleted may be back,
//! after we have forgotten the pod that it was for. Against the first, such files are removed before
//! the first call of the plugins; against the second, a DEL is done when its deletion is on disk.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use gantry_ports::network::Held;
use gantry_types::PodId;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;

use crate::config::Network;

const NAME: &str = "host-local";
const DATA_DIR: &str = "/var/lib/cni/networks";
/// Where runtimes that use libcni, all but this one, note the attachments that they have made: its
/// default, and that of cri-dockerd.
pub const CACHE_DIRS: [&str; 2] = ["/var/lib/cni/results", "/var/lib/cni/cache/results"];
/// libcni writes its note when the last plugin of a chain has returned. Until then host-local's file
/// alone tells of the attachment, so one that is younger than any chain takes may be somebody's.
const YOUNG: Duration = Duration::from_secs(600);
/// Held by host-local while it makes and removes files.
const LOCK: &str = "lock";

/// Directories that were looked at since the start.
#[derive(Debug, Default)]
pub struct Mended(Mutex<HashSet<PathBuf>>);

impl Mended {
    /// Removes what a power loss left of files, once for each directory. Blocks on the disk.
    ///
    /// # Errors
    /// Names the directory. Nobody need fail for it: an address is out of use for longer.
    pub fn mend(&self, network: &Network) -> Result<(), String> {
        for dir in directories(network) {
            if self.read(|mended| mended.contains(&dir)) {
                continue;
            }
            if mend(&dir).map_err(|error| format!("{}: {error}", dir.display()))? {
                self.read(|mended| mended.insert(dir));
            }
        }
        Ok(())
    }

    fn read<T>(&self, look: impl FnOnce(&mut HashSet<PathBuf>) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Makes durable what host-local has deleted so far. Blocks on the disk.
pub fn settle(network: &Network) -> Result<(), (PathBuf, io::Error)> {
    for dir in directories(network) {
        match File::open(&dir).and_then(|dir| dir.sync_all()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err((dir, error)),
            _ => {}
        }
    }
    Ok(())
}

/// The addresses that host-local has given to whoever has an id like a pod's. `caches` are
/// [`CACHE_DIRS`]. Blocks on the disk.
pub fn held(network: &Network, caches: &[&Path]) -> io::Result<Vec<Held>> {
    let mut all = Vec::new();
    for dir in directories(network) {
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let Ok(address) = entry.file_name().to_string_lossy().parse::<IpAddr>() else {
                continue;
            };
            let mut content = String::new();
            // Given back since, or no text.
            if File::open(entry.path())
                .and_then(|file| file.take(4096).read_to_string(&mut content))
                .is_err()
            {
                continue;
            }
            let mut lines = content.lines();
            let Some(Ok(pod)) = lines.next().map(str::parse::<PodId>) else {
                continue;
            };
            let interface = lines.next().unwrap_or_default();
            let note = format!("{}-{pod}-{interface}", network.name);
            let other = if network.disable_gc {
                Some(format!(
                    "network {}, which is shared (disableGC)",
                    network.name
                ))
            } else if caches.iter().any(|cache| cache.join(&note).exists()) {
                Some("another container runtime".to_owned())
            } else if is_young(&entry.path()) {
                Some("whoever is adding it: it is younger than ten minutes".to_owned())
            } else {
                None
            };
            all.push(Held {
                pod,
                address,
                other,
            });
        }
    }
    Ok(all)
}

/// Whether a file was written a moment ago; not known is young.
fn is_young(path: &Path) -> bool {
    let written = fs::metadata(path).and_then(|file| file.modified());
    let age = written.map(|time| time.elapsed().unwrap_or_default());
    age.unwrap_or_default() < YOUNG
}

/// Where host-local has the addresses of a network: where its configuration says, and where it has
/// them by default, as plugins such as flannel write a configuration for it that we do not see.
fn directories(network: &Network) -> BTreeSet<PathBuf> {
    let ipam = network
        .plugins
        .iter()
        .filter_map(|plugin| plugin.get("ipam"));
    let local = ipam.filter(|ipam| ipam.get("type").and_then(Value::as_str) == Some(NAME));
    let told = local.filter_map(|ipam| ipam.get("dataDir").and_then(Value::as_str));
    told.chain([DATA_DIR])
        .map(Path::new)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(&network.name))
        .collect()
}

/// False when host-local is at work there: then another time.
fn mend(dir: &Path) -> io::Result<bool> {
    let mut options = File::options();
    options.write(true).create(true).mode(0o600);
    let lock = match options.open(dir.join(LOCK)) {
        // Not used yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        other => other?,
    };
    // Under the lock a file without content is none that is about to be written.
    let lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
        Err((_, Errno::EWOULDBLOCK)) => return Ok(false),
        other => other.map_err(|(_, error)| error)?,
    };
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let is_address = entry
            .file_name()
            .to_string_lossy()
            .parse::<IpAddr>()
            .is_ok();
        if is_address && entry.file_type()?.is_file() && is_blank(&entry.path())? {
            fs::remove_file(entry.path())?;
            let file = entry.path();
            tracing::warn!(file = %file.display(), "an address that was lost with the power is free again");
        }
    }
    drop(lock);
    Ok(true)
}

/// Whether a file holds nothing, or zeros alone.
fn is_blank(path: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    File::open(path)?.take(4096).read_to_end(&mut start)?;
    Ok(start.iter().all(|byte| *byte == 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn network(data_dir: &Path) -> Network {
        let list = json!({
            "cniVersion": "1.0.0",
            "name": "test",
            "plugins": [
                {"type": "bridge", "ipam": {"type": NAME, "dataDir": data_dir}},
                {"type": "portmap", "ipam": {"type": "dhcp", "dataDir": "/elsewhere"}},
            ],
        });
        Network::from_list(list.to_string().as_bytes()).unwrap()
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir).unwrap() {
            names.push(entry.unwrap().file_name().into_string().unwrap());
        }
        names.sort();
        names
    }

    #[test]
    fn addresses_whose_files_a_power_loss_left_blank_are_free_again() {
        let temp = tempfile::tempdir().unwrap();
        let (network, dir) = (network(temp.path()), temp.path().join("test"));
        let mended = Mended::default();
        // Not used yet.
        assert_eq!(mended.mend(&network), Ok(()));
        fs::create_dir(&dir).unwrap();
        let files = [
            "10.0.0.2",
            "10.0.0.3",
            "fd00::7",
            "last_reserved_ip.0",
            "lock",
        ];
        files
            .iter()
            .for_each(|name| fs::write(dir.join(name), "").unwrap());
        fs::write(dir.join("10.0.0.3"), "id\r\neth0").unwrap();
        fs::write(dir.join("fd00::7"), [0; 70]).unwrap();
        // Whoever has the lock may be about to write.
        let lock = File::open(dir.join(LOCK)).unwrap();
        let lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
        let mended = Mended::default();
        assert_eq!(mended.mend(&network), Ok(()));
        assert_eq!(names(&dir).len(), files.len());
        drop(lock);
        assert_eq!(mended.mend(&network), Ok(()));
        assert_eq!(names(&dir), ["10.0.0.3", "last_reserved_ip.0", "lock"]);
        // Once: from now on what is blank was made by somebody who lives.
        fs::write(dir.join("10.0.0.4"), "").unwrap();
        assert_eq!(mended.mend(&network), Ok(()));
        assert_eq!(names(&dir).len(), 4);
    }

    #[test]
    fn addresses_are_told_with_the_pods_that_have_them() {
        let temp = tempfile::tempdir().unwrap();
        let (mut network, dir) = (network(temp.path()), temp.path().join("test"));
        let cache = temp.path().join("results");
        assert!(held(&network, &[&cache]).unwrap().is_empty());
        let id = |n: u8| PodId::from_random([n; 32]);
        fs::create_dir(&dir).unwrap();
        fs::create_dir(&cache).unwrap();
        for (name, content) in [
            ("10.0.0.2", format!("{}\r\neth0", id(1))),
            ("fd00::7", id(2).to_string()),
            ("10.0.0.3", format!("{}\r\neth0", id(3))),
            // Not given to a pod, and no address.
            ("10.0.0.9", "reserved by hand".to_owned()),
            ("10.0.0.8", String::new()),
            ("last_reserved_ip.0", "10.0.0.3".to_owned()),
        ] {
            fs::write(dir.join(name), content).unwrap();
            let file = File::options().write(true).open(dir.join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - YOUNG)
                .unwrap();
        }
        fs::write(cache.join(format!("test-{}-eth0", id(3))), "{}").unwrap();
        let all = |network: &Network| {
            let mut all = held(network, &[&cache]).unwrap();
            all.sort_by_key(|held| held.address);
            let all = all.into_iter();
            all.map(|held| (held.address.to_string(), held.pod, held.other.is_some()))
                .collect::<Vec<_>>()
        };
        let own = |address: &str, n, other| (address.to_owned(), id(n), other);
        let [a, b, c] = [("10.0.0.2", 1), ("10.0.0.3", 3), ("fd00::7", 2)];
        let expected = [
            own(a.0, a.1, false),
            own(b.0, b.1, true),
            own(c.0, c.1, false),
        ];
        assert_eq!(all(&network), expected);
        // Its note may be still to come.
        fs::write(dir.join("10.0.0.2"), id(1).to_string()).unwrap();
        assert_eq!(all(&network)[0], own(a.0, a.1, true));
        network.disable_gc = true;
        assert_eq!(
            all(&network),
            [a, b, c].map(|(address, n)| own(address, n, true))
        );
    }

    #[test]
    fn directories_are_those_of_host_local_alone() {
        let found = directories(&network(Path::new("/data")));
        let expected = ["/data/test", "/var/lib/cni/networks/test"].map(PathBuf::from);
        assert_eq!(found, BTreeSet::from(expected));
        assert!(settle(&network(Path::new("/no/such/directory"))).is_ok());
    }
}
