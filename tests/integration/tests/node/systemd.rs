//! The systemd cgroup driver: who lies in which scope, and what becomes of it. Most need systemd as
//! PID 1 on cgroup v2, as tests/vm has it.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use gantry_integration::{Node, eventually, on_node, script_config, sleeper};
use gantry_testkit::cri::resources;
use gantry_testkit::cri::v1::LinuxContainerResources;
use gantry_testkit::daemon::{self, Options};
use tonic::Code;

/// As `on_node`, with the systemd driver.
pub fn on_systemd_node(name: &str, options: Options, test: impl AsyncFnOnce(&mut Node)) {
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    if !unified || !Path::new("/run/systemd/system").is_dir() {
        println!("SKIP {name}: systemd does not run this machine, or not with cgroup v2");
        return;
    }
    on_node(name, options.systemd(), test);
}

/// The only line of `/proc/PID/cgroup` on v2, without `0::`.
fn cgroup_of(pid: i64) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    text.trim().strip_prefix("0::").unwrap().to_owned()
}

/// A property of a unit as systemd tells it.
fn property(unit: &str, name: &str) -> String {
    let output = Command::new("systemctl")
        .args(["show", "--value", "--property", name, unit])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Units whose name holds `part`, in whatever state.
fn units(part: &str) -> Vec<String> {
    let output = Command::new("systemctl")
        .args(["list-units", "--all", "--plain", "--no-legend"])
        .arg(format!("*{part}*"))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn holder_shim_and_container_are_in_scopes_that_systemd_knows() {
    on_systemd_node(
        "holder_shim_and_container_are_in_scopes_that_systemd_knows",
        Options::default(),
        async |node| {
            let image = node.busybox().await;
            let slice = node.daemon.places().cgroup.clone();
            let base = slice.strip_suffix(".slice").unwrap();
            // As the kubelet names it: the last element is the slice.
            let pod_slice = format!("{base}-burstable-pod7.slice");
            let parent = format!("/{slice}/{base}-burstable.slice/{pod_slice}");
            let mut config = node.pod_config("scopes");
            config.linux.as_mut().unwrap().cgroup_parent = parent.clone();
            let pod = node.run_pod(&config).await;
            let id = node.run(&pod, &sleeper("c", &image)).await;

            let info = node.pod_info(&pod.id).await;
            let holder_scope = format!("gantry-{}.scope", pod.id);
            let holder = cgroup_of(info["pid"].as_i64().unwrap());
            assert_eq!(holder, format!("{parent}/{holder_scope}"));
            let container_scope = format!("gantry-{id}.scope");
            let pid = node.container_info(&id).await["pid"].as_i64().unwrap();
            assert_eq!(cgroup_of(pid), format!("{parent}/{container_scope}"));
            // Outside the pod's, and not named as the sandbox is.
            let shim_slice = format!("{base}-shims.slice");
            let shim_scope = format!("gantry-shim-{}.scope", &pod.id[..32]);
            let shim = cgroup_of(info["shimPid"].as_i64().unwrap());
            assert_eq!(shim, format!("/{slice}/{shim_slice}/{shim_scope}"));
            for (scope, slice, cgroup) in [
                (&holder_scope, &pod_slice, &holder),
                (&shim_scope, &shim_slice, &shim),
            ] {
                assert_eq!(property(scope, "ActiveState"), "active", "{scope}");
                assert_eq!(property(scope, "Slice"), *slice);
                assert_eq!(property(scope, "ControlGroup"), *cgroup);
                // Node agents read these.
                let memory = Path::new("/sys/fs/cgroup").join(&cgroup[1..]);
                assert!(memory.join("memory.current").exists(), "{cgroup}");
            }

            node.client.stop_pod(&pod.id).await.unwrap();
            for scope in [&holder_scope, &shim_scope, &container_scope] {
                assert_eq!(units(scope), [""; 0], "{scope} after StopPodSandbox");
            }
            assert!(!Path::new("/sys/fs/cgroup").join(&holder[1..]).exists());
            node.client.remove_pod(&pod.id).await.unwrap();
            // The kubelet ends a pod's slices.
            for slice in [pod_slice, format!("{base}-burstable.slice")] {
                let ended = Command::new("systemctl").args(["stop", &slice]).status();
                assert!(ended.unwrap().success());
            }
        },
    );
}

#[test]
fn limits_under_systemd_hold_and_out_of_memory_is_told() {
    on_systemd_node(
        "limits_under_systemd_hold_and_out_of_memory_is_told",
        Options::default(),
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("limits").await;
            let mut config = sleeper("c", &image);
            *resources(&mut config) = LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                cpu_quota: 50_000,
                cpu_period: 100_000,
                ..Default::default()
            };
            let id = node.run(&pod, &config).await;
            let scope = format!("gantry-{id}.scope");
            let slice = &node.daemon.places().cgroup;
            let dir = Path::new("/sys/fs/cgroup").join(slice).join(&scope);
            let file = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
            assert_eq!(file("memory.max").trim(), (64 << 20).to_string());
            assert_eq!(file("cpu.max").trim(), "50000 100000");
            assert_eq!(property(&scope, "MemoryMax"), (64 << 20).to_string());
            let change = LinuxContainerResources {
                memory_limit_in_bytes: 96 << 20,
                ..Default::default()
            };
            node.client.update(&id, change).await.unwrap();
            assert_eq!(file("memory.max").trim(), (96 << 20).to_string());
            // systemd must know, or its next reload would put the old limit back.
            assert_eq!(property(&scope, "MemoryMax"), (96 << 20).to_string());

            // systemd collects the scope as soon as its process has ended.
            let eater = |name: &str, script: &str| {
                let mut config = script_config(name, &image, script);
                resources(&mut config).memory_limit_in_bytes = 16 << 20;
                config
            };
            let told = async |id: &str| {
                let status = node.exited(id).await;
                let how = (status.exit_code, status.reason.as_str());
                assert_eq!(how, (137, "OOMKilled"), "{status:?}");
            };
            for round in 0..3 {
                let config = eater(&format!("eater{round}"), "tail /dev/zero");
                told(&node.run(&pod, &config).await).await;
            }
            // And when the shim looks only after it has.
            let config = eater("late", "sleep 3; tail /dev/zero");
            let id = node.run(&pod, &config).await;
            let dir = Path::new("/sys/fs/cgroup")
                .join(slice)
                .join(format!("gantry-{id}.scope"));
            assert!(dir.exists());
            let shim = node.pod_info(&pod.id).await["shimPid"].to_string();
            let signal = |name: &str| {
                let sent = Command::new("kill").args([name, &shim]).status();
                assert!(sent.unwrap().success());
            };
            signal("-STOP");
            eventually("systemd collects the scope", async || {
                (!dir.exists()).then_some(())
            })
            .await;
            signal("-CONT");
            told(&id).await;
        },
    );
}

