//! A part of one pod is lost: that pod says so, the others do not notice.

use gantry_integration::{Node, Pod, eventually, on_plain_node, sleeper};
use gantry_testkit::cri::v1::ContainerState;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// SIGKILL to the process whose pid is `key` of the pod's verbose status.
async fn kill_part(node: &Node, pod: &Pod, key: &str) {
    let pid = node.pod_info(&pod.id).await[key].as_i64().unwrap();
    assert!(pid > 1);
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
}

async fn not_ready(node: &Node, pod: &Pod) {
    eventually("the pod is NOT_READY", async || {
        (!node.pod_is_ready(&pod.id).await).then_some(())
    })
    .await;
}

#[test]
fn a_shim_killed_with_its_holder_takes_its_pod_and_no_other() {
    const NAME: &str = "a_shim_killed_with_its_holder_takes_its_pod_and_no_other";
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let (lost, other) = (node.pod("lost").await, node.pod("other").await);
        let first = node.run(&lost, &sleeper("first", &image)).await;
        let second = node.run(&lost, &sleeper("second", &image)).await;
        let created = node.create(&lost, &sleeper("created", &image)).await;
        let untouched = node.run(&other, &sleeper("untouched", &image)).await;
        let before = node.status(&untouched).await;
        let pid = node.container_info(&first).await["pid"].as_i64().unwrap();

        let began = std::time::Instant::now();
        node.kill_holder_and_shim(&lost).await;
        not_ready(node, &lost).await;
        for id in [&first, &second] {
            let status = node.exited(id).await;
            assert_eq!(status.exit_code, 137, "{status:?}");
            assert!(status.finished_at >= status.started_at);
        }
        println!("noticed and cleared within {:?}", began.elapsed());
        // Nobody keeps its stdio: the processes are killed, not left behind.
        eventually("its processes are gone", async || {
            (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(())
        })
        .await;
        assert_eq!(
            node.status(&created).await.state(),
            ContainerState::ContainerCreated
        );
        assert!(node.client.start(&created).await.is_err());
        assert_eq!(node.status(&untouched).await, before);
        assert!(node.pod_is_ready(&other.id).await);
        assert_eq!(node.sh(&untouched, "echo x").await, "x");
        // The kubelet makes another under the same name, and then removes the old one.
        let again = node.run_pod(&lost.config).await;
        assert_ne!(again.id, lost.id);
        node.client.remove(&first).await.unwrap();
        node.client.stop_pod(&lost.id).await.unwrap();
        node.client.remove_pod(&lost.id).await.unwrap();
        assert!(node.pod_is_ready(&again.id).await);
    });
}

#[test]
fn a_shim_killed_while_there_is_no_daemon_is_noticed_by_the_next() {
    on_plain_node(
        "a_shim_killed_while_there_is_no_daemon_is_noticed_by_the_next",
        async |node| {
            let image = node.busybox().await;
            let pod = node.pod("lost").await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            let shim = node.pod_info(&pod.id).await["shimPid"].as_i64().unwrap();
            node.daemon.kill().unwrap();
            kill(Pid::from_raw(i32::try_from(shim).unwrap()), Signal::SIGKILL).unwrap();
            node.start_again(&[]).await;
            assert!(!node.pod_is_ready(&pod.id).await);
            let status = node.exited(&id).await;
            assert_eq!(status.exit_code, 137);
        },
    );
}

#[test]
fn a_killed_holder_makes_the_pod_not_ready() {
    on_plain_node("a_killed_holder_makes_the_pod_not_ready", async |node| {
        let image = node.busybox().await;
        let pod = node.pod("held").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        kill_part(node, &pod, "pid").await;
        not_ready(node, &pod).await;
        // Its containers have their namespaces still; the kubelet stops them with the pod.
        node.client.stop_pod(&pod.id).await.unwrap();
        assert_eq!(node.exited(&id).await.exit_code, 137);
    });
}

/// A shim that is stopped answers nothing: only calls on its pod wait, and they end.
#[test]
fn a_hung_shim_delays_its_own_pod_only() {
    on_plain_node("a_hung_shim_delays_its_own_pod_only", async |node| {
        let image = node.busybox().await;
        let (hung, other) = (node.host_pod("hung").await, node.host_pod("other").await);
        let id = node.run(&hung, &sleeper("c", &image)).await;
        let shim = node.pod_info(&hung.id).await["shimPid"].as_i64().unwrap();
        let shim = Pid::from_raw(i32::try_from(shim).unwrap());
        kill(shim, Signal::SIGSTOP).unwrap();
        let (client, key) = (node.client.clone(), id.clone());
        let waiting = tokio::spawn(async move { client.exec(&key, &["true"], 3).await });
        // Reads and the other pod go on meanwhile.
        assert_eq!(node.client.list(None).await.unwrap().len(), 1);
        assert!(node.is_running(&id).await);
        let second = node.run(&other, &sleeper("c2", &image)).await;
        assert_eq!(node.sh(&second, "echo on").await, "on");
        assert!(waiting.await.unwrap().is_err());
        // The pod can be removed all the same.
        node.client.remove_pod(&hung.id).await.unwrap();
        assert!(node.is_running(&second).await);
    });
}
