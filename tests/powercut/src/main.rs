//! Many cuts, by hand or by the night: tests/powercut/run.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use gantry_powercut::filesystem::Kind;
use gantry_powercut::run::{self, Outcome, Plan};

#[derive(Parser)]
struct Arguments {
    /// Cuts in all
    #[arg(long, default_value_t = 200)]
    cuts: usize,
    /// Cuts of one workload; each further one has the next seed
    #[arg(long, default_value_t = 20)]
    cuts_each: usize,
    /// Seed of the first workload
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds that a workload works
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// ext4 or xfs
    #[arg(long, default_value_t = Kind::Ext4)]
    filesystem: Kind,
    /// Keep going after a workload with faults
    #[arg(long)]
    keep_going: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(reason) = run::unable(arguments.filesystem) {
        println!("SKIP powercut: {reason}");
        return Ok(ExitCode::SUCCESS);
    }
    let mut total = Outcome::default();
    let mut left = arguments.cuts;
    let mut seed = arguments.seed;
    while left > 0 && (arguments.keep_going || total.faults.is_empty()) {
        let plan = Plan {
            seed,
            cuts: left.min(arguments.cuts_each.max(1)),
            time: Duration::from_secs(arguments.seconds),
            kind: arguments.filesystem,
        };
        println!("seed {seed}: {} cuts on {}", plan.cuts, plan.kind);
        total.merge(run::run("powercut", &plan)?);
        left -= plan.cuts;
        seed += 1;
    }
    for fault in &total.faults {
        println!("FAULT {fault}");
    }
    println!(
        "{} writes, {} flushes, {} changes acknowledged; longest start {} ms, {} stores set aside",
        total.writes,
        total.flushes,
        total.changes,
        total.longest_start.as_millis(),
        total.set_aside,
    );
    println!(
        "{} cuts, {} acknowledged changes looked at, {} faults",
        total.cuts,
        total.acknowledged,
        total.faults.len(),
    );
    Ok(match total.faults.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
