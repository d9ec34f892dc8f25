//! What goes wrong in mid pull, and what is left of it: nothing.

use std::time::Duration;

use gantry_images::{Credentials, PullRequest};
use gantry_testkit::image::{
    Blob, Compression, ImageBuilder, Layer, OCI_INDEX, Types, digest, index_of,
};
use gantry_testkit::registry::Registry;
use gantry_types::{ErrorKind, Kind};
use serde_json::json;

use crate::node::{Node, image, not_root, nothing_in_use, open, options, request};

#[tokio::test]
async fn what_is_not_what_its_digest_says_is_refused() {
    if not_root("what_is_not_what_its_digest_says_is_refused") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let made = image("one");
    let layer = &made.layers[0];
    let good = layer.data.clone();
    let mut longer = good.clone();
    longer.push(0);
    let mut other = good.clone();
    other[20] ^= 1;
    registry.add("a", "v1", &made);
    let name = format!("{}/a:v1", registry.host());
    for (what, data) in [
        ("longer", longer),
        ("shorter", good[..good.len() - 1].to_vec()),
        ("other", other),
    ] {
        registry.serve_as("a", &layer.digest, data);
        assert!(node.pull(&name).await.is_err(), "{what}");
        node.assert_tidy();
        assert!(node.images.list().is_empty() && node.names("overlayfs/layers").is_empty());
    }
    registry.serve_as("a", &layer.digest, good);
    registry.serve_as("a", &made.config.digest, b"{}".to_vec());
    assert!(
        node.pull(&name).await.is_ok(),
        "the configuration was here already, verified"
    );

    let node = Node::new();
    assert!(node.pull(&name).await.is_err());
    node.images.collect(nothing_in_use()).await.unwrap();
    node.assert_tidy();
}

#[tokio::test]
async fn a_layer_that_is_not_its_diff_id_is_refused() {
    if not_root("a_layer_that_is_not_its_diff_id_is_refused") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let mut made = image("one");
    let config = String::from_utf8(made.config.data.clone()).unwrap();
    let config = config.replace(made.diff_ids[1].hex(), &"0".repeat(64));
    made.config = Blob::new(&made.config.media_type, config.into_bytes());
    let descriptor = made.config.descriptor();
    let made = made.with_manifest(|manifest| manifest["config"] = descriptor);
    registry.add("a", "v1", &made);
    let error = node
        .pull(&format!("{}/a:v1", registry.host()))
        .await
        .unwrap_err();
    let text = error.to_string();
    let (name, layer) = (format!("{}/a:v1", registry.host()), &made.layers[1].digest);
    for part in ["as the image config says", &name, layer.as_str()] {
        assert!(text.contains(part), "{text}");
    }
    node.assert_tidy();
    assert!(node.names("overlayfs/layers").is_empty());
}

/// It is the image that is wrong, and not this node; what was fetched of it is of no use to the next
/// try.
#[tokio::test]
async fn a_layer_that_is_no_archive_is_the_images_fault_and_not_kept() {
    if not_root("a_layer_that_is_no_archive_is_the_images_fault_and_not_kept") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let whole = Layer::new().file("x", &[7; 4000]).tar();
    let torn = gantry_testkit::image::gzip(&whole);
    let torn = torn[..torn.len() / 2].to_vec();
    for (n, (data, compression)) in [
        (whole[..2000].to_vec(), Compression::Gzip),
        (b"no archive at all".repeat(100), Compression::Zstd),
        (torn, Compression::Plain),
    ]
    .into_iter()
    .enumerate()
    {
        let made = ImageBuilder::new().tar(data, compression).build();
        registry.add("a", &n.to_string(), &made);
        let error = node.pull(&format!("{}/a:{n}", registry.host())).await;
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{n}: {error}");
        node.assert_empty();
    }
}

