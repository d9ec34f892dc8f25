//! One message with the metrics of all pods, which a client must be able to receive.
//!
//! A kubelet takes [`TAKEN`] bytes and of a larger message nothing at all: its `/metrics/cadvisor`
//! would be empty. Some 400 containers with long names come near that. So there is an order in which
//! metrics go, for all pods alike, as far as is needed: a family that is there is whole. CPU time,
//! memory in use and the bytes of each pod's first interface always stay. Where these alone are too
//! many, the call is refused: of a pod that is left out a kubelet would think that it uses nothing.

use std::sync::atomic::{AtomicUsize, Ordering};

use gantry_cri_api::v1 as cri;
use prost::Message;
use tonic::Status;

use super::table::{self, Metric};

/// What a kubelet receives at most (maxMsgSize of its CRI client).
const TAKEN: usize = 16 << 20;
/// What the metrics of all pods may be. The rest is for what encloses each.
const MAX: usize = TAKEN - (1 << 20);

/// Something that may be left out.
#[derive(Clone, Copy)]
pub enum Step {
    Families(&'static [&'static Metric]),
    /// A pod's interfaces but the first.
    Interfaces,
}

/// What is left out, the first first: what others say too, then what few look at.
pub const STEPS: &[Step] = &[
    Step::Families(&[&table::BLKIO]),
    Step::Families(&[&table::MEMORY_FAILURES]),
    Step::Families(&[&table::HUGETLB_USAGE, &table::HUGETLB_MAX_USAGE]),
    Step::Families(&[
        &table::MEMORY_ACTIVE_FILE,
        &table::MEMORY_INACTIVE_FILE,
        &table::MEMORY_DIRTY,
        &table::MEMORY_WRITEBACK,
        &table::MEMORY_REFAULTS_FILE,
        &table::MEMORY_REFAULTS_ANON,
        &table::MEMORY_SCANNED,
        &table::MEMORY_RECLAIMED,
        &table::MEMORY_EVENTS_HIGH,
        &table::MEMORY_EVENTS_MAX,
    ]),
    Step::Families(&[
        &table::ULIMITS,
        &table::THREADS_MAX,
        &table::SPEC_MEMORY_RESERVATION,
        &table::SPEC_MEMORY_SWAP,
    ]),
    Step::Interfaces,
    Step::Families(&[
        &table::FS_READ_BYTES,
        &table::FS_READS,
        &table::FS_WRITTEN_BYTES,
        &table::FS_WRITES,
    ]),
    Step::Families(&[
        &table::PSI_CPU_SOME,
        &table::PSI_CPU_FULL,
        &table::PSI_MEMORY_SOME,
        &table::PSI_MEMORY_FULL,
        &table::PSI_IO_SOME,
        &table::PSI_IO_FULL,
    ]),
    Step::Families(&[
        &table::PROCESSES,
        &table::THREADS,
        &table::FILE_DESCRIPTORS,
        &table::SOCKETS,
        &table::FS_INODES,
        &table::FS_INODES_FREE,
    ]),
    Step::Families(&[
        &table::SPEC_CPU_PERIOD,
        &table::SPEC_CPU_QUOTA,
        &table::SPEC_CPU_SHARES,
        &table::SPEC_MEMORY_LIMIT,
        &table::LAST_SEEN,
        &table::CREATION_TIME,
    ]),
    Step::Families(&[
        &table::MEMORY_MAX_USAGE,
        &table::MEMORY_FAILCNT,
        &table::MEMORY_KERNEL,
        &table::MEMORY_MAPPED,
        &table::CFS_PERIODS,
        &table::CFS_THROTTLED_PERIODS,
        &table::CFS_THROTTLED,
    ]),
    Step::Families(&[
        &table::RX_PACKETS,
        &table::RX_DROPPED,
        &table::RX_ERRORS,
        &table::TX_PACKETS,
        &table::TX_DROPPED,
        &table::TX_ERRORS,
    ]),
    Step::Families(&[
        &table::CPU_USER,
        &table::CPU_SYSTEM,
        &table::MEMORY_RSS,
        &table::MEMORY_CACHE,
        &table::MEMORY_SWAP,
        &table::FS_USAGE,
        &table::FS_LIMIT,
        &table::START_TIME,
        &table::OOM_EVENTS,
    ]),
];

