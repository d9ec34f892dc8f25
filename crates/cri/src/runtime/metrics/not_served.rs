//! Every name that cAdvisor exports for containers and gantry does not, with the reason. What is
//! served is in table.rs; together they are all.

/// Why those that kubelets do not ask cAdvisor for are not served.
const NOT_OF_THE_KUBELET: &str = "the kubelet has it switched off in its cAdvisor";
const NETWORK_TABLES: &str = "would read the connection tables of each pod's network at each \
    scrape; the kubelet has it switched off in its cAdvisor";
const OLD_SCHEDULER: &str =
    "the kernel counted it in the I/O scheduler CFQ, which Linux 5.0 removed";
const IO_COST: &str = "only kernels whose io.cost controller was configured count it";

/// What cAdvisor exports and gantry does not, with the reason.
pub const NOT_SERVED: &[(&str, &str)] = &[
    (
        "container_cpu_cfs_burst_periods_total",
        "CRI has no field that lets a container burst: it would always be 0",
    ),
    (
        "container_cpu_cfs_burst_seconds_total",
        "CRI has no field that lets a container burst: it would always be 0",
    ),
    (
        "container_cpu_load_average_10s",
        "needs the taskstats of each cgroup sampled all the time; the kubelet has the sampling \
         switched off, and shows 0",
    ),
    (
        "container_cpu_load_d_average_10s",
        "needs the taskstats of each cgroup sampled all the time; the kubelet has the sampling \
         switched off, and shows 0",
    ),
    (
        "container_tasks_state",
        "needs the taskstats of each cgroup sampled all the time; the kubelet has the sampling \
         switched off, and shows 0",
    ),
    (
        "container_cpu_schedstat_run_periods_total",
        NOT_OF_THE_KUBELET,
    ),
    (
        "container_cpu_schedstat_run_seconds_total",
        NOT_OF_THE_KUBELET,
    ),
    (
        "container_cpu_schedstat_runqueue_seconds_total",
        NOT_OF_THE_KUBELET,
    ),
    (
        "container_health_state",
        "health checks of images are not part of CRI: the kubelet's probes take their place",
    ),
    ("container_hugetlb_failcnt", NOT_OF_THE_KUBELET),
    ("container_memory_migrate", NOT_OF_THE_KUBELET),
    ("container_memory_numa_pages", NOT_OF_THE_KUBELET),
    ("container_memory_bandwidth_bytes", NOT_OF_THE_KUBELET),
    ("container_memory_bandwidth_local_bytes", NOT_OF_THE_KUBELET),
    ("container_llc_occupancy_bytes", NOT_OF_THE_KUBELET),
    ("container_referenced_bytes", NOT_OF_THE_KUBELET),
    ("container_perf_events_total", NOT_OF_THE_KUBELET),
    ("container_perf_events_scaling_ratio", NOT_OF_THE_KUBELET),
    ("container_perf_uncore_events_total", NOT_OF_THE_KUBELET),
    (
        "container_perf_uncore_events_scaling_ratio",
        NOT_OF_THE_KUBELET,
    ),
    ("container_fs_sector_reads_total", OLD_SCHEDULER),
    ("container_fs_sector_writes_total", OLD_SCHEDULER),
    ("container_fs_reads_merged_total", OLD_SCHEDULER),
    ("container_fs_writes_merged_total", OLD_SCHEDULER),
    ("container_fs_read_seconds_total", OLD_SCHEDULER),
    ("container_fs_write_seconds_total", OLD_SCHEDULER),
    ("container_fs_io_current", OLD_SCHEDULER),
    ("container_fs_io_time_seconds_total", OLD_SCHEDULER),
    ("container_fs_io_time_weighted_seconds_total", OLD_SCHEDULER),
    ("container_fs_io_cost_usage_seconds_total", IO_COST),
    ("container_fs_io_cost_wait_seconds_total", IO_COST),
    ("container_fs_io_cost_indebt_seconds_total", IO_COST),
    ("container_fs_io_cost_indelay_seconds_total", IO_COST),
    ("container_network_tcp_usage_total", NETWORK_TABLES),
    ("container_network_tcp6_usage_total", NETWORK_TABLES),
    ("container_network_udp_usage_total", NETWORK_TABLES),
    ("container_network_udp6_usage_total", NETWORK_TABLES),
    ("container_network_advance_tcp_stats_total", NETWORK_TABLES),
];
