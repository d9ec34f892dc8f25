//! What a fixture has on the machine: to be taken before and after, and compared.
//!
//! Everything is found by names and namespaces that only the fixture has, so that other runs on
//! the same machine are not seen.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::daemon::SHIMS;

/// How long what is being torn down may take to be gone.
const SETTLE: Duration = Duration::from_secs(30);

/// Where to look.
#[derive(Clone, Debug)]
pub struct Places {
    /// `--root` of the daemon.
    pub root: PathBuf,
    /// `--state` of the daemon.
    pub state: PathBuf,
    /// Every directory below which the fixture makes mounts.
    pub dirs: Vec<PathBuf>,
    /// Directory of pinned network namespaces.
    pub netns_dir: PathBuf,
    /// The fixture's own network namespace as [`crate::netns::Netns::link`] tells it.
    pub netns: String,
    /// Name of the cgroup that all others lie in, without a slash.
    pub cgroup: String,
    /// `dataDir` of host-local.
    pub ipam_dir: PathBuf,
}

/// A process that belongs to the fixture.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    pub pid: i32,
    pub command: String,
}

impl Places {
    /// Processes in the fixture's network namespace, in its cgroups, or with one of its
    /// directories on the command line; zombies and this process left out.
    pub fn processes(&self) -> Vec<Process> {
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok());
        pids.filter(|pid| *pid != own)
            .filter_map(|pid| self.process(pid))
            .collect()
    }

    fn process(&self, pid: i32) -> Option<Process> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let command = fs::read(proc.join("cmdline")).ok()?;
        // A kernel thread or a zombie has none.
        if command.is_empty() {
            return None;
        }
        let command = String::from_utf8_lossy(&command)
            .replace('\0', " ")
            .trim_end()
            .to_owned();
        let named = || {
            self.dirs
                .iter()
                .any(|dir| command.contains(&*dir.to_string_lossy()))
        };
        let in_netns = || {
            fs::read_link(proc.join("ns/net"))
                .is_ok_and(|link| link.to_string_lossy() == self.netns)
        };
        let in_cgroup = || {
            let text = fs::read_to_string(proc.join("cgroup")).unwrap_or_default();
            text.split(['/', '\n', ':']).any(|part| part == self.cgroup)
        };
        (named() || in_netns() || in_cgroup()).then_some(Process { pid, command })
    }

    /// Mount points at or below the fixture's directories, in the order they were made.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        table
            .lines()
            .filter_map(|line| line.split(' ').nth(4).map(PathBuf::from))
            .filter(|point| self.dirs.iter().any(|dir| point.starts_with(dir)))
            .collect()
    }

    /// The fixture's cgroup in each hierarchy that has it.
    pub fn cgroup_roots(&self) -> Vec<PathBuf> {
        let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mut roots = Vec::new();
        for line in table.lines() {
            let fields: Vec<_> = line.split(' ').collect();
            if let [_, point, "cgroup" | "cgroup2", ..] = fields[..] {
                let dir = Path::new(point).join(&self.cgroup);
                if dir.is_dir() && !roots.contains(&dir) {
                    roots.push(dir);
                }
            }
        }
        roots
    }

    /// All cgroups below those, children before parents.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    walk(&entry.path(), found);
                    found.push(entry.path());
                }
            }
        }
        let mut found = Vec::new();
        self.cgroup_roots()
            .iter()
            .for_each(|root| walk(root, &mut found));
        found
    }

    /// Everything that a pod leaves somewhere. `interfaces` are those of the fixture's namespace;
    /// `daemon` is the pid whose descriptors count.
    pub fn snapshot(&self, interfaces: Vec<String>, daemon: Option<i32>) -> Snapshot {
        let mut kinds = BTreeMap::new();
        let mut put = |kind: &'static str, names: Vec<String>| {
            kinds.insert(kind, names.into_iter().collect::<BTreeSet<_>>());
        };
        let text = |paths: Vec<PathBuf>| -> Vec<String> {
            paths
                .iter()
                .map(|path| path.display().to_string())
                .collect()
        };
        let processes = self
            .processes()
            .into_iter()
            .filter(|p| Some(p.pid) != daemon);
        put(
            "process",
            processes
                .map(|p| format!("{} {}", p.pid, p.command))
                .collect(),
        );
        put("mount", numbered(text(self.mounts())));
        let mut cgroups = self.cgroups();
        // The parent of the shims' cgroups comes with the first of them and stays.
        let slice = format!("-{SHIMS}.slice");
        cgroups.retain(|dir| {
            let name = dir.file_name().unwrap_or_default().to_string_lossy();
            name != SHIMS && !name.ends_with(&slice)
        });
        put("cgroup", text(cgroups));
        put("network namespace", names(&self.netns_dir));
        put("interface", interfaces);
        put("address", addresses(&self.ipam_dir));
        let mut files = Vec::new();
        for dir in [&self.state, &self.root] {
            walk(dir, &mut files);
        }
        // The runtimes' directories come with their first container and stay. What a pull that
        // failed had fetched is kept for the next one, and collected if none comes.
        let runtimes = self.state.join("runtime");
        let part = |path: &Path| {
            path.extension()
                .is_some_and(|extension| extension == "part")
        };
        files.retain(|path| *path != runtimes && path.parent() != Some(&runtimes) && !part(path));
        put("file", text(files));
        if let Some(pid) = daemon {
            put("descriptor of the daemon", descriptors(pid));
        }
        Snapshot { kinds }
    }
}

/// What was there at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    kinds: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Snapshot {
    /// What `after` has and this has not.
    pub fn leaks(&self, after: &Snapshot) -> Vec<String> {
        let none = BTreeSet::new();
        let mut leaks = Vec::new();
        for (kind, names) in &after.kinds {
            let before = self.kinds.get(kind).unwrap_or(&none);
            leaks.extend(
                names
                    .difference(before)
                    .map(|name| format!("{kind}: {name}")),
            );
        }
        leaks
    }
}

