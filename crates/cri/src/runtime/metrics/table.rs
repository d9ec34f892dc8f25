//! The metrics that are served. What cAdvisor exports beside them, and why gantry does not, is in
//! not_served.rs.
//!
//! Names, meanings and labels are cAdvisor's, so that what was built on a kubelet with cAdvisor
//! works as before with one that asks the runtime. Help texts are our own. docs/metrics.md is this
//! table for people; a test holds the two together.

use gantry_cri_api::v1::MetricType;

/// Labels that every metric has, in this order. The kubelet pairs keys and values by their place.
pub const LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];

/// How names of a network's metrics begin; their label is the interface.
pub const NETWORK: &str = "container_network_";

/// A metric that is served.
#[derive(Debug, PartialEq, Eq)]
pub struct Metric {
    pub name: &'static str,
    pub help: &'static str,
    pub kind: MetricType,
    /// Labels after [`LABELS`].
    pub labels: &'static [&'static str],
    pub on: On,
}

/// Which nodes have a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    All,
    /// Those with cgroup v2.
    V2,
}

const fn counter(name: &'static str, help: &'static str) -> Metric {
    Metric {
        name,
        help,
        kind: MetricType::Counter,
        labels: &[],
        on: On::All,
    }
}

const fn gauge(name: &'static str, help: &'static str) -> Metric {
    Metric {
        kind: MetricType::Gauge,
        ..counter(name, help)
    }
}

impl Metric {
    const fn with(self, labels: &'static [&'static str]) -> Self {
        Self { labels, ..self }
    }

    const fn on_v2(self) -> Self {
        Self { on: On::V2, ..self }
    }
}

macro_rules! served {
    ($($constant:ident = $metric:expr;)*) => {
        $(pub const $constant: Metric = $metric;)*
        /// All that are served.
        pub const SERVED: &[Metric] = &[$($constant),*];
    };
}

