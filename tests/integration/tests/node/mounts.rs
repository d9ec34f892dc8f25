//! What is mounted into containers: paths of the host, volumes of images, images.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use gantry_cri_api::v1 as cri;
use gantry_integration::{Node, Pod, busybox_image, on_plain_node, refused, sleeper, young};
use gantry_testkit::cri::security;
use gantry_testkit::cri::v1::{ContainerConfig, Mount, MountPropagation};
use gantry_testkit::image::{Compression, Image, ImageBuilder, Layer};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use tonic::Code;

fn bind(host: &Path, container: &str) -> Mount {
    Mount {
        container_path: container.to_owned(),
        host_path: host.display().to_string(),
        ..Default::default()
    }
}

/// busybox with another layer and configuration.
fn busybox_and(layer: Layer, volumes: &[&str]) -> Image {
    let volumes: serde_json::Map<_, _> = volumes
        .iter()
        .map(|volume| ((*volume).to_owned(), json!({})))
        .collect();
    ImageBuilder::new()
        .tar(busybox_image().layers[0].data.clone(), Compression::Plain)
        .layer(layer, Compression::Gzip)
        .config("Env", json!(["PATH=/bin"]))
        .config("Volumes", json!(volumes))
        .cmd(["sh"])
        .build()
}

/// A mount of the host that is taken off again.
struct HostMount(PathBuf);

