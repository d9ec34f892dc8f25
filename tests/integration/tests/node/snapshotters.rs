//! A node whose runtime handlers have different snapshotters.

use gantry_integration::gantryctl::Gantryctl;
use gantry_integration::{
    Node, Pod, busybox_image, eventually, on_node, on_plain_node, refused, sleeper,
};
use gantry_testkit::cri::v1::{
    ContainerConfig, FilesystemUsage, ImageFsInfoRequest, ImageSpec, Mount, PullImageRequest,
};
use gantry_testkit::daemon::{self, Options};
use gantry_testkit::image::{Compression, ImageBuilder, Layer, oci_layout_of, write_tar};
use gantry_testkit::leakcheck::names;
use tonic::Code;

/// Handler whose roots are copies, while those of `runc` are overlays.
const COPIES: &str = "copies";

fn copies(snapshotter: &str) -> String {
    format!("[runtime.handlers.{COPIES}]\nbinary = \"runc\"\nsnapshotter = {snapshotter:?}\n")
}

fn on_node_with_both(name: &str, test: impl AsyncFnOnce(&mut Node)) {
    on_node(name, Options::default().config(&copies("native")), test);
}

async fn pod(node: &Node, name: &str, handler: &str) -> Pod {
    let config = node.pod_config(name);
    let id = node.client.run_pod_by(&config, handler).await.unwrap();
    Pod { id, config }
}

/// Names below the directories of overlayfs and native.
fn below(node: &Node, dir: &str) -> [Vec<String>; 2] {
    let root = &node.daemon.places().root;
    ["overlayfs", "native"].map(|name| names(&root.join(name).join(dir)))
}

fn counts(node: &Node, dir: &str) -> [usize; 2] {
    below(node, dir).map(|names| names.len())
}

async fn file_systems(node: &Node) -> (Vec<FilesystemUsage>, Vec<FilesystemUsage>) {
    let request = ImageFsInfoRequest {};
    let info = node.client.images.clone().image_fs_info(request).await;
    let info = info.unwrap().into_inner();
    (info.image_filesystems, info.container_filesystems)
}

/// Starts gantryd, which must end by itself, and returns what it said.
async fn fails_to_start(node: &mut Node) -> String {
    node.daemon.spawn().unwrap();
    let status = node.daemon.wait_ended().await.unwrap();
    assert!(!status.success());
    let log = node.daemon.log();
    log.lines().last().unwrap_or_default().to_owned() + &log
}

fn configure(node: &Node, text: &str) {
    std::fs::write(node.daemon.path("conf.d/10-test.toml"), text).unwrap();
}

#[test]
fn handlers_with_their_own_snapshotters_run_the_same_image() {
    const NAME: &str = "handlers_with_their_own_snapshotters_run_the_same_image";
    on_node_with_both(NAME, async |node| {
        let image = node.busybox().await;
        assert_eq!(counts(node, "layers"), [1, 0], "the default one alone");
        let overlaid = pod(node, "overlaid", "runc").await;
        let copied = pod(node, "copied", COPIES).await;
        let first = node.run(&overlaid, &sleeper("c", &image)).await;
        let second = node.run(&copied, &sleeper("c", &image)).await;
        assert_eq!(counts(node, "layers"), [1, 1], "unpacked when it is needed");
        assert_eq!(
            below(node, "snapshots"),
            [vec![first.clone()], vec![second.clone()]]
        );
        for (id, name) in [(&first, "overlayfs"), (&second, "native")] {
            assert_eq!(node.container_info(id).await["snapshotter"], name);
            node.sh(id, "echo mine > /made").await;
        }
        let root = node.daemon.places().root.clone();
        let made =
            |name: &str, id: &str| root.join(name).join("snapshots").join(id).join("fs/made");
        let (of_first, of_second) = (made("overlayfs", &first), made("native", &second));
        assert!(of_first.exists() && of_second.exists());

        // One of each; blobs are counted with the first, which the kubelet looks at.
        let (images, containers) = file_systems(node).await;
        let place = |of: &FilesystemUsage| of.fs_id.clone().unwrap().mountpoint;
        let used = |of: &FilesystemUsage| of.used_bytes.unwrap().value;
        let places: Vec<_> = images.iter().map(place).collect();
        assert_eq!(
            places,
            [root.join("overlayfs"), root.join("native")].map(|path| path.display().to_string())
        );
        assert_eq!(images.len(), containers.len());
        assert!(used(&images[0]) > used(&images[1]) && used(&images[1]) > 1 << 20);

        node.kill_and_start_again().await;
        for id in [&first, &second] {
            assert_eq!(node.sh(id, "cat /made").await, "mine");
        }
        assert_eq!(counts(node, "layers"), [1, 1], "nothing was collected");
        let (again, _) = file_systems(node).await;
        let amounts = |of: &[FilesystemUsage]| of.iter().map(used).collect::<Vec<_>>();
        assert_eq!(amounts(&again), amounts(&images));

        // The image goes before its containers: each keeps the layer that it stands on.
        node.client.remove_image(&image).await.unwrap();
        assert_eq!(counts(node, "layers"), [1, 1]);
        if let Some(program) = Gantryctl::find(NAME) {
            let said = Gantryctl::new(&program, &node.daemon)
                .image(&["gc", "--dry-run"])
                .1;
            for (name, id) in [("overlayfs", &first), ("native", &second)] {
                let line = said
                    .lines()
                    .find(|line| line.contains(&format!(" of {name} ")));
                let line = line.unwrap_or_else(|| panic!("{said}"));
                assert!(
                    line.starts_with("kept") && line.contains(id.as_str()),
                    "{said}"
                );
            }
        }
        node.client.stop(&second, 0).await.unwrap();
        node.client.remove(&second).await.unwrap();
        eventually("layer of the copy", async || {
            (counts(node, "layers") == [1, 0]).then_some(())
        })
        .await;
        assert_eq!(node.sh(&first, "cat /made").await, "mine");
        node.client.remove(&first).await.unwrap();
        eventually("layer of the overlay", async || {
            (counts(node, "layers") == [0, 0]).then_some(())
        })
        .await;
        for dir in ["snapshots", "stages", "trash"] {
            // A layer is out of sight before its space is given back.
            eventually(dir, async || (counts(node, dir) == [0, 0]).then_some(())).await;
        }
    });
}

