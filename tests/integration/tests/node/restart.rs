//! The daemon comes and goes; containers do not mind.

use gantry_integration::{Pod, on_plain_node, script_config, sleeper};
use gantry_testkit::cri::v1::ContainerState;

/// Containers of the test, in pods of four.
const CONTAINERS: usize = 20;

/// Writes numbered lines for as long as it lives.
const WRITER: &str = "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.01; done";

/// The lines of [`WRITER`]: all of them, once, in order.
fn assert_whole(output: &str, who: &str) -> usize {
    let mut count = 0;
    for (n, line) in output.lines().enumerate() {
        assert_eq!(line, format!("line {}", n + 1), "{who}");
        count = n + 1;
    }
    count
}

#[test]
fn kill_9_while_20_containers_write() {
    on_plain_node("kill_9_while_20_containers_write", async |node| {
        let image = node.busybox().await;
        let mut running: Vec<(Pod, String, String)> = Vec::new();
        let mut pod = None;
        for n in 0..CONTAINERS {
            if n % 4 == 0 {
                let name = format!("p{}", n / 4);
                // One with a network of its own, the others cheap.
                let made = if n == 0 {
                    node.pod(&name).await
                } else {
                    node.host_pod(&name).await
                };
                pod = Some(made);
            }
            let pod = pod.clone().unwrap();
            let name = format!("c{n}");
            let id = node.run_script(&pod, &name, &image, WRITER).await;
            running.push((pod, name, id));
        }
        let ending = script_config(
            "ending",
            &image,
            "until [ -e /tmp/end ]; do sleep 0.05; done; exit 6",
        );
        let ending_pod = running[0].0.clone();
        let ending = node.run(&ending_pod, &ending).await;
        let ending_root = node.container_info(&ending).await["pid"].as_i64().unwrap();
        let mut started = Vec::new();
        let mut counts = Vec::new();
        for (pod, name, id) in &running {
            started.push(node.status(id).await.started_at);
            node.has_written(pod, name, "line 5\n").await;
        }
        node.daemon.kill().unwrap();
        for (pod, name, _) in &running {
            counts.push(node.output(pod, name).lines().count());
        }
        // One ends while nobody watches but its shim.
        std::fs::write(format!("/proc/{ending_root}/root/tmp/end"), "").unwrap();
        let ended_after = now_ns();
        let gone = || !std::path::Path::new(&format!("/proc/{ending_root}")).exists();
        gantry_integration::eventually("it ends", async || gone().then_some(())).await;
        for ((pod, name, _), count) in running.iter().zip(&counts) {
            // Still written while there is no daemon.
            node.has_written(pod, name, &format!("line {}\n", count + 20))
                .await;
        }
        // Its shim looks at the clock once it has reaped it.
        let ended_before = now_ns();
        node.start_again(&[]).await;
        for ((_, name, id), started_at) in running.iter().zip(&started) {
            let status = node.status(id).await;
            assert_eq!(status.state(), ContainerState::ContainerRunning, "{name}");
            assert_eq!(status.started_at, *started_at, "{name}");
        }
        let status = node.status(&ending).await;
        assert_eq!(status.state(), ContainerState::ContainerExited);
        assert_eq!(status.exit_code, 6);
        assert!(
            (ended_after..=ended_before).contains(&status.finished_at),
            "{ended_after} <= {} <= {ended_before}",
            status.finished_at
        );
        // The new daemon drives what the old one made.
        assert_eq!(node.sh(&running[7].2, "echo there").await, "there");
        for (_, _, id) in &running {
            node.client.stop(id, 0).await.unwrap();
        }
        for (pod, name, _) in &running {
            assert!(assert_whole(&node.output(pod, name), name) > 20);
        }
    });
}

fn now_ns() -> i64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    i64::try_from(since.as_nanos()).unwrap()
}

