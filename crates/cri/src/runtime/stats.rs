//! What containers and pods use, as CRI tells it.

use std::sync::Arc;

use gantry_cri_api::v1 as cri;
use gantry_supervisor::registry::{ContainerView, PodView};
use gantry_supervisor::stats::{
    ContainerStats, Cpu, DEFAULT_INTERFACE, DiskUsage, Interface, PodStats, Pressure, Stall, Usage,
};
use gantry_types::PodState;
use tonic::Status;

use super::Runtime;
use crate::convert;
use crate::status::status;

impl Runtime {
    pub(super) async fn stats_of_container(
        &self,
        id: &str,
    ) -> Result<cri::ContainerStatsResponse, Status> {
        let (_, view) = self.supervisor.registry().container(id).map_err(status)?;
        let stats = self.container_stats_of(vec![view]).await?;
        let stats = stats
            .into_iter()
            .next()
            .ok_or_else(|| removed("container", id))?;
        Ok(cri::ContainerStatsResponse { stats: Some(stats) })
    }

    /// Also of containers that do not run: the kubelet counts what they have written.
    pub(super) async fn list_stats(
        &self,
        filter: Option<cri::ContainerStatsFilter>,
    ) -> Result<Vec<cri::ContainerStats>, Status> {
        let filter = filter.unwrap_or_default();
        // The filter of ListContainers without a state.
        let filter = cri::ContainerFilter {
            id: filter.id,
            state: None,
            pod_sandbox_id: filter.pod_sandbox_id,
            label_selector: filter.label_selector,
        };
        let pods = self.supervisor.registry().pods();
        let views = pods.iter().flat_map(|pod| &pod.containers);
        let views = views.filter(|view| convert::container_matches(&filter, view));
        self.container_stats_of(views.cloned().collect()).await
    }

    async fn container_stats_of(
        &self,
        views: Vec<Arc<ContainerView>>,
    ) -> Result<Vec<cri::ContainerStats>, Status> {
        let stats = self.supervisor.container_stats(views).await;
        Ok(stats.map_err(status)?.iter().map(container).collect())
    }

    pub(super) async fn stats_of_pod(
        &self,
        id: &str,
    ) -> Result<cri::PodSandboxStatsResponse, Status> {
        let view = self.supervisor.registry().pod(id).map_err(status)?;
        match view.state {
            PodState::Ready { .. } => {}
            PodState::NotReady { .. } | PodState::Creating => {
                return Err(Status::failed_precondition(format!(
                    "pod sandbox {} is not ready: nothing of it runs",
                    view.facts.id
                )));
            }
        }
        let stats = self
            .supervisor
            .pod_stats(vec![view])
            .await
            .map_err(status)?;
        let stats = stats.first().ok_or_else(|| removed("pod sandbox", id))?;
        Ok(cri::PodSandboxStatsResponse {
            stats: Some(pod(stats)),
        })
    }

    pub(super) async fn list_pod_stats(
        &self,
        filter: Option<cri::PodSandboxStatsFilter>,
    ) -> Result<Vec<cri::PodSandboxStats>, Status> {
        let filter = filter.unwrap_or_default();
        let filter = cri::PodSandboxFilter {
            id: filter.id,
            state: None,
            label_selector: filter.label_selector,
        };
        let mut pods = self.supervisor.registry().pods();
        pods.retain(|view: &Arc<PodView>| convert::pod_matches(&filter, view));
        let stats = self.supervisor.pod_stats(pods).await.map_err(status)?;
        Ok(stats.iter().map(pod).collect())
    }
}

fn removed(what: &str, id: &str) -> Status {
    Status::not_found(format!("{what} {id:?} was removed meanwhile"))
}

fn some(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

fn container(stats: &ContainerStats) -> cri::ContainerStats {
    let facts = &stats.view.facts;
    let usage = stats.usage.as_ref();
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: facts.id.to_string(),
            metadata: facts.config.metadata.clone(),
            labels: facts.config.labels.clone(),
            annotations: facts.config.annotations.clone(),
        }),
        cpu: usage.and_then(|usage| cpu(usage, stats.nano_cores)),
        memory: usage.and_then(memory),
        writable_layer: stats.disk.as_ref().map(disk),
        swap: usage.and_then(|usage| swap(usage, stats.view.resources.as_ref())),
        io: usage.and_then(io),
    }
}

