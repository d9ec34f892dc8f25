//! Pulls from a registry on the loopback.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use crate::node::{Node, image, not_root, nothing_in_use};
use gantry_testkit::image::{Compression, ImageBuilder, Layer, Types, index};
use gantry_testkit::registry::Registry;
use gantry_types::{ErrorKind, Kind};

#[tokio::test]
async fn an_image_is_pulled_unpacked_listed_and_removed() {
    if not_root("an_image_is_pulled_unpacked_listed_and_removed") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let made = image("one");
    registry.add("lib/app", "v1", &made);
    let name = format!("{}/lib/app:v1", registry.host());
    let id = node.pull(&name).await.unwrap();
    assert_eq!(id, made.id());
    node.assert_tidy();

    let images = node.images.list();
    let listed = images.first().unwrap();
    assert_eq!(
        (images.len(), &listed.id, &listed.tags),
        (1, &id, &vec![name.clone()])
    );
    let by_digest = format!("{}/lib/app@{}", registry.host(), made.manifest.digest);
    assert_eq!(listed.digests, std::slice::from_ref(&by_digest));
    assert_eq!(
        (listed.config.cmd.as_slice(), listed.config.env.as_slice()),
        (
            &["/bin/sh".to_owned(), "one".to_owned()][..],
            &["A=b".to_owned()][..]
        )
    );
    assert_eq!(listed.uid_or_name(), (Some(1000), ""));
    let parts = made.layers.iter().chain([&made.config]);
    assert_eq!(
        listed.size,
        parts.map(|blob| blob.data.len() as u64).sum::<u64>()
    );
    for known_as in [&id, &id[7..], &id[7..20], &name, &by_digest] {
        assert_eq!(node.images.status(known_as).unwrap().unwrap().id, id);
    }

    let (base, top) = (node.layer(&listed.layers[0]), node.layer(&listed.layers[1]));
    assert_eq!(std::fs::read(base.join("etc/base")).unwrap(), b"base");
    assert_eq!(std::fs::read(top.join("etc/top")).unwrap(), b"one");
    let whiteout = std::fs::symlink_metadata(top.join("etc/base")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    let info = node.images.fs_info().remove(0);
    assert!(info.used_bytes > listed.size && info.inodes_used > 4 && info.mountpoint.exists());

    let node = node.restart();
    assert_eq!(
        node.images.list(),
        images,
        "the image is found again, as it was"
    );
    node.remove(&name).await;
    node.remove(&name).await;
    node.remove("never/there").await;
    node.assert_empty();
    node.restart().assert_empty();
}

#[tokio::test]
async fn every_family_of_types_and_the_platform_of_this_node() {
    if not_root("every_family_of_types_and_the_platform_of_this_node") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    for (n, types) in [Types::Oci, Types::Docker].into_iter().enumerate() {
        for (m, pack) in [Compression::Plain, Compression::Gzip, Compression::Zstd]
            .into_iter()
            .enumerate()
        {
            let layer = || Layer::new().file("f", format!("{n}{m}").as_bytes());
            let here = ImageBuilder::new()
                .types(types)
                .layer(layer(), pack)
                .build();
            let other = ImageBuilder::new()
                .types(types)
                .platform("linux", "s390x", "")
                .layer(layer(), pack)
                .build();
            let config: serde_json::Value = serde_json::from_slice(&here.config.data).unwrap();
            let arch = config["architecture"].as_str().unwrap();
            let list = [
                (&other, Some(("linux", "s390x", ""))),
                (&other, Some(("unknown", "unknown", ""))),
                (&here, Some(("linux", arch, ""))),
            ];
            let index = index(&list, types);
            let tag = format!("t{n}{m}");
            registry.add("a", &tag, &here);
            registry.add_manifest("a", &tag, &index);
            let id = node
                .pull(&format!("{}/a:{tag}", registry.host()))
                .await
                .unwrap();
            assert_eq!(id, here.id());
            let image = node.images.status(&id).unwrap().unwrap();
            let named = format!("{}/a@{}", registry.host(), index.digest);
            assert_eq!(
                image.digests,
                std::slice::from_ref(&named),
                "named by what the tag points to"
            );
            // The index too is where it is looked for after a restart.
            let blobs = node.names("content/blobs/sha256");
            for blob in [&index, &here.config] {
                assert!(blobs.contains(&blob.digest.hex().to_owned()), "{blobs:?}");
            }
            assert_eq!(node.pull(&named).await.unwrap(), id);
            let file = node.layer(&image.layers[0]).join("f");
            assert_eq!(std::fs::read(file).unwrap(), format!("{n}{m}").as_bytes());
        }
    }
    let foreign = ImageBuilder::new().platform("linux", "s390x", "").build();
    registry.add("b", "x", &foreign);
    let error = node
        .pull(&format!("{}/b:x", registry.host()))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("no image for platform linux/"),
        "{error}"
    );
    node.assert_tidy();
}

