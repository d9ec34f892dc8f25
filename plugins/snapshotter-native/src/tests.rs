use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use gantry_ports::snapshotter::{Ids, UserNamespace};

use super::*;

fn not_root(name: &str) -> bool {
    let not_root = !rustix::process::geteuid().is_root();
    if not_root {
        println!("SKIP {name}: mounting and changing owners need root");
    }
    not_root
}

fn digest(n: u8) -> Digest {
    Digest::sha256([n; 32])
}

/// A committed layer with what `write` puts into it.
fn layer(s: &Native, n: u8, parent: Option<&Digest>, write: impl FnOnce(&Path)) -> Digest {
    let stage = s.stage(&digest(n), parent).unwrap();
    write(&stage.dir);
    s.commit(vec![(stage, Usage::default())]).unwrap();
    digest(n)
}

#[test]
fn native_keeps_the_contract() {
    if not_root("native_keeps_the_contract") {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    gantry_ports::testsuite::snapshotter::run(
        |root| Box::new(Native::open(root).unwrap()),
        work.path(),
    );
}

/// What overlayfs refuses: its own file system below it.
#[test]
fn native_keeps_the_contract_on_overlayfs() {
    const NAME: &str = "native_keeps_the_contract_on_overlayfs";
    if not_root(NAME) {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    for dir in ["lower", "upper", "work", "merged"] {
        fs::create_dir(work.path().join(dir)).unwrap();
    }
    let at = |name: &str| work.path().join(name).display().to_string();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        at("lower"),
        at("upper"),
        at("work")
    );
    let mounted = std::process::Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &options, &at("merged")])
        .output()
        .unwrap();
    if !mounted.status.success() {
        println!("SKIP {NAME}: no overlayfs to test on");
        return;
    }
    let merged = work.path().join("merged");
    let ran = std::panic::catch_unwind(|| {
        gantry_ports::testsuite::snapshotter::run(
            |root| Box::new(Native::open(root).unwrap()),
            &merged,
        );
    });
    mounts::unmount(&merged).unwrap();
    ran.unwrap();
}

