//! GetContainerEvents: what a kubelet that does not want to list all the time relies on.

use std::time::Duration;

use gantry_integration::{Node, eventually, on_plain_node, script_config, sleeper};
use gantry_testkit::cri::v1::runtime_service_client::RuntimeServiceClient;
use gantry_testkit::cri::v1::{
    ContainerEventResponse, ContainerEventType as Kind, ContainerState, GetEventsRequest,
    PodSandboxState,
};
use tonic::{Code, Status, Streaming};

struct Events(Streaming<ContainerEventResponse>);

impl Events {
    async fn of(node: &Node) -> Self {
        let channel = gantry_testkit::cri::channel(node.daemon.socket()).unwrap();
        let mut client = RuntimeServiceClient::new(channel);
        let events = client.get_container_events(GetEventsRequest {}).await;
        Self(events.expect("GetContainerEvents").into_inner())
    }

    async fn next_or_end(&mut self) -> Result<ContainerEventResponse, Status> {
        let next = tokio::time::timeout(Duration::from_secs(60), self.0.message()).await;
        let next = next.expect("an event within a minute")?;
        Ok(next.expect("no end without a reason"))
    }

    async fn next(&mut self) -> ContainerEventResponse {
        self.next_or_end().await.expect("event")
    }

    /// Id and kind of the next events.
    async fn take(&mut self, count: usize) -> Vec<(String, Kind)> {
        let mut events = Vec::new();
        for _ in 0..count {
            let event = self.next().await;
            let kind = event.container_event_type();
            events.push((event.container_id, kind));
        }
        events
    }
}

#[test]
fn a_life_is_told_in_order_with_final_statuses() {
    on_plain_node(
        "a_life_is_told_in_order_with_final_statuses",
        async |node| {
            let image = node.busybox().await;
            let mut events = Events::of(node).await;
            let pod = node.pod("p").await;
            let container = node.run_script(&pod, "c", &image, "exit 7").await;
            node.exited(&container).await;
            node.client.remove(&container).await.unwrap();
            let before = gantry_testkit::cri::channel(node.daemon.socket()).unwrap();
            let asked = RuntimeServiceClient::new(before)
                .pod_sandbox_status(gantry_testkit::cri::v1::PodSandboxStatusRequest {
                    pod_sandbox_id: pod.id.clone(),
                    verbose: false,
                })
                .await
                .unwrap()
                .into_inner();
            node.client.stop_pod(&pod.id).await.unwrap();
            node.client.remove_pod(&pod.id).await.unwrap();

            let (p, c) = (pod.id.as_str(), container.as_str());
            let expected = [
                (p, Kind::ContainerCreatedEvent),
                (p, Kind::ContainerStartedEvent),
                (c, Kind::ContainerCreatedEvent),
                (c, Kind::ContainerStartedEvent),
                (c, Kind::ContainerStoppedEvent),
                (c, Kind::ContainerDeletedEvent),
                (p, Kind::ContainerStoppedEvent),
                (p, Kind::ContainerDeletedEvent),
            ];
            let mut last = 0;
            for (n, (id, kind)) in expected.into_iter().enumerate() {
                let event = events.next().await;
                assert_eq!(
                    (event.container_id.as_str(), event.container_event_type()),
                    (id, kind),
                    "event {n}"
                );
                assert!(event.created_at > last, "event {n}: {event:?}");
                last = event.created_at;
                let status = event.pod_sandbox_status.as_ref().expect("the pod's status");
                assert_eq!(status.id, p);
                assert_eq!(status.metadata.as_ref().unwrap().name, "p");
                let ready = PodSandboxState::SandboxReady;
                assert_eq!(status.state() == ready, n < 6, "event {n}");
                let statuses: Vec<_> = event
                    .containers_statuses
                    .iter()
                    .map(|status| (status.id.as_str(), status.state(), status.exit_code))
                    .collect();
                match n {
                    2 => assert_eq!(statuses, [(c, ContainerState::ContainerCreated, 0)]),
                    3 => assert_eq!(statuses, [(c, ContainerState::ContainerRunning, 0)]),
                    4 => assert_eq!(statuses, [(c, ContainerState::ContainerExited, 7)]),
                    _ => assert!(statuses.is_empty(), "event {n}: {statuses:?}"),
                }
                // A kubelet tells by it what is newer: an event, or what it has asked.
                assert_eq!(event.created_at < asked.timestamp, n < 6, "event {n}");
            }
        },
    );
}