fn pod(stats: &PodStats) -> cri::PodSandboxStats {
    let facts = &stats.view.facts;
    let usage = &stats.usage;
    let process_count = usage.tasks.and_then(some);
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: facts.id.to_string(),
            metadata: facts.config.metadata.clone(),
            labels: facts.config.labels.clone(),
            annotations: facts.config.annotations.clone(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: cpu(usage, stats.nano_cores),
            memory: memory(usage),
            network: stats
                .interfaces
                .as_deref()
                .and_then(|interfaces| network(usage.at, interfaces)),
            process: process_count.map(|count| cri::ProcessUsage {
                timestamp: usage.at,
                process_count: Some(count),
            }),
            containers: stats.containers.iter().map(container).collect(),
            io: io(usage),
        }),
        windows: None,
    }
}

fn cpu(usage: &Usage, nano_cores: Option<u64>) -> Option<cri::CpuUsage> {
    let Cpu { usage: nanos, .. } = usage.cpu?;
    Some(cri::CpuUsage {
        timestamp: usage.at,
        usage_core_nano_seconds: some(nanos),
        usage_nano_cores: nano_cores.and_then(some),
        psi: usage.pressure.cpu.as_ref().map(psi),
    })
}

fn memory(usage: &Usage) -> Option<cri::MemoryUsage> {
    let memory = usage.memory.as_ref()?;
    Some(cri::MemoryUsage {
        timestamp: usage.at,
        working_set_bytes: some(memory.working_set()),
        available_bytes: memory.available().and_then(some),
        usage_bytes: some(memory.usage),
        rss_bytes: some(memory.rss),
        page_faults: some(memory.page_faults),
        major_page_faults: some(memory.major_page_faults),
        psi: usage.pressure.memory.as_ref().map(psi),
    })
}

fn io(usage: &Usage) -> Option<cri::IoUsage> {
    let pressure = usage.pressure.io.as_ref()?;
    Some(cri::IoUsage {
        timestamp: usage.at,
        psi: Some(psi(pressure)),
    })
}

fn swap(usage: &Usage, resources: Option<&cri::LinuxContainerResources>) -> Option<cri::SwapUsage> {
    let used = usage.swap?;
    Some(cri::SwapUsage {
        timestamp: usage.at,
        swap_available_bytes: resources
            .and_then(swap_limit)
            .map(|limit| limit.saturating_sub(used))
            .and_then(some),
        swap_usage_bytes: some(used),
    })
}

/// What a container may swap out; `None` without a limit. A kubelet on cgroup v2 sets it there.
/// Otherwise CRI's limit is of memory and swap together, and without one who has a limit on memory
/// may not swap (gantry-spec, resources.rs).
pub(super) fn swap_limit(resources: &cri::LinuxContainerResources) -> Option<u64> {
    if let Some(limit) = resources.unified.get("memory.swap.max") {
        // `max` is none.
        return limit.trim().parse().ok();
    }
    let limit = |bytes: i64| u64::try_from(bytes).ok().filter(|bytes| *bytes > 0);
    let memory = limit(resources.memory_limit_in_bytes)?;
    match resources.memory_swap_limit_in_bytes {
        0 => Some(0),
        both => Some(limit(both)?.saturating_sub(memory)),
    }
}

fn psi(pressure: &Pressure) -> cri::PsiStats {
    let data = |stall: Stall| cri::PsiData {
        total: stall.total,
        avg10: stall.avg10,
        avg60: stall.avg60,
        avg300: stall.avg300,
    };
    cri::PsiStats {
        full: pressure.full.map(data),
        some: pressure.some.map(data),
    }
}

fn disk(disk: &DiskUsage) -> cri::FilesystemUsage {
    let mountpoint = disk.file_system.mountpoint.to_string_lossy().into_owned();
    cri::FilesystemUsage {
        timestamp: disk.at,
        fs_id: Some(cri::FilesystemIdentifier { mountpoint }),
        used_bytes: some(disk.bytes),
        inodes_used: some(disk.inodes),
    }
}

/// CRI's `interfaces` are those beside the default one. `None` without any: a kubelet reads the
/// default one without looking whether it is there.
fn network(at: i64, interfaces: &[Interface]) -> Option<cri::NetworkUsage> {
    let named = |each: &Interface| each.name == DEFAULT_INTERFACE;
    let default = interfaces.iter().position(named).unwrap_or_default();
    let mut interfaces: Vec<_> = interfaces.iter().map(interface).collect();
    (!interfaces.is_empty()).then(|| cri::NetworkUsage {
        timestamp: at,
        default_interface: Some(interfaces.remove(default)),
        interfaces,
    })
}

