//! Images in and out as files.

use std::io::Cursor;

use crate::node::{Node, image, not_root};
use gantry_testkit::image::{
    Blob, Compression, ImageBuilder, Layer, docker_files, gzip, index, oci_layout, oci_layout_of,
    write_dir, write_tar,
};
use gantry_testkit::image::{Image, Types};
use gantry_testkit::image_busybox::busybox;
use gantry_types::{ErrorKind, Kind};
use serde_json::json;

type Files = std::collections::BTreeMap<String, Vec<u8>>;

fn tar(files: &Files) -> Vec<u8> {
    let mut out = Vec::new();
    write_tar(files, &mut out).unwrap();
    out
}

fn small(mark: &str) -> Image {
    let layer = Layer::new().file("mark", mark.as_bytes());
    ImageBuilder::new().layer(layer, Compression::Plain).build()
}

#[tokio::test]
async fn a_docker_archive_is_imported_under_its_names() {
    if not_root("a_docker_archive_is_imported_under_its_names") {
        return;
    }
    let node = Node::new();
    let (one, two) = (small("one"), image("two"));
    let files = docker_files(&[(&one, &["one:1", "r.io/x/one:2"]), (&two, &[])], true);
    let names = node
        .images
        .import(Cursor::new(gzip(&tar(&files))), None)
        .await
        .unwrap();
    assert_eq!(
        names,
        [
            "docker.io/library/one:1".to_owned(),
            "r.io/x/one:2".to_owned(),
            two.id()
        ]
    );
    let found = node.images.status("one:1").unwrap().unwrap();
    assert_eq!((&found.id, found.digests.len()), (&one.id(), 0));
    assert_eq!(
        std::fs::read(node.layer(&found.layers[0]).join("mark")).unwrap(),
        b"one"
    );
    node.assert_tidy();
    let node = node.restart();
    assert_eq!(node.images.list().len(), 2);
    node.remove("one:1").await;
    node.remove(&two.id()).await;
    node.assert_empty();
}

#[tokio::test]
async fn a_layer_that_is_a_link_to_another_is_found() {
    if not_root("a_layer_that_is_a_link_to_another_is_found") {
        return;
    }
    let node = Node::new();
    let one = small("one");
    let mut archive = Layer::new()
        .file("c.json", &one.config.data)
        .file("a/layer.tar", &one.layers[0].data)
        .symlink("b/layer.tar", "../a/layer.tar");
    let manifest = json!([{"Config": "c.json", "RepoTags": ["x:1"], "Layers": ["b/layer.tar"]}]);
    archive = archive.file("manifest.json", manifest.to_string().as_bytes());
    node.images
        .import(Cursor::new(archive.tar()), None)
        .await
        .unwrap();
    assert_eq!(node.images.status("x:1").unwrap().unwrap().id, one.id());
}

#[tokio::test]
async fn a_layout_is_imported_as_tar_and_as_directory() {
    if not_root("a_layout_is_imported_as_tar_and_as_directory") {
        return;
    }
    let made = image("one");
    let files = oci_layout_of(&made, "docker.io/library/app:1");
    let by_digest = format!("docker.io/library/app@{}", made.manifest.digest);
    for as_directory in [false, true] {
        let node = Node::new();
        let names = if as_directory {
            let dir = tempfile::tempdir().unwrap();
            write_dir(&files, dir.path()).unwrap();
            node.images.import_path(dir.path(), None).await.unwrap()
        } else {
            node.images
                .import(Cursor::new(tar(&files)), None)
                .await
                .unwrap()
        };
        assert_eq!(names, ["docker.io/library/app:1"]);
        let found = node.images.status(&by_digest).unwrap().unwrap();
        assert_eq!(
            (&found.id, found.tags.as_slice()),
            (&made.id(), names.as_slice())
        );
        node.assert_tidy();
    }
}

#[tokio::test]
async fn platforms_that_are_not_there_are_no_error() {
    if not_root("platforms_that_are_not_there_are_no_error") {
        return;
    }
    let node = Node::new();
    let here = small("here");
    let other = ImageBuilder::new().platform("linux", "s390x", "").build();
    let config: serde_json::Value = serde_json::from_slice(&here.config.data).unwrap();
    let arch = config["architecture"].as_str().unwrap();
    let list = [
        (&other, Some(("linux", "s390x", ""))),
        (&here, Some(("linux", arch, ""))),
    ];
    let index = index(&list, Types::Oci);
    let mut entry = index.descriptor();
    entry["annotations"] = json!({"org.opencontainers.image.ref.name": "r.io/multi:1"});
    let blobs: Vec<_> = here.blobs().chain([&index]).collect();
    let files = oci_layout(vec![entry, other.manifest.descriptor()], &blobs);
    let names = node
        .images
        .import(Cursor::new(tar(&files)), None)
        .await
        .unwrap();
    assert_eq!(names, ["r.io/multi:1"]);
    let by_digest = format!("r.io/multi@{}", index.digest);
    assert_eq!(
        node.images.status(&by_digest).unwrap().unwrap().id,
        here.id()
    );
    node.assert_tidy();

    let files = oci_layout(vec![other.manifest.descriptor()], &[]);
    let error = node
        .images
        .import(Cursor::new(tar(&files)), None)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no image in it"), "{error}");
}

