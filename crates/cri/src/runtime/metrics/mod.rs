//! Pod metrics: what cAdvisor exports, under its names and labels.
//!
//! Values of CRI are whole numbers: times are whole seconds. Each is read when it is asked for, so
//! none has a timestamp of its own (0): Prometheus takes the time of its scrape.

#[cfg(test)]
mod not_served;
mod table;

use gantry_cri_api::v1 as cri;
use gantry_supervisor::Cgroups;
use gantry_supervisor::registry::{ContainerView, PodView};
use gantry_supervisor::stats::{
    ContainerStats, Details, DeviceIo, DiskUsage, Interface, PodStats, Processes, TaskLimit, Usage,
};
use gantry_types::ContainerState;
use tonic::Status;

use super::Runtime;
use super::stats::swap_limit;
use crate::status::status;
use table::{LABELS, Metric, On};

/// Period of a CPU quota that nobody set (kernel, scheduler/sched-bwc.rst), in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

impl Runtime {
    /// What this node has metrics for.
    pub(super) fn metric_descriptors(&self) -> Vec<cri::MetricDescriptor> {
        descriptors(self.supervisor.cgroup_v2())
    }

    /// Of pods that are ready.
    pub(super) async fn pod_metrics(&self) -> Result<Vec<cri::PodSandboxMetrics>, Status> {
        let pods = self.supervisor.pod_details().await.map_err(status)?;
        let cgroups = &self.supervisor.settings().cgroups;
        Ok(pods.iter().map(|pod| pod_metrics(cgroups, pod)).collect())
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

    fn usage(&mut self, usage: &Usage) {
        if let Some(cpu) = usage.cpu {
            self.put(&table::CPU_USAGE, &["total"], seconds(cpu.usage));
            self.put_if(&table::CPU_USER, cpu.user.map(seconds));
            self.put_if(&table::CPU_SYSTEM, cpu.system.map(seconds));
            self.put_if(&table::CFS_PERIODS, cpu.periods);
            self.put_if(&table::CFS_THROTTLED_PERIODS, cpu.throttled_periods);
            self.put_if(&table::CFS_THROTTLED, cpu.throttled.map(seconds));
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

    fn limits(&mut self, asked: &cri::LinuxContainerResources, v2: bool) {
        let set = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
        let period = set(asked.cpu_period).unwrap_or(DEFAULT_PERIOD);
        self.put(&table::SPEC_CPU_PERIOD, &[], period);
        self.put_if(&table::SPEC_CPU_QUOTA, set(asked.cpu_quota));
        self.put_if(&table::SPEC_CPU_SHARES, set(asked.cpu_shares));
        let memory = set(asked.memory_limit_in_bytes);
        self.put(&table::SPEC_MEMORY_LIMIT, &[], memory.unwrap_or_default());
        let swap = match v2 {
            true => swap_limit(asked),
            false => set(asked.memory_swap_limit_in_bytes),
        };
        self.put(&table::SPEC_MEMORY_SWAP, &[], swap.unwrap_or_default());
        let kept = asked.unified.get("memory.low");
        let kept = kept.and_then(|bytes| bytes.parse().ok());
        self.put(
            &table::SPEC_MEMORY_RESERVATION,
            &[],
            kept.unwrap_or_default(),
        );
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
        for one in interfaces {
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

/// The labels are those that a kubelet gives what its cAdvisor counts: a pod's network is that of
/// its holder, as it was that of the pause container; its own cgroup has neither name nor image.
fn pod_metrics(cgroups: &Cgroups, pod: &PodStats) -> cri::PodSandboxMetrics {
    let facts = &pod.view.facts;
    let holder = facts.record.cgroup_dirs.first();
    let holder = holder.map(|dir| cgroups.name(dir.as_ref()));
    let mut metrics = Metrics {
        labels: labels(
            &pod.view,
            "",
            holder.unwrap_or_default(),
            "",
            facts.id.as_str(),
        ),
        metrics: Vec::new(),
    };
    if let Some(interfaces) = &pod.interfaces {
        metrics.network(interfaces);
    }
    if pod.own_cgroup {
        let parent = facts.config.linux.as_ref();
        let parent = parent.map_or("", |linux| linux.cgroup_parent.as_str());
        let dir = cgroups.parent_dir(parent).unwrap_or_default();
        metrics.labels = labels(&pod.view, "", cgroups.name(&dir), "", "");
        metrics.usage(&pod.usage);
        if let Some(details) = &pod.details {
            metrics.details(details, cgroups.is_v2());
        }
        let created = facts.record.created_at;
        metrics.times(pod.usage.at, created, created);
        let limit = pod.usage.memory.and_then(|memory| memory.limit);
        metrics.put(&table::SPEC_MEMORY_LIMIT, &[], limit.unwrap_or_default());
    }
    let containers = pod.containers.iter();
    let containers = containers.filter_map(|one| container_metrics(cgroups, &pod.view, one));
    cri::PodSandboxMetrics {
        pod_sandbox_id: facts.id.to_string(),
        metrics: metrics.metrics,
        container_metrics: containers.collect(),
    }
}

/// `None` for one that does not run.
fn container_metrics(
    cgroups: &Cgroups,
    pod: &PodView,
    stats: &ContainerStats,
) -> Option<cri::ContainerMetrics> {
    let view = &stats.view;
    let usage = stats.usage.as_ref()?;
    let ContainerState::Running { started_at, .. } = view.state else {
        return None;
    };
    let facts = &view.facts;
    let name = facts.config.metadata.as_ref();
    let name = name.map_or("", |metadata| metadata.name.as_str());
    let cgroup = cgroups.name(facts.record.cgroup_dir.as_ref());
    let mut metrics = Metrics {
        labels: labels(pod, name, cgroup, image(view), facts.id.as_str()),
        metrics: Vec::with_capacity(table::SERVED.len()),
    };
    metrics.usage(usage);
    if let Some(details) = &stats.details {
        metrics.details(details, cgroups.is_v2());
    }
    if let Some(disk) = &stats.disk {
        metrics.disk(disk);
    }
    metrics.limits(&view.resources.clone().unwrap_or_default(), cgroups.is_v2());
    metrics.times(usage.at, facts.record.created_at, started_at);
    Some(cri::ContainerMetrics {
        container_id: facts.id.to_string(),
        metrics: metrics.metrics,
    })
}

/// The image under the name that the pod's author gave it, where the kubelet tells it.
fn image(view: &ContainerView) -> &str {
    let Some(image) = &view.facts.config.image else {
        return "";
    };
    match image.user_specified_image.as_str() {
        "" => &image.image,
        asked => asked,
    }
}

fn labels(
    pod: &PodView,
    container: &str,
    cgroup: String,
    image: &str,
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
        image.to_owned(),
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

    /// Metrics of something of which everything is known.
    fn everything(v2: bool) -> Vec<cri::Metric> {
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
            unified: BTreeMap::from([("memory.low".to_owned(), "77".to_owned())]),
            ..Default::default()
        };
        let mut metrics = Metrics {
            labels: LABELS.map(str::to_owned),
            metrics: Vec::new(),
        };
        metrics.usage(&usage);
        metrics.details(&details, v2);
        metrics.disk(&disk);
        metrics.limits(&resources, v2);
        metrics.times(1, 2, 3);
        metrics.network(&[Interface::default()]);
        metrics.metrics
    }

    fn names(v2: bool) -> BTreeSet<String> {
        let all = everything(v2).into_iter();
        all.map(|metric| metric.name).collect()
    }

    #[test]
    fn a_limit_of_threads_that_is_not_known_is_not_told_as_none() {
        let told = |max_tasks| {
            let mut metrics = Metrics {
                labels: LABELS.map(str::to_owned),
                metrics: Vec::new(),
            };
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
            for metric in everything(v2) {
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
        let v2 = everything(true);
        assert_eq!(value(&v2, "container_cpu_usage_seconds_total"), 7);
        assert_eq!(value(&v2, "container_pressure_io_stalled_seconds_total"), 3);
        assert_eq!(value(&v2, "container_threads_max"), 0);
        assert_eq!(value(&v2, "container_spec_cpu_period"), DEFAULT_PERIOD);
        assert_eq!(value(&v2, "container_spec_memory_limit_bytes"), 100);
        assert_eq!(value(&v2, "container_spec_memory_swap_limit_bytes"), 50);
        let reservation = "container_spec_memory_reservation_limit_bytes";
        assert_eq!(value(&v2, reservation), 77);
        let v1 = everything(false);
        assert_eq!(value(&v1, "container_spec_memory_swap_limit_bytes"), 150);
        assert!(v2.iter().all(|metric| metric.timestamp == 0));
    }
}
