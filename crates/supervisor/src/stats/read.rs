//! Reads the files of cgroups, each once, into one buffer.
//!
//! Nothing is kept open between calls. A descriptor for each file would save the look-up of its
//! path, which is a small part of a read (the counting behind `memory.stat` is the large one), and
//! would cost ten descriptors a container, of 500 containers 5000, and a cgroup that is gone kept
//! in the kernel's memory by each.
//!
//! A file that is not there leaves its numbers out: the kernel does not have it, or the cgroup has
//! gone. What else goes wrong is kept for one line in the log.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use gantry_types::ProcessRef;

use super::disk::device_name;
use super::parse;
use super::usage::{
    Cpu, Descriptors, Details, Device, HugePages, Interface, Limits, Memory, Pressures, Processes,
    Usage,
};
use crate::cgroup::Cgroups;
use crate::clock::now_ns;

/// More than what any of these files has on a machine with a few devices; the buffer grows for
/// others, but never without bound.
const BUFFER: usize = 16 * 1024;
const BUFFER_MAX: usize = 4 * 1024 * 1024;
/// Processes of a container whose descriptors are counted; and how many descriptors. Both cost a
/// system call or more each. Where there are more, there is no number rather than a wrong one.
const PROCESSES_MAX: usize = 512;
const DESCRIPTORS_MAX: u64 = 32 * 1024;
/// Cgroups that a container has made below its own and that are looked through for processes. Of
/// one that made more, there is no number of processes or descriptors.
const BELOW_MAX: usize = 256;
/// Interfaces of a network that are told, [`DEFAULT_INTERFACE`] among them. Who may make interfaces
/// makes thousands, and a kubelet receives so much and no more.
const INTERFACES_MAX: usize = 256;

/// The interface that a CNI network is attached by first.
pub const DEFAULT_INTERFACE: &str = "eth0";

/// What is wanted beside CPU time, memory and swap.
#[derive(Clone, Copy, Debug, Default)]
pub struct Want {
    /// The limit on memory, for a cgroup whose limits are on no record.
    pub limit: bool,
    pub tasks: bool,
    pub pressure: bool,
    /// Where the CPU time went, on v1 in files of its own.
    pub cpu_times: bool,
}

pub struct Reader<'a> {
    cgroups: &'a Cgroups,
    buffer: Vec<u8>,
    path: PathBuf,
    /// Names of devices; containers share them.
    devices: HashMap<Device, String>,
    /// The first file that could not be read though it is there.
    pub trouble: Option<(PathBuf, io::Error)>,
}

impl<'a> Reader<'a> {
    pub fn new(cgroups: &'a Cgroups) -> Self {
        Self {
            cgroups,
            buffer: vec![0; BUFFER],
            path: PathBuf::new(),
            devices: HashMap::new(),
            trouble: None,
        }
    }

    /// The text of a file; `None` if it is not there, or cannot be read.
    fn file(&mut self, dir: &Path, name: &str) -> Option<&[u8]> {
        self.path.clear();
        self.path.push(dir);
        self.path.push(name);
        match File::open(&self.path).and_then(|file| fill(file, &mut self.buffer)) {
            Ok(length) => self.buffer.get(..length),
            Err(error) => {
                if !is_gone(&error) && self.trouble.is_none() {
                    self.trouble = Some((self.path.clone(), error));
                }
                None
            }
        }
    }

    fn number(&mut self, dir: &Path, name: &str) -> Option<u64> {
        parse::number(self.file(dir, name)?)
    }

    /// As [`Cgroups::controller`], which is where `dir` says on v2.
    fn at(&self, controller: &str, dir: &Path) -> Option<PathBuf> {
        self.cgroups.controller(controller, dir)
    }

