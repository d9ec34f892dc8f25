//! The tar corpus: everything that a hostile or an odd layer may hold.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use gantry_ports::snapshotter::Whiteouts;
use gantry_testkit::image::Layer;
use gantry_types::{ErrorKind, Kind as _};

use super::super::{Limits, Unpacked, apply, settle, xattr};
use crate::Error;

fn not_root(name: &str) -> bool {
    let not_root = !rustix::process::geteuid().is_root();
    if not_root {
        println!("SKIP {name}: unpacking sets owners and makes devices, which needs root");
    }
    not_root
}

/// A directory with a canary beside the layer's root, which no layer may touch.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::create_dir(dir.path().join("canary")).unwrap();
        fs::write(dir.path().join("canary/secret"), "untouched").unwrap();
        fs::set_permissions(
            dir.path().join("canary/secret"),
            fs::Permissions::from_mode(0o640),
        )
        .unwrap();
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn meta(&self, name: &str) -> fs::Metadata {
        fs::symlink_metadata(self.path(name)).unwrap()
    }

    fn exists(&self, name: &str) -> bool {
        fs::symlink_metadata(self.path(name)).is_ok()
    }

    fn apply(&self, layer: &Layer) -> Result<Unpacked, Error> {
        self.apply_as(&layer.tar(), Whiteouts::Overlay, &Limits::default())
    }

    fn apply_as(
        &self,
        tar: &[u8],
        whiteouts: Whiteouts,
        limits: &Limits,
    ) -> Result<Unpacked, Error> {
        let result = apply(&mut { tar }, &self.root(), whiteouts, limits);
        self.assert_canary();
        result
    }

    fn assert_canary(&self) {
        let canary = self.dir.path().join("canary");
        assert_eq!(
            fs::read_to_string(canary.join("secret")).unwrap(),
            "untouched"
        );
        assert_eq!(fs::read_dir(&canary).unwrap().count(), 1);
        let meta = fs::metadata(canary.join("secret")).unwrap();
        assert_eq!(
            (meta.mode() & 0o7777, meta.nlink(), meta.uid()),
            (0o640, 1, 0)
        );
        assert_eq!(
            fs::read_dir(self.dir.path()).unwrap().count(),
            2,
            "nothing beside the root"
        );
    }
}

fn whiteout(meta: &fs::Metadata) -> bool {
    meta.file_type().is_char_device() && meta.rdev() == 0
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let dir = gantry_sys::fs::open_root(path.parent().unwrap()).unwrap();
    let flags = gantry_sys::fs::OFlags::PATH;
    let file = gantry_sys::fs::open_nofollow(&dir, path.file_name().unwrap(), flags, 0).unwrap();
    gantry_sys::fs::get_xattr(&file, name.as_ref()).unwrap()
}

fn opaque(path: &Path) -> bool {
    attribute(path, "trusted.overlay.opaque").as_deref() == Some(b"y")
}

#[test]
fn kinds_modes_owners_and_times_are_exact() {
    if not_root("kinds_modes_owners_and_times_are_exact") {
        return;
    }
    let bench = Bench::new();
    let mut owned = Layer::header(tar::EntryType::Regular, 0o4755, 3);
    owned.set_uid(1000);
    owned.set_gid(2000);
    let layer = Layer::new()
        .dir("./", 0o711)
        .dir("d", 0o1777)
        .raw(owned, b"d/setuid", b"", b"abc")
        .symlink("d/link", "/nowhere")
        .hardlink("d/second", "d/setuid")
        .fifo("d/fifo")
        .device("d/null", tar::EntryType::Char, 1, 3)
        .device("d/disk", tar::EntryType::Block, 8, 0)
        .file("d/last", b"");
    let unpacked = bench.apply(&layer).unwrap();
    assert_eq!(bench.meta("").mode() & 0o7777, 0o711);
    let meta = bench.meta("d/setuid");
    assert_eq!(
        (
            meta.mode() & 0o7777,
            meta.uid(),
            meta.gid(),
            meta.nlink(),
            meta.mtime()
        ),
        (0o4755, 1000, 2000, 2, 1_700_000_000)
    );
    assert_eq!(bench.read("d/second"), "abc");
    assert_eq!(bench.meta("d").mode() & 0o7777, 0o1777);
    assert_eq!(
        bench.meta("d").mtime(),
        1_700_000_000,
        "children do not change its time"
    );
    assert_eq!(bench.meta("").mtime(), 1_700_000_000);
    assert_eq!(bench.meta("d/link").mtime(), 1_700_000_000);
    assert!(bench.meta("d/fifo").file_type().is_fifo());
    let null = bench.meta("d/null");
    assert!(null.file_type().is_char_device());
    assert_eq!((null.rdev(), null.mode() & 0o7777), (0x103, 0o600));
    assert!(bench.meta("d/disk").file_type().is_block_device());
    // d, setuid, link, fifo, null, disk, last: a hard link is no inode, the root is there before.
    assert_eq!((unpacked.usage.inodes, unpacked.usage.bytes), (7, 4096));
    assert!(unpacked.implicit.is_empty());
}

