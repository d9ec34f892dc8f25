//! Blobs on their way: ranges, resumption, what lies about itself, and what is shared.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use futures::FutureExt;
use gantry_images::Options;
use gantry_testkit::image::{Compression, Image, ImageBuilder, Layer};
use gantry_testkit::registry::{Auth, Behaviour, Registry};
use gantry_types::{ErrorKind, Kind};

use crate::node::{Node, not_root, nothing_in_use, options};

/// One layer of about `size` bytes that no compression makes smaller.
pub fn big(size: usize) -> Image {
    let mut state = 1_u32;
    let data: Vec<u8> = (0..size)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect();
    ImageBuilder::new()
        .layer(Layer::new().file("big", &data), Compression::Gzip)
        .build()
}

const SIZE: usize = 3_000_000;

/// Blobs of more than half a MiB come in ranges of 256 KiB.
fn in_ranges() -> Options {
    let mut options = options();
    options.registry.ranges = 3;
    options.registry.range_bytes = 256 << 10;
    options
}

async fn serve(change: impl FnOnce(&mut Behaviour)) -> (Registry, String) {
    let registry = Registry::start().await.unwrap();
    registry.add("a", "v1", &big(SIZE));
    registry.behave(change);
    let name = format!("{}/a:v1", registry.host());
    (registry, name)
}

/// First bytes that were asked for by range, in order.
fn ranges(registry: &Registry) -> Vec<u64> {
    let mut starts: Vec<u64> = registry
        .seen()
        .iter()
        .filter_map(|seen| {
            let range = seen.range.as_deref()?.strip_prefix("bytes=")?;
            range.split('-').next()?.parse().ok()
        })
        .collect();
    starts.sort_unstable();
    starts
}

#[tokio::test]
async fn a_big_blob_comes_in_ranges() {
    if not_root("a_big_blob_comes_in_ranges") {
        return;
    }
    let (registry, name) = serve(|_| ()).await;
    let node = Node::with(in_ranges());
    node.pull(&name).await.unwrap();
    let size = big(SIZE).layers[0].data.len();
    let wanted: Vec<u64> = (0..size as u64).step_by(256 << 10).collect();
    assert_eq!(ranges(&registry), wanted);
    node.assert_tidy();
    assert_eq!(node.parts(), [""; 0]);

    // With faults in every range it still comes together.
    let (registry, name) = serve(|b| b.cut_after = Some((100_000, 5))).await;
    let node = Node::with(in_ranges());
    node.pull(&name).await.unwrap();
    assert!(ranges(&registry).len() > 12);
}

#[tokio::test]
async fn ranges_that_are_ignored_start_over() {
    if not_root("ranges_that_are_ignored_start_over") {
        return;
    }
    for honoured in [0, 1, 4] {
        let (registry, name) = serve(|b| {
            b.ranges_honoured = Some(honoured);
            b.latency = Duration::from_millis(5);
        })
        .await;
        let node = Node::with(in_ranges());
        let id = node.pull(&name).await;
        assert!(id.is_ok(), "{honoured}: {}", id.unwrap_err());
        let asked = registry.count("GET", "/blobs/");
        assert!(asked < 20, "{honoured}: {asked} requests");
    }
}

#[tokio::test]
async fn a_wrong_content_range_is_refused() {
    if not_root("a_wrong_content_range_is_refused") {
        return;
    }
    for said in [
        "",
        "bytes 1-262143/3000000",
        "bytes 0-262143/7",
        "bytes 0-9999999/3000000",
        "bytes */3000000",
        "rubbish",
    ] {
        let (registry, name) = serve(|b| b.content_range = Some(said.to_owned())).await;
        let node = Node::with(in_ranges());
        let error = node.pull(&name).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("Content-Range"), "{said}: {text}");
        assert!(text.contains(&name) && text.contains(&registry.host()));
        node.assert_tidy();
        registry.behave(|b| b.content_range = None);
        node.pull(&name).await.unwrap();
    }
}

