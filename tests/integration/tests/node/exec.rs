//! ExecSync.

use std::time::{Duration, Instant};

use gantry_integration::{eventually, on_plain_node, refused, sleeper};
use tonic::Code;

/// What one stream may answer.
const STREAM_LIMIT: usize = 16 << 20;

#[test]
fn output_and_exit_code() {
    on_plain_node("output_and_exit_code", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("exec").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let script = "echo out; echo err >&2; exit 42";
        let output = node
            .client
            .exec(&id, &["sh", "-c", script], 0)
            .await
            .unwrap();
        assert_eq!(output.stdout, b"out\n");
        assert_eq!(output.stderr, b"err\n");
        assert_eq!(output.exit_code, 42);
        let output = node
            .client
            .exec(&id, &["sh", "-c", "kill -9 $$"], 5)
            .await
            .unwrap();
        assert_eq!(output.exit_code, 137);
        // Its input is empty, not ours.
        assert_eq!(node.sh(&id, "cat; echo end").await, "end");
        // A command that is not there.
        let error = node
            .client
            .exec(&id, &["no-such-command"], 5)
            .await
            .unwrap_err();
        assert!(error.message().contains("no-such-command"), "{error:?}");
        refused(
            node.client.exec(&id, &[], 5).await,
            Code::InvalidArgument,
            "cmd",
        );
        refused(
            node.client.exec(&id, &["true"], -1).await,
            Code::InvalidArgument,
            "timeout",
        );
        refused(
            node.client.exec("0123456789ab", &["true"], 5).await,
            Code::NotFound,
            "0123456789ab",
        );
        node.client.stop(&id, 0).await.unwrap();
        refused(
            node.client.exec(&id, &["true"], 5).await,
            Code::FailedPrecondition,
            "not running",
        );
    });
}

#[test]
fn at_its_timeout_the_whole_tree_is_killed() {
    on_plain_node("at_its_timeout_the_whole_tree_is_killed", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("timeout").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        // One child stays, one leaves the session, one ignores SIGTERM.
        let script = "sleep 7771 & setsid sleep 7772 & (trap '' TERM; sleep 7773) & sleep 7774";
        let began = Instant::now();
        let answer = node.client.exec(&id, &["sh", "-c", script], 1).await;
        refused(answer, Code::DeadlineExceeded, "1 s");
        assert!(began.elapsed() >= Duration::from_secs(1));
        eventually("nothing of the command is left", async || {
            let left = node
                .sh(&id, "ps -o args | grep -c '[s]leep 777' || true")
                .await;
            (left == "0").then_some(())
        })
        .await;
        assert!(node.is_running(&id).await);
    });
}

/// A client that goes away takes its command along.
#[test]
fn a_command_ends_with_its_caller() {
    on_plain_node("a_command_ends_with_its_caller", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("caller").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let client = node.client.clone();
        let caller = {
            let id = id.clone();
            tokio::spawn(async move { client.exec(&id, &["sleep", "8881"], 0).await })
        };
        let count = "ps -o args | grep -c '[s]leep 8881' || true";
        eventually("the command runs", async || {
            (node.sh(&id, count).await == "1").then_some(())
        })
        .await;
        caller.abort();
        eventually("the command ends", async || {
            (node.sh(&id, count).await == "0").then_some(())
        })
        .await;
    });
}

#[test]
fn each_stream_is_cut_at_16_mib() {
    on_plain_node("each_stream_is_cut_at_16_mib", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("much").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let script = "head -c 20000000 /dev/zero; head -c 17000000 /dev/zero >&2; exit 5";
        let output = node
            .client
            .exec(&id, &["sh", "-c", script], 60)
            .await
            .unwrap();
        // The command went on to its end: a full pipe would have held it up.
        assert_eq!(output.exit_code, 5);
        assert_eq!(
            (output.stdout.len(), output.stderr.len()),
            (STREAM_LIMIT, STREAM_LIMIT)
        );
    });
}

#[test]
fn a_child_that_keeps_the_streams_open_holds_nobody_up() {
    on_plain_node(
        "a_child_that_keeps_the_streams_open_holds_nobody_up",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("drain").await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            let began = Instant::now();
            let output = node
                .client
                .exec(&id, &["sh", "-c", "sleep 60 & echo done"], 0)
                .await
                .unwrap();
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "{:?}",
                began.elapsed()
            );
            assert_eq!(
                (output.stdout.as_slice(), output.exit_code),
                (&b"done\n"[..], 0)
            );
        },
    );
}