served! {
    LAST_SEEN = gauge("container_last_seen", "When it was last seen, in seconds since the epoch.");
    START_TIME = gauge("container_start_time_seconds", "When it started, in seconds since the epoch.");
    CREATION_TIME = gauge("container_creation_time_seconds", "When it was created, in seconds since the epoch.");

    CPU_USAGE = counter("container_cpu_usage_seconds_total", "CPU time used.").with(&["cpu"]);
    CPU_USER = counter("container_cpu_user_seconds_total", "CPU time used in user mode.");
    CPU_SYSTEM = counter("container_cpu_system_seconds_total", "CPU time used in the kernel.");
    CFS_PERIODS = counter("container_cpu_cfs_periods_total", "Periods in which its CPU quota was enforced.");
    CFS_THROTTLED_PERIODS = counter("container_cpu_cfs_throttled_periods_total", "Periods in which it used up its CPU quota.");
    CFS_THROTTLED = counter("container_cpu_cfs_throttled_seconds_total", "Time for which it was kept from the CPU by its quota.");

    MEMORY_USAGE = gauge("container_memory_usage_bytes", "Memory in use, page cache included.");
    MEMORY_WORKING_SET = gauge("container_memory_working_set_bytes", "Memory in use without inactive page cache.");
    MEMORY_MAX_USAGE = gauge("container_memory_max_usage_bytes", "Most memory that was in use.");
    MEMORY_RSS = gauge("container_memory_rss", "Anonymous memory.");
    MEMORY_CACHE = gauge("container_memory_cache", "Page cache.");
    MEMORY_MAPPED = gauge("container_memory_mapped_file", "Page cache that is mapped.");
    MEMORY_KERNEL = gauge("container_memory_kernel_usage", "Memory that the kernel uses for it.");
    MEMORY_SWAP = gauge("container_memory_swap", "Swap in use.");
    MEMORY_ACTIVE_FILE = gauge("container_memory_total_active_file_bytes", "Page cache on the active list.");
    MEMORY_INACTIVE_FILE = gauge("container_memory_total_inactive_file_bytes", "Page cache on the inactive list.");
    MEMORY_FAILCNT = counter("container_memory_failcnt", "How often its memory limit was met.");
    MEMORY_FAILURES = counter("container_memory_failures_total", "Page faults.").with(&["failure_type", "scope"]);
    MEMORY_DIRTY = gauge("container_memory_file_dirty_bytes", "Page cache that is not written yet.");
    MEMORY_WRITEBACK = gauge("container_memory_file_writeback_bytes", "Page cache that is being written.");
    MEMORY_REFAULTS_FILE = counter("container_memory_workingset_refault_file_total", "Pages of files that were evicted and needed again.");
    MEMORY_REFAULTS_ANON = counter("container_memory_workingset_refault_anon_total", "Anonymous pages that were evicted and needed again.");
    MEMORY_SCANNED = counter("container_memory_pgscan_total", "Pages that were scanned to reclaim some.").on_v2();
    MEMORY_RECLAIMED = counter("container_memory_pgsteal_total", "Pages that were reclaimed.").on_v2();
    MEMORY_EVENTS_HIGH = counter("container_memory_events_high_total", "How often it was slowed down above memory.high.").on_v2();
    MEMORY_EVENTS_MAX = counter("container_memory_events_max_total", "How often it met memory.max.").on_v2();
    OOM_EVENTS = counter("container_oom_events_total", "Processes that were killed for want of memory.");

    HUGETLB_USAGE = gauge("container_hugetlb_usage_bytes", "Huge pages in use.").with(&["pagesize"]);
    HUGETLB_MAX_USAGE = gauge("container_hugetlb_max_usage_bytes", "Most huge pages that were in use; of cgroup v1.").with(&["pagesize"]);

    FS_USAGE = gauge("container_fs_usage_bytes", "What it has written and not deleted.").with(&["device"]);
    FS_LIMIT = gauge("container_fs_limit_bytes", "Size of the file system that it writes to.").with(&["device"]);
    FS_INODES = gauge("container_fs_inodes_total", "Inodes of the file system that it writes to.").with(&["device"]);
    FS_INODES_FREE = gauge("container_fs_inodes_free", "Free inodes of the file system that it writes to.").with(&["device"]);
    FS_READ_BYTES = counter("container_fs_reads_bytes_total", "Bytes read from the device.").with(&["device"]);
    FS_READS = counter("container_fs_reads_total", "Reads from the device.").with(&["device"]);
    FS_WRITTEN_BYTES = counter("container_fs_writes_bytes_total", "Bytes written to the device.").with(&["device"]);
    FS_WRITES = counter("container_fs_writes_total", "Writes to the device.").with(&["device"]);
    BLKIO = counter("container_blkio_device_usage_total", "Bytes read from and written to the device.").with(&["device", "major", "minor", "operation"]);

    RX_BYTES = counter("container_network_receive_bytes_total", "Bytes received.").with(&["interface"]);
    RX_PACKETS = counter("container_network_receive_packets_total", "Packets received.").with(&["interface"]);
    RX_DROPPED = counter("container_network_receive_packets_dropped_total", "Received packets that were dropped.").with(&["interface"]);
    RX_ERRORS = counter("container_network_receive_errors_total", "Errors in receiving.").with(&["interface"]);
    TX_BYTES = counter("container_network_transmit_bytes_total", "Bytes sent.").with(&["interface"]);
    TX_PACKETS = counter("container_network_transmit_packets_total", "Packets sent.").with(&["interface"]);
    TX_DROPPED = counter("container_network_transmit_packets_dropped_total", "Packets that were dropped in sending.").with(&["interface"]);
    TX_ERRORS = counter("container_network_transmit_errors_total", "Errors in sending.").with(&["interface"]);

    PROCESSES = gauge("container_processes", "Processes.");
    THREADS = gauge("container_threads", "Threads.");
    THREADS_MAX = gauge("container_threads_max", "Threads that it may have; 0 is no limit.");
    FILE_DESCRIPTORS = gauge("container_file_descriptors", "Open file descriptors of all its processes.");
    SOCKETS = gauge("container_sockets", "Open sockets of all its processes.");
    ULIMITS = gauge("container_ulimits_soft", "Soft limits of its first process.").with(&["ulimit"]);

    SPEC_CPU_PERIOD = gauge("container_spec_cpu_period", "Period of its CPU quota in microseconds.");
    SPEC_CPU_QUOTA = gauge("container_spec_cpu_quota", "Its CPU quota a period in microseconds.");
    SPEC_CPU_SHARES = gauge("container_spec_cpu_shares", "Its share of the CPU relative to others.");
    SPEC_MEMORY_LIMIT = gauge("container_spec_memory_limit_bytes", "Its memory limit; 0 is none.");
    SPEC_MEMORY_RESERVATION = gauge("container_spec_memory_reservation_limit_bytes", "Memory that is kept for it when others want it; 0 is none.");
    SPEC_MEMORY_SWAP = gauge("container_spec_memory_swap_limit_bytes", "Its limit of swap, on cgroup v1 with memory; 0 is none.");

    PSI_CPU_SOME = counter("container_pressure_cpu_waiting_seconds_total", "Time for which some of its tasks waited for a CPU.").on_v2();
    PSI_CPU_FULL = counter("container_pressure_cpu_stalled_seconds_total", "Time for which all of its tasks waited for a CPU.").on_v2();
    PSI_MEMORY_SOME = counter("container_pressure_memory_waiting_seconds_total", "Time for which some of its tasks waited for memory.").on_v2();
    PSI_MEMORY_FULL = counter("container_pressure_memory_stalled_seconds_total", "Time for which all of its tasks waited for memory.").on_v2();
    PSI_IO_SOME = counter("container_pressure_io_waiting_seconds_total", "Time for which some of its tasks waited for I/O.").on_v2();
    PSI_IO_FULL = counter("container_pressure_io_stalled_seconds_total", "Time for which all of its tasks waited for I/O.").on_v2();
}