#[test]
fn a_pull_for_a_handler_unpacks_for_its_snapshotter() {
    const NAME: &str = "a_pull_for_a_handler_unpacks_for_its_snapshotter";
    on_node_with_both(NAME, async |node| {
        let image = node.busybox().await;
        let pull = async |handler: &str| {
            let spec = ImageSpec {
                image: image.clone(),
                runtime_handler: handler.to_owned(),
                ..Default::default()
            };
            let request = PullImageRequest {
                image: Some(spec),
                ..Default::default()
            };
            node.client.images.clone().pull_image(request).await
        };
        refused(
            pull("unknown").await,
            Code::InvalidArgument,
            "image.runtime_handler",
        );
        pull("runc").await.unwrap();
        assert_eq!(counts(node, "layers"), [1, 0]);
        pull(COPIES).await.unwrap();
        assert_eq!(counts(node, "layers"), [1, 1]);
        node.client.remove_image(&image).await.unwrap();
        assert_eq!(counts(node, "layers"), [0, 0]);
    });
}

/// Whose root is whose is in its record: handlers change theirs while containers live.
#[test]
fn a_handler_changes_its_snapshotter_under_its_containers() {
    const NAME: &str = "a_handler_changes_its_snapshotter_under_its_containers";
    on_node_with_both(NAME, async |node| {
        let image = node.busybox().await;
        let overlaid = pod(node, "overlaid", "runc").await;
        let copied = pod(node, "copied", COPIES).await;
        let first = node.run(&overlaid, &sleeper("c", &image)).await;
        let second = node.run(&copied, &sleeper("c", &image)).await;

        // Both are still named, the other way round.
        node.daemon.terminate().unwrap();
        let swapped = copies("overlayfs")
            + "[runtime.handlers.runc]\nbinary = \"runc\"\n[images]\nsnapshotter = \"native\"\n";
        configure(node, &swapped);
        node.start_again(&[]).await;
        for (id, name) in [(&first, "overlayfs"), (&second, "native")] {
            assert_eq!(node.sh(id, "echo alive").await, "alive");
            assert_eq!(node.container_info(id).await["snapshotter"], name);
        }
        let third = node.run(&copied, &sleeper("later", &image)).await;
        assert_eq!(
            node.container_info(&third).await["snapshotter"],
            "overlayfs"
        );
        node.client.remove(&third).await.unwrap();
        assert_eq!(
            below(node, "snapshots"),
            [vec![first.clone()], vec![second.clone()]]
        );

        // No key names native any more.
        node.daemon.terminate().unwrap();
        configure(node, &copies("overlayfs"));
        let said = fails_to_start(node).await;
        assert!(
            said.contains("1 containers of this node have their files from native")
                && said.contains("runtime.handlers.<name>.snapshotter"),
            "{said}"
        );
        configure(node, &copies("native"));
        node.start_again(&[]).await;
        assert_eq!(node.sh(&second, "echo alive").await, "alive");
        node.client.remove(&second).await.unwrap();
        assert_eq!(below(node, "snapshots"), [vec![first.clone()], vec![]]);

        node.daemon.terminate().unwrap();
        configure(node, &copies("overlayfs"));
        node.start_again(&[]).await;
        assert_eq!(node.sh(&first, "echo alive").await, "alive");
        assert_eq!(counts(node, "layers"), [1, 0], "nobody needs the copy");
        node.remove_pods().await;
        node.accept_now();
    });
}

