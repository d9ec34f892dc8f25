//! Runs critest, the Kubernetes CRI conformance suite, against a gantryd of its own.
//!
//! `tests/conformance/run` makes the place to run in (namespaces, programs, packages) and calls
//! this program once per OCI runtime. The node has directories, socket, network and cgroups of its
//! own, and a registry on its loopback that answers for the registries that critest's images are
//! named after. After each run of the suite nothing may be left of its pods.

mod critest;
mod debian;
mod images;
mod report;
mod runtime;
mod skips;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use gantry_testkit::daemon::{Daemon, Options};

use critest::Mode;
use report::Outcome;
use runtime::Facts;
use skips::Skips;

/// Lines of a failed spec's message that are shown.
const SHOWN: usize = 12;

#[derive(Parser)]
#[command(about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the Debian packages that the images are made of, one a line; names after the first
    /// are those that it has in other releases
    Packages,
    /// Compile what the images need beside packages, for a machine that has no compiler
    Compile {
        /// The directory with the packages
        #[arg(value_name = "DIR")]
        into: PathBuf,
    },
    /// Run the suite
    Suite(Suite),
}

#[derive(Args)]
struct Suite {
    #[arg(long, value_name = "FILE")]
    critest: PathBuf,
    /// OCI runtime to run containers with
    #[arg(long, value_name = "FILE")]
    runtime: PathBuf,
    /// With the systemd cgroup driver: systemd must run this machine, on cgroup v2
    #[arg(long)]
    systemd: bool,
    /// Directory with the packages that `packages` names
    #[arg(long, value_name = "DIR")]
    packages: PathBuf,
    /// List of specs that may be skipped
    #[arg(long, value_name = "FILE")]
    skips: PathBuf,
    /// Directory for logs and reports
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number of processes of each run in turn, on one daemon
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "4")]
    modes: Vec<Mode>,
    /// For critest
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// Chooses the specs that stream, and has them do it over WebSocket; critest's default is SPDY.
const OVER_WEBSOCKET: [&str; 4] = [
    "-ginkgo.focus=Streaming",
    "-websocket-exec",
    "-websocket-attach",
    "-websocket-portforward",
];

/// Sums over all runs.
#[derive(Default)]
struct Totals {
    passed: usize,
    failed: usize,
    skipped: usize,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Packages => {
            for names in images::PACKAGES {
                println!("{}", names.join(" "));
            }
            return ExitCode::SUCCESS;
        }
        Command::Compile { into } => images::compile(&into).map(|()| Totals::default()),
        Command::Suite(suite) => suite.run(),
    };
    match outcome {
        Ok(totals) => {
            println!(
                "{} passed, {} failed, {} skipped",
                totals.passed, totals.failed, totals.skipped
            );
            match totals.failed {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            eprintln!("gantry-conformance: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Suite {
    fn run(&self) -> Result<Totals> {
        let facts = Facts::ask(&self.runtime)?;
        let skips = Skips::read(&self.skips, &facts)?;
        let version = runtime::version(&self.runtime)?;
        let mut daemon = self.node().context("start gantryd")?;
        let registry = daemon.netns().registry().context("registry")?;
        let pinned = images::publish(&registry, &self.packages).context("images")?;
        for host in images::HOSTS {
            let dir = daemon.path("certs.d").join(host);
            std::fs::create_dir(&dir)?;
            // The server too, so that nothing is ever asked of the real one.
            let hosts = format!("server = {:?}\n", registry.url());
            std::fs::write(dir.join("hosts.toml"), hosts)?;
        }
        let program = daemon.path("bin/critest");
        critest::pin(&self.critest, &pinned, &program)?;
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        tokio.block_on(daemon.ready())?;

        let mut totals = Totals::default();
        let mut runs: Vec<(String, Mode, &[String])> = (1..)
            .zip(&self.modes)
            .map(|(number, &mode)| {
                let what = format!("{mode}, run {number} of {}", self.modes.len());
                (what, mode, self.arguments.as_slice())
            })
            .collect();
        let over_websocket = OVER_WEBSOCKET.map(str::to_owned);
        if self.arguments.is_empty() {
            let mode = Mode { processes: 1 };
            runs.push(("streaming over WebSocket".to_owned(), mode, &over_websocket));
        }
        for (number, (what, mode, arguments)) in (1..).zip(runs) {
            println!("== critest, {version}, {what}");
            let dir = self.out.join(number.to_string());
            std::fs::create_dir_all(&dir)?;
            let run = critest::Run {
                critest: &program,
                mode,
                skip: skips.not_run().collect(),
                arguments,
                dir: &dir,
            };
            if let Err(error) = self.one(&run, &daemon, &skips, &mut totals) {
                println!("FAIL {}: critest, {what}: {error:#}", self.name());
                totals.failed += 1;
            }
            std::fs::write(dir.join("gantryd.log"), daemon.log())?;
        }
        let status = daemon.terminate().context("SIGTERM to gantryd")?;
        ensure!(status.success(), "gantryd: {status}");
        Ok(totals)
    }

    /// What the OCI runtime is called here.
    fn name(&self) -> std::borrow::Cow<'_, str> {
        self.runtime
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
    }

    fn node(&self) -> Result<Daemon> {
        let config = format!(
            "[runtime]\ndefault = \"tested\"\n[runtime.handlers.tested]\nbinary = {:?}\n",
            self.runtime
        );
        let mut options = Options::default().config(&config);
        if self.systemd {
            options = options.systemd();
        }
        Ok(Daemon::start(options)?)
    }

    /// One run of the suite, and what it left.
    fn one(
        &self,
        run: &critest::Run<'_>,
        daemon: &Daemon,
        skips: &Skips,
        totals: &mut Totals,
    ) -> Result<()> {
        let started = Instant::now();
        let before = daemon.snapshot();
        let report = run.run(daemon)?;
        let all = run.arguments.is_empty();
        let outcome = Outcome::read(&report, skips, all)?;
        ensure!(
            outcome.passed + outcome.failed.len() > 0,
            "no spec was selected"
        );
        for ((specs, reason), count) in &outcome.skipped {
            println!("SKIP {count} x {specs}: {reason}");
        }
        for (spec, message) in &outcome.failed {
            println!("FAIL {}: {spec}", self.name());
            for line in message.lines().take(SHOWN) {
                println!("       {line}");
            }
        }
        let skipped: usize = outcome.skipped.values().sum();
        println!(
            "     {} passed, {} failed, {skipped} skipped in {} s",
            outcome.passed,
            outcome.failed.len(),
            started.elapsed().as_secs()
        );
        if !all {
            println!("     {} not selected", outcome.not_selected);
        }
        totals.passed += outcome.passed;
        totals.failed += outcome.failed.len();
        totals.skipped += skipped;

        let leaks = daemon.leaks(&before);
        if leaks.is_empty() {
            println!("ok   nothing is left of its pods");
            totals.passed += 1;
        } else {
            println!("FAIL {}: something is left of its pods", self.name());
            leaks.iter().for_each(|leak| println!("       {leak}"));
            totals.failed += 1;
        }
        Ok(())
    }
}
