//! The process whose namespaces the pod shares.
//!
//! ```text
//! shim                                   holder (clone3 into new namespaces)
//!  |-- writes uid_map, gid_map             |
//!  |-- GO ------------------------------->  becomes root of its user namespace; raises lo;
//!  |                                        sets host name and sysctls; empty root;
//!  |                                        drops capabilities; no_new_privs; seccomp
//!  |  <----------------------- OK or text   |
//!  |-- pins namespaces                      |
//!  |-- GO ------------------------------->  closes everything but the channel
//!  |   (the daemon has it on record)        |
//!  |-- GO ------------------------------->  closes that, gives its memory back, sleeps
//! ```
//!
//! The end of the channel at any point ends the holder: one that nobody has on record never outlives
//! its shim. One that is on record does, so that another shim can take the pod over ([`adopt`]). As
//! PID 1 of a shared PID namespace it reaps by ignoring SIGCHLD.
//!
//! [`adopt`]: Holder::adopt

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_shim_api::v1;
use gantry_sys::clone::{Child, Namespaces};
use gantry_sys::memory::Ranges;
use gantry_sys::pidfd::PidFd;
use gantry_sys::{caps, namespace, process, seccomp, signal};
use gantry_types::ProcessRef;

use crate::cgroup;
use crate::error::Error;

const GO: u8 = b'g';
const OK: u8 = 0;

/// The channel's descriptor in the holder: standard output.
const CHANNEL: u32 = 1;

/// How long the holder may take to prepare itself: it only writes to /proc and mounts a tmpfs.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a holder that was killed may take to end: with it ends every process of a shared PID
/// namespace.
const END_PATIENCE: Duration = Duration::from_secs(20);

/// How long killed processes may take to leave a cgroup.
const REMOVE_PATIENCE: Duration = Duration::from_secs(2);

pub struct Holder {
    child: Child,
    /// Its end is the holder's, until it is let go.
    channel: Option<UnixStream>,
    /// Made by a shim before us: not our child.
    pub adopted: bool,
    pub process: ProcessRef,
    pub alive: bool,
    pins: Vec<PathBuf>,
    /// Owner on the host of what belongs to root in the pod's user namespace, if it has one.
    pub mapped_root: Option<(u32, u32)>,
    cgroups: Vec<PathBuf>,
    /// Cgroups that it is yet to join.
    pending: Vec<PathBuf>,
}

impl Holder {
    /// Makes the holder and pins its namespaces. After an error nothing is left.
    pub fn start(spec: &v1::Holder) -> Result<Self, Error> {
        let sysctls = sysctls(spec)?;
        let dirs: Vec<PathBuf> = spec.cgroup_dirs.iter().map(PathBuf::from).collect();
        cgroup::check(&dirs)?;
        let namespaces = namespaces(spec);
        // On v2 the holder is born in its cgroup. The move that v1 needs takes milliseconds:
        // `join_cgroups` does it when the daemon has its answer (`Shim::settle`).
        let mut born = None;
        let mut made = Vec::new();
        let mut pending = Vec::new();
        for dir in &dirs {
            match born_in(dir, born.is_some()) {
                Ok(Some(fd)) => {
                    born = Some(fd);
                    made.push(dir.clone());
                }
                Ok(None) => pending.push(dir.clone()),
                Err(e) => {
                    cgroup::remove(&made, REMOVE_PATIENCE);
                    return Err(e);
                }
            }
        }
        let child = clone(spec, namespaces, &sysctls, born.as_ref());
        let (child, mut channel) = match child {
            Ok(started) => started,
            Err(e) => {
                cgroup::remove(&made, REMOVE_PATIENCE);
                return Err(e);
            }
        };
        let process = ProcessRef {
            pid: child.pid,
            start_time: 0,
        };
        let mut holder = Self {
            child,
            channel: None,
            adopted: false,
            process,
            alive: true,
            pins: Vec::new(),
            mapped_root: mapped_root(spec),
            cgroups: made,
            pending,
        };
        match holder.prepare(spec, namespaces, &mut channel) {
            Ok(()) => {
                holder.channel = Some(channel);
                Ok(holder)
            }
            Err(e) => {
                holder.teardown();
                Err(e)
            }
        }
    }

