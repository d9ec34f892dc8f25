//! CPU time of the runtime's programs while a kubelet's habits are kept up: the lists of every
//! second and the statuses of what they show to have changed, node status, statistics, the rotation
//! of logs, collection by id; without and with pods that come and go.
//!
//! The habits and their periods are those of Kubernetes 1.36 with its defaults: the generic PLEG, the
//! statistics provider with cAdvisor, the container log manager, the pod workers' resync. Work is
//! counted in seconds of a kubelet's life, so that a slow runtime is not given less of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use k8s_cri::v1::{
    ContainerFilter, ContainerState, ContainerStateValue, ContainerStatusRequest,
    ImageFsInfoRequest, ListContainerStatsRequest, ListContainersRequest, ListImagesRequest,
    ListPodSandboxRequest, PodSandboxState, PodSandboxStatusRequest, RemoveContainerRequest,
    ReopenContainerLogRequest, StatusRequest,
};
use serde_json::json;
use tokio::time::MissedTickBehavior;
use tonic::Code;

use crate::Common;
use crate::node::{Network, Node, Pod};
use crate::process::{self, Role};
use crate::stats::ratio;

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Running pods, each with a container
    #[arg(long, default_value_t = 100)]
    pods: usize,
    /// Seconds of each of the two parts
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Pods that are replaced every five seconds of the second part
    #[arg(long, default_value_t = 4)]
    replaced: usize,
}

/// Every so many seconds.
const RELIST: u64 = 1;
const STATUS: u64 = 5;
const REPLACE: u64 = 5;
const STATS: u64 = 10;
const LOGS: u64 = 10;
const IMAGES: u64 = 30;
const COLLECT: u64 = 30;
/// In which each pod is looked at once, changed or not.
const RESYNC: usize = 60;

/// Logs that have become too long at a look.
const ROTATED: usize = 10;

type States = BTreeMap<String, i32>;

struct Kubelet<'a> {
    node: &'a mut Node,
    running: Vec<(Pod, String)>,
    /// As of the last relist: state by id, and the pod of each container.
    pods: States,
    containers: BTreeMap<String, (String, i32)>,
    calls: u64,
}

/// What is gone between a list and a look at it is no failure.
fn unless_gone<T>(answer: Result<T, tonic::Status>) -> Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status.into()),
    }
}