#[test]
fn a_sandbox_that_another_has_followed_is_not_told_as_the_pod() {
    let name = "a_sandbox_that_another_has_followed_is_not_told_as_the_pod";
    on_plain_node(name, async |node| {
        let image = node.busybox().await;
        let first = node.pod("p").await;
        let container = node.run_script(&first, "c", &image, "exit 7").await;
        node.exited(&container).await;
        node.client.stop_pod(&first.id).await.unwrap();
        let mut next = node.pod_config("p");
        next.metadata.as_mut().unwrap().attempt = 1;
        let next = node.run_pod(&next).await;
        let mut events = Events::of(node).await;
        node.client.remove(&container).await.unwrap();
        node.client.remove_pod(&first.id).await.unwrap();
        node.client.stop_pod(&next.id).await.unwrap();
        node.client.remove_pod(&next.id).await.unwrap();
        let (deleted, stopped) = (Kind::ContainerDeletedEvent, Kind::ContainerStoppedEvent);
        for (id, kind, told) in [
            (&container, deleted, false),
            (&first.id, deleted, false),
            (&next.id, stopped, true),
            (&next.id, deleted, true),
        ] {
            // Those of before are told to the first who comes.
            let event = loop {
                let event = events.next().await;
                if (&event.container_id, event.container_event_type()) == (id, kind) {
                    break event;
                }
            };
            assert_eq!(event.pod_sandbox_status.is_some(), told, "{event:?}");
        }
    });
}

#[test]
fn what_happened_without_a_daemon_is_told_by_the_next() {
    let name = "what_happened_without_a_daemon_is_told_by_the_next";
    on_plain_node(name, async |node| {
        let image = node.busybox().await;
        let pod = node.pod("p").await;
        let quiet = node.run(&pod, &sleeper("quiet", &image)).await;
        let script = "until [ -e /end ]; do sleep 0.05; done; exit 5";
        let ends = node.run_script(&pod, "ends", &image, script).await;
        let mut events = Events::of(node).await;
        events.take(6).await;
        let pid = node.container_info(&ends).await["pid"].as_i64().unwrap();
        node.daemon.kill().unwrap();
        assert!(events.next_or_end().await.is_err(), "the daemon has gone");
        std::fs::write(format!("/proc/{pid}/root/end"), "").unwrap();
        eventually("the container ends", async || {
            (!std::path::Path::new(&format!("/proc/{pid}")).exists()).then_some(())
        })
        .await;
        node.start_again(&[]).await;
        node.client.stop(&quiet, 0).await.unwrap();
        let mut events = Events::of(node).await;
        let event = events.next().await;
        assert_eq!(event.container_id, ends);
        assert_eq!(event.container_event_type(), Kind::ContainerStoppedEvent);
        let status = event
            .containers_statuses
            .iter()
            .find(|each| each.id == ends);
        assert_eq!(status.expect("its status").exit_code, 5);
        let stopped = (quiet.clone(), Kind::ContainerStoppedEvent);
        assert_eq!(events.take(1).await, [stopped]);

        // An exit that was recorded and perhaps not told is told again.
        node.kill_and_start_again().await;
        let mut again = Events::of(node).await;
        let mut told = again.take(2).await;
        told.sort();
        let mut expected = [ends, quiet].map(|id| (id, Kind::ContainerStoppedEvent));
        expected.sort();
        assert_eq!(told, expected);
        let lone = node.host_pod("lone").await;
        let created = (lone.id, Kind::ContainerCreatedEvent);
        assert_eq!(again.take(1).await, [created], "nothing else is");
    });
}