#[tokio::test]
async fn manifests_that_lie_are_refused() {
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let made = image("one");
    let mut tag = 0;
    let mut refused = async |manifest: &Blob, part: &str| {
        tag += 1;
        registry.add("a", &tag.to_string(), &made);
        registry.add_manifest("a", &tag.to_string(), manifest);
        let error = node
            .pull(&format!("{}/a:{tag}", registry.host()))
            .await
            .unwrap_err();
        assert!(error.to_string().contains(part), "{part}: {error}");
        node.assert_tidy();
    };
    let changed = |change: &dyn Fn(&mut serde_json::Value)| {
        made.clone()
            .with_manifest(|manifest| change(manifest))
            .manifest
    };
    refused(&Blob::new(OCI_INDEX, b"{".to_vec()), "manifest").await;
    refused(&changed(&|m| m["manifests"] = json!([])), "at once").await;
    refused(
        &changed(&|m| m["mediaType"] = json!(OCI_INDEX)),
        "served as",
    )
    .await;
    refused(
        &changed(&|m| m["layers"][0]["digest"] = json!("sha256:../../x")),
        "digest",
    )
    .await;
    refused(&changed(&|m| m["layers"] = json!([])), "diff ids").await;
    refused(&changed(&|m| m["schemaVersion"] = json!(1)), "schema 1").await;
    refused(
        &changed(&|m| m["config"]["size"] = json!(1_u64 << 40)),
        "config is larger",
    )
    .await;
    refused(&Blob::new(OCI_INDEX, vec![b' '; 9 << 20]), "more than").await;
    let mut wrong_size = made.manifest.descriptor();
    wrong_size["size"] = json!(7);
    wrong_size["platform"] = json!({"os": "linux", "architecture": "amd64"});
    refused(&index_of(vec![wrong_size], Types::Oci), "instead of 7").await;
}

#[tokio::test]
async fn an_index_of_indexes_ends_soon() {
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    // 20 levels, each listing the next 20 times under other platforms' names, and a wide one.
    let mut next = index_of(vec![], Types::Oci);
    for level in 0..20 {
        registry.add_manifest("a", &format!("l{level}"), &next);
        let mut entry = next.descriptor();
        entry["level"] = json!(level);
        next = index_of(vec![entry; 20], Types::Oci);
    }
    registry.add_manifest("a", "deep", &next);
    let error = node
        .pull(&format!("{}/a:deep", registry.host()))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
    assert!(registry.seen().len() < 10);

    let leaves: Vec<Blob> = (0..100)
        .map(|n| {
            index_of(
                vec![
                    json!({"mediaType": OCI_INDEX, "size": n, "digest": digest(&[n]).to_string()}),
                ],
                Types::Docker,
            )
        })
        .map(|blob| Blob::new(OCI_INDEX, blob.data))
        .collect();
    let wide = index_of(leaves.iter().map(Blob::descriptor).collect(), Types::Oci);
    registry.add_manifest("a", "wide", &wide);
    registry.forget_seen();
    assert!(
        node.pull(&format!("{}/a:wide", registry.host()))
            .await
            .is_err()
    );
    assert!(registry.seen().len() < 100);
}

#[tokio::test]
async fn hosts_that_are_busy_are_asked_again() {
    if not_root("hosts_that_are_busy_are_asked_again") {
        return;
    }
    for (status, after) in [(429, Some(0)), (503, None), (500, None), (408, None)] {
        let (node, registry) = (Node::new(), Registry::start().await.unwrap());
        registry.add("a", "v1", &image("one"));
        registry.behave(|b| b.fail = Some((status, 3, after)));
        node.pull(&format!("{}/a:v1", registry.host()))
            .await
            .unwrap();
        registry.behave(|b| b.fail = Some((status, 1000, after)));
        registry.forget_seen();
        let error = node
            .pull(&format!("{}/a:v1", registry.host()))
            .await
            .unwrap_err();
        assert!(
            error.to_string().starts_with("RegistryUnavailable: "),
            "{error}"
        );
        assert!(error.to_string().contains(&status.to_string()));
        assert_eq!(registry.seen().len(), 4, "the tries are bounded");
    }
}

fn big() -> gantry_testkit::image::Image {
    // Bytes that do not compress, so that the blob has a length to be cut in.
    let mut state = 1_u32;
    let data: Vec<u8> = (0..3_000_000)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect();
    ImageBuilder::new()
        .layer(Layer::new().file("big", &data), Compression::Gzip)
        .build()
}

#[tokio::test]
async fn a_transfer_that_breaks_goes_on_where_it_was() {
    if not_root("a_transfer_that_breaks_goes_on_where_it_was") {
        return;
    }
    let made = big();
    for (ignore_range, stall) in [(false, false), (true, false), (false, true)] {
        let mut options = options();
        if stall {
            options.registry.progress_timeout = Duration::from_secs(1);
        }
        let (node, registry) = (Node::with(options), Registry::start().await.unwrap());
        registry.add("a", "v1", &made);
        registry.behave(|b| {
            b.ignore_range = ignore_range;
            let fault = Some((2_000_000, 2));
            if stall {
                b.stall_after = fault
            } else {
                b.cut_after = fault
            }
        });
        node.pull(&format!("{}/a:v1", registry.host()))
            .await
            .unwrap();
        // The configuration may have been cut too; it is shorter than the cut.
        let ranged = registry
            .seen()
            .iter()
            .filter(|seen| seen.range.is_some())
            .count();
        assert!(ranged >= 1, "it was resumed");
        node.assert_tidy();
    }
}