impl Kubelet<'_> {
    async fn relist(&mut self) -> Result<()> {
        self.calls += 2;
        let runtime = &mut self.node.runtime;
        let pods = runtime.list_pod_sandbox(ListPodSandboxRequest::default());
        let pods: States = pods
            .await?
            .into_inner()
            .items
            .into_iter()
            .map(|pod| (pod.id, pod.state))
            .collect();
        let containers = runtime.list_containers(ListContainersRequest::default());
        let containers = containers.await?.into_inner().containers.into_iter();
        let containers: BTreeMap<_, _> = containers
            .map(|each| (each.id, (each.pod_sandbox_id, each.state)))
            .collect();
        let mut changed = BTreeSet::new();
        for (id, state) in pods.iter().chain(&self.pods) {
            if pods.get(id) != Some(state) || self.pods.get(id) != Some(state) {
                changed.insert(id.clone());
            }
        }
        for (id, state) in containers.iter().chain(&self.containers) {
            if containers.get(id) != Some(state) || self.containers.get(id) != Some(state) {
                changed.insert(state.0.clone());
            }
        }
        (self.pods, self.containers) = (pods, containers);
        for pod in changed {
            self.look(&pod).await?;
        }
        Ok(())
    }

    /// The statuses of a pod and of its containers.
    async fn look(&mut self, pod: &str) -> Result<()> {
        let of_pod = self
            .containers
            .iter()
            .filter(|(_, (owner, _))| owner == pod);
        let containers: Vec<_> = of_pod.map(|(id, _)| id.clone()).collect();
        self.calls += 1 + containers.len() as u64;
        let runtime = &mut self.node.runtime;
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.to_owned(),
            verbose: false,
        };
        unless_gone(runtime.pod_sandbox_status(request).await)?;
        for container_id in containers {
            let request = ContainerStatusRequest {
                container_id,
                verbose: false,
            };
            unless_gone(runtime.container_status(request).await)?;
        }
        Ok(())
    }

    async fn status(&mut self) -> Result<()> {
        self.calls += 1;
        let status = self.node.runtime.status(StatusRequest::default()).await?;
        let status = status.into_inner().status.context("no status")?;
        let ready = status
            .conditions
            .iter()
            .find(|each| each.r#type == "RuntimeReady");
        ensure!(
            ready.is_some_and(|each| each.status),
            "not ready: {status:?}"
        );
        Ok(())
    }

    async fn stats(&mut self) -> Result<()> {
        self.calls += 4;
        let runtime = &mut self.node.runtime;
        runtime
            .list_pod_sandbox(ListPodSandboxRequest::default())
            .await?;
        runtime
            .list_containers(ListContainersRequest::default())
            .await?;
        let stats = runtime.list_container_stats(ListContainerStatsRequest::default());
        let stats = stats.await?.into_inner().stats;
        ensure!(
            stats.len() >= self.running.len(),
            "statistics of {} containers",
            stats.len()
        );
        self.node
            .images
            .image_fs_info(ImageFsInfoRequest::default())
            .await?;
        Ok(())
    }

    /// Renames logs and has them opened anew, as when they have become too long.
    async fn rotate(&mut self, second: u64) -> Result<()> {
        let filter = ContainerFilter {
            state: Some(ContainerStateValue {
                state: ContainerState::ContainerRunning.into(),
            }),
            ..Default::default()
        };
        let request = ListContainersRequest {
            filter: Some(filter),
        };
        self.calls += 1;
        self.node.runtime.list_containers(request).await?;
        let count = self.running.len();
        for n in 0..ROTATED.min(count) {
            let (pod, container) = &self.running[(second as usize + n) % count];
            let log = pod.log_dir.join("c.log");
            std::fs::rename(&log, pod.log_dir.join(format!("c.log.{second}")))
                .with_context(|| format!("rename {}", log.display()))?;
            let request = ReopenContainerLogRequest {
                container_id: container.clone(),
            };
            self.calls += 2;
            self.node.runtime.reopen_container_log(request).await?;
            ensure!(Path::new(&log).exists(), "{} was not made", log.display());
            let request = ContainerStatusRequest {
                container_id: container.clone(),
                verbose: false,
            };
            self.node.runtime.container_status(request).await?;
        }
        Ok(())
    }

    /// Stops the oldest pods, all at once as pod workers do, and starts as many.
    async fn replace(&mut self, count: usize) -> Result<()> {
        let old: Vec<_> = self
            .running
            .drain(..count.min(self.running.len()))
            .collect();
        let mut stops = tokio::task::JoinSet::new();
        for (pod, container) in &old {
            let mut runtime = self.node.runtime.clone();
            let (pod, container) = (pod.id.clone(), container.clone());
            stops.spawn(async move { crate::node::stop_both(&mut runtime, pod, container).await });
        }
        while let Some(stopped) = stops.join_next().await {
            stopped??;
        }
        for _ in &old {
            self.running.push(self.node.up(Network::Host, WORK).await?);
        }
        // Two stops, three calls to begin.
        self.calls += 5 * old.len() as u64;
        Ok(())
    }

    /// Removes by id what the last relist showed to have ended.
    async fn collect(&mut self) -> Result<()> {
        let exited = i32::from(ContainerState::ContainerExited);
        let ended = self
            .containers
            .iter()
            .filter(|(_, (_, state))| *state == exited);
        let ended: Vec<_> = ended.map(|(id, _)| id.clone()).collect();
        let not_ready = i32::from(PodSandboxState::SandboxNotready);
        let gone = self.pods.iter().filter(|(_, state)| **state == not_ready);
        let gone: Vec<_> = gone.map(|(id, _)| id.clone()).collect();
        self.calls += (ended.len() + 2 * gone.len()) as u64;
        for container_id in ended {
            let request = RemoveContainerRequest { container_id };
            self.node.runtime.remove_container(request).await?;
        }
        for pod in gone {
            self.node.end_pod(&pod).await?;
        }
        Ok(())
    }

    /// So many seconds of a kubelet's life, of which pods are replaced in those of the second part.
    async fn live(&mut self, seconds: u64, replaced: usize) -> Result<()> {
        let mut clock = tokio::time::interval(Duration::from_secs(1));
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for second in 1..=seconds {
            clock.tick().await;
            let due = |period: u64| second.is_multiple_of(period);
            if due(RELIST) {
                self.relist().await?;
            }
            if due(STATUS) {
                self.status().await?;
            }
            if due(STATS) {
                self.stats().await?;
            }
            if due(LOGS) {
                self.rotate(second).await?;
            }
            if due(IMAGES) {
                self.calls += 1;
                self.node
                    .images
                    .list_images(ListImagesRequest::default())
                    .await?;
            }
            if due(COLLECT) {
                self.collect().await?;
            }
            let all: Vec<_> = self.pods.keys().cloned().collect();
            for pod in all.iter().skip(second as usize % RESYNC).step_by(RESYNC) {
                self.look(pod).await?;
            }
            if replaced > 0 && due(REPLACE) {
                self.replace(replaced).await?;
            }
        }
        Ok(())
    }
}

