//! What gantryd says it is at, to gantryctl and into a dump, while something hangs.

use std::path::PathBuf;

use gantry_integration::gantryctl::Gantryctl;
use gantry_integration::{Fault, Node, eventually, on_node, on_plain_node, sleeper};
use gantry_testkit::daemon::Options;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// `gantryctl state --json`, and what it exits with.
fn state(program: &std::path::Path, node: &Node) -> (i32, Value) {
    let output = Gantryctl::new(program, &node.daemon).feed(&["state", "--json"], Vec::new());
    let said = String::from_utf8_lossy(&output.stderr);
    let state =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    (output.status.code().unwrap(), state)
}

fn find<'a>(state: &'a Value, list: &str, key: &str, value: &str) -> Option<&'a Value> {
    let mut entries = state[list].as_array().unwrap().iter();
    entries.find(|entry| entry[key] == value)
}

/// Dumps, the oldest first.
fn dumps(node: &Node) -> Vec<PathBuf> {
    let dir = node.daemon.places().state.join("dumps");
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn usr1(node: &Node) {
    let pid = Pid::from_raw(node.daemon.pid().unwrap());
    kill(pid, Signal::SIGUSR1).unwrap();
}

/// A dump that was asked for now, once it is complete.
async fn dump(node: &Node) -> String {
    let before = dumps(node);
    usr1(node);
    eventually("a dump", async || {
        let path = dumps(node)
            .into_iter()
            .find(|path| !before.contains(path))?;
        let text = std::fs::read_to_string(path).unwrap();
        // The last section.
        text.contains("\nSTUCK\n").then_some(text)
    })
    .await
}

fn forget_dumps(node: &Node) {
    std::fs::remove_dir_all(node.daemon.places().state.join("dumps")).unwrap();
}

#[test]
fn a_gantryd_that_hangs_is_told_and_can_be_left() {
    const NAME: &str = "a_gantryd_that_hangs_is_told_and_can_be_left";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let daemon = Pid::from_raw(node.daemon.pid().unwrap());
        kill(daemon, Signal::SIGSTOP).unwrap();
        let output = Gantryctl::new(&program, &node.daemon).feed(&["state"], Vec::new());
        let mut top = std::process::Command::new("timeout");
        top.args(["--signal=INT", "--kill-after=60", "2"])
            .arg(&program)
            .arg("--socket")
            .args([node.daemon.socket()])
            .arg("top");
        let interrupted = top.status().unwrap();
        kill(daemon, Signal::SIGCONT).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("does not answer within 10s"), "{said}");
        // 137 where it had to be killed.
        assert_eq!(interrupted.code(), Some(124));
        assert_eq!(state(&program, node).0, 0);
    });
}

#[test]
fn state_tells_what_the_node_has() {
    const NAME: &str = "state_tells_what_the_node_has";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.pod("p").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let (code, seen) = state(&program, node);
        assert_eq!(code, 0, "{seen:#}");
        assert_eq!(seen["ready"], true);
        assert_eq!(seen["pods"]["ready"], 1);
        assert_eq!(seen["containers"]["running"], 1);
        assert_eq!(seen["images"], 1);
        assert_eq!(
            i32::try_from(seen["pid"].as_i64().unwrap()).ok(),
            node.daemon.pid()
        );
        let driver = find(&seen, "drivers", "pod", &pod.id).unwrap();
        assert_eq!(driver["name"], "p");
        assert_eq!(
            i32::try_from(driver["shim"].as_i64().unwrap()).unwrap(),
            node.shim_pid(&pod).await
        );
        // Its own call is under way.
        let own = "gantry.admin.v1.Node/State";
        assert!(find(&seen, "calls", "method", own).is_some(), "{seen:#}");
        let config = seen["config"][0].as_str().unwrap();
        assert!(config.ends_with("config.toml"), "{config}");

        node.client.stop(&id, 0).await.unwrap();
        let output = Gantryctl::new(&program, &node.daemon).feed(&["state"], Vec::new());
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("containers  1 exited"), "{text}");
        assert!(text.contains("pods        1 ready"), "{text}");
    });
}

