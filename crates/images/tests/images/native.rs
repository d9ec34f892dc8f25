//! Images on a snapshotter whose layers hold their parents' trees.

use std::sync::Arc;

use gantry_images::Images;
use gantry_ports::Snapshotter;
use gantry_snapshotter_native::Native;
use gantry_testkit::image::{Compression, Image, ImageBuilder, Layer};
use gantry_testkit::registry::Registry;

use crate::node::{not_root, nothing_in_use, open_store, options, request};

fn open(root: &std::path::Path) -> (Images, Arc<dyn Snapshotter>) {
    let snapshotter: Arc<dyn Snapshotter> = Arc::new(Native::open(root).unwrap());
    snapshotter.clean().unwrap();
    let store = open_store(&root.join("store"));
    let images = Images::open(root, store, snapshotter.clone(), options()).unwrap();
    (images, snapshotter)
}

fn three_layers() -> Image {
    let base = Layer::new()
        .dir("d", 0o700)
        .file("d/below", b"below")
        .file("gone", b"x")
        .file("twice", b"one");
    let middle = Layer::new()
        .whiteout("gone")
        .opaque("d")
        .file("d/beside", b"beside")
        .file("twice", b"two");
    let top = Layer::new().file("top", b"top").whiteout("d/beside");
    ImageBuilder::new()
        .layer(base, Compression::Gzip)
        .layer(middle, Compression::Zstd)
        .layer(top, Compression::Plain)
        .build()
}

#[tokio::test]
async fn a_layer_has_its_parents_tree_with_deletions_applied() {
    if not_root("a_layer_has_its_parents_tree_with_deletions_applied") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (images, snapshotter) = open(dir.path());
    let registry = Registry::start().await.unwrap();
    let image = three_layers();
    registry.add("app", "1", &image);
    let name = format!("{}/app:1", registry.host());
    let id = images.pull(request(&name)).await.unwrap();
    assert_eq!(id, image.id());
    let found = images.status(&id).unwrap().unwrap();
    let tree = |n: usize| snapshotter.layer_dir(&found.layers[n]).unwrap();
    let names = |n: usize, dir: &str| {
        let entries = std::fs::read_dir(tree(n).join(dir)).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(0, "."), ["d", "gone", "twice"]);
    assert_eq!(
        (names(1, "."), names(1, "d")),
        (
            vec!["d".to_owned(), "twice".to_owned()],
            vec!["beside".to_owned()]
        )
    );
    assert_eq!(
        (names(2, "."), names(2, "d").len()),
        (
            vec!["d".to_owned(), "top".to_owned(), "twice".to_owned()],
            0
        )
    );
    assert_eq!(std::fs::read(tree(0).join("twice")).unwrap(), b"one");
    assert_eq!(std::fs::read(tree(2).join("twice")).unwrap(), b"two");

    // What is told is what the copies occupy, also after a start.
    let occupied = |images: &Images| images.fs_info()[0].inodes_used;
    let layers: u64 = snapshotter
        .layers()
        .unwrap()
        .iter()
        .map(|(_, usage)| usage.inodes)
        .sum();
    assert_eq!(layers, 5 + 4 + 4);
    let before = occupied(&images);
    assert!(before > layers);
    drop((images, snapshotter));
    let (images, snapshotter) = open(dir.path());
    assert_eq!(occupied(&images), before);
    assert_eq!(images.list().len(), 1);

    images.remove(&id, nothing_in_use()).await.unwrap();
    assert!(snapshotter.layers().unwrap().is_empty());
    assert_eq!(occupied(&images), 0);
}
