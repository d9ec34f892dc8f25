//! Images of a node with two snapshotters.

use std::collections::{HashMap, HashSet};
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

use gantry_images::{Fate, Faulty, Images, ItemKind, Options, PullRequest};
use gantry_ports::{Snapshotter, Snapshotters};
use gantry_snapshotter_native::Native;
use gantry_snapshotter_overlayfs::Overlayfs;
use gantry_testkit::image::{Compression, Image, ImageBuilder, Layer, oci_layout_of, write_tar};
use gantry_testkit::registry::Registry;
use gantry_types::{Digest, ErrorKind, Kind};

use crate::node::{image, not_root, nothing_in_use, open_store, options, request};

struct Node {
    dir: tempfile::TempDir,
    images: Images,
    overlayfs: Arc<dyn Snapshotter>,
    native: Arc<dyn Snapshotter>,
}

fn open(dir: tempfile::TempDir, options: Options) -> Node {
    let root = dir.path();
    let overlayfs: Arc<dyn Snapshotter> = Arc::new(Overlayfs::open(root).unwrap());
    let native: Arc<dyn Snapshotter> = Arc::new(Native::open(root).unwrap());
    let both = Snapshotters::new(overlayfs.clone(), vec![native.clone()]);
    for snapshotter in both.iter() {
        snapshotter.clean().unwrap();
    }
    let store = open_store(&root.join("store"));
    let images = Images::open(root, store, both, options).unwrap();
    Node {
        dir,
        images,
        overlayfs,
        native,
    }
}

impl Node {
    fn new() -> Self {
        open(tempfile::tempdir().unwrap(), options())
    }

    fn restart(self, options: Options) -> Self {
        let Self {
            dir,
            images,
            overlayfs,
            native,
        } = self;
        drop((images, overlayfs, native));
        open(dir, options)
    }

    async fn unpack(&self, name: &str, snapshotter: &Arc<dyn Snapshotter>) -> Result<(), String> {
        let image = self.images.use_image(name).unwrap().unwrap();
        let unpacked = self.images.unpack(&image, snapshotter).await;
        unpacked.map_err(|error| {
            assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
            error.to_string()
        })
    }

    fn chains(&self, name: &str) -> Vec<Digest> {
        let image = self.images.status(name).unwrap().unwrap();
        image.layers.clone()
    }

    fn counts(&self) -> (usize, usize) {
        let count = |of: &Arc<dyn Snapshotter>| of.layers().unwrap().len();
        (count(&self.overlayfs), count(&self.native))
    }

    /// Nothing half made, nothing that waits to be deleted.
    fn assert_tidy(&self) {
        for name in ["overlayfs", "native"] {
            for dir in ["stages", "trash"] {
                let dir = self.dir.path().join(name).join(dir);
                assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "{dir:?}");
            }
        }
    }
}

async fn serve(image: &Image) -> (Registry, String) {
    let registry = Registry::start().await.unwrap();
    registry.add("app", "1", image);
    let name = format!("{}/app:1", registry.host());
    (registry, name)
}

fn blob(node: &Node, digest: &Digest) -> std::path::PathBuf {
    node.dir
        .path()
        .join("content/blobs/sha256")
        .join(digest.hex())
}

#[tokio::test]
async fn an_image_is_unpacked_for_the_snapshotter_that_needs_it() {
    if not_root("an_image_is_unpacked_for_the_snapshotter_that_needs_it") {
        return;
    }
    let node = Node::new();
    let (registry, name) = serve(&image("one")).await;
    registry.add("other", "1", &image("two"));
    let id = node.images.pull(request(&name)).await.unwrap();
    assert_eq!(node.counts(), (2, 0), "the first alone");
    let (one, two) = tokio::join!(
        node.unpack(&name, &node.native),
        node.unpack(&name, &node.native)
    );
    one.and(two).unwrap();
    assert_eq!(node.counts(), (2, 2));
    let chains = node.chains(&id);
    let tree = |of: &Arc<dyn Snapshotter>, n: usize| of.layer_dir(&chains[n]).unwrap();
    assert!(
        tree(&node.overlayfs, 1)
            .join("etc/base")
            .symlink_metadata()
            .is_ok()
    );
    assert!(!tree(&node.native, 1).join("etc/base").exists());
    assert!(tree(&node.native, 0).join("etc/base").exists());

    // A pull that is told so unpacks for both.
    let other = format!("{}/other:1", registry.host());
    let pull = |snapshotter: &str| {
        node.images.pull(PullRequest {
            snapshotter: Some(snapshotter.to_owned()),
            ..request(&other)
        })
    };
    let error = pull("zfs").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    pull("native").await.unwrap();
    // The base layer is that of both images.
    assert_eq!(node.counts(), (3, 3));
    pull("overlayfs").await.unwrap();
    assert_eq!(node.counts(), (3, 3));
    node.assert_tidy();

    // What is told is what is there, by snapshotter, and the same after a start.
    let told = node.images.fs_info();
    let sum = |of: &Arc<dyn Snapshotter>| -> u64 {
        let layers = of.layers().unwrap();
        layers.iter().map(|(_, usage)| usage.bytes).sum()
    };
    assert_eq!(told.len(), 2);
    assert!(told[0].mountpoint.ends_with("overlayfs") && told[1].mountpoint.ends_with("native"));
    assert!(told[0].used_bytes > sum(&node.overlayfs), "with the blobs");
    assert_eq!(told[1].used_bytes, sum(&node.native), "without");
    let node = node.restart(options());
    assert_eq!(node.images.fs_info(), told);
    assert_eq!(node.images.list().len(), 2);
    for name in [&name, &other] {
        node.images.remove(name, nothing_in_use()).await.unwrap();
    }
    assert_eq!(node.counts(), (0, 0));
    let empty = node.images.fs_info();
    assert!(
        empty
            .iter()
            .all(|fs| fs.used_bytes == 0 && fs.inodes_used == 0)
    );
    node.assert_tidy();
}

