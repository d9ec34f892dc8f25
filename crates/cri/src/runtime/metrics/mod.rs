//! Pod metrics: what cAdvisor exports, under its names and labels.
//!
//! Values of CRI are whole numbers: times are whole seconds. Each is read when it is asked for, so
//! none has a timestamp of its own (0): Prometheus takes the time of its scrape.

#[cfg(test)]
mod not_served;
mod reply;
mod table;

use std::cmp::Reverse;
use std::collections::HashSet;

use gantry_cri_api::v1 as cri;
use gantry_supervisor::Cgroups;
use gantry_supervisor::registry::PodView;
use gantry_supervisor::stats::{
    ContainerStats, Details, DeviceIo, DiskUsage, Interface, Limits, PodStats, Processes,
    TaskLimit, Usage,
};
use gantry_types::ContainerState;
use tonic::Status;

use super::Runtime;
use super::stats::swap_limit;
use crate::convert;
use crate::status::status;
pub(super) use reply::Reply;
use table::{LABELS, Metric, On};

/// Period of a CPU quota that nobody set (kernel, scheduler/sched-bwc.rst), in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;
/// Interfaces that cAdvisor leaves out, by how their names begin, in whatever case.
const LEFT_OUT: [&str; 4] = ["lo", "veth", "docker", "nerdctl"];
/// Interfaces of a pod. Each is eight series, and it costs a pod nothing to make one.
const INTERFACES: usize = 32;

impl Runtime {
    /// What this node has metrics for.
    pub(super) fn metric_descriptors(&self) -> Vec<cri::MetricDescriptor> {
        descriptors(self.supervisor.cgroup_v2())
    }

    /// Of pods that are ready.
    pub(super) async fn pod_metrics(
        &self,
    ) -> Result<impl Iterator<Item = cri::PodSandboxMetrics>, Status> {
        let mut pods = self.supervisor.pod_details().await.map_err(status)?;
        tell_own_cgroups_once(&mut pods);
        Ok(pods.into_iter().map(|pod| self.metrics_of_pod(&pod)))
    }

    /// The labels are those that a kubelet gives what its cAdvisor counts: a pod's network is that
    /// of its holder, as it was that of the pause container; its own cgroup has neither name nor
    /// image.
    fn metrics_of_pod(&self, pod: &PodStats) -> cri::PodSandboxMetrics {
        let cgroups = &self.supervisor.settings().cgroups;
        let containers = pod.containers.iter();
        let containers = containers.filter_map(|one| self.metrics_of_container(&pod.view, one));
        cri::PodSandboxMetrics {
            pod_sandbox_id: pod.view.facts.id.to_string(),
            metrics: pod_metrics(cgroups, pod),
            container_metrics: containers.collect(),
        }
    }

    /// `None` for one that does not run.
    fn metrics_of_container(
        &self,
        pod: &PodView,
        stats: &ContainerStats,
    ) -> Option<cri::ContainerMetrics> {
        let cgroups = &self.supervisor.settings().cgroups;
        let view = &stats.view;
        let usage = stats.usage.as_ref()?;
        let ContainerState::Running { started_at, .. } = view.state else {
            return None;
        };
        let facts = &view.facts;
        let name = facts.config.metadata.as_ref();
        let name = name.map_or("", |metadata| metadata.name.as_str());
        let image = convert::image_of(view, self.supervisor.images());
        let image = convert::image_spec(view, image.as_deref()).image;
        let cgroup = cgroups.name(facts.record.cgroup_dir.as_ref());
        let mut metrics = Metrics::of(labels(pod, name, cgroup, image, facts.id.as_str()));
        let nothing = cri::LinuxContainerResources::default();
        let asked = view.resources.as_ref().unwrap_or(&nothing);
        let limits = limits_of(asked, usage.swap.is_some(), cgroups.is_v2());
        metrics.usage(usage, &limits);
        if let Some(details) = &stats.details {
            metrics.details(details, cgroups.is_v2());
        }
        if let Some(disk) = &stats.disk {
            metrics.disk(disk);
        }
        metrics.limits(&limits, set(asked.memory_limit_in_bytes));
        metrics.times(usage.at, facts.record.created_at, started_at);
        Some(cri::ContainerMetrics {
            container_id: facts.id.to_string(),
            metrics: metrics.metrics,
        })
    }
}

