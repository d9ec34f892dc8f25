//! The power goes in the middle of everything, twelve times; and what makes that worth anything:
//! that the disk below loses what was not flushed.

use std::time::Duration;

use gantry_powercut::disk::{Disk, Entry};
use gantry_powercut::filesystem::Kind;
use gantry_powercut::medium::{Fate, Medium};
use gantry_powercut::run::{self, Plan};

#[test]
fn power_cuts_during_pulls_and_pod_churn_lose_nothing() {
    const NAME: &str = "power_cuts_during_pulls_and_pod_churn_lose_nothing";
    let plan = Plan {
        seed: 1,
        cuts: 12,
        time: Duration::from_secs(6),
        kind: Kind::Ext4,
    };
    if let Some(reason) = run::unable(plan.kind) {
        println!("SKIP {NAME}: {reason}");
        return;
    }
    let outcome = run::run(NAME, &plan).unwrap();
    assert!(outcome.faults.is_empty(), "{:#?}", outcome.faults);
    assert_eq!(outcome.cuts, plan.cuts);
    // A workload that never got anywhere would prove nothing.
    assert!(
        outcome.changes > 10 && outcome.acknowledged > 10,
        "{outcome:?}"
    );
}

#[test]
fn a_disk_keeps_what_was_flushed_and_loses_the_rest() {
    const NAME: &str = "a_disk_keeps_what_was_flushed_and_loses_the_rest";
    let kind = Kind::Ext4;
    if let Some(reason) = run::unable(kind) {
        println!("SKIP {NAME}: {reason}");
        return;
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (medium, point) = (dir.path().join("medium"), dir.path().join("mounted"));
    std::fs::create_dir(&point).unwrap();
    kind.format(&medium).unwrap();
    let disk = Disk::serve(&medium).unwrap();
    let log = disk.log().clone();
    let mounted = kind.mount(&disk.file(), &point).unwrap();
    let content = b"neither zeros nor anything that a file system writes by itself".repeat(1000);
    let file = |name: &str| std::fs::write(point.join(name), &content).unwrap();
    let sync = |name: &str| std::fs::File::open(point.join(name)).unwrap().sync_all();

    file("synced");
    let begin = log.len();
    sync("synced").unwrap();
    sync(".").unwrap();
    // All of it came to the disk before the calls returned, and was flushed there.
    let entries = log.entries()[begin..].to_vec();
    let arrived = entries.iter().position(|entry| match *entry {
        Entry::Write { length, at, .. } => log
            .data(at, length)
            .unwrap()
            .starts_with(&content[..4096.min(length as usize)]),
        _ => false,
    });
    let flushed = entries.iter().rposition(|entry| *entry == Entry::Flush);
    assert!(arrived.is_some() && arrived < flushed, "{entries:?}");

    let at_synced = log.len();
    file("not-synced");
    std::fs::rename(point.join("synced"), point.join("renamed")).unwrap();
    let at_not_synced = log.len();
    sync(".").unwrap();
    let at_renamed = log.len();
    drop((mounted, disk));

    let mut random = fastrand::Rng::with_seed(1);
    let mut medium = Medium::new(&log, &medium);
    for (cut, expected) in [
        (at_synced, "synced"),
        (at_not_synced, "synced"),
        (at_renamed, "renamed"),
    ] {
        for fate in [Fate::None, Fate::Torn(0.5)] {
            let image = dir.path().join("cut");
            medium.cut(cut, fate, &mut random, &image).unwrap();
            let mounted = kind.mount(&image, &point).unwrap();
            let read = std::fs::read(point.join(expected)).unwrap();
            assert!(read == content, "{expected} at {cut}, {fate:?}");
            // At most its name.
            let other = std::fs::read(point.join("not-synced")).unwrap_or_default();
            assert!(other.is_empty(), "{} bytes came by themselves", other.len());
            drop(mounted);
            std::fs::remove_file(&image).unwrap();
        }
    }
}