/// What a container of one snapshotter stands on holds nothing of the other.
#[tokio::test]
async fn layers_stay_for_containers_of_their_own_snapshotter() {
    if not_root("layers_stay_for_containers_of_their_own_snapshotter") {
        return;
    }
    let node = Node::new();
    let (_registry, name) = serve(&image("one")).await;
    node.images.pull(request(&name)).await.unwrap();
    node.unpack(&name, &node.native).await.unwrap();
    let chains = node.chains(&name);
    let key = ("native".to_owned(), chains[1].clone());
    let holders = HashMap::from([(key, vec!["container c".to_owned()])]);
    let used: HashSet<Digest> = [chains[1].clone()].into();
    let in_use = Arc::new(move |name: &str| match name {
        "native" => used.clone(),
        _ => HashSet::new(),
    });
    node.images.remove(&name, in_use.clone()).await.unwrap();
    assert_eq!(node.counts(), (0, 1));
    assert!(node.native.has_layer(&chains[1]));
    let items = node.images.audit(holders).await.unwrap();
    let layers: Vec<_> = items
        .iter()
        .filter(|item| item.kind == ItemKind::Layer)
        .map(|item| (item.snapshotter, item.digest.clone(), item.fate))
        .collect();
    assert_eq!(layers, [(Some("native"), chains[1].clone(), Fate::Kept)]);
    node.images.collect(in_use).await.unwrap();
    assert_eq!(node.counts(), (0, 1));
    // The other way round: what stands on overlayfs keeps nothing of the copies.
    let used = chains[1].clone();
    let in_use = Arc::new(move |name: &str| match name {
        "overlayfs" => HashSet::from([used.clone()]),
        _ => HashSet::new(),
    });
    let items = node.images.audit(HashMap::new()).await.unwrap();
    let layer = items.iter().find(|item| item.kind == ItemKind::Layer);
    assert_eq!(layer.unwrap().fate, Fate::Goes);
    node.images.collect(in_use).await.unwrap();
    assert_eq!(node.counts(), (0, 0));
    node.assert_tidy();
}

#[tokio::test]
async fn a_damaged_layer_is_found_and_brought_anew_where_it_is() {
    if not_root("a_damaged_layer_is_found_and_brought_anew_where_it_is") {
        return;
    }
    let node = Node::new();
    let (_registry, name) = serve(&image("one")).await;
    let id = node.images.pull(request(&name)).await.unwrap();
    node.unpack(&name, &node.native).await.unwrap();
    let good = node.images.verify(&id).await.unwrap();
    assert_eq!((good.faults.len(), good.layers), (0, 4));
    let chains = node.chains(&id);
    for (damaged, other) in [
        (&node.native, &node.overlayfs),
        (&node.overlayfs, &node.native),
    ] {
        let kept = other.layer_dir(&chains[1]).unwrap();
        let before = inode(&kept);
        let file = damaged.layer_dir(&chains[1]).unwrap().join("etc/top");
        std::fs::write(&file, "bad").unwrap();
        let bad = node.images.verify(&id).await.unwrap();
        let what: Vec<_> = bad.faults.iter().map(|fault| fault.what.clone()).collect();
        assert_eq!(what, [Faulty::Layer(damaged.name(), chains[1].clone())]);
        assert!(
            bad.faults[0]
                .reason
                .contains(&format!(" of {}", damaged.name())),
            "{bad:?}"
        );
        let remains = node.images.repair(&bad, nothing_in_use()).await.unwrap();
        assert_eq!(remains, [""; 0]);
        assert_eq!(node.images.verify(&id).await.unwrap(), good);
        assert_eq!(inode(&kept), before, "nothing was wrong with it");
    }
    // Containers see the layers of overlayfs themselves, and have copies of the others.
    let top = chains[1].clone();
    let in_use = Arc::new(move |_: &str| HashSet::from([top.clone()]));
    for (damaged, remaining) in [(&node.native, 0), (&node.overlayfs, 1)] {
        let file = damaged.layer_dir(&chains[1]).unwrap().join("etc/top");
        std::fs::write(&file, "bad").unwrap();
        let bad = node.images.verify(&id).await.unwrap();
        let remains = node.images.repair(&bad, in_use.clone()).await.unwrap();
        assert_eq!(remains.len(), remaining, "{remains:?}");
    }
    node.assert_tidy();
}