impl HostMount {
    fn tmpfs(point: &Path, propagation: MsFlags) -> Self {
        std::fs::create_dir_all(point).unwrap();
        let none = None::<&str>;
        mount(Some("t"), point, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        mount(none, point, none, propagation, none).unwrap();
        Self(point.to_owned())
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

async fn create(node: &Node, pod: &Pod, config: &ContainerConfig) -> Result<String, tonic::Status> {
    node.client.create(&pod.id, config, &pod.config).await
}

/// `written` or `refused`, as writing to a file in the container goes.
async fn write(node: &Node, id: &str, path: &str) -> String {
    let script =
        format!("if (echo x > {path}) 2>/dev/null; then echo written; else echo refused; fi");
    node.sh(id, &script).await
}

#[test]
fn sources_of_the_host() {
    on_plain_node("sources_of_the_host", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("sources").await;
        let volumes = node.daemon.path("volumes");
        std::fs::create_dir_all(volumes.join("real")).unwrap();
        symlink("real", volumes.join("link")).unwrap();
        std::fs::write(volumes.join("file"), "one file").unwrap();
        symlink(volumes.join("file"), volumes.join("link-to-file")).unwrap();

        let mut config = sleeper("c", &image);
        config.mounts = vec![
            bind(&volumes.join("link"), "/link"),
            bind(&volumes.join("link-to-file"), "/etc/one"),
            bind(&volumes.join("link/made/below"), "/made"),
            bind(&volumes.join("hidden"), "/twice"),
            bind(&volumes.join("seen"), "/x/../twice"),
        ];
        let id = node.run(&pod, &config).await;
        node.sh(
            &id,
            "echo 1 > /link/new; echo 2 > /made/new; echo 3 > /twice/new",
        )
        .await;
        assert_eq!(node.sh(&id, "cat /etc/one").await, "one file");
        for made in ["real/new", "real/made/below/new", "seen/new"] {
            assert!(volumes.join(made).exists(), "{made}");
        }
        assert!(!volumes.join("hidden/new").exists());
        let made = std::fs::metadata(volumes.join("real/made")).unwrap();
        assert_eq!(
            made.permissions().mode() & 0o7777,
            0o755,
            "whatever our umask"
        );
        assert_eq!(
            node.status(&id).await.mounts,
            config.mounts,
            "echoed exactly"
        );

        // Nothing of a pod's is made among our own directories, and nothing propagates there.
        let places = node.daemon.places().clone();
        symlink(&places.root, volumes.join("to-root")).unwrap();
        for missing in [
            places.root.join("overlayfs/layers/new"),
            places.state.join("pods/new"),
            volumes.join("to-root/store/new"),
        ] {
            let mut config = sleeper("ours", &image);
            config.mounts = vec![bind(&missing, "/data")];
            let answer = create(node, &pod, &config).await;
            refused(answer, Code::InvalidArgument, "mounts[/data].host_path");
            assert!(!missing.exists(), "{}", missing.display());
        }
        let mut config = sleeper("back", &image);
        config.mounts = vec![Mount {
            propagation: MountPropagation::PropagationBidirectional.into(),
            ..bind(&places.state, "/data")
        }];
        let answer = create(node, &pod, &config).await;
        refused(answer, Code::InvalidArgument, "cannot propagate");
        // Reading there is the node agents' right: their pods name the socket.
        let mut config = sleeper("agent", &image);
        config.mounts = vec![bind(node.daemon.socket(), "/gantry.sock")];
        let id = node.run(&pod, &config).await;
        node.sh(&id, "test -S /gantry.sock").await;

        for (host, container, says) in [
            ("", "/data", "host_path"),
            ("relative", "/data", "host_path"),
            ("/tmp", "relative", "mounts[relative]"),
            ("/tmp", "/", "mounts[/]"),
            ("/tmp", "/a/../..", "mounts[/a/../..]"),
        ] {
            let mut config = sleeper("bad", &image);
            config.mounts = vec![bind(Path::new(host), container)];
            refused(
                create(node, &pod, &config).await,
                Code::InvalidArgument,
                says,
            );
        }
    });
}

#[test]
fn mounts_propagate_as_asked() {
    on_plain_node("mounts_propagate_as_asked", async |node| {
        let image = node.busybox().await;
        let mut config = node.pod_config("propagation");
        let security_context = config.linux.get_or_insert_default();
        security_context
            .security_context
            .get_or_insert_default()
            .privileged = true;
        let pod = node.run_pod(&config).await;
        let dir = node.daemon.path("propagation");
        let shared = HostMount::tmpfs(&dir.join("shared"), MsFlags::MS_SHARED);
        let private = HostMount::tmpfs(&dir.join("private"), MsFlags::MS_PRIVATE);
        let from_host = dir.join("shared/from-host");
        for below in ["from-host", "from-container"] {
            std::fs::create_dir(shared.0.join(below)).unwrap();
        }
        let with = |name: &str, propagation: MountPropagation, host: &Path| {
            let mut config = sleeper(name, &image);
            config.mounts = vec![Mount {
                propagation: propagation.into(),
                ..bind(host, "/data")
            }];
            security(&mut config).privileged = true;
            config
        };
        use MountPropagation::{
            PropagationBidirectional as Both, PropagationHostToContainer as ToContainer,
            PropagationPrivate as Private,
        };
        let run = async |name: &str, propagation| {
            node.run(&pod, &with(name, propagation, &shared.0)).await
        };
        let closed = run("private", Private).await;
        let slave = run("slave", ToContainer).await;
        let both = run("both", Both).await;

        let late = HostMount::tmpfs(&from_host, MsFlags::MS_SHARED);
        std::fs::write(late.0.join("seen"), "").unwrap();
        let seen = "test -e /data/from-host/seen && echo seen || echo hidden";
        assert_eq!(node.sh(&closed, seen).await, "hidden");
        assert_eq!(node.sh(&slave, seen).await, "seen");
        assert_eq!(node.sh(&both, seen).await, "seen");
        drop(late);

        let mount_below =
            "mount -t tmpfs t /data/from-container && touch /data/from-container/seen";
        let appeared = || dir.join("shared/from-container/seen").exists();
        for id in [&closed, &slave] {
            node.sh(id, mount_below).await;
            assert!(!appeared());
        }
        node.sh(&both, mount_below).await;
        assert!(appeared());
        node.sh(&both, "umount /data/from-container").await;

        // A mount that cannot propagate is named, and nothing is left of the attempt.
        let point = private.0.display().to_string();
        let below = private.0.join("below");
        for (name, propagation) in [("to", ToContainer), ("back", Both)] {
            let config = with(name, propagation, &below);
            let answer = create(node, &pod, &config).await;
            refused(
                answer,
                Code::FailedPrecondition,
                &format!("mount at {point},"),
            );
        }
        assert_eq!(node.client.list(None).await.unwrap().len(), 3);
        for id in [closed, slave, both] {
            node.client.remove(&id).await.unwrap();
        }
    });
}

#[test]
fn read_only_may_reach_what_is_mounted_below() {
    on_plain_node("read_only_may_reach_what_is_mounted_below", async |node| {
        let status = node.client.node_status(false).await.unwrap();
        let features = status.runtime_handlers[0].features.unwrap();
        let image = node.busybox().await;
        let pod = node.host_pod("rro").await;
        let dir = node.daemon.path("rro");
        let _below = HostMount::tmpfs(&dir.join("below"), MsFlags::MS_PRIVATE);
        let with = |name: &str, recursive_read_only: bool| {
            let mut config = sleeper(name, &image);
            config.mounts = vec![Mount {
                readonly: true,
                recursive_read_only,
                ..bind(&dir, "/data")
            }];
            config
        };
        let plain = node.run(&pod, &with("plain", false)).await;
        assert_eq!(write(node, &plain, "/data/x").await, "refused");
        assert_eq!(write(node, &plain, "/data/below/x").await, "written");
        let recursive = with("recursive", true);
        if features.recursive_read_only_mounts {
            let id = node.run(&pod, &recursive).await;
            assert_eq!(write(node, &id, "/data/x").await, "refused");
            assert_eq!(write(node, &id, "/data/below/x").await, "refused");
            assert!(node.status(&id).await.mounts[0].recursive_read_only);
        } else {
            refused(
                create(node, &pod, &recursive).await,
                Code::Unknown,
                "RROUnsupported",
            );
        }
        for bad in [
            Mount {
                readonly: false,
                ..recursive.mounts[0].clone()
            },
            Mount {
                propagation: MountPropagation::PropagationHostToContainer.into(),
                ..recursive.mounts[0].clone()
            },
        ] {
            let mut config = sleeper("bad", &image);
            config.mounts = vec![bad];
            let answer = create(node, &pod, &config).await;
            assert_ne!(answer.unwrap_err().code(), Code::Unknown);
        }
        node.remove_pods().await;
    });
}

#[test]
fn image_volumes_are_the_containers_own() {
    on_plain_node("image_volumes_are_the_containers_own", async |node| {
        let mut header = Layer::header(tar::EntryType::Directory, 0o1750, 0);
        header.set_uid(33);
        header.set_gid(44);
        let layer = Layer::new()
            .raw(header, b"data/", b"", b"")
            .file_mode("data/file", b"from the image", 0o640)
            .symlink("data/link", "/etc/passwd")
            .dir("other", 0o755);
        let image = busybox_and(layer, &["/data", "/new/deep", "/other", "/data/"]);
        let image = node.pull("volumes", &image).await;
        let pod = node.host_pod("volumes").await;
        let own = node.daemon.path("own");
        let mut config = sleeper("first", &image);
        security(&mut config).readonly_rootfs = true;
        config.mounts = vec![bind(&own, "/other")];
        let first = node.run(&pod, &config).await;
        let second = node.run(&pod, &sleeper("second", &image)).await;
        for id in [&first, &second] {
            assert_eq!(node.sh(id, "stat -c %u:%g:%a /data").await, "33:44:1750");
            let file = node.sh(id, "stat -c %a /data/file; cat /data/file").await;
            assert_eq!(file, "640\nfrom the image");
            assert_eq!(node.sh(id, "readlink /data/link").await, "/etc/passwd");
            assert_eq!(node.sh(id, "stat -c %u:%a /new/deep").await, "0:755");
        }
        // Writable where the root is not, and not shared.
        assert_eq!(write(node, &first, "/in-root").await, "refused");
        for path in ["/data/file", "/new/deep/x", "/other/x"] {
            assert_eq!(write(node, &first, path).await, "written", "{path}");
        }
        assert_eq!(
            node.sh(&second, "cat /data/file; ls /new/deep /other")
                .await,
            "from the image/new/deep:\n\n/other:"
        );
        assert!(own.join("x").exists(), "the mount that was asked for wins");

        // They outlive daemon and process, and go with the container.
        node.kill_and_start_again().await;
        assert_eq!(node.sh(&first, "cat /data/file").await, "x");
        let snapshots = node.daemon.places().root.join("overlayfs/snapshots");
        assert!(snapshots.join(&first).join("volumes").is_dir());
        node.client.stop(&first, 0).await.unwrap();
        assert!(snapshots.join(&first).join("volumes").is_dir());
        node.client.remove(&first).await.unwrap();
        assert!(!snapshots.join(&first).exists());
        node.sh(&second, "test -e /data/file").await;
    });
}

#[test]
fn cve_2022_23648_image_volumes_show_nothing_of_the_host() {
    on_plain_node(
        "cve_2022_23648_image_volumes_show_nothing_of_the_host",
        async |node| {
            // CVE-2022-23648.
            let canary = node.daemon.path("canary");
            std::fs::create_dir(&canary).unwrap();
            std::fs::write(canary.join("secret"), "host").unwrap();
            let up = format!("/../../../../../../../../..{}", canary.display());
            let layer = Layer::new()
                .symlink("absolute", &canary.display().to_string())
                .symlink("relative", up.trim_start_matches('/'))
                .symlink("magic", &format!("/proc/1/root{}", canary.display()));
            let image = busybox_and(layer, &[&up, "/absolute", "/relative", "/magic"]);
            let image = node.pull("traversal", &image).await;
            let pod = node.host_pod("traversal").await;
            let answer = create(node, &pod, &sleeper("c", &image)).await;
            // The runtime may refuse to mount at such links; what it mounts holds nothing.
            if let Ok(id) = answer
                && node.client.start(&id).await.is_ok()
            {
                let found = node
                    .sh(
                        &id,
                        "find / -xdev -name secret; ls -R /absolute/ /relative/",
                    )
                    .await;
                assert!(!found.contains("secret"), "{found}");
            }
            let volumes = node.daemon.places().root.join("overlayfs/snapshots");
            let copies = walk(&volumes);
            assert!(
                !copies.iter().any(|path| path.ends_with("secret")),
                "{copies:?}"
            );
            let names = gantry_testkit::leakcheck::names(&canary);
            assert_eq!(names, ["secret"], "nothing was made on the host");

            let file = busybox_and(Layer::new().file("a-file", b""), &["/a-file"]);
            let file = node.pull("file", &file).await;
            let answer = create(node, &pod, &sleeper("file", &file)).await;
            refused(answer, Code::InvalidArgument, "Volumes");
        },
    );
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(walk(&entry.path()));
        }
        found.push(entry.path());
    }
    found
}

