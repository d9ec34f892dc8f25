//! A node whose layers and roots are copies.

use gantry_integration::{Node, busybox_image, on_node, on_plain_node, sleeper};
use gantry_testkit::cri::security;
use gantry_testkit::cri::v1::{ImageSpec, Mount};
use gantry_testkit::daemon::Options;
use gantry_testkit::image::{Compression, Image, ImageBuilder, Layer};
use gantry_testkit::leakcheck::names;

const NATIVE: &str = "[images]\nsnapshotter = \"native\"\n";

fn on_native_node(name: &str, test: impl AsyncFnOnce(&mut Node)) {
    on_node(name, Options::default().config(NATIVE), test);
}

/// Busybox with a layer over it that changes, deletes and empties.
fn layered() -> Image {
    let busybox = busybox_image();
    let base = Layer::new()
        .dir("d", 0o755)
        .file("d/old", b"old")
        .file("gone", b"x")
        .file("kept", b"kept");
    let top = Layer::new()
        .whiteout("gone")
        .dir("d", 0o1777)
        .opaque("d")
        .file("d/new", b"new");
    ImageBuilder::new()
        .tar(busybox.layers[0].data.clone(), Compression::Gzip)
        .layer(base, Compression::Gzip)
        .layer(top, Compression::Zstd)
        .build()
}

/// Names below `native` of the daemon's root.
fn below(node: &Node, dir: &str) -> Vec<String> {
    names(&node.daemon.places().root.join("native").join(dir))
}

#[test]
fn a_pod_runs_on_copies_and_survives_the_daemon() {
    on_native_node(
        "a_pod_runs_on_copies_and_survives_the_daemon",
        async |node| {
            let image = node.pull("layered", &layered()).await;
            assert_eq!(below(node, "layers").len(), 3);
            let pod = node.pod("copies").await;
            let (first, second) = (
                node.run(&pod, &sleeper("first", &image)).await,
                node.run(&pod, &sleeper("second", &image)).await,
            );
            let look =
                "cat /kept /d/new; ls /d | wc -l; stat -c %a /d; test ! -e /gone && echo none";
            assert_eq!(node.sh(&first, look).await, "keptnew1\n1777\nnone");
            node.sh(&first, "echo mine > /kept; rm -r /d; mkdir /made")
                .await;
            assert_eq!(node.sh(&second, look).await, "keptnew1\n1777\nnone");

            node.kill_and_start_again().await;
            let mine = "cat /kept; test ! -e /d && ls -d /made";
            assert_eq!(node.sh(&first, mine).await, "mine\n/made");
            let third = node.run(&pod, &sleeper("third", &image)).await;
            assert_eq!(node.sh(&third, look).await, "keptnew1\n1777\nnone");
            assert_eq!(below(node, "snapshots").len(), 3);
            for id in [&first, &second, &third] {
                node.client.stop(id, 0).await.unwrap();
                node.client.remove(id).await.unwrap();
            }
            assert!(below(node, "snapshots").is_empty() && below(node, "trash").is_empty());
            node.client.remove_image(&image).await.unwrap();
            assert!(below(node, "layers").is_empty());
        },
    );
}

#[test]
fn an_image_is_mounted_as_a_copy_that_reaches_no_layer() {
    on_native_node(
        "an_image_is_mounted_as_a_copy_that_reaches_no_layer",
        async |node| {
            let image = node.busybox().await;
            let model = ImageBuilder::new()
                .layer(Layer::new().file("model", b"weights"), Compression::Gzip)
                .build();
            let name = node.pull("model", &model).await;
            let mut config = node.pod_config("mounted");
            let linux = config.linux.get_or_insert_default();
            linux.security_context.get_or_insert_default().privileged = true;
            let pod = node.run_pod(&config).await;
            let mut config = sleeper("c", &image);
            security(&mut config).privileged = true;
            config.mounts.push(Mount {
                container_path: "/model".into(),
                image: Some(ImageSpec {
                    image: name.clone(),
                    ..Default::default()
                }),
                readonly: true,
                ..Default::default()
            });
            let id = node.run(&pod, &config).await;
            assert_eq!(node.sh(&id, "cat /model/model").await, "weights");
            let refused = "echo x > /model/model 2>/dev/null || echo refused";
            assert_eq!(node.sh(&id, refused).await, "refused");
            // One who may change mounts reaches the copy alone.
            node.sh(
                &id,
                "mount -o remount,bind,rw /model && echo bad > /model/model || true",
            )
            .await;
            node.kill_and_start_again().await;
            assert_eq!(below(node, "views").len(), 1, "what is mounted stays");
            config.metadata.as_mut().unwrap().name = "second".to_owned();
            let second = node.run(&pod, &config).await;
            assert_eq!(node.sh(&second, "cat /model/model").await, "weights");
            for id in [&id, &second] {
                node.client.remove(id).await.unwrap();
            }
            assert!(below(node, "views").is_empty());
        },
    );
}

/// Containers of one snapshotter are not left behind by a change to the other.
#[test]
fn the_snapshotter_changes_when_no_container_is_left() {
    on_plain_node(
        "the_snapshotter_changes_when_no_container_is_left",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("before").await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            node.daemon.terminate().unwrap();
            let drop_in = node.daemon.path("conf.d/10-test.toml");
            std::fs::write(&drop_in, NATIVE).unwrap();
            node.daemon.spawn().unwrap();
            assert!(!node.daemon.wait_ended().await.unwrap().success());
            let log = node.daemon.log();
            assert!(log.contains("1 containers of this node"), "{log}");

            std::fs::write(&drop_in, "").unwrap();
            node.start_again(&[]).await;
            assert_eq!(node.sh(&id, "echo alive").await, "alive");
            node.remove_pods().await;
            node.daemon.terminate().unwrap();
            std::fs::write(&drop_in, NATIVE).unwrap();
            node.start_again(&[]).await;
            node.accept_now();
            let layers = node.daemon.places().root.join("overlayfs/layers");
            assert!(names(&layers).is_empty());
            let image = node.busybox().await;
            let pod = node.host_pod("after").await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            assert_eq!(node.sh(&id, "echo x").await, "x");
        },
    );
}
