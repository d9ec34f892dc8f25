//! What is counted, in the units of CRI: nanoseconds and bytes. `None` is what this kernel does not
//! count, or not for this cgroup.

/// Of one cgroup with all below it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// When it was read, in nanoseconds since the epoch.
    pub at: i64,
    pub cpu: Option<Cpu>,
    pub memory: Option<Memory>,
    /// Bytes of swap in use.
    pub swap: Option<u64>,
    /// Tasks, which are threads (`pids.current`).
    pub tasks: Option<u64>,
    pub pressure: Pressures,
}

/// Times in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    pub usage: u64,
    pub user: Option<u64>,
    pub system: Option<u64>,
    pub periods: Option<u64>,
    pub throttled_periods: Option<u64>,
    pub throttled: Option<u64>,
}

/// In bytes, but for the faults, scans and refaults, which are counts of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub usage: u64,
    pub rss: u64,
    pub cache: u64,
    pub mapped_file: u64,
    pub inactive_file: u64,
    pub active_file: u64,
    pub kernel: Option<u64>,
    pub dirty: Option<u64>,
    pub writeback: Option<u64>,
    pub page_faults: u64,
    pub major_page_faults: u64,
    /// Without those of cgroups below, where the kernel tells them apart (v1).
    pub own_page_faults: u64,
    pub own_major_page_faults: u64,
    pub scanned: Option<u64>,
    pub reclaimed: Option<u64>,
    pub refaults_file: Option<u64>,
    pub refaults_anon: Option<u64>,
    /// Where it may not have more.
    pub limit: Option<u64>,
}

impl Memory {
    /// What cannot be taken back without writing or swapping, as cAdvisor counts it and the kubelet
    /// evicts by it. The two numbers are not of the same moment: their difference is never below 0.
    pub fn working_set(&self) -> u64 {
        self.usage.saturating_sub(self.inactive_file)
    }

    /// What is left below the limit; `None` without one.
    pub fn available(&self) -> Option<u64> {
        let limit = self.limit?;
        Some(limit.saturating_sub(self.working_set()))
    }
}

/// Pressure stall information, cgroup v2 alone.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressures {
    pub cpu: Option<Pressure>,
    pub memory: Option<Pressure>,
    pub io: Option<Pressure>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    pub some: Option<Stall>,
    pub full: Option<Stall>,
}

/// Shares of time in percent, and all of it in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stall {
    pub avg10: f64,
    pub avg60: f64,
    pub avg300: f64,
    pub total: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    pub major: u64,
    pub minor: u64,
}

/// What was read from a block device and written to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceIo {
    pub device: Device,
    /// As [`super::FileSystem::device`].
    pub name: String,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

impl DeviceIo {
    pub(super) fn of(device: Device) -> Self {
        Self {
            device,
            ..Self::default()
        }
    }
}

/// Counters of a network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// What only pod metrics tell: it costs more files, and a look at the processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// Most memory that was ever in use.
    pub max_memory: Option<u64>,
    /// How often a limit on memory was met.
    pub memory_limit_hits: Option<u64>,
    /// How often usage was above `memory.high` (v2).
    pub memory_high_hits: Option<u64>,
    pub oom_kills: Option<u64>,
    /// Kernel memory of v1, which has a file of its own.
    pub kernel_memory: Option<u64>,
    pub io: Vec<DeviceIo>,
    pub huge_pages: Vec<HugePages>,
    pub max_tasks: Option<TaskLimit>,
    pub processes: Option<Processes>,
    /// Of a cgroup whose limits are on no record of ours.
    pub limits: Option<Limits>,
}

/// What a cgroup was given, but for the limit on its memory ([`Memory::limit`]). `None` is no limit,
/// or none that this kernel has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// In microseconds, as the quota.
    pub cpu_period: Option<u64>,
    pub cpu_quota: Option<u64>,
    /// In the unit of v1, as CRI has it.
    pub cpu_shares: Option<u64>,
    /// Bytes that are kept for it (v2), or to which it is brought back first (v1).
    pub reserved: Option<u64>,
    /// Bytes of swap; on v1 with memory.
    pub swap: Option<u64>,
}

/// How many tasks a cgroup may have (`pids.max`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskLimit {
    Unlimited,
    At(u64),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugePages {
    /// As the kernel names it: `2MB`, `1GB`.
    pub size: String,
    pub usage: u64,
    /// v1 alone.
    pub max_usage: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Processes {
    /// `None` where they are in too many cgroups to look through.
    pub count: Option<u64>,
    /// Open files and those of them that are sockets; `None` when there are too many to count.
    pub descriptors: Option<Descriptors>,
    /// Soft limit of open files of the container's first process.
    pub open_files_limit: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptors {
    pub open: u64,
    pub sockets: u64,
}

/// What one side does not know is what the other says.
fn plus(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.saturating_add(other)),
        (one, other) => one.or(other),
    }
}

impl Usage {
    /// Adds another cgroup's beside this. Pressures have no sum.
    pub(super) fn add(&mut self, other: &Usage) {
        if let Some(more) = other.cpu {
            self.cpu.get_or_insert_default().add(&more);
        }
        if let Some(more) = other.memory {
            self.memory.get_or_insert_default().add(&more);
        }
        self.swap = plus(self.swap, other.swap);
        self.tasks = plus(self.tasks, other.tasks);
        self.pressure = Pressures::default();
    }
}

impl Cpu {
    fn add(&mut self, other: &Self) {
        self.usage = self.usage.saturating_add(other.usage);
        self.user = plus(self.user, other.user);
        self.system = plus(self.system, other.system);
        self.periods = plus(self.periods, other.periods);
        self.throttled_periods = plus(self.throttled_periods, other.throttled_periods);
        self.throttled = plus(self.throttled, other.throttled);
    }
}

impl Memory {
    /// The limits of two are no limit of their sum.
    fn add(&mut self, other: &Self) {
        for (own, more) in [
            (&mut self.usage, other.usage),
            (&mut self.rss, other.rss),
            (&mut self.cache, other.cache),
            (&mut self.mapped_file, other.mapped_file),
            (&mut self.inactive_file, other.inactive_file),
            (&mut self.active_file, other.active_file),
            (&mut self.page_faults, other.page_faults),
            (&mut self.major_page_faults, other.major_page_faults),
            (&mut self.own_page_faults, other.own_page_faults),
            (&mut self.own_major_page_faults, other.own_major_page_faults),
        ] {
            *own = own.saturating_add(more);
        }
        for (own, more) in [
            (&mut self.kernel, other.kernel),
            (&mut self.dirty, other.dirty),
            (&mut self.writeback, other.writeback),
            (&mut self.scanned, other.scanned),
            (&mut self.reclaimed, other.reclaimed),
            (&mut self.refaults_file, other.refaults_file),
            (&mut self.refaults_anon, other.refaults_anon),
        ] {
            *own = plus(*own, more);
        }
        self.limit = None;
    }
}
