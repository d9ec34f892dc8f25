//! Stats of containers and pods: what the kernel counts, whoever else is at it. On cgroup v1, on v2,
//! and there with the systemd driver too.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use gantry_cri_api::v1 as cri;
use gantry_cri_api::v1::image_service_client::ImageServiceClient;
use gantry_integration::usage::Cgroup;
use gantry_integration::{Node, Pod, eventually, on_node, script_config, sleeper};
use gantry_testkit::cri::resources;
use gantry_testkit::cri::v1::LinuxContainerResources;
use gantry_testkit::daemon::Options;
use tonic::{Code, Status};

const MIB: u64 = 1 << 20;

/// Runs a test with each cgroup driver that this machine can have.
fn on_each_driver(name: &str, test: impl AsyncFn(&mut Node)) {
    on_node(name, Options::default(), &test);
    if Cgroup::is_v2() && Path::new("/run/systemd/system").is_dir() {
        on_node(name, Options::default().systemd(), &test);
    }
}

/// A pod in a cgroup of its own, named as the kubelet names it.
async fn pod_of_a_kubelet(node: &Node, name: &str) -> Pod {
    let mut config = node.pod_config(name);
    let top = node.daemon.places().cgroup.clone();
    let metadata = config.metadata.as_mut().unwrap();
    metadata.uid = format!("0ab1-{name}");
    let parent = match top.strip_suffix(".slice") {
        Some(base) => {
            let uid = metadata.uid.replace('-', "_");
            format!("/{top}/{base}-pod{uid}.slice")
        }
        None => format!("/{top}/pod{}", metadata.uid),
    };
    config.linux.as_mut().unwrap().cgroup_parent = parent;
    node.run_pod(&config).await
}

fn value(value: Option<cri::UInt64Value>) -> u64 {
    value.expect("a value").value
}

fn nanos(cpu: &Option<cri::CpuUsage>) -> u64 {
    value(cpu.as_ref().expect("cpu").usage_core_nano_seconds)
}

fn rate(cpu: &Option<cri::CpuUsage>) -> Option<u64> {
    let rate = cpu.as_ref().expect("cpu").usage_nano_cores;
    rate.map(|rate| rate.value)
}

fn id(stats: &cri::ContainerStats) -> &str {
    &stats.attributes.as_ref().expect("attributes").id
}

fn ids(stats: &[cri::ContainerStats]) -> Vec<String> {
    let mut ids: Vec<_> = stats.iter().map(|stats| id(stats).to_owned()).collect();
    ids.sort_unstable();
    ids
}

fn pod_ids(stats: &[cri::PodSandboxStats]) -> Vec<String> {
    let ids = stats.iter().map(|stats| stats.attributes.as_ref());
    let mut ids: Vec<_> = ids.map(|one| one.expect("attributes").id.clone()).collect();
    ids.sort_unstable();
    ids
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code) {
    let status = answer.expect_err("the call must fail");
    assert_eq!(status.code(), code, "{status:?}");
}