    /// What a cgroup uses, given by its directory as in [`crate::cgroup::Place::dir`]. `None` when
    /// it has gone.
    pub fn usage(&mut self, dir: &Path, want: Want) -> Option<Usage> {
        let mut usage = Usage {
            at: now_ns(),
            cpu: self.cpu(dir, want.cpu_times),
            ..Usage::default()
        };
        match self.cgroups.is_v2() {
            true => self.memory_v2(dir, want, &mut usage),
            false => self.memory_v1(dir, want, &mut usage),
        }
        if want.tasks
            && let Some(pids) = self.at("pids", dir)
        {
            usage.tasks = self.number(&pids, "pids.current");
        }
        (usage.cpu.is_some() || usage.memory.is_some()).then_some(usage)
    }

    /// CPU time alone; with `times` also where it went.
    pub fn cpu(&mut self, dir: &Path, times: bool) -> Option<Cpu> {
        if self.cgroups.is_v2() {
            return parse::cpu_v2(self.file(dir, "cpu.stat")?);
        }
        let account = self.at("cpuacct", dir)?;
        let mut cpu = Cpu {
            usage: self.number(&account, "cpuacct.usage")?,
            ..Cpu::default()
        };
        if times {
            if let Some(text) = self.file(&account, "cpuacct.stat") {
                parse::cpu_times_v1(text, &mut cpu);
            }
            if let Some(scheduler) = self.at("cpu", dir)
                && let Some(text) = self.file(&scheduler, "cpu.stat")
            {
                parse::cpu_throttling_v1(text, &mut cpu);
            }
        }
        Some(cpu)
    }

    fn memory_v2(&mut self, dir: &Path, want: Want, usage: &mut Usage) {
        if let Some(current) = self.number(dir, "memory.current") {
            let text = self.file(dir, "memory.stat");
            // Without it all of the usage would be the working set, by which a kubelet evicts.
            let mut memory = text.map(|text| parse::memory_v2(current, text));
            if want.limit
                && let Some(memory) = &mut memory
            {
                memory.limit = self.file(dir, "memory.max").and_then(parse::limit);
            }
            usage.memory = memory;
            usage.swap = self.number(dir, "memory.swap.current");
        }
        if want.pressure {
            let mut of = |name| self.file(dir, name).map(parse::pressure);
            usage.pressure = Pressures {
                cpu: of("cpu.pressure"),
                memory: of("memory.pressure"),
                io: of("io.pressure"),
            };
        }
    }

    fn memory_v1(&mut self, dir: &Path, want: Want, usage: &mut Usage) {
        let Some(current) = self.number(dir, "memory.usage_in_bytes") else {
            return;
        };
        // As on v2.
        let Some(text) = self.file(dir, "memory.stat") else {
            return;
        };
        let (mut memory, swap): (Memory, _) = parse::memory_v1(current, text);
        if want.limit {
            let text = self.file(dir, "memory.limit_in_bytes");
            memory.limit = text.and_then(parse::limit);
        }
        usage.memory = Some(memory);
        usage.swap = swap;
    }

    /// What pod metrics tell beside the usage. `init`: the first process of a container, of which
    /// also what a look at its processes tells.
    pub fn details(&mut self, dir: &Path, init: Option<ProcessRef>) -> Details {
        let mut details = match self.cgroups.is_v2() {
            true => self.details_v2(dir),
            false => self.details_v1(dir),
        };
        if let Some(pids) = self.at("pids", dir) {
            let limit = self.file(&pids, "pids.max");
            details.max_tasks = limit.and_then(parse::task_limit);
        }
        if let Some(dir) = self.at("hugetlb", dir) {
            for size in huge_page_sizes() {
                details.huge_pages.extend(self.huge_pages(&dir, size));
            }
        }
        for io in &mut details.io {
            let Device { major, minor } = io.device;
            let name = self.devices.entry(io.device);
            let name = name.or_insert_with(|| device_name(major, minor));
            io.name.clone_from(name);
        }
        if let Some(init) = init {
            details.processes = self.processes(dir, init);
        }
        details
    }

    /// Limits of a cgroup that are on no record.
    pub fn limits(&mut self, dir: &Path) -> Limits {
        match self.cgroups.is_v2() {
            true => self.limits_v2(dir),
            false => self.limits_v1(dir),
        }
    }