    /// Takes over the holder of a shim that has died, which `spec` describes. Not our child: its end
    /// comes by its descriptor ([`Holder::pidfd`]). After an error the pod is as it was.
    pub fn adopt(spec: &v1::Holder, process: ProcessRef) -> Result<Self, Error> {
        let dirs: Vec<PathBuf> = spec.cgroup_dirs.iter().map(PathBuf::from).collect();
        cgroup::check(&dirs)?;
        let pidfd = PidFd::open_process(process).map_err(Error::call("open the pod's holder"))?;
        if !process::alive(process) {
            let message = "the pod's holder has died".to_owned();
            return Err(Error::FailedPrecondition(message));
        }
        let pins = pins(spec).into_iter().map(|(_, path)| path).collect();
        Ok(Self {
            child: Child {
                pid: process.pid,
                pidfd,
            },
            channel: None,
            adopted: true,
            process,
            alive: true,
            pins,
            mapped_root: mapped_root(spec),
            cgroups: Vec::new(),
            // The shim before us may have died before it came to that; a second time is nothing.
            pending: dirs,
        })
    }

    /// To be watched for the end of a holder that is not our child.
    pub fn pidfd(&self) -> &PidFd {
        &self.child.pidfd
    }

    /// It is on record: from now on it lives until it is killed.
    pub fn keep(&mut self) -> Result<(), Error> {
        match self.channel.take() {
            Some(mut channel) => channel
                .write_all(&[GO])
                .map_err(Error::call("let the holder go")),
            None => Ok(()),
        }
    }

    fn prepare(
        &mut self,
        spec: &v1::Holder,
        namespaces: Namespaces,
        channel: &mut UnixStream,
    ) -> Result<(), Error> {
        let pid = self.child.pid;
        self.process =
            process::process_ref(pid).map_err(Error::call("read the holder's start time"))?;
        if namespaces.user {
            write_map(pid, "uid_map", &spec.uid_mappings)?;
            write_map(pid, "gid_map", &spec.gid_mappings)?;
        }
        gantry_sys::oom::set_oom_score_adj(pid, spec.oom_score_adj)
            .map_err(Error::call("set the holder's OOM score"))?;
        let talk = Error::call("talk to the holder");
        let patience = |channel: &UnixStream| channel.set_read_timeout(Some(PATIENCE));
        patience(channel)
            .and_then(|()| channel.write_all(&[GO]))
            .map_err(talk)?;
        let mut verdict = Vec::new();
        let mut byte = [0];
        channel
            .read_exact(&mut byte)
            .map_err(Error::call("hear from the holder"))?;
        if byte[0] != OK {
            verdict.push(byte[0]);
            let rest = channel.take(4096).read_to_end(&mut verdict);
            rest.map_err(Error::call("hear from the holder"))?;
            let text = String::from_utf8_lossy(&verdict).into_owned();
            return Err(Error::FailedPrecondition(text));
        }
        for (name, path) in pins(spec) {
            self.pin(name, path)?;
        }
        channel
            .write_all(&[GO])
            .map_err(Error::call("let the holder go"))
    }

    /// Keeps a namespace as a file, so that it has a name and outlives the holder.
    fn pin(&mut self, name: &str, path: PathBuf) -> Result<(), Error> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(Error::io("make directory", parent))?;
        }
        std::fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(&path)
            .map_err(Error::io("make namespace pin", &path))?;
        // From here on there is something to undo.
        self.pins.push(path.clone());
        let namespace = PathBuf::from(format!("/proc/{}/ns/{name}", self.child.pid));
        gantry_sys::mount::bind(&namespace, &path).map_err(Error::io("pin namespace at", &path))
    }

    /// Joins the cgroups that the holder was not born in.
    pub fn join_cgroups(&mut self) -> Result<(), Error> {
        for dir in std::mem::take(&mut self.pending) {
            cgroup::make(&dir)?;
            self.cgroups.push(dir.clone());
            cgroup::join(&dir, self.child.pid)?;
        }
        Ok(())
    }

    pub fn kill(&self) {
        // Gone already is what was wanted.
        let _ = self.child.pidfd.signal(signal::SIGKILL);
    }

    /// Ends the holder and takes away its pins and cgroups.
    pub fn teardown(&mut self) {
        self.kill();
        if self.alive {
            self.alive = false;
            let pidfd = &self.child.pidfd;
            let ended = match self.adopted {
                true => pidfd.wait_ended(END_PATIENCE).map(drop),
                false => pidfd.wait().map(drop),
            };
            if let Err(e) = ended {
                crate::report!("wait for the holder: {e}");
            }
        }
        for pin in std::mem::take(&mut self.pins) {
            if let Err(e) = gantry_sys::mount::umount_all(&pin) {
                crate::report!("unmount {}: {e}", pin.display());
            }
            match std::fs::remove_file(&pin) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    crate::report!("remove {}: {e}", pin.display());
                }
                _ => {}
            }
        }
        cgroup::remove(&std::mem::take(&mut self.cgroups), REMOVE_PATIENCE);
    }
}

