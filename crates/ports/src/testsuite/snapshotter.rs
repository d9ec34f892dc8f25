//! What every [`Snapshotter`] must do. Needs root, because it mounts.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use gantry_types::{ContainerId, Digest};

use crate::snapshotter::{Measured, Owner, Snapshotter, Usage, Whiteouts};

fn digest(n: u8) -> Digest {
    Digest::sha256([n; 32])
}

fn container(n: u8) -> ContainerId {
    ContainerId::from_random([n; 32])
}

/// Commits a layer holding `files` (path, text) on top of `parent`.
fn layer(s: &dyn Snapshotter, chain: &Digest, parent: Option<&Digest>, files: &[(&str, &str)]) {
    let stage = s.stage(chain, parent).expect("stage");
    for (path, text) in files {
        let path = stage.dir.join(path);
        fs::create_dir_all(path.parent().expect("parent")).expect("parents");
        fs::write(path, text).expect("write");
    }
    let usage = Usage {
        bytes: 4096 * files.len() as u64,
        inodes: files.len() as u64,
    };
    let committed = s.commit(vec![(stage, usage)]).expect("commit");
    let [(committed, occupied)] = committed.as_slice() else {
        panic!("one layer was committed: {committed:?}");
    };
    assert_eq!(committed, chain);
    match s.whiteouts() {
        Whiteouts::Overlay => assert_eq!(*occupied, usage),
        // The parent's tree is in it.
        Whiteouts::Apply => assert!(occupied.inodes > usage.inodes && occupied.bytes > 0),
    }
    let kept = s.layers().expect("layers");
    assert!(kept.contains(&(chain.clone(), *occupied)), "{kept:?}");
}

/// Runs the whole suite. `open` opens the implementation under a directory; it is called again to
/// see that everything is found on the disk. `work` is an empty directory.
pub fn run(open: impl Fn(&Path) -> Box<dyn Snapshotter>, work: &Path) {
    let root = work.join("root");
    let target = work.join("target");
    fs::create_dir(&root).expect("root");
    fs::create_dir(&target).expect("target");
    let s = open(&root);
    s.clean().expect("clean of an empty root");
    layers_are_committed_once_and_found_again(s.as_ref(), &*open(&root));
    stages_are_thrown_away(s.as_ref());
    a_snapshot_is_mounted_written_and_removed(s.as_ref(), &target);
    deletions_hide_the_parent(s.as_ref(), &target);
    the_root_has_the_mode_of_the_top_layer(s.as_ref(), &target);
    an_image_without_layers_is_an_empty_root(s.as_ref(), &target);
    a_view_shows_layers_and_nobody_can_write(s.as_ref(), &target);
    volumes_are_counted_and_removed_with_the_snapshot(s.as_ref());
    removal_is_idempotent(s.as_ref());
}

fn layers_are_committed_once_and_found_again(s: &dyn Snapshotter, again: &dyn Snapshotter) {
    let (base, top) = (digest(1), digest(2));
    assert!(!s.has_layer(&base));
    let other = s
        .stage(&base, None)
        .expect("a second stage of the same chain");
    layer(
        s,
        &base,
        None,
        &[("etc/hostname", "base"), ("bin/sh", "#!")],
    );
    assert!(s.has_layer(&base));
    s.commit(vec![(other, Usage::default())])
        .expect("the layer exists already: success");
    layer(s, &top, Some(&base), &[("etc/motd", "top")]);
    for s in [s, again] {
        let mut layers = s.layers().expect("layers");
        layers.sort();
        let chains: Vec<_> = layers.into_iter().map(|(chain, _)| chain).collect();
        assert_eq!(chains, [base.clone(), top.clone()]);
    }
    let dir = s.layer_dir(&base).expect("dir of a committed layer");
    assert_eq!(
        fs::read_to_string(dir.join("etc/hostname")).expect("read"),
        "base"
    );
    assert!(s.layer_dir(&digest(99)).is_none());
}

