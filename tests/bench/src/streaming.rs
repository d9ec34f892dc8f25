//! Exec and port-forward, as a client meets them that is built from Kubernetes' own library
//! (tests/kubernetes/stream), over SPDY.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;

use crate::Common;
use crate::node::{Network, Node, Pod};
use crate::stats::{Summary, ratio};

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// The client
    #[arg(long, value_name = "FILE")]
    client: PathBuf,
    /// Rounds; the runtimes take turns in each
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Execs in a round
    #[arg(long, default_value_t = 20)]
    execs: u32,
    /// Megabytes that go through exec and port-forward in a round
    #[arg(long, default_value_t = 512)]
    megabytes: u32,
}

/// Where the container sends to whoever connects.
const PORT: &str = "8080";

/// Figures in the order in which they are taken, and their units.
const FIGURES: [(&str, &str); 4] = [
    ("exec true", "ms"),
    ("exec true, host", "ms"),
    ("exec stdout", "MB/s"),
    ("port-forward", "MB/s"),
];

/// A runtime with what it streams from.
struct Place {
    node: Node,
    /// A pod with a network of its own, and one with the host's.
    pods: [(Pod, String); 2],
    samples: [Vec<f64>; FIGURES.len()],
}

impl Place {
    async fn new(mut node: Node, send: &str) -> Result<Self> {
        let serve = format!("nc -ll -p {PORT} -e {send}");
        let own = node.up(Network::Cni, &["sh", "-c", &serve]).await?;
        let hosts = node.up(Network::Host, &["sleep", "1000000"]).await?;
        Ok(Self {
            node,
            pods: [own, hosts],
            samples: Default::default(),
        })
    }

    /// Takes each figure once more.
    fn round(&mut self, options: &Options, send: &str) -> Result<()> {
        let [(pod, container), (_, hosts)] = &self.pods;
        let execs = options.execs.to_string();
        let read = [&["read", container.as_str()][..], &words(send)].concat();
        let ways: [(&str, &[&str]); FIGURES.len()] = [
            (&execs, &["exec", container, "true"]),
            (&execs, &["exec", hosts, "true"]),
            ("1", &read),
            ("1", &["forward", &pod.id, PORT]),
        ];
        for (samples, (times, arguments)) in self.samples.iter_mut().zip(ways) {
            let output = Command::new(&options.client)
                .args(["-cri", &self.node.socket, "-times", times])
                .args(arguments)
                .stderr(Stdio::inherit())
                .output()
                .with_context(|| format!("run {}", options.client.display()))?;
            ensure!(
                output.status.success(),
                "{}: {arguments:?}: {}",
                self.node.name,
                output.status
            );
            for line in String::from_utf8(output.stdout)?.lines() {
                samples.push(line.parse().with_context(|| format!("figure {line:?}"))?);
            }
        }
        Ok(())
    }
}

fn words(text: &str) -> Vec<&str> {
    text.split(' ').collect()
}

pub async fn run(options: Options) -> Result<()> {
    let send = format!("dd if=/dev/zero bs=1M count={}", options.megabytes);
    let mut places = Vec::new();
    for node in options.common.nodes().await? {
        places.push(Place::new(node, &send).await?);
    }
    for turn in 0..options.rounds {
        for place in 0..places.len() {
            // Who goes first changes every round.
            let which = (place + turn as usize) % places.len();
            places[which].round(&options, &send)?;
            eprintln!("round {} {}", turn + 1, places[which].node.name);
        }
    }

    println!(
        "\nmedian (p95), {} rounds, {} execs and {} MB in each",
        options.rounds, options.execs, options.megabytes
    );
    let names: String = places
        .iter()
        .map(|place| format!("{:>22}", place.node.name))
        .collect();
    let heading = if places.len() > 1 { "ratio" } else { "" };
    println!("{:<24}{names}{heading:>8}", "");
    let mut result = json!({});
    for (figure, (what, unit)) in FIGURES.into_iter().enumerate() {
        let mut line = format!("{:<24}", format!("{what} ({unit})"));
        let mut medians = Vec::new();
        for place in &places {
            let summary = Summary::of(&place.samples[figure]).context("no samples")?;
            line += &format!("{:>13.1} ({:>6.1})", summary.median, summary.p95);
            result[&place.node.name][what] = serde_json::to_value(summary)?;
            medians.push(summary.median);
        }
        if let [ours, theirs, ..] = medians[..] {
            line += &format!("{:>8}", ratio(ours, theirs));
        }
        println!("{line}");
    }
    let versions: serde_json::Map<_, _> = places
        .iter()
        .map(|place| (place.node.name.clone(), json!(place.node.version)))
        .collect();
    for place in &mut places {
        for (pod, container) in &place.pods {
            place.node.down(pod, container).await?;
        }
    }
    options.common.write(&json!({
        "mode": "streaming", "rounds": options.rounds, "execs": options.execs,
        "megabytes": options.megabytes, "versions": versions, "results": result,
    }))
}