/// The namespaces that are made, beside that of its mounts.
fn namespaces(spec: &v1::Holder) -> Namespaces {
    Namespaces {
        user: !spec.uid_mappings.is_empty(),
        net: !spec.netns_path.is_empty(),
        ipc: spec.new_ipc,
        uts: spec.new_uts,
        pid: spec.new_pid,
        mount: true,
    }
}

/// The namespaces that get a name, and where.
fn pins(spec: &v1::Holder) -> Vec<(&'static str, PathBuf)> {
    let made = namespaces(spec);
    let dir = Path::new(&spec.pin_dir);
    let all = [
        (made.net, "net", PathBuf::from(&spec.netns_path)),
        (made.ipc, "ipc", dir.join("ipc")),
        (made.uts, "uts", dir.join("uts")),
        (made.pid, "pid", dir.join("pid")),
        (made.user, "user", dir.join("user")),
    ];
    let made = all.into_iter().filter(|(made, ..)| *made);
    made.map(|(_, name, path)| (name, path)).collect()
}

/// The cgroup's directory if the holder can be born in it: the first one on v2. Makes it.
fn born_in(dir: &Path, taken: bool) -> Result<Option<OwnedFd>, Error> {
    let exists = |dir: &Path| dir.ancestors().find(|dir| dir.is_dir()).map(Path::to_owned);
    let base = exists(dir).unwrap_or_else(|| dir.to_owned());
    let v2 = gantry_sys::fs::is_cgroup2(&base).map_err(Error::io("look at", &base))?;
    if taken || !v2 {
        return Ok(None);
    }
    cgroup::make(dir)?;
    gantry_sys::fs::open_root(dir)
        .map(Some)
        .map_err(Error::io("open cgroup", dir))
}

fn clone(
    spec: &v1::Holder,
    namespaces: Namespaces,
    sysctls: &[(String, PathBuf, String)],
    cgroup: Option<&OwnedFd>,
) -> Result<(Child, UnixStream), Error> {
    let (ours, theirs) = UnixStream::pair().map_err(Error::call("make the holder's channel"))?;
    let mut channel = Some((ours, theirs));
    let child = gantry_sys::clone::spawn(namespaces, cgroup.map(AsFd::as_fd), || {
        let Some((ours, theirs)) = channel.take() else {
            return 1;
        };
        // Else we would not see the end of the channel when the shim dies.
        drop(ours);
        live(spec, namespaces, sysctls, theirs)
    })
    .map_err(Error::call("clone the holder"))?;
    match channel {
        Some((ours, _)) => Ok((child, ours)),
        None => Err(Error::FailedPrecondition(
            "the holder's channel is gone".into(),
        )),
    }
}

/// The holder's life. Returns only to end it.
fn live(
    spec: &v1::Holder,
    namespaces: Namespaces,
    sysctls: &[(String, PathBuf, String)],
    channel: UnixStream,
) -> i32 {
    // Where it can stay when all else is closed: the filter leaves no way to move it.
    if process::replace_stdio(&channel, CHANNEL).is_err() {
        return 1;
    }
    drop(channel);
    let channel = std::io::stdout();
    let channel = channel.as_fd();
    let go = || gantry_sys::io::read(channel, &mut [0]).is_ok_and(|count| count == 1);
    if !go() {
        return 1;
    }
    let ranges = match enter(spec, namespaces, sysctls) {
        Ok(ranges) => ranges,
        Err(text) => {
            // The shim hears the end of the channel in any case.
            let _ = gantry_sys::io::write(channel, text.as_bytes());
            return 1;
        }
    };
    // read(2) and write(2) are all that the filter leaves for the channel: no recv, no send.
    let told = gantry_sys::io::write(channel, &[OK]).is_ok();
    if !told || !go() {
        return 1;
    }
    let _ = process::close_from(CHANNEL + 1);
    if !go() {
        return 1;
    }
    // All but the sysfs.
    let _ = process::close_from(CHANNEL);
    gantry_sys::memory::pause_forever(ranges)
}

