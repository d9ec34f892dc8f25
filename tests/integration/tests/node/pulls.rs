//! Pulls that are cut short: by a kill, a failing step, a caller that leaves.

use std::time::Duration;

use gantry_integration::{
    Node, busybox_image, eventually, on_failing_node, on_node, on_plain_node, sleeper,
};
use gantry_testkit::cri::Client;
use gantry_testkit::daemon::Options;
use gantry_testkit::image::{Compression, ImageBuilder, Layer};

/// Every stage of a pull, in order.
const STAGES: [&str; 8] = [
    "pull::after-resolve",
    "pull::mid-download",
    "pull::mid-unpack",
    "pull::after-blob",
    "pull::before-sync",
    "pull::after-layers",
    "pull::before-record",
    "pull::after-blob-rename",
];

/// What is below the daemon's root in a directory that is for work under way.
fn under_way(node: &Node) -> Vec<String> {
    let root = &node.daemon.places().root;
    let mut found = Vec::new();
    for dir in ["content/ingest", "overlayfs/stages", "overlayfs/trash"] {
        for entry in std::fs::read_dir(root.join(dir)).unwrap() {
            let name = entry.unwrap().file_name();
            found.push(format!("{dir}/{}", name.to_string_lossy()));
        }
    }
    found
}

/// Whether a part of a blob has been written that is worth going on from.
fn some_of_a_blob(node: &Node) -> bool {
    let ingest = node.daemon.places().root.join("content/ingest");
    let entries = std::fs::read_dir(ingest).unwrap().flatten();
    // It may be gone again.
    let mut files = entries.filter_map(|entry| entry.metadata().ok());
    files.any(|file| file.len() > 128 << 10)
}

/// Whether the daemon has the part of a blob open.
fn is_writing(node: &Node) -> bool {
    let open = gantry_testkit::leakcheck::descriptors(node.daemon.pid().unwrap());
    open.iter().any(|descriptor| descriptor.contains(".part"))
}

/// The daemon is killed at `stage`; the next pull completes and nothing of the first is left.
async fn killed(node: &mut Node, stage: &str) {
    node.registry.add("test/cut", "1", busybox_image());
    let name = format!("{}/test/cut:1", node.registry.host());
    assert!(node.client.pull(&name).await.is_err(), "{stage}");
    node.daemon.wait_ended().await.unwrap();
    node.start_again(&[]).await;
    // The daemon may have been killed when all was durable but the record; never before.
    if let Some(image) = node.client.image(&name).await.unwrap() {
        panic!("{stage}: {image:?} was never acknowledged");
    }
    // Layers that no image needs are collected behind the start.
    eventually("only parts of blobs are left", async || {
        let parts = |name: &String| name.starts_with("content/ingest/") && name.ends_with(".part");
        under_way(node).iter().all(parts).then_some(())
    })
    .await;

    let id = node.client.pull(&name).await.unwrap();
    assert_eq!(id, busybox_image().id(), "{stage}");
    assert_eq!(under_way(node), [""; 0], "{stage}");
    let pod = node.host_pod("after").await;
    let container = node.run(&pod, &sleeper("c", &name)).await;
    assert_eq!(node.sh(&container, "echo x").await, "x", "{stage}");
    node.remove_pods().await;
    node.client.remove_image(&name).await.unwrap();
    let root = &node.daemon.places().root;
    let count = |dir: &str| std::fs::read_dir(root.join(dir)).unwrap().count();
    assert_eq!(
        (count("content/blobs/sha256"), count("overlayfs/layers")),
        (0, 0),
        "{stage}"
    );
}

macro_rules! killed_in_a_pull {
    ($($name:ident: $stage:literal, $action:literal;)*) => {
        $(
            #[test]
            fn $name() {
                let failpoints = concat!($stage, "=", $action);
                on_failing_node(stringify!($name), failpoints, async |node| {
                    assert!(STAGES.contains(&$stage));
                    killed(node, $stage).await;
                });
            }
        )*
    };
}

killed_in_a_pull! {
    killed_after_a_pull_has_resolved: "pull::after-resolve", "return(kill)";
    // The configuration and the manifest are written before.
    killed_in_mid_download: "pull::mid-download", "2*off->return(kill)";
    killed_in_mid_unpack: "pull::mid-unpack", "return(kill)";
    killed_after_a_blob: "pull::after-blob", "1*off->return(kill)";
    killed_before_layers_are_synced: "pull::before-sync", "return(kill)";
    killed_after_layers_are_committed: "pull::after-layers", "return(kill)";
    killed_before_an_image_is_recorded: "pull::before-record", "return(kill)";
    killed_after_blobs_have_their_names: "pull::after-blob-rename", "return(kill)";
}