#[test]
fn numbers_are_those_of_the_cgroup() {
    on_each_driver("numbers_are_those_of_the_cgroup", async |node| {
        let image = node.busybox().await;
        let pod = pod_of_a_kubelet(node, "numbers").await;
        let script = "dd if=/dev/zero of=/dev/shm/held bs=1M count=16 2>/dev/null; echo held; \
            trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";
        let mut config = script_config("c", &image, script);
        config.labels.insert("app".to_owned(), "numbers".to_owned());
        *resources(&mut config) = LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        };
        let container = node.run(&pod, &config).await;
        node.has_written(&pod, "c", "held").await;
        let cgroup = node.cgroup(&container).await;

        let before = cgroup.cpu();
        let stats = node.stats_of(&container).await.unwrap();
        let cpu = nanos(&stats.cpu);
        assert!((before..=cgroup.cpu()).contains(&cpu), "{before} {cpu}");
        let attributes = stats.attributes.as_ref().unwrap();
        assert_eq!(attributes.labels["app"], "numbers");
        assert_eq!(attributes.metadata.as_ref().unwrap().name, "c");

        let memory = stats.memory.as_ref().unwrap();
        assert!(memory.timestamp > 0);
        let (usage, working_set) = (value(memory.usage_bytes), value(memory.working_set_bytes));
        // The kernel keeps some pages in hand for each CPU, v1 more than v2.
        assert!(
            usage.abs_diff(cgroup.memory()) < 4 * MIB,
            "{usage} {cgroup:?}"
        );
        assert!(
            (16 * MIB..=64 * MIB).contains(&working_set),
            "{working_set}"
        );
        assert!(working_set <= usage);
        assert_eq!(value(memory.available_bytes), 64 * MIB - working_set);
        assert!(
            value(memory.rss_bytes) < 16 * MIB,
            "what lies in /dev/shm is not anonymous"
        );
        assert!(value(memory.page_faults) > 0);
        let swap = cgroup.text(
            "memory",
            "memory.memsw.usage_in_bytes",
            "memory.swap.current",
        );
        assert_eq!(stats.swap.is_some(), swap.is_some());
        // On v1 nobody counts it.
        let counted = cgroup.text("cpu", "cpu.pressure", "cpu.pressure").is_some();
        assert_eq!(stats.cpu.as_ref().unwrap().psi.is_some(), counted);
        assert_eq!(memory.psi.is_some(), counted);
        assert_eq!(stats.io.is_some(), counted);

        let whole = cgroup.parent();
        let before = whole.cpu();
        let of_pod = node.pod_stats_of(&pod.id).await.unwrap();
        let linux = of_pod.linux.unwrap();
        let cpu = nanos(&linux.cpu);
        assert!((before..=whole.cpu()).contains(&cpu), "{before} {cpu}");
        let of_memory = linux.memory.unwrap();
        let usage = value(of_memory.usage_bytes);
        assert!(
            usage.abs_diff(whole.memory()) < 4 * MIB,
            "{usage} {whole:?}"
        );
        assert_eq!(of_memory.available_bytes, None, "nobody limited the pod");
        assert_eq!(linux.cpu.unwrap().psi.is_some(), counted);
        assert_eq!(value(linux.process.unwrap().process_count), whole.tasks());
        assert_eq!(ids(&linux.containers), std::slice::from_ref(&container));
        assert!(linux.containers[0].cpu.is_some());
        node.remove_with_parent(&pod).await;
    });
}

#[test]
fn a_busy_container_has_a_rate_and_an_idle_one_next_to_none() {
    on_each_driver(
        "a_busy_container_has_a_rate_and_an_idle_one_next_to_none",
        async |node| {
            let image = node.busybox().await;
            let (pod, other) = (node.host_pod("busy").await, node.host_pod("idle").await);
            let busy = node
                .run_script(&pod, "b", &image, "while :; do :; done")
                .await;
            let idle = node.run(&other, &sleeper("i", &image)).await;
            let rates = async || {
                let stats = node.list_stats(None).await.unwrap();
                let of = |wanted: &str| {
                    let found = stats.iter().find(|stats| id(stats) == wanted);
                    rate(&found.expect("listed").cpu)
                };
                (of(&busy), of(&idle))
            };
            let (first, _) = rates().await;
            assert_eq!(first, None, "one sample makes no rate");
            eventually("there are rates", async || match rates().await {
                (Some(busy), Some(idle)) => (busy > 10_000_000 && idle < busy / 4).then_some(()),
                _ => None,
            })
            .await;
            // Whoever asks next, and at once again, has them too, and no noise.
            for _ in 0..20 {
                let (busy, idle) = rates().await;
                let (busy, idle) = (busy.unwrap(), idle.unwrap());
                assert!(busy > 1_000_000 && idle < busy, "{busy} {idle}");
            }
            let whole = node.pod_stats_of(&pod.id).await.unwrap().linux.unwrap();
            assert!(rate(&whole.cpu).unwrap() > 1_000_000);
        },
    );
}

