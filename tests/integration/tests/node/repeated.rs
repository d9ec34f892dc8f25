//! Calls that are cut in the middle and made again: one object, once.

use std::time::Duration;

use gantry_integration::{Node, Pod, eventually, on_failing_node, on_plain_node, refused, sleeper};
use gantry_testkit::cri::Client;
use gantry_testkit::faults::Fault;
use tonic::Code;

/// Gives a call a moment, then goes away from it.
async fn abandon<T: Send + 'static>(
    after: Duration,
    call: impl Future<Output = T> + Send + 'static,
) {
    let caller = tokio::spawn(call);
    tokio::time::sleep(after).await;
    caller.abort();
    let _ = caller.await;
}

/// The one pod that there is.
async fn only_pod(node: &Node) -> String {
    let pods = node.client.list_pods(None).await.unwrap();
    assert_eq!(pods.len(), 1, "{pods:?}");
    pods[0].id.clone()
}

async fn only_container(node: &Node) -> String {
    let containers = node.client.list(None).await.unwrap();
    assert_eq!(containers.len(), 1, "{containers:?}");
    containers[0].id.clone()
}

#[test]
fn the_same_request_returns_the_same_object() {
    on_plain_node("the_same_request_returns_the_same_object", async |node| {
        let image = node.busybox().await;
        let config = node.pod_config("same");
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let (client, config) = (node.client.clone(), config.clone());
            calls.spawn(async move { client.run_pod(&config).await.unwrap() });
        }
        let ids = calls.join_all().await;
        let id = only_pod(node).await;
        assert!(ids.iter().all(|other| *other == id), "{ids:?}");
        assert_eq!(node.client.run_pod(&config).await.unwrap(), id);
        assert_eq!(node.daemon.plugin_faults().count("ADD"), 1);
        let pod = Pod { id, config };

        let config = sleeper("c", &image);
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let (client, config, pod) = (node.client.clone(), config.clone(), pod.clone());
            calls.spawn(async move { client.create(&pod.id, &config, &pod.config).await.unwrap() });
        }
        let ids = calls.join_all().await;
        let id = only_container(node).await;
        assert!(ids.iter().all(|other| *other == id), "{ids:?}");
        node.client.start(&id).await.unwrap();
        assert_eq!(node.create(&pod, &config).await, id, "also when it runs");

        // The same over a restart.
        node.kill_and_start_again().await;
        assert_eq!(node.client.run_pod(&pod.config).await.unwrap(), pod.id);
        assert_eq!(node.create(&pod, &config).await, id);

        // Another configuration under the name is another matter.
        let mut other = pod.config.clone();
        other.labels.insert("other".to_owned(), "1".to_owned());
        refused(
            node.client.run_pod(&other).await,
            Code::AlreadyExists,
            &pod.id,
        );
        refused(
            node.client.run_pod_by(&pod.config, "runc").await,
            Code::AlreadyExists,
            &pod.id,
        );
        let mut other = config.clone();
        other.command = vec!["true".to_owned()];
        let answer = node.client.create(&pod.id, &other, &pod.config).await;
        refused(answer, Code::AlreadyExists, &id);
        // Another attempt is another object.
        let mut other = config.clone();
        other.metadata.as_mut().unwrap().attempt = 1;
        assert_ne!(node.create(&pod, &other).await, id);
        let mut other = pod.config.clone();
        other.metadata.as_mut().unwrap().attempt = 1;
        assert_ne!(node.client.run_pod(&other).await.unwrap(), pod.id);
        // A stopped pod does not hold its name.
        node.client.stop_pod(&pod.id).await.unwrap();
        assert_ne!(node.client.run_pod(&pod.config).await.unwrap(), pod.id);
    });
}

/// Every step of both chains is held up once; the client leaves in the middle of it.
#[test]
fn a_client_that_goes_away_in_the_middle_leaves_one_object() {
    const SLOW: &str = "pod::after-intent=1*sleep(400)->off;pod::after-shim=1*sleep(400)->off;\
         pod::after-network=1*sleep(400)->off;container::after-intent=1*sleep(400)->off;\
         container::after-root=1*sleep(400)->off";
    on_failing_node(
        "a_client_that_goes_away_in_the_middle_leaves_one_object",
        SLOW,
        async |node| {
            let image = node.busybox().await;
            let config = node.pod_config("left");
            let short = Duration::from_millis(300);
            for _ in 0..3 {
                let (client, config) = (
                    Client::connect(node.daemon.socket()).unwrap(),
                    config.clone(),
                );
                abandon(short, async move { client.run_pod(&config).await }).await;
            }
            let id = node.client.run_pod(&config).await.unwrap();
            assert_eq!(only_pod(node).await, id);
            let pod = Pod { id, config };
            let config = sleeper("c", &image);
            for _ in 0..3 {
                let client = Client::connect(node.daemon.socket()).unwrap();
                let (config, pod) = (config.clone(), pod.clone());
                abandon(short, async move {
                    client.create(&pod.id, &config, &pod.config).await
                })
                .await;
            }
            let id = node.create(&pod, &config).await;
            assert_eq!(only_container(node).await, id);
            node.client.start(&id).await.unwrap();
            assert_eq!(node.sh(&id, "echo x").await, "x");
        },
    );
}

