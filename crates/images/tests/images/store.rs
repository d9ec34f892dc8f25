//! What lies on disk: verified, repaired, collected, discarded, unpacked late.

use std::collections::{HashMap, HashSet};
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::node::{Node, image, not_root, nothing_in_use, open_store, options};
use gantry_images::{Fate, Faulty, ItemKind, LayersInUse, Options};
use gantry_store::Record;
use gantry_store::record::ImageRecord;
use gantry_testkit::image::{Compression, Image, ImageBuilder, Layer, oci_layout_of, write_tar};
use gantry_testkit::registry::Registry;
use gantry_types::{Digest, ErrorKind, Kind};

async fn serve(image: &Image) -> (Registry, String) {
    let registry = Registry::start().await.unwrap();
    registry.add("app", "1", image);
    let name = format!("{}/app:1", registry.host());
    (registry, name)
}

fn blob(node: &Node, digest: &Digest) -> PathBuf {
    node.dir
        .path()
        .join("content/blobs/sha256")
        .join(digest.hex())
}

fn layers(node: &Node, name: &str) -> Vec<Digest> {
    node.images.status(name).unwrap().unwrap().layers.clone()
}

/// Changes a byte, and nothing that a look from outside would see.
fn garble(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x55;
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn every_damage_is_found_and_repaired() {
    if not_root("every_damage_is_found_and_repaired") {
        return;
    }
    let made = image("one");
    let (node, (_registry, name)) = (Node::new(), serve(&made).await);
    let id = node.pull(&name).await.unwrap();
    let good = node.images.verify(&name).await.unwrap();
    assert_eq!(
        (good.faults.as_slice(), good.notes.as_slice()),
        (&[][..], &[][..])
    );
    assert_eq!((good.blobs, good.layers), (4, 2));
    let chains = layers(&node, &id);
    let base = || node.layer(&chains[0]);

    type Damage<'a> = (&'a dyn Fn(), &'a str);
    let damages: [Damage; 7] = [
        (
            &|| garble(&blob(&node, &made.manifest.digest)),
            "another digest",
        ),
        (
            &|| garble(&blob(&node, &made.config.digest)),
            "another digest",
        ),
        (
            &|| garble(&blob(&node, &made.layers[1].digest)),
            "another digest",
        ),
        // As after a power loss on a file system that has lost the data.
        (
            &|| std::fs::write(blob(&node, &made.layers[0].digest), "").unwrap(),
            "its 0 bytes",
        ),
        (
            &|| std::fs::write(base().join("etc/base"), "BASE").unwrap(),
            "\"/etc/base\": another content",
        ),
        (
            &|| std::fs::remove_file(base().join("etc/base")).unwrap(),
            "\"/etc/base\": is missing",
        ),
        (
            &|| std::fs::write(node.layer(&chains[1]).join("new"), "").unwrap(),
            "\"/new\": should not be there",
        ),
    ];
    for (damage, says) in damages {
        damage();
        let bad = node.images.verify(&id).await.unwrap();
        assert_eq!(bad.faults.len(), 1, "{says}: {:?}", bad.faults);
        assert!(bad.faults[0].reason.contains(says), "{:?}", bad.faults);
        let remains = node.images.repair(&bad, nothing_in_use()).await.unwrap();
        assert_eq!(remains, [""; 0], "{says}");
        assert_eq!(node.images.verify(&id).await.unwrap(), good, "{says}");
    }
    assert_eq!(std::fs::read(base().join("etc/base")).unwrap(), b"base");
    node.assert_tidy();
    let node = node.restart();
    assert_eq!(node.images.verify(&id).await.unwrap(), good);
    node.remove(&id).await;
    node.assert_empty();
}

#[tokio::test]
async fn a_layer_under_a_container_is_not_replaced() {
    if not_root("a_layer_under_a_container_is_not_replaced") {
        return;
    }
    let made = image("one");
    let (node, (_registry, name)) = (Node::new(), serve(&made).await);
    node.pull(&name).await.unwrap();
    let chains = layers(&node, &name);
    let file = node.layer(&chains[0]).join("etc/base");
    std::fs::write(&file, "BASE").unwrap();
    let bad = node.images.verify(&name).await.unwrap();
    assert_eq!(
        bad.faults[0].what,
        Faulty::Layer("overlayfs", chains[0].clone())
    );
    let used: HashSet<Digest> = [chains[0].clone()].into();
    let in_use = Arc::new(move |_: &str| used.clone());
    let remains = node.images.repair(&bad, in_use).await.unwrap();
    assert!(remains[0].contains("containers stand on it"), "{remains:?}");
    assert_eq!(std::fs::read(&file).unwrap(), b"BASE");
}

#[tokio::test]
async fn what_is_damaged_heals_on_the_next_pull() {
    if not_root("what_is_damaged_heals_on_the_next_pull") {
        return;
    }
    let made = image("one");
    let (node, (_registry, name)) = (Node::new(), serve(&made).await);
    let id = node.pull(&name).await.unwrap();
    let chains = layers(&node, &id);
    let lose_trees = || {
        for chain in &chains {
            node.snapshotter.remove_layer(chain).unwrap();
        }
        node.snapshotter.purge().unwrap();
    };
    let good = {
        lose_trees();
        node.pull(&name).await.unwrap();
        node.images.verify(&id).await.unwrap()
    };
    assert_eq!(
        (good.faults.len(), good.layers),
        (0, 2),
        "a tree that was missing"
    );
    type Damage<'a> = &'a dyn Fn();
    let layer = || blob(&node, &made.layers[0].digest);
    let damages: [Damage; 5] = [
        &|| garble(&layer()),
        &|| std::fs::write(layer(), "").unwrap(),
        &|| std::fs::remove_file(layer()).unwrap(),
        &|| garble(&blob(&node, &made.config.digest)),
        &|| std::fs::write(blob(&node, &made.manifest.digest), "").unwrap(),
    ];
    for (n, damage) in damages.into_iter().enumerate() {
        damage();
        lose_trees();
        assert_eq!(node.pull(&name).await.unwrap(), id, "damage {n}");
        assert_eq!(node.images.verify(&id).await.unwrap(), good, "damage {n}");
    }
    node.assert_tidy();
}

#[tokio::test]
async fn an_image_that_is_only_fetched_is_unpacked_when_it_is_needed() {
    if not_root("an_image_that_is_only_fetched_is_unpacked_when_it_is_needed") {
        return;
    }
    let (node, made) = (Node::new(), image("one"));
    let mut archive = Vec::new();
    write_tar(&oci_layout_of(&made, "r.io/app:1"), &mut archive).unwrap();
    let names = node.images.import_fetched(Cursor::new(archive), None).await;
    assert_eq!(names.unwrap(), ["r.io/app:1"]);
    let listed = node.images.list();
    assert_eq!((listed.len(), &listed[0].id), (1, &made.id()));
    assert_eq!(node.names("overlayfs/layers"), [""; 0]);
    let verified = node.images.verify("r.io/app:1").await.unwrap();
    assert_eq!((verified.faults.len(), verified.notes.len()), (0, 2));
    assert!(verified.notes[0].contains("not unpacked"), "{verified:?}");

    let node = node.restart();
    let used = node.images.use_image("r.io/app:1").unwrap().unwrap();
    assert!(!node.images.is_unpacked(&used));
    let (one, two) = tokio::join!(
        node.images.unpack(&used, &node.snapshotter),
        node.images.unpack(&used, &node.snapshotter)
    );
    one.and(two).unwrap();
    assert!(node.images.is_unpacked(&used));
    assert!(node.layer(&used.layers[0]).join("etc/base").exists());
    drop(used);
    node.assert_tidy();
    let node = node.restart();
    node.remove("r.io/app:1").await;
    node.assert_empty();
}

#[tokio::test]
async fn compressed_layers_are_discarded_once_they_are_unpacked() {
    if not_root("compressed_layers_are_discarded_once_they_are_unpacked") {
        return;
    }
    let discarding = || Options {
        discard_unpacked_layers: true,
        ..options()
    };
    let made = image("one");
    let (_registry, name) = serve(&made).await;
    let node = Node::with(discarding());
    let id = node.pull(&name).await.unwrap();
    for layer in &made.layers {
        assert!(!blob(&node, &layer.digest).exists());
    }
    assert!(blob(&node, &made.config.digest).exists());
    node.assert_tidy();
    let verified = node.images.verify(&id).await.unwrap();
    assert_eq!((verified.faults.len(), verified.layers), (0, 0));
    assert!(
        verified
            .notes
            .iter()
            .all(|note| note.contains("is not kept"))
    );
    let error = node
        .images
        .export(std::slice::from_ref(&id), &mut Vec::new())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(
        error.to_string().contains("discard_unpacked_layers"),
        "{error}"
    );

    // Found again, and not fetched again.
    let node = node.restart();
    assert_eq!(node.pull(&name).await.unwrap(), id);
    assert!(!blob(&node, &made.layers[0].digest).exists());
    // Without its unpacked layer it is pulled anew.
    let chains = layers(&node, &id);
    let node = node.restart_after(|root| {
        let layer = root.join("overlayfs/layers").join(chains[1].hex());
        std::fs::remove_dir_all(layer).unwrap();
    });
    assert!(node.images.list().is_empty());
    assert_eq!(node.pull(&name).await.unwrap(), id);
    node.remove(&id).await;
    node.assert_empty();
}

#[tokio::test]
async fn what_cannot_be_discarded_makes_no_pull_fail() {
    if not_root("what_cannot_be_discarded_makes_no_pull_fail") {
        return;
    }
    let made = image("one");
    let (_registry, name) = serve(&made).await;
    let node = Node::with(Options {
        discard_unpacked_layers: true,
        ..options()
    });
    let id = node.pull(&name).await.unwrap();
    let place = blob(&node, &made.layers[0].digest);
    std::fs::create_dir(&place).unwrap();
    assert_eq!(node.pull(&name).await.unwrap(), id);
    std::fs::remove_dir(&place).unwrap();
    node.remove(&id).await;
    node.assert_empty();
}

#[tokio::test]
async fn a_blob_of_several_layers_is_discarded_with_the_last() {
    if not_root("a_blob_of_several_layers_is_discarded_with_the_last") {
        return;
    }
    let layer = || Layer::new().file("f", b"the same");
    let once = ImageBuilder::new().layer(layer(), Compression::Gzip);
    let twice = ImageBuilder::new()
        .layer(layer(), Compression::Gzip)
        .layer(layer(), Compression::Gzip)
        .build();
    let once = once.build();
    let shared = &once.layers[0].digest;
    assert_eq!(*shared, twice.layers[1].digest);
    let (_registry, name) = serve(&once).await;
    let node = Node::with(Options {
        discard_unpacked_layers: true,
        ..options()
    });
    let mut archive = Vec::new();
    write_tar(&oci_layout_of(&twice, "r.io/twice:1"), &mut archive).unwrap();
    let imported = node.images.import_fetched(Cursor::new(archive), None);
    imported.await.unwrap();
    // The one's layer is the other's first, and the other's second is made of the same blob.
    node.pull(&name).await.unwrap();
    assert!(blob(&node, shared).exists());
    let used = node.images.use_image("r.io/twice:1").unwrap().unwrap();
    node.images.unpack(&used, &node.snapshotter).await.unwrap();
    assert!(!blob(&node, shared).exists());
}

#[tokio::test]
async fn what_a_container_is_made_of_is_not_collected() {
    if not_root("what_a_container_is_made_of_is_not_collected") {
        return;
    }
    let node = Node::with(Options {
        keep_unreferenced: std::time::Duration::ZERO,
        ..options()
    });
    let made = image("one");
    let mut archive = Vec::new();
    write_tar(&oci_layout_of(&made, "r.io/app:1"), &mut archive).unwrap();
    let imported = node.images.import_fetched(Cursor::new(archive), None);
    imported.await.unwrap();
    let used = node.images.use_image("r.io/app:1").unwrap().unwrap();
    node.remove("r.io/app:1").await;
    node.images.collect(nothing_in_use()).await.unwrap();
    node.images.unpack(&used, &node.snapshotter).await.unwrap();
    assert!(node.layer(&used.layers[1]).join("etc/top").exists());
    drop(used);
    node.images.collect(nothing_in_use()).await.unwrap();
    node.assert_empty();
}

/// Puts a file where nobody can open it, which is an error of the disk and not of the image, and back.
fn unreadable(path: &Path, is: bool) {
    let aside = path.with_extension("aside");
    if is {
        std::fs::rename(path, &aside).unwrap();
        std::os::unix::fs::symlink(path, path).unwrap();
    } else {
        std::fs::rename(&aside, path).unwrap();
    }
}

#[tokio::test]
async fn an_image_that_cannot_be_read_at_the_start_is_kept() {
    if not_root("an_image_that_cannot_be_read_at_the_start_is_kept") {
        return;
    }
    let one = image("one");
    let (node, (registry, name)) = (Node::new(), serve(&one).await);
    registry.add("other", "1", &image("two"));
    let other = format!("{}/other:1", registry.host());
    node.pull(&name).await.unwrap();
    let before = node.images.list();
    node.pull(&other).await.unwrap();
    let manifest = blob(&node, &one.manifest.digest);
    let node = node.restart_after(|_| unreadable(&manifest, true));
    assert!(node.images.status(&name).unwrap().is_none());
    assert!(node.images.status(&other).unwrap().is_some());
    // Who knows what it needs?
    node.images.collect(nothing_in_use()).await.unwrap();
    node.remove(&other).await;
    assert_eq!(node.names("overlayfs/layers").len(), 3);
    let audit = node.images.audit(HashMap::new()).await.unwrap();
    assert!(
        audit.iter().all(|item| item.fate == Fate::Kept),
        "{audit:?}"
    );
    let node = node.restart();
    assert!(node.images.list().is_empty());
    unreadable(&manifest, false);
    node.images.collect(nothing_in_use()).await.unwrap();
    assert_eq!(node.images.list(), before);
    assert_eq!(node.names("overlayfs/layers").len(), 2);

    let node = node.restart_after(|_| unreadable(&manifest, true));
    assert!(node.images.list().is_empty());
    unreadable(&manifest, false);
    let node = node.restart();
    assert_eq!(node.images.list(), before);
    node.remove(&name).await;
    node.images.collect(nothing_in_use()).await.unwrap();
    assert_eq!(node.names("overlayfs/layers"), [""; 0]);
}

/// Nobody can say what is in use.
struct Unknown;

impl LayersInUse for Unknown {
    fn chains(&self, _: &str) -> Option<HashSet<Digest>> {
        None
    }
}

#[tokio::test]
async fn layers_that_anybody_may_stand_on_are_neither_collected_nor_replaced() {
    const NAME: &str = "layers_that_anybody_may_stand_on_are_neither_collected_nor_replaced";
    if not_root(NAME) {
        return;
    }
    let (node, (_registry, name)) = (Node::new(), serve(&image("one")).await);
    let id = node.pull(&name).await.unwrap();
    let chains = layers(&node, &id);
    std::fs::write(node.layer(&chains[0]).join("etc/base"), "bad").unwrap();
    let bad = node.images.verify(&name).await.unwrap();
    assert_eq!(bad.faults.len(), 1, "{bad:?}");
    let remains = node.images.repair(&bad, Arc::new(Unknown)).await.unwrap();
    assert_eq!(remains.len(), 1, "{remains:?}");
    assert!(remains[0].contains("stays as it is"), "{remains:?}");
    let there = node.names("overlayfs/layers");
    node.images.remove(&name, Arc::new(Unknown)).await.unwrap();
    node.images.collect(Arc::new(Unknown)).await.unwrap();
    assert_eq!(node.names("overlayfs/layers"), there);
    node.images.collect(nothing_in_use()).await.unwrap();
    assert_eq!(node.names("overlayfs/layers"), [""; 0]);
}

/// An image record as a later version may write it.
#[derive(Clone, PartialEq, prost::Message)]
struct LaterImage {
    #[prost(bytes = "vec", tag = "1")]
    what: Vec<u8>,
}

impl Record for LaterImage {
    const TREE: &'static str = <ImageRecord as Record>::TREE;
    const VERSION: u32 = <ImageRecord as Record>::VERSION + 1;
}

#[tokio::test]
async fn the_record_of_a_newer_daemon_keeps_its_place_and_all_layers() {
    if not_root("the_record_of_a_newer_daemon_keeps_its_place_and_all_layers") {
        return;
    }
    let (node, (registry, name)) = (Node::new(), serve(&image("one")).await);
    registry.add("other", "1", &image("two"));
    let other = format!("{}/other:1", registry.host());
    let id = node.pull(&name).await.unwrap();
    node.pull(&other).await.unwrap();
    let before = node.images.list();
    let what = b"\xfflater".to_vec();
    let later = LaterImage { what };
    let mut record = None;
    let node = node.restart_after(|root| {
        let store = open_store(&root.join("store"));
        record = store.get::<ImageRecord>(&id).unwrap();
        store.put(&id, &later).unwrap();
    });
    // The index tells what it can.
    assert_eq!(node.images.list(), before);
    let (layers, blobs) = (
        node.names("overlayfs/layers"),
        node.names("content/blobs/sha256"),
    );
    node.remove(&name).await;
    node.remove(&other).await;
    node.images.collect(nothing_in_use()).await.unwrap();
    node.pull(&other).await.unwrap();
    node.remove(&other).await;
    assert_eq!(node.names("overlayfs/layers"), layers);
    assert_eq!(node.names("content/blobs/sha256"), blobs);
    let audit = node.images.audit(HashMap::new()).await.unwrap();
    assert!(
        audit.iter().all(|item| item.fate == Fate::Kept),
        "{audit:?}"
    );
    // Pulled again: the image is there, and the record is what it was.
    node.pull(&name).await.unwrap();
    assert!(node.images.status(&name).unwrap().is_some());
    let node = node.restart_after(|root| {
        let store = open_store(&root.join("store"));
        assert_eq!(store.get::<LaterImage>(&id).unwrap(), Some(later.clone()));
        store.put(&id, &record.take().unwrap()).unwrap();
    });
    assert!(node.images.status(&name).unwrap().is_some());
    node.images.collect(nothing_in_use()).await.unwrap();
    assert_eq!(node.names("overlayfs/layers").len(), 2);
}

#[tokio::test]
async fn a_blob_that_cannot_be_read_is_one_finding_among_others() {
    if not_root("a_blob_that_cannot_be_read_is_one_finding_among_others") {
        return;
    }
    let made = image("one");
    let (node, (_registry, name)) = (Node::new(), serve(&made).await);
    let id = node.pull(&name).await.unwrap();
    let good = node.images.verify(&id).await.unwrap();
    unreadable(&blob(&node, &made.layers[0].digest), true);
    garble(&blob(&node, &made.layers[1].digest));
    let bad = node.images.verify(&id).await.unwrap();
    let told: Vec<_> = bad.faults.iter().map(|fault| &fault.what).collect();
    let blobs = made.layers.iter().map(|layer| layer.digest.clone());
    let blobs: Vec<_> = blobs.map(Faulty::Blob).collect();
    assert_eq!(told, blobs.iter().collect::<Vec<_>>());
    assert!(bad.faults[0].reason.contains("cannot be read"), "{bad:?}");
    node.images.repair(&bad, nothing_in_use()).await.unwrap();
    assert_eq!(node.images.verify(&id).await.unwrap(), good);
}

#[tokio::test]
async fn a_repair_never_follows_the_tag() {
    if not_root("a_repair_never_follows_the_tag") {
        return;
    }
    let (one, two) = (image("one"), image("two"));
    let (node, (registry, name)) = (Node::new(), serve(&one).await);
    // Once pulled, and once only known by its tag.
    let mut archive = Vec::new();
    write_tar(&oci_layout_of(&one, &name), &mut archive).unwrap();
    let imported = node.images.import(Cursor::new(archive), None);
    imported.await.unwrap();
    for pulled in [false, true] {
        if pulled {
            registry.add("app", "1", &one);
            node.pull(&name).await.unwrap();
        }
        // The tag has moved on; the old manifest is still served by its digest.
        registry.add("app", "1", &two);
        std::fs::write(blob(&node, &one.layers[1].digest), "").unwrap();
        let bad = node.images.verify(&one.id()).await.unwrap();
        assert_eq!(bad.faults.len(), 1);
        let remains = node.images.repair(&bad, nothing_in_use()).await.unwrap();
        assert_eq!(remains, [""; 0]);
        assert_eq!(node.images.verify(&one.id()).await.unwrap().faults, []);
        assert_eq!(node.images.list().len(), 1);
        assert_eq!(node.images.status(&name).unwrap().unwrap().id, one.id());
    }
}

#[tokio::test]
async fn another_name_is_there_at_once_and_stays() {
    if not_root("another_name_is_there_at_once_and_stays") {
        return;
    }
    let (one, two) = (image("one"), image("two"));
    let (node, (registry, name)) = (Node::new(), serve(&one).await);
    registry.add("other", "1", &two);
    node.pull(&name).await.unwrap();
    let other = node
        .pull(&format!("{}/other:1", registry.host()))
        .await
        .unwrap();
    for source in [name.as_str(), &one.id(), &one.id()[7..20]] {
        let tagged = node.images.tag(source, "mine").await.unwrap();
        assert_eq!(
            tagged,
            (one.id(), "docker.io/library/mine:latest".to_owned())
        );
    }
    assert_eq!(node.images.status("mine").unwrap().unwrap().id, one.id());
    let node = node.restart();
    assert_eq!(node.images.status("mine").unwrap().unwrap().tags.len(), 2);
    node.images.tag(&other, "mine:latest").await.unwrap();
    assert_eq!(node.images.status("mine").unwrap().unwrap().id, two.id());
    assert_eq!(node.images.status(&one.id()).unwrap().unwrap().tags, [name]);
    for (source, target, kind) in [
        ("nothing", "x", ErrorKind::NotFound),
        ("mine", "UPPER", ErrorKind::InvalidArgument),
        (
            "mine",
            &format!("x@{}", Digest::sha256([1; 32])),
            ErrorKind::InvalidArgument,
        ),
    ] {
        let error = node.images.tag(source, target).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
}

#[tokio::test]
async fn an_audit_says_what_a_collection_takes() {
    if not_root("an_audit_says_what_a_collection_takes") {
        return;
    }
    let node = Node::with(Options {
        keep_unreferenced: std::time::Duration::ZERO,
        ..options()
    });
    let made = image("one");
    let (_registry, name) = serve(&made).await;
    node.pull(&name).await.unwrap();
    let chains = layers(&node, &name);
    let on = |chain: &Digest| {
        let key = ("overlayfs".to_owned(), chain.clone());
        HashMap::from([(key, vec!["container c".to_owned()])])
    };
    let items = node.images.audit(on(&chains[0])).await.unwrap();
    assert!(
        items.iter().all(|item| item.fate == Fate::Kept),
        "{items:?}"
    );
    let blobs = items.iter().filter(|item| item.kind == ItemKind::Blob);
    assert_eq!(blobs.count(), 4);
    let of = |digest: &Digest| {
        items
            .iter()
            .find(|item| item.digest == *digest && item.kind == ItemKind::Layer)
    };
    let image_refers = format!("image {name}");
    assert_eq!(
        of(&chains[0]).unwrap().referrers,
        ["container c", &image_refers]
    );
    assert_eq!(of(&chains[1]).unwrap().referrers, [image_refers.as_str()]);
    let layer_bytes: u64 = items
        .iter()
        .filter(|item| item.kind == ItemKind::Layer)
        .map(|item| item.bytes)
        .sum();
    let blob_bytes: u64 = items
        .iter()
        .filter(|item| item.kind == ItemKind::Blob)
        .map(|item| item.bytes)
        .sum();
    assert_eq!(
        layer_bytes + blob_bytes,
        node.images.fs_info()[0].used_bytes
    );

    // The image goes while a container stands on its base; a stray blob lies about.
    let used: HashSet<Digest> = [chains[0].clone()].into();
    let in_use = Arc::new(move |_: &str| used.clone());
    node.images.remove(&name, in_use.clone()).await.unwrap();
    let stray = blob(&node, &made.config.digest);
    std::fs::write(&stray, &made.config.data).unwrap();
    let items = node.images.audit(on(&chains[0])).await.unwrap();
    let told: Vec<_> = items.iter().map(|item| (item.kind, item.fate)).collect();
    assert_eq!(
        told,
        [(ItemKind::Blob, Fate::Goes), (ItemKind::Layer, Fate::Kept)]
    );
    assert_eq!(
        node.images.audit(HashMap::new()).await.unwrap()[1].fate,
        Fate::Goes
    );
    node.images.collect(in_use).await.unwrap();
    assert!(!stray.exists() && node.snapshotter.has_layer(&chains[0]));
    node.images.collect(nothing_in_use()).await.unwrap();
    assert!(!node.snapshotter.has_layer(&chains[0]));
}