#[test]
fn pods_that_share_a_parent_have_their_own_numbers() {
    on_each_driver(
        "pods_that_share_a_parent_have_their_own_numbers",
        async |node| {
            let image = node.busybox().await;
            let (pod, other) = (node.host_pod("busy").await, node.host_pod("idle").await);
            let script = "n=0; while [ $n -lt 100000 ]; do n=$((n + 1)); done; echo done; \
                trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";
            let busy = node.run_script(&pod, "b", &image, script).await;
            let idle = node.run(&other, &sleeper("i", &image)).await;
            node.has_written(&pod, "b", "done").await;
            let of = async |id: &str| node.pod_stats_of(id).await.unwrap().linux.unwrap();
            let (whole, idle_whole) = (of(&pod.id).await, of(&other.id).await);
            assert!(nanos(&idle_whole.cpu) < nanos(&whole.cpu));
            for (whole, container) in [(whole, &busy), (idle_whole, &idle)] {
                let own = &whole.containers[0];
                assert_eq!(id(own), *container);
                assert!(nanos(&whole.cpu) >= nanos(&own.cpu));
                let (all, own) = (whole.memory.unwrap(), own.memory.as_ref().unwrap());
                assert!(value(all.usage_bytes) >= value(own.usage_bytes));
                assert!(value(all.usage_bytes) < value(own.usage_bytes) + 16 * MIB);
                // The holder, and the container's shell with its sleep.
                let tasks = node.cgroup(container).await.tasks() + 1;
                assert_eq!(value(whole.process.unwrap().process_count), tasks);
                assert_eq!(whole.cpu.unwrap().psi, None, "pressures have no sum");
            }
        },
    );
}