#[test]
fn all_subscribers_hear_of_everything_in_one_order() {
    let name = "all_subscribers_hear_of_everything_in_one_order";
    on_plain_node(name, async |node| {
        const PODS: usize = 4;
        const CONTAINERS: usize = 3;
        let image = node.busybox().await;
        let mut first = Events::of(node).await;
        let mut second = Events::of(node).await;
        let node = &*node;
        let lives = (0..PODS).map(async |n| {
            let pod = node.host_pod(&format!("p{n}")).await;
            let containers = (0..CONTAINERS).map(async |n| {
                let config = script_config(&format!("c{n}"), &image, "exit 0");
                let id = node.run(&pod, &config).await;
                node.exited(&id).await;
                node.client.remove(&id).await.unwrap();
                id
            });
            let mut ids = futures::future::join_all(containers).await;
            node.client.stop_pod(&pod.id).await.unwrap();
            node.client.remove_pod(&pod.id).await.unwrap();
            ids.push(pod.id);
            ids
        });
        let ids = futures::future::join_all(lives).await.concat();
        let count = PODS * (CONTAINERS + 1) * 4;
        let told = first.take(count).await;
        for id in ids {
            let life: Vec<_> = told.iter().filter(|(each, _)| *each == id).collect();
            let kinds: Vec<_> = life.into_iter().map(|(_, kind)| *kind).collect();
            let expected = [
                Kind::ContainerCreatedEvent,
                Kind::ContainerStartedEvent,
                Kind::ContainerStoppedEvent,
                Kind::ContainerDeletedEvent,
            ];
            assert_eq!(kinds, expected, "{id}");
        }
        assert_eq!(told, second.take(count).await);
    });
}

#[test]
fn a_start_that_fails_is_told_as_an_end() {
    on_plain_node("a_start_that_fails_is_told_as_an_end", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("p").await;
        let mut config = sleeper("c", &image);
        config.command = vec!["/not/there".to_owned()];
        let container = node.create(&pod, &config).await;
        let mut events = Events::of(node).await;
        assert_eq!(
            events.take(3).await.len(),
            3,
            "what was before: pod and container"
        );
        node.client.start(&container).await.unwrap_err();
        let event = events.next().await;
        assert_eq!(event.container_event_type(), Kind::ContainerStoppedEvent);
        let status = &event.containers_statuses[0];
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (128, "StartError")
        );
    });
}

#[test]
fn subscribers_hold_up_no_shutdown_and_are_told_of_it() {
    let name = "subscribers_hold_up_no_shutdown_and_are_told_of_it";
    on_plain_node(name, async |node| {
        let mut events = Events::of(node).await;
        let status = node.daemon.terminate().unwrap();
        assert!(status.success(), "{status}");
        let end = events.next_or_end().await.unwrap_err();
        assert_eq!(end.code(), Code::Unavailable, "{end}");
        let log = node.daemon.log();
        assert!(!log.contains("were cut off"), "{log}");
    });
}

/// One that does not read, while things happen.
#[test]
fn a_subscriber_that_does_not_read_is_dropped_and_told() {
    let name = "a_subscriber_that_does_not_read_is_dropped_and_told";
    on_plain_node(name, async |node| {
        let image = node.busybox().await;
        let mut slow = Events::of(node).await;
        let mut good = Events::of(node).await;
        // Each event has it, so that few of them fill the connection's buffers.
        let mut config = node.pod_config("p");
        let note = ("note".to_owned(), "x".repeat(32 << 10));
        config.annotations.extend([note]);
        let pod = node.run_pod(&config).await;
        let mut made = 2;
        let ended = async {
            loop {
                let end = good.next_or_end().await;
                assert!(end.is_ok(), "who reads is not dropped: {end:?}");
            }
        };
        let work = async {
            for n in 0..700 {
                let config = sleeper(&format!("c{n}"), &image);
                let id = node.create(&pod, &config).await;
                node.client.remove(&id).await.unwrap();
                made += 2;
            }
        };
        tokio::select! {
            () = ended => {}
            () = work => {}
        }
        let mut read = 0;
        let end = loop {
            match slow.next_or_end().await {
                Ok(_) => read += 1,
                Err(end) => break end,
            }
        };
        assert_eq!(end.code(), Code::ResourceExhausted, "{end}");
        assert!(read < made, "{read} of {made}");
        // And may come again.
        let mut again = Events::of(node).await;
        node.client.stop_pod(&pod.id).await.unwrap();
        let stopped = (pod.id, Kind::ContainerStoppedEvent);
        assert_eq!(again.take(1).await, [stopped]);
    });
}