#[tokio::test]
async fn lengths_that_lie_are_refused() {
    if not_root("lengths_that_lie_are_refused") {
        return;
    }
    for wrong in [-1, 1, 1 << 40] {
        let (registry, name) = serve(|b| b.wrong_length = wrong).await;
        let node = Node::new();
        let error = node.pull(&name).await.unwrap_err();
        assert!(error.to_string().contains("bytes of a blob"), "{error}");
        node.assert_tidy();
        registry.behave(|b| b.wrong_length = 0);
        node.pull(&name).await.unwrap();
    }
}

/// A node on which a pull of `name` was given up when two thirds of the layer were there.
async fn given_up(registry: &Registry, name: &str, options: Options) -> Node {
    let node = Node::with(options);
    // The configuration comes first and is shorter.
    registry.behave(|b| b.stall_after = Some((2_000_000, 2)));
    let ingest = node.dir.path().join("content/ingest");
    let size = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().metadata().unwrap().len();
    tokio::select! {
        ended = node.pull(name) => panic!("{ended:?}"),
        () = async {
            while !std::fs::read_dir(&ingest).unwrap().any(|entry| size(entry) > 1_000_000) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        } => {}
    }
    settled(&node).await;
    registry.behave(|b| b.stall_after = None);
    registry.forget_seen();
    node
}

