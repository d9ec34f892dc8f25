//! Holes that others had: each test is named for an advisory and does what its attack did.

use std::time::{Duration, Instant};

use gantry_integration::{
    Node, Pod, busybox_image, on_node, on_plain_node, refused, script_config, sleeper,
};
use gantry_testkit::cri::v1::{
    ContainerConfig, Int64Value, KeyValue, NamespaceMode, SupplementalGroupsPolicy,
};
use gantry_testkit::cri::{pod_namespaces, security};
use gantry_testkit::daemon::Options;
use gantry_testkit::image::{Compression, Image, ImageBuilder, Layer};
use serde_json::json;
use tonic::Code;

/// busybox with one more layer.
fn busybox_and(layer: Layer, user: &str) -> Image {
    ImageBuilder::new()
        .tar(busybox_image().layers[0].data.clone(), Compression::Plain)
        .layer(layer, Compression::Gzip)
        .config("Env", json!(["PATH=/bin", "OF=image"]))
        .user(user)
        .cmd(["sh"])
        .build()
}

async fn create(node: &Node, pod: &Pod, config: &ContainerConfig) -> Result<String, tonic::Status> {
    node.client.create(&pod.id, config, &pod.config).await
}

/// A crafted passwd gives a name of digits to root; a number must never get there, nor wrap.
#[test]
fn cve_2024_40635_and_cve_2026_46680_a_number_is_never_a_name() {
    on_plain_node(
        "cve_2024_40635_and_cve_2026_46680_a_number_is_never_a_name",
        async |node| {
            let pod = node.host_pod("numbers").await;
            let names = ["4294967296", "2147483648", "99999999999"];
            let passwd: String = names
                .iter()
                .map(|name| format!("{name}:x:0:0::/:/bin/sh\n"))
                .collect();
            for (n, user) in names.iter().enumerate() {
                let layer = Layer::new().file("etc/passwd", passwd.as_bytes());
                let image = node.pull(&format!("n{n}"), &busybox_and(layer, user)).await;
                let answer = create(node, &pod, &sleeper("c", &image)).await;
                refused(
                    answer,
                    Code::InvalidArgument,
                    "is not within 0 to 2147483647",
                );
                let mut config = sleeper("c", &image);
                security(&mut config).run_as_username = (*user).to_owned();
                let answer = create(node, &pod, &config).await;
                refused(
                    answer,
                    Code::InvalidArgument,
                    "is not within 0 to 2147483647",
                );
            }
            let image = node.busybox().await;
            let mut config = sleeper("c", &image);
            security(&mut config).run_as_user = Some(Int64Value { value: 1 << 32 });
            let answer = create(node, &pod, &config).await;
            refused(answer, Code::InvalidArgument, "run_as_user");
            // A group belongs to a user.
            security(&mut config).run_as_user = None;
            security(&mut config).run_as_group = Some(Int64Value { value: 7 });
            let answer = create(node, &pod, &config).await;
            refused(answer, Code::InvalidArgument, "run_as_group");
        },
    );
}

#[test]
fn cve_2026_47262_account_files_are_bounded_and_regular() {
    on_plain_node(
        "cve_2026_47262_account_files_are_bounded_and_regular",
        async |node| {
            let pod = node.host_pod("accounts").await;
            let huge = vec![b'x'; 11 << 20];
            for (name, layer, says) in [
                (
                    "huge",
                    Layer::new().file("etc/passwd", &huge),
                    "image file /etc/passwd",
                ),
                (
                    "fifo",
                    Layer::new().whiteout("etc/group").fifo("etc/group"),
                    "image file /etc/group",
                ),
                (
                    "dir",
                    Layer::new().whiteout("etc/group").dir("etc/group", 0o755),
                    "image file /etc/group",
                ),
                (
                    "loop",
                    Layer::new().symlink("etc/passwd", "passwd"),
                    "/etc/passwd",
                ),
            ] {
                let image = node.pull(name, &busybox_and(layer, "")).await;
                let started = Instant::now();
                let status = create(node, &pod, &sleeper("c", &image)).await.unwrap_err();
                assert!(status.message().contains(says), "{name}: {status:?}");
                assert!(started.elapsed() < Duration::from_secs(60), "{name}");
            }
        },
    );
}

