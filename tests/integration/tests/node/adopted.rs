//! A pod's shim dies, and another takes its place: containers do not notice.

use std::path::Path;
use std::time::{Duration, Instant};

use gantry_integration::streaming::STDIN;
use gantry_integration::{
    FAULTY, Fault, Node, Pod, eventually, on_failing_node, on_node, on_plain_node, script_config,
    sleeper,
};
use gantry_testkit::cri::v1::{ContainerState, NamespaceMode};
use gantry_testkit::cri::{Client, pod_namespaces};
use gantry_testkit::daemon::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::crossing::{dies, passed};
use crate::streaming::{PIPES, TTY, attach};

/// Writes numbered lines for as long as it lives.
const COUNTER: &str = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.01; done";

async fn pid(node: &Node, id: &str) -> i64 {
    node.container_info(id).await["pid"].as_i64().unwrap()
}

/// Makes a file in a container.
async fn touch(node: &Node, id: &str, path: &str) {
    let root = format!("/proc/{}/root", pid(node, id).await);
    std::fs::write(format!("{root}{path}"), "").unwrap();
}

/// Nothing twice, and nothing missing but what a dead shim may have read and not written.
fn assert_counted(output: &str, deaths: usize) {
    let numbers: Vec<usize> = output.lines().map(|line| line.parse().unwrap()).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    let missing = numbers.last().unwrap() - numbers.len();
    println!("{} lines, {missing} lost to {deaths} deaths", numbers.len());
    assert!(
        missing <= deaths,
        "{missing} lines are missing: {numbers:?}"
    );
}

#[test]
fn containers_outlive_their_shim() {
    on_plain_node("containers_outlive_their_shim", async |node| {
        let image = node.busybox().await;
        let (pod, other) = (node.pod("adopted").await, node.host_pod("other").await);
        let counter = node.run_script(&pod, "counter", &image, COUNTER).await;
        let mut config = script_config("reader", &image, "read x; echo got $x; exit 7");
        config.stdin = true;
        let reader = node.run(&pod, &config).await;
        let mut config = script_config(
            "tty",
            &image,
            "stty -echo; while read x; do stty size; done",
        );
        (config.stdin, config.tty) = (true, true);
        let tty = node.run(&pod, &config).await;
        let idle = node.run(&pod, &sleeper("idle", &image)).await;
        let created = node.create(&pod, &sleeper("created", &image)).await;
        let ended = node.run_script(&pod, "ended", &image, "exit 3").await;
        node.exited(&ended).await;
        let bystander = node.run(&other, &sleeper("bystander", &image)).await;
        let running = [counter.as_str(), &reader, &tty, &idle];
        let mut before = Vec::new();
        for id in running {
            before.push((node.status(id).await, pid(node, id).await));
        }
        let untouched = node.status(&bystander).await;
        let (netns, ip) = (
            node.pod_info(&pod.id).await["pid"].clone(),
            node.ip(&pod).await,
        );
        for round in 1..=3 {
            node.outlives_shim(&pod, &running).await;
            let written = node.output(&pod, "counter").lines().count();
            node.kill_shim(&pod).await;
            let took = node.adopted(&pod, round).await;
            println!("KILL TO ADOPTED {} us", took.as_micros());
            let line = format!("\n{}\n", written + 30);
            node.has_written(&pod, "counter", &line).await;
        }
        for (id, (status, was)) in running.into_iter().zip(before) {
            assert_eq!(node.status(id).await, status);
            assert_eq!(pid(node, id).await, was);
        }
        assert!(node.pod_is_ready(&pod.id).await);
        let info = node.pod_info(&pod.id).await;
        assert_eq!((&info["pid"], node.ip(&pod).await), (&netns, ip));
        assert_eq!(node.status(&bystander).await, untouched);
        // The new shim does all that the old one did.
        for id in [&counter, &tty, &idle] {
            assert_eq!(node.sh(id, "echo x").await, "x");
        }
        node.client.start(&created).await.unwrap();
        assert!(node.is_running(&created).await);
        let mut socket = attach(node, &reader, PIPES).await;
        socket.send(STDIN, b"word\n").unwrap();
        assert_eq!(socket.rest().stdout, "got word\n");
        assert_eq!(node.exited(&reader).await.exit_code, 7);
        let mut socket = attach(node, &tty, TTY).await;
        socket.resize(77, 33).unwrap();
        eventually("the terminal has its size", async || {
            socket.send(STDIN, b"\n").unwrap();
            node.output(&pod, "tty").contains("33 77").then_some(())
        })
        .await;
        drop(socket);
        node.client.reopen_log(&counter).await.unwrap();
        node.client.stop(&idle, 20).await.unwrap();
        assert_eq!(node.exited(&idle).await.exit_code, 0);
        node.client.stop(&counter, 0).await.unwrap();
        assert_eq!(node.exited(&counter).await.exit_code, 137);
        assert_counted(&node.output(&pod, "counter"), 3);
        node.client.remove(&ended).await.unwrap();
    });
}