fn enter(
    spec: &v1::Holder,
    namespaces: Namespaces,
    sysctls: &[(String, PathBuf, String)],
) -> Result<Ranges, String> {
    let step = |what: &'static str| move |e: std::io::Error| format!("holder: {what}: {e}");
    process::set_name(c"gantry-holder").map_err(step("set name"))?;
    signal::block_all().map_err(step("block signals"))?;
    signal::ignore_children().map_err(step("ignore children"))?;
    if namespaces.user {
        process::become_root().map_err(step("become root of the user namespace"))?;
    }
    if namespaces.net {
        namespace::raise_loopback().map_err(step("raise lo"))?;
        // Else the first container of the pod would decide for all: a privileged one that starts
        // after an ordinary one would find its /sys read-only. Nobody is privileged in a pod with
        // a user namespace.
        if !namespaces.user {
            let sysfs = gantry_sys::mount::detached_sysfs().map_err(step("mount sysfs"))?;
            process::replace_stdio(sysfs, 0).map_err(step("keep sysfs"))?;
        }
    }
    if namespaces.uts && !spec.hostname.is_empty() {
        namespace::set_hostname(&spec.hostname).map_err(step("set host name"))?;
    }
    for (name, path, value) in sysctls {
        std::fs::write(path, value).map_err(|e| format!("set sysctl {name}={value}: {e}"))?;
    }
    let ranges = Ranges::own().map_err(step("read own memory map"))?;
    namespace::enter_empty_root().map_err(step("enter empty root"))?;
    caps::drop_all().map_err(step("drop capabilities"))?;
    process::set_no_new_privs().map_err(step("set no_new_privs"))?;
    // In a shared PID namespace the pod's containers see this process, and root there without
    // capabilities of note would be its equal: /proc/1/exe must not lead it to the shim's binary.
    process::set_not_dumpable().map_err(step("forbid dumping"))?;
    seccomp::only_wait().map_err(step("install seccomp filter"))?;
    Ok(ranges)
}

/// Name, file and value of each sysctl. Dots separate the parts of a name, or slashes if the
/// first separator is one, and then a dot is part of a part (sysctl(8)).
fn sysctls(spec: &v1::Holder) -> Result<Vec<(String, PathBuf, String)>, Error> {
    let one = |(name, value): (&String, &String)| {
        let slashes = name
            .find(['.', '/'])
            .is_some_and(|at| name.as_bytes()[at] == b'/');
        let separator = if slashes { '/' } else { '.' };
        let mut path = PathBuf::from("/proc/sys");
        for part in name.split(separator) {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.:@*".contains(&b);
            let dots = part == "." || part == "..";
            // With dots as separators a slash is a dot of an interface's name.
            let part = if slashes {
                part.to_owned()
            } else {
                part.replace('/', ".")
            };
            if part.is_empty() || dots || part == ".." || !part.bytes().all(plain) {
                return Err(Error::InvalidArgument(format!(
                    "sysctl name {name:?} is malformed"
                )));
            }
            path.push(part);
        }
        Ok((name.clone(), path, value.clone()))
    };
    spec.sysctls.iter().map(one).collect()
}

fn mapped_root(spec: &v1::Holder) -> Option<(u32, u32)> {
    let root = |mappings: &[v1::IdMapping]| {
        let of_root = mappings.iter().find(|map| map.container_id == 0);
        of_root.map(|map| map.host_id)
    };
    Some((root(&spec.uid_mappings)?, root(&spec.gid_mappings)?))
}

fn write_map(pid: i32, file: &str, mappings: &[v1::IdMapping]) -> Result<(), Error> {
    let path = PathBuf::from(format!("/proc/{pid}/{file}"));
    let lines: Vec<String> = mappings
        .iter()
        .map(|map| format!("{} {} {}\n", map.container_id, map.host_id, map.length))
        .collect();
    // One write: the kernel takes a map only once (user_namespaces(7)).
    std::fs::write(&path, lines.concat()).map_err(Error::io("write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> Option<String> {
        let spec = v1::Holder {
            sysctls: [(name.to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        let list = sysctls(&spec).ok()?;
        Some(list[0].1.to_str().unwrap().to_owned())
    }

    #[test]
    fn sysctl_names_become_paths_that_stay_below_proc_sys() {
        let forward = Some("/proc/sys/net/ipv4/ip_forward");
        assert_eq!(path("net.ipv4.ip_forward").as_deref(), forward);
        assert_eq!(path("net/ipv4/ip_forward").as_deref(), forward);
        let vlan = Some("/proc/sys/net/ipv4/conf/eth0.1/rp_filter");
        assert_eq!(path("net/ipv4/conf/eth0.1/rp_filter").as_deref(), vlan);
        assert_eq!(path("net.ipv4.conf.eth0/1.rp_filter").as_deref(), vlan);
        for bad in [
            "",
            "net/../kernel/core_pattern",
            "net..x",
            "/etc/passwd",
            "a b",
            "a.//.b",
        ] {
            assert_eq!(path(bad), None, "{bad}");
        }
    }
}