#[test]
fn names_that_lead_out_are_refused() {
    if not_root("names_that_lead_out_are_refused") {
        return;
    }
    for path in [
        "../canary/secret",
        "a/../../canary/x",
        "a/..",
        "..",
        "./../x",
        "/../canary/x",
    ] {
        let error = Bench::new()
            .apply(&Layer::new().file(path, b"bad"))
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains(".."), "{error}");
    }
    let bench = Bench::new();
    bench
        .apply(&Layer::new().file("/abs/file", b"inside"))
        .unwrap();
    assert_eq!(
        bench.read("abs/file"),
        "inside",
        "an absolute name is below the root"
    );
}

#[test]
fn links_lead_nowhere_but_into_the_layer() {
    if not_root("links_lead_nowhere_but_into_the_layer") {
        return;
    }
    let canary = |bench: &Bench| bench.dir.path().join("canary").to_str().unwrap().to_owned();

    // a -> / then a/x: inside the layer's own root.
    let bench = Bench::new();
    bench
        .apply(&Layer::new().symlink("a", "/").file("a/x", b"in"))
        .unwrap();
    assert_eq!(bench.read("x"), "in");

    let bench = Bench::new();
    bench
        .apply(&Layer::new().symlink("a", "../../../..").file("a/x", b"in"))
        .unwrap();
    assert_eq!(bench.read("x"), "in");

    // A link to a host directory by its full name: that name does not exist in the layer.
    let bench = Bench::new();
    let layer = Layer::new()
        .symlink("a", &canary(&bench))
        .file("a/secret", b"bad");
    assert!(bench.apply(&layer).is_err());

    // chmod, chown and truncation of an existing link's target (CVE-2021-32760).
    for layer in [
        Layer::new().file_mode("a", b"new", 0o777),
        Layer::new().dir("a", 0o777),
        Layer::new().fifo("a"),
        Layer::new().device("a", tar::EntryType::Char, 1, 3),
        Layer::new().symlink("a", "b"),
    ] {
        let bench = Bench::new();
        let secret = format!("{}/secret", canary(&bench));
        let mut tar = Layer::new().symlink("a", &secret).tar();
        tar.truncate(tar.len() - 1024);
        tar.extend_from_slice(&layer.tar());
        bench
            .apply_as(&tar, Whiteouts::Overlay, &Limits::default())
            .unwrap();
        assert!(
            fs::read_link(bench.path("a")).ok() != Some(secret.into()),
            "replaced"
        );
    }

    // A loop, and a chain through a link of a link.
    let bench = Bench::new();
    assert!(
        bench
            .apply(&Layer::new().symlink("l", "l").file("l/x", b""))
            .is_err()
    );
    let bench = Bench::new();
    let layer = Layer::new()
        .dir("real", 0o755)
        .symlink("one", "real")
        .symlink("two", "/one")
        .file("two/x", b"in");
    bench.apply(&layer).unwrap();
    assert_eq!(bench.read("real/x"), "in");
}

