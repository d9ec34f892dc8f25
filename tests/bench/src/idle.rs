//! CPU time of the runtime's programs while pods run and nobody asks for anything.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::Common;
use crate::node::Network;
use crate::process::{self, Role};

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Running pods
    #[arg(long, default_value_t = 50)]
    pods: u32,
    /// Seconds to watch
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Seconds of rest before
    #[arg(long, default_value_t = 5)]
    settle: u64,
}

pub async fn run(options: Options) -> Result<()> {
    let mut nodes = options.common.nodes().await?;
    let mut results = Vec::new();
    println!(
        "\nCPU over {} s with {} idle pods, in ticks of 10 ms",
        options.seconds, options.pods
    );
    for node in &mut nodes {
        let mut running = Vec::new();
        for _ in 0..options.pods {
            running.push(node.up(Network::Host, &["sleep", "1000000"]).await?);
        }
        tokio::time::sleep(Duration::from_secs(options.settle)).await;
        let before = process::programs(&node.name)?;
        tokio::time::sleep(Duration::from_secs(options.seconds)).await;
        let after = process::programs(&node.name)?;
        let spent = |role| {
            process::sum(&after, role)
                .cpu_ticks
                .saturating_sub(process::sum(&before, role).cpu_ticks)
        };
        let (daemon, pods) = (spent(Role::Daemon), spent(Role::PerPod));
        println!("{}: daemon {daemon}, all pods together {pods}", node.name);
        results.push(json!({ "runtime": node.name, "daemon": daemon, "per_pod_programs": pods }));
        for (pod, container) in running {
            node.down(&pod, &container).await?;
        }
    }
    options.common.write(&json!({
        "mode": "idle", "unit": "ticks", "pods": options.pods, "seconds": options.seconds,
        "results": results,
    }))
}
