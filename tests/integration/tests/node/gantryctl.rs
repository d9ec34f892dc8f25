//! What gantryctl does for people, seen from both sides.

use gantry_integration::gantryctl::Gantryctl;
use gantry_integration::{busybox_image, on_node, on_plain_node, sleeper};
use gantry_testkit::daemon::Options;
use gantry_testkit::leakcheck::names;

#[test]
fn what_gantryctl_does_to_images_is_seen_by_cri_at_once() {
    const NAME: &str = "what_gantryctl_does_to_images_is_seen_by_cri_at_once";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        let id = busybox_image().id();
        let image = node.busybox().await;
        assert_eq!(gantryctl.image(&["pull", &image]).1, format!("{id}\n"));
        let (code, named, _) = gantryctl.image(&["tag", &id[7..20], "mine:2"]);
        assert_eq!((code, named.as_str()), (0, "docker.io/library/mine:2\n"));
        let found = node.client.image("mine:2").await.unwrap().unwrap();
        assert_eq!((&found.id, found.repo_tags.len()), (&id, 2));
        let (_, json, _) = gantryctl.image(&["inspect", "mine:2"]);
        let facts: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(facts[0]["id"], id.as_str());
        assert_eq!(facts[0]["layers"][0]["unpacked"], true);
        assert_eq!(facts[0]["config"]["os"], "linux");
        let (code, _, said) = gantryctl.image(&["inspect", "none:1"]);
        assert!(code == 1 && said.contains("none:1"), "{said}");

        let archive = node.daemon.path("image.tar").display().to_string();
        gantryctl.image(&["export", "--output", &archive, "mine:2"]);
        assert_eq!(gantryctl.image(&["rm", "mine:2"]).1, format!("{id}\n"));
        assert!(
            node.client.list_images().await.unwrap().is_empty(),
            "all names go"
        );
        let (code, _, said) = gantryctl.image(&["rm", "mine:2"]);
        assert!(code == 1 && said.contains("not found"), "{said}");

        // Fetched only: listed, and unpacked by the first container.
        gantryctl.image(&["import", "--no-unpack", &archive]);
        assert_eq!(node.client.list_images().await.unwrap()[0].id, id);
        let layers = node.daemon.places().root.join("overlayfs/layers");
        assert!(names(&layers).is_empty());
        node.kill_and_start_again().await;
        let pod = node.host_pod("late").await;
        let container = node.run(&pod, &sleeper("c", "mine:2")).await;
        assert_eq!(node.sh(&container, "echo x").await, "x");
        assert_eq!(names(&layers).len(), 1);
    });
}

#[test]
fn damage_is_told_and_repaired_by_gantryctl() {
    const NAME: &str = "damage_is_told_and_repaired_by_gantryctl";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        let image = node.busybox().await;
        let (code, said, _) = gantryctl.image(&["verify"]);
        assert!(code == 0 && said.starts_with("good: sha256:"), "{said}");
        let root = &node.daemon.places().root;
        let digest = &busybox_image().layers[0].digest;
        let blob = root.join("content/blobs/sha256").join(digest.hex());
        std::fs::write(&blob, "rubbish").unwrap();
        let (code, said, _) = gantryctl.image(&["verify", &image]);
        assert!(code == 2 && said.starts_with("BAD"), "{said}");
        assert!(said.contains("its 7 bytes have another digest"), "{said}");
        let (code, said, _) = gantryctl.image(&["verify", "--repair", &image]);
        assert!(code == 0 && said.starts_with("repaired"), "{said}");

        let layers = root.join("overlayfs/layers");
        let layer = || layers.join(&names(&layers)[0]);
        std::fs::write(layer().join("fs/etc/passwd"), "").unwrap();
        let pod = node.host_pod("on-it").await;
        let container = node.run(&pod, &sleeper("c", &image)).await;
        let (code, said, _) = gantryctl.image(&["verify", "--repair"]);
        assert!(
            code == 2 && said.contains("containers stand on it"),
            "{said}"
        );
        let (_, said, _) = gantryctl.image(&["gc", "--dry-run"]);
        assert!(said.contains(&format!("container {container}")), "{said}");
        assert!(said.ends_with("0 of 4 with 0 bytes would go\n"), "{said}");
        node.client.remove(&container).await.unwrap();
        let (code, said, _) = gantryctl.image(&["verify", "--repair"]);
        assert!(code == 0 && said.contains("\"/etc/passwd\""), "{said}");
        assert_eq!(gantryctl.image(&["verify"]).0, 0);
        let container = node.run(&pod, &sleeper("again", &image)).await;
        assert!(
            node.sh(&container, "cat /etc/passwd")
                .await
                .starts_with("root:")
        );
        assert_eq!(gantryctl.image(&["verify", "none:1"]).0, 1);
    });
}