#[test]
fn a_shared_pid_namespace_outlives_the_shim() {
    on_plain_node("a_shared_pid_namespace_outlives_the_shim", async |node| {
        let image = node.busybox().await;
        let mut config = node.pod_config("shared");
        pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
        let pod = node.run_pod(&config).await;
        let mut ids = Vec::new();
        for (name, script) in [
            (
                "signal",
                "until [ -e /tmp/end ]; do sleep 0.05; done; kill -TERM $$",
            ),
            (
                "left",
                "sleep 1000 & until [ -e /tmp/end ]; do sleep 0.05; done; exit 9",
            ),
        ] {
            let mut config = script_config(name, &image, script);
            let security = gantry_testkit::cri::security(&mut config);
            let options = security.namespace_options.get_or_insert_default();
            options.pid = NamespaceMode::Pod.into();
            ids.push(node.run(&pod, &config).await);
        }
        node.outlives_shim(&pod, &[&ids[0], &ids[1]]).await;
        node.kill_shim(&pod).await;
        node.adopted(&pod, 1).await;
        assert!(node.sh(&ids[0], "ps").await.contains("gantry-holder"));
        for (id, code) in ids.iter().zip([143, 9]) {
            touch(node, id, "/tmp/end").await;
            assert_eq!(node.exited(id).await.exit_code, code);
        }
    });
}

/// What ends while there is no shim is learnt, and what is asked meanwhile waits or is answered.
#[test]
fn what_happens_between_two_shims_is_not_missed() {
    const NAME: &str = "what_happens_between_two_shims_is_not_missed";
    on_failing_node(NAME, "adoption::begun=1*sleep(4000)->off", async |node| {
        let image = node.busybox().await;
        let (pod, other) = (node.pod("gap").await, node.host_pod("other").await);
        let wait = "until [ -e /tmp/end ]; do sleep 0.05; done";
        let mut ending = Vec::new();
        for (name, end) in [("zero", "exit 0"), ("seven", "echo last words; exit 7")] {
            let script = format!("{wait}; {end}");
            ending.push(node.run_script(&pod, name, &image, &script).await);
        }
        let killed = node.run(&pod, &sleeper("killed", &image)).await;
        let stopped = node.run(&pod, &sleeper("stopped", &image)).await;
        let bystander = node.run(&other, &sleeper("bystander", &image)).await;
        let all = [ending[0].as_str(), &ending[1], &killed, &stopped];
        node.outlives_shim(&pod, &all).await;
        let victim = Pid::from_raw(i32::try_from(pid(node, &killed).await).unwrap());
        let began = Instant::now();
        node.kill_shim(&pod).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        for id in &ending {
            touch(node, id, "/tmp/end").await;
        }
        kill(victim, Signal::SIGKILL).unwrap();
        // Reads, and the other pod, do not wait.
        assert!(node.pod_is_ready(&pod.id).await);
        assert_eq!(node.client.list(None).await.unwrap().len(), 5);
        assert_eq!(node.sh(&bystander, "echo on").await, "on");
        assert_eq!(node.pod_info(&pod.id).await["shimAdoptions"], 0);
        // What needs the shim does.
        assert_eq!(node.sh(&stopped, "echo waited").await, "waited");
        assert!(began.elapsed() >= Duration::from_millis(3900));
        node.adopted(&pod, 1).await;
        for (id, code) in [(&ending[0], 0), (&ending[1], 7), (&killed, 137)] {
            let status = node.exited(id).await;
            if status.reason == "Unknown" {
                println!("SKIP code of {id}: this kernel keeps none");
            } else {
                assert_eq!(status.exit_code, code, "{status:?}");
            }
        }
        assert_eq!(node.output(&pod, "seven"), "last words\n");
        node.client.stop(&stopped, 20).await.unwrap();
        assert_eq!(node.exited(&stopped).await.exit_code, 0);
    });
}