#[tokio::test]
async fn what_is_here_is_not_fetched_again() {
    if not_root("what_is_here_is_not_fetched_again") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let (one, two) = (image("one"), image("two"));
    registry.add("a", "v1", &one);
    let name = format!("{}/a:v1", registry.host());
    node.pull(&name).await.unwrap();
    assert_eq!(registry.count("GET", "/blobs/"), 3);
    node.pull(&name).await.unwrap();
    assert_eq!(
        (registry.count("GET", ""), registry.count("HEAD", "")),
        (4, 1)
    );

    registry.forget_seen();
    registry.add("a", "v1", &two);
    let second = node.pull(&name).await.unwrap();
    assert_eq!(second, two.id());
    assert_eq!(
        registry.count("GET", "/blobs/"),
        2,
        "the base layer is shared"
    );
    let old = node.images.status(&one.id()).unwrap().unwrap();
    assert_eq!(
        (old.tags.len(), old.digests.len()),
        (0, 1),
        "the tag has moved"
    );
    assert_eq!(node.images.status(&name).unwrap().unwrap().id, second);

    node.remove(&one.id()).await;
    let kept = node.images.status(&second).unwrap().unwrap();
    assert!(
        kept.layers
            .iter()
            .all(|chain| node.snapshotter.has_layer(chain))
    );
    let node = node.restart();
    assert_eq!(node.images.list().len(), 1);
    node.remove(&second).await;
    node.assert_empty();
}

#[tokio::test]
async fn layers_that_containers_stand_on_stay_until_they_are_collected() {
    if not_root("layers_that_containers_stand_on_stay_until_they_are_collected") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    registry.add("a", "v1", &image("one"));
    let name = format!("{}/a:v1", registry.host());
    node.pull(&name).await.unwrap();
    let layers = node.images.status(&name).unwrap().unwrap().layers.clone();

    let used: std::collections::HashSet<_> = layers.iter().cloned().collect();
    let in_use = std::sync::Arc::new(move |_: &str| used.clone());
    node.images.remove(&name, in_use).await.unwrap();
    assert!(layers.iter().all(|chain| node.snapshotter.has_layer(chain)));
    node.images.collect(nothing_in_use()).await.unwrap();
    node.assert_empty();

    node.pull(&name).await.unwrap();
    let held = node.images.use_image(&name).unwrap().unwrap();
    node.remove(&name).await;
    assert!(layers.iter().all(|chain| node.snapshotter.has_layer(chain)));
    assert!(node.images.use_image(&name).unwrap().is_none());
    drop(held);
    node.images.collect(nothing_in_use()).await.unwrap();
    node.assert_empty();
}

#[tokio::test]
async fn a_name_that_is_no_name_and_an_image_that_is_nowhere() {
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let error = node.pull("upper/Case").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let name = format!("{}/a:v1", registry.host());
    let error = node.pull(&name).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let text = error.to_string();
    for part in [&name, &registry.host(), "404", "MANIFEST_UNKNOWN"] {
        assert!(text.contains(part), "{text}");
    }
    drop(registry);
    let error = node.pull(&name).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown);
    assert!(
        error.to_string().starts_with("RegistryUnavailable: "),
        "{error}"
    );
    node.assert_empty();
}
