//! How fast a container's output reaches its log file.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;

use crate::Common;
use crate::node::Network;
use crate::process::{self, Role};
use crate::stats::ratio;

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Seconds to write for
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

/// 99 characters and the newline that `yes` adds.
const LINE: &str = "gantry writes this line over and over to see how fast a log can grow 0123456789 0123456789 01234567";

pub async fn run(options: Options) -> Result<()> {
    let mut nodes = options.common.nodes().await?;
    let mut figures = Vec::new();
    let mut results = Vec::new();
    for node in &mut nodes {
        let (pod, container) = node.up(Network::Host, &["yes", LINE]).await?;
        let log = pod.log_dir.join("c.log");
        let size = || -> Result<u64> {
            Ok(std::fs::metadata(&log)
                .with_context(|| format!("stat {}", log.display()))?
                .len())
        };
        let ticks = |name: &str| -> Result<u64> {
            let programs = process::programs(name)?;
            let (daemon, pods) = (
                process::sum(&programs, Role::Daemon),
                process::sum(&programs, Role::PerPod),
            );
            Ok(daemon.cpu_ticks + pods.cpu_ticks)
        };
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (bytes, cpu, start) = (size()?, ticks(&node.name)?, Instant::now());
        tokio::time::sleep(Duration::from_secs(options.seconds)).await;
        let seconds = start.elapsed().as_secs_f64();
        let bytes = size()? - bytes;
        // sysconf(_SC_CLK_TCK) is 100 on every architecture that we build for.
        let cpu = (ticks(&node.name)? - cpu) as f64 / 100.0;
        node.down(&pod, &container).await?;
        std::fs::remove_file(&log).with_context(|| format!("remove {}", log.display()))?;
        ensure!(bytes > 0, "{}: nothing was logged", node.name);
        let (rate, cost) = (bytes as f64 / seconds / 1e6, cpu / (bytes as f64 / 1e9));
        println!(
            "{}: {rate:.0} MB/s into the log file, {cost:.2} s of CPU for each GB",
            node.name
        );
        results.push(json!({
            "runtime": node.name, "bytes": bytes, "seconds": seconds, "mb_per_s": rate,
            "cpu_s_per_gb": cost,
        }));
        figures.push(rate);
    }
    if let [ours, theirs, ..] = figures[..] {
        println!("ratio {}", ratio(ours, theirs));
    }
    options
        .common
        .write(&json!({ "mode": "logs", "line_bytes": LINE.len() + 1, "results": results }))
}
