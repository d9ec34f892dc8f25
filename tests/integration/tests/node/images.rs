//! Images between registry and container.

use gantry_integration::{busybox_image, eventually, on_node, on_plain_node, refused, sleeper};
use gantry_testkit::cri::v1::{
    AuthConfig, FilesystemUsage, ImageFsInfoRequest, ImageSpec, PullImageRequest,
};
use gantry_testkit::daemon::Options;
use gantry_testkit::image::{Compression, ImageBuilder, Layer, Types, index};
use gantry_testkit::registry::Auth;
use tonic::Code;

#[test]
fn a_public_name_is_sent_to_a_mirror_by_hosts_toml() {
    on_plain_node(
        "a_public_name_is_sent_to_a_mirror_by_hosts_toml",
        async |node| {
            let dir = node.daemon.path("certs.d/docker.io");
            std::fs::create_dir_all(&dir).unwrap();
            let url = node.registry.url();
            let text = format!("[host.{url:?}]\ncapabilities = [\"pull\", \"resolve\"]\n");
            std::fs::write(dir.join("hosts.toml"), text).unwrap();
            node.registry.add("library/busybox", "1", busybox_image());
            let id = node.client.pull("busybox:1").await.unwrap();
            assert_eq!(id, busybox_image().id());
            let image = node.client.image(&id).await.unwrap().unwrap();
            assert_eq!(image.repo_tags, ["docker.io/library/busybox:1"]);
            for name in ["busybox:1", "docker.io/library/busybox:1", &id, &id[7..20]] {
                assert!(node.client.image(name).await.unwrap().is_some(), "{name}");
            }
            let pod = node.host_pod("mirrored").await;
            let id = node.run(&pod, &sleeper("c", "busybox:1")).await;
            assert_eq!(
                node.status(&id).await.image.unwrap().image,
                "docker.io/library/busybox:1"
            );
        },
    );
}

#[test]
fn credentials_come_with_the_request() {
    on_plain_node("credentials_come_with_the_request", async |node| {
        node.registry.add("test/private", "1", busybox_image());
        let (user, password) = ("ann".to_owned(), "pass-word-7".to_owned());
        let name = format!("{}/test/private:1", node.registry.host());
        let pull = async |auth: Option<AuthConfig>| {
            let image = Some(ImageSpec {
                image: name.clone(),
                ..Default::default()
            });
            let request = PullImageRequest {
                image,
                auth,
                sandbox_config: None,
            };
            node.client
                .images
                .clone()
                .pull_image(request)
                .await
                .map(drop)
        };
        let given = |password: &str| {
            Some(AuthConfig {
                username: user.clone(),
                password: password.to_owned(),
                ..Default::default()
            })
        };
        let basic = Auth::Basic {
            user: user.clone(),
            password: password.clone(),
        };
        let bearer = Auth::Bearer {
            user: user.clone(),
            password: password.clone(),
            refresh: String::new(),
        };
        for auth in [basic, bearer] {
            node.registry.behave(|behaviour| behaviour.auth = auth);
            assert!(pull(None).await.is_err());
            assert!(pull(given("wrong-word-8")).await.is_err());
            pull(given(&password)).await.unwrap();
            node.client.remove_image(&name).await.unwrap();
        }
        let log = node.daemon.log();
        assert!(!log.contains("pass-word-7") && !log.contains("wrong-word-8"));
    });
}

#[test]
fn layers_of_every_kind_from_an_index() {
    on_plain_node("layers_of_every_kind_from_an_index", async |node| {
        let busybox = busybox_image();
        let layer = |n: &str| {
            Layer::new()
                .dir("d", 0o755)
                .file("d/who", n.as_bytes())
                .file(&format!("d/{n}"), b"")
        };
        let image = ImageBuilder::new()
            .tar(busybox.layers[0].data.clone(), Compression::Zstd)
            .layer(layer("gzip"), Compression::Gzip)
            .layer(layer("zstd").whiteout("d/gzip"), Compression::Zstd)
            .layer(layer("plain"), Compression::Plain)
            .build();
        let other = ImageBuilder::new()
            .platform("linux", "s390x", "")
            .cmd(["other"])
            .build();
        let own = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            arch => arch,
        };
        let platforms = [
            (&other, Some(("linux", "s390x", ""))),
            (&image, Some(("linux", own, ""))),
        ];
        let index = index(&platforms, Types::Oci);
        node.registry.add("test/many", "parts", &image);
        node.registry.add("test/many", "other", &other);
        node.registry.add_manifest("test/many", "1", &index);
        let name = format!("{}/test/many:1", node.registry.host());
        assert_eq!(node.client.pull(&name).await.unwrap(), image.id());
        let pod = node.host_pod("layers").await;
        let id = node.run(&pod, &sleeper("c", &name)).await;
        assert_eq!(node.sh(&id, "cat /d/who").await, "plain");
        assert_eq!(
            node.sh(&id, "ls /d | tr '\\n' ' '").await,
            "plain who zstd "
        );
        let digests = node
            .client
            .image(&name)
            .await
            .unwrap()
            .unwrap()
            .repo_digests;
        let by_index = format!("{}/test/many@{}", node.registry.host(), index.digest);
        assert_eq!(digests, [by_index], "the digest that the tag stands for");
    });
}