fn interface(interface: &Interface) -> cri::NetworkInterfaceUsage {
    cri::NetworkInterfaceUsage {
        name: interface.name.clone(),
        rx_bytes: some(interface.rx_bytes),
        rx_errors: some(interface.rx_errors),
        tx_bytes: some(interface.tx_bytes),
        tx_errors: some(interface.tx_errors),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_supervisor::stats::{Memory, Pressures};

    #[test]
    fn what_is_not_counted_is_not_set() {
        let usage = Usage::default();
        assert_eq!(cpu(&usage, Some(1)), None);
        assert_eq!(memory(&usage), None);
        assert_eq!(io(&usage), None);
        let usage = Usage {
            cpu: Some(Cpu {
                usage: 7,
                ..Cpu::default()
            }),
            memory: Some(Memory {
                usage: 10,
                inactive_file: 3,
                ..Memory::default()
            }),
            ..Usage::default()
        };
        let cpu = cpu(&usage, None).unwrap();
        assert_eq!(cpu.usage_core_nano_seconds, some(7));
        assert_eq!((cpu.usage_nano_cores, cpu.psi), (None, None));
        let memory = memory(&usage).unwrap();
        assert_eq!(memory.working_set_bytes, some(7));
        assert_eq!(memory.available_bytes, None, "without a limit");
    }

    #[test]
    fn pressure_is_told_as_it_is() {
        let stall = Stall {
            avg10: 1.5,
            avg60: 0.5,
            avg300: 0.1,
            total: 9000,
        };
        let usage = Usage {
            pressure: Pressures {
                io: Some(Pressure {
                    some: Some(stall),
                    full: None,
                }),
                ..Pressures::default()
            },
            ..Usage::default()
        };
        let psi = io(&usage).unwrap().psi.unwrap();
        assert_eq!(psi.full, None);
        let some = psi.some.unwrap();
        assert_eq!((some.total, some.avg10, some.avg300), (9000, 1.5, 0.1));
    }

    #[test]
    fn what_is_left_to_swap_is_what_the_limit_says() {
        let resources = |memory, both, unified: Option<&str>| cri::LinuxContainerResources {
            memory_limit_in_bytes: memory,
            memory_swap_limit_in_bytes: both,
            unified: unified
                .map(|limit| ("memory.swap.max".to_owned(), limit.to_owned()))
                .into_iter()
                .collect(),
            ..Default::default()
        };
        let usage = Usage {
            swap: Some(10),
            ..Usage::default()
        };
        for (memory, both, unified, expected) in [
            (100, 0, Some("30"), some(20)),
            (100, 150, Some("30"), some(20)),
            (0, 0, Some("30"), some(20)),
            (100, 0, Some("0"), some(0)),
            (100, 150, Some("max"), None),
            (100, 150, None, some(40)),
            (100, 100, None, some(0)),
            (100, -1, None, None),
            (100, 0, None, some(0)),
            (0, 0, None, None),
            (-1, 0, None, None),
        ] {
            let resources = resources(memory, both, unified);
            let swap = swap(&usage, Some(&resources)).unwrap();
            assert_eq!(swap.swap_available_bytes, expected, "{resources:?}");
            assert_eq!(swap.swap_usage_bytes, some(10));
        }
        assert_eq!(swap(&Usage::default(), None), None, "it is not counted");
    }

    #[test]
    fn the_default_interface_is_eth0_or_the_first() {
        let named = |names: &[&str]| {
            let interfaces: Vec<_> = names
                .iter()
                .map(|name| Interface {
                    name: (*name).to_owned(),
                    ..Interface::default()
                })
                .collect();
            let network = network(1, &interfaces)?;
            let others = network.interfaces.into_iter().map(|other| other.name);
            Some((network.default_interface.unwrap().name, others.collect()))
        };
        let told = |default: &str, others: &[&str]| {
            let others: Vec<_> = others.iter().map(|&name| name.to_owned()).collect();
            Some((default.to_owned(), others))
        };
        assert_eq!(named(&["net1", "eth0", "a"]), told("eth0", &["net1", "a"]));
        assert_eq!(named(&["net1", "net2"]), told("net1", &["net2"]));
        assert_eq!(named(&["eth0"]), told("eth0", &[]));
        assert_eq!(named(&[]), None);
    }
}
