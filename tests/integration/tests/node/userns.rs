//! Pods with a user namespace of their own.

use std::os::unix::fs::MetadataExt;

use gantry_integration::{Node, Pod, on_node, refused, sleeper};
use gantry_testkit::cri::v1::{
    IdMapping, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig, UserNamespace,
};
use gantry_testkit::cri::{pod_namespaces, security};
use gantry_testkit::daemon::Options;
use tonic::Code;

/// Handler with the runtime that `GANTRY_TEST_RUNC` names, or the one in PATH: user namespaces
/// need runc 1.2.
const HANDLER: &str = "userns";

const BASE: u32 = 2_000_000;
const LENGTH: u32 = 65_536;

fn mapping(host_id: u32) -> Vec<IdMapping> {
    vec![IdMapping {
        host_id,
        container_id: 0,
        length: LENGTH,
    }]
}

fn own(base: u32) -> Option<UserNamespace> {
    Some(UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: mapping(base),
        gids: mapping(base),
    })
}

/// As `on_node`, where the runtime can.
fn on_capable_node(name: &'static str, test: impl AsyncFnOnce(&mut Node)) {
    on_capable_node_with(name, "", test);
}

/// As [`on_capable_node`], with more of a configuration.
fn on_capable_node_with(name: &'static str, more: &str, test: impl AsyncFnOnce(&mut Node)) {
    let runc = std::env::var("GANTRY_TEST_RUNC").unwrap_or_else(|_| "runc".to_owned());
    let config = format!("[runtime.handlers.{HANDLER}]\nbinary = {runc:?}\n{more}");
    on_node(name, Options::default().config(&config), async |node| {
        let status = node.client.node_status(true).await.unwrap();
        let handler = status
            .runtime_handlers
            .iter()
            .find(|handler| handler.name == HANDLER)
            .and_then(|handler| handler.features);
        if handler.is_some_and(|features| features.user_namespaces) {
            test(node).await;
        } else {
            println!(
                "SKIP {name}: {runc} or this kernel cannot map the ids of mounts; GANTRY_TEST_RUNC names another"
            );
        }
    });
}

fn config(node: &Node, name: &str) -> PodSandboxConfig {
    let mut config = node.pod_config(name);
    pod_namespaces(&mut config).userns_options = own(BASE);
    config
}

async fn run(node: &Node, config: PodSandboxConfig) -> Pod {
    let id = node.client.run_pod_by(&config, HANDLER).await.unwrap();
    Pod { id, config }
}