#[test]
fn hard_links_stay_in_the_layer() {
    if not_root("hard_links_stay_in_the_layer") {
        return;
    }
    let outside = Bench::new();
    let secret = outside
        .dir
        .path()
        .join("canary/secret")
        .to_str()
        .unwrap()
        .to_owned();
    for target in [
        "/etc/shadow",
        "../canary/secret",
        &secret,
        "",
        "missing",
        ".",
    ] {
        let bench = Bench::new();
        let error = bench
            .apply(&Layer::new().hardlink("x", target))
            .unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::InvalidArgument,
            "{target}: {error}"
        );
        assert!(!bench.exists("x"));
    }
    outside.assert_canary();
    // To an earlier symbolic link: a second name of the link, not of what it points to.
    let bench = Bench::new();
    let layer = Layer::new()
        .symlink("l", &secret)
        .hardlink("x", "l")
        .file("x", b"replaced");
    bench.apply(&layer).unwrap();
    assert_eq!(bench.read("x"), "replaced");
    outside.assert_canary();
    let through = Layer::new().symlink("l", outside.dir.path().to_str().unwrap());
    assert!(
        Bench::new()
            .apply(&through.hardlink("x", "l/canary/secret"))
            .is_err()
    );
    assert!(
        Bench::new()
            .apply(&Layer::new().dir("d", 0o755).hardlink("x", "d"))
            .is_err()
    );
    // To itself: nothing happens.
    let bench = Bench::new();
    bench
        .apply(
            &Layer::new()
                .file("f", b"x")
                .hardlink("f", "f")
                .hardlink("g", "/f"),
        )
        .unwrap();
    assert_eq!(
        (bench.read("f"), bench.meta("f").nlink()),
        ("x".to_owned(), 2)
    );
}

#[test]
fn the_root_entry_must_be_a_directory() {
    if not_root("the_root_entry_must_be_a_directory") {
        return;
    }
    for path in [".", "./", "/", ""] {
        for layer in [
            Layer::new().symlink(path, "/etc"),
            Layer::new().file(path, b"x"),
            Layer::new().hardlink(path, "x"),
        ] {
            assert!(Bench::new().apply(&layer).is_err(), "{path:?}");
        }
    }
}

#[test]
fn later_entries_replace_earlier_ones() {
    if not_root("later_entries_replace_earlier_ones") {
        return;
    }
    let bench = Bench::new();
    let layer = Layer::new()
        .dir("a", 0o755)
        .file("a/b/c", b"deep")
        .file("a", b"now a file")
        .file("f", b"one")
        .file("f", b"two")
        .dir("d", 0o700)
        .file("d/kept", b"kept")
        .dir("d", 0o750)
        .symlink("d2", "d")
        .dir("d2", 0o711)
        .file("d2/own", b"own");
    bench.apply(&layer).unwrap();
    assert_eq!(
        (bench.read("a").as_str(), bench.read("f").as_str()),
        ("now a file", "two")
    );
    assert_eq!(bench.meta("d").mode() & 0o7777, 0o750);
    assert_eq!(
        bench.read("d/kept"),
        "kept",
        "a repeated directory keeps its content"
    );
    assert!(bench.meta("d2").is_dir() && !bench.exists("d/own"));
}

#[test]
fn whiteouts_are_written_as_overlayfs_reads_them() {
    if not_root("whiteouts_are_written_as_overlayfs_reads_them") {
        return;
    }
    let bench = Bench::new();
    let layer = Layer::new()
        .whiteout("gone")
        .whiteout("etc/passwd")
        .opaque("hidden")
        .opaque("hidden")
        .file("hidden/new", b"new")
        // Both the deletion of the old directory and a new one, in either order.
        .whiteout("before")
        .file("before/f", b"")
        .dir("after", 0o755)
        .whiteout("after")
        .whiteout("entry")
        .dir("entry", 0o700)
        // A file hides what is below by itself.
        .file("file", b"x")
        .whiteout("file")
        .file(".wh..wh.plnk", b"")
        .whiteout("twice")
        .whiteout("twice");
    bench.apply(&layer).unwrap();
    for name in ["gone", "etc/passwd", "twice"] {
        assert!(whiteout(&bench.meta(name)), "{name}");
    }
    for name in ["hidden", "before", "after", "entry"] {
        assert!(opaque(&bench.path(name)), "{name}");
    }
    assert!(!opaque(&bench.path("etc")));
    assert_eq!(bench.read("file"), "x");
    assert!(!bench.exists(".wh..wh.plnk") && !bench.exists("hidden/.wh..wh..opq"));
    assert_eq!(bench.meta("entry").mode() & 0o7777, 0o700);
}