/// How long what happens behind a pull may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until a pull that nobody waits for has ended.
async fn settled(node: &Node) {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if node.names("overlayfs/stages").is_empty()
            && node.names("overlayfs/trash").is_empty()
            && node.names("content/ingest") == node.parts()
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    node.assert_tidy();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_goes_on_after_a_restart() {
    if not_root("a_download_goes_on_after_a_restart") {
        return;
    }
    let (registry, name) = serve(|_| ()).await;
    let node = given_up(&registry, &name, options()).await.restart();
    node.pull(&name).await.unwrap();
    let starts = ranges(&registry);
    assert!(
        starts.len() == 1 && starts[0] > 900_000,
        "it went on where it was: {starts:?}"
    );
    assert_eq!(node.parts(), [""; 0]);
    node.remove(&name).await;
    node.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_left_is_not_believed() {
    if not_root("what_was_left_is_not_believed") {
        return;
    }
    let (registry, name) = serve(|_| ()).await;
    let node = given_up(&registry, &name, options())
        .await
        .restart_after(|root| {
            for part in std::fs::read_dir(root.join("content/ingest")).unwrap() {
                let path = part.unwrap().path();
                let mut content = std::fs::read(&path).unwrap();
                content[100] ^= 1;
                std::fs::write(&path, content).unwrap();
            }
        });
    node.pull(&name).await.unwrap();
    node.assert_tidy();

    // Parts that nobody comes back for are collected.
    let mut now = options();
    now.keep_unreferenced = Duration::ZERO;
    let node = given_up(&registry, &name, now).await;
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        // The pull's lease ends with it.
        node.images.collect(nothing_in_use()).await.unwrap();
        if node.parts().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    node.assert_empty();
}

#[tokio::test]
async fn a_pull_ends_with_its_last_caller() {
    if not_root("a_pull_ends_with_its_last_caller") {
        return;
    }
    let (registry, name) = serve(|b| b.trickle = Some((10_000, Duration::from_millis(10)))).await;
    let node = Node::new();
    let stay = Duration::from_millis(600);
    let staged = async || {
        while node.names("overlayfs/stages").is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let (first, ()) = tokio::join!(tokio::time::timeout(stay / 4, node.pull(&name)), async {
        let joined = node.pull(&name);
        tokio::pin!(joined);
        assert!(tokio::time::timeout(stay / 2, &mut joined).await.is_err());
        // The other one has left, and the pull goes on.
        tokio::select! {
            ended = joined => panic!("{ended:?}"),
            () = staged() => {}
        }
    });
    assert!(first.is_err());
    settled(&node).await;
    assert!(node.images.list().is_empty());
    assert_eq!(registry.count("GET", "/manifests/"), 1);
    registry.behave(|b| b.trickle = None);
    node.pull(&name).await.unwrap();
    assert_eq!(
        ranges(&registry).len(),
        1,
        "what had come was not fetched again"
    );
}

#[tokio::test]
async fn a_slow_transfer_is_no_stall() {
    if not_root("a_slow_transfer_is_no_stall") {
        return;
    }
    // More than the progress time-out in all, a fraction of it between any two pieces.
    let limit = Duration::from_secs(4);
    let mut options = options();
    options.registry.progress_timeout = limit;
    let (registry, name) = serve(|b| b.trickle = Some((SIZE / 12, limit / 10))).await;
    let start = Instant::now();
    Node::with(options).pull(&name).await.unwrap();
    assert!(start.elapsed() > limit, "{:?}", start.elapsed());
    // One that is given up goes on where it was.
    assert_eq!(ranges(&registry), [0; 0]);
}

#[tokio::test]
async fn a_hung_registry_delays_only_its_own_pulls() {
    if not_root("a_hung_registry_delays_only_its_own_pulls") {
        return;
    }
    let mut one = options();
    one.parallel_downloads = 1;
    one.parallel_unpacks = 1;
    one.registry.progress_timeout = Duration::from_secs(600);
    let node = Node::with(one);
    let (_hung, hung_name) = serve(|b| b.stall_after = Some((1_000_000, 1000))).await;
    let (good, good_name) = serve(|_| ()).await;
    // Another image: of one blob there is one transfer.
    good.add("a", "v1", &big(SIZE / 2));
    let start = Instant::now();
    tokio::select! {
        hung = node.pull(&hung_name) => panic!("{hung:?}"),
        good = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            node.pull(&good_name).await
        } => {
            good.unwrap();
        }
    }
    assert!(
        start.elapsed() < Duration::from_secs(300),
        "{:?}",
        start.elapsed()
    );
    settled(&node).await;
}

#[tokio::test]
async fn trickling_registries_delay_only_their_own_pulls() {
    if not_root("trickling_registries_delay_only_their_own_pulls") {
        return;
    }
    let mut few = options();
    few.parallel_downloads = 2;
    few.registry.progress_timeout = Duration::from_secs(600);
    let node = Node::with(few);
    // Bytes never cease to come, and the layers would take hours.
    let slow = serve(|b| b.trickle = Some((10, Duration::from_millis(5)))).await;
    let slower = serve(|b| b.trickle = Some((10, Duration::from_millis(300)))).await;
    for (registry, _) in [&slow, &slower] {
        for n in 0..4 {
            registry.add("a", &format!("v{n}"), &big(SIZE + n));
        }
    }
    let names = [&slow, &slower].map(|(registry, _)| registry.host());
    let trickling = names
        .iter()
        .flat_map(|host| (0..4).map(move |n| format!("{host}/a:v{n}")))
        .map(|name| {
            let node = &node;
            async move { node.pull(&name).await }.boxed()
        });
    let (_good, good_name) = serve(|_| ()).await;
    let start = Instant::now();
    tokio::select! {
        (ended, ..) = futures::future::select_all(trickling) => panic!("{ended:?}"),
        good = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            // The very layer that trickles elsewhere, too.
            tokio::time::timeout(Duration::from_secs(300), node.pull(&good_name)).await
        } => {
            good.unwrap().unwrap();
        }
    }
    assert!(
        start.elapsed() < Duration::from_secs(300),
        "{:?}",
        start.elapsed()
    );
    settled(&node).await;
    node.assert_tidy();
}

/// Blobs of which nothing comes, and blobs of which the beginning has come, on a runtime with far
/// fewer threads than there are blobs.
#[test]
fn hung_pulls_hold_no_threads() {
    if not_root("hung_pulls_hold_no_threads") {
        return;
    }
    for (threads, pulls, after) in [(4, 12, 0), (72, 26, 600_000)] {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(threads)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut patient = options();
            patient.registry.progress_timeout = Duration::from_secs(600);
            let node = Node::with(patient);
            let hung = Registry::start().await.unwrap();
            let noise = big(after + 6000).layers[0].data.clone();
            let mut stuck = Vec::new();
            for n in 0..pulls {
                let layer = |part: &str| {
                    let layer = Layer::new().file(&format!("{n}-{part}"), &noise);
                    (layer, Compression::Plain)
                };
                let parts = ["a", "b", "c"].map(layer).into_iter();
                let made = parts.fold(ImageBuilder::new(), |image, (layer, pack)| {
                    image.layer(layer, pack)
                });
                hung.add("a", &format!("v{n}"), &made.build());
                stuck.push(format!("{}/a:v{n}", hung.host()));
            }
            hung.behave(|b| b.stall_layers = Some(after));
            let (_good, good_name) = serve(|_| ()).await;
            let start = Instant::now();
            let stuck = stuck.iter().map(|name| node.pull(name).boxed());
            tokio::select! {
                (ended, ..) = futures::future::select_all(stuck) => panic!("{ended:?}"),
                () = async {
                    // All of them are under way.
                    while hung.count("GET", "/blobs/") < pulls * 4 {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    let good = node.pull(&good_name);
                    let good = tokio::time::timeout(Duration::from_secs(300), good).await;
                    good.unwrap().unwrap();
                } => {}
            }
            let took = start.elapsed();
            assert!(took < Duration::from_secs(300), "{threads}: {took:?}");
            settled(&node).await;
        });
        runtime.shutdown_timeout(Duration::from_secs(10));
    }
}

