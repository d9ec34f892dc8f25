//! Pod metrics over CRI: cAdvisor's names, each with its descriptor.

use std::collections::{BTreeMap, BTreeSet};

use gantry_cri_api::v1 as cri;
use gantry_integration::usage::Cgroup;
use gantry_integration::{Node, eventually, on_plain_node, script_config, sleeper};
use gantry_testkit::cri::resources;
use gantry_testkit::cri::v1::LinuxContainerResources;

/// A metric's labels by their keys, and its value.
struct Series {
    labels: BTreeMap<String, String>,
    value: u64,
}

/// All series of a scrape by name, after what holds for every scrape was looked at.
async fn scrape(node: &Node) -> BTreeMap<String, Vec<Series>> {
    let descriptors = node.metric_descriptors().await.unwrap();
    let descriptors: BTreeMap<_, _> = descriptors
        .into_iter()
        .map(|descriptor| (descriptor.name.clone(), descriptor))
        .collect();
    let mut all: BTreeMap<String, Vec<Series>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for pod in node.pod_metrics().await.unwrap() {
        let of_containers = pod.container_metrics.into_iter();
        let of_containers = of_containers.flat_map(|container| container.metrics);
        for metric in pod.metrics.into_iter().chain(of_containers) {
            let keys = &descriptors[&metric.name].label_keys;
            assert_eq!(keys.len(), metric.label_values.len(), "{metric:?}");
            let series = (metric.name.clone(), metric.label_values.clone());
            assert!(seen.insert(series), "the same series twice: {metric:?}");
            let labels = keys.iter().cloned().zip(metric.label_values);
            all.entry(metric.name).or_default().push(Series {
                labels: labels.collect(),
                value: metric.value.unwrap().value,
            });
        }
    }
    all
}

/// The only series of a container.
fn of<'a>(all: &'a BTreeMap<String, Vec<Series>>, name: &str, container: &str) -> &'a Series {
    let series = all.get(name).unwrap_or_else(|| panic!("no {name}"));
    let mut own = series
        .iter()
        .filter(|one| one.labels["container"] == container);
    let found = own
        .next()
        .unwrap_or_else(|| panic!("{name} of {container}"));
    assert!(own.next().is_none(), "{name} of {container} twice");
    found
}

#[test]
fn metrics_of_a_container_are_what_the_kernel_counts() {
    on_plain_node(
        "metrics_of_a_container_are_what_the_kernel_counts",
        async |node| {
            let image = node.busybox().await;
            let pod = node.pod("counted").await;
            let script = "exec 3</etc/passwd 4</etc/passwd 5</etc/passwd; nc -l -p 9000 & \
                echo open; trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";
            let mut config = script_config("c", &image, script);
            *resources(&mut config) = LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 50_000,
                cpu_shares: 512,
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            };
            let named = config.image.as_mut().unwrap();
            named.user_specified_image = "as-the-pod-names-it".to_owned();
            let id = node.run(&pod, &config).await;
            node.has_written(&pod, "c", "open").await;
            let cgroup = node.cgroup(&id).await;
            // nc and sleep take a moment to be there.
            let all = eventually("all of it runs", async || {
                let all = scrape(node).await;
                // On a machine that is busy it may come with a later scrape.
                let measured = all.contains_key("container_fs_usage_bytes");
                let there = measured
                    && of(&all, "container_processes", "c").value == 3
                    && of(&all, "container_sockets", "c").value == 1
                    && cgroup.tasks() == 3;
                there.then_some(all)
            })
            .await;
            let value = |name: &str| of(&all, name, "c").value;
            assert_eq!(value("container_threads"), 3);
            // Three processes with standard streams, and three files in each but sleep.
            assert!(value("container_file_descriptors") >= 9);
            assert!(value("container_ulimits_soft") > 0);
            assert!(value("container_memory_usage_bytes").abs_diff(cgroup.memory()) < 4 << 20);
            let used = value("container_memory_usage_bytes");
            assert!(value("container_memory_working_set_bytes") <= used);
            assert!(value("container_memory_max_usage_bytes") > 0);
            assert_eq!(
                value("container_cpu_usage_seconds_total"),
                cgroup.cpu() / 1_000_000_000
            );
            for (name, expected) in [
                ("container_spec_cpu_period", 100_000),
                ("container_spec_cpu_quota", 50_000),
                ("container_spec_cpu_shares", 512),
                ("container_spec_memory_limit_bytes", 64 << 20),
                ("container_oom_events_total", 0),
            ] {
                assert_eq!(value(name), expected, "{name}");
            }
            let status = node.status(&id).await;
            let started = status.started_at / 1_000_000_000;
            let started = u64::try_from(started).unwrap();
            assert_eq!(value("container_start_time_seconds"), started);
            assert!(value("container_last_seen") >= started);
            assert!(value("container_fs_usage_bytes") > 0);
            assert!(value("container_fs_limit_bytes") > value("container_fs_usage_bytes"));
            assert!(value("container_fs_inodes_total") >= value("container_fs_inodes_free"));
            let failures = &all["container_memory_failures_total"];
            assert_eq!(failures.len(), 4, "two kinds, in two scopes");
            let counted = cgroup.text("cpu", "cpu.pressure", "cpu.pressure").is_some();
            for kind in ["cpu", "memory", "io"] {
                let name = format!("container_pressure_{kind}_waiting_seconds_total");
                assert_eq!(all.contains_key(&name), counted, "{name}");
            }

            let labels = &of(&all, "container_memory_rss", "c").labels;
            assert_eq!(labels["name"], id);
            assert_eq!(labels["image"], image);
            assert_eq!(labels["image"], status.image.unwrap().image);
            assert_eq!(labels["pod"], "counted");
            let metadata = pod.config.metadata.clone().unwrap();
            assert_eq!(labels["namespace"], metadata.namespace);
            assert!(
                labels["id"].starts_with('/') && labels["id"].contains(&id),
                "{labels:?}"
            );

            let network = of(&all, "container_network_transmit_bytes_total", "");
            assert_eq!(network.labels["interface"], "eth0");
            assert_eq!(network.labels["name"], pod.id);
            assert!(network.labels["id"].contains(&pod.id));
        },
    );
}