#[test]
fn what_a_container_writes_is_measured() {
    on_each_driver("what_a_container_writes_is_measured", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("writer").await;
        let write = "dd if=/dev/zero of=/one bs=1M count=8 2>/dev/null; echo written; \
            trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";
        let writer = node.run_script(&pod, "w", &image, write).await;
        let idle = node.run(&pod, &sleeper("i", &image)).await;
        let created = node.create(&pod, &sleeper("c", &image)).await;
        node.has_written(&pod, "w", "written").await;
        node.sh(&writer, "sync").await;
        let layer = async |id: &str| node.stats_of(id).await.unwrap().writable_layer;
        // Soon, and no call waits long for it.
        let first = eventually("it is measured", async || layer(&writer).await).await;
        let used = value(first.used_bytes);
        assert!((8 * MIB..10 * MIB).contains(&used), "{used}");
        assert!(first.timestamp > 0);
        assert!(value(first.inodes_used) >= 2);
        let channel = gantry_testkit::cri::channel(node.daemon.socket()).unwrap();
        let mut images = ImageServiceClient::new(channel);
        let info = images.image_fs_info(cri::ImageFsInfoRequest {}).await;
        let info = info.unwrap().into_inner();
        let known = info
            .container_filesystems
            .iter()
            .chain(&info.image_filesystems);
        let mut known = known.filter_map(|one| one.fs_id.as_ref());
        assert!(
            known.any(|one| Some(one) == first.fs_id.as_ref()),
            "{info:?}"
        );
        for other in [&idle, &created] {
            let own = eventually("it is measured", async || layer(other).await).await;
            assert!(value(own.used_bytes) < MIB);
        }

        // It grows: seen when it is looked at again, and at once when the container has ended.
        node.sh(
            &writer,
            "dd if=/dev/zero of=/two bs=1M count=8; mkdir /d; touch /d/1 /d/2; sync",
        )
        .await;
        let deadline = Instant::now() + Duration::from_secs(90);
        loop {
            let grown = layer(&writer).await.unwrap();
            if grown.timestamp > first.timestamp && value(grown.used_bytes) >= 16 * MIB {
                assert!(value(grown.inodes_used) >= value(first.inodes_used) + 4);
                break;
            }
            assert!(Instant::now() < deadline, "not measured again: {grown:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        node.sh(&writer, "rm /one; sync").await;
        node.client.stop(&writer, 10).await.unwrap();
        node.exited(&writer).await;
        let last = eventually("it is measured when it has ended", async || {
            let layer = layer(&writer).await.unwrap();
            (value(layer.used_bytes) < 10 * MIB).then_some(layer)
        })
        .await;
        assert!(
            value(last.used_bytes) >= 8 * MIB,
            "what it left is still there"
        );
        let ended = node.stats_of(&writer).await.unwrap();
        assert!(ended.cpu.is_none() && ended.memory.is_none());
        // Perhaps by one more look, if the last was before the end.
        let ended = ended.writable_layer.expect("still known");
        assert_eq!(ended.used_bytes, last.used_bytes);
        assert_eq!(ended.inodes_used, last.inodes_used);
    });
}

#[test]
fn network_counters_are_those_of_the_pods_interfaces() {
    on_each_driver(
        "network_counters_are_those_of_the_pods_interfaces",
        async |node| {
            let image = node.busybox().await;
            let pod = node.pod("network").await;
            let container = node.run(&pod, &sleeper("c", &image)).await;
            let network = async || {
                let stats = node.pod_stats_of(&pod.id).await.unwrap();
                stats.linux.unwrap().network.expect("a network of its own")
            };
            let first = network().await;
            let names: Vec<_> = first
                .interfaces
                .iter()
                .map(|one| one.name.as_str())
                .collect();
            // Modules for tunnels put interfaces of their own into each new namespace.
            assert!(!names.contains(&"lo"), "{names:?}");
            let default = first.default_interface.as_ref();
            assert_eq!(default.unwrap().name, "eth0");
            assert!(!names.contains(&"eth0"), "{names:?} are the others");
            let sent = async || {
                let text = node.sh(&container, "cat /sys/class/net/eth0/statistics/tx_bytes");
                text.await.parse::<u64>().unwrap()
            };
            let before = sent().await;
            // Whether the other listens or not: both are looked for.
            let other = node.pod("other").await;
            let script = format!("nc -w 1 {} 9 </dev/null || true", node.ip(&other).await);
            eventually("something is sent", async || {
                node.sh(&container, &script).await;
                (sent().await > before).then_some(())
            })
            .await;
            let default = network().await.default_interface.unwrap();
            assert_eq!(default.name, "eth0");
            let counted = value(default.tx_bytes);
            assert!(
                (before + 1..=sent().await).contains(&counted),
                "{before} {counted}"
            );
            assert_eq!(value(default.rx_errors), 0);

            let host = node.host_pod("host").await;
            let stats = node.pod_stats_of(&host.id).await.unwrap();
            assert_eq!(
                stats.linux.unwrap().network,
                None,
                "the host's is not the pod's"
            );
        },
    );
}

#[test]
fn filters_choose_as_in_the_other_lists_and_streams_say_the_same() {
    on_each_driver(
        "filters_choose_as_in_the_other_lists_and_streams_say_the_same",
        async |node| {
            let image = node.busybox().await;
            let mut config = node.pod_config("one");
            config.labels.insert("app".to_owned(), "a".to_owned());
            let (one, two) = (node.run_pod(&config).await, node.host_pod("two").await);
            let labelled = |name: &str, pairs: &[(&str, &str)]| {
                let mut config = sleeper(name, &image);
                let pairs = pairs
                    .iter()
                    .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
                config.labels.extend(pairs);
                config
            };
            let a = node
                .run(&one, &labelled("a", &[("app", "a"), ("tier", "x")]))
                .await;
            let b = node.run(&one, &labelled("b", &[("app", "a")])).await;
            let c = node.create(&two, &labelled("c", &[("app", "c")])).await;
            let sorted = |mut ids: Vec<&String>| {
                ids.sort_unstable();
                ids.into_iter().cloned().collect::<Vec<_>>()
            };
            let selector = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
                let pairs = pairs
                    .iter()
                    .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
                pairs.collect()
            };
            let filter = |id: &str, pod: &str, pairs: &[(&str, &str)]| cri::ContainerStatsFilter {
                id: id.to_owned(),
                pod_sandbox_id: pod.to_owned(),
                label_selector: selector(pairs),
            };
            let table = [
                (filter("", "", &[]), vec![&a, &b, &c]),
                (filter(&a, "", &[]), vec![&a]),
                (filter(&a[..20], "", &[]), vec![&a]),
                (filter("", &one.id, &[]), vec![&a, &b]),
                (filter("", "", &[("app", "a")]), vec![&a, &b]),
                (filter("", "", &[("app", "a"), ("tier", "x")]), vec![&a]),
                (filter("", &two.id, &[("app", "a")]), vec![]),
                (filter("", "", &[("app", "z")]), vec![]),
                (filter("no such id", "", &[]), vec![]),
                (filter("\0../", "%", &[("", "")]), vec![]),
            ];
            for (filter, expected) in table {
                let listed = node.list_stats(Some(filter.clone())).await.unwrap();
                assert_eq!(ids(&listed), sorted(expected), "{filter:?}");
                let request = cri::StreamContainerStatsRequest {
                    filter: Some(filter),
                };
                let mut stream = node.young().stream_container_stats(request).await;
                let stream = stream.as_mut().unwrap().get_mut();
                let mut streamed = Vec::new();
                while let Some(message) = stream.message().await.unwrap() {
                    streamed.extend(message.container_stats);
                }
                assert_eq!(ids(&streamed), ids(&listed));
            }
            assert_eq!(ids(&node.list_stats(None).await.unwrap()).len(), 3);

            let filter = |id: &str, pairs: &[(&str, &str)]| cri::PodSandboxStatsFilter {
                id: id.to_owned(),
                label_selector: selector(pairs),
            };
            let table = [
                (filter("", &[]), vec![&one.id, &two.id]),
                (filter(&two.id, &[]), vec![&two.id]),
                (filter("", &[("app", "a")]), vec![&one.id]),
                (filter(&two.id, &[("app", "a")]), vec![]),
            ];
            for (filter, expected) in table {
                let listed = node.list_pod_stats(Some(filter.clone())).await.unwrap();
                assert_eq!(pod_ids(&listed), sorted(expected), "{filter:?}");
                let request = cri::StreamPodSandboxStatsRequest {
                    filter: Some(filter),
                };
                let mut stream = node.young().stream_pod_sandbox_stats(request).await;
                let stream = stream.as_mut().unwrap().get_mut();
                let mut streamed = Vec::new();
                while let Some(message) = stream.message().await.unwrap() {
                    streamed.extend(message.pod_sandbox_stats);
                }
                assert_eq!(pod_ids(&streamed), pod_ids(&listed));
            }
        },
    );
}