impl Step {
    fn leave_out(self, pod: &mut cri::PodSandboxMetrics) {
        match self {
            Self::Families(families) => {
                let stays =
                    |metric: &cri::Metric| families.iter().all(|family| family.name != metric.name);
                pod.metrics.retain(stays);
                for container in &mut pod.container_metrics {
                    container.metrics.retain(stays);
                }
            }
            Self::Interfaces => {
                let of_network = |metric: &cri::Metric| metric.name.starts_with(table::NETWORK);
                let first = pod.metrics.iter().find(|metric| of_network(metric));
                let first = first.and_then(|metric| metric.label_values.last()).cloned();
                pod.metrics.retain(|metric| {
                    !of_network(metric) || metric.label_values.last() == first.as_ref()
                });
            }
        }
    }
}

/// The metrics of pods, in so few bytes that a client can receive them.
#[derive(Default)]
pub struct Reply {
    pods: Vec<cri::PodSandboxMetrics>,
    bytes: usize,
    /// How many of [`STEPS`].
    left_out: usize,
}

impl Reply {
    /// Takes pod after pod: what is held meanwhile is not much more than the reply.
    pub fn of(pods: impl Iterator<Item = cri::PodSandboxMetrics>) -> Self {
        let mut reply = Self::default();
        for pod in pods {
            reply.add(pod);
        }
        reply
    }

    fn add(&mut self, mut pod: cri::PodSandboxMetrics) {
        for step in STEPS.iter().take(self.left_out) {
            step.leave_out(&mut pod);
        }
        self.bytes += pod.encoded_len();
        self.pods.push(pod);
        while self.bytes > MAX
            && let Some(step) = STEPS.get(self.left_out)
        {
            self.left_out += 1;
            self.pods.iter_mut().for_each(|pod| step.leave_out(pod));
            self.bytes = self.pods.iter().map(Message::encoded_len).sum();
        }
    }

