//! Mode `life`: clients live, the node is disturbed, and at the end of each stretch everything is
//! removed and nothing may be left.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures::future::join_all;
use gantry_integration::busybox_image;
use gantry_testkit::cri;
use gantry_testkit::daemon::{Daemon, Options as DaemonOptions};
use gantry_testkit::image::{Compression, ImageBuilder, Layer};
use gantry_testkit::leakcheck::{self, Snapshot};
use gantry_testkit::netns::LocalRegistry;
use gantry_testkit::stats::Summary;

use crate::actor::{Actor, Shared};
use crate::client::{Client, Surroundings};
use crate::conflict;
use crate::disturb::{Figures, Keeper, Vandal};
use crate::history::Run;
use crate::rng::Rng;

/// Kills between two times that everything is removed.
const STRETCH: u64 = 60;

/// The daemon's disk: small enough to be filled in a moment.
const DISK: u64 = 192 << 20;

/// Runtime and plugin that hang are waited for so long; shorter than where people run them.
const CONFIG: &str =
    "[timeouts]\nruntime_seconds = 3\nnetwork_seconds = 3\nexec_grace_seconds = 0\n";

#[derive(Clone, Debug)]
pub struct Options {
    pub seed: u64,
    pub clients: u64,
    pub until: Until,
}

/// When a run has lasted long enough.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    Kills(u64),
    Seconds(u64),
}

/// What a run amounts to.
#[derive(Debug, Default)]
pub struct Report {
    pub figures: Figures,
    pub counts: BTreeMap<&'static str, u64>,
    pub stretches: u64,
    pub took: Duration,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let figures = &self.figures;
        writeln!(f, "{:>8} kills of the daemon survived", figures.kills)?;
        let at = figures.killed_at.values().sum::<u64>();
        let points = figures.killed_at.len();
        writeln!(
            f,
            "{at:>8} of them at a failpoint, of {points} different ones"
        )?;
        let passed = figures.passed.values().sum::<u64>();
        let points = figures.passed.len();
        writeln!(
            f,
            "{passed:>8} failpoints passed, of {points} different ones"
        )?;
        for (what, count) in &self.counts {
            writeln!(f, "{count:>8} {what}")?;
        }
        if let Some(summary) = Summary::of(&figures.recoveries) {
            let (median, p95, max) = (summary.median, summary.p95, summary.max);
            writeln!(
                f,
                "         seconds until the daemon answered again: median {median:.2}, 95 % {p95:.2}, longest {max:.2}"
            )?;
        }
        write!(
            f,
            "         {} times all was removed, in {:.0?}: no object lost, nothing left behind",
            self.stretches, self.took
        )
    }
}

/// As [`run`], on a tokio runtime of its own.
pub fn run_blocking(options: Options) -> Result<Report, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(run(options))
}

/// A run; the error is all that is needed to find out what happened, and to do it again.
pub async fn run(options: Options) -> Result<Report, String> {
    println!("seed {}", options.seed);
    let shared = Shared::default();
    let mut life = Life::start(options.clone(), shared.clone())
        .await
        .map_err(|error| format!("seed {}: {error}", options.seed))?;
    match life.whole().await {
        Ok(report) => Ok(report),
        Err(_) => {
            life.daemon.show();
            println!("--- its errors");
            let log = life.daemon.log();
            let errors: Vec<_> = log
                .lines()
                .filter(|line| line.contains(" ERROR "))
                .collect();
            errors
                .iter()
                .rev()
                .take(20)
                .for_each(|line| println!("{line}"));
            let mut text = shared.history.story();
            for fault in shared.history.faults() {
                text.push_str(&format!("FAULT {fault}\n"));
            }
            text.push_str(&format!("seed {}", options.seed));
            Err(text)
        }
    }
}

struct Life {
    options: Options,
    rng: Rng,
    shared: Shared,
    // Before the daemon, in whose namespace it is.
    _registry: LocalRegistry,
    daemon: Daemon,
    image: String,
    own_images: Vec<String>,
    before: Snapshot,
}

impl Life {
    async fn start(options: Options, shared: Shared) -> std::io::Result<Self> {
        let mut daemon = Daemon::start(DaemonOptions {
            root_bytes: Some(DISK),
            config: CONFIG.to_owned(),
            ..DaemonOptions::default()
        })?;
        daemon.ready().await?;
        let registry = daemon.netns().registry()?;
        let client = cri::Client::connect(daemon.socket())?;
        let name = |of: &str| format!("{}/test/{of}:1", registry.host());
        registry.add("test/busybox", "1", busybox_image());
        let image = name("busybox");
        client.pull(&image).await.map_err(std::io::Error::other)?;
        let mut own_images = Vec::new();
        for n in 0..options.clients {
            let layer = Layer::new().file("own", n.to_string().as_bytes());
            let own = ImageBuilder::on(busybox_image()).layer(layer, Compression::Gzip);
            let of = format!("own-{n}");
            registry.add(&format!("test/{of}"), "1", &own.cmd(["sh"]).build());
            own_images.push(name(&of));
        }
        drop(client);
        let before = daemon.snapshot();
        Ok(Self {
            rng: Rng::new(options.seed),
            options,
            shared,
            _registry: registry,
            daemon,
            image,
            own_images,
            before,
        })
    }