#[tokio::test]
async fn a_registry_that_never_gets_on_is_given_up() {
    let mut options = options();
    options.registry.progress_timeout = Duration::from_millis(300);
    let (node, registry) = (Node::with(options), Registry::start().await.unwrap());
    registry.add("a", "v1", &big());
    registry.behave(|b| b.stall_after = Some((100, 1000)));
    let error = node
        .pull(&format!("{}/a:v1", registry.host()))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no progress"), "{error}");
    node.assert_tidy();
}

#[tokio::test]
async fn identical_pulls_are_one_and_outlive_their_callers() {
    if not_root("identical_pulls_are_one_and_outlive_their_callers") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let made = image("one");
    registry.add("a", "v1", &made);
    registry.behave(|b| b.latency = Duration::from_millis(50));
    let name = format!("{}/a:v1", registry.host());
    // The first caller leaves soon; the others get what it asked for.
    let left = tokio::time::timeout(Duration::from_millis(20), node.pull(&name));
    let (left, a, b, c) = tokio::join!(left, node.pull(&name), node.pull(&name), node.pull(&name));
    assert!(left.is_err());
    for id in [a, b, c] {
        assert_eq!(id.unwrap(), made.id());
    }
    assert_eq!(
        (
            registry.count("GET", "/manifests/"),
            registry.count("GET", "/blobs/")
        ),
        (1, 3)
    );

    // Other credentials are another pull, which asks the registry itself.
    registry.forget_seen();
    let credentials = Credentials {
        username: "u".into(),
        ..Default::default()
    };
    let other = PullRequest {
        credentials,
        ..request(&name)
    };
    let (a, b) = tokio::join!(node.pull(&name), node.images.pull(other));
    assert!(a.is_ok() && b.is_ok());
    assert_eq!(registry.count("HEAD", "/manifests/"), 2);

    // A failure is everybody's, and the next call starts anew.
    let missing = format!("{}/a:none", registry.host());
    let (a, b) = tokio::join!(node.pull(&missing), node.pull(&missing));
    assert_eq!(
        (a.unwrap_err().kind(), b.unwrap_err().kind()),
        (ErrorKind::NotFound, ErrorKind::NotFound)
    );
    registry.add("a", "none", &made);
    node.pull(&missing).await.unwrap();
}

#[tokio::test]
async fn pulls_of_images_that_share_layers_get_along() {
    if not_root("pulls_of_images_that_share_layers_get_along") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let made: Vec<_> = (0..6).map(|n| image(&format!("mark {n}"))).collect();
    for (n, image) in made.iter().enumerate() {
        registry.add("a", &format!("v{n}"), image);
    }
    registry.behave(|b| b.latency = Duration::from_millis(5));
    let names: Vec<_> = (0..6)
        .map(|n| format!("{}/a:v{n}", registry.host()))
        .collect();
    let pulls = names.iter().map(|name| node.pull(name));
    for (pulled, image) in futures::future::join_all(pulls)
        .await
        .into_iter()
        .zip(&made)
    {
        assert_eq!(pulled.unwrap(), image.id());
    }
    assert_eq!(
        registry.count("GET", "/blobs/"),
        13,
        "the shared layer came once"
    );
    node.assert_tidy();
    assert_eq!(node.names("overlayfs/layers").len(), 7);
    for name in &names {
        node.remove(name).await;
    }
    node.assert_empty();
}

/// A file system of its own for the test, gone with the mount.
struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    fn new(bytes: u64) -> Self {
        use rustix::mount::{MountFlags, mount};
        let dir = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        mount(
            "tmpfs",
            dir.path(),
            "tmpfs",
            MountFlags::empty(),
            options.as_c_str(),
        )
        .unwrap();
        Self { dir }
    }
}