#[test]
fn stats_of_what_is_not_there_are_refused() {
    on_each_driver("stats_of_what_is_not_there_are_refused", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("gone").await;
        let container = node.run(&pod, &sleeper("c", &image)).await;
        assert!(
            node.stats_of(&container[..16]).await.is_ok(),
            "a beginning will do"
        );
        assert!(node.pod_stats_of(&pod.id[..16]).await.is_ok());
        let junk = "ff".repeat(32);
        let endless = "0".repeat(100_000);
        for bad in [
            "",
            "no such id",
            "../../etc",
            "\0",
            &junk,
            &endless,
            &pod.id,
        ] {
            refused(node.stats_of(bad).await, Code::NotFound);
        }
        for bad in ["", "no such id", "\0", &junk, &endless, &container] {
            refused(node.pod_stats_of(bad).await, Code::NotFound);
        }
        node.client.stop_pod(&pod.id).await.unwrap();
        refused(node.pod_stats_of(&pod.id).await, Code::FailedPrecondition);
        assert!(node.list_pod_stats(None).await.unwrap().is_empty());
        let ended = node.stats_of(&container).await.unwrap();
        assert!(ended.cpu.is_none() && ended.memory.is_none(), "{ended:?}");
        node.client.remove_pod(&pod.id).await.unwrap();
        refused(node.stats_of(&container).await, Code::NotFound);
        refused(node.pod_stats_of(&pod.id).await, Code::NotFound);
        assert!(node.list_stats(None).await.unwrap().is_empty());
    });
}

#[test]
fn lists_do_not_fail_while_containers_come_and_go() {
    on_each_driver(
        "lists_do_not_fail_while_containers_come_and_go",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("coming").await;
            let stays = node.run(&pod, &sleeper("stays", &image)).await;
            let come_and_go = async {
                for n in 0..12 {
                    let name = format!("c{n}");
                    let container = node.run_script(&pod, &name, &image, "sleep 1000").await;
                    node.client.stop(&container, 0).await.unwrap();
                    node.client.remove(&container).await.unwrap();
                    let brief = node.host_pod(&format!("p{n}")).await;
                    node.client.stop_pod(&brief.id).await.unwrap();
                    node.client.remove_pod(&brief.id).await.unwrap();
                }
            };
            let look = async {
                loop {
                    let listed = node.list_stats(None).await.unwrap();
                    assert!(ids(&listed).contains(&stays));
                    for one in &listed {
                        // It may have gone since; nothing else may happen.
                        if let Err(status) = node.stats_of(id(one)).await {
                            assert_eq!(status.code(), Code::NotFound, "{status:?}");
                        }
                    }
                    let pods = node.list_pod_stats(None).await.unwrap();
                    assert!(pod_ids(&pods).contains(&pod.id));
                    node.pod_metrics().await.unwrap();
                }
            };
            tokio::select! {
                () = come_and_go => {}
                () = look => {}
            }
        },
    );
}