    async fn whole(&mut self) -> Run<Report> {
        let began = Instant::now();
        let mut report = Report::default();
        loop {
            let goal = match self.options.until {
                Until::Kills(kills) => Until::Kills(kills.min(report.figures.kills + STRETCH)),
                Until::Seconds(seconds) => Until::Seconds(seconds),
            };
            let figures = std::mem::take(&mut report.figures);
            report.figures = self.stretch(report.stretches, goal, figures, began).await?;
            report.stretches += 1;
            let kills = report.figures.kills;
            println!(
                "{kills} kills survived, {} pods, {} containers, {:.0?}",
                self.count("pods"),
                self.count("containers"),
                began.elapsed()
            );
            let over = match self.options.until {
                Until::Kills(wanted) => kills >= wanted,
                Until::Seconds(seconds) => began.elapsed() >= Duration::from_secs(seconds),
            };
            if over {
                break;
            }
        }
        report.took = began.elapsed();
        report.counts = self.shared.history.counts();
        Ok(report)
    }

    fn count(&self, what: &str) -> u64 {
        let counts = self.shared.history.counts();
        counts.get(what).copied().unwrap_or_default()
    }

    /// Clients come, live through disturbances, and leave nothing.
    async fn stretch(
        &mut self,
        number: u64,
        goal: Until,
        figures: Figures,
        began: Instant,
    ) -> Run<Figures> {
        let rng = self.rng.part(number);
        let broken = |error: std::io::Error| self.shared.history.fault("the run", error);
        let logs = self.daemon.path("logs");
        let mut clients = Vec::new();
        for (n, own_image) in self.own_images.iter().enumerate() {
            let who = format!("s{number}-c{n}");
            let socket = self.daemon.socket();
            let actor = Actor::new(&who, rng.part(n as u64 + 10), &self.shared, socket);
            let place = Surroundings {
                logs: logs.clone(),
                image: self.image.clone(),
                own_image: own_image.clone(),
            };
            clients.push(Client::new(actor.map_err(broken)?, place));
        }
        let mut vandal = Vandal::new(&self.daemon, rng.part(1), self.shared.clone());
        let first = figures.kills;
        let mut keeper = Keeper::new(&mut self.daemon, rng.part(2), self.shared.clone(), figures)
            .map_err(broken)?;

        let over = Cell::new(false);
        let reached = |kills: u64| match goal {
            Until::Kills(goal) => kills >= goal,
            Until::Seconds(seconds) => {
                kills >= first + STRETCH || began.elapsed() >= Duration::from_secs(seconds)
            }
        };
        let keep = async {
            let mut outcome = Ok(());
            // The last one is done when nothing else is.
            while outcome.is_ok() && !reached(keeper.figures.kills + 1) {
                outcome = keeper.step().await;
            }
            over.set(true);
            outcome
        };
        let vandalise = async {
            while !over.get() {
                vandal.step().await?;
            }
            Ok(())
        };
        let (image, logs) = (&self.image, &logs);
        let live = join_all(clients.iter_mut().map(async |client| {
            while !over.get() {
                if client.actor().rng.percent(8) {
                    conflict::step(client.actor(), logs, image).await?;
                }
                client.step().await?;
            }
            Ok(())
        }));
        let (kept, vandalised, lived) = tokio::join!(keep, vandalise, live);
        kept?;
        vandalised?;
        lived.into_iter().collect::<Run<()>>()?;
        keeper.finish().await?;
        let figures = std::mem::take(&mut keeper.figures);

        let left = join_all(clients.iter_mut().map(async |client| client.leave().await)).await;
        left.into_iter().collect::<Run<()>>()?;
        let socket = self.daemon.socket();
        let mut last = Actor::new("last", rng.part(3), &self.shared, socket).map_err(broken)?;
        conflict::remove_all(&mut last).await?;
        // Their connections are descriptors of the daemon's.
        drop(clients);
        self.nothing_is_left(last).await?;
        Ok(figures)
    }

    /// Stores that sled has damaged in a kill and gantryd has made anew: kept for whoever wants to
    /// look, and nothing that was acknowledged may be missed for it.
    fn remove_set_aside(&self) -> Run<()> {
        let root = &self.daemon.places().root;
        for name in leakcheck::names(root) {
            if name.starts_with("store.damaged-") {
                self.shared
                    .history
                    .count("stores that were set aside and made anew");
                let removed = std::fs::remove_dir_all(root.join(&name));
                removed.map_err(|error| self.shared.history.fault(&name, error))?;
            }
        }
        Ok(())
    }

    /// Nothing is listed, and nothing is on the machine but what was there before.
    async fn nothing_is_left(&self, mut actor: Actor) -> Run<()> {
        let pods = actor
            .insist("ListPodSandbox", async |c| c.list_pods(None).await)
            .await?;
        let containers = actor
            .insist("ListContainers", async |c| c.list(None).await)
            .await?;
        let images = actor
            .insist("ListImages", async |c| c.list_images().await)
            .await?;
        if !pods.is_empty() || !containers.is_empty() || images.len() != 1 {
            let text = format!("are listed at the end: {pods:?} {containers:?} {images:?}");
            return actor.expect("objects", Err(text));
        }
        drop(actor);
        self.remove_set_aside()?;
        let leaks = self.daemon.leaks(&self.before);
        if leaks.is_empty() {
            return Ok(());
        }
        let told = self.told_of(&leaks);
        let text = format!("left behind: {}\n{told}", leaks.join("\n"));
        Err(self.shared.history.fault("the node", text))
    }

    /// What the daemon's log has of the containers and pods that these lines name.
    fn told_of(&self, lines: &[String]) -> String {
        let is_id = |part: &&str| part.len() == 64 && part.bytes().all(|b| b.is_ascii_hexdigit());
        let parts = lines.iter().flat_map(|line| line.split(['/', '-', ' ']));
        let ids: std::collections::BTreeSet<&str> = parts.filter(is_id).collect();
        let log = self.daemon.log();
        let about = |line: &&str| ids.iter().any(|id| line.contains(id));
        log.lines().filter(about).collect::<Vec<_>>().join("\n")
    }
}