#[test]
fn root_of_a_user_namespace_is_nobody_on_the_host() {
    on_capable_node(
        "root_of_a_user_namespace_is_nobody_on_the_host",
        async |node| {
            let image = node.busybox().await;
            let pod = run(node, config(node, "mapped")).await;
            let volume = node.daemon.path("logs/volume");
            std::fs::create_dir(&volume).unwrap();
            std::fs::write(volume.join("of-root"), "").unwrap();
            let mut config = sleeper("c", &image);
            security(&mut config).namespace_options = pod
                .config
                .linux
                .as_ref()
                .unwrap()
                .security_context
                .as_ref()
                .unwrap()
                .namespace_options
                .clone();
            config.mounts.push(Mount {
                container_path: "/volume".into(),
                host_path: volume.to_str().unwrap().into(),
                uid_mappings: mapping(BASE),
                gid_mappings: mapping(BASE),
                ..Default::default()
            });
            let id = node.run(&pod, &config).await;
            let say = async |script: &str| node.sh(&id, script).await;

            assert_eq!(
                say("cat /proc/self/uid_map | tr -s ' '").await,
                " 0 2000000 65536"
            );
            let pid = node.container_info(&id).await["pid"].as_u64().unwrap();
            let status = std::fs::metadata(format!("/proc/{pid}")).unwrap();
            assert_eq!((status.uid(), status.gid()), (BASE, BASE));
            // What the image gives to root is root's, and so is what the pod is given.
            for path in [
                "/",
                "/etc/passwd",
                "/bin/busybox",
                "/dev/shm",
                "/etc/hosts",
                "/etc/resolv.conf",
                "/volume",
                "/volume/of-root",
            ] {
                assert_eq!(say(&format!("stat -c %u:%g {path}")).await, "0:0", "{path}");
            }
            say(
                "echo x > /in-root; echo y >> /etc/passwd; echo z > /dev/shm/z; echo w > /volume/w",
            )
            .await;
            say("grep -q nameserver /etc/resolv.conf || test -r /etc/resolv.conf").await;
            assert_eq!(
                std::fs::metadata(volume.join("w")).unwrap().uid(),
                0,
                "mapped by the mount"
            );
            // The network namespace is this user namespace's: its sysfs can be mounted here.
            assert_eq!(say("ls /sys/class/net | tr '\\n' ' '").await, "eth0 lo ");
            assert_eq!(
                say("cat /proc/sys/net/ipv4/ping_group_range | tr '\\t' ' '").await,
                "0 65535"
            );
            assert_eq!(say("hostname").await, "mapped");
            // Streams can be opened once more by name, as log files are linked to them.
            say("echo again > /dev/stderr").await;
            let id = node
                .run_script(&pod, "stdout", &image, "echo by name > /dev/stdout")
                .await;
            assert_eq!(node.exited(&id).await.exit_code, 0);
            assert_eq!(node.output(&pod, "stdout"), "by name\n");

            let mut other = sleeper("user", &image);
            let own = security(&mut other);
            own.run_as_user = Some(gantry_testkit::cri::v1::Int64Value { value: 1000 });
            let id = node.run(&pod, &other).await;
            assert_eq!(
                node.sh(
                    &id,
                    "id -u; echo x > /dev/shm/of-user; echo e > /dev/stderr"
                )
                .await,
                "1000"
            );
            let pid = node.container_info(&id).await["pid"].as_u64().unwrap();
            assert_eq!(
                std::fs::metadata(format!("/proc/{pid}")).unwrap().uid(),
                BASE + 1000
            );
            assert_eq!(node.ip(&pod).await.split('.').next(), Some("10"));
        },
    );
}

/// CVE-2025-47291: limits of the pod do not hold in another cgroup.
#[test]
fn cve_2025_47291_a_pod_with_a_user_namespace_stays_in_its_cgroup() {
    on_capable_node(
        "cve_2025_47291_a_pod_with_a_user_namespace_stays_in_its_cgroup",
        async |node| {
            let image = node.busybox().await;
            let pod = run(node, config(node, "mapped")).await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            let pid = node.container_info(&id).await["pid"].as_u64().unwrap();
            let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
            let parent = format!("/{}/", node.daemon.places().cgroup);
            let of_pod: Vec<_> = text.lines().filter(|line| line.contains(&parent)).collect();
            assert!(!of_pod.is_empty(), "{text}");
            assert!(of_pod.iter().all(|line| line.ends_with(&id)), "{text}");
            // On v1 every controller that the pod's parent has.
            let memory = |line: &&str| line.contains(":memory:") || line.starts_with("0::");
            assert!(of_pod.iter().any(memory), "{text}");
        },
    );
}

#[test]
fn a_shared_pid_namespace_and_the_hosts_network_go_with_a_user_namespace() {
    on_capable_node(
        "a_shared_pid_namespace_and_the_hosts_network_go_with_a_user_namespace",
        async |node| {
            let image = node.busybox().await;
            let mut shared = config(node, "shared");
            let options = pod_namespaces(&mut shared);
            options.pid = NamespaceMode::Pod.into();
            let pod = run(node, shared).await;
            let mut sharing = sleeper("c", &image);
            security(&mut sharing).namespace_options = Some(NamespaceOption {
                userns_options: own(BASE),
                ..Default::default()
            });
            let id = node.run(&pod, &sharing).await;
            assert_eq!(node.sh(&id, "cat /proc/1/comm").await, "gantry-holder");

            let mut host = config(node, "host");
            pod_namespaces(&mut host).network = NamespaceMode::Node.into();
            let pod = run(node, host).await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            assert_eq!(
                node.sh(&id, "stat -c %u /; ls -d /sys/class/net/lo").await,
                "0\n/sys/class/net/lo"
            );
            let refuse = "if (echo x > /sys/kernel/mm/ksm/run) 2>/dev/null; then echo written; else echo refused; fi";
            assert_eq!(node.sh(&id, refuse).await, "refused");
        },
    );
}

