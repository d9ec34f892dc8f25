//! Exec: streams, terminals, ends.

use std::time::{Duration, Instant};

use gantry_integration::streaming::{self, STDIN};
use gantry_integration::{eventually, on_node, on_plain_node};
use gantry_testkit::daemon::Options;

use super::{PIPES, Stdio, TTY, V5, attach, exec, exec_request, idle, processes};

#[test]
fn an_exec_has_streams_and_an_exit_code() {
    on_plain_node("an_exec_has_streams_and_an_exit_code", async |node| {
        let (_, id) = idle(node, "exec").await;
        let mut socket = exec(node, &id, "cat; echo bad >&2; exit 42", PIPES).await;
        socket.send(STDIN, b"one\n").unwrap();
        assert_eq!(socket.until("\n"), "one\n");
        socket.send(STDIN, b"two").unwrap();
        socket.finish(STDIN).unwrap();
        let rest = socket.rest();
        assert_eq!(
            (rest.stdout.as_str(), rest.stderr.as_str()),
            ("two", "bad\n")
        );
        assert_eq!(rest.exit_code(), Some(42), "{rest:?}");
        // Without stdin there is none, and a signal is told as shells do.
        let mut socket = exec(node, &id, "cat; echo end; kill -9 $$", Stdio::default()).await;
        let rest = socket.rest();
        assert_eq!(
            (rest.stdout.as_str(), rest.exit_code()),
            ("end\n", Some(137))
        );
        // Much output, all of it.
        let mut socket = exec(node, &id, "seq 1 300000", Stdio::default()).await;
        let rest = socket.rest();
        assert_eq!(rest.stdout.lines().count(), 300_000);
        assert_eq!(rest.exit_code(), Some(0));
        // It is run as ExecSync runs it.
        let script = "id; pwd; env | sort; grep -E '^(Cap|NoNewPrivs|Seccomp)' /proc/self/status";
        let mut socket = exec(node, &id, script, Stdio::default()).await;
        assert_eq!(socket.rest().stdout.trim(), node.sh(&id, script).await);
        // What cannot be run says so.
        let mut client = node.client.runtime.clone();
        let mut request = exec_request(&id, "", Stdio::default());
        request.cmd = vec!["no-such-command".to_owned()];
        let url = client.exec(request).await.unwrap().into_inner().url;
        let mut socket = streaming::connect(node.daemon.netns(), &url, V5).unwrap();
        let result = socket.rest().result.to_string();
        assert!(result.contains("no-such-command"), "{result}");
        // The URL was good once.
        let again = streaming::connect(node.daemon.netns(), &url, V5)
            .err()
            .unwrap();
        assert!(again.contains("404"), "{again}");
    });
}

#[test]
fn an_exec_has_a_terminal_of_the_clients_size() {
    on_plain_node("an_exec_has_a_terminal_of_the_clients_size", async |node| {
        let (_, id) = idle(node, "tty").await;
        let script = "stty -echo; echo up; \
                      while read x; do [ \"$x\" = end ] && exit 3; stty size; done";
        let mut socket = exec(node, &id, script, TTY).await;
        socket.resize(100, 40).unwrap();
        socket.until("up\r\n");
        for (width, height) in [(100, 40), (80, 25)] {
            socket.resize(width, height).unwrap();
            let wanted = format!("{height} {width}");
            // The two messages take effect side by side.
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                socket.send(STDIN, b"\n").unwrap();
                let line = socket.until("\r\n");
                if line.contains(&wanted) {
                    break;
                }
                assert!(Instant::now() < deadline, "{line:?} is not {wanted:?}");
            }
        }
        socket.send(STDIN, b"end\n").unwrap();
        assert_eq!(socket.rest().exit_code(), Some(3));
    });
}

#[test]
fn an_exec_whose_client_goes_is_ended_with_its_tree() {
    const NAME: &str = "an_exec_whose_client_goes_is_ended_with_its_tree";
    let options = Options::default().config("[timeouts]\nexec_grace_seconds = 5\n");
    on_node(NAME, options, async |node| {
        let (_, id) = idle(node, "gone").await;
        // One that ends by itself when its input does is let to.
        let polite = "cat; sleep 0.3; echo said > /tmp/polite";
        let script = "sleep 4711 & setsid sleep 4711 & echo up; wait";
        let (mut polite, mut stubborn) = (
            exec(node, &id, &format!("echo up; {polite}"), PIPES).await,
            exec(node, &id, script, PIPES).await,
        );
        let mut terminal = exec(
            node,
            &id,
            "trap '' HUP; echo up; sleep 4712; sleep 4712",
            TTY,
        )
        .await;
        let mut shell = exec(node, &id, "echo up; sleep 4713", TTY).await;
        for socket in [&mut polite, &mut stubborn] {
            socket.until("up\n");
        }
        for socket in [&mut terminal, &mut shell] {
            socket.until("up\r\n");
        }
        eventually("both have begun", async || {
            (processes(node, &id, "4711").await == 2).then_some(())
        })
        .await;
        let gone = Instant::now();
        drop((polite, stubborn, terminal, shell));
        // A terminal's hang-up is no matter of grace.
        eventually("the shell hangs up", async || {
            (processes(node, &id, "4713").await == 0).then_some(())
        })
        .await;
        for what in ["4711", "4712"] {
            eventually("the tree is gone", async || {
                (processes(node, &id, what).await == 0).then_some(())
            })
            .await;
        }
        assert!(
            gone.elapsed() > Duration::from_secs(5),
            "before the grace was over"
        );
        assert_eq!(node.sh(&id, "cat /tmp/polite").await, "said");
    });
}

#[test]
fn sigterm_ends_sessions_and_leaves_containers() {
    const NAME: &str = "sigterm_ends_sessions_and_leaves_containers";
    let options = Options::default().config("[timeouts]\nexec_grace_seconds = 1\n");
    on_node(NAME, options, async |node| {
        let (_, id) = idle(node, "sigterm").await;
        let mut command = exec(node, &id, "echo up; sleep 4711", PIPES).await;
        command.until("up\n");
        let mut attached = attach(node, &id, Stdio::default()).await;
        let status = node.daemon.terminate().unwrap();
        assert!(status.success(), "{status}");
        command.rest();
        attached.rest();
        node.start_again(&[]).await;
        assert!(node.is_running(&id).await);
        eventually("the command has ended", async || {
            (processes(node, &id, "4711").await == 0).then_some(())
        })
        .await;
        // What the first daemon had open.
        node.accept_now();
    });
}