#[test]
fn an_image_may_go_before_its_container() {
    on_plain_node("an_image_may_go_before_its_container", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("orphan").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        node.client.remove_image(&image).await.unwrap();
        assert!(node.client.list_images().await.unwrap().is_empty());
        assert_eq!(
            node.sh(&id, "cat /etc/nsswitch.conf").await,
            "hosts: files dns"
        );
        let late = node
            .client
            .create(&pod.id, &sleeper("late", &image), &pod.config)
            .await;
        refused(late, Code::NotFound, &image);
        node.kill_and_start_again().await;
        assert_eq!(
            node.sh(&id, "cat /etc/nsswitch.conf").await,
            "hosts: files dns"
        );
        node.client.remove(&id).await.unwrap();
        let layers = node.daemon.places().root.join("overlayfs/layers");
        eventually("its layers go with it", async || {
            gantry_testkit::leakcheck::names(&layers)
                .is_empty()
                .then_some(())
        })
        .await;
        // And it can come again.
        let image = node.busybox().await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        assert_eq!(node.sh(&id, "echo x").await, "x");
    });
}

/// Images on a file system of their own, as the kubelet's split disk has it.
#[test]
fn images_and_containers_on_two_file_systems() {
    const NAME: &str = "images_and_containers_on_two_file_systems";
    let images = tempfile::tempdir_in("/dev/shm").unwrap();
    let config = format!("[images]\nroot = {:?}\n", images.path());
    on_node(NAME, Options::default().config(&config), async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("split").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        node.sh(&id, "dd if=/dev/zero of=/big bs=1M count=3").await;
        node.kill_and_start_again().await;
        assert_eq!(node.sh(&id, "wc -c < /big").await, "3145728");
        let request = ImageFsInfoRequest {};
        let info = node.client.images.clone().image_fs_info(request).await;
        let info = info.unwrap().into_inner();
        let place = |of: &[FilesystemUsage]| of[0].fs_id.clone().unwrap().mountpoint;
        let own = place(&info.image_filesystems);
        assert!(
            std::path::Path::new(&own).starts_with(images.path()),
            "{own}"
        );
        let others = place(&info.container_filesystems);
        let root = &node.daemon.places().root;
        assert!(std::path::Path::new(&others).starts_with(root), "{others}");
        let used = |of: &[FilesystemUsage]| of[0].used_bytes.unwrap().value;
        assert!(used(&info.image_filesystems) > 1 << 20);
        assert!(used(&info.container_filesystems) > 3 << 20);
        let snapshot = root.join("overlayfs/snapshots").join(&id).join("fs/big");
        assert_eq!(std::fs::metadata(snapshot).unwrap().len(), 3 << 20);
        assert!(!root.join("content").exists() && !root.join("overlayfs/layers").exists());
        node.client.remove(&id).await.unwrap();
        node.client.remove_image(&image).await.unwrap();
        let left = gantry_testkit::leakcheck::names(&images.path().join("overlayfs/layers"));
        assert!(left.is_empty());
    });
}

/// A client that goes away while its removal is written down takes nothing from others.
#[test]
fn a_removal_that_nobody_waits_for_loses_no_other_image() {
    const NAME: &str = "a_removal_that_nobody_waits_for_loses_no_other_image";
    // The first image is written down; its removal takes a while over that.
    let slowly = "images::before-write-down=1*off->1*delay(2000)->off";
    let options = Options::default().env("FAILPOINTS", slowly);
    on_node(NAME, options, async |node| {
        let image = node.busybox().await;
        let removal = node.client.remove_image(&image);
        let given_up = tokio::time::timeout(std::time::Duration::from_millis(300), removal).await;
        assert!(given_up.is_err());
        let layer = Layer::new().file("mark", b"other");
        let other = ImageBuilder::new().layer(layer, Compression::Gzip).build();
        let other = node.pull("other", &other).await;
        for _ in 0..2 {
            assert!(node.client.image(&other).await.unwrap().is_some());
            assert!(node.client.image(&image).await.unwrap().is_none());
            node.daemon.set_env(&[]);
            node.kill_and_start_again().await;
        }
    });
}
