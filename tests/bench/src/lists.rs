//! Time of the lists that a kubelet asks for all the time, with many containers.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use k8s_cri::v1::{ListContainerStatsRequest, ListContainersRequest, ListPodSandboxRequest};
use serde_json::json;

use crate::Common;
use crate::node::Network;
use crate::stats::{Summary, ratio};

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    #[arg(long, default_value_t = 100)]
    pods: u32,
    /// Containers in each of them
    #[arg(long, default_value_t = 5)]
    containers: u32,
    /// Calls of each list
    #[arg(long, default_value_t = 300)]
    calls: u32,
}

pub async fn run(options: Options) -> Result<()> {
    let mut nodes = options.common.nodes().await?;
    let mut results = Vec::new();
    let all = (options.pods * options.containers) as usize;
    for node in &mut nodes {
        let mut pods = Vec::new();
        for _ in 0..options.pods {
            let mut pod = node.pod_config(Network::Host)?;
            node.run_pod(&mut pod).await?;
            for n in 0..options.containers {
                let name = format!("c{n}");
                let container = node
                    .create_named(&pod, &name, &["sleep", "1000000"])
                    .await?;
                node.start(&container).await?;
            }
            pods.push(pod);
        }
        let mut samples: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for _ in 0..options.calls {
            let began = Instant::now();
            let listed = node
                .runtime
                .list_pod_sandbox(ListPodSandboxRequest::default());
            let listed = listed.await?.into_inner().items.len();
            let pods_after = began.elapsed();
            ensure!(listed == options.pods as usize, "{listed} pods");
            let began = Instant::now();
            let listed = node
                .runtime
                .list_containers(ListContainersRequest::default());
            let listed = listed.await?.into_inner().containers.len();
            let containers_after = began.elapsed();
            ensure!(listed == all, "{listed} containers");
            let began = Instant::now();
            let listed = node
                .runtime
                .list_container_stats(ListContainerStatsRequest::default());
            let listed = listed.await?.into_inner().stats.len();
            let stats_after = began.elapsed();
            ensure!(listed == all, "statistics of {listed} containers");
            for (call, after) in [
                ("ListPodSandbox", pods_after),
                ("ListContainers", containers_after),
                ("ListContainerStats", stats_after),
            ] {
                samples
                    .entry(call)
                    .or_default()
                    .push(after.as_secs_f64() * 1e3);
            }
        }
        for pod in pods {
            node.end_pod(&pod.id).await?;
        }
        let mut table = BTreeMap::new();
        for (call, samples) in samples {
            table.insert(call, Summary::of(&samples).context("no samples")?);
        }
        results.push((node.name.clone(), table));
    }
    println!(
        "\ntime in ms with {all} containers in {} pods, {} calls of each",
        options.pods, options.calls
    );
    println!(
        "{:<12}{:<20}{:>10}{:>10}{:>10}",
        "", "", "median", "99 %", "max"
    );
    for (name, table) in &results {
        for (call, summary) in table {
            println!(
                "{name:<12}{call:<20}{:>10.2}{:>10.2}{:>10.2}",
                summary.median, summary.p99, summary.max
            );
        }
    }
    if let [(ours, mine), (theirs, peer), ..] = &results[..] {
        for (call, summary) in mine {
            println!(
                "{call}: {ours} / {theirs}: median {}, 99 % {}",
                ratio(summary.median, peer[call].median),
                ratio(summary.p99, peer[call].p99)
            );
        }
    }
    options.common.write(&json!({
        "mode": "lists", "unit": "ms", "pods": options.pods, "containers": all, "results": results,
    }))
}