/// A Stop that waits for the grace to pass goes on under the next shim.
#[test]
fn a_stop_and_a_removal_go_on_under_the_next_shim() {
    const NAME: &str = "a_stop_and_a_removal_go_on_under_the_next_shim";
    on_failing_node(NAME, "adoption::begun=1*sleep(500)->off", async |node| {
        let image = node.busybox().await;
        let pod = node.pod("stopping").await;
        let deaf = "trap 'echo heard' TERM; while :; do sleep 0.05; done";
        let deaf = node.run_script(&pod, "deaf", &image, deaf).await;
        let removed = node.run(&pod, &sleeper("removed", &image)).await;
        node.outlives_shim(&pod, &[&deaf, &removed]).await;
        let asking = |id: &str| {
            (
                Client::connect(node.daemon.socket()).unwrap(),
                id.to_owned(),
            )
        };
        let (client, id) = asking(&deaf);
        let stop = tokio::spawn(async move { client.stop(&id, 3).await });
        node.has_written(&pod, "deaf", "heard").await;
        node.kill_shim(&pod).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (client, id) = asking(&removed);
        let removal = tokio::spawn(async move { client.remove(&id).await });
        node.adopted(&pod, 1).await;
        removal.await.unwrap().unwrap();
        stop.await.unwrap().unwrap();
        assert_eq!(node.exited(&deaf).await.exit_code, 137);
        assert_eq!(node.client.list(None).await.unwrap().len(), 1);
    });
}

#[test]
fn a_frozen_shim_is_killed_and_replaced() {
    on_plain_node("a_frozen_shim_is_killed_and_replaced", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("frozen").await;
        let id = node.run_script(&pod, "counter", &image, COUNTER).await;
        node.outlives_shim(&pod, &[&id]).await;
        let shim = Pid::from_raw(node.shim_pid(&pod).await);
        kill(shim, Signal::SIGSTOP).unwrap();
        // Each waits for its answer; together they are as many as are borne.
        let calls = [(); 3].map(|()| {
            let client = Client::connect(node.daemon.socket()).unwrap();
            let id = id.clone();
            tokio::spawn(async move { client.reopen_log(&id).await })
        });
        for call in calls {
            assert!(call.await.unwrap().is_err());
        }
        node.adopted(&pod, 1).await;
        assert_eq!(node.sh(&id, "echo x").await, "x");
        node.client.stop(&id, 0).await.unwrap();
        assert_counted(&node.output(&pod, "counter"), 1);
    });
}

#[test]
fn a_new_daemon_takes_into_custody_what_it_finds() {
    on_plain_node(
        "a_new_daemon_takes_into_custody_what_it_finds",
        async |node| {
            let image = node.busybox().await;
            let pod = node.pod("restarted").await;
            let id = node.run_script(&pod, "counter", &image, COUNTER).await;
            for round in 1..=2 {
                node.kill_and_start_again().await;
                node.outlives_shim(&pod, &[&id]).await;
                node.kill_shim(&pod).await;
                node.adopted(&pod, round).await;
            }
            // The count is on record, and so is the new shim.
            let shim = node.shim_pid(&pod).await;
            node.kill_and_start_again().await;
            assert_eq!(node.shim_pid(&pod).await, shim);
            node.adopted(&pod, 2).await;
            assert_eq!(node.sh(&id, "echo x").await, "x");
            node.client.stop(&id, 0).await.unwrap();
            assert_counted(&node.output(&pod, "counter"), 2);
        },
    );
}