#[test]
fn user_namespaces_that_cannot_be_are_named() {
    on_capable_node("user_namespaces_that_cannot_be_are_named", async |node| {
        let image = node.busybox().await;
        let invalid = Code::InvalidArgument;
        let with = |change: &dyn Fn(&mut NamespaceOption)| {
            let mut bad = config(node, "bad");
            change(pod_namespaces(&mut bad));
            bad
        };
        for (bad, says) in [
            (
                with(&|it| it.userns_options.as_mut().unwrap().gids.clear()),
                "userns_options.gids",
            ),
            (
                with(&|it| it.userns_options.as_mut().unwrap().uids.extend(mapping(9))),
                "userns_options.uids",
            ),
            (
                with(&|it| it.userns_options.as_mut().unwrap().mode = NamespaceMode::Node.into()),
                "NODE",
            ),
            (
                with(&|it| it.ipc = NamespaceMode::Node.into()),
                "namespace_options.ipc",
            ),
            (
                with(&|it| it.pid = NamespaceMode::Node.into()),
                "namespace_options.pid",
            ),
        ] {
            refused(node.client.run_pod_by(&bad, HANDLER).await, invalid, says);
        }
        let pod = run(node, config(node, "good")).await;
        let mut other = sleeper("c", &image);
        security(&mut other).namespace_options = Some(NamespaceOption {
            pid: NamespaceMode::Container.into(),
            userns_options: own(BASE + LENGTH),
            ..Default::default()
        });
        let answer = node.client.create(&pod.id, &other, &pod.config).await;
        refused(answer, invalid, "not that of the pod sandbox");
    });
}

/// Where layers cannot be mapped by mounts, the copies have the owners that are asked for.
#[test]
fn a_user_namespace_on_copies() {
    on_capable_node_with(
        "a_user_namespace_on_copies",
        "[images]\nsnapshotter = \"native\"\n",
        async |node| {
            let image = node.busybox().await;
            let pod = run(node, config(node, "copies")).await;
            let mut container = sleeper("c", &image);
            let linux = pod.config.linux.as_ref().unwrap();
            let asked = linux.security_context.as_ref().unwrap();
            security(&mut container).namespace_options = asked.namespace_options.clone();
            let id = node.run(&pod, &container).await;
            for path in ["/", "/etc/passwd", "/bin/busybox"] {
                let owner = node.sh(&id, &format!("stat -c %u:%g {path}")).await;
                assert_eq!(owner, "0:0", "{path}");
            }
            node.sh(&id, "echo x > /in-root; chown 33:33 /in-root")
                .await;
            let snapshots = node.daemon.places().root.join("native/snapshots");
            let written = std::fs::metadata(snapshots.join(&id).join("fs/in-root")).unwrap();
            assert_eq!((written.uid(), written.gid()), (BASE + 33, BASE + 33));
            // A pod without one has the image's own, from the same layers.
            let plain = node.host_pod("plain").await;
            let id = node.run(&plain, &sleeper("c", &image)).await;
            assert_eq!(node.sh(&id, "stat -c %u:%g /etc/passwd").await, "0:0");
        },
    );
}

#[test]
fn a_pod_with_a_user_namespace_outlives_its_shim() {
    on_capable_node(
        "a_pod_with_a_user_namespace_outlives_its_shim",
        async |node| {
            let image = node.busybox().await;
            let pod = run(node, config(node, "adopted")).await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            let created = node.create(&pod, &sleeper("later", &image)).await;
            node.outlives_shim(&pod, &[&id]).await;
            node.kill_shim(&pod).await;
            node.adopted(&pod, 1).await;
            // Its streams still belong to the pod's root.
            for id in [&id, &created] {
                if !node.is_running(id).await {
                    node.client.start(id).await.unwrap();
                }
                let map = node
                    .sh(id, "cat /proc/self/uid_map; echo x > /dev/stdout")
                    .await;
                assert!(map.contains(&BASE.to_string()), "{map}");
            }
            node.client.stop(&id, 20).await.unwrap();
            assert_eq!(node.exited(&id).await.exit_code, 0);
        },
    );
}