/// The primary group is among the supplementary ones, under both policies: else a process that
/// drops it gains what a file denies to that group.
#[test]
fn cve_2023_25173_the_primary_group_is_among_the_groups() {
    on_plain_node(
        "cve_2023_25173_the_primary_group_is_among_the_groups",
        async |node| {
            let pod = node.host_pod("groups").await;
            let layer = Layer::new()
                .file(
                    "etc/passwd",
                    b"root:x:0:0::/:/bin/sh\nweb:x:101:102::/:/bin/sh\n",
                )
                .file("etc/group", b"root:x:0:\nwww:x:102:\nvideo:x:44:web\n");
            let image = node.pull("groups", &busybox_and(layer, "web")).await;
            let (merge, strict) = (
                SupplementalGroupsPolicy::Merge,
                SupplementalGroupsPolicy::Strict,
            );
            let mut number = 0;
            for (policy, gid, asked, expected) in [
                (merge, None, &[][..], "102 44"),
                (merge, Some(7), &[9][..], "7 44 9"),
                (strict, None, &[][..], "102"),
                (strict, Some(7), &[9, 7][..], "7 9"),
            ] {
                number += 1;
                let mut config = sleeper(&format!("c{number}"), &image);
                let own = security(&mut config);
                own.supplemental_groups_policy = policy.into();
                own.supplemental_groups = asked.to_vec();
                if let Some(value) = gid {
                    own.run_as_user = Some(Int64Value { value: 101 });
                    own.run_as_group = Some(Int64Value { value });
                }
                let id = node.run(&pod, &config).await;
                let of_init = "sed -n 's/^Groups:[[:space:]]*//p' /proc/1/status | tr ' ' '\\n' | grep . | sort -n | tr '\\n' ' '";
                let mut wanted: Vec<u32> = expected
                    .split(' ')
                    .map(|gid| gid.parse().unwrap())
                    .collect();
                wanted.sort_unstable();
                let wanted: String = wanted.iter().map(|gid| format!("{gid} ")).collect();
                assert_eq!(node.sh(&id, of_init).await, wanted, "{policy:?} {gid:?}");
                let of_exec = of_init.replace("/proc/1/", "/proc/self/");
                assert_eq!(node.sh(&id, &of_exec).await, wanted, "{policy:?} {gid:?}");
                let status = node.status(&id).await.user.unwrap().linux.unwrap();
                let mut told = status.supplemental_groups;
                told.sort_unstable();
                let told: String = told.iter().map(|gid| format!("{gid} ")).collect();
                assert_eq!(told, wanted);
            }
        },
    );
}

#[test]
fn cve_2022_24769_no_capability_is_inherited() {
    on_plain_node("cve_2022_24769_no_capability_is_inherited", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("inherit").await;
        let script = "grep -E '^Cap(Inh|Amb)' /proc/self/status; sleep 1000";
        let id = node.run_script(&pod, "c", &image, script).await;
        let none = "CapInh:\t0000000000000000\nCapAmb:\t0000000000000000\n";
        node.has_written(&pod, "c", "CapAmb").await;
        assert_eq!(node.output(&pod, "c"), none);
        let of_exec = node
            .sh(&id, "grep -E '^Cap(Inh|Amb)' /proc/self/status")
            .await;
        assert_eq!(of_exec, none.trim_end());
    });
}

#[test]
fn cve_2021_21334_containers_of_one_image_have_environments_of_their_own() {
    on_plain_node(
        "cve_2021_21334_containers_of_one_image_have_environments_of_their_own",
        async |node| {
            let image = node.pull("env", &busybox_and(Layer::new(), "")).await;
            let pod = node.host_pod("env").await;
            let mut ids = Vec::new();
            for name in ["a", "b"] {
                let mut config = sleeper(name, &image);
                config.envs = vec![
                    KeyValue {
                        key: format!("ONLY_{name}"),
                        value: name.into(),
                    },
                    KeyValue {
                        key: "OF".into(),
                        value: name.into(),
                    },
                ];
                ids.push(node.create(&pod, &config).await);
            }
            ids.push(node.create(&pod, &sleeper("plain", &image)).await);
            let mut seen = Vec::new();
            for id in &ids {
                node.client.start(id).await.unwrap();
                seen.push(
                    node.sh(id, "env | grep -E '^(ONLY|OF)' | sort | tr '\\n' ' '")
                        .await,
                );
            }
            assert_eq!(seen, ["OF=a ONLY_a=a ", "OF=b ONLY_b=b ", "OF=image "]);
        },
    );
}