fn descriptors(v2: bool) -> Vec<cri::MetricDescriptor> {
    let here = table::SERVED.iter().filter(|metric| match metric.on {
        On::All => true,
        On::V2 => v2,
    });
    let descriptors = here.map(|metric| cri::MetricDescriptor {
        name: metric.name.to_owned(),
        help: metric.help.to_owned(),
        label_keys: LABELS
            .iter()
            .chain(metric.labels)
            .map(|&label| label.to_owned())
            .collect(),
    });
    descriptors.collect()
}

/// Metrics of one container or pod.
struct Metrics {
    /// Values of [`LABELS`].
    labels: [String; LABELS.len()],
    metrics: Vec<cri::Metric>,
}

impl Metrics {
    /// None yet, of what has these labels.
    fn of(labels: [String; LABELS.len()]) -> Self {
        Self {
            labels,
            metrics: Vec::with_capacity(table::SERVED.len()),
        }
    }

    fn put(&mut self, metric: &Metric, more: &[&str], value: u64) {
        debug_assert_eq!(more.len(), metric.labels.len(), "{}", metric.name);
        let more = more.iter().map(|&label| label.to_owned());
        self.metrics.push(cri::Metric {
            name: metric.name.to_owned(),
            timestamp: 0,
            metric_type: metric.kind.into(),
            label_values: self.labels.iter().cloned().chain(more).collect(),
            value: Some(cri::UInt64Value { value }),
        });
    }

    fn put_if(&mut self, metric: &Metric, value: Option<u64>) {
        if let Some(value) = value {
            self.put(metric, &[], value);
        }
    }

    fn usage(&mut self, usage: &Usage, limits: &Limits) {
        if let Some(cpu) = usage.cpu {
            self.put(&table::CPU_USAGE, &["total"], seconds(cpu.usage));
            self.put_if(&table::CPU_USER, cpu.user.map(seconds));
            self.put_if(&table::CPU_SYSTEM, cpu.system.map(seconds));
            if limits.cpu_quota.is_some() {
                self.put_if(&table::CFS_PERIODS, cpu.periods);
                self.put_if(&table::CFS_THROTTLED_PERIODS, cpu.throttled_periods);
                self.put_if(&table::CFS_THROTTLED, cpu.throttled.map(seconds));
            }
        }
        if let Some(memory) = usage.memory {
            for (metric, value) in [
                (&table::MEMORY_USAGE, memory.usage),
                (&table::MEMORY_WORKING_SET, memory.working_set()),
                (&table::MEMORY_RSS, memory.rss),
                (&table::MEMORY_CACHE, memory.cache),
                (&table::MEMORY_MAPPED, memory.mapped_file),
                (&table::MEMORY_ACTIVE_FILE, memory.active_file),
                (&table::MEMORY_INACTIVE_FILE, memory.inactive_file),
            ] {
                self.put(metric, &[], value);
            }
            for (metric, value) in [
                (&table::MEMORY_DIRTY, memory.dirty),
                (&table::MEMORY_WRITEBACK, memory.writeback),
                (&table::MEMORY_REFAULTS_FILE, memory.refaults_file),
                (&table::MEMORY_REFAULTS_ANON, memory.refaults_anon),
                (&table::MEMORY_SCANNED, memory.scanned),
                (&table::MEMORY_RECLAIMED, memory.reclaimed),
                (&table::MEMORY_KERNEL, memory.kernel),
            ] {
                self.put_if(metric, value);
            }
            for (scope, faults, major) in [
                (
                    "container",
                    memory.own_page_faults,
                    memory.own_major_page_faults,
                ),
                ("hierarchy", memory.page_faults, memory.major_page_faults),
            ] {
                self.put(&table::MEMORY_FAILURES, &["pgfault", scope], faults);
                self.put(&table::MEMORY_FAILURES, &["pgmajfault", scope], major);
            }
        }
        self.put_if(&table::MEMORY_SWAP, usage.swap);
        self.put_if(&table::THREADS, usage.tasks);
        let pressure = &usage.pressure;
        for (pressure, some, full) in [
            (&pressure.cpu, &table::PSI_CPU_SOME, &table::PSI_CPU_FULL),
            (
                &pressure.memory,
                &table::PSI_MEMORY_SOME,
                &table::PSI_MEMORY_FULL,
            ),
            (&pressure.io, &table::PSI_IO_SOME, &table::PSI_IO_FULL),
        ] {
            let Some(pressure) = pressure else { continue };
            self.put_if(some, pressure.some.map(|stall| seconds(stall.total)));
            self.put_if(full, pressure.full.map(|stall| seconds(stall.total)));
        }
    }

