//! Time of each call while pods are made and removed one by one.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use crate::Common;
use crate::node::{Network, Node};
use crate::stats::{Summary, ratio};

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Pods in a round, each with one container
    #[arg(long, default_value_t = 30)]
    pods: u32,
    /// Rounds; the runtimes take turns in each
    #[arg(long, default_value_t = 2)]
    rounds: u32,
}

/// Steps in the order in which they are taken. `up` and `down` are the sums for one pod.
const STEPS: [&str; 8] = [
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "up",
    "StopContainer",
    "StopPodSandbox",
    "RemovePodSandbox",
    "down",
];

/// Milliseconds by (network, step).
type Samples = BTreeMap<(&'static str, &'static str), Vec<f64>>;

/// Runs `$call`, adds its milliseconds to `$sum` and keeps them under `$step`.
macro_rules! timed {
    ($samples:ident, $sum:ident, $network:expr, $step:literal, $call:expr) => {{
        let start = Instant::now();
        let result = $call;
        let ms = start.elapsed().as_secs_f64() * 1000.0;
        $sum += ms;
        $samples
            .entry(($network.name(), $step))
            .or_default()
            .push(ms);
        result
    }};
}

async fn round(node: &mut Node, network: Network, pods: u32, samples: &mut Samples) -> Result<()> {
    // One pod that is not counted: caches, bridges and pages are warm for all that follow.
    let (pod, container) = node.up(network, &["sleep", "1000000"]).await?;
    node.down(&pod, &container).await?;

    let mut running = Vec::new();
    for _ in 0..pods {
        let mut pod = node.pod_config(network)?;
        let mut up = 0.0;
        timed!(
            samples,
            up,
            network,
            "RunPodSandbox",
            node.run_pod(&mut pod).await?
        );
        let container = timed!(
            samples,
            up,
            network,
            "CreateContainer",
            node.create(&pod, &["sleep", "1000000"]).await?
        );
        timed!(
            samples,
            up,
            network,
            "StartContainer",
            node.start(&container).await?
        );
        samples.entry((network.name(), "up")).or_default().push(up);
        running.push((pod, container));
    }
    for (pod, container) in running {
        let mut down = 0.0;
        timed!(
            samples,
            down,
            network,
            "StopContainer",
            node.stop(&container).await?
        );
        timed!(
            samples,
            down,
            network,
            "StopPodSandbox",
            node.stop_pod(&pod).await?
        );
        timed!(
            samples,
            down,
            network,
            "RemovePodSandbox",
            node.remove_pod(&pod).await?
        );
        samples
            .entry((network.name(), "down"))
            .or_default()
            .push(down);
    }
    Ok(())
}

pub async fn run(options: Options) -> Result<()> {
    let mut nodes = options.common.nodes().await?;
    let mut samples: Vec<Samples> = vec![Samples::new(); nodes.len()];
    let networks = [Network::Cni, Network::Host];
    for turn in 0..options.rounds {
        for network in networks {
            for place in 0..nodes.len() {
                // Who goes first changes every round, so that neither always meets the machine
                // as the other left it.
                let which = (place + turn as usize) % nodes.len();
                round(
                    &mut nodes[which],
                    network,
                    options.pods,
                    &mut samples[which],
                )
                .await?;
                eprintln!(
                    "round {} {} {}",
                    turn + 1,
                    network.name(),
                    nodes[which].name
                );
            }
        }
    }

    let mut result = serde_json::Map::new();
    for network in networks {
        println!(
            "\n{} network, median (p95) in ms, {} pods x {} rounds",
            network.name(),
            options.pods,
            options.rounds
        );
        let names: String = nodes
            .iter()
            .map(|node| format!("{:>22}", node.name))
            .collect();
        let heading = if nodes.len() > 1 { "ratio" } else { "" };
        println!("{:<18}{names}{heading:>8}", "");
        for step in STEPS {
            let summaries: Vec<Summary> = samples
                .iter()
                .filter_map(|samples| Summary::of(samples.get(&(network.name(), step))?))
                .collect();
            let mut line = format!("{step:<18}");
            for (node, summary) in nodes.iter().zip(&summaries) {
                line += &format!("{:>13.1} ({:>6.1})", summary.median, summary.p95);
                insert(&mut result, &node.name, network, step, summary)?;
            }
            if let [ours, theirs, ..] = summaries[..] {
                line += &format!("{:>8}", ratio(ours.median, theirs.median));
            }
            println!("{line}");
        }
    }
    let versions: BTreeMap<_, _> = nodes
        .iter()
        .map(|node| (&node.name, &node.version))
        .collect();
    options.common.write(&json!({
        "mode": "pods", "unit": "ms", "pods": options.pods, "rounds": options.rounds,
        "versions": versions, "results": result,
    }))
}

/// `results.<runtime>.<network>.<step>`
fn insert(
    result: &mut serde_json::Map<String, Value>,
    runtime: &str,
    network: Network,
    step: &str,
    summary: &Summary,
) -> Result<()> {
    let entry = result.entry(runtime).or_insert_with(|| json!({}));
    entry[network.name()][step] = serde_json::to_value(summary)?;
    Ok(())
}