#[test]
fn a_step_of_a_pull_that_fails_is_told_and_taken_back() {
    let failpoints: Vec<String> = STAGES
        .iter()
        .map(|stage| format!("{stage}=1*return(broken on purpose)->off"))
        .collect();
    on_failing_node(
        "a_step_of_a_pull_that_fails_is_told_and_taken_back",
        &failpoints.join(";"),
        async |node| {
            node.registry.add("test/cut", "1", busybox_image());
            let name = format!("{}/test/cut:1", node.registry.host());
            let mut failures = 0;
            let id = loop {
                match node.client.pull(&name).await {
                    Ok(id) => break id,
                    Err(error) => {
                        let text = error.to_string();
                        assert!(text.contains("broken on purpose"), "{text}");
                        failures += 1;
                    }
                }
                assert!(node.client.image(&name).await.unwrap().is_none());
                let left = under_way(node);
                assert!(left.iter().all(|name| name.ends_with(".part")), "{left:?}");
                assert!(failures <= STAGES.len());
            };
            assert_eq!((failures, id), (STAGES.len(), busybox_image().id()));
            assert_eq!(under_way(node), [""; 0]);
        },
    );
}

/// A write that does not return, as on a disk that has gone, ends the pull and nothing else.
#[test]
fn a_disk_that_hangs_fails_the_pull() {
    const NAME: &str = "a_disk_that_hangs_fails_the_pull";
    if !matches!(gantry_testkit::daemon::has_failpoints(), Ok(true)) {
        println!("SKIP {NAME}: gantryd is built without its feature failpoints");
        return;
    }
    let options = Options::default()
        .env(
            "FAILPOINTS",
            "pull::mid-download=2*off->1*sleep(20000)->off",
        )
        .config("[images]\nprogress_timeout_seconds = 4\n");
    on_node(NAME, options, async |node| {
        node.registry.add("test/hung", "1", busybox_image());
        let name = format!("{}/test/hung:1", node.registry.host());
        let start = std::time::Instant::now();
        let error = node.client.pull(&name).await.unwrap_err();
        let took = start.elapsed();
        assert!(took < Duration::from_secs(18), "{took:?}");
        let text = error.to_string();
        for part in ["the disk took nothing", &name] {
            assert!(text.contains(part), "{text}");
        }
        // What is still being written is left to itself.
        let id = node.client.pull(&name).await.unwrap();
        assert_eq!(id, busybox_image().id());
        eventually("nothing is left", async || {
            under_way(node).is_empty().then_some(())
        })
        .await;
    });
}

#[test]
fn a_pull_that_no_client_waits_for_ends() {
    on_plain_node("a_pull_that_no_client_waits_for_ends", async |node| {
        node.registry.add("test/slow", "1", busybox_image());
        node.registry
            .behave(|b| b.trickle = Some((4096, Duration::from_millis(20))));
        let name = format!("{}/test/slow:1", node.registry.host());
        let client = Client::connect(node.daemon.socket()).unwrap();
        let begun = eventually("some of the layer is here", async || {
            (some_of_a_blob(node) && is_writing(node)).then_some(())
        });
        tokio::select! {
            answer = client.pull(&name) => panic!("{answer:?}"),
            () = begun => {}
        }
        // Before that the next one would join it.
        eventually("the pull ends", async || {
            let left = under_way(node);
            let parts = left.iter().all(|name| name.ends_with(".part"));
            (parts && !is_writing(node)).then_some(())
        })
        .await;
        node.registry.forget_seen();
        node.registry.behave(|b| b.trickle = None);
        node.client.pull(&name).await.unwrap();
        let resumed = |seen: &gantry_testkit::registry::Seen| seen.range.is_some();
        assert!(
            node.registry.seen().iter().any(resumed),
            "it went on where it was"
        );
        assert_eq!(under_way(node), [""; 0]);
    });
}

/// Most kilobytes of the daemon that were resident at once since the last look.
fn peak_kb(node: &Node) -> u64 {
    let proc = format!("/proc/{}", node.daemon.pid().unwrap());
    let status = std::fs::read_to_string(format!("{proc}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    // Resets the peak (proc_pid_clear_refs(5)).
    std::fs::write(format!("{proc}/clear_refs"), "5").unwrap();
    number.unwrap().parse().unwrap()
}

#[test]
fn the_memory_of_a_pull_does_not_grow_with_the_image() {
    on_plain_node(
        "the_memory_of_a_pull_does_not_grow_with_the_image",
        async |node| {
            let image = |mark: u8, layers: u32, bytes: usize| {
                let mut random = u64::from(mark) | 1;
                let mut builder = ImageBuilder::new();
                for layer in 0..layers {
                    let data: Vec<u8> = (0..bytes)
                        .map(|_| {
                            random = random.wrapping_mul(6_364_136_223_846_793_005);
                            random = random.wrapping_add(u64::from(layer) + 1);
                            (random >> 56) as u8
                        })
                        .collect();
                    let layer = Layer::new().file(&format!("f{layer}"), &data);
                    builder = builder.layer(layer, Compression::Zstd);
                }
                builder.build()
            };
            // What the allocator keeps and what the threads take is there after the first.
            node.pull("warm", &image(1, 12, 2 << 20)).await;
            peak_kb(node);
            node.pull("small", &image(2, 12, 2 << 20)).await;
            let first = peak_kb(node);
            node.pull("large", &image(3, 12, 10 << 20)).await;
            let second = peak_kb(node);
            assert!(
                second < first + (40 << 10),
                "{first} kB for 24 MiB, {second} kB for 120 MiB"
            );
        },
    );
}