    /// The log tells once how much is left out, and again when it is more. RESOURCE_EXHAUSTED if what
    /// always stays is too much.
    pub fn send(self) -> Result<Vec<cri::PodSandboxMetrics>, Status> {
        if self.bytes > MAX {
            return Err(Status::resource_exhausted(format!(
                "metrics of {} pods are {} bytes without all that may be left out, and a client \
                 receives {TAKEN}: StreamPodSandboxMetrics sends them in parts",
                self.pods.len(),
                self.bytes,
            )));
        }
        static TOLD: AtomicUsize = AtomicUsize::new(0);
        if TOLD.fetch_max(self.left_out, Ordering::Relaxed) < self.left_out {
            tracing::warn!(
                steps = self.left_out,
                of = STEPS.len(),
                bytes = self.bytes,
                "pod metrics are too many for one message: the least needed are left out \
                 (docs/metrics.md)"
            );
        }
        Ok(self.pods)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::Metrics;
    use super::super::tests::{everything, interface};
    use super::*;

    /// Labels as long as they are under a kubelet with the systemd driver, and image names from a
    /// registry.
    fn labels(container: &str) -> Metrics {
        let slice = "/kubepods.slice/kubepods-burstable.slice/\
            kubepods-burstable-pod0f7d3a52_6a61_4a58_9c5e_0c1f3b7d9e21.slice";
        let id = "d4".repeat(32);
        let (cgroup, image, name) = match container {
            "" => (slice.to_owned(), String::new(), String::new()),
            _ => (
                format!("{slice}/cri-gantry-{id}.scope"),
                format!("registry.example.com/team/service@sha256:{id}"),
                id,
            ),
        };
        Metrics::of([
            container.to_owned(),
            cgroup,
            image,
            name,
            "team-with-a-name".to_owned(),
            "service-deployment-6f8b9c7d5f-x2k4q".to_owned(),
        ])
    }

    /// A pod of which everything is known, with so many containers and interfaces.
    fn pod(containers: usize, interfaces: usize) -> cri::PodSandboxMetrics {
        let mut own = everything(labels(""), true);
        own.retain(|metric| !metric.name.starts_with(table::NETWORK));
        let mut network = labels("");
        let interfaces: Vec<_> = (0..interfaces)
            .map(|n| interface(&format!("net{n}")))
            .collect();
        network.network(&interfaces);
        own.extend(network.metrics);
        let container = |n| cri::ContainerMetrics {
            container_id: "d4".repeat(32),
            metrics: everything(labels(&format!("container-{n}")), true)
                .into_iter()
                .filter(|metric| !metric.name.starts_with(table::NETWORK))
                .collect(),
        };
        cri::PodSandboxMetrics {
            pod_sandbox_id: "5a".repeat(32),
            metrics: own,
            container_metrics: (0..containers).map(container).collect(),
        }
    }

    fn names<'a>(metrics: impl IntoIterator<Item = &'a cri::Metric>) -> BTreeSet<&'a str> {
        metrics
            .into_iter()
            .map(|metric| metric.name.as_str())
            .collect()
    }

    #[test]
    fn metrics_of_500_containers_are_what_a_kubelet_can_receive() {
        let whole = pod(2, 1);
        let bytes = 250 * whole.encoded_len();
        assert!(bytes > TAKEN, "{bytes}: nothing would have to be left out");
        let reply = Reply::of((0..250).map(|_| whole.clone()));
        let left_out = reply.left_out;
        assert!((1..STEPS.len()).contains(&left_out), "{left_out} steps");
        let pod_metrics = reply.send().unwrap();
        let message = cri::ListPodSandboxMetricsResponse { pod_metrics };
        let bytes = message.encoded_len();
        assert!(bytes < TAKEN && bytes > MAX / 2, "{bytes} bytes");
        let gone = |metric: &cri::Metric| {
            STEPS[..left_out].iter().any(|step| match step {
                Step::Families(families) => families.iter().any(|one| one.name == metric.name),
                Step::Interfaces => false,
            })
        };
        // All pods alike, and no family in part.
        let all = whole.container_metrics.iter().map(|one| &one.metrics);
        let expected: Vec<_> = all.map(|own| own.iter().filter(|one| !gone(one))).collect();
        for pod in &message.pod_metrics {
            assert!(
                pod.metrics
                    .iter()
                    .eq(whole.metrics.iter().filter(|one| !gone(one)))
            );
            assert_eq!(pod.container_metrics.len(), 2);
            for (container, expected) in pod.container_metrics.iter().zip(&expected) {
                assert!(container.metrics.iter().eq(expected.clone()));
            }
        }
    }

    #[test]
    fn what_fits_is_whole() {
        let whole = pod(2, 3);
        let reply = Reply::of((0..20).map(|_| whole.clone()));
        assert_eq!(reply.left_out, 0);
        assert!(reply.send().unwrap().iter().all(|pod| *pod == whole));
    }

    #[test]
    fn cpu_memory_and_network_stay_whatever_there_is() {
        // As many as a kubelet can be told to run.
        let mut last = pod(3, 32);
        let many = (0..500).map(|_| last.clone());
        let reply = Reply::of(many);
        assert!(reply.left_out > 0);
        assert_eq!(reply.send().unwrap().len(), 500);
        for step in STEPS {
            step.leave_out(&mut last);
        }
        let stays = [
            table::CPU_USAGE.name,
            table::MEMORY_USAGE.name,
            table::MEMORY_WORKING_SET.name,
        ];
        let network = [table::RX_BYTES.name, table::TX_BYTES.name];
        assert_eq!(
            names(&last.metrics),
            stays.iter().chain(&network).copied().collect()
        );
        let of_network = |one: &&cri::Metric| one.name.starts_with(table::NETWORK);
        let interfaces = last.metrics.iter().filter(of_network);
        let interfaces: Vec<_> = interfaces.map(|one| one.label_values.last()).collect();
        assert_eq!(interfaces, [Some(&"net0".to_owned()); 2]);
        for container in &last.container_metrics {
            assert_eq!(names(&container.metrics), stays.into());
        }
    }

    #[test]
    fn what_cannot_be_received_is_refused() {
        let large = cri::PodSandboxMetrics {
            pod_sandbox_id: "5".repeat(MAX),
            ..Default::default()
        };
        let refused = Reply::of([large].into_iter()).send().unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    }

    /// docs/metrics.md tells the order.
    #[test]
    fn the_documentation_has_what_is_left_out_first() {
        let text = include_str!("../../../../../docs/metrics.md");
        let lines = STEPS.iter().enumerate().map(|(n, step)| {
            let what = match step {
                Step::Families(families) => {
                    let names = families.iter().map(|one| format!("`{}`", one.name));
                    names.collect::<Vec<_>>().join(", ")
                }
                Step::Interfaces => "interfaces of a pod but the first".to_owned(),
            };
            format!("{}. {what}\n", n + 1)
        });
        let lines: String = lines.collect();
        assert!(text.contains(&lines), "docs/metrics.md lacks\n{lines}");
    }
}
