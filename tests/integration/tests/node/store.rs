//! Records outlive the daemon, and the pods outlive the records.

use std::path::{Path, PathBuf};

use gantry_integration::{on_failing_node, on_node, on_plain_node, script_config, sleeper};
use gantry_testkit::cri::v1::ContainerState;
use gantry_testkit::daemon::Options;
use gantry_testkit::faults::Ballast;

/// Overwrites the middle of every file below `dir` that is not empty.
fn damage(dir: &Path) -> usize {
    let mut damaged = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            damaged += damage(&path);
        } else {
            let length = std::fs::metadata(&path).unwrap().len();
            if length > 0 {
                std::fs::write(&path, vec![0x5a; usize::try_from(length).unwrap()]).unwrap();
                damaged += 1;
            }
        }
    }
    damaged
}

fn set_aside(store: &Path) -> Vec<PathBuf> {
    let name = store.file_name().unwrap().to_string_lossy().into_owned();
    let names = gantry_testkit::leakcheck::names(store.parent().unwrap());
    let damaged = names
        .into_iter()
        .filter(|other| other.starts_with(&format!("{name}.")));
    damaged.map(|name| store.with_file_name(name)).collect()
}

#[test]
fn a_damaged_store_is_set_aside_and_rebuilt_with_pods_running() {
    on_plain_node(
        "a_damaged_store_is_set_aside_and_rebuilt_with_pods_running",
        async |node| {
            let image = node.busybox().await;
            let pod = node.pod("survivor").await;
            let id = node.run(&pod, &sleeper("running", &image)).await;
            let created = node.create(&pod, &sleeper("created", &image)).await;
            let exited = node.run_script(&pod, "exited", &image, "exit 4").await;
            node.exited(&exited).await;
            let stopped = node.host_pod("stopped").await;
            node.client.stop_pod(&stopped.id).await.unwrap();
            let before = (
                node.client.pod_status(&pod.id).await.unwrap(),
                node.status(&id).await,
                node.status(&exited).await,
                node.client.list_images().await.unwrap(),
            );
            node.daemon.terminate().unwrap();
            let store = node.daemon.places().root.join("store");
            assert!(damage(&store) > 0);
            node.start_again(&[]).await;
            assert_eq!(set_aside(&store).len(), 1, "kept for whoever wants to look");
            assert!(node.daemon.log().contains("set aside"), "and said aloud");
            let after = (
                node.client.pod_status(&pod.id).await.unwrap(),
                node.status(&id).await,
                node.status(&exited).await,
                node.client.list_images().await.unwrap(),
            );
            assert_eq!(before, after);
            assert!(!node.pod_is_ready(&stopped.id).await);
            assert_eq!(
                node.status(&created).await.state(),
                ContainerState::ContainerCreated
            );
            assert_eq!(node.sh(&id, "echo alive").await, "alive");
            node.client.start(&created).await.unwrap();
            // The same requests still find what they made.
            assert_eq!(node.client.run_pod(&pod.config).await.unwrap(), pod.id);
            assert_eq!(node.create(&pod, &sleeper("running", &image)).await, id);
            // Images are usable, not just listed.
            let other = node.pod("after").await;
            node.run(&other, &sleeper("c", &image)).await;
            for dir in set_aside(&store) {
                std::fs::remove_dir_all(dir).unwrap();
            }
        },
    );
}

/// Every file below `dir`.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(self::files(&path)),
            false => files.push(path),
        }
    }
    files.sort();
    files
}

/// One thing that may happen to a file.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Cut(usize),
    Flip(usize),
    Remove,
}

impl Damage {
    /// What to try on a file of so many bytes: the log cut at steps, and bytes flipped all over it.
    fn all(length: usize) -> Vec<Self> {
        const STEPS: usize = 12;
        let places = (0..STEPS).map(|step| length * step / STEPS);
        let mut all: Vec<_> = places.clone().map(Damage::Cut).collect();
        all.extend(length.checked_sub(1).map(Damage::Cut));
        // Beside the borders of what has a round size.
        all.extend(
            places
                .map(|place| place + 13)
                .filter(|place| *place < length)
                .map(Damage::Flip),
        );
        all.push(Damage::Remove);
        all
    }