impl SmallDisk {
    fn resize(&self, bytes: u64) {
        use rustix::mount::{MountFlags, mount_remount};
        let options = format!("size={bytes}");
        mount_remount(self.dir.path(), MountFlags::empty(), options.as_str()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        use rustix::mount::{UnmountFlags, unmount};
        unmount(self.dir.path(), UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_fails_the_pull_and_gets_its_space_back() {
    if not_root("a_full_disk_fails_the_pull_and_gets_its_space_back") {
        return;
    }
    let disk = SmallDisk::new(8 << 20);
    let (images, snapshotter) = open(disk.dir.path(), options()).unwrap();
    let registry = Registry::start().await.unwrap();
    // Small on the wire, too large unpacked; and too large on the wire.
    let zeros = vec![0; 12 << 20];
    let unpacked = ImageBuilder::new()
        .layer(Layer::new().file("small", b"x"), Compression::Gzip)
        .layer(Layer::new().file("zeros", &zeros), Compression::Gzip)
        .build();
    let wire = ImageBuilder::new()
        .layer(Layer::new().file("zeros", &zeros), Compression::Plain)
        .build();
    registry.add("a", "small", &image("one"));
    registry.add("a", "unpacked", &unpacked);
    registry.add("a", "wire", &wire);
    let name = |tag: &str| format!("{}/a:{tag}", registry.host());
    images.pull(request(&name("small"))).await.unwrap();
    let free = || rustix::fs::statvfs(disk.dir.path()).unwrap().f_bfree;
    let before = free();
    for tag in ["unpacked", "wire"] {
        let error = images.pull(request(&name(tag))).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
        assert!(
            free() + 64 >= before,
            "{tag}: {} blocks of {before} are free",
            free()
        );
        assert_eq!(snapshotter.layers().unwrap().len(), 2);
    }
    assert_eq!(images.list().len(), 1);

    // With nothing left at all an image can still be removed.
    let filler = disk.dir.path().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write(&mut file, &[1; 4096]).is_ok_and(|n| n > 0) {}
    images
        .remove(&name("small"), nothing_in_use())
        .await
        .unwrap();
    assert!(images.list().is_empty() && snapshotter.layers().unwrap().is_empty());
    drop((images, snapshotter, file));
}

/// Disks of all sizes from one on which nothing fits to one on which the image does: somewhere in
/// between every stage of a pull runs out of space. With more space the next pull completes.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_at_any_moment() {
    if not_root("a_disk_that_fills_up_at_any_moment") {
        return;
    }
    let registry = Registry::start().await.unwrap();
    let noise: Vec<u8> = (0..300_000_u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let files = (0..40).fold(Layer::new(), |layer, n| {
        layer.file(&format!("d/{n}"), &noise[n * 4096..n * 4096 + 9000])
    });
    let made = ImageBuilder::new()
        .layer(Layer::new().file("noise", &noise), Compression::Gzip)
        .layer(files, Compression::Zstd)
        .layer(
            Layer::new().file("zeros", &vec![0; 1 << 20]),
            Compression::Gzip,
        )
        .build();
    registry.add("a", "v1", &made);
    let name = format!("{}/a:v1", registry.host());
    let (mut failed, mut done) = (0, 0);
    for step in 0..28_u64 {
        let disk = SmallDisk::new((256 << 10) * (step + 3));
        // The records are elsewhere: whether sled can be opened is not what is asked.
        let store = tempfile::tempdir().unwrap();
        let opened = crate::node::open_with_store(disk.dir.path(), store.path(), options());
        let (images, snapshotter) = opened.unwrap();
        match images.pull(request(&name)).await {
            Ok(_) => done += 1,
            Err(error) => {
                failed += 1;
                assert_eq!(
                    error.kind(),
                    ErrorKind::ResourceExhausted,
                    "{step}: {error}"
                );
                assert!(images.list().is_empty());
                let left = |dir: &str| {
                    std::fs::read_dir(disk.dir.path().join(dir))
                        .unwrap()
                        .count()
                };
                assert_eq!(
                    (
                        left("overlayfs/stages"),
                        left("overlayfs/trash"),
                        left("content/ingest")
                    ),
                    (0, 0, 0),
                    "{step}"
                );
                disk.resize(64 << 20);
                images.pull(request(&name)).await.unwrap();
            }
        }
        let image = images.status(&name).unwrap().unwrap();
        let layer = snapshotter.layer_dir(&image.layers[0]).unwrap();
        assert_eq!(std::fs::read(layer.join("noise")).unwrap(), noise, "{step}");
        drop((images, snapshotter));
    }
    assert!(failed > 4 && done > 1, "{failed} failed, {done} did not");
}

#[tokio::test]
async fn bombs_fail_by_their_bound() {
    if not_root("bombs_fail_by_their_bound") {
        return;
    }
    let mut options = options();
    options.limits.expansion.bytes = 1 << 20;
    let (node, registry) = (Node::with(options), Registry::start().await.unwrap());
    let bomb = Layer::new().file("zeros", &vec![0; 8 << 20]);
    for (tag, pack) in [("gzip", Compression::Gzip), ("zstd", Compression::Zstd)] {
        registry.add(
            "a",
            tag,
            &ImageBuilder::new().layer(bomb.clone(), pack).build(),
        );
        let error = node
            .pull(&format!("{}/a:{tag}", registry.host()))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
        let text = error.to_string();
        assert!(
            text.contains(&format!("/a:{tag}")) && text.contains("layer sha256:"),
            "{text}"
        );
        node.assert_empty();
    }
}

#[tokio::test]
async fn a_store_that_was_lost_is_rebuilt_from_the_index() {
    if not_root("a_store_that_was_lost_is_rebuilt_from_the_index") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    registry.add("a", "v1", &image("one"));
    registry.add("a", "v2", &image("one"));
    registry.add("b", "v1", &image("two"));
    for name in ["a:v1", "a:v2", "b:v1"] {
        node.pull(&format!("{}/{name}", registry.host()))
            .await
            .unwrap();
    }
    let before = node.images.list();
    let node = node.restart_after(|root| std::fs::remove_dir_all(root.join("store")).unwrap());
    assert_eq!(node.images.list(), before);
    assert_eq!(node.images.rebuild().await.unwrap(), 0);
    let node = node.restart();
    assert_eq!(node.images.list(), before, "and it was written down again");
    // The other way round: the index is lost or rubbish, and written anew from the records.
    let node = node.restart_after(|root| {
        std::fs::remove_file(root.join("content/index.json")).unwrap();
    });
    assert_eq!(node.images.list(), before);
    let node = node.restart_after(|root| {
        std::fs::write(root.join("content/index.json"), "rubbish").unwrap();
    });
    assert_eq!(node.images.list(), before);
    let node = node.restart_after(|root| std::fs::remove_dir_all(root.join("store")).unwrap());
    assert_eq!(node.images.list(), before);
}

#[tokio::test]
async fn an_image_that_lost_a_layer_is_not_listed_and_heals_by_a_pull() {
    if not_root("an_image_that_lost_a_layer_is_not_listed_and_heals_by_a_pull") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let one = image("one");
    registry.add("a", "v1", &one);
    registry.add("b", "v1", &image("two"));
    let (a, b) = (
        format!("{}/a:v1", registry.host()),
        format!("{}/b:v1", registry.host()),
    );
    node.pull(&a).await.unwrap();
    node.pull(&b).await.unwrap();
    let lost = node.images.status(&a).unwrap().unwrap().layers[1].clone();
    let node = node.restart_after(|root| {
        std::fs::remove_dir_all(root.join("overlayfs/layers").join(lost.hex())).unwrap();
    });
    // It can be unpacked again.
    let found = node.images.use_image(&a).unwrap().unwrap();
    node.images.unpack(&found, &node.snapshotter).await.unwrap();
    drop(found);
    assert!(node.layer(&lost).join("etc/top").exists());
    let node = node.restart_after(|root| {
        std::fs::remove_dir_all(root.join("overlayfs/layers").join(lost.hex())).unwrap();
        let blob = one.layers[1].digest.hex();
        std::fs::remove_file(root.join("content/blobs/sha256").join(blob)).unwrap();
    });
    assert!(node.images.status(&a).unwrap().is_none());
    assert!(node.images.status(&b).unwrap().is_some());
    registry.forget_seen();
    node.pull(&a).await.unwrap();
    assert_eq!(
        registry.count("GET", "/blobs/"),
        1,
        "its other blobs were still here"
    );
    assert!(node.layer(&lost).join("etc/top").exists());
}

#[tokio::test]
async fn a_killed_pull_leaves_nothing_after_a_restart() {
    let node = Node::new();
    let node = node.restart_after(|root| {
        std::fs::create_dir_all(root.join("overlayfs/stages/7/fs/etc")).unwrap();
        std::fs::create_dir_all(root.join("overlayfs/trash/8/fs/etc")).unwrap();
        std::fs::write(root.join("content/ingest/1-1"), "half a blob").unwrap();
    });
    node.assert_empty();
}

#[tokio::test]
async fn pinned_images_say_so() {
    if not_root("pinned_images_say_so") {
        return;
    }
    let registry = Registry::start().await.unwrap();
    registry.add("pause", "3", &image("one"));
    registry.add("a", "v1", &image("two"));
    let mut options = options();
    options.pinned = vec![format!("{}/pause:*", registry.host())];
    let node = Node::with(options);
    for (name, pinned) in [("pause:3", true), ("a:v1", false)] {
        let name = format!("{}/{name}", registry.host());
        node.pull(&name).await.unwrap();
        assert_eq!(node.images.status(&name).unwrap().unwrap().pinned, pinned);
    }
}