/// What is exported by one node runs on another; by file, and from one program to the next.
#[test]
fn an_exported_image_is_imported_and_runs() {
    const NAME: &str = "an_exported_image_is_imported_and_runs";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        let image = node.busybox().await;
        let archive = node.daemon.path("image.tar").display().to_string();
        assert_eq!(
            gantryctl.image(&["export", "--output", &archive, &image]).0,
            0
        );
        let piped = gantryctl.feed(&["image", "export", &image], Vec::new());
        assert_eq!(piped.stdout, std::fs::read(&archive).unwrap());
        for from in [archive.as_str(), "-"] {
            node.client.remove_image(&image).await.unwrap();
            assert!(!gantryctl.image(&["list"]).1.contains("test/"));
            let input = match from {
                "-" => piped.stdout.clone(),
                _ => Vec::new(),
            };
            let imported = gantryctl.feed(&["image", "import", from], input);
            assert!(imported.status.success(), "{imported:?}");
            assert!(gantryctl.image(&["list"]).1.contains("test/busybox"));
            let listed = node.client.list_images().await.unwrap();
            assert_eq!(listed[0].id, busybox_image().id());
        }
        let pod = node.host_pod("imported").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        assert_eq!(node.sh(&id, "echo x").await, "x");
        // What is there stays until the new archive is whole, and what is no file stays.
        let before = std::fs::read(&archive).unwrap();
        assert_ne!(
            gantryctl
                .image(&["export", "--output", &archive, "none:1"])
                .0,
            0
        );
        assert_eq!(std::fs::read(&archive).unwrap(), before);
        let pipe = node.daemon.path("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            // Less than all of it: the rest cannot be written.
            move || std::io::Read::read(&mut std::fs::File::open(pipe).unwrap(), &mut [0; 512])
        });
        let to_pipe = pipe.to_str().unwrap();
        assert_eq!(gantryctl.image(&["export", "-o", to_pipe, &image]).0, 1);
        assert_eq!(reader.join().unwrap().unwrap(), 512);
        assert!(pipe.exists());
        // An archive that is cut short, and what is none.
        for (input, why) in [
            (piped.stdout[..5000].to_vec(), "archive"),
            (b"text".to_vec(), ""),
        ] {
            let refused = gantryctl.feed(&["image", "import", "-"], input);
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(!refused.status.success() && said.contains(why), "{said}");
        }
    });
}