    fn apply(self, path: &Path) {
        if let Damage::Remove = self {
            return std::fs::remove_file(path).unwrap();
        }
        let mut bytes = std::fs::read(path).unwrap();
        match self {
            Damage::Cut(length) => bytes.truncate(length),
            Damage::Flip(place) => bytes[place] ^= 0x5a,
            Damage::Remove => {}
        }
        std::fs::write(path, bytes).unwrap();
    }
}

#[test]
fn whatever_is_damaged_in_the_store_nothing_that_runs_is_lost() {
    const NAME: &str = "whatever_is_damaged_in_the_store_nothing_that_runs_is_lost";
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.pod("survivor").await;
        let id = node.run(&pod, &sleeper("running", &image)).await;
        let exited = node.run_script(&pod, "exited", &image, "exit 4").await;
        node.exited(&exited).await;
        node.create(&pod, &sleeper("created", &image)).await;
        let seen = async |node: &gantry_integration::Node| {
            let mut containers = node.client.list(None).await.unwrap();
            containers.sort_by(|a, b| a.id.cmp(&b.id));
            (
                node.client.pod_status(&pod.id).await.unwrap(),
                node.status(&id).await,
                node.status(&exited).await,
                containers,
                node.client.list_images().await.unwrap(),
            )
        };
        let before = seen(node).await;
        node.daemon.kill().unwrap();
        let store = node.daemon.places().root.join("store");
        let whole: Vec<_> = files(&store)
            .into_iter()
            .map(|path| (std::fs::read(&path).unwrap(), path))
            .collect();
        let mut tried = 0;
        for (bytes, path) in &whole {
            for damage in Damage::all(bytes.len()) {
                damage.apply(path);
                node.start_again(&[]).await;
                assert_eq!(before, seen(node).await, "{damage:?} of {}", path.display());
                node.daemon.kill().unwrap();
                for dir in set_aside(&store) {
                    std::fs::remove_dir_all(dir).unwrap();
                }
                std::fs::remove_dir_all(&store).unwrap();
                for (bytes, path) in &whole {
                    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                    std::fs::write(path, bytes).unwrap();
                }
                tried += 1;
            }
        }
        println!("damaged in {tried} ways");
        assert!(tried > 20, "the store has its files elsewhere: {tried}");
        node.start_again(&[]).await;
        assert_eq!(node.sh(&id, "echo alive").await, "alive");
    });
}

#[test]
fn images_and_stopped_pods_are_found_after_a_restart() {
    on_plain_node(
        "images_and_stopped_pods_are_found_after_a_restart",
        async |node| {
            let image = node.busybox().await;
            let images = node.client.list_images().await.unwrap();
            assert_eq!(images.len(), 1);
            let pod = node.pod("stopped").await;
            let id = node.run_script(&pod, "c", &image, "exit 5").await;
            node.exited(&id).await;
            node.client.stop_pod(&pod.id).await.unwrap();
            node.kill_and_start_again().await;
            assert_eq!(node.client.list_images().await.unwrap(), images);
            assert!(!node.pod_is_ready(&pod.id).await);
            assert_eq!(node.status(&id).await.exit_code, 5);
            node.client.remove_pod(&pod.id).await.unwrap();
            node.client.remove_image(&image).await.unwrap();
            node.kill_and_start_again().await;
            assert!(node.client.list_images().await.unwrap().is_empty());
            assert!(node.client.list_pods(None).await.unwrap().is_empty());
        },
    );
}

/// Two daemons over one root: the second one does not start, and the first one does not notice.
#[test]
fn a_second_daemon_is_refused() {
    on_plain_node("a_second_daemon_is_refused", async |node| {
        let pod = node.pod("first").await;
        let output = std::process::Command::new(gantry_testkit::daemon::gantryd().unwrap())
            .arg("--config")
            .arg(node.daemon.path("config.toml"))
            .output()
            .unwrap();
        assert!(!output.status.success());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            said.contains(&*node.daemon.socket().to_string_lossy()),
            "{said}"
        );
        assert!(node.pod_is_ready(&pod.id).await);
    });
}

