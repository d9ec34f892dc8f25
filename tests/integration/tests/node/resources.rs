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