#[test]
fn a_copy_belongs_to_the_ids_of_the_user_namespace() {
    if not_root("a_copy_belongs_to_the_ids_of_the_user_namespace") {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let s = Native::open(work.path()).unwrap();
    let chain = layer(&s, 1, None, |dir| {
        fs::write(dir.join("of-root"), "").unwrap();
        fs::set_permissions(dir.join("of-root"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::write(dir.join("of-web"), "").unwrap();
        chown(dir.join("of-web"), Some(33), Some(34)).unwrap();
        fs::write(dir.join("of-nobody-here"), "").unwrap();
        chown(dir.join("of-nobody-here"), Some(70_000), Some(5)).unwrap();
        // Its number is a user's of the host, who would run it as himself.
        fs::write(dir.join("of-another"), "").unwrap();
        chown(dir.join("of-another"), Some(300_000), Some(400_000)).unwrap();
        fs::set_permissions(dir.join("of-another"), fs::Permissions::from_mode(0o6755)).unwrap();
    });
    let owner = Owner {
        user_namespace: Some(UserNamespace {
            path: Path::new("/proc/self/ns/user"),
            uids: Ids {
                first: 300_000,
                length: 65_536,
            },
            gids: Ids {
                first: 400_000,
                length: 65_536,
            },
        }),
        label: None,
    };
    let (id, target) = ("ab".repeat(32).parse().unwrap(), work.path().join("target"));
    fs::create_dir(&target).unwrap();
    let layers = [chain.clone()];
    s.prepare(&id, &layers, owner).unwrap();
    s.mount(&id, &layers, &target, owner).unwrap();
    let of = |name: &str| {
        let meta = fs::metadata(target.join(name)).unwrap();
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    };
    let seen = [
        of("."),
        of("of-root"),
        of("of-web"),
        of("of-nobody-here"),
        of("of-another"),
    ];
    s.unmount(&target).unwrap();
    let nobody = |name: &str| -> u32 {
        let text = fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap();
        text.trim().parse().unwrap()
    };
    assert_eq!(
        seen,
        [
            (300_000, 400_000, 0o755),
            (300_000, 400_000, 0o4755),
            (300_033, 400_034, 0o644),
            (nobody("overflowuid"), 400_005, 0o644),
            (nobody("overflowuid"), nobody("overflowgid"), 0o6755),
        ]
    );
    s.view(&layers, &target, owner).unwrap();
    let viewed = fs::metadata(target.join("of-web")).unwrap().uid();
    s.unmount(&target).unwrap();
    assert_eq!(viewed, 300_033);
    let original = s.layer_dir(&chain).unwrap().join("of-web");
    assert_eq!(fs::metadata(original).unwrap().uid(), 33);
}

#[test]
fn a_copy_has_the_label_that_is_asked_for() {
    if not_root("a_copy_has_the_label_that_is_asked_for") {
        return;
    }
    const LABEL: &str = "system_u:object_r:container_file_t:s0:c1,c2";
    let work = tempfile::tempdir().unwrap();
    let s = Native::open(work.path()).unwrap();
    let chain = layer(&s, 1, None, |dir| fs::write(dir.join("file"), "").unwrap());
    let owner = Owner {
        label: Some(LABEL),
        ..Owner::default()
    };
    let id = "ab".repeat(32).parse().unwrap();
    s.prepare(&id, &[chain], owner).unwrap();
    let file = fs::File::open(s.layout.snapshot(&id).join("fs/file")).unwrap();
    let context = gantry_sys::fs::get_xattr(&file, "security.selinux".as_ref()).unwrap();
    assert_eq!(context.unwrap(), [LABEL.as_bytes(), b"\0"].concat());
}

#[test]
fn views_without_a_mount_are_deleted_at_start_and_others_stay() {
    if not_root("views_without_a_mount_are_deleted_at_start_and_others_stay") {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let s = Native::open(work.path()).unwrap();
    let chain = layer(&s, 1, None, |dir| fs::write(dir.join("file"), "x").unwrap());
    let target = |name: &str| {
        let target = work.path().join(name);
        fs::create_dir(&target).unwrap();
        target
    };
    let (kept, lost) = (target("kept"), target("lost"));
    let views = || fs::read_dir(s.layout.root().join("views")).unwrap().count();
    for target in [&kept, &lost] {
        s.view(std::slice::from_ref(&chain), target, Owner::default())
            .unwrap();
    }
    // The mount of one goes, as with a reboot.
    mounts::unmount(&lost).unwrap();
    assert_eq!(views(), 2);
    let again = Native::open(work.path()).unwrap();
    again.clean().unwrap();
    let read = fs::read_to_string(kept.join("file"));
    assert_eq!(views(), 1);
    // And another beside the one that an earlier daemon made.
    again
        .view(std::slice::from_ref(&chain), &lost, Owner::default())
        .unwrap();
    assert_eq!(views(), 2);
    for target in [&kept, &lost] {
        again.unmount(target).unwrap();
    }
    assert_eq!(read.unwrap(), "x");
    assert_eq!(views(), 0);
}

#[test]
fn a_layer_counts_with_what_is_below_it() {
    if not_root("a_layer_counts_with_what_is_below_it") {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let s = Native::open(work.path()).unwrap();
    let base = layer(&s, 1, None, |dir| {
        fs::write(dir.join("big"), vec![7; 100_000]).unwrap();
    });
    let top = layer(&s, 2, Some(&base), |dir| {
        fs::write(dir.join("small"), "x").unwrap();
    });
    let layers = s.layers().unwrap();
    let of = |chain: &Digest| layers.iter().find(|(own, _)| own == chain).unwrap().1;
    assert!(of(&base).bytes >= 100_000 && of(&top).bytes > of(&base).bytes);
    assert_eq!((of(&base).inodes, of(&top).inodes), (2, 3));
    assert!(s.stage(&digest(3), Some(&digest(99))).is_err());
    assert_eq!(
        fs::read_dir(s.layout.root().join("stages"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn native_keeps_the_contract_on_two_file_systems() {
    const NAME: &str = "native_keeps_the_contract_on_two_file_systems";
    if not_root(NAME) {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir_in("/dev/shm").unwrap();
    gantry_ports::testsuite::snapshotter::run(
        |root| Box::new(Native::open_split(other.path(), root).unwrap()),
        work.path(),
    );
    assert!(!work.path().join("root/native/layers").exists());
}