/// What a store could not write stays as it was told, also when the daemon ends then.
#[test]
fn a_store_that_takes_nothing_costs_no_exit() {
    const NAME: &str = "a_store_that_takes_nothing_costs_no_exit";
    on_failing_node(NAME, "", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("full").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        node.daemon.kill().unwrap();
        let full = "store::written=return(no space)";
        node.start_again(&[("FAILPOINTS", full)]).await;
        // Ended, and not removed, with no record of the one or the other in the store.
        node.client.remove(&id).await.unwrap_err();
        let exit = node.exited(&id).await;
        node.kill_and_start_again().await;
        assert_eq!(node.status(&id).await, exit);
        node.client.remove(&id).await.unwrap();
        assert!(node.client.list(None).await.unwrap().is_empty());
    });
}

#[test]
fn a_full_disk_is_got_over_without_a_restart() {
    const NAME: &str = "a_full_disk_is_got_over_without_a_restart";
    let options = Options {
        root_bytes: Some(64 << 20),
        ..Options::default()
    };
    on_node(NAME, options, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("full").await;
        let running = node.run(&pod, &sleeper("running", &image)).await;
        let ballast = Ballast::fill(&node.daemon.places().root).unwrap();
        let more = |n| script_config(&format!("more-{n}"), &image, "exit 3");
        // The store has room of its own for some.
        let mut refused = None;
        for n in 0..200 {
            if let Err(error) = node.client.create(&pod.id, &more(n), &pod.config).await {
                refused = Some((n, error));
                break;
            }
        }
        let (n, error) = refused.expect("no space");
        assert_eq!(error.code(), tonic::Code::ResourceExhausted, "{error:?}");
        assert!(node.is_running(&running).await);
        drop(ballast);
        let id = node.run(&pod, &more(n)).await;
        assert_eq!(node.exited(&id).await.exit_code, 3);
        assert!(node.is_running(&running).await);
    });
}

#[test]
fn a_full_disk_is_no_damage_to_the_store() {
    const NAME: &str = "a_full_disk_is_no_damage_to_the_store";
    let options = Options {
        root_bytes: Some(64 << 20),
        ..Options::default()
    };
    on_node(NAME, options, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("full").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let root = node.daemon.places().root.clone();
        for _ in 0..3 {
            node.daemon.kill().unwrap();
            let ballast = Ballast::fill(&root).unwrap();
            node.daemon.spawn().unwrap();
            // It starts or it does not: a store asks for more space at times.
            let started = node.daemon.ready().await;
            println!("on a full disk: {started:?}");
            drop(ballast);
            node.kill_and_start_again().await;
            assert!(set_aside(&root.join("store")).is_empty());
            assert!(node.is_running(&id).await);
        }
    });
}

/// The store is written first and the run directory after it. A daemon that is killed between the
/// two has left a copy that is behind, until the next one brings it up to date.
#[test]
fn a_copy_that_was_left_behind_is_brought_up_to_date() {
    const NAME: &str = "a_copy_that_was_left_behind_is_brought_up_to_date";
    on_failing_node(NAME, "", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("behind").await;
        node.daemon.kill().unwrap();
        // The intent is flushed, and then the container as it was made.
        let armed = "store::flushed=1*off->return(kill)";
        node.start_again(&[("FAILPOINTS", armed)]).await;
        let config = sleeper("c", &image);
        let cut = node.client.create(&pod.id, &config, &pod.config).await;
        cut.unwrap_err();
        node.daemon.wait_ended().await.unwrap();
        node.start_again(&[]).await;
        let made = node.client.list(None).await.unwrap();
        assert_eq!(made.len(), 1, "{made:?}");
        assert_eq!(made[0].state(), ContainerState::ContainerCreated);
        assert_eq!(node.create(&pod, &config).await, made[0].id);
        // Acknowledged now: also for a store that is lost.
        node.daemon.kill().unwrap();
        std::fs::remove_dir_all(node.daemon.places().root.join("store")).unwrap();
        node.start_again(&[]).await;
        assert_eq!(node.client.list(None).await.unwrap(), made);
        node.client.start(&made[0].id).await.unwrap();
        assert!(node.is_running(&made[0].id).await);
    });
}
