//! Sessions by the thousand.

use std::process::Child;
use std::time::Duration;

use gantry_integration::crictl::Crictl;
use gantry_integration::echo::Echo;
use gantry_integration::streaming::{STDIN, Socket};
use gantry_integration::{Node, eventually, on_node, script_config};
use gantry_testkit::daemon::Options;
use gantry_testkit::leakcheck::descriptors;
use gantry_testkit::process;

use super::{PIPES, Stdio, TTY, attach, exec, forward, processes};

const ROUNDS: u32 = 125;

/// Sessions of a round.
const KINDS: u32 = 8;

/// Rounds between two looks at memory. The first ones make what stays: threads, connections, caches.
const STRETCH: u32 = 25;

/// What a session may leave in private memory, in bytes, once all have ended. Less than any buffer
/// or task of one. What sessions leave is left by those of every stretch; an allocator takes some
/// more now and then, for long, and then no more.
const A_SESSION: u64 = 1024;

/// Drops one end of a session, in the middle of whatever it does.
enum Session {
    WebSocket(#[expect(dead_code, reason = "its drop closes the connection")] Socket),
    Spdy(Child),
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Self::Spdy(crictl) = self {
            crictl.kill().expect("a crictl to kill");
            crictl.wait().expect("a crictl that ended");
        }
    }
}

async fn daemons_tasks(node: &Node) -> u64 {
    let status = node.client.node_status(true).await.expect("Status");
    let daemon: serde_json::Value = serde_json::from_str(&status.info["daemon"]).expect("JSON");
    daemon["tasks"].as_u64().expect("a number of tasks")
}

async fn open(
    node: &Node,
    crictl: &Crictl,
    (pod, port): (&str, i32),
    id: &str,
    kind: u32,
) -> Session {
    let mut socket = match kind {
        0 => {
            let args = [
                "exec",
                "-i",
                "-r",
                "spdy",
                id,
                "sh",
                "-c",
                "cat; sleep 4711",
            ];
            return Session::Spdy(crictl.spawn(&args));
        }
        1 => exec(node, id, "cat; sleep 4711", PIPES).await,
        2 | 3 => exec(node, id, "cat; sleep 4711", TTY).await,
        4 => exec(node, id, "yes", Stdio::default()).await,
        5 => exec(node, id, "exit 3", PIPES).await,
        6 => forward(node, pod, port).await,
        _ => attach(node, id, PIPES).await,
    };
    // One that has ended already is no matter.
    let _ = socket.send(STDIN, b"text\n");
    if kind != 6 {
        let _ = socket.resize(80, 20);
    }
    Session::WebSocket(socket)
}

/// CVE-2022-23471, CVE-2025-64329.
#[test]
fn sessions_opened_and_dropped_at_any_moment_leave_nothing() {
    const NAME: &str = "sessions_opened_and_dropped_at_any_moment_leave_nothing";
    let Some(program) = Crictl::find(NAME) else {
        return;
    };
    let options = Options::default().config("[timeouts]\nexec_grace_seconds = 0\n");
    on_node(NAME, options, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("drop").await;
        let script = "trap 'exit 0' TERM; while :; do sleep 1; done";
        let mut config = script_config("c", &image, script);
        config.stdin = true;
        let echo = Echo::serve(node.daemon.netns().path()).unwrap();
        let id = node.run(&pod, &config).await;
        let crictl = Crictl::new(&program, &node.daemon);
        let shim =
            i32::try_from(node.pod_info(&pod.id).await["shimPid"].as_i64().unwrap()).unwrap();
        let daemon = node.daemon.pid().unwrap();
        let threads = || process::threads(daemon).unwrap();
        let private_memory = |pid| process::private_memory(pid).unwrap();
        // What the first ones make stays.
        assert_eq!(
            exec(node, &id, "true", TTY).await.rest().exit_code(),
            Some(0)
        );
        let before = (
            descriptors(shim).len(),
            descriptors(daemon).len(),
            daemons_tasks(node).await,
        );
        let mut memory = Vec::new();
        for round in 0..ROUNDS {
            let mut sessions = Vec::new();
            for kind in 0..KINDS {
                sessions.push(open(node, &crictl, (&pod.id, echo.port.into()), &id, kind).await);
                let pause = u64::from((round * 37 + kind * 11) % 30);
                std::thread::sleep(Duration::from_millis(pause));
                if kind % 3 == 0 {
                    drop(sessions.remove(0));
                }
            }
            drop(sessions);
            if (round + 1) % STRETCH == 0 {
                settled(node, &id, shim, daemon, before).await;
                memory.push((private_memory(shim), private_memory(daemon)));
            }
        }
        // Blocking threads go when they are idle.
        eventually("no thread is left", async || (threads() < 32).then_some(())).await;
        println!("private memory of shim and daemon, a stretch each: {memory:?}");
        let allowed = u64::from(STRETCH * KINDS) * A_SESSION;
        let grows = |of: fn(&(u64, u64)) -> u64| {
            let mut stretches = memory.windows(2);
            stretches.all(|pair| of(&pair[1]) >= of(&pair[0]) + allowed)
        };
        assert!(!grows(|(shim, _)| *shim), "shim: {memory:?}");
        assert!(!grows(|(_, daemon)| *daemon), "daemon: {memory:?}");
        assert!(node.is_running(&id).await);
    });
}

/// Waits until nothing of a session is left.
async fn settled(
    node: &Node,
    id: &str,
    shim: i32,
    daemon: i32,
    (in_shim, in_daemon, tasks): (usize, usize, u64),
) {
    eventually("no descriptor is left in the shim", async || {
        (descriptors(shim).len() <= in_shim).then_some(())
    })
    .await;
    eventually("no descriptor is left in the daemon", async || {
        (descriptors(daemon).len() <= in_daemon).then_some(())
    })
    .await;
    eventually("no process is left", async || {
        let left = processes(node, id, "4711").await
            + processes(node, id, "yes").await
            + processes(node, id, "cat").await;
        (left == 0).then_some(())
    })
    .await;
    eventually("no task is left in the daemon", async || {
        (daemons_tasks(node).await <= tasks).then_some(())
    })
    .await;
}