fn inode(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
}

#[tokio::test]
async fn what_cannot_be_unpacked_for_another_says_so_and_the_next_pull_brings_it() {
    const NAME: &str = "what_cannot_be_unpacked_for_another_says_so_and_the_next_pull_brings_it";
    if not_root(NAME) {
        return;
    }
    let made = image("one");
    let (_registry, name) = serve(&made).await;
    let node = Node::new();
    let id = node.images.pull(request(&name)).await.unwrap();
    // As on a node that has discarded compressed layers until now.
    std::fs::remove_file(blob(&node, &made.layers[0].digest)).unwrap();
    let error = node.unpack(&name, &node.native).await.unwrap_err();
    assert!(
        error.contains("native") && error.contains("pull the image again"),
        "{error}"
    );
    assert!(error.contains(made.layers[0].digest.hex()), "{error}");
    assert_eq!(node.counts(), (2, 0));
    assert_eq!(node.images.pull(request(&name)).await.unwrap(), id);
    assert!(blob(&node, &made.layers[0].digest).exists());
    node.unpack(&name, &node.native).await.unwrap();
    assert_eq!(node.counts(), (2, 2));

    // Compressed layers stay until nobody needs them any more.
    let node = node.restart(Options {
        discard_unpacked_layers: true,
        ..options()
    });
    node.native.remove_layer(&node.chains(&id)[1]).unwrap();
    node.native.purge().unwrap();
    node.images.pull(request(&name)).await.unwrap();
    assert!(
        !blob(&node, &made.layers[0].digest).exists(),
        "both have it"
    );
    assert!(blob(&node, &made.layers[1].digest).exists(), "one has not");
    node.unpack(&name, &node.native).await.unwrap();
    assert!(!blob(&node, &made.layers[1].digest).exists());
    node.assert_tidy();
}

#[tokio::test]
async fn an_image_that_is_only_fetched_is_unpacked_where_it_is_needed() {
    if not_root("an_image_that_is_only_fetched_is_unpacked_where_it_is_needed") {
        return;
    }
    let (node, made) = (Node::new(), image("one"));
    let mut archive = Vec::new();
    write_tar(&oci_layout_of(&made, "r.io/app:1"), &mut archive).unwrap();
    let names = node.images.import_fetched(Cursor::new(archive), None).await;
    assert_eq!(names.unwrap(), ["r.io/app:1"]);
    node.unpack("r.io/app:1", &node.native).await.unwrap();
    assert_eq!(node.counts(), (0, 2));
    let verified = node.images.verify("r.io/app:1").await.unwrap();
    assert_eq!((verified.faults.len(), verified.layers), (0, 2));
    let facts = node.images.inspect("r.io/app:1").await.unwrap();
    let first = &facts["layers"][0];
    assert_eq!(first["unpacked"], false);
    assert_eq!(first["unpackedFor"], serde_json::json!(["native"]));
    let node = node.restart(options());
    assert_eq!(node.images.list().len(), 1);
    node.unpack("r.io/app:1", &node.overlayfs).await.unwrap();
    assert_eq!(node.counts(), (2, 2));
    node.assert_tidy();
}

/// The layers of an overlay need not wait for each other.
#[tokio::test]
async fn layers_of_an_overlay_are_unpacked_at_the_same_time() {
    if not_root("layers_of_an_overlay_are_unpacked_at_the_same_time") {
        return;
    }
    let layer = |n: u8| {
        Layer::new()
            .file("first", &[n; 1000])
            .file("middle", &vec![n; 4 << 20])
            .file("last", &[n; 1000])
    };
    let made = ImageBuilder::new()
        .layer(layer(1), Compression::Plain)
        .layer(layer(2), Compression::Plain)
        .layer(layer(3), Compression::Plain)
        .build();
    let (registry, name) = serve(&made).await;
    let pause = std::time::Duration::from_millis(30);
    registry.behave(|behaviour| behaviour.trickle = Some((64 << 10, pause)));
    let mut options = options();
    options.layers_at_once = 3;
    options.parallel_unpacks = 3;
    let node = open(tempfile::tempdir().unwrap(), options);
    let stages = node.dir.path().join("overlayfs/stages");
    // Those that are in the middle of an archive.
    let under_way = || {
        let entries = std::fs::read_dir(&stages).unwrap();
        let stages = entries
            .filter_map(Result::ok)
            .map(|entry| entry.path().join("fs"));
        stages
            .filter(|fs| fs.join("first").exists() && !fs.join("last").exists())
            .count()
    };
    let watched = async {
        let mut most = 0;
        while most < 3 {
            most = most.max(under_way());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        most
    };
    let pull = node.images.pull(request(&name));
    let limit = std::time::Duration::from_secs(30);
    let (most, pulled) = tokio::join!(tokio::time::timeout(limit, watched), pull);
    pulled.unwrap();
    assert_eq!(most, Ok(3));
    assert_eq!(node.counts(), (3, 0));
    node.assert_tidy();
}