#[test]
fn a_new_shim_is_in_the_scope_of_the_one_that_died() {
    on_systemd_node(
        "a_new_shim_is_in_the_scope_of_the_one_that_died",
        Options::default(),
        async |node| {
            let image = node.busybox().await;
            let pod = node.pod("adopted").await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            let before = cgroup_of(node.shim_pid(&pod).await.into());
            for round in 1..=3 {
                node.outlives_shim(&pod, &[&id]).await;
                node.kill_shim(&pod).await;
                let took = node.adopted(&pod, round).await;
                println!("KILL TO ADOPTED {} us", took.as_micros());
                let shim = node.shim_pid(&pod).await;
                assert_eq!(cgroup_of(shim.into()), before);
            }
            assert_eq!(node.sh(&id, "echo x").await, "x");
            node.client.stop_pod(&pod.id).await.unwrap();
            assert_eq!(units(&pod.id[..32]), [""; 0]);
        },
    );
}

#[test]
fn a_pod_half_made_under_systemd_is_taken_back() {
    const NAME: &str = "a_pod_half_made_under_systemd_is_taken_back";
    if !daemon::has_failpoints().unwrap() {
        println!("SKIP {NAME}: gantryd is built without its feature failpoints");
        return;
    }
    let options = Options::default().env("FAILPOINTS", "pod::after-network=return(kill)");
    on_systemd_node(NAME, options, async |node| {
        let config = node.pod_config("half");
        node.client.run_pod(&config).await.unwrap_err();
        node.daemon.wait_ended().await.unwrap();
        let shims = node
            .daemon
            .places()
            .cgroup
            .replace(".slice", "-shims.slice");
        let dir = Path::new("/sys/fs/cgroup")
            .join(&node.daemon.places().cgroup)
            .join(&shims);
        let scopes = || {
            let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
            entries.filter(|entry| entry.path().is_dir()).count()
        };
        assert_eq!(scopes(), 1, "it was there when the daemon was killed");
        node.start_again(&[]).await;
        assert_eq!(scopes(), 0);
        assert!(node.client.list_pods(None).await.unwrap().is_empty());
        node.assert_clean_but_daemon();
        node.accept_now();
        // The name is free again.
        node.run_pod(&config).await;
    });
}

/// Needs no systemd: at the other end of the bus is somebody who never answers.
#[test]
fn a_systemd_that_hangs_costs_the_pod_that_asks() {
    const NAME: &str = "a_systemd_that_hangs_costs_the_pod_that_asks";
    let dir = tempfile::tempdir().unwrap();
    let bus = dir.path().join("bus");
    let _silent = std::os::unix::net::UnixListener::bind(&bus).unwrap();
    let address = format!("unix:path={}", bus.display());
    let options = Options::default().env("DBUS_SYSTEM_BUS_ADDRESS", &address);
    on_node(NAME, options.systemd(), async |node| {
        let config = node.pod_config("hangs");
        let began = Instant::now();
        let (made, before) = tokio::join!(
            async {
                let made = node.client.run_pod(&config).await;
                (made, began.elapsed())
            },
            async {
                // Meanwhile everything else is answered.
                tokio::time::sleep(Duration::from_secs(1)).await;
                node.client.list_pods(None).await.unwrap();
                began.elapsed()
            }
        );
        let (made, after) = made;
        assert!(before < after, "{before:?}, {after:?}");
        let error = made.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
        assert!(error.message().contains("systemd"), "{error}");
        // Ten seconds for the scopes, and as long until they are left to systemd.
        assert!(
            began.elapsed() < Duration::from_secs(100),
            "{:?}",
            began.elapsed()
        );
        assert!(node.client.list_pods(None).await.unwrap().is_empty());
        let pods = node.daemon.places().state.join("pods");
        assert_eq!(
            std::fs::read_dir(pods).unwrap().count(),
            0,
            "run directories"
        );
    });
}
