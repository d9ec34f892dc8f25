//! One pod's trouble stays in that pod: four that are stuck, each for another reason, and all that
//! others ask for meanwhile.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use gantry_integration::{FAULTY, Fault, Node, Pod, eventually, on_node, script_config, sleeper};
use gantry_testkit::daemon::Options;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// No call on another pod may come near this; what is stuck takes longer than the test.
const FAST: Duration = Duration::from_secs(15);

/// A call that waits for what hangs ends with that call's own deadline and those of its undo.
const BOUND: Duration = Duration::from_secs(150);

/// Writes without end, but not before its start is answered.
const WHEN_TOLD: &str = "while [ ! -e /tmp/go ]; do sleep 0.1; done; exec yes";

async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = T>) -> T {
    let began = Instant::now();
    let done = work.await;
    let took = began.elapsed();
    assert!(took < limit, "{what} took {took:?}");
    done
}

/// A pod from its first call to its last, and what every client asks all the time.
async fn others_live(node: &Node, image: &str, name: &str) {
    within(FAST, "Status", node.client.node_status(true))
        .await
        .unwrap();
    within(FAST, "ListPodSandbox", node.client.list_pods(None))
        .await
        .unwrap();
    within(FAST, "ListContainers", node.client.list(None))
        .await
        .unwrap();
    let pod = within(FAST, "RunPodSandbox", node.pod(name)).await;
    let id = within(FAST, "a start", node.run(&pod, &sleeper("c", image))).await;
    let said = within(FAST, "ExecSync", node.sh(&id, "echo on")).await;
    assert_eq!(said, "on");
    within(FAST, "StopContainer", node.client.stop(&id, 0))
        .await
        .unwrap();
    within(FAST, "RemoveContainer", node.client.remove(&id))
        .await
        .unwrap();
    within(FAST, "StopPodSandbox", node.client.stop_pod(&pod.id))
        .await
        .unwrap();
    within(FAST, "RemovePodSandbox", node.client.remove_pod(&pod.id))
        .await
        .unwrap();
}

/// A log file whose disk takes nothing more: a pipe that nobody empties, held open by what is
/// returned.
fn stalled_log(path: &std::path::Path) -> File {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let nonblocking = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let mut options = File::options();
    options.read(true).write(true).custom_flags(nonblocking);
    options.open(path).unwrap()
}

#[test]
fn four_pods_that_are_stuck_delay_no_other() {
    const NAME: &str = "four_pods_that_are_stuck_delay_no_other";
    let options = Options::default()
        .config("[timeouts]\nruntime_seconds = 45\nnetwork_seconds = 45\nrecovery_seconds = 3\n");
    on_node(NAME, options, async |node| {
        let image = node.busybox().await;
        let witness = node.pod("witness").await;
        let counting = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
        let counter = node
            .run(&witness, &script_config("counter", &image, counting))
            .await;

        // A shim that is frozen.
        let frozen = node.host_pod("frozen").await;
        let in_frozen = node.run(&frozen, &sleeper("c", &image)).await;
        let shim = node.pod_info(&frozen.id).await["shimPid"].as_i64().unwrap();
        kill(Pid::from_raw(i32::try_from(shim).unwrap()), Signal::SIGSTOP).unwrap();
        let (client, key) = (node.client.clone(), in_frozen.clone());
        let in_shim = tokio::spawn(async move { client.exec(&key, &["true"], 0).await });

        // A plugin that hangs.
        let plugin = node.daemon.plugin_faults().clone();
        let hung = node.pod_config("hung");
        let calls = plugin.count("ADD");
        plugin.set("ADD", Fault::Hang);
        let (client, config) = (node.client.clone(), hung.clone());
        let in_plugin = tokio::spawn(async move { client.run_pod(&config).await });
        eventually("the plugin hangs", async || {
            (plugin.count("ADD") > calls).then_some(())
        })
        .await;
        plugin.clear("ADD");

        // A runtime that hangs.
        let runtime = node.daemon.runtime_faults().clone();
        let mut config = node.pod_config("stuck");
        gantry_testkit::cri::pod_namespaces(&mut config).network =
            gantry_testkit::cri::v1::NamespaceMode::Node.into();
        let id = node.client.run_pod_by(&config, FAULTY).await.unwrap();
        let stuck = Pod { id, config };
        let in_stuck = node.create(&stuck, &sleeper("c", &image)).await;
        let calls = runtime.count("create");
        runtime.set("create", Fault::Hang);
        let (client, key) = (node.client.clone(), in_stuck.clone());
        let in_runtime = tokio::spawn(async move { client.start(&key).await });
        eventually("the runtime hangs", async || {
            (runtime.count("create") > calls).then_some(())
        })
        .await;
        runtime.clear("create");

        // A disk for logs that takes nothing more.
        let stalled = node.host_pod("stalled").await;
        let mut config = script_config("c", &image, WHEN_TOLD);
        config.log_path = "full.log".to_owned();
        let log = stalled_log(&node.log_dir("stalled").join("full.log"));
        let in_stalled = node.run(&stalled, &config).await;
        node.sh(&in_stalled, "touch /tmp/go").await;

        others_live(node, &image, "beside").await;
        assert!(!in_plugin.is_finished() && !in_runtime.is_finished());

        // The restart waits for nobody either: a frozen shim costs its own pod's time alone.
        let began = Instant::now();
        node.kill_and_start_again().await;
        let took = began.elapsed();
        assert!(took < Duration::from_secs(20), "{took:?}");
        println!("restart with four stuck pods: {took:?}");
        for call in [
            in_shim.await.is_ok(),
            in_plugin.await.is_ok(),
            in_runtime.await.is_ok(),
        ] {
            assert!(call, "a task that panicked");
        }
        others_live(node, &image, "after").await;

        // What is stuck can be stopped and removed, each within its bounds.
        for (pod, id) in [
            (&frozen, &in_frozen),
            (&stuck, &in_stuck),
            (&stalled, &in_stalled),
        ] {
            let name = &pod.config.metadata.as_ref().unwrap().name;
            within(BOUND, name, node.client.stop(id, 1)).await.unwrap();
            within(BOUND, name, node.client.stop_pod(&pod.id))
                .await
                .unwrap();
            within(BOUND, name, node.client.remove_pod(&pod.id))
                .await
                .unwrap();
        }
        drop(log);
        // The same pod as the one whose plugin hung is made at once.
        let hung = within(FAST, "the pod whose plugin hung", node.run_pod(&hung)).await;
        assert!(node.pod_is_ready(&hung.id).await);

        // Nothing happened to the witness.
        assert!(node.is_running(&counter).await);
        let log = node.output(&witness, "counter");
        let numbers: Vec<u64> = log.lines().filter_map(|line| line.parse().ok()).collect();
        assert!(
            numbers.iter().copied().eq(1..=numbers.len() as u64),
            "{numbers:?}"
        );
        assert!(numbers.len() > 20);
    });
}
