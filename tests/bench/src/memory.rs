//! Memory of the runtime's own programs at several numbers of running pods.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use crate::Common;
use crate::node::Network;
use crate::process::{self, Role};
use crate::stats::ratio;

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Numbers of pods at which to measure, rising
    #[arg(long, value_delimiter = ',', default_value = "0,1,10,50")]
    steps: Vec<u32>,
    /// Seconds of rest before each measurement
    #[arg(long, default_value_t = 3)]
    settle: u64,
}

struct Figures {
    runtime: String,
    pods: u32,
    daemon: process::Program,
    per_pod: process::Program,
}

pub async fn run(options: Options) -> Result<()> {
    let mut nodes = options.common.nodes().await?;
    let mut table: Vec<Figures> = Vec::new();
    let mut results = Vec::new();
    // One runtime after the other, so that at most one has pods.
    for node in &mut nodes {
        let mut running = Vec::new();
        for &pods in &options.steps {
            while (running.len() as u64) < u64::from(pods) {
                running.push(node.up(Network::Cni, &["sleep", "1000000"]).await?);
            }
            tokio::time::sleep(Duration::from_secs(options.settle)).await;
            let programs = process::programs(&node.name)?;
            results.push(json!({ "runtime": node.name, "pods": pods, "programs": programs }));
            table.push(Figures {
                runtime: node.name.clone(),
                pods,
                daemon: process::sum(&programs, Role::Daemon),
                per_pod: process::sum(&programs, Role::PerPod),
            });
        }
        for (pod, container) in running {
            node.down(&pod, &container).await?;
        }
        tokio::time::sleep(Duration::from_secs(options.settle)).await;
        let programs = process::programs(&node.name)?;
        results.push(json!({ "runtime": node.name, "pods": "removed", "programs": programs }));
    }

    println!("\nmemory in KiB, PSS / Private_Dirty");
    println!(
        "{:<12}{:>5}{:>20}{:>20}{:>20}",
        "", "pods", "daemon", "each pod", "all"
    );
    let pair = |p: &process::Program, by: u32| {
        let by = f64::from(by.max(1));
        format!(
            "{:.0} / {:.0}",
            p.pss_kb as f64 / by,
            p.private_dirty_kb as f64 / by
        )
    };
    for row in &table {
        let mut all = row.daemon;
        all += row.per_pod;
        println!(
            "{:<12}{:>5}{:>20}{:>20}{:>20}",
            row.runtime,
            row.pods,
            pair(&row.daemon, 1),
            if row.pods == 0 {
                "-".to_owned()
            } else {
                pair(&row.per_pod, row.pods)
            },
            pair(&all, 1),
        );
    }
    if let [ours, theirs, ..] = &nodes[..] {
        for &pods in &options.steps {
            let total = |name: &str| {
                let row = table
                    .iter()
                    .find(|row| row.runtime == name && row.pods == pods);
                row.map_or(0.0, |row| (row.daemon.pss_kb + row.per_pod.pss_kb) as f64)
            };
            let ratio = ratio(total(&ours.name), total(&theirs.name));
            println!(
                "{pods:>3} pods: PSS of all, {} / {}: {ratio}",
                ours.name, theirs.name
            );
        }
    }
    options
        .common
        .write(&json!({ "mode": "memory", "unit": "KiB", "results": Value::Array(results) }))
}