    fn limits_v2(&mut self, dir: &Path) -> Limits {
        let cpu = self.file(dir, "cpu.max").map(parse::cpu_max);
        let (cpu_quota, cpu_period) = cpu.unwrap_or_default();
        Limits {
            cpu_period,
            cpu_quota,
            cpu_shares: self.file(dir, "cpu.weight").and_then(parse::shares),
            reserved: self.file(dir, "memory.min").and_then(parse::limit),
            swap: self.file(dir, "memory.swap.max").and_then(parse::limit),
        }
    }

    fn limits_v1(&mut self, dir: &Path) -> Limits {
        let mut limit = |name| self.file(dir, name).and_then(parse::limit);
        let mut limits = Limits {
            reserved: limit("memory.soft_limit_in_bytes"),
            swap: limit("memory.memsw.limit_in_bytes"),
            ..Limits::default()
        };
        if let Some(cpu) = self.at("cpu", dir) {
            limits.cpu_period = self.number(&cpu, "cpu.cfs_period_us");
            // -1 for none.
            limits.cpu_quota = self.number(&cpu, "cpu.cfs_quota_us");
            limits.cpu_shares = self.number(&cpu, "cpu.shares");
        }
        limits
    }

    fn details_v2(&mut self, dir: &Path) -> Details {
        let mut details = Details {
            max_memory: self.number(dir, "memory.peak"),
            io: self
                .file(dir, "io.stat")
                .map(parse::io_v2)
                .unwrap_or_default(),
            ..Details::default()
        };
        if let Some(events) = self.file(dir, "memory.events") {
            details.memory_limit_hits = parse::counter(events, "max");
            details.memory_high_hits = parse::counter(events, "high");
            details.oom_kills = parse::counter(events, "oom_kill");
        }
        details
    }

    fn details_v1(&mut self, dir: &Path) -> Details {
        let mut details = Details {
            max_memory: self.number(dir, "memory.max_usage_in_bytes"),
            memory_limit_hits: self.number(dir, "memory.failcnt"),
            kernel_memory: self.number(dir, "memory.kmem.usage_in_bytes"),
            ..Details::default()
        };
        if let Some(control) = self.file(dir, "memory.oom_control") {
            details.oom_kills = parse::counter(control, "oom_kill");
        }
        if let Some(dir) = self.at("blkio", dir) {
            let devices = &mut details.io;
            if let Some(text) = self.file(&dir, "blkio.throttle.io_service_bytes_recursive") {
                parse::io_v1(text, devices, |io, read, written| {
                    io.read_bytes = read.unwrap_or(io.read_bytes);
                    io.written_bytes = written.unwrap_or(io.written_bytes);
                });
            }
            if let Some(text) = self.file(&dir, "blkio.throttle.io_serviced_recursive") {
                parse::io_v1(text, devices, |io, read, written| {
                    io.reads = read.unwrap_or(io.reads);
                    io.writes = written.unwrap_or(io.writes);
                });
            }
        }
        details
    }

    fn huge_pages(&mut self, dir: &Path, size: &str) -> Option<HugePages> {
        let name = |what| format!("hugetlb.{size}.{what}");
        let (usage, max_usage) = match self.cgroups.is_v2() {
            true => (self.number(dir, &name("current"))?, None),
            false => (
                self.number(dir, &name("usage_in_bytes"))?,
                self.number(dir, &name("max_usage_in_bytes")),
            ),
        };
        Some(HugePages {
            size: size.to_owned(),
            usage,
            max_usage,
        })
    }