#[test]
fn a_hundred_calls_at_once_are_all_answered() {
    on_each_driver("a_hundred_calls_at_once_are_all_answered", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("many").await;
        for n in 0..3 {
            node.run(&pod, &sleeper(&format!("c{n}"), &image)).await;
        }
        let mut calls = tokio::task::JoinSet::new();
        let client = node.young();
        for n in 0..100 {
            let mut client = client.clone();
            calls.spawn(async move {
                match n % 3 {
                    0 => {
                        let request = cri::ListContainerStatsRequest { filter: None };
                        let answer = client.list_container_stats(request).await?;
                        assert_eq!(answer.into_inner().stats.len(), 3);
                    }
                    1 => {
                        let request = cri::ListPodSandboxStatsRequest { filter: None };
                        let answer = client.list_pod_sandbox_stats(request).await?;
                        assert_eq!(answer.into_inner().stats.len(), 1);
                    }
                    _ => {
                        let request = cri::ListPodSandboxMetricsRequest {};
                        let answer = client.list_pod_sandbox_metrics(request).await?;
                        assert_eq!(answer.into_inner().pod_metrics.len(), 1);
                    }
                }
                Ok::<_, Status>(())
            });
        }
        while let Some(answer) = calls.join_next().await {
            answer.unwrap().unwrap();
        }
    });
}

#[test]
fn stats_are_the_same_after_a_restart() {
    on_each_driver("stats_are_the_same_after_a_restart", async |node| {
        let image = node.busybox().await;
        let pod = node.pod("kept").await;
        let script = "dd if=/dev/zero of=/one bs=1M count=8 2>/dev/null; echo written; \
            trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";
        let runs = node.run_script(&pod, "runs", &image, script).await;
        let ended = node.run_script(&pod, "ended", &image, "echo x > /x").await;
        node.has_written(&pod, "runs", "written").await;
        node.exited(&ended).await;
        let layer = async |id: &str| node.stats_of(id).await.unwrap().writable_layer;
        for id in [&runs, &ended] {
            eventually("it is measured", async || layer(id).await).await;
        }
        let before = node.stats_of(&runs).await.unwrap();
        let last = layer(&ended).await.unwrap();
        let of_pod = node.pod_stats_of(&pod.id).await.unwrap().linux.unwrap();
        // The connections are the old daemon's.
        node.kill_and_start_again().await;
        let after = node.stats_of(&runs).await.unwrap();
        assert!(
            nanos(&after.cpu) >= nanos(&before.cpu),
            "nothing is counted anew"
        );
        let usage = |stats: &cri::ContainerStats| value(stats.memory.as_ref().unwrap().usage_bytes);
        assert!(usage(&after) >= MIB);
        let again = node.pod_stats_of(&pod.id).await.unwrap().linux.unwrap();
        assert!(nanos(&again.cpu) >= nanos(&of_pod.cpu));
        let sent = |network: Option<cri::NetworkUsage>| {
            value(network.unwrap().default_interface.unwrap().tx_bytes)
        };
        assert!(sent(again.network) >= sent(of_pod.network));
        let layer = async |id: &str| node.stats_of(id).await.unwrap().writable_layer;
        let measured = eventually("it is measured again", async || layer(&ended).await).await;
        assert_eq!(measured.used_bytes, last.used_bytes);
        assert_eq!(measured.inodes_used, last.inodes_used);
        eventually("there are rates again", async || {
            rate(&node.stats_of(&runs).await.unwrap().cpu)
        })
        .await;
    });
}