#[test]
fn cve_2022_0811_and_cve_2022_0532_sysctls_are_one_setting_of_the_pods_own() {
    on_plain_node(
        "cve_2022_0811_and_cve_2022_0532_sysctls_are_one_setting_of_the_pods_own",
        async |node| {
            let before = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
            let with = |name: &str, value: &str, host: &str| {
                let mut config = node.pod_config("sysctl");
                let sysctls = &mut config.linux.as_mut().unwrap().sysctls;
                sysctls.insert(name.to_owned(), value.to_owned());
                let options = pod_namespaces(&mut config);
                match host {
                    "net" => options.network = NamespaceMode::Node.into(),
                    "ipc" => options.ipc = NamespaceMode::Node.into(),
                    _ => {}
                }
                config
            };
            for (name, value, host) in [
                (
                    "kernel.shm_rmid_forced",
                    "1+kernel.core_pattern=|/bin/evil",
                    "",
                ),
                ("kernel.shm_rmid_forced", "1\nkernel.core_pattern=x", ""),
                ("kernel.shm_rmid_forced+kernel.core_pattern", "1", ""),
                ("kernel.core_pattern", "x", ""),
                ("net.ipv4.ip_forward", "1", "net"),
                ("kernel.shm_rmid_forced", "1", "ipc"),
                ("fs.mqueue.msg_max", "11", "ipc"),
            ] {
                let answer = node.client.run_pod(&with(name, value, host)).await;
                refused(answer, Code::InvalidArgument, "linux.sysctls[");
            }
            let after = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
            assert_eq!(before, after);
        },
    );
}

/// A descriptor of the host that is left open, and a working directory that reaches it.
#[test]
fn cve_2024_21626_no_descriptor_of_the_host_is_within_reach() {
    on_plain_node(
        "cve_2024_21626_no_descriptor_of_the_host_is_within_reach",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("descriptors").await;
            for number in 3..=20 {
                for path in [
                    format!("/proc/self/fd/{number}"),
                    format!("/proc/1/fd/{number}/.."),
                ] {
                    let mut config = sleeper("c", &image);
                    config.working_dir = path;
                    refused(
                        create(node, &pod, &config).await,
                        Code::InvalidArgument,
                        "working_dir",
                    );
                }
            }
            // What the shell itself opens to list them is one more.
            let list =
                "for fd in /proc/self/fd/*; do readlink $fd; done; ls /proc/1/fd | tr '\\n' ' '";
            let id = node
                .run(
                    &pod,
                    &script_config("own", &image, "ls /proc/self/fd | wc -l; sleep 1000"),
                )
                .await;
            node.has_written(&pod, "own", "\n").await;
            assert_eq!(node.output(&pod, "own"), "4\n", "0, 1, 2 and the directory");
            let seen = node.sh(&id, list).await;
            assert!(
                seen.ends_with("0 1 2 ") || seen.ends_with("0 1 10 2 "),
                "{seen}"
            );
            for line in seen.lines() {
                assert!(
                    !line.starts_with("/run") && !line.starts_with("/var"),
                    "{seen}"
                );
            }
        },
    );
}

#[test]
fn cve_2024_3154_and_cve_2023_6476_annotations_reach_no_runtime() {
    on_plain_node(
        "cve_2024_3154_and_cve_2023_6476_annotations_reach_no_runtime",
        async |node| {
            let image = node.busybox().await;
            let mut config = node.pod_config("annotated");
            let evil = [
                ("org.systemd.property.ExecStartPost", "'/bin/evil'"),
                ("io.kubernetes.cri-o.UnifiedCgroup.c", "pids.max=1"),
                ("run.oci.handler", "krun"),
            ];
            let annotations = evil.map(|(name, value)| (name.to_owned(), value.to_owned()));
            config.annotations.extend(annotations.clone());
            let pod = node.run_pod(&config).await;
            let mut container = sleeper("c", &image);
            container.annotations.extend(annotations);
            let id = node.run(&pod, &container).await;
            let spec = node.container_info(&id).await["runtimeSpec"].to_string();
            for (name, value) in evil {
                assert!(!spec.contains(name) && !spec.contains(value), "{name}");
            }
            // They are still the pod's own, for whoever lists it.
            let listed = node.status(&id).await.annotations;
            assert_eq!(listed["run.oci.handler"], "krun");
        },
    );
}