#[tokio::test]
async fn a_pull_whose_blobs_are_taken_away_begins_anew() {
    if not_root("a_pull_whose_blobs_are_taken_away_begins_anew") {
        return;
    }
    let (registry, name) =
        serve(|b| b.trickle = Some((SIZE / 20, Duration::from_millis(50)))).await;
    let node = Node::new();
    let made = big(SIZE);
    let part = |digest: &gantry_types::Digest| {
        let name = format!("sha256-{}.part", digest.hex());
        node.dir.path().join("content/ingest").join(name)
    };
    let (pulled, ()) = tokio::join!(node.pull(&name), async {
        // The layer comes once the configuration has been read.
        while node.names("overlayfs/stages").is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        registry.behave(|b| b.trickle = None);
        for document in [&made.manifest, &made.config] {
            std::fs::remove_file(part(&document.digest)).unwrap();
        }
    });
    assert_eq!(pulled.unwrap(), made.id());
    assert_eq!(registry.count("GET", "/manifests/"), 2);
    let verified = node.images.verify(&name).await.unwrap();
    assert_eq!((verified.faults.len(), verified.notes.len()), (0, 0));
    node.remove(&name).await;
    node.assert_empty();
}

#[tokio::test]
async fn ranges_begin_where_a_restart_finds_them() {
    if not_root("ranges_begin_where_a_restart_finds_them") {
        return;
    }
    let (registry, name) = serve(|_| ()).await;
    let mut odd = in_ranges();
    odd.registry.range_bytes = 200_001;
    Node::with(odd).pull(&name).await.unwrap();
    let starts = ranges(&registry);
    assert!(starts.len() > 10, "{starts:?}");
    assert!(
        starts.iter().all(|start| start % (64 << 10) == 0),
        "{starts:?}"
    );
}

#[tokio::test]
async fn pulls_keep_to_the_bandwidth() {
    if not_root("pulls_keep_to_the_bandwidth") {
        return;
    }
    let (_registry, name) = serve(|_| ()).await;
    let mut slow = options();
    slow.bandwidth = NonZeroU64::new(4_000_000);
    let node = Node::with(slow);
    let start = Instant::now();
    node.pull(&name).await.unwrap();
    let took = start.elapsed();
    assert!(took > Duration::from_millis(600), "{took:?}");
}

#[tokio::test]
async fn an_endless_401_is_denied_soon() {
    let (registry, name) = serve(|b| {
        b.auth = Auth::Bearer {
            user: String::new(),
            password: String::new(),
            refresh: String::new(),
        };
        b.token_body = Some(r#"{"token": "never-good"}"#.into());
    })
    .await;
    let node = Node::new();
    let error = node.pull(&name).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    let text = error.to_string();
    for part in [&name, &registry.host(), "401"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains("never-good"));
    assert!(registry.seen().len() <= 4, "{:?}", registry.seen().len());
    node.assert_empty();
}
