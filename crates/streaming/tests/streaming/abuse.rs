//! Clients that break the protocol, or try to take more than their share.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use gantry_streaming::Config;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::http::{self, connect, read_answer};
use crate::common::spdy::{control, data, open, upgrade};
use crate::common::{IN_OUT, Node, OUT, soon, start, start_with, until};

/// What a client gets that sends `bytes` into a session.
async fn goaway_after(node: &Node, bytes: &[u8]) -> Option<u32> {
    let mut client = open(&node.exec(IN_OUT, &["deaf"]), &["error", "stdin", "stdout"]).await;
    client.until(|c| c.seen(5).replied).await;
    client.raw(bytes).await;
    client.finish().await;
    client.goaway
}

#[tokio::test]
async fn frames_that_are_none_end_the_session() {
    let node = start().await;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        (
            "unknown type of 16 MiB",
            b"\x80\x03\x00\x55\x00\xff\xff\xff".to_vec(),
        ),
        (
            "SYN_STREAM of 16 MiB",
            b"\x80\x03\x00\x01\x00\xff\xff\xff".to_vec(),
        ),
        (
            "another version",
            b"\x80\x02\x00\x06\x00\x00\x00\x04\x00\x00\x00\x01".to_vec(),
        ),
        ("PING without an id", control(6, 0, b"").to_vec()),
        ("RST_STREAM of stream 0", control(3, 0, &[0; 8]).to_vec()),
        ("data of stream 0", data(0, b"x", false).to_vec()),
        (
            "headers without dictionary",
            control(1, 0, &[1; 60]).to_vec(),
        ),
        ("SETTINGS of many", control(4, 0, &[0xff; 12]).to_vec()),
    ];
    let count = cases.len();
    for (what, bytes) in cases {
        assert_eq!(goaway_after(&node, &bytes).await, Some(1), "{what}");
    }
    until("all noticed", || node.memory.gone.load(SeqCst) == count).await;
    let http = b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: everything\r\n\r\n";
    let mut client = open(&node.exec(IN_OUT, &["deaf"]), &["error", "stdin", "stdout"]).await;
    client.raw(http).await;
    client.reset(3).await;
    client.settle().await;
    drop(client);
    until("all noticed", || node.memory.gone.load(SeqCst) == count + 1).await;
}

#[tokio::test]
async fn unknown_frames_and_data_for_nobody_are_no_harm() {
    let node = start().await;
    let mut client = open(&node.exec(IN_OUT, &["cat"]), &["error", "stdin", "stdout"]).await;
    client.control(85, 7, b"whatever").await;
    client
        .control(8, 0, &[&3u32.to_be_bytes()[..], &[]].concat())
        .await;
    client.raw(&data(99, b"for nobody", false)).await;
    client.send(3, b"x").await;
    client.fin(3).await;
    client.send(3, b"after the end").await;
    client.finish().await;
    assert_eq!(client.text(5), "x");
    assert_eq!(client.streams[&99].reset, Some(2));
}

#[tokio::test]
async fn a_header_bomb_ends_the_session() {
    let node = start().await;
    let mut client = upgrade(&node.exec(OUT, &["flood"]), "v4.channel.k8s.io").await;
    let bomb = "a".repeat(5 << 20);
    client.open(&[("streamType", &bomb)]).await;
    client.finish().await;
    assert_eq!(client.goaway, Some(1));
}