    fn processes(&mut self, dir: &Path, init: ProcessRef) -> Option<Processes> {
        let mut pids: Vec<u64> = parse::pids(self.file(dir, "cgroup.procs")?).collect();
        // A cgroup has as many links as it has directories in it, and two (kernfs): nearly always
        // a container made none, and nothing is listed.
        let below = fs::metadata(dir).is_ok_and(|metadata| metadata.nlink() > 2);
        let all = !below || self.pids_below(dir, &mut pids);
        let limits = u64::try_from(init.pid).ok();
        let limits = limits.and_then(|pid| self.file(&proc(pid), "limits"));
        let open_files_limit = limits.and_then(parse::open_files_limit);
        Some(Processes {
            count: all.then(|| u64::try_from(pids.len()).unwrap_or(u64::MAX)),
            descriptors: all.then(|| descriptors(&pids)).flatten(),
            // Its pid may have become another's.
            open_files_limit: open_files_limit.filter(|_| gantry_sys::process::alive(init)),
        })
    }

    /// Adds the processes of cgroups that a container has made below its own. Returns whether
    /// these are all.
    fn pids_below(&mut self, dir: &Path, pids: &mut Vec<u64>) -> bool {
        let mut pending = vec![dir.to_owned()];
        let mut seen = 0;
        while let Some(dir) = pending.pop() {
            let Ok(entries) = fs::read_dir(&dir) else {
                continue;
            };
            for entry in entries.flatten() {
                if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    continue;
                }
                seen += 1;
                if seen > BELOW_MAX {
                    return false;
                }
                let path = entry.path();
                if let Some(text) = self.file(&path, "cgroup.procs") {
                    pids.extend(parse::pids(text));
                }
                pending.push(path);
            }
        }
        true
    }

    /// Interfaces of the network namespace of a process, [`INTERFACES_MAX`] at most, the default one
    /// first; `None` when it has ended.
    pub fn interfaces(&mut self, pid: i32) -> Option<Vec<Interface>> {
        let pid = u64::try_from(pid).ok()?;
        let text = self.file(&proc(pid).join("net"), "dev")?;
        Some(told(parse::interfaces(text)))
    }
}

/// [`INTERFACES_MAX`] of them at most, the default one first.
fn told(mut interfaces: Vec<Interface>) -> Vec<Interface> {
    let mut names = interfaces.iter().map(|one| one.name.as_str());
    let at = names.position(|name| name == DEFAULT_INTERFACE);
    if let Some(before) = at.and_then(|at| interfaces.get_mut(..=at)) {
        before.rotate_right(1);
    }
    interfaces.truncate(INTERFACES_MAX);
    interfaces
}

fn proc(pid: u64) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