/// A container that writes now and then.
const WORK: &[&str] = &["sh", "-c", "while :; do echo a line; sleep 10; done"];

/// CPU time in ticks of 10 ms, of the daemon and of what runs for each pod.
#[derive(Clone, Copy, serde::Serialize)]
struct Spent {
    daemon: u64,
    per_pod: u64,
    calls: u64,
}

pub async fn run(options: Options) -> Result<()> {
    let mut nodes = options.common.nodes().await?;
    let mut results = Vec::new();
    println!(
        "\nCPU under a kubelet's habits, {} pods, {} s a part, in ticks of 10 ms",
        options.pods, options.seconds
    );
    for node in &mut nodes {
        let mut running = Vec::new();
        for _ in 0..options.pods {
            running.push(node.up(Network::Host, WORK).await?);
        }
        let mut kubelet = Kubelet {
            node,
            running,
            pods: States::new(),
            containers: BTreeMap::new(),
            calls: 0,
        };
        // It has seen its pods before it is watched.
        kubelet.relist().await?;
        kubelet.stats().await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        let mut parts = Vec::new();
        for replaced in [0, options.replaced] {
            let name = kubelet.node.name.clone();
            let before = process::lives(&name)?;
            kubelet.calls = 0;
            kubelet.live(options.seconds, replaced).await?;
            let after = process::lives(&name)?;
            let spent = |role| process::spent(&before, &after, role);
            let spent = Spent {
                daemon: spent(Role::Daemon),
                per_pod: spent(Role::PerPod),
                calls: kubelet.calls,
            };
            println!(
                "{name}, {replaced} pods replaced every {REPLACE} s: daemon {}, for pods {}, {} calls",
                spent.daemon, spent.per_pod, spent.calls
            );
            parts.push(spent);
        }
        let Kubelet { node, running, .. } = kubelet;
        for (pod, container) in running {
            node.down(&pod, &container).await?;
        }
        node.end_all().await?;
        results.push((node.name.clone(), parts));
    }
    if let [(ours, mine), (theirs, peer), ..] = &results[..] {
        for (part, (mine, peer)) in ["as it is", "with churn"].iter().zip(mine.iter().zip(peer)) {
            let all = |spent: &Spent| (spent.daemon + spent.per_pod) as f64;
            println!(
                "{part}: {ours} / {theirs}: daemon {}, with what runs for pods {}",
                ratio(mine.daemon as f64, peer.daemon as f64),
                ratio(all(mine), all(peer))
            );
        }
    }
    let results: Vec<_> = results
        .iter()
        .map(|(name, parts)| json!({ "runtime": name, "steady": parts[0], "churn": parts[1] }))
        .collect();
    options.common.write(&json!({
        "mode": "kubelet", "unit": "ticks", "pods": options.pods, "seconds": options.seconds,
        "replaced": options.replaced, "results": results,
    }))
}