/// Signatures, lists of materials and charts lie beside images.
#[tokio::test]
async fn what_is_no_image_is_passed_by() {
    if not_root("what_is_no_image_is_passed_by") {
        return;
    }
    let node = Node::new();
    let good = small("good");
    let config = Blob::new("application/vnd.cncf.helm.config.v1+json", b"{}".to_vec());
    let chart = json!({"schemaVersion": 2, "config": config.descriptor(), "layers": []});
    let chart = Blob::new(
        "application/vnd.oci.image.manifest.v1+json",
        chart.to_string().into_bytes(),
    );
    let mut signature = good.manifest.descriptor();
    signature["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    let mut entry = good.manifest.descriptor();
    entry["annotations"] = json!({"org.opencontainers.image.ref.name": "r.io/good:1"});
    let blobs: Vec<_> = good.blobs().chain([&config, &chart]).collect();
    let entries = vec![chart.descriptor(), signature, entry];
    let archive = tar(&oci_layout(entries, &blobs));
    let names = node
        .images
        .import(Cursor::new(archive), None)
        .await
        .unwrap();
    assert_eq!(names, ["r.io/good:1"]);
    assert_eq!(node.images.list().len(), 1);
    node.assert_tidy();
    node.remove("r.io/good:1").await;
    node.assert_empty();
}

/// A file that comes twice is the later one, and the former is not left.
#[tokio::test]
async fn a_file_that_comes_twice_leaves_one() {
    if not_root("a_file_that_comes_twice_leaves_one") {
        return;
    }
    let node = Node::new();
    let image = small("x");
    let manifest = json!([{"Config": "c.json", "RepoTags": ["x:1"], "Layers": ["layer.tar"]}]);
    let archive = Layer::new()
        .file("layer.tar", b"former")
        .file("c.json", &image.config.data)
        .file("layer.tar", &image.layers[0].data)
        .file("manifest.json", manifest.to_string().as_bytes());
    let archive = Cursor::new(archive.tar());
    node.images.import(archive, None).await.unwrap();
    assert_eq!(node.images.status("x:1").unwrap().unwrap().id, image.id());
    node.assert_tidy();
}

#[tokio::test]
async fn a_name_of_the_callers_choice() {
    if not_root("a_name_of_the_callers_choice") {
        return;
    }
    let node = Node::new();
    let (one, two) = (small("one"), small("two"));
    let files = docker_files(&[(&one, &["one:1"])], true);
    let name = Some("mine:7".to_owned());
    let names = node
        .images
        .import(Cursor::new(tar(&files)), name.clone())
        .await
        .unwrap();
    assert_eq!(names, ["docker.io/library/mine:7"]);
    assert!(node.images.status("one:1").unwrap().is_none());
    let files = docker_files(&[(&one, &[]), (&two, &[])], true);
    let error = node
        .images
        .import(Cursor::new(tar(&files)), name)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let bad = Some("Not/A/Name".to_owned());
    assert!(
        node.images
            .import(Cursor::new(tar(&files)), bad)
            .await
            .is_err()
    );
}

#[tokio::test]
async fn what_is_exported_can_be_imported_and_is_the_same() {
    if not_root("what_is_exported_can_be_imported_and_is_the_same") {
        return;
    }
    let (node, other) = (Node::new(), Node::new());
    let made = image("one");
    let files = oci_layout_of(&made, "docker.io/library/app:1");
    node.images
        .import(Cursor::new(tar(&files)), None)
        .await
        .unwrap();
    let files = docker_files(&[(&small("two"), &["two:1"])], true);
    node.images
        .import(Cursor::new(tar(&files)), None)
        .await
        .unwrap();

    let mut out = Vec::new();
    node.images
        .export(&["app:1".to_owned(), small("two").id()], &mut out)
        .unwrap();
    let names = other
        .images
        .import(Cursor::new(out.clone()), None)
        .await
        .unwrap();
    assert_eq!(
        names,
        ["docker.io/library/app:1", "docker.io/library/two:1"]
    );
    for name in &names {
        let pair = [&node, &other].map(|n| n.images.status(name).unwrap().unwrap());
        assert_eq!(
            (&pair[0].id, &pair[0].layers),
            (&pair[1].id, &pair[1].layers)
        );
        assert_eq!(pair[0].config, pair[1].config);
    }

    // As docker reads it: by manifest.json alone.
    let mut archive = tar::Archive::new(out.as_slice());
    let mut files = Files::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_string_lossy().into_owned();
        let mut data = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut data).unwrap();
        files.insert(name, data);
    }
    files.remove("index.json");
    files.remove("oci-layout");
    let third = Node::new();
    let names = third
        .images
        .import(Cursor::new(tar(&files)), None)
        .await
        .unwrap();
    assert_eq!(
        names,
        ["docker.io/library/app:1", "docker.io/library/two:1"]
    );
    assert_eq!(third.images.status("app:1").unwrap().unwrap().id, made.id());

    let error = node
        .images
        .export(&["none:1".to_owned()], &mut Vec::new())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn bad_archives_are_refused_and_leave_nothing() {
    if not_root("bad_archives_are_refused_and_leave_nothing") {
        return;
    }
    let node = Node::new();
    let one = small("one");
    let good = oci_layout_of(&one, "docker.io/library/app:1");
    let layer = format!("blobs/sha256/{}", one.layers[0].digest.hex());
    let mut wrong_blob = good.clone();
    wrong_blob.insert(layer.clone(), b"something else".to_vec());
    let mut no_layer = good.clone();
    no_layer.remove(&layer);
    let mut no_json = good.clone();
    no_json.insert("index.json".to_owned(), b"{".to_vec());
    let huge = Files::from([("index.json".to_owned(), vec![b' '; 9 << 20])]);
    let mut other_diff = small("one");
    let config = String::from_utf8(other_diff.config.data).unwrap();
    let wrong = "0".repeat(64);
    let config = config.replace(other_diff.diff_ids[0].hex(), &wrong);
    other_diff.config = Blob::new("", config.into_bytes());
    let wrong_diff = docker_files(&[(&other_diff, &["x:1"])], true);
    let mut truncated = tar(&good);
    truncated.truncate(2000);
    let escape = Layer::new().file("../../x", b"x").tar();
    let long = Layer::new().file(&"x/".repeat(3000), b"x").tar();
    let name = format!("docker.io/library/nginx@sha256:{}", "1".repeat(64));
    let claim = tar(&oci_layout_of(&one, &name));
    let claim_too = tar(&docker_files(&[(&one, &[name.as_str()])], true));
    for (what, archive) in [
        ("wrong blob", tar(&wrong_blob)),
        ("no layer", tar(&no_layer)),
        ("no json", tar(&no_json)),
        ("huge json", tar(&huge)),
        ("wrong diff id", tar(&wrong_diff)),
        ("truncated", truncated),
        ("escape", escape),
        ("long path", long),
        ("a name by digest that is not its own", claim),
        ("the same of docker's", claim_too),
        ("no archive", b"hello".to_vec()),
        ("empty", Vec::new()),
    ] {
        let error = node.images.import(Cursor::new(archive), None).await;
        let kind = error.unwrap_err().kind();
        let expected = [ErrorKind::InvalidArgument, ErrorKind::ResourceExhausted];
        assert!(expected.contains(&kind), "{what}: {kind:?}");
        node.assert_empty();
    }
}

