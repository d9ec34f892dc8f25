//! Sessions that are ended from outside: their daemon is killed or told to stop, their client is
//! gone.

use std::time::{Duration, Instant};

use gantry_integration::streaming::{self, STDIN, Socket};
use gantry_integration::{Node, eventually, on_node, sleeper};
use gantry_testkit::cri::v1;
use gantry_testkit::daemon::Options;

/// A running container that does nothing; its id, and how its processes are counted, which needs no
/// daemon.
async fn idle(node: &Node, name: &str) -> (String, Processes) {
    let image = node.busybox().await;
    let pod = node.host_pod(name).await;
    let id = node.run(&pod, &sleeper("c", &image)).await;
    let pid = node.container_info(&id).await["pid"].as_i64().unwrap();
    let namespace = pid_namespace(pid).expect("a running container");
    (id, Processes { namespace })
}

fn pid_namespace(pid: i64) -> Option<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

/// The processes of a container, as the host sees them.
struct Processes {
    namespace: std::path::PathBuf,
}

impl Processes {
    /// How many there are that sleep for so many seconds.
    fn sleep(&self, seconds: u32) -> usize {
        let wanted = format!("sleep\0{seconds}\0");
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command == wanted.as_bytes() && pid_namespace(*pid).as_ref() == Some(&self.namespace)
        })
        .count()
    }

    async fn until(&self, seconds: u32, count: usize) {
        let what = format!("{count} that sleep for {seconds} s");
        eventually(&what, async || (self.sleep(seconds) == count).then_some(())).await;
    }
}

async fn exec(node: &Node, id: &str, script: &str, tty: bool) -> Socket {
    let request = v1::ExecRequest {
        container_id: id.to_owned(),
        cmd: ["sh", "-c", script].map(str::to_owned).into(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    let mut client = node.client.runtime.clone();
    let url = client.exec(request).await.expect("Exec").into_inner().url;
    streaming::connect(node.daemon.netns(), &url, "v5.channel.k8s.io").expect("upgrade")
}

/// Commands that do not end when their streams do: one with children, also in a session of their
/// own, and one on a terminal that hangs up.
async fn stubborn(node: &Node, id: &str) -> [Socket; 2] {
    let script = "sleep 4721 & setsid sleep 4721 & echo up; wait";
    let mut pipes = exec(node, id, script, false).await;
    pipes.until("up\n");
    let script = "trap '' HUP; echo up; sleep 4722; sleep 4722";
    let mut terminal = exec(node, id, script, true).await;
    terminal.until("up\r\n");
    [pipes, terminal]
}

#[test]
fn commands_end_with_a_daemon_that_is_killed() {
    const NAME: &str = "commands_end_with_a_daemon_that_is_killed";
    let options = Options::default().config("[timeouts]\nexec_grace_seconds = 2\n");
    on_node(NAME, options, async |node| {
        let (id, processes) = idle(node, "killed").await;
        let sockets = stubborn(node, &id).await;
        let (client, container) = (node.client.clone(), id.clone());
        let sync = tokio::spawn(async move {
            let script = "sleep 4723 & setsid sleep 4723 & wait";
            client.exec(&container, &["sh", "-c", script], 0).await
        });
        processes.until(4723, 2).await;
        processes.until(4721, 2).await;
        processes.until(4722, 1).await;
        let killed = Instant::now();
        node.daemon.kill().unwrap();
        // No daemon is there to see to it.
        processes.until(4723, 0).await;
        for what in [4721, 4722] {
            processes.until(what, 0).await;
        }
        assert!(
            killed.elapsed() >= Duration::from_secs(2),
            "before the grace was over"
        );
        sync.await.unwrap().unwrap_err();
        drop(sockets);
        node.start_again(&[]).await;
        assert!(node.is_running(&id).await);
        node.accept_now();
    });
}

#[test]
fn a_grace_that_outlasts_the_daemon_is_kept_by_the_shim() {
    const NAME: &str = "a_grace_that_outlasts_the_daemon_is_kept_by_the_shim";
    // So long that a daemon whose end is slow is gone before it would see to them itself.
    let options = Options::default().config("[timeouts]\nexec_grace_seconds = 20\n");
    on_node(NAME, options, async |node| {
        let (id, processes) = idle(node, "outlasts").await;
        let sockets = stubborn(node, &id).await;
        processes.until(4721, 2).await;
        let status = node.daemon.terminate().unwrap();
        assert!(status.success(), "{status}");
        assert_eq!(processes.sleep(4721), 2, "the daemon did not wait for them");
        for what in [4721, 4722] {
            processes.until(what, 0).await;
        }
        drop(sockets);
        node.start_again(&[]).await;
        assert!(node.is_running(&id).await);
        node.accept_now();
    });
}

#[test]
fn what_a_command_leaves_behind_ends_when_its_client_is_gone() {
    const NAME: &str = "what_a_command_leaves_behind_ends_when_its_client_is_gone";
    on_node(NAME, Options::default(), async |node| {
        let (id, processes) = idle(node, "behind").await;
        // It ends with its input, well within the grace, and its child does not.
        let script = "sleep 4724 & echo up; cat";
        let mut gone = exec(node, &id, script, false).await;
        gone.until("up\n");
        // As this one does, with a client that stays to the end: what it began is meant to stay.
        let script = "sleep 4725 >/dev/null 2>&1 & echo up; cat";
        let mut stays = exec(node, &id, script, false).await;
        stays.until("up\n");
        drop(gone);
        stays.finish(STDIN).unwrap();
        assert_eq!(stays.rest().exit_code(), Some(0));
        processes.until(4724, 0).await;
        assert_eq!(processes.sleep(4725), 1);
    });
}