#[test]
fn cve_2024_5154_and_cve_2021_30465_targets_that_are_links_stay_in_the_root() {
    on_plain_node(
        "cve_2024_5154_and_cve_2021_30465_targets_that_are_links_stay_in_the_root",
        async |node| {
            // CVE-2024-5154, CVE-2021-30465, CVE-2026-41579: whatever the image has where something is
            // mounted, nothing is made or changed on the host.
            let canary = node.daemon.path("canary");
            std::fs::create_dir(&canary).unwrap();
            std::fs::write(canary.join("file"), "host").unwrap();
            let to = |below: &str| canary.join(below).display().to_string();
            let layer = Layer::new()
                .symlink("dev", &to("dev"))
                .symlink("etc/mtab", &to("mtab"))
                .symlink("etc/resolv.conf", &to("resolv"))
                .symlink("etc/hosts", &to("hosts"))
                .symlink("etc/hostname", &to("hostname"))
                .symlink("mount", &to("mount"))
                .symlink("file", &to("file"));
            let image = busybox_and(layer, &[]);
            let image = node.pull("links", &image).await;
            let pod = node.host_pod("links").await;
            let volume = node.daemon.path("volume");
            std::fs::create_dir(&volume).unwrap();
            std::fs::write(volume.join("file"), "volume").unwrap();
            let mut config = sleeper("c", &image);
            config.mounts = vec![bind(&volume, "/mount"), bind(&volume.join("file"), "/file")];
            let id = node.create(&pod, &config).await;
            let started = node.client.start(&id).await;
            let mut names = gantry_testkit::leakcheck::names(&canary);
            names.sort();
            assert_eq!(names, ["file"]);
            assert_eq!(
                std::fs::read_to_string(canary.join("file")).unwrap(),
                "host"
            );
            started.expect("the links lead to places within the root");
            assert_eq!(node.sh(&id, "cat /file; ls /mount").await, "volumefile");
            assert_eq!(
                node.sh(
                    &id,
                    "test -d /dev -a ! -L /dev && test -c /dev/null && echo own"
                )
                .await,
                "own"
            );
        },
    );
}