#[test]
fn a_pod_with_a_cgroup_of_its_own_has_metrics_of_it() {
    on_plain_node(
        "a_pod_with_a_cgroup_of_its_own_has_metrics_of_it",
        async |node| {
            let image = node.busybox().await;
            let mut config = node.pod_config("own");
            let parent = format!("/{}/pod{}", node.daemon.places().cgroup, "0ab1-own");
            config.metadata.as_mut().unwrap().uid = "0ab1-own".to_owned();
            config.linux.as_mut().unwrap().cgroup_parent = parent.clone();
            let own = node.run_pod(&config).await;
            node.run(&own, &sleeper("c", &image)).await;
            let shared = node.host_pod("shared").await;
            let other = node.run(&shared, &sleeper("d", &image)).await;
            let all = scrape(node).await;
            // As the kernel gives it to who asks for nothing.
            let period = of(&all, "container_spec_cpu_period", "");
            assert_eq!((period.value, &period.labels["id"]), (100_000, &parent));
            assert_eq!(
                of(&all, "container_spec_cpu_shares", "").labels["id"],
                parent
            );
            let unlimited = of(&all, "container_spec_memory_swap_limit_bytes", "");
            assert_eq!(unlimited.value, 0);
            for name in all.keys() {
                assert!(
                    !name.contains("_cfs_") && !name.ends_with("_quota"),
                    "{name}"
                );
            }
            let whole = of(&all, "container_memory_usage_bytes", "");
            assert_eq!(whole.labels["id"], parent);
            assert_eq!(
                (whole.labels["name"].as_str(), whole.labels["pod"].as_str()),
                ("", "own")
            );
            assert!(whole.value >= of(&all, "container_memory_usage_bytes", "c").value);
            // The other's parent is everybody's.
            let of_shared = all["container_memory_usage_bytes"].iter();
            let of_shared: Vec<_> = of_shared
                .filter(|one| one.labels["pod"] == "shared")
                .collect();
            assert_eq!(of_shared.len(), 1);
            assert_eq!(of_shared[0].labels["name"], other);
            let network = all["container_network_receive_bytes_total"].iter();
            let pods: Vec<_> = network.map(|one| one.labels["pod"].as_str()).collect();
            assert_eq!(pods, ["own"], "the host's network is nobody's");

            // The next attempt, while this one is there: both have a network.
            config.metadata.as_mut().unwrap().attempt = 1;
            let next = node.run_pod(&config).await;
            let all = scrape(node).await;
            let whole = of(&all, "container_memory_usage_bytes", "");
            assert_eq!(whole.labels["id"], parent);
            let network = all["container_network_receive_bytes_total"].iter();
            let mut holders: Vec<_> = network.map(|one| one.labels["name"].as_str()).collect();
            holders.sort_unstable();
            let mut expected = [own.id.as_str(), next.id.as_str()];
            expected.sort_unstable();
            assert_eq!(holders, expected);
            node.client.stop_pod(&next.id).await.unwrap();
            node.client.remove_pod(&next.id).await.unwrap();
            node.remove_with_parent(&own).await;
        },
    );
}

#[test]
fn metrics_are_of_what_runs_and_streams_say_the_same() {
    on_plain_node(
        "metrics_are_of_what_runs_and_streams_say_the_same",
        async |node| {
            assert!(node.pod_metrics().await.unwrap().is_empty());
            let image = node.busybox().await;
            let mut runs = BTreeSet::new();
            for n in 0..2 {
                let pod = node.host_pod(&format!("p{n}")).await;
                runs.insert(node.run(&pod, &sleeper("c", &image)).await);
                if n == 0 {
                    node.create(&pod, &sleeper("created", &image)).await;
                    let ended = node.run_script(&pod, "ended", &image, "exit 0").await;
                    node.exited(&ended).await;
                }
            }
            let stopped = node.host_pod("stopped").await;
            node.client.stop_pod(&stopped.id).await.unwrap();
            let containers = |pods: &[cri::PodSandboxMetrics]| -> BTreeSet<String> {
                let all = pods.iter().flat_map(|pod| &pod.container_metrics);
                all.map(|container| container.container_id.clone())
                    .collect()
            };
            let listed = node.pod_metrics().await.unwrap();
            assert_eq!(listed.len(), 2);
            assert_eq!(containers(&listed), runs);
            let request = cri::StreamPodSandboxMetricsRequest {};
            let mut stream = node.young().stream_pod_sandbox_metrics(request).await;
            let stream = stream.as_mut().unwrap().get_mut();
            let mut streamed = Vec::new();
            while let Some(message) = stream.message().await.unwrap() {
                streamed.extend(message.pod_sandbox_metrics);
            }
            assert_eq!(streamed.len(), 2);
            assert_eq!(containers(&streamed), runs);
            let v2 = node.metric_descriptors().await.unwrap();
            let pressure = v2
                .iter()
                .any(|one| one.name.starts_with("container_pressure_"));
            assert_eq!(pressure, Cgroup::is_v2());
        },
    );
}
