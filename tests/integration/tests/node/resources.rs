//! Limits: what is asked for is what the kernel has.

use std::path::{Path, PathBuf};

use gantry_integration::{Node, on_plain_node, refused, sleeper};
use gantry_testkit::cri::resources;
use gantry_testkit::cri::v1::LinuxContainerResources;
use tonic::Code;

/// Reads a file of a cgroup below the fixture's own parent, `controller` of v1 or v2's.
fn cgroup(node: &Node, relative: &str, controller: &str, v1: &str, v2: &str) -> String {
    let parent = &node.daemon.places().cgroup;
    let unified = Path::new("/sys/fs/cgroup").join(parent);
    let path: PathBuf = if unified.is_dir() {
        unified.join(relative).join(v2)
    } else {
        Path::new("/sys/fs/cgroup")
            .join(controller)
            .join(parent)
            .join(relative)
            .join(v1)
    };
    let text = std::fs::read_to_string(&path);
    text.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        .trim()
        .to_owned()
}

fn memory(node: &Node, relative: &str) -> String {
    cgroup(
        node,
        relative,
        "memory",
        "memory.limit_in_bytes",
        "memory.max",
    )
}

fn quota(node: &Node, relative: &str) -> String {
    let text = cgroup(node, relative, "cpu", "cpu.cfs_quota_us", "cpu.max");
    text.split(' ').next().unwrap_or_default().to_owned()
}

#[test]
fn limits_reach_the_cgroup_and_are_changed_there() {
    on_plain_node(
        "limits_reach_the_cgroup_and_are_changed_there",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("limits").await;
            let mut config = sleeper("c", &image);
            *resources(&mut config) = LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                cpu_quota: 50_000,
                cpu_period: 100_000,
                cpu_shares: 512,
                oom_score_adj: 300,
                ..Default::default()
            };
            let id = node.create(&pod, &config).await;
            // Before it runs: what will be.
            let change = |memory_limit_in_bytes: i64, cpu_quota: i64| LinuxContainerResources {
                memory_limit_in_bytes,
                cpu_quota,
                ..Default::default()
            };
            node.client.update(&id, change(96 << 20, 0)).await.unwrap();
            let told = async || node.status(&id).await.resources.unwrap().linux.unwrap();
            assert_eq!(told().await.memory_limit_in_bytes, 96 << 20);
            assert_eq!(told().await.cpu_quota, 50_000, "zero leaves as it is");
            node.client.start(&id).await.unwrap();
            assert_eq!(memory(node, &id), (96 << 20).to_string());
            assert_eq!(quota(node, &id), "50000");
            assert_eq!(node.sh(&id, "cat /proc/1/oom_score_adj").await, "300");
            // While it runs: at once.
            node.client
                .update(&id, change(128 << 20, 70_000))
                .await
                .unwrap();
            assert_eq!(memory(node, &id), (128 << 20).to_string());
            assert_eq!(quota(node, &id), "70000");
            assert_eq!(told().await.memory_limit_in_bytes, 128 << 20);
            assert_eq!(told().await.cpu_quota, 70_000);
            assert_eq!(told().await.cpu_shares, 512);
            // An update survives a restart.
            node.kill_and_start_again().await;
            let told = node.status(&id).await.resources.unwrap().linux.unwrap();
            assert_eq!(told.memory_limit_in_bytes, 128 << 20);
            node.client.stop(&id, 0).await.unwrap();
            let late = node.client.update(&id, change(64 << 20, 0)).await;
            refused(late, Code::FailedPrecondition, "exited");
        },
    );
}

#[test]
fn the_pods_cgroup_parent_holds_its_containers() {
    on_plain_node(
        "the_pods_cgroup_parent_holds_its_containers",
        async |node| {
            let image = node.busybox().await;
            let parent = format!("/{}/burstable/pod7", node.daemon.places().cgroup);
            let mut config = node.pod_config("parent");
            config.linux.as_mut().unwrap().cgroup_parent = parent.clone();
            let pod = node.run_pod(&config).await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            let pid = node.container_info(&id).await["pid"].as_i64().unwrap();
            let own = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
            assert!(own.contains(&format!("{parent}/{id}")), "{own}");
            let holder = node.pod_info(&pod.id).await["pid"].as_i64().unwrap();
            let held = std::fs::read_to_string(format!("/proc/{holder}/cgroup")).unwrap();
            assert!(held.contains(&format!("{parent}/{}", pod.id)), "{held}");
            // The shim is outside: the pod's limits and its end are none of its.
            let shim = node.pod_info(&pod.id).await["shimPid"].as_i64().unwrap();
            let outside = std::fs::read_to_string(format!("/proc/{shim}/cgroup")).unwrap();
            assert!(!outside.contains("pod7"), "{outside}");
            let own = format!("/{}/shims/{}", node.daemon.places().cgroup, &pod.id[..32]);
            assert!(outside.contains(&own), "{outside}");

            node.client.remove_pod(&pod.id).await.unwrap();
            // The kubelet made the parent in real life, and it removes it.
            let mut parents = node.daemon.places().cgroups();
            parents.retain(|dir| dir.ends_with("pod7") || dir.ends_with("burstable"));
            for dir in parents {
                std::fs::remove_dir(&dir).unwrap();
            }
            for bad in ["/", "/../escape", "a/./b"] {
                let mut config = node.pod_config("bad-parent");
                config.linux.as_mut().unwrap().cgroup_parent = bad.to_owned();
                refused(
                    node.client.run_pod(&config).await,
                    Code::InvalidArgument,
                    "cgroup_parent",
                );
            }
        },
    );
}