/// The deadline of the call passes: as if the client had left.
#[test]
fn a_deadline_in_the_middle_leaves_one_pod() {
    on_failing_node(
        "a_deadline_in_the_middle_leaves_one_pod",
        "pod::after-shim=1*sleep(1500)->off",
        async |node| {
            let config = node.pod_config("late");
            let mut request = tonic::Request::new(gantry_testkit::cri::v1::RunPodSandboxRequest {
                config: Some(config.clone()),
                runtime_handler: String::new(),
            });
            request.set_timeout(Duration::from_millis(500));
            let error = node
                .client
                .runtime
                .clone()
                .run_pod_sandbox(request)
                .await
                .unwrap_err();
            assert!(
                matches!(error.code(), Code::DeadlineExceeded | Code::Cancelled),
                "{error:?}"
            );
            let id = node.client.run_pod(&config).await.unwrap();
            assert_eq!(only_pod(node).await, id);
        },
    );
}

/// Kills the daemon at one step of RunPodSandbox, starts it again and repeats the call.
async fn killed_in_run_pod(node: &mut Node, point: &str) {
    let config = node.pod_config("killed");
    let answer = node.client.run_pod(&config).await;
    assert!(answer.is_err(), "{point}: {answer:?}");
    node.daemon.wait_ended().await.unwrap();
    node.start_again(&[]).await;
    // What was half made is gone; what was whole is whole.
    for pod in node.client.list_pods(None).await.unwrap() {
        assert!(node.pod_is_ready(&pod.id).await, "{point}");
    }
    let image = node.busybox().await;
    let pod = node.run_pod(&config).await;
    assert_eq!(only_pod(node).await, pod.id, "{point}");
    let id = node.run(&pod, &sleeper("c", &image)).await;
    assert_eq!(node.sh(&id, "echo x").await, "x", "{point}");
}

macro_rules! kill_points {
    ($($name:ident: $point:literal, $killed:ident;)*) => {
        $(
            #[test]
            fn $name() {
                let failpoints = concat!($point, "=return(kill)");
                on_failing_node(stringify!($name), failpoints, async |node| {
                    $killed(node, $point).await;
                });
            }
        )*
    };
}

kill_points! {
    killed_after_the_pods_intent: "pod::after-intent", killed_in_run_pod;
    killed_after_the_pods_shim: "pod::after-shim", killed_in_run_pod;
    killed_after_the_pods_network: "pod::after-network", killed_in_run_pod;
    killed_after_the_pods_result: "pod::after-result", killed_in_run_pod;
    killed_after_the_containers_intent: "container::after-intent", killed_in_create;
    killed_after_the_containers_root: "container::after-root", killed_in_create;
    killed_after_the_containers_result: "container::after-result", killed_in_create;
}

async fn killed_in_create(node: &mut Node, point: &str) {
    let image = node.busybox().await;
    let pod = node.pod("killed").await;
    let config = sleeper("c", &image);
    let answer = node.client.create(&pod.id, &config, &pod.config).await;
    assert!(answer.is_err(), "{point}: {answer:?}");
    node.daemon.wait_ended().await.unwrap();
    node.start_again(&[]).await;
    assert_eq!(only_pod(node).await, pod.id);
    let id = node.create(&pod, &config).await;
    assert_eq!(only_container(node).await, id, "{point}");
    node.client.start(&id).await.unwrap();
    assert_eq!(node.sh(&id, "echo x").await, "x", "{point}");
}

/// Every step fails once: the error is told, nothing is left, and the same request then works.
#[test]
fn a_step_that_fails_is_taken_back() {
    let points = [
        "pod::after-intent",
        "pod::after-shim",
        "pod::after-network",
        "pod::after-result",
    ];
    let containers = [
        "container::after-intent",
        "container::after-root",
        "container::after-result",
    ];
    let failpoints: Vec<_> = points
        .iter()
        .chain(&containers)
        .map(|point| format!("{point}=1*return(out of {point})->off"))
        .collect();
    on_failing_node(
        "a_step_that_fails_is_taken_back",
        &failpoints.join(";"),
        async |node| {
            let image = node.busybox().await;
            node.accept_now();
            let config = node.pod_config("failing");
            for point in points {
                refused(
                    node.client.run_pod(&config).await,
                    Code::Internal,
                    &format!("out of {point}"),
                );
                assert!(
                    node.client.list_pods(None).await.unwrap().is_empty(),
                    "{point}"
                );
                node.assert_clean();
            }
            let pod = node.run_pod(&config).await;
            node.outlives_shim(&pod, &[]).await;
            let before = node.daemon.snapshot();
            let config = sleeper("c", &image);
            for point in containers {
                let answer = node.client.create(&pod.id, &config, &pod.config).await;
                refused(answer, Code::Internal, &format!("out of {point}"));
                assert!(node.client.list(None).await.unwrap().is_empty(), "{point}");
                let leaks = node.daemon.leaks(&before);
                assert!(leaks.is_empty(), "{point}: {leaks:?}");
            }
            let id = node.run(&pod, &config).await;
            assert!(node.is_running(&id).await);
        },
    );
}

/// A plugin that hangs holds up its own pod, and is in the way of nothing else.
#[test]
fn a_hanging_plugin_is_left_behind() {
    let options =
        gantry_testkit::daemon::Options::default().config("[timeouts]\nnetwork_seconds = 10\n");
    gantry_integration::on_node("a_hanging_plugin_is_left_behind", options, async |node| {
        let image = node.busybox().await;
        node.daemon.plugin_faults().set("ADD", Fault::Hang);
        let config = node.pod_config("hanging");
        let (client, pod_config) = (node.client.clone(), config.clone());
        let call = tokio::spawn(async move { client.run_pod(&pod_config).await });
        eventually("the plugin is called", async || {
            (node.daemon.plugin_faults().count("ADD") == 1).then_some(())
        })
        .await;
        let other = node.host_pod("other").await;
        node.run(&other, &sleeper("c", &image)).await;
        assert!(call.await.unwrap().is_err());
        node.daemon.plugin_faults().clear("ADD");
        node.run_pod(&config).await;
    });
}