#[test]
fn a_dump_names_what_hangs_and_for_how_long() {
    const NAME: &str = "a_dump_names_what_hangs_and_for_how_long";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    let options = Options::default().config("[timeouts]\nnetwork_seconds = 600\n");
    on_node(NAME, options, async |node| {
        let image = node.busybox().await;
        // A shim that is frozen, and a call of it.
        let frozen = node.host_pod("frozen").await;
        let id = node.run(&frozen, &sleeper("c", &image)).await;
        node.outlives_shim(&frozen, &[&id]).await;
        let shim = Pid::from_raw(node.shim_pid(&frozen).await);
        kill(shim, Signal::SIGSTOP).unwrap();
        let (client, key) = (node.client.clone(), id.clone());
        let in_shim = tokio::spawn(async move { client.stop(&key, 600).await });
        // A plugin that hangs.
        let plugin = node.daemon.plugin_faults().clone();
        plugin.set("ADD", Fault::Hang);
        let (client, config) = (node.client.clone(), node.pod_config("hung"));
        let in_plugin = tokio::spawn(async move { client.run_pod(&config).await });
        let hangs = |seen: &Value| find(seen, "steps", "step", "network ADD").cloned();
        let step = eventually("the plugin hangs", async || hangs(&state(&program, node).1)).await;
        let hung = step["pod"].as_str().unwrap();

        let metadata = frozen.config.metadata.clone().unwrap();
        let text = dump(node).await;
        for expected in [
            "RunPodSandbox",
            &format!("about={}/hung", metadata.namespace),
            &format!("pod={hung}"),
            "step=network ADD",
            "step=shim: signal",
            &format!("pod={}", frozen.id),
            "StopContainer",
            &format!("about={id}"),
            "\nTHREADS\n",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
        // Ages grow as time goes by, and in the end it is called stuck.
        let first = step["age"].as_f64().unwrap();
        let began = std::time::Instant::now();
        let (age, apart) = eventually("it is called stuck", async || {
            let (code, seen) = state(&program, node);
            let stuck = seen["stuck"].as_array().unwrap();
            let named = |line: &Value| {
                let line = line.as_str().unwrap();
                line.starts_with("network ADD") && line.contains(hung)
            };
            if !stuck.iter().any(named) {
                return None;
            }
            assert_eq!(code, 2);
            // Its grace is not over.
            let stop = |line: &Value| line.as_str().unwrap().starts_with("stop container");
            assert!(!stuck.iter().any(stop), "{stuck:?}");
            let age = hangs(&seen)?["age"].as_f64().unwrap();
            Some((age, began.elapsed().as_secs_f64()))
        })
        .await;
        assert!(
            age >= 10.0 && age <= first + apart + 60.0,
            "{first} {age} {apart}"
        );
        assert!(age > first, "{first} {age}");
        let driver = find(&state(&program, node).1, "drivers", "pod", hung).cloned();
        assert_eq!(driver.unwrap()["busy"][0]["with"], "creating");

        // Many signals are as good as one.
        for _ in 0..50 {
            usr1(node);
        }
        dump(node).await;
        node.client.version().await.unwrap();
        assert!(dumps(node).len() <= 8);
        let log = std::fs::read_to_string(node.daemon.path("gantryd.log")).unwrap();
        assert!(
            log.contains("dump written") && log.contains("network ADD: pod"),
            "{log}"
        );

        // The plugin is killed at the pod's end, and the shim goes on.
        kill(shim, Signal::SIGCONT).unwrap();
        in_shim.await.unwrap().unwrap();
        node.daemon.kill().unwrap();
        assert!(in_plugin.await.unwrap().is_err());
        plugin.clear("ADD");
        node.start_again(&[]).await;
        forget_dumps(node);
        node.remove_pods().await;
        node.assert_clean_but_daemon();
        node.accept_now();
    });
}

#[test]
fn a_dump_needs_no_worker_of_the_runtime() {
    const NAME: &str = "a_dump_needs_no_worker_of_the_runtime";
    let options = Options::default()
        .env("TOKIO_WORKER_THREADS", "1")
        .env("FAILPOINTS", "network::before-release=1*sleep(20000)");
    if !matches!(gantry_testkit::daemon::has_failpoints(), Ok(true)) {
        println!("SKIP {NAME}: gantryd is built without its feature failpoints");
        return;
    }
    on_node(NAME, options, async |node| {
        let pod = node.pod("p").await;
        let (client, id) = (node.client.clone(), pod.id.clone());
        let stop = tokio::spawn(async move { client.stop_pod(&id).await });
        // The only worker sleeps in a step of that pod.
        eventually("the step is under way", async || {
            let text = dump(node).await;
            text.contains("step=stop pod").then_some(())
        })
        .await;
        assert!(!stop.is_finished());
        stop.await.unwrap().unwrap();
        forget_dumps(node);
    });
}
