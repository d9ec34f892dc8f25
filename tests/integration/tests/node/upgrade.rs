//! A daemon of another version takes over: newer than the shims that it finds, older than them, and
//! older than the records.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use gantry_integration::gantryctl::Gantryctl;
use gantry_integration::streaming::STDIN;
use gantry_integration::{Node, Pod, eventually, on_plain_node, refused, script_config, sleeper};
use gantry_store::{Record, Store, record, seal_envelope};
use gantry_testkit::cri::v1::{ContainerState, PodSandboxState};
use gantry_testkit::daemon::gantry_shim;
use gantry_testkit::leakcheck::names;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

use crate::streaming::{PIPES, attach};

/// Writes numbered lines for as long as it lives.
const COUNTER: &str = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.01; done";

/// Shims of another version than the daemon's.
const OTHER_SHIM: &str = env!("CARGO_BIN_EXE_other-shim");

/// What the daemon's next start finds as the node's shim: its own, or one of another version.
fn install_shim(node: &Node, version: Option<&str>) {
    let mut config = String::new();
    if let Some(version) = version {
        let real = gantry_shim().unwrap();
        let script = node.daemon.path("bin/other-shim");
        let text = format!(
            "#!/bin/sh\nexec '{OTHER_SHIM}' '{}' {version} \"$@\"\n",
            real.display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        config = format!("shim = {script:?}\n");
    }
    fs::write(node.daemon.path("conf.d/10-test.toml"), config).unwrap();
}

/// Has the daemon replaced, and the shim with it.
async fn replace(node: &mut Node, version: Option<&str>) {
    install_shim(node, version);
    node.daemon.terminate().unwrap();
    node.start_again(&[]).await;
}

async fn pid(node: &Node, id: &str) -> i64 {
    node.container_info(id).await["pid"].as_i64().unwrap()
}

fn is_alive(pid: i64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z")
}

/// Makes a file in a container whose first process is this.
fn touch(pid: i64, path: &str) {
    fs::write(format!("/proc/{pid}/root{path}"), "").unwrap();
}

fn ends_with(code: i32) -> String {
    format!("until [ -e /tmp/end ]; do sleep 0.05; done; exit {code}")
}

/// What the daemon has had to say since its log was so long, but for the course of things.
fn trouble(node: &Node, since: usize) -> Vec<String> {
    let log = node.daemon.log();
    let lines = log[since..].lines();
    let lines = lines.filter(|line| line.contains("WARN") || line.contains("ERROR"));
    // The OCI runtime of this machine, and a client that came early.
    let usual = ["fix of known holes", "gantryd is recovering"];
    let lines = lines.filter(|line| !usual.iter().any(|usual| line.contains(usual)));
    lines.map(str::to_owned).collect()
}

/// Whether the pod's shim was asked for what it does not know.
fn was_asked_too_much(node: &Node, pod: &Pod) -> bool {
    let log = node.daemon.places().state.join("pods").join(&pod.id);
    let log = fs::read_to_string(log.join("shim.log")).unwrap();
    log.contains("unknown request")
}

async fn kill_shim_of(node: &Node, pod: &Pod) -> Pid {
    let shim = Pid::from_raw(node.shim_pid(pod).await);
    kill(shim, Signal::SIGKILL).unwrap();
    shim
}

async fn not_ready(node: &Node, pod: &Pod) {
    eventually("the pod is NOT_READY", async || {
        (!node.pod_is_ready(&pod.id).await).then_some(())
    })
    .await;
}

/// All that is done with a pod that is running, made before the daemon was replaced.
async fn is_served(node: &mut Node, version: &str) {
    replace(node, Some(version)).await;
    let image = node.busybox().await;
    let pod = node.pod("older").await;
    let counter = node.run_script(&pod, "counter", &image, COUNTER).await;
    let mut config = script_config("reader", &image, "read x; echo got $x; exit 7");
    config.stdin = true;
    let reader = node.run(&pod, &config).await;
    let idle = node.run(&pod, &sleeper("idle", &image)).await;
    let ending = node.run_script(&pod, "ending", &image, &ends_with(5)).await;
    let meanwhile = node
        .run_script(&pod, "meanwhile", &image, &ends_with(6))
        .await;
    let created = node.create(&pod, &sleeper("created", &image)).await;
    let running = [counter.as_str(), &reader, &idle, &ending];
    let mut before = Vec::new();
    for id in running {
        before.push((node.status(id).await, pid(node, id).await));
    }
    let was = node.client.pod_status(&pod.id).await.unwrap();
    let ended = pid(node, &meanwhile).await;
    let since = node.daemon.log().len();
    install_shim(node, None);
    node.daemon.terminate().unwrap();
    touch(ended, "/tmp/end");
    eventually("it ends without a daemon", async || {
        (!is_alive(ended)).then_some(())
    })
    .await;
    node.start_again(&[]).await;

    assert_eq!(node.client.pod_status(&pod.id).await.unwrap(), was);
    assert_eq!(was.state(), PodSandboxState::SandboxReady);
    for (id, (status, pid_was)) in running.into_iter().zip(&before) {
        assert_eq!(node.status(id).await, *status);
        assert_eq!(pid(node, id).await, *pid_was);
    }
    assert_eq!(node.exited(&meanwhile).await.exit_code, 6);
    assert_eq!(node.sh(&idle, "echo x").await, "x");
    let log = node.log_dir("older").join("counter.log");
    fs::rename(&log, log.with_extension("rotated")).unwrap();
    node.client.reopen_log(&counter).await.unwrap();
    eventually("the new log grows", async || {
        fs::metadata(&log)
            .is_ok_and(|log| log.len() > 0)
            .then_some(())
    })
    .await;
    let mut socket = attach(node, &reader, PIPES).await;
    socket.send(STDIN, b"word\n").unwrap();
    assert_eq!(socket.rest().stdout, "got word\n");
    assert_eq!(node.exited(&reader).await.exit_code, 7);
    touch(before[3].1, "/tmp/end");
    assert_eq!(node.exited(&ending).await.exit_code, 5);
    node.client.start(&created).await.unwrap();
    let fresh = node.run_script(&pod, "fresh", &image, "exit 4").await;
    assert_eq!(node.exited(&fresh).await.exit_code, 4);
    node.client.stop(&idle, 20).await.unwrap();
    assert_eq!(node.exited(&idle).await.exit_code, 0);
    node.client.remove(&idle).await.unwrap();
    // Of its own version, beside it.
    let own = node.host_pod("own").await;
    let other = node.run(&own, &sleeper("c", &image)).await;
    node.outlives_shim(&own, &[&other]).await;
    assert!(!was_asked_too_much(node, &pod));
    node.client.stop_pod(&pod.id).await.unwrap();
    node.client.remove_pod(&pod.id).await.unwrap();
    assert_eq!(trouble(node, since), [""; 0]);
}

#[test]
fn a_newer_daemon_serves_the_pods_of_older_shims() {
    const NAME: &str = "a_newer_daemon_serves_the_pods_of_older_shims";
    on_plain_node(NAME, async |node| {
        is_served(node, "older").await;
        let log = node.daemon.log();
        let notes = log.matches("the pod has a shim of an earlier version");
        // By the daemon that made it, which was of the later version too, and by the next.
        assert_eq!(notes.count(), 2);
    });
}

#[test]
fn an_older_daemon_serves_the_pods_of_newer_shims() {
    const NAME: &str = "an_older_daemon_serves_the_pods_of_newer_shims";
    on_plain_node(NAME, async |node| is_served(node, "newer").await);
}

/// What both know of is done as with any other: also the loss of that shim.
#[test]
fn the_pod_of_a_newer_shim_outlives_it() {
    on_plain_node("the_pod_of_a_newer_shim_outlives_it", async |node| {
        replace(node, Some("newer")).await;
        let image = node.busybox().await;
        let pod = node.host_pod("newer").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        replace(node, None).await;
        node.outlives_shim(&pod, &[&id]).await;
        let status = node.status(&id).await;
        node.kill_shim(&pod).await;
        node.adopted(&pod, 1).await;
        assert_eq!(node.status(&id).await, status);
        assert_eq!(node.sh(&id, "echo x").await, "x");
    });
}

#[test]
fn the_pod_of_an_older_shim_ends_with_it() {
    on_plain_node("the_pod_of_an_older_shim_ends_with_it", async |node| {
        replace(node, Some("older")).await;
        let image = node.busybox().await;
        let (lost, unwatched) = (node.pod("lost").await, node.host_pod("unwatched").await);
        let first = node.run(&lost, &sleeper("first", &image)).await;
        let second = node.run(&lost, &sleeper("second", &image)).await;
        let third = node.run(&unwatched, &sleeper("third", &image)).await;
        replace(node, None).await;
        let other = node.host_pod("other").await;
        let bystander = node.run(&other, &sleeper("bystander", &image)).await;
        node.outlives_shim(&other, &[&bystander]).await;
        let untouched = node.status(&bystander).await;

        let mut pids = Vec::new();
        for id in [&first, &second, &third] {
            pids.push(pid(node, id).await);
        }
        for pod in [&lost, &unwatched] {
            pids.push(node.pod_info(&pod.id).await["pid"].as_i64().unwrap());
            let info = node.pod_info(&pod.id).await;
            assert_eq!(info["outlivesShim"], false);
        }
        kill_shim_of(node, &lost).await;
        not_ready(node, &lost).await;
        let info = node.pod_info(&lost.id).await;
        assert_eq!(info["notReadyReason"], "the pod's shim ended");
        let shim = kill_shim_of(node, &unwatched).await;
        node.daemon.kill().unwrap();
        eventually("the shim ends", async || {
            (!is_alive(shim.as_raw().into())).then_some(())
        })
        .await;
        node.start_again(&[]).await;
        not_ready(node, &unwatched).await;
        for id in [&first, &second, &third] {
            let status = node.exited(id).await;
            assert_eq!(
                (status.exit_code, status.reason.as_str()),
                (137, "Unknown"),
                "{status:?}"
            );
        }
        for pid in pids {
            eventually("its processes are gone", async || {
                (!is_alive(pid)).then_some(())
            })
            .await;
        }
        assert_eq!(node.status(&bystander).await, untouched);
        let again = node.run_pod(&lost.config).await;
        assert_ne!(again.id, lost.id);
        for pod in [&lost, &unwatched] {
            node.client.remove_pod(&pod.id).await.unwrap();
        }
        assert!(node.pod_is_ready(&again.id).await);
    });
}

/// Records as a later version may write them: fields have other types, and there are more.
macro_rules! later {
    ($name:ident, $of:ident) => {
        #[derive(Clone, PartialEq, prost::Message)]
        struct $name {
            #[prost(string, tag = "1")]
            what: String,
            #[prost(bytes = "vec", tag = "99")]
            more: Vec<u8>,
        }

        impl Record for $name {
            const TREE: &'static str = <record::$of as Record>::TREE;
            const VERSION: u32 = <record::$of as Record>::VERSION + 1;
        }
    };
}

later!(LaterPodConfig, PodConfig);
later!(LaterPodStatus, PodStatus);
later!(LaterContainerConfig, ContainerConfig);
later!(LaterContainerStatus, ContainerStatus);
later!(LaterImage, ImageRecord);

/// A record that is replaced, and how it is put back.
struct Replaced {
    tree: &'static str,
    key: String,
    put_back: Box<dyn Fn(&Store)>,
    is_kept: Box<dyn Fn(&Store) -> bool>,
    /// Copy in the run directory: where, what it was, what it is.
    copy: Option<(PathBuf, Vec<u8>, Vec<u8>)>,
}

/// Puts `new` in the place of the record `Old` of `key`, and of its copy.
fn supplant<Old: Record + 'static, New: Record + Clone + PartialEq + 'static>(
    store: &Store,
    key: &str,
    new: New,
    copy: Option<PathBuf>,
) -> Replaced {
    let old: Old = store.get(key).unwrap().unwrap();
    store.put(key, &new).unwrap();
    let copy = copy.map(|path| {
        let (old, new) = (fs::read(&path).unwrap(), seal_envelope(New::VERSION, &new));
        fs::write(&path, &new).unwrap();
        (path, old, new)
    });
    let (back, kept) = (key.to_owned(), key.to_owned());
    Replaced {
        tree: Old::TREE,
        key: key.to_owned(),
        put_back: Box::new(move |store| store.put(&back, &old).unwrap()),
        is_kept: Box::new(move |store| store.get::<New>(&kept).unwrap().as_ref() == Some(&new)),
        copy,
    }
}

fn copies_are_kept(replaced: &[Replaced]) -> bool {
    let mut copies = replaced.iter().filter_map(|one| one.copy.as_ref());
    copies.all(|(path, _, new)| fs::read(path).is_ok_and(|bytes| bytes == *new))
}

fn store_of(node: &Node) -> PathBuf {
    node.daemon.places().root.join("store")
}

fn open(path: &Path) -> std::sync::Arc<Store> {
    Store::open(path).unwrap().store
}

/// The daemon was replaced by an earlier one, which knows nothing of what records may say by now.
#[test]
fn records_of_a_newer_daemon_are_kept_with_what_they_are_of() {
    const NAME: &str = "records_of_a_newer_daemon_are_kept_with_what_they_are_of";
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let hidden = node.pod("hidden").await;
        let unnamed = node.host_pod("unnamed").await;
        let mixed = node.host_pod("mixed").await;
        let in_hidden = node.run_script(&hidden, "counter", &image, COUNTER).await;
        let in_unnamed = node.run(&unnamed, &sleeper("c", &image)).await;
        let seen = node.run(&mixed, &sleeper("seen", &image)).await;
        let version = node.run(&mixed, &sleeper("version", &image)).await;
        let phase = node
            .run_script(&mixed, "phase", &image, &ends_with(5))
            .await;
        let config = node.run(&mixed, &sleeper("config", &image)).await;
        let all = [&in_hidden, &in_unnamed, &seen, &version, &phase, &config];
        let mut before = Vec::new();
        for id in all {
            before.push((node.status(id).await, pid(node, id).await));
        }
        let images = node.client.list_images().await.unwrap();
        let pods = node.client.list_pods(None).await.unwrap();
        let holder = node.pod_info(&hidden.id).await["pid"].as_i64().unwrap();

        node.daemon.terminate().unwrap();
        let state = node.daemon.places().state.clone();
        let of_pod = |id: &str, file| Some(state.join("pods").join(id).join(file));
        let of_container = |id: &str, file| Some(state.join("containers").join(id).join(file));
        let text = ("later".to_owned(), vec![0xff; 3]);
        let replaced = {
            let store = open(&store_of(node));
            macro_rules! put_later {
                ($old:ident, $new:ident, $key:expr, $copy:expr) => {{
                    let (what, more) = text.clone();
                    supplant::<record::$old, _>(&store, $key, $new { what, more }, $copy)
                }};
            }
            let mut strange: record::ContainerStatus = store.get(&phase).unwrap().unwrap();
            strange.phase = 77;
            type Status = record::ContainerStatus;
            let mut replaced = vec![
                put_later!(
                    PodStatus,
                    LaterPodStatus,
                    &hidden.id,
                    of_pod(&hidden.id, "status")
                ),
                put_later!(
                    PodConfig,
                    LaterPodConfig,
                    &unnamed.id,
                    of_pod(&unnamed.id, "config")
                ),
                put_later!(
                    ContainerConfig,
                    LaterContainerConfig,
                    &config,
                    of_container(&config, "config")
                ),
                // Its copy can be read, and must not be taken for better.
                put_later!(ContainerStatus, LaterContainerStatus, &version, None),
                put_later!(ImageRecord, LaterImage, &images[0].id, None),
            ];
            let copy = of_container(&phase, "status").unwrap();
            let bytes = fs::read(&copy).unwrap();
            // Of the same version, so it can be written as it is but not read again.
            store.put(&phase, &strange).unwrap();
            let sealed = seal_envelope(Status::VERSION, &strange);
            fs::write(&copy, &sealed).unwrap();
            let old: Status = {
                let mut old = strange.clone();
                old.set_phase(record::ContainerPhase::Running);
                old
            };
            let (back, kept) = (phase.clone(), phase.clone());
            replaced.push(Replaced {
                tree: Status::TREE,
                key: phase.clone(),
                put_back: Box::new(move |store| store.put(&back, &old).unwrap()),
                is_kept: Box::new(move |store| {
                    let read = store.get::<Status>(&kept);
                    read.is_err_and(|error| error.to_string().contains("phase 77"))
                }),
                copy: Some((copy, bytes, sealed)),
            });
            replaced
        };

        let since = node.daemon.log().len();
        node.start_again(&[]).await;
        let log = node.daemon.log()[since..].to_owned();
        for one in &replaced {
            let said = log.lines().any(|line| {
                line.contains("ERROR")
                    && line.contains(&one.key)
                    && (line.contains("version 2") || line.contains("phase 77"))
            });
            assert!(said, "nothing said of {}/{}", one.tree, one.key);
        }
        // Twice: also what the first start wrote is read.
        for round in 1..=2 {
            let listed = node.client.list_pods(None).await.unwrap();
            let listed: Vec<_> = listed.iter().map(|pod| &pod.id).collect();
            assert_eq!(listed, [&mixed.id], "round {round}");
            let containers = node.client.list(None).await.unwrap();
            let containers: Vec<_> = containers.iter().map(|container| &container.id).collect();
            assert_eq!(containers, [&seen]);
            for (_, pid) in &before {
                assert!(is_alive(*pid), "round {round}");
            }
            assert!(is_alive(holder));
            let reason = "newer gantryd";
            let code = Code::FailedPrecondition;
            refused(node.client.pod_status(&hidden.id).await, code, reason);
            refused(node.client.stop_pod(&hidden.id).await, code, reason);
            refused(node.client.remove_pod(&unnamed.id).await, code, reason);
            refused(node.client.remove(&version).await, code, reason);
            refused(node.client.remove_pod(&mixed.id).await, code, reason);
            // It is served as if there was nothing.
            assert_eq!(node.sh(&seen, "echo x").await, "x");
            assert_eq!(node.status(&seen).await, before[2].0);
            node.kill_and_start_again().await;
        }
        // Nothing of what is out of sight belongs to nobody.
        if let Some(program) = Gantryctl::find(NAME) {
            let gantryctl = Gantryctl::new(&program, &node.daemon);
            let output = gantryctl.feed(&["check", "--repair"], Vec::new());
            let said = String::from_utf8_lossy(&output.stdout);
            assert_eq!(output.status.code(), Some(0), "{said}");
            assert!(said.contains("a record that cannot be read"), "{said}");
            assert!(said.contains(", 0 belong to nothing"), "{said}");
            assert!(before.iter().all(|(_, pid)| is_alive(*pid)), "{said}");
        }
        // The image is known from the index, and its layers may be anybody's.
        assert_eq!(node.client.list_images().await.unwrap(), images);
        let layers = node.daemon.places().root.join("overlayfs/layers");
        let there = names(&layers);
        node.client.remove_image(&image).await.unwrap();
        assert_eq!(names(&layers), there);
        let written = node.output(&hidden, "counter").lines().count();
        node.has_written(&hidden, "counter", &format!("\n{}\n", written + 20))
            .await;
        // The name of a pod that is out of sight is free.
        let second = node.run_pod(&hidden.config).await;
        assert_ne!(second.id, hidden.id);
        node.client.remove_pod(&second.id).await.unwrap();
        // What ends unseen is learnt later.
        touch(before[4].1, "/tmp/end");
        let ended = before[4].1;
        eventually("it ends", async || (!is_alive(ended)).then_some(())).await;

        node.daemon.terminate().unwrap();
        assert!(copies_are_kept(&replaced));
        {
            let store = open(&store_of(node));
            for one in &replaced {
                assert!((one.is_kept)(&store), "{}/{}", one.tree, one.key);
                (one.put_back)(&store);
                if let Some((path, old, _)) = &one.copy {
                    fs::write(path, old).unwrap();
                }
            }
        }
        let since = node.daemon.log().len();
        node.start_again(&[]).await;
        assert_eq!(trouble(node, since), [""; 0]);
        assert_eq!(node.client.list_images().await.unwrap(), images);
        assert_eq!(node.client.list_pods(None).await.unwrap(), pods);
        for (id, (status, pid_was)) in all.into_iter().zip(before) {
            if *id == phase {
                assert_eq!(node.exited(id).await.exit_code, 5);
                continue;
            }
            assert_eq!(node.status(id).await, status);
            assert_eq!(pid(node, id).await, pid_was);
            assert_eq!(node.sh(id, "echo x").await, "x");
        }
        assert_eq!(
            node.client.run_pod(&hidden.config).await.unwrap(),
            hidden.id
        );
    });
}