#[test]
fn odd_whiteouts_are_refused() {
    if not_root("odd_whiteouts_are_refused") {
        return;
    }
    for path in [".wh.", ".wh..", ".wh...", "d/.wh.", "d/.wh..", "d/.wh..."] {
        let error = Bench::new()
            .apply(&Layer::new().file(path, b""))
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{path}");
    }
    // Through a link to a host directory.
    let bench = Bench::new();
    let canary = bench.dir.path().join("canary");
    let layer = Layer::new().symlink("l", canary.to_str().unwrap());
    assert!(bench.apply(&layer.clone().whiteout("l/secret")).is_err());
    let bench = Bench::new();
    assert!(bench.apply(&layer.opaque("l")).is_err());
}

#[test]
fn a_device_cannot_pose_as_a_whiteout() {
    if not_root("a_device_cannot_pose_as_a_whiteout") {
        return;
    }
    let layer = Layer::new().device("etc/shadow", tar::EntryType::Char, 0, 0);
    let error = Bench::new().apply(&layer).unwrap_err();
    assert!(error.to_string().contains("whiteout"), "{error}");
}

#[test]
fn capabilities_and_user_attributes_are_kept_and_overlays_dropped() {
    if not_root("capabilities_and_user_attributes_are_kept_and_overlays_dropped") {
        return;
    }
    let bench = Bench::new();
    // VFS_CAP_REVISION_2 with cap_net_bind_service.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let records: [(&str, &[u8]); 5] = [
        ("SCHILY.xattr.security.capability", &capability),
        ("SCHILY.xattr.user.note", b"hello"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.user.overlay.opaque", b"y"),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
    ];
    let layer = Layer::new()
        .pax(&records)
        .file("f", b"x")
        .pax(&records[1..])
        .dir("d", 0o755);
    bench.apply(&layer).unwrap();
    let (file, dir) = (bench.path("f"), bench.path("d"));
    assert_eq!(
        attribute(&file, "security.capability").as_deref(),
        Some(&capability[..])
    );
    assert_eq!(
        attribute(&file, "user.note").as_deref(),
        Some(&b"hello"[..])
    );
    assert_eq!(attribute(&dir, "user.note").as_deref(), Some(&b"hello"[..]));
    for name in [
        "trusted.overlay.opaque",
        "user.overlay.opaque",
        "trusted.overlay.redirect",
    ] {
        assert_eq!(
            (attribute(&file, name), attribute(&dir, name)),
            (None, None),
            "{name}"
        );
    }
    assert!(xattr::wanted(b"user.note"));
}

#[test]
fn names_may_be_any_bytes_and_long() {
    if not_root("names_may_be_any_bytes_and_long") {
        return;
    }
    use std::os::unix::ffi::OsStrExt;
    let bench = Bench::new();
    let odd = b"caf\xe9\xff\n\\x";
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let pax = format!("{}/pax", "p".repeat(150));
    let header = || Layer::header(tar::EntryType::Regular, 0o644, 1);
    let layer = Layer::new()
        .raw(header(), odd, b"", b"1")
        .raw(header(), long.as_bytes(), b"", b"2")
        .symlink("l", &"t".repeat(300))
        .pax(&[
            ("path", pax.as_bytes()),
            ("mtime", b"-1.5"),
            ("uid", b"3000000000"),
        ])
        .file("short", b"3");
    bench.apply(&layer).unwrap();
    let odd = bench.root().join(std::ffi::OsStr::from_bytes(odd));
    assert_eq!(fs::read(odd).unwrap(), b"1");
    assert_eq!(
        (bench.read(&long), bench.read(&pax)),
        ("2".to_owned(), "3".to_owned())
    );
    assert_eq!(
        fs::read_link(bench.path("l")).unwrap().as_os_str().len(),
        300
    );
    let meta = bench.meta(&pax);
    assert_eq!(
        (meta.uid(), meta.mtime(), meta.mtime_nsec()),
        (3_000_000_000, -2, 500_000_000)
    );
    // A NUL in a pax name, and names that are too long or too deep.
    let nul = Layer::new().pax(&[("path", b"a\0b")]).file("x", b"");
    assert!(Bench::new().apply(&nul).is_err());
    let deep = "d/".repeat(300);
    assert!(Bench::new().apply(&Layer::new().dir(&deep, 0o755)).is_err());
    let wide = "x/".repeat(3000);
    assert!(Bench::new().apply(&Layer::new().dir(&wide, 0o755)).is_err());
    assert!(
        Bench::new()
            .apply(&Layer::new().file(&"n".repeat(256), b""))
            .is_err()
    );
}