#[test]
fn a_command_ends_with_the_shim_that_ran_it() {
    on_plain_node("a_command_ends_with_the_shim_that_ran_it", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("exec").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        node.outlives_shim(&pod, &[&id]).await;
        let client = Client::connect(node.daemon.socket()).unwrap();
        let key = id.clone();
        let command = tokio::spawn(async move {
            let script = "sleep 4321 & sleep 4321";
            client.exec(&key, &["sh", "-c", script], 60).await
        });
        let sleeping = "ps | grep -c '[s]leep 4321' || true";
        eventually("the command runs", async || {
            (node.sh(&id, sleeping).await == "2").then_some(())
        })
        .await;
        node.kill_shim(&pod).await;
        let error = command.await.unwrap().unwrap_err();
        assert_eq!(error.code(), tonic::Code::Unavailable, "{error}");
        node.adopted(&pod, 1).await;
        eventually("its processes are killed", async || {
            (node.sh(&id, sleeping).await == "0").then_some(())
        })
        .await;
        assert!(node.is_running(&id).await);
    });
}

/// A container in the middle of its start is lost alone, with the call of the runtime.
#[test]
fn a_start_that_was_cut_off_is_lost_alone() {
    on_node(
        "a_start_that_was_cut_off_is_lost_alone",
        Options::default(),
        async |node| {
            let image = node.busybox().await;
            let faults = node.daemon.runtime_faults().clone();
            let config = node.pod_config("cut");
            let id = node.client.run_pod_by(&config, FAULTY).await.unwrap();
            let pod = Pod { id, config };
            let counter = node.run_script(&pod, "counter", &image, COUNTER).await;
            for (attempt, fault) in [(0, Fault::Hang), (1, Fault::Hang)] {
                let mut config = sleeper("cut", &image);
                config.metadata.as_mut().unwrap().attempt = attempt;
                let cut = node.create(&pod, &config).await;
                node.outlives_shim(&pod, &[&counter]).await;
                let command = if attempt == 0 { "create" } else { "start" };
                let before = faults.count(command);
                faults.set(command, fault);
                let client = Client::connect(node.daemon.socket()).unwrap();
                let key = cut.clone();
                let start = tokio::spawn(async move { client.start(&key).await });
                eventually("the runtime hangs", async || {
                    (faults.count(command) > before).then_some(())
                })
                .await;
                node.kill_shim(&pod).await;
                assert!(start.await.unwrap().is_err());
                faults.clear(command);
                node.adopted(&pod, u64::from(attempt) + 1).await;
                let status = node.exited(&cut).await;
                assert_ne!(status.exit_code, 0, "{status:?}");
                assert!(node.is_running(&counter).await);
                node.client.remove(&cut).await.unwrap();
            }
            assert!(node.pod_is_ready(&pod.id).await);
            node.client.stop(&counter, 0).await.unwrap();
            assert_counted(&node.output(&pod, "counter"), 2);
        },
    );
}

#[test]
fn a_pod_whose_shims_end_again_and_again_is_given_up() {
    const NAME: &str = "a_pod_whose_shims_end_again_and_again_is_given_up";
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.pod("again").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let process = pid(node, &id).await;
        let holder = node.pod_info(&pod.id).await["pid"].as_i64().unwrap();
        node.outlives_shim(&pod, &[&id]).await;
        for round in 1..=5 {
            node.kill_shim(&pod).await;
            node.adopted(&pod, round).await;
        }
        node.kill_shim(&pod).await;
        let status = node.exited(&id).await;
        assert_eq!(status.exit_code, 137, "{status:?}");
        assert!(!node.pod_is_ready(&pod.id).await);
        for pid in [process, holder] {
            eventually("nothing of it is left", async || {
                (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())
            })
            .await;
        }
    });
}

/// What went wrong while a shim was replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    KillDaemon,
    FailInDaemon,
    KillShim,
    FailInShim,
}

impl Trouble {
    fn in_shim(self) -> bool {
        matches!(self, Trouble::KillShim | Trouble::FailInShim)
    }
}

