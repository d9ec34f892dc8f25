//! What tests/soak/run starts, which makes what it needs.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use gantry_soak::rng::Rng;
use gantry_soak::{churn, life, ready};
use gantry_testkit::daemon;

#[derive(Parser)]
#[command(about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// Clients live while the daemon is killed and everything around it disturbed
    Life {
        /// End after so many kills of the daemon
        #[arg(long, default_value_t = 200, conflicts_with = "seconds")]
        kills: u64,
        /// End after so many seconds
        #[arg(long)]
        seconds: Option<u64>,
        /// Seed of a run to be tried again; a new one if absent
        #[arg(long)]
        seed: Option<u64>,
        #[arg(long, default_value_t = 4)]
        clients: u64,
    },
    /// Pods by the thousand come and go, and what the daemon takes is measured
    Churn {
        #[arg(long, default_value_t = 10_000)]
        pods: usize,
        #[arg(long, default_value_t = 4)]
        clients: usize,
        /// Every so many pods has a container; 0 for none
        #[arg(long, default_value_t = 10)]
        container_every: usize,
        /// Pods between two measurements
        #[arg(long, default_value_t = 500)]
        stretch: usize,
    },
    /// Time from the start of the daemon to its first answer, after a kill -9 with many pods running
    Ready {
        #[arg(long, default_value_t = 200)]
        pods: usize,
        #[arg(long, default_value_t = 9)]
        rounds: usize,
    },
}

fn main() -> ExitCode {
    let mode = Cli::parse().mode;
    if let Some(reason) = daemon::unable() {
        println!("SKIP soak: {reason}");
        println!("0 passed, 0 failed, 1 skipped");
        return ExitCode::SUCCESS;
    }
    // The modes say by a panic what is wrong, as tests do.
    let outcome = std::panic::catch_unwind(|| match mode {
        Mode::Life {
            kills,
            seconds,
            seed,
            clients,
        } => {
            let seed = seed.unwrap_or_else(Rng::fresh_seed);
            let until = seconds.map_or(life::Until::Kills(kills), life::Until::Seconds);
            let options = life::Options {
                seed,
                clients,
                until,
            };
            match life::run_blocking(options) {
                Ok(report) => println!("{report}"),
                Err(error) => panic!("{error}"),
            }
        }
        Mode::Churn {
            pods,
            clients,
            container_every,
            stretch,
        } => churn::run(churn::Options {
            pods,
            clients,
            container_every,
            stretch,
        }),
        Mode::Ready { pods, rounds } => ready::run(ready::Options { pods, rounds }),
    });
    if outcome.is_ok() {
        println!("1 passed, 0 failed, 0 skipped");
        ExitCode::SUCCESS
    } else {
        println!("0 passed, 1 failed, 0 skipped");
        ExitCode::FAILURE
    }
}