/// Reads a file to its end, which a read of nothing tells and no short one does: lists of processes
/// and of interfaces come by the page.
fn fill(mut file: impl Read, buffer: &mut Vec<u8>) -> io::Result<usize> {
    let mut length = 0;
    loop {
        let read = match file.read(&mut buffer[length..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        length += read;
        if read == 0 {
            return Ok(length);
        }
        if length == buffer.len() {
            if length >= BUFFER_MAX {
                return Err(io::Error::new(
                    io::ErrorKind::FileTooLarge,
                    format!("more than {BUFFER_MAX} bytes"),
                ));
            }
            buffer.resize(length * 2, 0);
        }
    }
}

/// The cgroup, the process or the file is not there; or pressure is not counted here.
fn is_gone(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let gone = [
        Errno::ENOENT,
        Errno::ENODEV,
        Errno::ESRCH,
        Errno::EOPNOTSUPP,
    ];
    let number = error.raw_os_error();
    number.is_some_and(|number| gone.contains(&Errno::from_raw(number)))
}

/// Sizes of huge pages as cgroup files name them: `2MB`, `1GB`. The kernel does not change them.
fn huge_page_sizes() -> &'static [String] {
    static SIZES: OnceLock<Vec<String>> = OnceLock::new();
    SIZES.get_or_init(|| {
        let entries = fs::read_dir("/sys/kernel/mm/hugepages").into_iter();
        let names = entries.flatten().flatten().map(|entry| entry.file_name());
        let mut sizes: Vec<_> = names
            .filter_map(|name| huge_page_size(name.to_str()?))
            .collect();
        sizes.sort_unstable();
        sizes
    })
}

/// `hugepages-2048kB` is `2MB`.
fn huge_page_size(name: &str) -> Option<String> {
    let kilobytes: u64 = name
        .strip_prefix("hugepages-")?
        .strip_suffix("kB")?
        .parse()
        .ok()?;
    Some(match kilobytes {
        kb if kb >= 1 << 20 => format!("{}GB", kb >> 20),
        kb if kb >= 1 << 10 => format!("{}MB", kb >> 10),
        kb => format!("{kb}KB"),
    })
}

/// Counts what these processes have open; `None` when that would be too much work, or is not ours
/// to see.
fn descriptors(pids: &[u64]) -> Option<Descriptors> {
    if pids.len() > PROCESSES_MAX {
        return None;
    }
    let mut all = Descriptors::default();
    for &pid in pids {
        let entries = match fs::read_dir(proc(pid).join("fd")) {
            Ok(entries) => entries,
            // Ended since.
            Err(error) if is_gone(&error) => continue,
            Err(_) => return None,
        };
        for entry in entries.flatten() {
            all.open += 1;
            if all.open > DESCRIPTORS_MAX {
                return None;
            }
            // The link's text says what it is: to follow it could wait for a file system that hangs.
            let target = fs::read_link(entry.path()).unwrap_or_default();
            if target
                .as_os_str()
                .as_encoded_bytes()
                .starts_with(b"socket:")
            {
                all.sockets += 1;
            }
        }
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::Driver;
    use crate::stats::TaskLimit;

    /// A tree of files as one hierarchy of v2, or several of v1.
    struct Fake {
        root: tempfile::TempDir,
        cgroups: Cgroups,
    }

    fn fake(v2: bool) -> Fake {
        let root = tempfile::tempdir().unwrap();
        let at = root.path().display();
        let mounts = match v2 {
            true => format!("cgroup2 {at} cgroup2 rw 0 0\n"),
            false => ["cpu", "cpuacct", "memory", "pids", "blkio"]
                .map(|name| format!("cgroup {at}/{name} cgroup rw,{name} 0 0\n"))
                .concat(),
        };
        let cgroups = Cgroups {
            driver: Driver::Cgroupfs,
            hierarchy: Cgroups::detect_hierarchy(&mounts).unwrap(),
            mounts: Cgroups::mounts(&mounts),
            default_parent: "/gantry".into(),
            shims: "/gantry-shims".into(),
        };
        Fake { root, cgroups }
    }

    impl Fake {
        fn write(&self, path: &str, text: &str) {
            let path = self.root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    fn own_process() -> ProcessRef {
        gantry_sys::process::own_process().unwrap()
    }

    const ALL: Want = Want {
        limit: true,
        tasks: true,
        pressure: true,
        cpu_times: true,
    };

    #[test]
    fn a_cgroup_of_v2() {
        let fake = fake(true);
        fake.write("c/cpu.stat", "usage_usec 5\nuser_usec 4\nsystem_usec 1\n");
        fake.write("c/memory.current", "1000\n");
        fake.write("c/memory.stat", "anon 10\ninactive_file 100\n");
        fake.write("c/memory.max", "5000\n");
        fake.write("c/memory.swap.current", "7\n");
        fake.write("c/pids.current", "3\n");
        fake.write("c/pids.max", "max\n");
        fake.write(
            "c/cpu.pressure",
            "some avg10=1.00 avg60=0 avg300=0 total=1\n",
        );
        fake.write("c/memory.peak", "2000\n");
        fake.write("c/memory.events", "high 1\nmax 2\noom_kill 3\n");
        fake.write("c/io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4\n");
        fake.write("c/cgroup.procs", "");
        let dir = fake.root.path().join("c");
        let mut reader = Reader::new(&fake.cgroups);
        let usage = reader.usage(&dir, ALL).unwrap();
        assert_eq!(usage.cpu.unwrap().usage, 5000);
        let memory = usage.memory.unwrap();
        assert_eq!(
            (memory.working_set(), memory.available()),
            (900, Some(4100))
        );
        assert_eq!((usage.swap, usage.tasks), (Some(7), Some(3)));
        assert!(usage.pressure.cpu.is_some() && usage.pressure.io.is_none());
        let details = reader.details(&dir, Some(own_process()));
        assert_eq!(details.max_memory, Some(2000));
        assert_eq!(details.memory_limit_hits, Some(2));
        assert_eq!(
            (details.memory_high_hits, details.oom_kills),
            (Some(1), Some(3))
        );
        assert_eq!(details.io.len(), 1);
        assert_eq!(details.io[0].name, device_name(8, 0));
        assert_eq!(details.max_tasks, Some(TaskLimit::Unlimited));
        assert_eq!(details.processes.unwrap().count, Some(0));
        assert!(reader.trouble.is_none(), "{:?}", reader.trouble);
        // The limit below what is used, as after an update.
        fake.write("c/memory.max", "500\n");
        let usage = reader.usage(&dir, ALL).unwrap();
        assert_eq!(usage.memory.unwrap().available(), Some(0));
    }

    #[test]
    fn a_cgroup_of_v1_lies_in_several_places() {
        let fake = fake(false);
        fake.write("cpuacct/p/c/cpuacct.usage", "77\n");
        fake.write("cpuacct/p/c/cpuacct.stat", "user 2\nsystem 1\n");
        fake.write(
            "cpu/p/c/cpu.stat",
            "nr_periods 4\nnr_throttled 0\nthrottled_time 0\n",
        );
        fake.write("memory/p/c/memory.usage_in_bytes", "1000\n");
        fake.write(
            "memory/p/c/memory.stat",
            "total_rss 10\ntotal_inactive_file 100\n",
        );
        fake.write("memory/p/c/memory.limit_in_bytes", "9223372036854771712\n");
        fake.write("memory/p/c/memory.max_usage_in_bytes", "3000\n");
        fake.write("memory/p/c/memory.failcnt", "9\n");
        fake.write("memory/p/c/memory.oom_control", "oom_kill 1\n");
        fake.write("pids/p/c/pids.current", "2\n");
        fake.write("pids/p/c/pids.max", "100\n");
        fake.write(
            "blkio/p/c/blkio.throttle.io_service_bytes_recursive",
            "8:0 Read 5\n",
        );
        fake.write(
            "blkio/p/c/blkio.throttle.io_serviced_recursive",
            "8:0 Read 1\n",
        );
        let dir = fake.root.path().join("memory/p/c");
        let mut reader = Reader::new(&fake.cgroups);
        let usage = reader.usage(&dir, ALL).unwrap();
        let cpu = usage.cpu.unwrap();
        assert_eq!(
            (cpu.usage, cpu.user, cpu.periods),
            (77, Some(20_000_000), Some(4))
        );
        let memory = usage.memory.unwrap();
        assert_eq!((memory.working_set(), memory.available()), (900, None));
        assert_eq!((usage.swap, usage.tasks), (None, Some(2)));
        assert_eq!(usage.pressure, Pressures::default());
        let details = reader.details(&dir, None);
        assert_eq!(
            (details.max_memory, details.memory_limit_hits),
            (Some(3000), Some(9))
        );
        assert_eq!(details.oom_kills, Some(1));
        assert_eq!(details.max_tasks, Some(TaskLimit::At(100)));
        assert_eq!((details.io[0].read_bytes, details.io[0].reads), (5, 1));
        assert_eq!(details.processes, None);
        // Without the files that only metrics need.
        let cpu = reader.cpu(&dir, false).unwrap();
        assert_eq!((cpu.usage, cpu.user), (77, None));
    }

    #[test]
    fn a_cgroup_that_has_gone_is_no_trouble() {
        for v2 in [true, false] {
            let fake = fake(v2);
            let dir = match v2 {
                true => fake.root.path().join("c"),
                false => fake.root.path().join("memory/c"),
            };
            let mut reader = Reader::new(&fake.cgroups);
            assert_eq!(reader.usage(&dir, ALL), None);
            let details = reader.details(&dir, Some(own_process()));
            assert_eq!((details.processes, details.max_tasks), (None, None));
            assert_eq!(reader.limits(&dir), Limits::default());
            assert_eq!(reader.interfaces(-1), None);
            assert!(reader.trouble.is_none());
            // A record of another machine.
            assert_eq!(reader.usage(Path::new(""), ALL), None);
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_leaves_its_numbers_out_and_is_told() {
        let fake = fake(true);
        fake.write("c/cpu.stat", "usage_usec 5\n");
        fake.write("c/memory.current", "1000\n");
        let dir = fake.root.path().join("c");
        fs::create_dir(dir.join("memory.stat")).unwrap();
        let mut reader = Reader::new(&fake.cgroups);
        let usage = reader.usage(&dir, Want::default()).unwrap();
        assert_eq!(usage.cpu.unwrap().usage, 5000);
        assert_eq!(
            usage.memory, None,
            "no working set is better than a false one"
        );
        let (path, _) = reader.trouble.unwrap();
        assert!(path.ends_with("memory.stat"));
    }

    #[test]
    fn a_long_file_is_read_whole_and_an_endless_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long");
        let text = "8:0 rbytes=1 wbytes=2 rios=3 wios=4\n".repeat(2000);
        fs::write(&path, &text).unwrap();
        let mut buffer = vec![0; BUFFER];
        let length = fill(File::open(&path).unwrap(), &mut buffer).unwrap();
        assert_eq!(&buffer[..length], text.as_bytes());
        let error = fill(File::open("/dev/zero").unwrap(), &mut buffer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn what_comes_in_pieces_is_read_to_its_end() {
        /// Gives few bytes a read, as a list does that comes by the page, and is interrupted first.
        struct Pieces<'a>(&'a [u8], bool);

        impl Read for Pieces<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                if !std::mem::replace(&mut self.1, true) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                let length = buffer.len().min(5);
                self.0.read(&mut buffer[..length])
            }
        }

        let text = (1..=9000).map(|pid| format!("{pid}\n"));
        let text = text.collect::<String>();
        let mut buffer = vec![0; BUFFER];
        let length = fill(Pieces(text.as_bytes(), false), &mut buffer).unwrap();
        assert_eq!(length, text.len());
        assert_eq!(parse::pids(&buffer[..length]).count(), 9000);
    }

    #[test]
    fn a_part_of_the_processes_is_no_number_of_them() {
        let fake = fake(true);
        let own = std::process::id();
        fake.write("c/cgroup.procs", &format!("{own}\n"));
        let dir = fake.root.path().join("c");
        for n in 0..=BELOW_MAX {
            if n == BELOW_MAX {
                let mut reader = Reader::new(&fake.cgroups);
                assert!(reader.pids_below(&dir, &mut Vec::new()), "{n} cgroups");
            }
            fake.write(&format!("c/{n}/cgroup.procs"), "");
        }
        let mut reader = Reader::new(&fake.cgroups);
        assert!(!reader.pids_below(&dir, &mut Vec::new()));
        // Some file systems do not count directories in the links of one.
        if fs::metadata(&dir).unwrap().nlink() > 2 {
            let processes = reader.processes(&dir, own_process()).unwrap();
            assert_eq!((processes.count, processes.descriptors), (None, None));
            assert!(processes.open_files_limit.is_some());
        }
    }

    #[test]
    fn the_limit_of_open_files_is_that_of_the_first_process() {
        let fake = fake(true);
        // Another is first in the list: it is not in the order of time.
        fake.write("c/cgroup.procs", "0\n");
        let dir = fake.root.path().join("c");
        let mut reader = Reader::new(&fake.cgroups);
        let mut limit = |init| reader.processes(&dir, init).unwrap().open_files_limit;
        assert!(limit(own_process()).is_some());
        let earlier = ProcessRef {
            start_time: 1,
            ..own_process()
        };
        assert_eq!(limit(earlier), None, "its pid is another's now");
    }

    #[test]
    fn limits_of_v1_and_of_v2_are_the_same() {
        let (v2, v1) = (fake(true), fake(false));
        for (name, text) in [
            ("cpu.max", "50000 100000\n"),
            ("cpu.weight", "1\n"),
            ("memory.min", "7\n"),
            ("memory.swap.max", "9\n"),
        ] {
            v2.write(&format!("p/{name}"), text);
        }
        for (name, text) in [
            ("cpu/p/cpu.cfs_quota_us", "50000\n"),
            ("cpu/p/cpu.cfs_period_us", "100000\n"),
            ("cpu/p/cpu.shares", "2\n"),
            ("memory/p/memory.soft_limit_in_bytes", "7\n"),
            ("memory/p/memory.memsw.limit_in_bytes", "9\n"),
        ] {
            v1.write(name, text);
        }
        let expected = Limits {
            cpu_period: Some(100_000),
            cpu_quota: Some(50_000),
            cpu_shares: Some(2),
            reserved: Some(7),
            swap: Some(9),
        };
        let (at_v2, at_v1) = (v2.root.path().join("p"), v1.root.path().join("memory/p"));
        assert_eq!(Reader::new(&v2.cgroups).limits(&at_v2), expected);
        assert_eq!(Reader::new(&v1.cgroups).limits(&at_v1), expected);
        // As they are when nobody has set them.
        v2.write("p/cpu.max", "max 100000\n");
        v2.write("p/memory.swap.max", "max\n");
        v1.write("cpu/p/cpu.cfs_quota_us", "-1\n");
        v1.write(
            "memory/p/memory.memsw.limit_in_bytes",
            "9223372036854771712\n",
        );
        let expected = Limits {
            cpu_quota: None,
            swap: None,
            ..expected
        };
        assert_eq!(Reader::new(&v2.cgroups).limits(&at_v2), expected);
        assert_eq!(Reader::new(&v1.cgroups).limits(&at_v1), expected);
    }

    #[test]
    fn thousands_of_interfaces_do_not_hide_the_default_one() {
        let named = |name: String| Interface {
            name,
            ..Interface::default()
        };
        let own = (0..3000).map(|n| named(format!("a{n}")));
        let all = own.chain([named(DEFAULT_INTERFACE.to_owned())]).collect();
        let told = told(all);
        assert_eq!(told.len(), INTERFACES_MAX);
        let names: Vec<_> = told[..3].iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, [DEFAULT_INTERFACE, "a0", "a1"]);
    }

    #[test]
    fn processes_of_cgroups_below_count() {
        let fake = fake(true);
        let own = std::process::id();
        fake.write("c/cgroup.procs", "");
        fake.write("c/init.scope/cgroup.procs", &format!("{own}\n"));
        fake.write("c/a/b/cgroup.procs", "0\n");
        let mut reader = Reader::new(&fake.cgroups);
        let mut pids = Vec::new();
        assert!(reader.pids_below(&fake.root.path().join("c"), &mut pids));
        pids.sort_unstable();
        assert_eq!(pids, [0, u64::from(own)]);
    }

    #[test]
    fn own_descriptors_are_counted() {
        let (_one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let own = u64::from(std::process::id());
        let counted = descriptors(&[own, u64::from(u32::MAX)]).unwrap();
        assert!(counted.open >= 5, "{counted:?}");
        assert!(
            counted.sockets >= 2 && counted.sockets < counted.open,
            "{counted:?}"
        );
        assert_eq!(descriptors(&vec![own; PROCESSES_MAX + 1]), None);
    }

    #[test]
    fn sizes_of_huge_pages() {
        let table = [("2048", "2MB"), ("1048576", "1GB"), ("64", "64KB")];
        for (kilobytes, size) in table {
            let name = format!("hugepages-{kilobytes}kB");
            assert_eq!(huge_page_size(&name).as_deref(), Some(size));
        }
        assert_eq!(huge_page_size("other"), None);
    }
}