/// An image that is mounted for people keeps its layers, whatever becomes of it and of the daemon.
#[test]
fn a_mounted_image_stays_until_it_is_unmounted() {
    const NAME: &str = "a_mounted_image_stays_until_it_is_unmounted";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        let image = node.busybox().await;
        let (view, other) = (node.daemon.path("a view"), node.daemon.path("other"));
        let [at, elsewhere] = [&view, &other].map(|path| path.to_str().unwrap().to_owned());
        let refused = |args: &[&str], why: &str| {
            let (code, _, said) = gantryctl.image(args);
            assert!(code == 1 && said.contains(why), "{args:?}: {said}");
        };
        refused(&["mount", &image, &at], "does not exist");
        std::fs::create_dir(&view).unwrap();
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join("file"), "").unwrap();
        refused(&["mount", "none:1", &at], "not found");
        refused(
            &["mount", &image, &format!("{elsewhere}/file")],
            "is not a directory",
        );
        let own = node.daemon.places().root.join("content");
        refused(&["mount", &image, own.to_str().unwrap()], "gantry's own");
        let above = node.daemon.places().root.parent().unwrap();
        refused(&["mount", &image, above.to_str().unwrap()], "or above it");
        refused(&["mount", &image, "/proc"], "something is mounted there");
        refused(&["unmount", &at], "not found");

        let (code, id, said) = gantryctl.image(&["mount", &image, &at]);
        assert_eq!(
            (code, id.trim()),
            (0, busybox_image().id().as_str()),
            "{said}"
        );
        let shell = view.join("bin/busybox");
        let size = std::fs::metadata(&shell).unwrap().len();
        let written = std::fs::write(view.join("x"), "").unwrap_err();
        assert_eq!(written.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        refused(&["mount", &image, &at], "something is mounted there");
        let (_, json, _) = gantryctl.image(&["inspect", &image]);
        let facts: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(
            facts[0]["usedBy"],
            serde_json::json!([format!("mount {at}")])
        );

        // Twice: the image goes, the daemon is killed, and collection is run.
        let layers = node.daemon.places().root.join("overlayfs/layers");
        node.client.remove_image(&image).await.unwrap();
        for _ in 0..2 {
            let (_, said, _) = gantryctl.image(&["gc", "--dry-run"]);
            assert!(said.contains(&format!("mount {at}")), "{said}");
            gantryctl.image(&["gc"]);
            assert_eq!(std::fs::read(&shell).unwrap().len() as u64, size);
            node.kill_and_start_again().await;
        }
        let (code, _, said) = gantryctl.image(&["unmount", &at]);
        assert_eq!(code, 0, "{said}");
        assert!(!shell.exists() && names(&layers).is_empty());

        // What somebody else mounts there, over the view or in its place, stays.
        node.busybox().await;
        assert_eq!(gantryctl.image(&["mount", &image, &at]).0, 0);
        let tmpfs = || {
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("t"), &view, Some("tmpfs"), flags, None::<&str>).unwrap();
            std::fs::write(view.join("theirs"), "").unwrap();
            refused(&["unmount", &at], "something else is mounted there");
            assert!(view.join("theirs").exists());
            nix::mount::umount(&view).unwrap();
        };
        tmpfs();
        assert!(shell.exists());
        nix::mount::umount(&view).unwrap();
        tmpfs();
        assert_eq!(gantryctl.image(&["unmount", &at]).0, 0);

        // By somebody who does not know of us.
        node.busybox().await;
        assert_eq!(gantryctl.image(&["mount", &image, &at]).0, 0);
        node.client.remove_image(&image).await.unwrap();
        nix::mount::umount(&view).unwrap();
        gantryctl.image(&["gc"]);
        assert!(names(&layers).is_empty());
        assert_eq!(gantryctl.image(&["unmount", &at]).0, 0, "it is known still");
        refused(&["unmount", &at], "not found");
    });
}

/// The bar on a terminal, and nothing of it where there is none.
#[test]
fn a_pull_shows_on_a_terminal_how_far_it_is() {
    const NAME: &str = "a_pull_shows_on_a_terminal_how_far_it_is";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    let slowly = "[images]\nbandwidth_bytes_per_second = 1000000\n";
    let options = Options::default().config(slowly);
    on_node(NAME, options, async |node| {
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        node.registry.add("test/busybox", "1", busybox_image());
        let image = format!("{}/test/busybox:1", node.registry.host());
        let terminal = gantryctl.terminal(&["image", "pull", &image]);
        let (succeeded, shown) = terminal.finish();
        assert!(succeeded && shown.contains("MB of "), "{shown:?}");
        assert!(
            shown.trim_end().ends_with(&busybox_image().id()),
            "{shown:?}"
        );
        let (code, said, noise) = gantryctl.image(&["pull", &image]);
        assert_eq!((code, said.trim()), (0, busybox_image().id().as_str()));
        assert_eq!(noise, "");
        let (code, _, said) = gantryctl.image(&["pull", "localhost:1/none:1"]);
        assert!(code == 1 && said.contains("localhost:1"), "{said}");
    });
}
