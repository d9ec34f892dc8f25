//! What a copy takes of memory, counted by the allocator: the kernel's own numbers are
//! approximate and are those of the whole process, so this test has a process of its own.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use gantry_sys::tree;
use peak_alloc::PeakAlloc;
use rustix::fs::{Mode, OFlags, open};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Directories beside each other at the end of a long path. Their paths would take 10 MiB.
const NAMES: usize = 3000;

#[test]
fn the_memory_of_a_copy_does_not_grow_with_its_paths() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP the_memory_of_a_copy_does_not_grow_with_its_paths: owners need root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let deep: PathBuf = (0..14).map(|_| "d".repeat(250)).collect();
    let leaf = from.join(deep);
    fs::create_dir_all(&leaf).unwrap();
    for n in 0..NAMES {
        fs::create_dir(leaf.join(n.to_string())).unwrap();
    }
    fs::create_dir(&to).unwrap();
    let opened = |path: &Path| open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let (from, to) = (opened(&from).unwrap(), opened(&to).unwrap());

    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    tree::copy(&from, &to, |_: &OsStr| true).unwrap();
    let most = MEMORY.peak_usage().saturating_sub(before);
    assert!(most > 0, "nothing was counted");
    assert!(most < 2 << 20, "{most} bytes for {NAMES} directories");
}