/// An image with a model in it, in two layers.
fn models(marker: &str) -> Image {
    let base = Layer::new()
        .dir("models", 0o755)
        .file("models/old", b"old")
        .file("models/model", marker.as_bytes())
        .symlink("inside", "models")
        .symlink("outside", "/../../../../../../etc");
    let top = Layer::new()
        .whiteout("models/old")
        .file_mode("bin/run", b"#!", 0o755);
    ImageBuilder::new()
        .layer(base, Compression::Gzip)
        .layer(top, Compression::Gzip)
        .build()
}

fn image_mount(image: &str, container: &str, sub_path: &str) -> cri::Mount {
    cri::Mount {
        container_path: container.to_owned(),
        readonly: true,
        image: Some(cri::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        }),
        image_sub_path: sub_path.to_owned(),
        ..Default::default()
    }
}

fn with_mounts(config: &ContainerConfig, mounts: Vec<cri::Mount>) -> cri::ContainerConfig {
    let mut config: cri::ContainerConfig = young::same(config);
    config.mounts = mounts;
    config
}

async fn run(node: &Node, pod: &Pod, config: &cri::ContainerConfig) -> String {
    let id = node.create_young(pod, config).await.unwrap();
    node.client.start(&id).await.unwrap();
    id
}

#[test]
fn images_are_mounted_to_be_read() {
    on_plain_node("images_are_mounted_to_be_read", async |node| {
        let image = node.busybox().await;
        let models = models("images_are_mounted_to_be_read");
        let id_of_models = models.id();
        let name = node.pull("models", &models).await;
        let mut config = node.pod_config("models");
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
        let pod = node.run_pod(&config).await;
        let mut config = sleeper("first", &image);
        security(&mut config).privileged = true;
        let mounts = vec![
            image_mount(&id_of_models, "/all", ""),
            image_mount(&name, "/part", "inside"),
        ];
        let mut config = with_mounts(&config, mounts);
        let first = run(node, &pod, &config).await;
        config.metadata.as_mut().unwrap().name = "second".to_owned();
        let second = run(node, &pod, &config).await;
        for id in [&first, &second] {
            let found = node
                .sh(id, "cat /all/models/model /part/model; ls /part")
                .await;
            assert_eq!(
                found,
                "images_are_mounted_to_be_readimages_are_mounted_to_be_readmodel"
            );
        }
        // Not even for one who may change mounts: the layers are everybody's.
        assert_eq!(write(node, &first, "/all/new").await, "refused");
        node.sh(&first, "mount -o remount,bind,rw /all || true")
            .await;
        assert_eq!(write(node, &first, "/all/new").await, "refused");

        let mounts = node.status_young(&first).await.mounts;
        let refs: Vec<_> = mounts
            .iter()
            .map(|mount| mount.image.as_ref().unwrap().image_ref.as_str())
            .collect();
        assert_eq!(refs, [&id_of_models, &id_of_models]);
        assert_eq!(mounts[1].image_sub_path, "inside");
        assert!(mounts.iter().all(|mount| mount.host_path.is_empty()));

        // The image may go: what is mounted stays, through restarts and collections.
        node.client.remove_image(&name).await.unwrap();
        assert!(node.client.image(&name).await.unwrap().is_none());
        node.kill_and_start_again().await;
        node.client.stop(&second, 0).await.unwrap();
        node.client.remove(&second).await.unwrap();
        assert_eq!(
            node.sh(&first, "cat /all/models/model").await,
            "images_are_mounted_to_be_read"
        );
        let layers = node.daemon.places().root.join("overlayfs/layers");
        let count = || gantry_testkit::leakcheck::names(&layers).len();
        assert_eq!(count(), 3, "busybox and two of the image's");
        node.client.remove(&first).await.unwrap();
        gantry_integration::eventually("its layers go with the last container", async || {
            (count() == 1).then_some(())
        })
        .await;
    });
}