#[test]
fn links_do_not_make_a_tree_deeper_than_a_path_may_be() {
    if not_root("links_do_not_make_a_tree_deeper_than_a_path_may_be") {
        return;
    }
    let piece = vec!["d"; 200].join("/");
    let layer = Layer::new()
        .dir(&piece, 0o755)
        .symlink("l", &piece)
        .dir(&format!("l/{piece}"), 0o755)
        .symlink("m", &format!("l/{piece}"))
        .file(&format!("m/{piece}/x"), b"");
    let error = Bench::new().apply(&layer).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
}

#[test]
fn sparse_files_have_their_holes() {
    if not_root("sparse_files_have_their_holes") {
        return;
    }
    let bench = Bench::new();
    // Old GNU: two pieces of 512 in a file of 1 MiB.
    let mut header = Layer::header(tar::EntryType::GNUSparse, 0o644, 1024);
    {
        let gnu = header.as_gnu_mut().unwrap();
        gnu.realsize[..11].copy_from_slice(b"00004000000");
        for (n, offset) in [(0, b"00000000000"), (1, b"00003777000")] {
            gnu.sparse[n].offset[..11].copy_from_slice(offset);
            gnu.sparse[n].numbytes[..11].copy_from_slice(b"00000001000");
        }
    }
    let data = [[b'a'; 512], [b'z'; 512]].concat();
    // pax 1.0: the map is in the data.
    let map = b"2\n0\n3\n1000\n3\n";
    let mut packed = map.to_vec();
    packed.resize(512, 0);
    packed.extend_from_slice(b"abcxyz");
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"pax1"),
        ("GNU.sparse.realsize", b"1003"),
    ];
    let old: [(&str, &[u8]); 2] = [
        ("GNU.sparse.size", b"1003"),
        ("GNU.sparse.map", b"0,3,1000,3"),
    ];
    let layer = Layer::new()
        .raw(header, b"gnu", b"", &data)
        .pax(&records)
        .file("GNUSparseFile.0/pax1", &packed)
        .pax(&old)
        .file("pax01", b"abcxyz")
        .file("after", b"after");
    bench.apply(&layer).unwrap();
    let gnu = fs::read(bench.path("gnu")).unwrap();
    assert_eq!(
        (gnu.len(), gnu[0], gnu[600], gnu[(1 << 20) - 1]),
        (1 << 20, b'a', 0, b'z')
    );
    assert!(
        bench.meta("gnu").blocks() * 512 < 1 << 20,
        "the hole is no data"
    );
    for name in ["pax1", "pax01"] {
        let data = fs::read(bench.path(name)).unwrap();
        assert_eq!(
            (data.len(), &data[..4], &data[1000..]),
            (1003, &b"abc\0"[..], &b"xyz"[..])
        );
    }
    assert_eq!(bench.read("after"), "after");
}