#[test]
fn sigterm_leaves_pods_running() {
    on_plain_node("sigterm_leaves_pods_running", async |node| {
        let image = node.busybox().await;
        let pod = node.pod("stays").await;
        let id = node.run_script(&pod, "writer", &image, WRITER).await;
        let created = node.create(&pod, &sleeper("created", &image)).await;
        let exited = node.run_script(&pod, "exited", &image, "exit 4").await;
        node.exited(&exited).await;
        let ip = node.ip(&pod).await;
        let before = node.status(&id).await;
        let status = node.daemon.terminate().unwrap();
        assert!(status.success(), "{status}");
        assert!(
            !node.daemon.socket().exists(),
            "the socket goes with the daemon"
        );
        let pid_file = node.output(&pod, "writer").lines().count();
        node.has_written(&pod, "writer", &format!("line {}\n", pid_file + 10))
            .await;
        node.start_again(&[]).await;
        let after = node.status(&id).await;
        assert_eq!(before, after);
        assert!(node.pod_is_ready(&pod.id).await);
        assert_eq!(node.ip(&pod).await, ip);
        assert_eq!(node.status(&exited).await.exit_code, 4);
        assert_eq!(
            node.status(&created).await.state(),
            ContainerState::ContainerCreated
        );
        node.client.start(&created).await.unwrap();
        assert!(node.is_running(&created).await);
        node.client.stop(&id, 0).await.unwrap();
        assert_whole(&node.output(&pod, "writer"), "writer");
    });
}

/// Recovery finds nothing to do twice.
#[test]
fn many_restarts_change_nothing() {
    on_plain_node("many_restarts_change_nothing", async |node| {
        let image = node.busybox().await;
        let pod = node.pod("steady").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let (pod_status, status) = (
            node.client.pod_status(&pod.id).await.unwrap(),
            node.status(&id).await,
        );
        for _ in 0..4 {
            node.kill_and_start_again().await;
            assert_eq!(node.client.pod_status(&pod.id).await.unwrap(), pod_status);
            assert_eq!(node.status(&id).await, status);
        }
        assert_eq!(node.sh(&id, "echo x").await, "x");
    });
}

/// The boot id is the same here, so that every trace of the old pods must be looked for.
#[test]
fn after_a_reboot_pods_are_not_ready_and_removable() {
    on_plain_node(
        "after_a_reboot_pods_are_not_ready_and_removable",
        async |node| {
            let image = node.busybox().await;
            let pod = node.pod("rebooted").await;
            let running = node.run(&pod, &sleeper("running", &image)).await;
            let created = node.create(&pod, &sleeper("created", &image)).await;
            let exited = node.run_script(&pod, "exited", &image, "exit 4").await;
            node.exited(&exited).await;
            let started_at = node.status(&running).await.started_at;
            node.reboot().await;
            assert!(!node.pod_is_ready(&pod.id).await);
            let status = node.status(&running).await;
            assert_eq!(status.state(), ContainerState::ContainerExited);
            assert_ne!(status.exit_code, 0, "{status:?}");
            assert_eq!(status.started_at, started_at);
            assert_eq!(node.status(&exited).await.exit_code, 4);
            assert!(node.client.start(&created).await.is_err());
            // What the kubelet does: another attempt, and then the old one goes.
            let mut config = pod.config.clone();
            config.metadata.as_mut().unwrap().attempt = 1;
            let again = node.run_pod(&config).await;
            let id = node.run(&again, &sleeper("running", &image)).await;
            node.client.stop_pod(&pod.id).await.unwrap();
            node.client.remove_pod(&pod.id).await.unwrap();
            assert!(node.client.status(&running).await.is_err());
            assert_eq!(node.sh(&id, "echo x").await, "x");
            let addresses = gantry_testkit::leakcheck::names(&node.daemon.path("ipam/gantry-test"));
            let held = addresses
                .iter()
                .filter(|name| name.parse::<std::net::IpAddr>().is_ok());
            assert_eq!(held.count(), 1, "{addresses:?}");
        },
    );
}