/// A line break in HOME once became a line of passwd.
#[test]
fn cve_2022_4318_and_cve_2026_15809_no_variable_becomes_an_account() {
    on_plain_node(
        "cve_2022_4318_and_cve_2026_15809_no_variable_becomes_an_account",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("home").await;
            let mut ids = Vec::new();
            for (name, home) in [
                ("plain", "/root"),
                ("evil", "/\nevil:x:0:0::/:/bin/sh"),
                ("escaped", "/\\nevil:x:0:0::/:/bin/sh"),
            ] {
                let mut config = sleeper(name, &image);
                config.envs = vec![KeyValue {
                    key: "HOME".into(),
                    value: home.into(),
                }];
                security(&mut config).run_as_user = Some(Int64Value { value: 4321 });
                ids.push(node.run(&pod, &config).await);
            }
            let mut seen = Vec::new();
            for id in &ids {
                seen.push(node.sh(id, "cat /etc/passwd").await);
            }
            assert!(!seen[0].is_empty() && !seen[1].contains("evil"));
            assert!(seen.iter().all(|passwd| *passwd == seen[0]));
        },
    );
}

/// What a container writes into the files that we lend it must not fill the node's tmpfs.
#[test]
fn cve_2020_8557_the_files_of_a_pod_are_bounded() {
    on_plain_node(
        "cve_2020_8557_the_files_of_a_pod_are_bounded",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("filling").await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            for file in ["hostname", "resolv.conf"] {
                let fill = format!("head -c 64000000 /dev/zero >>/etc/{file} || echo full");
                assert_eq!(node.sh(&id, &fill).await, "full", "{file}");
            }
            // A container that comes later is not hurt by it.
            let later = node.run(&pod, &sleeper("later", &image)).await;
            assert!(node.is_running(&later).await);
        },
    );
}

/// Descriptors of the runtime itself are within reach of a program that is called by them.
#[test]
fn cve_2019_5736_the_runtime_is_not_overwritten_by_its_own_exec() {
    // A copy: nobody's runtime is to be risked.
    let dir = tempfile::tempdir().unwrap();
    let runc = dir.path().join("runc");
    if let Some(installed) = gantry_testkit::daemon::in_path("runc") {
        std::fs::copy(installed, &runc).unwrap();
    }
    let config = format!("[runtime.handlers.copy]\nbinary = {runc:?}\n");
    on_node(
        "cve_2019_5736_the_runtime_is_not_overwritten_by_its_own_exec",
        Options::default().config(&config),
        async |node| {
            let image = node.busybox().await;
            let config = node.pod_config("itself");
            let id = node.client.run_pod_by(&config, "copy").await.unwrap();
            let pod = Pod { id, config };
            let id = node.run(&pod, &sleeper("c", &image)).await;
            let before = std::fs::read(&runc).unwrap();
            // The interpreter of /evil is whoever executes it: the runtime.
            node.sh(&id, "printf '#!/proc/self/exe\\n' >/evil; chmod 755 /evil")
                .await;
            // Meanwhile somebody inside writes to whatever runs there.
            let writer =
                "while :; do for p in /proc/[0-9]*; do (echo overwritten >$p/exe); done; done";
            node.sh(&id, &format!("({writer}) >/dev/null 2>&1 &")).await;
            for _ in 0..20 {
                // Refused, or the runtime runs and knows no such command: its business.
                let _ = node.client.exec(&id, &["/evil"], 10).await;
            }
            assert!(
                std::fs::read(&runc).unwrap() == before,
                "{} was changed",
                runc.display()
            );
            assert!(node.is_running(&id).await);
        },
    );
}

/// No socket of ours has an abstract name, which every process of the network namespace reaches.
#[test]
fn cve_2020_15257_no_socket_is_abstract() {
    on_plain_node("cve_2020_15257_no_socket_is_abstract", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("sockets").await;
        let mut config = sleeper("c", &image);
        security(&mut config).run_as_user = Some(Int64Value { value: 1000 });
        let id = node.run(&pod, &config).await;
        let seen = node.sh(&id, "cat /proc/net/unix").await;
        assert!(
            seen.contains("shim.sock"),
            "the shim's socket is there: {seen}"
        );
        let ours: Vec<_> = seen.lines().filter(|line| line.contains(" @")).collect();
        assert!(ours.is_empty(), "{ours:?}");
    });
}