#[test]
fn what_would_be_discarded_is_not_promised_to_another_snapshotter() {
    const NAME: &str = "what_would_be_discarded_is_not_promised_to_another_snapshotter";
    on_plain_node(NAME, async |node| {
        node.daemon.terminate().unwrap();
        configure(
            node,
            &(copies("native") + "[images]\ndiscard_unpacked_layers = true\n"),
        );
        let said = fails_to_start(node).await;
        assert!(
            said.contains("images.discard_unpacked_layers")
                && said.contains("runtime.handlers.copies.snapshotter"),
            "{said}"
        );
        // Without the handler it does what it says.
        configure(node, "[images]\ndiscard_unpacked_layers = true\n");
        node.start_again(&[]).await;
        node.accept_now();
        let image = node.busybox().await;
        let blobs = node.daemon.places().root.join("content/blobs/sha256");
        let layer = blobs.join(busybox_image().layers[0].digest.hex());
        assert!(!layer.exists() && counts(node, "layers") == [1, 0]);
        node.client.remove_image(&image).await.unwrap();
    });
}

#[test]
fn another_image_root_is_refused_while_containers_are_left() {
    const NAME: &str = "another_image_root_is_refused_while_containers_are_left";
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("before").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let other = node.daemon.path("logs/images");
        let elsewhere = format!("[images]\nroot = {other:?}\n");
        node.daemon.terminate().unwrap();
        configure(node, &elsewhere);
        let said = fails_to_start(node).await;
        let former = node.daemon.places().root.display().to_string();
        assert!(
            said.contains("images.root: 1 containers of this node") && said.contains(&former),
            "{said}"
        );
        configure(node, "");
        node.start_again(&[]).await;
        assert_eq!(node.sh(&id, "echo alive").await, "alive");
        assert_eq!(counts(node, "layers"), [1, 0]);
        node.remove_pods().await;

        node.daemon.terminate().unwrap();
        configure(node, &elsewhere);
        node.start_again(&[]).await;
        let image = node.busybox().await;
        let pod = node.host_pod("after").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        assert_eq!(node.sh(&id, "echo x").await, "x");
        // What belongs there is not mounted, say.
        node.daemon.terminate().unwrap();
        let away = node.daemon.path("logs/away");
        std::fs::rename(&other, &away).unwrap();
        let said = fails_to_start(node).await;
        assert!(said.contains("is their file system mounted?"), "{said}");
        std::fs::remove_dir_all(&other).unwrap();
        std::fs::rename(&away, &other).unwrap();
        node.start_again(&[]).await;
        assert_eq!(node.sh(&id, "echo x").await, "x");
        node.remove_pods().await;
        node.accept_now();
    });
}