/// The store is lost as well: what describes itself is of the newer daemon too.
#[test]
fn newer_records_outlive_a_lost_store() {
    on_plain_node("newer_records_outlive_a_lost_store", async |node| {
        let image = node.busybox().await;
        let (pod, mixed) = (node.pod("later").await, node.host_pod("mixed").await);
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let hidden = node.run(&mixed, &sleeper("hidden", &image)).await;
        let seen = node.run(&mixed, &sleeper("seen", &image)).await;
        let all = [&id, &hidden, &seen];
        let mut before = Vec::new();
        for id in all {
            before.push((node.status(id).await, pid(node, id).await));
        }
        let stopped = node.host_pod("stopped").await;
        let ended = node.run(&stopped, &sleeper("ended", &image)).await;
        let ended_pid = pid(node, &ended).await;
        node.daemon.terminate().unwrap();
        let state = node.daemon.places().state.clone();
        let later = |path: PathBuf| {
            let old = fs::read(&path).unwrap();
            let new = seal_envelope(2, &record::PodStatus::default());
            fs::write(&path, &new).unwrap();
            (path, old, new)
        };
        let copies = [
            later(state.join("pods").join(&pod.id).join("status")),
            later(state.join("containers").join(&hidden).join("status")),
            later(state.join("containers").join(&ended).join("status")),
        ];
        fs::remove_dir_all(store_of(node)).unwrap();
        for _ in 0..2 {
            node.start_again(&[]).await;
            let listed = node.client.list_pods(None).await.unwrap();
            assert_eq!(listed.len(), 2, "{listed:?}");
            // Who ends a pod ends all that runs in it, and takes nothing from what is on record.
            node.client.stop_pod(&stopped.id).await.unwrap();
            assert!(!is_alive(ended_pid));
            refused(
                node.client.remove_pod(&stopped.id).await,
                Code::FailedPrecondition,
                &ended,
            );
            assert_eq!(node.client.list(None).await.unwrap().len(), 1);
            refused(
                node.client.remove_pod(&mixed.id).await,
                Code::FailedPrecondition,
                &hidden,
            );
            assert!(before.iter().all(|(_, pid)| is_alive(*pid)));
            node.daemon.kill().unwrap();
            for (path, _, new) in &copies {
                assert_eq!(fs::read(path).unwrap(), *new, "{}", path.display());
            }
        }
        for (path, old, _) in &copies {
            fs::write(path, old).unwrap();
        }
        node.start_again(&[]).await;
        for (id, (status, pid_was)) in all.into_iter().zip(before) {
            assert_eq!(node.status(id).await, status);
            assert_eq!(pid(node, id).await, pid_was);
            assert_eq!(node.sh(id, "echo x").await, "x");
        }
        assert!(!node.pod_is_ready(&stopped.id).await);
        let status = node.status(&ended).await;
        assert_eq!(status.state(), ContainerState::ContainerExited);
        assert_eq!(status.exit_code, 137);
    });
}
