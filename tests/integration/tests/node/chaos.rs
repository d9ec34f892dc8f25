//! The daemon is killed at any moment, the kubelet repeats what it had asked for.

use std::time::Duration;

use gantry_integration::{Fault, Node, Pod, eventually, on_plain_node, sleeper, while_unavailable};
use gantry_testkit::cri::v1::{ContainerConfig, PodSandboxConfig};
use gantry_testkit::cri::{Client, Result};

/// Kills of each test.
const ROUNDS: u64 = 12;

/// Makes a pod with a running container, as a kubelet that repeats everything.
async fn make(
    client: &Client,
    pod: &PodSandboxConfig,
    container: &ContainerConfig,
) -> Result<(String, String)> {
    let pod_id = client.run_pod(pod).await?;
    let id = client.create(&pod_id, container, pod).await?;
    client.start(&id).await?;
    Ok((pod_id, id))
}

async fn unmake(client: &Client, pod: &str, container: &str) -> Result<()> {
    client.stop(container, 0).await?;
    client.remove(container).await?;
    client.stop_pod(pod).await?;
    client.remove_pod(pod).await
}

/// Begins `work` on a connection of its own and kills the daemon after `moment`.
async fn killed_in<T>(
    node: &mut Node,
    moment: Duration,
    work: impl AsyncFnOnce(&Client) -> Result<T>,
) {
    let client = Client::connect(node.daemon.socket()).unwrap();
    // Cut off or finished: both happen.
    let _ = tokio::time::timeout(moment, work(&client)).await;
    node.kill_and_start_again().await;
}

#[test]
fn killed_at_any_moment_of_making_there_is_one_of_each() {
    on_plain_node(
        "killed_at_any_moment_of_making_there_is_one_of_each",
        async |node| {
            let image = node.busybox().await;
            let container = sleeper("c", &image);
            for round in 0..ROUNDS {
                let pod = node.pod_config(&format!("round-{round}"));
                // Spread over what the whole way takes.
                let moment = Duration::from_millis(round * 25);
                killed_in(node, moment, async |client| {
                    make(client, &pod, &container).await
                })
                .await;
                let (id, made) =
                    while_unavailable(async || make(&node.client, &pod, &container).await)
                        .await
                        .unwrap();
                let pods = node.client.list_pods(None).await.unwrap();
                assert_eq!(pods.len(), 1, "after {moment:?}: {pods:?}");
                let containers = node.client.list(None).await.unwrap();
                assert_eq!(containers.len(), 1, "after {moment:?}: {containers:?}");
                let pod = Pod { id, config: pod };
                assert!(node.pod_is_ready(&pod.id).await);
                assert_eq!(node.sh(&made, "echo x").await, "x", "after {moment:?}");
                node.remove_pods().await;
                // Nothing of a pod that was half made.
                node.assert_clean_but_daemon();
            }
        },
    );
}

#[test]
fn killed_at_any_moment_of_removal_nothing_is_left() {
    on_plain_node(
        "killed_at_any_moment_of_removal_nothing_is_left",
        async |node| {
            let image = node.busybox().await;
            let container = sleeper("c", &image);
            for round in 0..ROUNDS {
                let config = node.pod_config(&format!("round-{round}"));
                let (pod, id) = make(&node.client, &config, &container).await.unwrap();
                let moment = Duration::from_millis(round * 15);
                killed_in(node, moment, async |client| unmake(client, &pod, &id).await).await;
                while_unavailable(async || unmake(&node.client, &pod, &id).await)
                    .await
                    .unwrap();
                node.remove_pods().await;
                node.assert_clean_but_daemon();
            }
        },
    );
}

/// A plugin that hangs is killed at its deadline by the daemon that started it. Where that one is
/// killed before, the next one sees to it, before it takes back what the plugin has done.
#[test]
fn a_plugin_that_outlives_its_daemon_is_ended_by_the_next() {
    const NAME: &str = "a_plugin_that_outlives_its_daemon_is_ended_by_the_next";
    on_plain_node(NAME, async |node| {
        let config = node.pod_config("cut");
        node.daemon.plugin_faults().set("ADD", Fault::Hang);
        let client = Client::connect(node.daemon.socket()).unwrap();
        let (asked, wanted) = (client.clone(), config.clone());
        let call = tokio::spawn(async move { asked.run_pod(&wanted).await });
        let places = node.daemon.places().clone();
        let plugins = || {
            let all = places.processes().into_iter();
            all.filter(|process| process.command == "sleep 1000")
                .count()
        };
        eventually("the plugin hangs", async || (plugins() == 1).then_some(())).await;
        node.daemon.kill().unwrap();
        assert!(call.await.unwrap().is_err());
        assert_eq!(plugins(), 1, "it outlives its daemon");
        node.daemon.plugin_faults().clear("ADD");
        node.start_again(&[]).await;
        assert_eq!(plugins(), 0, "{:?}", places.processes());
        let pod = node.run_pod(&config).await;
        assert!(node.pod_is_ready(&pod.id).await);
    });
}

/// Whoever sees that a pod has ended may make another one of its name.
#[test]
fn a_pod_that_was_seen_to_end_does_not_come_back() {
    const NAME: &str = "a_pod_that_was_seen_to_end_does_not_come_back";
    on_plain_node(NAME, async |node| {
        let pod = node.pod("ending").await;
        node.daemon.plugin_faults().set("DEL", Fault::Hang);
        let (client, id) = (
            Client::connect(node.daemon.socket()).unwrap(),
            pod.id.clone(),
        );
        let call = tokio::spawn(async move { client.stop_pod(&id).await });
        eventually("the pod is seen to end", async || {
            (!node.pod_is_ready(&pod.id).await).then_some(())
        })
        .await;
        node.daemon.kill().unwrap();
        assert!(call.await.unwrap().is_err());
        node.daemon.plugin_faults().clear("DEL");
        node.start_again(&[]).await;
        assert!(!node.pod_is_ready(&pod.id).await);
        let again = node.run_pod(&pod.config).await;
        assert_ne!(again.id, pod.id);
        node.client.remove_pod(&pod.id).await.unwrap();
        assert!(node.pod_is_ready(&again.id).await);
    });
}
