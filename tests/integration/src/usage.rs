//! Stats and metrics of a node, and what the kernel itself says.

use std::path::PathBuf;

use gantry_cri_api::v1 as cri;
use tonic::Status;

use crate::{Node, Pod, eventually};

impl Node {
    pub async fn stats_of(&self, id: &str) -> Result<cri::ContainerStats, Status> {
        let request = cri::ContainerStatsRequest {
            container_id: id.to_owned(),
        };
        let answer = self.young().container_stats(request).await?;
        Ok(answer.into_inner().stats.expect("stats"))
    }

    pub async fn list_stats(
        &self,
        filter: Option<cri::ContainerStatsFilter>,
    ) -> Result<Vec<cri::ContainerStats>, Status> {
        let request = cri::ListContainerStatsRequest { filter };
        let answer = self.young().list_container_stats(request).await?;
        Ok(answer.into_inner().stats)
    }

    pub async fn pod_stats_of(&self, id: &str) -> Result<cri::PodSandboxStats, Status> {
        let request = cri::PodSandboxStatsRequest {
            pod_sandbox_id: id.to_owned(),
        };
        let answer = self.young().pod_sandbox_stats(request).await?;
        Ok(answer.into_inner().stats.expect("stats"))
    }

    pub async fn list_pod_stats(
        &self,
        filter: Option<cri::PodSandboxStatsFilter>,
    ) -> Result<Vec<cri::PodSandboxStats>, Status> {
        let request = cri::ListPodSandboxStatsRequest { filter };
        let answer = self.young().list_pod_sandbox_stats(request).await?;
        Ok(answer.into_inner().stats)
    }

    pub async fn metric_descriptors(&self) -> Result<Vec<cri::MetricDescriptor>, Status> {
        let request = cri::ListMetricDescriptorsRequest {};
        let answer = self.young().list_metric_descriptors(request).await?;
        Ok(answer.into_inner().descriptors)
    }

    pub async fn pod_metrics(&self) -> Result<Vec<cri::PodSandboxMetrics>, Status> {
        let request = cri::ListPodSandboxMetricsRequest {};
        let answer = self.young().list_pod_sandbox_metrics(request).await?;
        Ok(answer.into_inner().pod_metrics)
    }

    /// Removes a pod and then its cgroup parent, as the kubelet does, which made it in real life.
    pub async fn remove_with_parent(&self, pod: &Pod) {
        self.client.stop_pod(&pod.id).await.expect("StopPodSandbox");
        self.client
            .remove_pod(&pod.id)
            .await
            .expect("RemovePodSandbox");
        let parent = pod.config.linux.clone().unwrap_or_default().cgroup_parent;
        let name = parent.rsplit('/').next().unwrap_or_default();
        eventually("the pod's parent is empty", async || {
            let dirs = self.daemon.places().cgroups().into_iter();
            let mut dirs = dirs.filter(|dir| dir.ends_with(name));
            dirs.all(|dir| std::fs::remove_dir(dir).is_ok())
                .then_some(())
        })
        .await;
    }

    /// The cgroup of a container's first process.
    pub async fn cgroup(&self, container: &str) -> Cgroup {
        let pid = self.container_info(container).await["pid"].as_i64();
        Cgroup::of(pid.expect("pid"))
    }
}

/// A cgroup as the kernel shows it, in whatever version and wherever it lies.
#[derive(Clone, Debug)]
pub struct Cgroup {
    /// `/proc/PID/cgroup`.
    text: String,
    above: usize,
}

impl Cgroup {
    pub fn of(pid: i64) -> Self {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup"));
        Self {
            text: text.expect("cgroups of a process"),
            above: 0,
        }
    }

    /// The one above.
    #[must_use]
    pub fn parent(&self) -> Self {
        Self {
            above: self.above + 1,
            ..self.clone()
        }
    }

    pub fn is_v2() -> bool {
        PathBuf::from("/sys/fs/cgroup/cgroup.controllers").exists()
    }

    /// A file of a v1 controller, or of v2.
    fn path(&self, controller: &str, v1: &str, v2: &str) -> PathBuf {
        let (mut dir, name) = match Self::is_v2() {
            true => {
                let line = self.text.lines().find_map(|line| line.strip_prefix("0::"));
                let path = line.expect("a line of v2");
                (PathBuf::from(format!("/sys/fs/cgroup{path}")), v2)
            }
            false => {
                let path = self.text.lines().find_map(|line| {
                    let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
                    let mut controllers = controllers.split(',');
                    controllers.any(|one| one == controller).then_some(path)
                });
                let path = path.expect("the controller");
                (
                    PathBuf::from(format!("/sys/fs/cgroup/{controller}{path}")),
                    v1,
                )
            }
        };
        for _ in 0..self.above {
            dir.pop();
        }
        dir.join(name)
    }

    /// Text of a file; `None` if this kernel has it not.
    pub fn text(&self, controller: &str, v1: &str, v2: &str) -> Option<String> {
        std::fs::read_to_string(self.path(controller, v1, v2)).ok()
    }

    fn number(&self, controller: &str, v1: &str, v2: &str) -> u64 {
        let text = self.text(controller, v1, v2).expect("the file");
        text.trim().parse().expect("a number")
    }

    /// CPU time in nanoseconds.
    pub fn cpu(&self) -> u64 {
        if !Self::is_v2() {
            return self.number("cpuacct", "cpuacct.usage", "");
        }
        let text = self.text("", "", "cpu.stat").expect("cpu.stat");
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "));
        line.expect("usage").parse::<u64>().expect("a number") * 1000
    }

    pub fn memory(&self) -> u64 {
        self.number("memory", "memory.usage_in_bytes", "memory.current")
    }

    /// Tasks.
    pub fn tasks(&self) -> u64 {
        self.number("pids", "pids.current", "pids.current")
    }
}