/// Every failpoint that an adoption passes, in the daemon and in the new shim, crossed with a kill
/// and a failure there: the pod goes on as it was or is lost as a whole, and nothing leaks.
async fn cross(node: &mut Node, trouble: Trouble) {
    let image = node.busybox().await;
    let trace = node.daemon.path("trace");
    let (trace_to, armed_by) = match trouble.in_shim() {
        true => ("SHIM_FAILPOINT_TRACE", "SHIM_FAILPOINTS"),
        false => ("FAILPOINT_TRACE", "FAILPOINTS"),
    };
    let action = match trouble {
        Trouble::KillDaemon | Trouble::KillShim => "return(kill)",
        Trouble::FailInDaemon | Trouble::FailInShim => "1*return(trouble)->off",
    };
    node.daemon.kill().unwrap();
    node.start_again(&[(trace_to, &trace.display().to_string())])
        .await;
    let (pod, _) = scene(node, &image).await;
    let before = passed(&trace);
    node.kill_shim(&pod).await;
    node.adopted(&pod, 1).await;
    let after = passed(&trace);
    node.remove_pods().await;

    let mut crossed = Vec::new();
    for (name, &count) in &after {
        let passed_before = before.get(name).copied().unwrap_or_default();
        // The first shim would meet it too.
        if trouble.in_shim() && passed_before > 0 {
            continue;
        }
        for turn in passed_before..count {
            let at = format!("{trouble:?} at {name}, time {}", turn + 1);
            let failpoints = match turn {
                0 => format!("{name}={action}"),
                turn => format!("{name}={turn}*off->{action}"),
            };
            node.daemon.kill().unwrap();
            node.start_again(&[(armed_by, &failpoints)]).await;
            let (pod, id) = scene(node, &image).await;
            node.kill_shim(&pod).await;
            if trouble == Trouble::KillDaemon {
                if dies(node).await {
                    node.start_again(&[]).await;
                }
            } else {
                let settled = async || {
                    let info = node.pod_info(&pod.id).await;
                    let lost = info["notReadyReason"] != "";
                    (lost || info["shimAdoptions"] != 0).then_some(())
                };
                eventually(&at, settled).await;
            }
            let ready = node.pod_is_ready(&pod.id).await;
            if ready && node.is_running(&id).await {
                eventually(&at, async || {
                    let output = node.client.exec(&id, &["echo", "x"], 20).await;
                    output
                        .is_ok_and(|output| output.stdout == b"x\n")
                        .then_some(())
                })
                .await;
            } else {
                let status = node.exited(&id).await;
                assert_ne!(status.exit_code, 0, "{at}: {status:?}");
            }
            for container in node.client.list(None).await.unwrap() {
                assert_ne!(container.state(), ContainerState::ContainerUnknown, "{at}");
            }
            println!("{at}: {}", if ready { "goes on" } else { "is lost" });
            node.kill_and_start_again().await;
            node.remove_pods().await;
            node.assert_clean_but_daemon();
            crossed.push(at);
        }
    }
    println!("CROSSED {} {crossed:#?}", crossed.len());
    let least = if trouble.in_shim() { 2 } else { 6 };
    assert!(crossed.len() >= least, "{crossed:?}");
}

/// A pod that can lose its shim, with a container that runs.
async fn scene(node: &Node, image: &str) -> (Pod, String) {
    let pod = node.pod("crossed").await;
    let id = node.run(&pod, &sleeper("c", image)).await;
    node.outlives_shim(&pod, &[&id]).await;
    (pod, id)
}

fn crossing(name: &str, trouble: Trouble) {
    if !daemon::has_failpoints().unwrap() {
        println!("SKIP {name}: gantryd is built without its feature failpoints");
        return;
    }
    let mut options = Options::default();
    if trouble.in_shim() {
        let Some(shim) = std::env::var_os("GANTRY_FAILING_SHIM") else {
            println!("SKIP {name}: GANTRY_FAILING_SHIM names no gantry-shim with failpoints");
            return;
        };
        options = options.config(&format!("shim = {shim:?}\n"));
    }
    on_node(name, options, async |node| cross(node, trouble).await);
}

#[test]
fn killed_while_a_shim_is_replaced() {
    crossing("killed_while_a_shim_is_replaced", Trouble::KillDaemon);
}

#[test]
fn failed_while_a_shim_is_replaced() {
    crossing("failed_while_a_shim_is_replaced", Trouble::FailInDaemon);
}

#[test]
fn shim_killed_while_it_takes_over() {
    crossing("shim_killed_while_it_takes_over", Trouble::KillShim);
}

#[test]
fn shim_failed_while_it_takes_over() {
    crossing("shim_failed_while_it_takes_over", Trouble::FailInShim);
}
