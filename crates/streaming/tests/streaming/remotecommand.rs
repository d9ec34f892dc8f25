//! Exec and Attach over SPDY.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use gantry_streaming::Config;
use tokio::io::AsyncWriteExt;

use crate::common::spdy::{data, open, upgrade};
use crate::common::{ALL, IN_OUT, OUT, TERMINAL, flood, noise, sha256, start, start_with, until};

#[tokio::test]
async fn streams_may_come_in_any_order_and_nothing_runs_before_all_are_there() {
    let node = start().await;
    let url = node.exec(ALL, &["say", "to you", "and you"]);
    let mut client = open(&url, &["stderr", "stdout", "stdin"]).await;
    client.until(|c| c.seen(5).replied).await;
    client.settle().await;
    assert_eq!(node.memory.begun.load(SeqCst), 0);
    client.open(&[("streamType", "error")]).await;
    client.finish().await;
    assert_eq!(client.text(3), "to you");
    assert_eq!(client.text(1), "and you");
    assert_eq!(client.status(7)["status"], "Success");
    for id in [1, 3, 5, 7] {
        assert!(client.seen(id).fin, "{id}");
    }
    assert_eq!(client.goaway, Some(0));
}

#[tokio::test]
async fn an_exit_code_and_a_failure_are_a_status() {
    let node = start().await;
    let url = node.exec(OUT, &["exit", "42"]);
    let mut client = open(&url, &["error", "stdout"]).await;
    client.finish().await;
    let status = client.status(1);
    assert_eq!(status["reason"], "NonZeroExitCode");
    assert_eq!(status["details"]["causes"][0]["message"], "42");

    let mut client = open(
        &node.exec(OUT, &["fail", "no such file"]),
        &["error", "stdout"],
    )
    .await;
    client.finish().await;
    let message = client.status(1)["message"].to_string();
    assert!(message.contains("no such file"), "{message}");
}

#[tokio::test]
async fn a_backend_that_panics_is_a_failure() {
    let node = start().await;
    let mut client = open(&node.exec(OUT, &["panic"]), &["error", "stdout"]).await;
    client.finish().await;
    assert_eq!(client.status(1)["reason"], "InternalError");
}

#[tokio::test]
async fn each_version_answers_in_its_way() {
    let node = start().await;
    for version in ["channel.k8s.io", "v2.channel.k8s.io", "v3.channel.k8s.io"] {
        for (command, expected) in [(["exit", "0"], ""), (["exit", "3"], "exit code 3")] {
            let mut client = upgrade(&node.exec(OUT, &command), version).await;
            client.open(&[("streamType", "error")]).await;
            client.open(&[("streamType", "stdout")]).await;
            client.finish().await;
            let text = client.text(1);
            assert!(text.ends_with(expected), "{version}: {text}");
            assert_eq!(text.is_empty(), expected.is_empty(), "{version}: {text}");
            assert!(client.seen(1).fin && client.seen(3).fin);
        }
    }
}

#[tokio::test]
async fn a_resize_stream_is_waited_for_with_a_terminal_from_v3_on() {
    let node = start().await;
    for (version, resizes) in [("v2.channel.k8s.io", false), ("v3.channel.k8s.io", true)] {
        let mut client = upgrade(&node.exec(TERMINAL, &["exit", "0"]), version).await;
        for kind in ["error", "stdin", "stdout"] {
            client.open(&[("streamType", kind)]).await;
        }
        if resizes {
            client.settle().await;
            assert!(!client.closed);
            client.open(&[("streamType", "resize")]).await;
        }
        client.finish().await;
        assert!(client.seen(1).fin, "{version}");
    }
}

#[tokio::test]
async fn a_half_close_ends_stdin_and_what_was_sent_comes_back_whole() {
    let node = start().await;
    let mut client = open(&node.exec(IN_OUT, &["cat"]), &["error", "stdin", "stdout"]).await;
    client.send(3, b"first ").await;
    client.until(|c| c.text(5) == "first ").await;
    client.send(3, b"last").await;
    client.fin(3).await;
    client.finish().await;
    assert_eq!(client.text(5), "first last");
    assert_eq!(client.status(1)["status"], "Success");
}

#[tokio::test]
async fn a_mebibyte_arrives_whole_both_ways() {
    let node = start().await;
    let sent = noise(1 << 20);
    let mut client = open(&node.exec(IN_OUT, &["sum"]), &["error", "stdin", "stdout"]).await;
    client.send(3, &sent).await;
    client.fin(3).await;
    client.finish().await;
    assert_eq!(client.text(5), sha256(&sent));

    let mut client = open(&node.exec(OUT, &["noise", "1048576"]), &["error", "stdout"]).await;
    client.finish().await;
    assert_eq!(sha256(&client.seen(3).data), sha256(&sent));
}