/// Takes snapshots until nothing is left over or the time for that has passed; returns what is.
pub fn settle(before: &Snapshot, take: impl Fn() -> Snapshot) -> Vec<String> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let leaks = before.leaks(&take());
        if leaks.is_empty() || Instant::now() >= deadline {
            return leaks;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Open descriptors of a process by what they refer to, numbered where several refer to the same.
/// TCP connections are left out: clients keep them for a while on purpose.
pub fn descriptors(pid: i32) -> Vec<String> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let tcp = tcp_sockets(&proc);
    let mut found = Vec::new();
    for entry in fs::read_dir(proc.join("fd"))
        .into_iter()
        .flatten()
        .flatten()
    {
        // Closed between the listing and now.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        if tcp.contains(&target) {
            continue;
        }
        found.push(match target.split_once(":[") {
            Some((kind @ ("socket" | "pipe"), _)) => kind.to_owned(),
            _ => target,
        });
    }
    numbered(found)
}

/// `socket:[INODE]` of each TCP socket in the process's network namespace.
fn tcp_sockets(proc: &Path) -> BTreeSet<String> {
    let mut sockets = BTreeSet::new();
    for table in ["net/tcp", "net/tcp6"] {
        let text = fs::read_to_string(proc.join(table)).unwrap_or_default();
        let inodes = text
            .lines()
            .skip(1)
            .filter_map(|line| line.split_ascii_whitespace().nth(9));
        sockets.extend(inodes.map(|inode| format!("socket:[{inode}]")));
    }
    sockets
}

/// Tells equal names apart, so that a set counts them.
fn numbered(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    let mut last: Option<(String, usize)> = None;
    for name in &mut names {
        let count = match &last {
            Some((same, count)) if same == name => count + 1,
            _ => 1,
        };
        last = Some((name.clone(), count));
        if count > 1 {
            name.push_str(&format!(" #{count}"));
        }
    }
    names
}

/// File names in a directory; a directory that is absent has none.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Addresses that host-local holds, one file each.
fn addresses(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for network in names(dir) {
        let files = names(&dir.join(&network)).into_iter();
        found.extend(files.filter(|name| name.parse::<std::net::IpAddr>().is_ok()));
    }
    found
}

/// What is kept on purpose: records and images.
const KEPT: [&str; 4] = ["store", "blobs", "layers", "index.json"];

/// Root file systems.
const NOT_OURS: [&str; 3] = ["fs", "work", "rootfs"];

/// Every file and directory below `dir`.
fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if KEPT.iter().any(|kept| name == *kept) {
            continue;
        }
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir && !NOT_OURS.iter().any(|other| name == *other) {
            walk(&entry.path(), found);
        }
        found.push(entry.path());
    }
}

/// Removes the fixture's cgroups; their processes must have ended.
pub fn remove_cgroups(places: &Places) -> io::Result<()> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let mut failed = None;
        for dir in places.cgroups().into_iter().chain(places.cgroup_roots()) {
            if let Err(error) = fs::remove_dir(&dir) {
                failed = Some(io::Error::new(
                    error.kind(),
                    format!("{}: {error}", dir.display()),
                ));
            }
        }
        match failed {
            None => return Ok(()),
            Some(error) if Instant::now() >= deadline => return Err(error),
            Some(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_is_a_leak_and_what_has_gone_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| dir.path().join(name);
        let places = Places {
            root: place("root"),
            state: place("state"),
            dirs: vec![dir.path().to_owned()],
            netns_dir: place("netns"),
            netns: "net:[0]".to_owned(),
            cgroup: "gantry-no-such-cgroup".to_owned(),
            ipam_dir: place("ipam"),
        };
        for made in ["netns", "state/pods/old", "ipam/net"] {
            fs::create_dir_all(place(made)).unwrap();
        }
        let before = places.snapshot(vec!["lo".into()], None);
        fs::remove_dir(place("state/pods/old")).unwrap();
        fs::create_dir(place("state/pods/new")).unwrap();
        for file in ["netns/gantry-1", "ipam/net/10.0.0.7", "ipam/net/lock"] {
            fs::write(place(file), "").unwrap();
        }
        let mut sleeper = std::process::Command::new("sh")
            .args(["-c", "read _", &place("x").display().to_string()])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The arguments of a process may show a moment after it was started.
        let cmdline = format!("/proc/{}/cmdline", sleeper.id());
        while !fs::read_to_string(&cmdline).is_ok_and(|text| text.contains("read _")) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let after = places.snapshot(vec!["lo".into(), "veth1".into()], None);
        let leaks = before.leaks(&after);
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        let made = format!("file: {}", place("state/pods/new").display());
        let expected = [
            "address: 10.0.0.7",
            &made,
            "interface: veth1",
            "network namespace: gantry-1",
        ];
        assert_eq!(leaks[..4], expected, "{leaks:?}");
        assert!(
            leaks[4].starts_with("process: ") && leaks.len() == 5,
            "{leaks:?}"
        );
        assert!(after.leaks(&after).is_empty());
    }

    #[test]
    fn descriptors_of_one_kind_are_counted() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let count = || {
            descriptors(pid)
                .iter()
                .filter(|d| d.starts_with("/dev/zero"))
                .count()
        };
        assert_eq!(count(), 0);
        let files = [
            fs::File::open("/dev/zero").unwrap(),
            fs::File::open("/dev/zero").unwrap(),
        ];
        assert_eq!(count(), 2);
        drop(files);
        assert_eq!(count(), 0);
    }
}
