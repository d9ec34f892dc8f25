//! A workload, and cuts of its disk.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use gantry_integration::{Node, on_node};
use gantry_testkit::daemon::Options;

use crate::check::{self, Report};
use crate::disk::{Disk, Entry};
use crate::filesystem::{self, Kind};
use crate::history::History;
use crate::medium::{Fate, Medium};
use crate::workload::{self, Images};

/// What to do. The same plan makes the same images, the same requests and cuts at the same places
/// in proportion to the log; what falls together in the log is the machine's own.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub cuts: usize,
    /// How long the workload works.
    pub time: Duration,
    pub kind: Kind,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    pub cuts: usize,
    /// Writes and flushes that the disk saw.
    pub writes: usize,
    pub flushes: usize,
    /// Changes that were acknowledged in the workload.
    pub changes: usize,
    /// Acknowledged changes of which the outcome was looked at, summed over the cuts.
    pub acknowledged: usize,
    /// Stores that would not open.
    pub set_aside: usize,
    pub longest_start: Duration,
    /// What was wrong, with the cut at which.
    pub faults: Vec<String>,
}

/// Why nothing can be cut here; `None` when it can.
pub fn unable(kind: Kind) -> Option<String> {
    if let Some(reason) = gantry_testkit::daemon::unable() {
        return Some(reason);
    }
    for (device, module) in [("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")] {
        let there = || Path::new(device).exists();
        // It may come with its module.
        let there = there() || (filesystem::modprobe(module) && there());
        if !there {
            return Some(format!("no {device}"));
        }
    }
    if let Err(error) = std::fs::File::open("/dev/fuse") {
        return Some(format!("/dev/fuse: {error}"));
    }
    kind.unable()
}

/// Does it; `name` names the test. Not to be called on a machine that is [`unable`] to.
pub fn run(name: &str, plan: &Plan) -> Result<Outcome> {
    let dir = tempfile::Builder::new()
        .prefix("gantry-powercut-")
        .tempdir_in("/var/tmp")?;
    let (medium, point) = (dir.path().join("medium"), dir.path().join("disk"));
    std::fs::create_dir(&point)?;
    plan.kind.format(&medium)?;
    let disk = Disk::serve(&medium)?;
    let mounted = plan.kind.mount(&disk.file(), &point)?;
    let options = Options {
        disk: Some(point.clone()),
        ..Options::default()
    };
    let mut outcome = None;
    on_node(name, options, async |node| {
        let history = History::new(disk.log());
        outcome = Some(on(node, plan, &history, disk, mounted, &medium, &point).await);
        // Whatever state it was left in.
        if let Err(error) = node.daemon.power_cut() {
            println!("clean-up: {error}");
        }
    });
    outcome.context("no node")?
}

async fn on(
    node: &mut Node,
    plan: &Plan,
    history: &History,
    disk: Disk,
    mounted: filesystem::Mounted,
    medium: &Path,
    point: &Path,
) -> Result<Outcome> {
    let mut random = fastrand::Rng::with_seed(plan.seed);
    let images = Images::make(node, &mut random)?;
    let empty = node.daemon.snapshot();
    workload::run(node, &images, history, plan.time, &mut random).await?;
    // The last cuts are at the end of the log: from now on nothing that is written counts.
    let log = disk.log().clone();
    let entries = log.entries();
    let count = |wanted: fn(&Entry) -> bool| entries.iter().filter(|entry| wanted(entry)).count();
    let mut outcome = Outcome {
        writes: count(|entry| matches!(entry, Entry::Write { .. })),
        flushes: count(|entry| *entry == Entry::Flush),
        changes: history.expected(entries.len()).acknowledged,
        ..Outcome::default()
    };
    let mut medium = Medium::new(&log, medium);
    node.daemon.power_cut()?;
    drop(mounted);
    drop(disk);
    // Without that nothing here would tell a disk that is flushed from one that is not.
    ensure!(outcome.flushes > 0, "the disk saw no flush");
    for operation in history.unflushed() {
        outcome
            .faults
            .push(format!("acknowledged without a flush: {operation:?}"));
    }
    let mut places: Vec<usize> = (0..plan.cuts)
        .map(|_| place(&entries, &mut random))
        .collect();
    places.sort_unstable();
    for (number, place) in places.into_iter().enumerate() {
        let fate = Fate::any(&mut random);
        let image = point.with_extension(format!("cut-{number}"));
        let at_stake = medium.cut(place, fate, &mut random, &image)?;
        let expected = history.expected(place);
        let what = format!(
            "cut {number} of seed {} at {place} of {}, {at_stake} writes at stake, {fate:?}",
            plan.seed,
            entries.len(),
        );
        let checked = boot(node, plan.kind, &image, point, number, async |node| {
            check::after(node, &images, &expected, &empty, &mut random).await
        });
        let report = checked.await.with_context(|| what.clone())?;
        println!(
            "{what}: {} acknowledged, up after {} ms, {} faults{}",
            report.acknowledged,
            report.start.as_millis(),
            report.faults.len(),
            if report.set_aside {
                ", store set aside"
            } else {
                ""
            },
        );
        outcome.add(&what, report);
        std::fs::remove_file(&image)?;
    }
    Ok(outcome)
}

/// Where to cut: anywhere, or where the most is at stake, which is just before a flush.
fn place(entries: &[Entry], random: &mut fastrand::Rng) -> usize {
    let place = random.usize(..=entries.len());
    if random.bool() {
        return place;
    }
    let until_flush = entries[place..]
        .iter()
        .position(|entry| *entry == Entry::Flush);
    place + until_flush.unwrap_or(0)
}

/// Mounts a disk where the last one was, and lets `check` start a gantryd in a boot of its own.
async fn boot(
    node: &mut Node,
    kind: Kind,
    image: &Path,
    point: &Path,
    number: usize,
    check: impl AsyncFnOnce(&mut Node) -> Report,
) -> Result<Report> {
    // The journal is replayed here.
    let mounted = kind.mount(image, point)?;
    let places = node.daemon.places().clone();
    // Their parent, of the machine's installation, is always there.
    for dir in [&places.root, &places.ipam_dir] {
        std::fs::create_dir_all(dir)?;
    }
    node.daemon
        .set_boot_id(&format!("00000000-0000-4000-8000-{number:012x}"))?;
    let report = check(node).await;
    node.daemon.power_cut()?;
    drop(mounted);
    Ok(report)
}

impl Outcome {
    fn add(&mut self, what: &str, report: Report) {
        self.cuts += 1;
        self.acknowledged += report.acknowledged;
        self.set_aside += usize::from(report.set_aside);
        self.longest_start = self.longest_start.max(report.start);
        for fault in report.faults {
            println!("FAULT {fault}");
            self.faults.push(format!("{what}: {fault}"));
        }
    }

    /// Sums up with what came of another plan.
    pub fn merge(&mut self, other: Outcome) {
        self.cuts += other.cuts;
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.changes += other.changes;
        self.acknowledged += other.acknowledged;
        self.set_aside += other.set_aside;
        self.longest_start = self.longest_start.max(other.longest_start);
        self.faults.extend(other.faults);
    }
}