#[test]
fn absurd_numbers_are_refused() {
    if not_root("absurd_numbers_are_refused") {
        return;
    }
    let set = |change: fn(&mut tar::Header)| {
        let mut header = Layer::header(tar::EntryType::Regular, 0o644, 0);
        change(&mut header);
        Layer::new().raw(header, b"f", b"", b"")
    };
    for layer in [
        // Base 256, negative.
        set(|h| h.as_old_mut().size = [0xff; 12]),
        set(|h| h.as_old_mut().size = *b"not a number"),
        set(|h| h.as_old_mut().mode = *b"99999999"),
        set(|h| h.set_uid(1 << 40)),
        set(|h| h.set_gid(u64::from(u32::MAX))),
        set(|h| h.set_entry_type(tar::EntryType::new(b's'))),
        Layer::new()
            .pax(&[("size", b"99999999999999999999")])
            .file("f", b""),
        Layer::new().pax(&[("uid", b"-1")]).file("f", b""),
    ] {
        assert!(Bench::new().apply(&layer).is_err());
    }
    let bench = Bench::new();
    bench
        .apply(&set(|h| h.as_old_mut().mtime = [0xff; 12]))
        .unwrap();
    assert_eq!(bench.meta("f").mtime(), -1, "times before the epoch exist");
}

#[test]
fn cut_streams_are_errors_and_what_follows_the_end_is_ignored() {
    if not_root("cut_streams_are_errors_and_what_follows_the_end_is_ignored") {
        return;
    }
    let whole = Layer::new().file("f", &[7; 3000]).tar();
    let limits = Limits::default();
    for end in [100, 511, 600, 2000, 3500] {
        let bench = Bench::new();
        let error = bench
            .apply_as(&whole[..end], Whiteouts::Overlay, &limits)
            .unwrap_err();
        assert!(error.to_string().contains("layer entry") || error.to_string().contains("tar"));
    }
    let garbage = [&whole[..], &[0xee; 5000]].concat();
    Bench::new()
        .apply_as(&garbage, Whiteouts::Overlay, &limits)
        .unwrap();
    Bench::new()
        .apply_as(b"", Whiteouts::Overlay, &limits)
        .unwrap();
    let mut damaged = whole.clone();
    damaged[0] = b'g';
    assert!(
        Bench::new()
            .apply_as(&damaged, Whiteouts::Overlay, &limits)
            .is_err()
    );
}

#[test]
fn counts_are_bounded() {
    if not_root("counts_are_bounded") {
        return;
    }
    let mut layer = Layer::new();
    for n in 0..20 {
        layer = layer.file(&format!("f{n}"), b"");
    }
    let tar = layer.tar();
    let few = Limits {
        entries: 10,
        ..Limits::default()
    };
    let error = Bench::new()
        .apply_as(&tar, Whiteouts::Overlay, &few)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    // One entry may make many directories.
    let deep = Layer::new()
        .file(&format!("{}f", "d/".repeat(20)), b"")
        .tar();
    assert!(
        Bench::new()
            .apply_as(&deep, Whiteouts::Overlay, &few)
            .is_err()
    );
    let little = Limits {
        remembered_bytes: 500,
        ..Limits::default()
    };
    let many = (0..20)
        .fold(Layer::new(), |layer, n| layer.dir(&format!("d{n}"), 0o755))
        .tar();
    assert!(
        Bench::new()
            .apply_as(&many, Whiteouts::Overlay, &little)
            .is_err()
    );
}

#[test]
fn a_hundred_thousand_opaque_marks_cost_no_more_than_their_entries() {
    if not_root("a_hundred_thousand_opaque_marks_cost_no_more_than_their_entries") {
        return;
    }
    // Repeated marks are one: were the directory walked for each, this would be 2 * 10^8 steps.
    let mut layer = Layer::new();
    for n in 0..2000 {
        layer = layer.file(&format!("d/{n}"), b"");
    }
    for _ in 0..100_000 {
        layer = layer.opaque("d");
    }
    let bench = Bench::new();
    let unpacked = bench
        .apply_as(&layer.tar(), Whiteouts::Apply, &Limits::default())
        .unwrap();
    assert_eq!(unpacked.usage.inodes, 2001);
    assert_eq!(fs::read_dir(bench.path("d")).unwrap().count(), 2000);
}