fn stages_are_thrown_away(s: &dyn Snapshotter) {
    let stage = s.stage(&digest(3), None).expect("stage");
    let dir = stage.dir.clone();
    fs::write(dir.join("x"), "x").expect("write");
    s.abort(stage).expect("abort");
    assert!(!dir.exists() && !s.has_layer(&digest(3)));

    let left = s.stage(&digest(3), None).expect("stage").dir;
    s.clean().expect("clean");
    assert!(!left.exists());
    assert!(s.has_layer(&digest(1)), "clean keeps committed layers");
}

fn a_snapshot_is_mounted_written_and_removed(s: &dyn Snapshotter, target: &Path) {
    let id = container(1);
    let layers = [digest(1), digest(2)];
    s.prepare(&id, &layers, Owner::default()).expect("prepare");
    s.prepare(&id, &layers, Owner::default())
        .expect("prepare is idempotent");
    assert_eq!(s.snapshots().expect("snapshots"), std::slice::from_ref(&id));
    s.mount(&id, &layers, target, Owner::default())
        .expect("mount");
    s.mount(&id, &layers, target, Owner::default())
        .expect("mount is idempotent");
    assert_eq!(
        fs::read_to_string(target.join("etc/hostname")).expect("base"),
        "base"
    );
    assert_eq!(
        fs::read_to_string(target.join("etc/motd")).expect("top"),
        "top"
    );

    let before = usage(s, &id);
    fs::write(target.join("big"), vec![7; 100_000]).expect("write");
    let after = usage(s, &id);
    assert!(after.bytes >= before.bytes + 100_000 && after.inodes > before.inodes);
    fs::remove_file(target.join("etc/motd")).expect("remove");
    s.unmount(target).expect("unmount");
    s.unmount(target).expect("unmount is idempotent");
    assert!(!target.join("etc").exists());

    s.mount(&id, &layers, target, Owner::default())
        .expect("mount again");
    assert!(target.join("big").exists() && !target.join("etc/motd").exists());
    s.unmount(target).expect("unmount");
    s.remove(&id).expect("remove");
    assert!(s.snapshots().expect("snapshots").is_empty());
    let top = s.layer_dir(&digest(2)).expect("layer");
    assert!(
        top.join("etc/motd").exists(),
        "a container never writes to a layer"
    );
}

fn deletions_hide_the_parent(s: &dyn Snapshotter, target: &Path) {
    // How a deletion is written is the unpacker's part; here only that a stage of an
    // implementation which applies deletions starts as a copy of its parent.
    if s.whiteouts() == Whiteouts::Apply {
        let stage = s.stage(&digest(4), Some(&digest(1))).expect("stage");
        assert!(stage.dir.join("etc/hostname").exists());
        fs::remove_file(stage.dir.join("etc/hostname")).expect("remove");
        s.commit(vec![(stage, Usage::default())]).expect("commit");
        let id = container(2);
        let layers = [digest(1), digest(4)];
        s.prepare(&id, &layers, Owner::default()).expect("prepare");
        s.mount(&id, &layers, target, Owner::default())
            .expect("mount");
        assert!(!target.join("etc/hostname").exists());
        s.unmount(target).expect("unmount");
        s.remove(&id).expect("remove");
    }
}

fn the_root_has_the_mode_of_the_top_layer(s: &dyn Snapshotter, target: &Path) {
    let chain = digest(5);
    let stage = s.stage(&chain, None).expect("stage");
    let mode = |path: &Path| fs::metadata(path).expect("stat").permissions().mode() & 0o7777;
    assert_eq!(
        mode(&stage.dir),
        0o755,
        "a staged root starts as 0755 whatever the umask"
    );
    fs::set_permissions(&stage.dir, fs::Permissions::from_mode(0o1777)).expect("chmod");
    std::os::unix::fs::chown(&stage.dir, Some(1234), Some(4321)).expect("chown");
    s.commit(vec![(stage, Usage::default())]).expect("commit");
    let id = container(3);
    s.prepare(&id, std::slice::from_ref(&chain), Owner::default())
        .expect("prepare");
    s.mount(&id, std::slice::from_ref(&chain), target, Owner::default())
        .expect("mount of a single layer");
    let root = fs::metadata(target).expect("stat");
    assert_eq!((mode(target), root.uid(), root.gid()), (0o1777, 1234, 4321));
    s.unmount(target).expect("unmount");
    s.remove(&id).expect("remove");
}

