//! Times and weighs CRI runtimes side by side, through the socket that a kubelet would use.
//!
//! `tests/bench/run` makes the place to measure in (namespaces of its own, the daemons, the
//! images) and calls this program once per mode. With several `--runtime`s the first is the one
//! under test and ratios are its figure divided by the other's.

mod idle;
mod kubelet;
mod lists;
mod logs;
mod memory;
mod node;
mod pods;
mod process;
mod pull;
mod stats;
mod streaming;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};

use node::Node;

#[derive(Parser)]
#[command(about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Start and remove pods one by one, timing each call
    Pods(#[command(flatten)] pods::Options),
    /// Proportional and private memory of the runtime's programs at several numbers of pods
    Memory(#[command(flatten)] memory::Options),
    /// Bytes a second that reach the log file of a container that writes as fast as it can
    Logs(#[command(flatten)] logs::Options),
    /// CPU time of the runtime's programs while idle pods run
    Idle(#[command(flatten)] idle::Options),
    /// CPU time of the runtime's programs under a kubelet's habits
    Kubelet(#[command(flatten)] kubelet::Options),
    /// Time of the lists of pods, containers and their statistics
    Lists(#[command(flatten)] lists::Options),
    /// Time of an exec, and bytes a second through exec and port-forward
    Streaming(#[command(flatten)] streaming::Options),
    /// Pull images from a registry on the loopback: time, CPU time and peak memory
    Pull(#[command(flatten)] pull::Options),
}

#[derive(Args)]
struct Common {
    /// NAME=SOCKET of a runtime; repeat for a peer
    #[arg(long = "runtime", required = true, value_name = "NAME=SOCKET")]
    runtimes: Vec<String>,
    /// Image with sh, sleep and yes, present in every runtime
    #[arg(long, default_value = "docker.io/library/busybox:gantry")]
    image: String,
    /// Runtime handler; empty for the default
    #[arg(long, default_value = "")]
    handler: String,
    /// Directory for container logs
    #[arg(long, value_name = "DIR")]
    log_dir: PathBuf,
    /// Write the result here too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Common {
    async fn nodes(&self) -> Result<Vec<Node>> {
        let mut nodes = Vec::new();
        for runtime in &self.runtimes {
            let (name, socket) = runtime
                .split_once('=')
                .with_context(|| format!("--runtime {runtime:?} is not NAME=SOCKET"))?;
            nodes.push(Node::connect(name, socket, self).await?);
        }
        ensure!(!nodes.is_empty(), "no --runtime");
        Ok(nodes)
    }

    fn write(&self, result: &serde_json::Value) -> Result<()> {
        if let Some(path) = &self.json {
            let text = serde_json::to_string_pretty(result)?;
            std::fs::write(path, text + "\n")
                .with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let mode = Cli::parse().mode;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match mode {
            Mode::Pods(options) => pods::run(options).await,
            Mode::Memory(options) => memory::run(options).await,
            Mode::Logs(options) => logs::run(options).await,
            Mode::Idle(options) => idle::run(options).await,
            Mode::Kubelet(options) => kubelet::run(options).await,
            Mode::Lists(options) => lists::run(options).await,
            Mode::Streaming(options) => streaming::run(options).await,
            Mode::Pull(options) => pull::run(options).await,
        }
    })
}