#[test]
fn deletions_are_applied_where_the_parents_tree_is_at_hand() {
    if not_root("deletions_are_applied_where_the_parents_tree_is_at_hand") {
        return;
    }
    let bench = Bench::new();
    let base = Layer::new()
        .file("gone", b"")
        .file("dir/a/b", b"")
        .file("dir/c", b"")
        .file("opq/old/x", b"")
        .file("opq/old2", b"")
        .file("mixed/old", b"");
    let limits = Limits::default();
    bench
        .apply_as(&base.tar(), Whiteouts::Apply, &limits)
        .unwrap();
    let top = Layer::new()
        .whiteout("gone")
        .whiteout("dir")
        .file("opq/old/new", b"new")
        .opaque("opq")
        .file("mixed/new", b"new")
        .whiteout("mixed")
        .whiteout("never/there");
    bench
        .apply_as(&top.tar(), Whiteouts::Apply, &limits)
        .unwrap();
    for name in ["gone", "dir", "opq/old/x", "opq/old2", "mixed/old"] {
        assert!(!bench.exists(name), "{name}");
    }
    assert_eq!(
        (bench.read("opq/old/new"), bench.read("mixed/new")),
        ("new".into(), "new".into())
    );
}

#[test]
fn what_a_layer_leaves_unsaid_comes_from_the_layers_below() {
    if not_root("what_a_layer_leaves_unsaid_comes_from_the_layers_below") {
        return;
    }
    let (base, middle, top) = (Bench::new(), Bench::new(), Bench::new());
    let mut header = Layer::header(tar::EntryType::Directory, 0o2750, 0);
    header.set_uid(33);
    let layer = Layer::new()
        .dir("./", 0o711)
        .dir("tmp", 0o1777)
        .raw(header, b"srv/www", b"", b"");
    base.apply(&layer).unwrap();
    let said = middle
        .apply(&Layer::new().file("tmp/x", b"").whiteout("srv"))
        .unwrap();
    assert_eq!(said.implicit, ["", "tmp"].map(PathBuf::from));
    settle(&middle.root(), &said, &[base.root()]).unwrap();
    let meta = middle.meta("tmp");
    assert_eq!(
        (meta.mode() & 0o7777, meta.mtime()),
        (0o1777, 1_700_000_000)
    );
    assert_eq!(middle.meta("").mode() & 0o7777, 0o711);

    let said = top
        .apply(&Layer::new().file("srv/www/new", b"").file("tmp/y", b""))
        .unwrap();
    settle(&top.root(), &said, &[middle.root(), base.root()]).unwrap();
    assert_eq!(top.meta("tmp").mode() & 0o7777, 0o1777);
    let www = top.meta("srv/www");
    assert_eq!(
        (www.mode() & 0o7777, www.uid()),
        (0o755, 0),
        "it was deleted in between"
    );

    // Without that deletion it is the one below.
    let other = Bench::new();
    let said = other.apply(&Layer::new().file("srv/www/new", b"")).unwrap();
    settle(&other.root(), &said, &[base.root()]).unwrap();
    let www = other.meta("srv/www");
    assert_eq!((www.mode() & 0o7777, www.uid()), (0o2750, 33));
}

/// The directory of the same name that is made anew may have the inode of the one that went.
#[test]
fn an_opaque_directory_that_is_replaced_is_opaque_again() {
    if not_root("an_opaque_directory_that_is_replaced_is_opaque_again") {
        return;
    }
    let bench = Bench::new();
    let mut layer = Layer::new();
    for round in 0..8 {
        let name = format!("d{round}/in");
        let twice = layer.dir(&name, 0o755).opaque(&name).file(&name, b"");
        layer = twice.dir(&name, 0o755).opaque(&name);
    }
    bench.apply(&layer).unwrap();
    for round in 0..8 {
        assert!(opaque(&bench.path(&format!("d{round}/in"))), "{round}");
    }
}

/// What an opaque directory hides is not asked for owner and mode either.
#[test]
fn nothing_comes_from_below_an_opaque_directory() {
    if not_root("nothing_comes_from_below_an_opaque_directory") {
        return;
    }
    let (base, middle, top) = (Bench::new(), Bench::new(), Bench::new());
    base.apply(&Layer::new().dir("srv/data", 0o700)).unwrap();
    let said = middle.apply(&Layer::new().opaque("srv")).unwrap();
    settle(&middle.root(), &said, &[base.root()]).unwrap();
    let said = top.apply(&Layer::new().file("srv/data/x", b"")).unwrap();
    settle(&top.root(), &said, &[middle.root(), base.root()]).unwrap();
    assert_eq!(top.meta("srv/data").mode() & 0o7777, 0o755);
}