fn an_image_without_layers_is_an_empty_root(s: &dyn Snapshotter, target: &Path) {
    let id = container(4);
    s.prepare(&id, &[], Owner::default()).expect("prepare");
    s.mount(&id, &[], target, Owner::default()).expect("mount");
    assert_eq!(fs::read_dir(target).expect("read").count(), 0);
    fs::write(target.join("x"), "x").expect("writable");
    s.unmount(target).expect("unmount");
    assert!(!target.join("x").exists());
    s.remove(&id).expect("remove");
}

fn a_view_shows_layers_and_nobody_can_write(s: &dyn Snapshotter, target: &Path) {
    let (base, top) = (digest(1), digest(2));
    for (layers, names) in [
        (vec![base.clone(), top], vec!["bin", "etc"]),
        (vec![base], vec!["bin", "etc"]),
        (Vec::new(), Vec::new()),
    ] {
        s.view(&layers, target, Owner::default()).expect("view");
        s.view(&layers, target, Owner::default())
            .expect("view is idempotent");
        let mut found: Vec<_> = fs::read_dir(target)
            .expect("read")
            .map(|entry| entry.expect("entry").file_name())
            .collect();
        found.sort();
        assert_eq!(found, names);
        let motd = target.join("etc/motd").exists();
        assert_eq!(motd, layers.len() == 2, "the top layer's file");
        let written = fs::write(target.join("new"), "x").expect_err("nobody writes");
        assert_eq!(written.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        // A process with every capability takes the flag off its own mount of it.
        let remounted = std::process::Command::new("mount")
            .args(["-o", "remount,bind,rw"])
            .arg(target)
            .output()
            .expect("mount(8)");
        if remounted.status.success() {
            let _ = fs::write(target.join("new"), "x");
            let _ = fs::remove_dir_all(target.join("etc"));
        }
        for layer in &layers {
            let dir = s.layer_dir(layer).expect("layer");
            assert!(dir.join("etc").exists() && !dir.join("new").exists());
        }
        s.unmount(target).expect("unmount");
        assert_eq!(fs::read_dir(target).expect("read").count(), 0);
    }
    assert!(
        s.view(&[digest(99)], target, Owner::default()).is_err(),
        "an absent layer"
    );
    assert!(s.snapshots().expect("snapshots").is_empty());
}

fn volumes_are_counted_and_removed_with_the_snapshot(s: &dyn Snapshotter) {
    let id = container(5);
    assert!(s.volumes(&id).is_err(), "no snapshot");
    s.prepare(&id, &[digest(1)], Owner::default())
        .expect("prepare");
    let before = usage(s, &id);
    let dir = s.volumes(&id).expect("volumes");
    assert_eq!(s.volumes(&id).expect("again"), dir);
    fs::write(dir.join("big"), vec![7; 100_000]).expect("write");
    let after = usage(s, &id);
    assert!(after.bytes >= before.bytes + 100_000 && after.inodes >= before.inodes + 2);
    s.remove(&id).expect("remove");
    assert!(!dir.exists());
}

fn usage(s: &dyn Snapshotter, id: &ContainerId) -> Usage {
    match s.usage(id).expect("usage") {
        Measured::Whole(usage) => usage,
        Measured::AtLeast(_, error) => panic!("{error}"),
    }
}

fn removal_is_idempotent(s: &dyn Snapshotter) {
    s.remove(&container(9)).expect("absent snapshot");
    s.remove_layer(&digest(99)).expect("absent layer");
    for (chain, _) in s.layers().expect("layers") {
        s.remove_layer(&chain).expect("remove");
        assert!(!s.has_layer(&chain));
    }
    assert!(s.layers().expect("layers").is_empty());
    s.purge().expect("purge");
    s.purge().expect("purge of nothing");
}