    fn details(&mut self, details: &Details, v2: bool) {
        self.put_if(&table::MEMORY_MAX_USAGE, details.max_memory);
        self.put_if(&table::MEMORY_FAILCNT, details.memory_limit_hits);
        if v2 {
            self.put_if(&table::MEMORY_EVENTS_MAX, details.memory_limit_hits);
        }
        self.put_if(&table::MEMORY_EVENTS_HIGH, details.memory_high_hits);
        self.put_if(&table::OOM_EVENTS, details.oom_kills);
        self.put_if(&table::MEMORY_KERNEL, details.kernel_memory);
        let threads = details.max_tasks.map(|limit| match limit {
            TaskLimit::Unlimited => 0,
            TaskLimit::At(tasks) => tasks,
        });
        self.put_if(&table::THREADS_MAX, threads);
        for pages in &details.huge_pages {
            self.put(&table::HUGETLB_USAGE, &[&pages.size], pages.usage);
            if let Some(most) = pages.max_usage {
                self.put(&table::HUGETLB_MAX_USAGE, &[&pages.size], most);
            }
        }
        for io in &details.io {
            self.io(io);
        }
        if let Some(processes) = &details.processes {
            self.processes(processes);
        }
    }

    fn io(&mut self, io: &DeviceIo) {
        let (major, minor) = (io.device.major, io.device.minor);
        let device = &io.name;
        for (metric, value) in [
            (&table::FS_READ_BYTES, io.read_bytes),
            (&table::FS_READS, io.reads),
            (&table::FS_WRITTEN_BYTES, io.written_bytes),
            (&table::FS_WRITES, io.writes),
        ] {
            self.put(metric, &[device], value);
        }
        let (major, minor) = (major.to_string(), minor.to_string());
        for (operation, bytes) in [("Read", io.read_bytes), ("Write", io.written_bytes)] {
            self.put(&table::BLKIO, &[device, &major, &minor, operation], bytes);
        }
    }

    fn processes(&mut self, processes: &Processes) {
        self.put_if(&table::PROCESSES, processes.count);
        if let Some(descriptors) = processes.descriptors {
            self.put(&table::FILE_DESCRIPTORS, &[], descriptors.open);
            self.put(&table::SOCKETS, &[], descriptors.sockets);
        }
        if let Some(limit) = processes.open_files_limit {
            self.put(&table::ULIMITS, &["max_open_files"], limit);
        }
    }

    fn disk(&mut self, disk: &DiskUsage) {
        let system = &disk.file_system;
        for (metric, value) in [
            (&table::FS_USAGE, disk.bytes),
            (&table::FS_LIMIT, system.bytes),
            (&table::FS_INODES, system.inodes),
            (&table::FS_INODES_FREE, system.inodes_free),
        ] {
            self.put(metric, &[&system.device], value);
        }
    }

    fn limits(&mut self, limits: &Limits, memory: Option<u64>) {
        self.put_if(&table::SPEC_CPU_PERIOD, limits.cpu_period);
        self.put_if(&table::SPEC_CPU_QUOTA, limits.cpu_quota);
        self.put_if(&table::SPEC_CPU_SHARES, limits.cpu_shares);
        for (metric, limit) in [
            (&table::SPEC_MEMORY_LIMIT, memory),
            (&table::SPEC_MEMORY_SWAP, limits.swap),
            (&table::SPEC_MEMORY_RESERVATION, limits.reserved),
        ] {
            self.put(metric, &[], limit.unwrap_or_default());
        }
    }