#[test]
fn limits_that_no_node_or_not_this_one_can_hold() {
    on_plain_node(
        "limits_that_no_node_or_not_this_one_can_hold",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("odd").await;
            let with = |name: &str, asked: LinuxContainerResources| {
                let mut config = sleeper(name, &image);
                *resources(&mut config) = asked;
                config
            };
            for (asked, says) in [
                (
                    LinuxContainerResources {
                        memory_limit_in_bytes: 64 << 20,
                        memory_swap_limit_in_bytes: 32 << 20,
                        ..Default::default()
                    },
                    "memory_swap_limit_in_bytes",
                ),
                (
                    LinuxContainerResources {
                        oom_score_adj: 1001,
                        ..Default::default()
                    },
                    "oom_score_adj",
                ),
                (
                    LinuxContainerResources {
                        cpu_shares: -1,
                        ..Default::default()
                    },
                    "cpu_shares",
                ),
            ] {
                let answer = node
                    .client
                    .create(&pod.id, &with("bad", asked), &pod.config)
                    .await;
                refused(answer, Code::InvalidArgument, says);
            }
            // Nothing of the host's is changed, whatever the key says.
            let unified = LinuxContainerResources {
                unified: [("../memory.max".to_owned(), "1".to_owned())].into(),
                ..Default::default()
            };
            let answer = node
                .client
                .create(&pod.id, &with("unified", unified), &pod.config)
                .await;
            let code = answer.unwrap_err().code();
            assert!(
                matches!(code, Code::InvalidArgument | Code::FailedPrecondition),
                "{code:?}"
            );

            let first = first_cpu();
            let cpus = LinuxContainerResources {
                cpuset_cpus: first.clone(),
                ..Default::default()
            };
            let id = node.run(&pod, &with("cpuset", cpus)).await;
            let allowed = node
                .sh(&id, "grep ^Cpus_allowed_list: /proc/1/status | cut -f2")
                .await;
            assert_eq!(allowed, first);
            // Nobody counts a container's processes but the kubelet, in the pod's cgroup.
            let pids = cgroup(node, &id, "pids", "pids.max", "pids.max");
            assert_eq!(pids, "max");
            let line = node.sh(&id, "grep '^Max open files' /proc/1/limits").await;
            // Of the first process: in an exec runc 1.1.5 puts the limit that it began with itself
            // back over the one that it was told, sometimes.
            let limits: Vec<u64> = line
                .split_whitespace()
                .filter_map(|word| word.parse().ok())
                .collect();
            assert!(limits[0] <= 1024 && limits[1] <= 524_288, "{line}");
        },
    );
}

/// The first processor that we may use ourselves.
fn first_cpu() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .unwrap();
    list.trim().split([',', '-']).next().unwrap().to_owned()
}

#[test]
fn cve_2023_6476_and_cve_2024_3154_annotations_change_neither_cgroup_nor_unit() {
    on_plain_node(
        "cve_2023_6476_and_cve_2024_3154_annotations_change_neither_cgroup_nor_unit",
        async |node| {
            // CVE-2023-6476, CVE-2024-3154.
            let image = node.busybox().await;
            let mut config = node.pod_config("annotated");
            let hostile = [
                ("io.kubernetes.cri-o.UnifiedCgroup.c", "memory.max=max"),
                (
                    "org.systemd.property.ExecStartPre",
                    "[('/bin/evil', ['x'], false)]",
                ),
                ("run.oci.systemd.subgroup", "x"),
                ("io.kubernetes.cri.container-type", "sandbox"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
            config.annotations.extend(hostile.clone());
            let pod = node.run_pod(&config).await;
            let mut config = sleeper("c", &image);
            config.annotations.extend(hostile);
            resources(&mut config).memory_limit_in_bytes = 64 << 20;
            let id = node.run(&pod, &config).await;
            assert_eq!(memory(node, &id), (64 << 20).to_string());
            let info = node.container_info(&id).await;
            let passed = info["runtimeSpec"]["annotations"].as_object().unwrap();
            assert!(
                passed
                    .keys()
                    .all(|name| name.starts_with("io.kubernetes.cri.")),
                "{passed:?}"
            );
            assert_eq!(passed["io.kubernetes.cri.container-type"], "container");
            assert!(info["runtimeSpec"]["linux"]["resources"]["unified"].is_null());
        },
    );
}

#[test]
fn what_a_kubelet_tells_of_a_pods_size_is_kept() {
    use gantry_cri_api::v1 as cri;
    on_plain_node(
        "what_a_kubelet_tells_of_a_pods_size_is_kept",
        async |node| {
            let pod = node.host_pod("size").await;
            let sized = |memory_limit_in_bytes| cri::LinuxContainerResources {
                memory_limit_in_bytes,
                ..Default::default()
            };
            let update = async |node: &gantry_integration::Node, id: &str| {
                let request = cri::UpdatePodSandboxResourcesRequest {
                    pod_sandbox_id: id.to_owned(),
                    overhead: Some(sized(1 << 20)),
                    resources: Some(sized(64 << 20)),
                };
                node.young().update_pod_sandbox_resources(request).await
            };
            assert!(node.pod_info(&pod.id).await["resources"].is_null());
            update(node, &pod.id).await.unwrap();
            refused(update(node, "nobody").await, Code::NotFound, "nobody");
            node.kill_and_start_again().await;
            let info = node.pod_info(&pod.id).await;
            assert_eq!(info["resources"]["memory_limit_in_bytes"], 64 << 20);
            assert_eq!(info["overhead"]["memory_limit_in_bytes"], 1 << 20);
            node.client.stop_pod(&pod.id).await.unwrap();
            refused(
                update(node, &pod.id).await,
                Code::FailedPrecondition,
                "not ready",
            );
        },
    );
}