#[test]
fn a_root_that_hides_everything_does() {
    if not_root("a_root_that_hides_everything_does") {
        return;
    }
    let (base, top) = (Bench::new(), Bench::new());
    base.apply(
        &Layer::new()
            .file("a/x", b"")
            .file("b", b"")
            .file("c/y", b""),
    )
    .unwrap();
    let said = top
        .apply(&Layer::new().opaque("").file("a/new", b""))
        .unwrap();
    assert!(said.opaque_root);
    settle(&top.root(), &said, &[base.root()]).unwrap();
    assert!(opaque(&top.path("a")));
    assert!(whiteout(&top.meta("b")) && whiteout(&top.meta("c")));
}

/// A tree that changes under the unpacker's hands (CVE-2025-47290).
#[test]
fn a_directory_swapped_for_a_link_in_mid_work_leads_nowhere() {
    if not_root("a_directory_swapped_for_a_link_in_mid_work_leads_nowhere") {
        return;
    }
    let bench = Bench::new();
    let mut layer = Layer::new();
    for n in 0..3000 {
        layer = layer
            .dir("d", 0o755)
            .file_mode("d/secret", b"bad", 0o777)
            .fifo("d/fifo")
            .file(&format!("e{n}/x"), b"");
    }
    let tar = layer.tar();
    let canary = bench.dir.path().join("canary");
    let (root, stop) = (bench.root(), std::sync::atomic::AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::sync::atomic::Ordering::Relaxed;
            let (d, away) = (root.join("d"), root.join("away"));
            while !stop.load(Relaxed) {
                // Each of these fails at times, when the other side was quicker.
                let _ = fs::rename(&d, &away);
                let _ = std::os::unix::fs::symlink(&canary, &d);
                let _ = fs::remove_file(&d);
                let _ = fs::rename(&away, &d);
            }
        });
        // The race makes it fail at some entry; what counts is the canary.
        for _ in 0..20 {
            let _ = apply(
                &mut tar.as_slice(),
                &bench.root(),
                Whiteouts::Overlay,
                &Limits::default(),
            );
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    bench.assert_canary();
}

#[test]
fn random_damage_never_panics() {
    if not_root("random_damage_never_panics") {
        return;
    }
    let records: [(&str, &[u8]); 2] = [("path", b"pax/name"), ("mtime", b"1.5")];
    let tar = Layer::new()
        .dir("d", 0o755)
        .file("d/f", &[1; 700])
        .pax(&records)
        .file("x", b"data")
        .symlink("l", "d")
        .hardlink("h", "d/f")
        .whiteout("w")
        .opaque("d")
        .tar();
    // A fixed sequence (xorshift), so that a failure can be seen again.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    let mut outcomes = BTreeMap::new();
    for _ in 0..1500 {
        let mut damaged = tar.clone();
        for _ in 0..1 + random() % 4 {
            let at = random() % damaged.len();
            damaged[at] = random() as u8;
        }
        // With its checksum put right the damage reaches the decoder.
        for block in damaged.chunks_mut(512).filter(|block| block.len() == 512) {
            if block.iter().any(|&b| b != 0) {
                let sum: u32 = block[..148]
                    .iter()
                    .chain(&block[156..])
                    .map(|&b| u32::from(b))
                    .sum();
                if block[257..262] == *b"ustar" {
                    block[148..156].copy_from_slice(format!("{:06o}\0 ", sum + 256).as_bytes());
                }
            }
        }
        let bench = Bench::new();
        let limits = Limits {
            entries: 1000,
            ..Limits::default()
        };
        let good = bench
            .apply_as(&damaged, Whiteouts::Overlay, &limits)
            .is_ok();
        *outcomes.entry(good).or_insert(0) += 1;
    }
    assert!(
        outcomes.len() == 2,
        "some damage is harmless, some is not: {outcomes:?}"
    );
}