    fn times(&mut self, at: i64, created: i64, started: i64) {
        for (metric, nanos) in [
            (&table::LAST_SEEN, at),
            (&table::CREATION_TIME, created),
            (&table::START_TIME, started),
        ] {
            let nanos = u64::try_from(nanos).unwrap_or_default();
            self.put(metric, &[], seconds(nanos));
        }
    }

    fn network(&mut self, interfaces: &[Interface]) {
        let told = interfaces.iter().filter(|one| !is_left_out(&one.name));
        for one in told.take(INTERFACES) {
            for (metric, value) in [
                (&table::RX_BYTES, one.rx_bytes),
                (&table::RX_PACKETS, one.rx_packets),
                (&table::RX_DROPPED, one.rx_dropped),
                (&table::RX_ERRORS, one.rx_errors),
                (&table::TX_BYTES, one.tx_bytes),
                (&table::TX_PACKETS, one.tx_packets),
                (&table::TX_DROPPED, one.tx_dropped),
                (&table::TX_ERRORS, one.tx_errors),
            ] {
                self.put(metric, &[&one.name], value);
            }
        }
    }
}

fn seconds(nanos: u64) -> u64 {
    nanos / 1_000_000_000
}

/// What CRI gives as a number that is not 0.
fn set(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

/// Limits of a container as they are on record; `swap`: whether the kernel counts swap, and so
/// limits it.
fn limits_of(asked: &cri::LinuxContainerResources, swap: bool, v2: bool) -> Limits {
    let kept = asked.unified.get("memory.min");
    let swap = match asked.memory_swap_limit_in_bytes {
        _ if !swap => None,
        _ if v2 => swap_limit(asked),
        // v1 limits it with memory.
        0 => set(asked.memory_limit_in_bytes),
        both => set(both),
    };
    Limits {
        cpu_period: Some(set(asked.cpu_period).unwrap_or(DEFAULT_PERIOD)),
        cpu_quota: set(asked.cpu_quota),
        cpu_shares: set(asked.cpu_shares),
        reserved: kept.and_then(|bytes| bytes.trim().parse().ok()),
        swap,
    }
}

/// Two sandboxes of one pod may be ready at once. A series that comes twice is an error to
/// Prometheus, so the later one has those of the cgroup that both are in.
fn tell_own_cgroups_once(pods: &mut [PodStats]) {
    pods.sort_unstable_by_key(|pod| Reverse(pod.view.facts.record.created_at));
    let mut told = HashSet::new();
    for pod in pods.iter_mut().filter(|pod| pod.own_cgroup) {
        pod.own_cgroup = told.insert(cgroup_parent(pod).to_owned());
    }
}

fn cgroup_parent(pod: &PodStats) -> &str {
    let linux = pod.view.facts.config.linux.as_ref();
    linux.map_or("", |linux| linux.cgroup_parent.as_str())
}

/// Of a pod's network and of its own cgroup.
fn pod_metrics(cgroups: &Cgroups, pod: &PodStats) -> Vec<cri::Metric> {
    let facts = &pod.view.facts;
    let holder = facts.record.cgroup_dirs.first();
    let holder = holder.map(|dir| cgroups.name(dir.as_ref()));
    let holder = holder.unwrap_or_default();
    let of_holder = labels(&pod.view, "", holder, String::new(), facts.id.as_str());
    let mut metrics = Metrics::of(of_holder);
    if let Some(interfaces) = &pod.interfaces {
        metrics.network(interfaces);
    }
    if pod.own_cgroup {
        let dir = cgroups.parent_dir(cgroup_parent(pod)).unwrap_or_default();
        metrics.labels = labels(&pod.view, "", cgroups.name(&dir), String::new(), "");
        let limits = pod.details.as_ref().and_then(|details| details.limits);
        let limits = limits.unwrap_or_default();
        metrics.usage(&pod.usage, &limits);
        if let Some(details) = &pod.details {
            metrics.details(details, cgroups.is_v2());
        }
        let created = facts.record.created_at;
        metrics.times(pod.usage.at, created, created);
        let memory = pod.usage.memory.and_then(|memory| memory.limit);
        metrics.limits(&limits, memory);
    }
    metrics.metrics
}

/// As cAdvisor has it.
fn is_left_out(interface: &str) -> bool {
    let name = interface.to_ascii_lowercase();
    LEFT_OUT.iter().any(|begin| name.starts_with(begin))
}

fn labels(
    pod: &PodView,
    container: &str,
    cgroup: String,
    image: String,
    name: &str,
) -> [String; LABELS.len()] {
    let metadata = pod.facts.config.metadata.as_ref();
    let (namespace, pod) = metadata.map_or(("", ""), |metadata| {
        (metadata.namespace.as_str(), metadata.name.as_str())
    });
    // In the order of LABELS.
    [
        container.to_owned(),
        cgroup,
        image,
        name.to_owned(),
        namespace.to_owned(),
        pod.to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use gantry_supervisor::stats::{
        Cpu, Descriptors, Device, FileSystem, HugePages, Memory, Pressure, Pressures, Stall,
    };

    pub fn interface(name: &str) -> Interface {
        Interface {
            name: name.to_owned(),
            ..Interface::default()
        }
    }

    fn labelled() -> Metrics {
        Metrics::of(LABELS.map(str::to_owned))
    }

    /// Metrics of something of which everything is known.
    pub fn everything(mut metrics: Metrics, v2: bool) -> Vec<cri::Metric> {
        let stall = Stall {
            total: 3_900_000_000,
            ..Stall::default()
        };
        let pressure = v2.then_some(Pressure {
            some: Some(stall),
            full: Some(stall),
        });
        let only_v2 = v2.then_some(5);
        let usage = Usage {
            at: 2_000_000_000,
            cpu: Some(Cpu {
                usage: 7_999_999_999,
                user: Some(1),
                system: Some(1),
                periods: Some(1),
                throttled_periods: Some(1),
                throttled: Some(1),
            }),
            memory: Some(Memory {
                kernel: only_v2,
                dirty: Some(1),
                writeback: Some(1),
                scanned: only_v2,
                reclaimed: only_v2,
                refaults_file: Some(1),
                refaults_anon: Some(1),
                ..Memory::default()
            }),
            swap: Some(1),
            tasks: Some(1),
            pressure: Pressures {
                cpu: pressure,
                memory: pressure,
                io: pressure,
            },
        };
        let details = Details {
            max_memory: Some(1),
            memory_limit_hits: Some(1),
            memory_high_hits: only_v2,
            oom_kills: Some(1),
            kernel_memory: (!v2).then_some(1),
            io: vec![DeviceIo {
                device: Device { major: 0, minor: 9 },
                name: "0:9".to_owned(),
                ..DeviceIo::default()
            }],
            huge_pages: vec![HugePages {
                size: "2MB".to_owned(),
                usage: 1,
                max_usage: (!v2).then_some(1),
            }],
            max_tasks: Some(TaskLimit::Unlimited),
            processes: Some(Processes {
                count: Some(1),
                descriptors: Some(Descriptors::default()),
                open_files_limit: Some(1),
            }),
            limits: None,
        };
        let disk = DiskUsage {
            at: 1,
            bytes: 1,
            inodes: 1,
            file_system: FileSystem::default().into(),
        };
        let resources = cri::LinuxContainerResources {
            cpu_quota: 1,
            cpu_shares: 1,
            memory_limit_in_bytes: 100,
            memory_swap_limit_in_bytes: 150,
            unified: BTreeMap::from([
                ("memory.min".to_owned(), "77".to_owned()),
                ("memory.low".to_owned(), "78".to_owned()),
            ]),
            ..Default::default()
        };
        let limits = limits_of(&resources, true, v2);
        metrics.usage(&usage, &limits);
        metrics.details(&details, v2);
        metrics.disk(&disk);
        metrics.limits(&limits, set(resources.memory_limit_in_bytes));
        metrics.times(1, 2, 3);
        metrics.network(&[interface("eth0")]);
        metrics.metrics
    }

    fn names(v2: bool) -> BTreeSet<String> {
        let all = everything(labelled(), v2).into_iter();
        all.map(|metric| metric.name).collect()
    }

    #[test]
    fn a_limit_of_threads_that_is_not_known_is_not_told_as_none() {
        let told = |max_tasks| {
            let mut metrics = labelled();
            let details = Details {
                max_tasks,
                ..Details::default()
            };
            metrics.details(&details, true);
            let metrics = metrics.metrics.into_iter();
            let mut limits = metrics.filter(|one| one.name == table::THREADS_MAX.name);
            limits.next().and_then(|one| one.value)
        };
        let value = |value| Some(cri::UInt64Value { value });
        assert_eq!(told(None), None);
        assert_eq!(told(Some(TaskLimit::Unlimited)), value(0));
        assert_eq!(told(Some(TaskLimit::At(7))), value(7));
    }

    #[test]
    fn every_served_metric_has_a_descriptor_and_comes() {
        for v2 in [true, false] {
            let descriptors = descriptors(v2);
            let described: BTreeSet<_> = descriptors
                .iter()
                .map(|descriptor| descriptor.name.clone())
                .collect();
            assert_eq!(described.len(), descriptors.len(), "a name twice");
            let mut expected = described.clone();
            if v2 {
                // Counted by v1 alone; its descriptor does no harm.
                expected.remove(table::HUGETLB_MAX_USAGE.name);
            }
            assert_eq!(names(v2), expected, "v2: {v2}");
        }
        let of_either: BTreeSet<_> = names(true).union(&names(false)).cloned().collect();
        let served: BTreeSet<_> = table::SERVED
            .iter()
            .map(|metric| metric.name.to_owned())
            .collect();
        assert_eq!(of_either, served);
    }

    #[test]
    fn labels_and_kinds_are_those_of_the_descriptor() {
        for v2 in [true, false] {
            let descriptors: BTreeMap<_, _> = descriptors(v2)
                .into_iter()
                .map(|descriptor| (descriptor.name.clone(), descriptor))
                .collect();
            for descriptor in descriptors.values() {
                assert_eq!(descriptor.label_keys[..LABELS.len()], LABELS);
                assert!(descriptor.help.ends_with('.'), "{descriptor:?}");
                let keys: BTreeSet<_> = descriptor.label_keys.iter().collect();
                assert_eq!(keys.len(), descriptor.label_keys.len(), "a label twice");
            }
            let mut seen = BTreeSet::new();
            for metric in everything(labelled(), v2) {
                let keys = &descriptors[&metric.name].label_keys;
                assert_eq!(metric.label_values.len(), keys.len(), "{}", metric.name);
                let counts = metric.name.ends_with("_total") && !metric.name.contains("inodes")
                    || metric.name == "container_memory_failcnt";
                let kind = match counts {
                    true => cri::MetricType::Counter,
                    false => cri::MetricType::Gauge,
                };
                assert_eq!(metric.metric_type(), kind, "{}", metric.name);
                // Prometheus refuses a scrape with the same series twice.
                let series = (metric.name, metric.label_values);
                assert!(seen.insert(series.clone()), "twice: {series:?}");
            }
        }
    }

    #[test]
    fn what_is_not_served_has_a_reason_and_is_not_served() {
        let served: BTreeSet<_> = table::SERVED.iter().map(|metric| metric.name).collect();
        let mut seen = BTreeSet::new();
        for (name, reason) in not_served::NOT_SERVED {
            assert!(!served.contains(name), "{name}");
            assert!(name.starts_with("container_"), "{name}");
            assert!(reason.len() > 20, "{name}: {reason:?}");
            assert!(seen.insert(name), "{name} twice");
        }
    }

    /// docs/metrics.md has a line for each name, with the same labels or the same reason.
    #[test]
    fn the_documentation_has_the_whole_table() {
        let text = include_str!("../../../../../docs/metrics.md");
        let lines: BTreeSet<_> = text.lines().collect();
        let mut expected = BTreeSet::new();
        for metric in table::SERVED {
            let kind = match metric.kind {
                cri::MetricType::Counter => "counter",
                cri::MetricType::Gauge => "gauge",
            };
            let on = match metric.on {
                On::All => "",
                On::V2 => "v2",
            };
            let labels = metric.labels.join(", ");
            expected.insert(format!(
                "| `{}` | {kind} | {labels} | {on} | {} |",
                metric.name, metric.help
            ));
        }
        for (name, reason) in not_served::NOT_SERVED {
            expected.insert(format!("| `{name}` | {reason} |"));
        }
        let missing: Vec<_> = expected
            .iter()
            .filter(|line| !lines.contains(line.as_str()))
            .map(String::as_str)
            .collect();
        assert!(
            missing.is_empty(),
            "docs/metrics.md lacks\n{}",
            missing.join("\n")
        );
        let stale: Vec<_> = lines
            .iter()
            .filter(|line| line.starts_with("| `container_") && !expected.contains(**line))
            .collect();
        assert!(stale.is_empty(), "docs/metrics.md has {stale:#?}");
    }

    #[test]
    fn times_are_whole_seconds_and_limits_as_cadvisor_has_them() {
        let value = |metrics: &[cri::Metric], name: &str| {
            let metric = metrics.iter().find(|metric| metric.name == name);
            metric.and_then(|metric| metric.value).unwrap().value
        };
        let v2 = everything(labelled(), true);
        assert_eq!(value(&v2, "container_cpu_usage_seconds_total"), 7);
        assert_eq!(value(&v2, "container_pressure_io_stalled_seconds_total"), 3);
        assert_eq!(value(&v2, "container_threads_max"), 0);
        assert_eq!(value(&v2, "container_spec_cpu_period"), DEFAULT_PERIOD);
        assert_eq!(value(&v2, "container_spec_memory_limit_bytes"), 100);
        assert_eq!(value(&v2, "container_spec_memory_swap_limit_bytes"), 50);
        let reservation = "container_spec_memory_reservation_limit_bytes";
        assert_eq!(value(&v2, reservation), 77);
        let v1 = everything(labelled(), false);
        assert_eq!(value(&v1, "container_spec_memory_swap_limit_bytes"), 150);
        assert!(v2.iter().all(|metric| metric.timestamp == 0));
    }

    #[test]
    fn a_kubelets_limit_of_swap_is_served() {
        let mut asked = cri::LinuxContainerResources {
            memory_limit_in_bytes: 100,
            ..Default::default()
        };
        assert_eq!(limits_of(&asked, true, true).swap, Some(0));
        assert_eq!(limits_of(&asked, true, false).swap, Some(100));
        assert_eq!(limits_of(&asked, false, true).swap, None);
        let unified = &mut asked.unified;
        unified.insert("memory.swap.max".to_owned(), "30".to_owned());
        assert_eq!(limits_of(&asked, true, true).swap, Some(30));
    }

    #[test]
    fn what_has_no_quota_was_not_throttled() {
        let usage = Usage {
            cpu: Some(Cpu {
                periods: Some(0),
                throttled_periods: Some(0),
                throttled: Some(0),
                ..Cpu::default()
            }),
            ..Usage::default()
        };
        let count = |limits: &Limits| {
            let mut metrics = labelled();
            metrics.usage(&usage, limits);
            let names = metrics.metrics.iter().map(|metric| metric.name.as_str());
            names.filter(|name| name.contains("_cfs_")).count()
        };
        assert_eq!(count(&Limits::default()), 0);
        let limited = Limits {
            cpu_quota: Some(1),
            ..Limits::default()
        };
        assert_eq!(count(&limited), 3);
    }

    #[test]
    fn interfaces_are_those_that_cadvisor_counts_and_not_more_than_are_bounded() {
        let told = |names: &[&str]| -> Vec<String> {
            let interfaces: Vec<_> = names.iter().map(|name| interface(name)).collect();
            let mut metrics = labelled();
            metrics.network(&interfaces);
            let metrics = metrics.metrics.into_iter();
            let received = metrics.filter(|metric| metric.name == table::RX_BYTES.name);
            let names = received.map(|metric| metric.label_values.last().cloned());
            names.map(Option::unwrap).collect()
        };
        let some = [
            "veth1", "eth0", "lo", "Docker0", "nerdctl0", "net1", "cni0", "lower",
        ];
        assert_eq!(told(&some), ["eth0", "net1", "cni0"]);
        let mut many = vec!["veth0"; 100];
        many.extend(["net1"; 100]);
        assert_eq!(told(&many), ["net1"; INTERFACES]);
    }
}