#[tokio::test]
async fn busybox_is_a_whole_system() {
    if not_root("busybox_is_a_whole_system") {
        return;
    }
    let made = match busybox() {
        Ok(made) => made,
        Err(error) => {
            println!("SKIP busybox_is_a_whole_system: {error}");
            return;
        }
    };
    let node = Node::new();
    let files = docker_files(&[(&made, &["busybox:latest"])], true);
    node.images
        .import(Cursor::new(tar(&files)), None)
        .await
        .unwrap();
    let found = node.images.status("busybox").unwrap().unwrap();
    let (id, target) = (
        "ab".repeat(32).parse().unwrap(),
        node.dir.path().join("root"),
    );
    std::fs::create_dir(&target).unwrap();
    node.snapshotter
        .prepare(&id, &found.layers, Default::default())
        .unwrap();
    node.snapshotter
        .mount(&id, &found.layers, &target, Default::default())
        .unwrap();
    let run = std::process::Command::new("chroot")
        .arg(&target)
        .args(["/bin/sh", "-c", "echo hello && id nobody && ls -ld /tmp"])
        .output();
    node.snapshotter.unmount(&target).unwrap();
    let output = String::from_utf8(run.unwrap().stdout).unwrap();
    assert!(output.starts_with("hello\nuid=65534(nobody)"), "{output}");
    assert!(output.contains("drwxrwxrwt"), "{output}");
}