#[test]
fn images_that_cannot_be_mounted() {
    on_plain_node("images_that_cannot_be_mounted", async |node| {
        let image = node.busybox().await;
        let name = node.pull("models", &models("x")).await;
        let pod = node.host_pod("bad-models").await;
        let try_with = async |mount: cri::Mount| {
            node.create_young(&pod, &with_mounts(&sleeper("c", &image), vec![mount]))
                .await
        };
        // The kubelet reads the first word.
        for (mount, says) in [
            (
                image_mount("no.such/image:1", "/data", ""),
                "no.such/image:1",
            ),
            (image_mount(&name, "/data", "absent"), "does not exist"),
            (image_mount(&name, "/data", "models/old"), "does not exist"),
            (image_mount(&name, "/data", "bin/run"), "not a directory"),
            // Neither way leads out of the image, which has no /etc.
            (image_mount(&name, "/data", "outside"), "does not exist"),
            (
                image_mount(&name, "/data", "../../../etc"),
                "does not exist",
            ),
        ] {
            let error = try_with(mount).await.unwrap_err();
            assert_eq!(error.code(), Code::Unknown, "{error:?}");
            assert!(
                error.message().starts_with("ImageVolumeMountFailed: "),
                "{error:?}"
            );
            assert!(error.message().contains(says), "{error:?}");
        }
        let writable = cri::Mount {
            readonly: false,
            ..image_mount(&name, "/data", "")
        };
        refused(try_with(writable).await, Code::InvalidArgument, "read-only");
        let both = cri::Mount {
            host_path: "/tmp".to_owned(),
            ..image_mount(&name, "/data", "")
        };
        refused(try_with(both).await, Code::InvalidArgument, "host_path");
        assert!(node.client.list(None).await.unwrap().is_empty());
        let id = try_with(image_mount(&name, "/data", "models/"))
            .await
            .unwrap();
        node.client.start(&id).await.unwrap();
        assert_eq!(node.sh(&id, "cat /data/model").await, "x");
    });
}

#[test]
fn mounted_images_after_a_reboot() {
    on_plain_node("mounted_images_after_a_reboot", async |node| {
        let image = node.busybox().await;
        let name = node.pull("models", &models("reboot")).await;
        let pod = node.host_pod("reboot").await;
        let mounts = vec![image_mount(&name, "/data", "")];
        let config = with_mounts(&sleeper("c", &image), mounts);
        let id = run(node, &pod, &config).await;
        node.reboot().await;
        let status = node.status_young(&id).await;
        assert_eq!(status.state(), cri::ContainerState::ContainerExited);
        assert!(
            !status.mounts[0]
                .image
                .as_ref()
                .unwrap()
                .image_ref
                .is_empty()
        );
        node.client.remove(&id).await.unwrap();
        node.client.remove_pod(&pod.id).await.unwrap();
        let pod = node.host_pod("again").await;
        let id = run(node, &pod, &config).await;
        assert_eq!(node.sh(&id, "cat /data/models/model").await, "reboot");
        node.remove_pods().await;
        node.assert_clean_but_daemon();
        node.accept_now();
        assert!(
            std::fs::metadata(node.daemon.places().root.join("overlayfs"))
                .unwrap()
                .mode()
                & 0o077
                == 0
        );
    });
}