#[tokio::test]
async fn headers_of_the_wrong_form_end_their_stream_alone() {
    let node = start().await;
    let mut client = upgrade(&node.exec(OUT, &["say", "a", "b"]), "v4.channel.k8s.io").await;
    let many: Vec<(String, String)> = (0..100).map(|n| (format!("h{n}"), n.to_string())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let id = client.open(&many).await;
    client.until(|c| c.seen(id).reset.is_some()).await;
    assert_eq!(client.seen(id).reset, Some(1));
    let error = client.open(&[("streamType", "error")]).await;
    client.until(|c| c.seen(error).replied).await;
}

#[tokio::test]
async fn stream_ids_go_up_and_are_odd() {
    let node = start().await;
    for (ids, what) in [([5, 3], "down"), ([5, 5], "twice"), ([1, 2], "even")] {
        let mut client = upgrade(&node.exec(OUT, &["flood"]), "v4.channel.k8s.io").await;
        for id in ids {
            client.streams.entry(id).or_default();
            let frame = client.syn_stream(id, 0, &[("streamType", "error")]);
            client.raw(&frame).await;
        }
        client.finish().await;
        assert_eq!(client.goaway, Some(1), "{what}");
    }
}

#[tokio::test]
async fn no_more_streams_than_announced_are_open() {
    let node = start().await;
    let mut client = upgrade(&node.forward(&[]), "portforward.k8s.io").await;
    client.until(|c| !c.settings.is_empty()).await;
    let most = client.settings.iter().find(|(id, _)| *id == 4).unwrap().1;
    let mut last = 0;
    for n in 0..=most {
        let id = n.to_string();
        last = client
            .open(&[("streamType", "error"), ("port", "7"), ("requestID", &id)])
            .await;
    }
    client.until(|c| c.seen(last).reset.is_some()).await;
    assert_eq!(client.seen(last).reset, Some(3));
    assert!(client.streams.values().filter(|seen| seen.replied).count() == most as usize);
}

/// Answers wait for the client; while it does not take them, its questions are not read.
#[tokio::test]
async fn a_flood_of_pings_that_reads_no_answers_is_held_back() {
    let node = start().await;
    let mut client = open(&node.exec(OUT, &["deaf"]), &["error", "stdout"]).await;
    let ping = control(6, 0, &1u32.to_be_bytes());
    let pings = ping.repeat(10_000);
    let mut sent = 0;
    let flood = async {
        loop {
            client.io().write_all(&pings).await.unwrap();
            sent += pings.len();
            assert!(sent < 256 << 20, "no end of it");
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(3), flood)
            .await
            .is_err()
    );
    drop(client);
    until("gone", || node.memory.gone.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn a_request_that_comes_drop_by_drop_is_given_up() {
    let config = Config {
        request_timeout: Duration::from_secs(3),
        ..Config::default()
    };
    let node = start_with(config).await;
    let url = node.exec(OUT, &["flood"]);
    let mut slow = connect(&url).await;
    let drip = async {
        for byte in b"GET /exec/ HTTP/1.1\r\nHost: x\r\n".iter().cycle() {
            if slow.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    soon(drip).await;

    let mut silent = connect(&url).await;
    soon(silent.read_to_end(&mut Vec::new())).await.unwrap();
    // The token is still good.
    crate::common::spdy::open(&url, &["error", "stdout"]).await;
}

#[tokio::test]
async fn a_request_with_a_huge_head_is_refused() {
    let node = start().await;
    let url = node.exec(OUT, &["flood"]);
    let mut tcp = connect(&url).await;
    let huge = "a".repeat(100_000);
    tcp.write_all(format!("GET /x HTTP/1.1\r\nHost: {huge}\r\n\r\n").as_bytes())
        .await
        .ok();
    let answer = soon(read_answer(&mut tcp)).await;
    assert_eq!(answer.status, 431);
}

/// Asks for the upgrade of an exec or a port forward; the status of the answer.
async fn spdy_status(url: &str) -> u16 {
    let mut headers = http::SPDY.to_vec();
    headers.push((
        "X-Stream-Protocol-Version",
        "v4.channel.k8s.io,portforward.k8s.io",
    ));
    http::status("GET", url, &headers).await
}

#[tokio::test]
async fn sessions_over_the_bound_are_refused_and_cost_no_token() {
    let config = Config {
        max_sessions: 3,
        ..Config::default()
    };
    let node = start_with(config).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(open(&node.exec(OUT, &["deaf"]), &["error", "stdout"]).await);
    }
    let url = node.exec(OUT, &["exit", "0"]);
    assert_eq!(spdy_status(&url).await, 503);
    drop(clients.pop());
    until("gone", || node.memory.ended.load(SeqCst) == 1).await;
    // The slot is free once the session's end has been written off.
    let start = std::time::Instant::now();
    while spdy_status(&url).await != 101 {
        assert!(start.elapsed() < crate::common::SOON);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn connections_that_show_no_token_shut_nobody_out() {
    let config = Config {
        max_sessions: 2,
        max_strangers: 4,
        request_timeout: Duration::from_secs(600),
        ..Config::default()
    };
    let node = start_with(config).await;
    let url = node.exec(OUT, &["deaf"]);
    let mut silent = Vec::new();
    for n in 0..50 {
        let mut tcp = connect(&url).await;
        // Some say something, and then nothing more; some guess.
        match n % 3 {
            0 => {}
            1 => tcp.write_all(b"GET /exec/").await.unwrap(),
            _ => tcp
                .write_all(b"GET /exec/guess HTTP/1.1\r\n")
                .await
                .unwrap(),
        }
        silent.push(tcp);
    }
    let first = open(&url, &["error", "stdout"]).await;
    let second = open(&node.exec(OUT, &["deaf"]), &["error", "stdout"]).await;
    // The oldest were pushed out, and the last are still there.
    let closed = soon(silent[0].read(&mut [0; 1])).await;
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    let last = silent.last_mut().unwrap();
    let quiet = Duration::from_millis(200);
    assert!(
        tokio::time::timeout(quiet, last.read(&mut [0; 1]))
            .await
            .is_err()
    );
    // Nor do they push out who has a session.
    drop(silent);
    for _ in 0..10 {
        connect(&url).await;
    }
    until("begun", || node.memory.begun.load(SeqCst) == 2).await;
    assert_eq!(node.memory.gone.load(SeqCst), 0);
    drop((first, second));
}