/// An image is only fetched: the first container that mounts it has it unpacked, for the snapshotter
/// of its handler.
#[test]
fn an_image_that_is_only_fetched_is_mounted() {
    const NAME: &str = "an_image_that_is_only_fetched_is_mounted";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_node_with_both(NAME, async |node| {
        let image = node.busybox().await;
        let model = ImageBuilder::new()
            .layer(Layer::new().file("model", b"old"), Compression::Gzip)
            .layer(Layer::new().file("model", b"weights"), Compression::Zstd)
            .build();
        let archive = node.daemon.path("logs/model.tar");
        let mut file = std::fs::File::create(&archive).unwrap();
        write_tar(&oci_layout_of(&model, "r.io/model:1"), &mut file).unwrap();
        let path = archive.display().to_string();
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        assert_eq!(gantryctl.image(&["import", "--no-unpack", &path]).0, 0);
        assert_eq!(counts(node, "layers"), [1, 0], "busybox alone");

        let mounting = |name: &str| -> ContainerConfig {
            let mut config = sleeper(name, &image);
            config.mounts.push(Mount {
                container_path: "/model".into(),
                image: Some(ImageSpec {
                    image: "r.io/model:1".to_owned(),
                    ..Default::default()
                }),
                readonly: true,
                ..Default::default()
            });
            config
        };
        let mut ids = Vec::new();
        for (handler, expected) in [(COPIES, [1, 3]), ("runc", [3, 3])] {
            let pod = pod(node, handler, handler).await;
            let id = node.run(&pod, &mounting("c")).await;
            assert_eq!(node.sh(&id, "cat /model/model").await, "weights");
            assert_eq!(counts(node, "layers"), expected, "{handler}");
            ids.push(id);
        }
        node.kill_and_start_again().await;
        node.client.remove_image("r.io/model:1").await.unwrap();
        for (id, left) in ids.iter().zip([[3, 1], [1, 1]]) {
            assert_eq!(node.sh(id, "cat /model/model").await, "weights");
            node.client.remove(id).await.unwrap();
            eventually("layers of the model", async || {
                (counts(node, "layers") == left).then_some(())
            })
            .await;
        }
        assert!(names(&node.daemon.places().root.join("native/views")).is_empty());
        node.client.remove_image(&image).await.unwrap();
        std::fs::remove_file(&archive).unwrap();
    });
}

/// Killed while CreateContainer unpacks: nothing of it is left, and the request repeated succeeds.
#[test]
fn killed_while_a_container_has_its_image_unpacked() {
    const NAME: &str = "killed_while_a_container_has_its_image_unpacked";
    if !daemon::has_failpoints().unwrap() {
        println!("SKIP {NAME}: gantryd is built without its feature failpoints");
        return;
    }
    // The first layer is that of the pull.
    let options = Options::default()
        .config(&copies("native"))
        .env("FAILPOINTS", "pull::mid-unpack=1*off->return(kill)");
    on_node(NAME, options, async |node| {
        let image = node.busybox().await;
        let pod = pod(node, "copied", COPIES).await;
        let config = sleeper("c", &image);
        let created = node.client.create(&pod.id, &config, &pod.config).await;
        assert!(created.is_err());
        node.daemon.wait_ended().await.unwrap();
        assert_eq!(counts(node, "stages"), [0, 1], "it was in the middle");
        node.start_again(&[]).await;
        for (dir, expected) in [
            ("layers", [1, 0]),
            ("stages", [0, 0]),
            ("snapshots", [0, 0]),
        ] {
            assert_eq!(counts(node, dir), expected, "{dir}");
        }
        let id = node.run(&pod, &config).await;
        assert_eq!(node.sh(&id, "echo x").await, "x");
        assert_eq!(counts(node, "layers"), [1, 1]);
        node.remove_pods().await;
        node.client.remove_image(&image).await.unwrap();
        assert_eq!(counts(node, "layers"), [0, 0]);
    });
}

/// What people look at counts like a container.
#[test]
fn a_mounted_image_holds_its_snapshotter() {
    const NAME: &str = "a_mounted_image_holds_its_snapshotter";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let view = node.daemon.path("logs/view");
        std::fs::create_dir(&view).unwrap();
        let at = view.display().to_string();
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        assert_eq!(gantryctl.image(&["mount", &image, &at]).0, 0);
        let native = "[images]\nsnapshotter = \"native\"\n";
        let elsewhere = format!("[images]\nroot = {:?}\n", node.daemon.path("logs/images"));
        for (changed, key) in [
            (native, "images.snapshotter: "),
            (&elsewhere, "images.root: "),
        ] {
            node.daemon.terminate().unwrap();
            configure(node, changed);
            let said = fails_to_start(node).await;
            let users = "0 containers and 1 mounted images of this node";
            assert!(said.contains(&format!("{key}{users}")), "{said}");
            configure(node, "");
            node.start_again(&[]).await;
        }
        assert!(view.join("bin/busybox").exists());
        node.daemon.terminate().unwrap();
        nix::mount::umount(&view).unwrap();
        configure(node, native);
        node.start_again(&[]).await;
        assert_eq!(counts(node, "layers"), [0, 0]);
        // Where the first snapshotter is another, images are mounted from that.
        node.busybox().await;
        assert_eq!(gantryctl.image(&["mount", &image, &at]).0, 0);
        assert_eq!(below(node, "views")[1].len(), 1);
        assert_eq!(gantryctl.image(&["unmount", &at]).0, 0);
        assert!(below(node, "views")[1].is_empty());
        std::fs::remove_dir(&view).unwrap();
        node.accept_now();
    });
}