#[tokio::test]
async fn data_in_one_frame_of_a_mebibyte_is_taken() {
    let node = start().await;
    let sent = noise(1 << 20);
    let mut client = open(&node.exec(IN_OUT, &["sum"]), &["error", "stdin", "stdout"]).await;
    client.raw(&crate::common::spdy::data(3, &sent, true)).await;
    client.finish().await;
    assert_eq!(client.text(5), sha256(&sent));
}

#[tokio::test]
async fn a_size_sent_before_the_start_is_seen_after_it() {
    let node = start().await;
    let types = ["resize", "error", "stdin"];
    let mut client = open(&node.exec(TERMINAL, &["sizes", "2"]), &types).await;
    client.send(1, br#"{"Width":80,"Height":24}"#).await;
    client.settle().await;
    client.open(&[("streamType", "stdout")]).await;
    client.until(|c| c.text(7) == "80x24\n").await;
    client.send(1, br#"{"Width":132,"Height":43}"#).await;
    client.finish().await;
    assert_eq!(client.text(7), "80x24\n132x43\n");
}

#[tokio::test]
async fn a_size_that_waits_is_known_before_the_start() {
    let node = start().await;
    for _ in 0..20 {
        let types = ["resize", "error", "stdin"];
        let mut client = open(&node.exec(TERMINAL, &["size"]), &types).await;
        client.send(1, br#"{"Width":80,"Height":24}"#).await;
        client.open(&[("streamType", "stdout")]).await;
        client.finish().await;
        assert_eq!(client.text(7), "80x24");
    }
}

#[tokio::test]
async fn streams_that_were_not_asked_for_are_refused_or_ignored() {
    let node = start().await;
    let mut client = open(&node.exec(OUT, &["say", "x", "y"]), &["nonsense", "stderr"]).await;
    client.open(&[("port", "80")]).await;
    client.open(&[("streamType", "stderr")]).await;
    client.until(|c| c.seen(7).reset.is_some()).await;
    for refused in [1, 5, 7] {
        assert_eq!(client.seen(refused).reset, Some(3), "{refused}");
    }
    assert!(client.seen(3).replied);
    assert_eq!(node.memory.begun.load(SeqCst), 0);
}

#[tokio::test]
async fn a_client_that_does_not_open_its_streams_is_let_go() {
    let config = Config {
        creation_timeout: Duration::from_secs(2),
        ..Config::default()
    };
    let node = start_with(config).await;
    let mut client = open(&node.exec(IN_OUT, &["cat"]), &["error", "stdout"]).await;
    client.finish().await;
    assert_eq!(client.goaway, Some(0));
    assert_eq!(node.memory.begun.load(SeqCst), 0);
}

#[tokio::test]
async fn a_reset_in_mid_stream_ends_that_stream_alone() {
    let node = start().await;
    let mut client = open(&node.exec(OUT, &["flood"]), &["error", "stdout"]).await;
    client.until(|c| c.seen(3).data.len() > 100_000).await;
    client.reset(3).await;
    // The command ends, as its output is gone; the client still learns how.
    client.finish().await;
    assert_eq!(client.status(1)["status"], "Success");
    assert_eq!(node.memory.broken.load(SeqCst), 1);

    let mut client = open(&node.exec(IN_OUT, &["cat"]), &["error", "stdin", "stdout"]).await;
    client.send(3, b"some").await;
    client.until(|c| c.text(5) == "some").await;
    client.reset(3).await;
    client.finish().await;
    let message = client.status(1)["message"].to_string();
    assert!(message.contains("reset"), "{message}");
}

#[tokio::test]
async fn a_client_that_goes_away_is_noticed() {
    let node = start().await;
    let client = open(&node.exec(IN_OUT, &["deaf"]), &["error", "stdin", "stdout"]).await;
    until("begun", || node.memory.begun.load(SeqCst) == 1).await;
    drop(client);
    until("gone", || node.memory.gone.load(SeqCst) == 1).await;

    let mut client = open(&node.attach(IN_OUT), &["error", "stdin", "stdout"]).await;
    client.until(|c| c.text(5) == "attached\n").await;
    drop(client);
    until("gone", || node.memory.gone.load(SeqCst) == 2).await;
    until("ended", || node.memory.ended.load(SeqCst) == 2).await;
}

/// Its connection is not read any more, since nobody takes what it sends, and its end comes behind
/// that.
#[tokio::test]
async fn a_client_that_goes_away_while_it_is_held_back_is_noticed() {
    let node = start().await;
    let mut client = open(&node.exec(IN_OUT, &["deaf"]), &["error", "stdin", "stdout"]).await;
    // What it has not read would make its end a reset, which is seen at once.
    client.settle().await;
    let flood = async {
        loop {
            client.send(3, &[0; 32 * 1024]).await;
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(1), flood)
            .await
            .is_err()
    );
    assert_eq!(node.memory.gone.load(SeqCst), 0);
    drop(client);
    until("gone", || node.memory.gone.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn an_attached_client_is_connected_both_ways() {
    let node = start().await;
    let mut client = open(&node.attach(IN_OUT), &["error", "stdin", "stdout"]).await;
    client.send(3, b"hello").await;
    client.until(|c| c.text(5) == "attached\nhello").await;
    client.fin(3).await;
    client.finish().await;
    assert_eq!(client.status(1)["status"], "Success");
}

#[tokio::test]
async fn a_connection_on_which_nothing_moves_is_closed() {
    let config = Config {
        idle_timeout: Duration::from_secs(4),
        ..Config::default()
    };
    let node = start_with(config).await;
    let mut client = open(&node.exec(IN_OUT, &["deaf"]), &["error", "stdin", "stdout"]).await;
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        client.ping(1).await;
    }
    assert_eq!(node.memory.gone.load(SeqCst), 0, "pings keep it open");
    client.finish().await;
    assert_eq!(client.pongs.len(), 4);
    until("gone", || node.memory.gone.load(SeqCst) == 1).await;
}

/// Being asked whether it is still there does not count.
#[tokio::test]
async fn a_client_that_is_held_back_for_too_long_is_closed() {
    let config = Config {
        idle_timeout: Duration::from_millis(2500),
        ..Config::default()
    };
    let node = start_with(config).await;
    let mut client = open(&node.exec(IN_OUT, &["deaf"]), &["error", "stdin", "stdout"]).await;
    let frame = data(3, &[0; 32 * 1024], false);
    // On a slow machine it may be closed before we have done.
    let flood = async { while client.io().write_all(&frame).await.is_ok() {} };
    let _ = tokio::time::timeout(Duration::from_secs(1), flood).await;
    until("closed", || node.memory.gone.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn a_shutdown_ends_every_session_and_waits_for_backends() {
    let node = start().await;
    let mut client = open(&node.exec(IN_OUT, &["deaf"]), &["error", "stdin", "stdout"]).await;
    until("begun", || node.memory.begun.load(SeqCst) == 1).await;
    let address = node.server.address();
    let server = node.server;
    let closing = tokio::spawn(async move { server.shutdown(Duration::from_secs(20)).await });
    client.finish().await;
    drop(client);
    crate::common::soon(closing).await.unwrap();
    assert_eq!(node.memory.gone.load(SeqCst), 1);
    assert_eq!(node.memory.ended.load(SeqCst), 1);
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn output_before_the_end_reaches_a_client_that_reads_late() {
    let node = start().await;
    let mut client = open(&node.exec(OUT, &["noise", "3000000"]), &["error", "stdout"]).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    client.finish().await;
    assert_eq!(sha256(&client.seen(3).data), sha256(&noise(3_000_000)));
    let _ = client.io().shutdown().await;
}

/// A socket that is closed with input unread throws away what it has not sent.
#[tokio::test]
async fn what_a_client_still_sends_costs_it_no_output() {
    let node = start().await;
    for late in [0, 500, 500] {
        let url = node.exec(IN_OUT, &["noise", "3000000"]);
        let mut client = open(&url, &["error", "stdin", "stdout"]).await;
        let flood = flood(client.io(), data(3, &[0; 16 * 1024], false).to_vec());
        tokio::time::sleep(Duration::from_millis(late)).await;
        client.until(|c| c.goaway.is_some()).await;
        assert_eq!(sha256(&client.seen(5).data), sha256(&noise(3_000_000)));
        assert_eq!(client.status(1)["status"], "Success");
        flood.abort();
    }
}

#[tokio::test]
async fn a_client_may_take_its_time_for_the_end_and_say_that_it_is_there() {
    let node = start().await;
    let mut client = open(&node.exec(OUT, &["noise", "3000000"]), &["error", "stdout"]).await;
    // Longer than a session waits for a client that has everything.
    tokio::time::sleep(Duration::from_secs(7)).await;
    client.ping(1).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.finish().await;
    assert_eq!(sha256(&client.seen(3).data), sha256(&noise(3_000_000)));
    assert_eq!(client.status(1)["status"], "Success");
}

#[tokio::test]
async fn who_takes_back_the_stream_for_the_result_is_gone() {
    let node = start().await;
    let mut client = open(&node.exec(OUT, &["deaf"]), &["error", "stdout"]).await;
    until("it runs", || node.memory.begun.load(SeqCst) == 1).await;
    client.reset(1).await;
    until("it is told", || node.memory.gone.load(SeqCst) == 1).await;
    client.finish().await;
}
