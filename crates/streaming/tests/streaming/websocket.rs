//! Exec and Attach over WebSocket.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::common::websocket::{finish, next, send, upgrade};
use crate::common::{ALL, IN_OUT, OUT, TERMINAL, flood, noise, sha256, soon, start, until};

const STDIN: u8 = 0;
const STDOUT: usize = 1;
const STDERR: usize = 2;
const RESULT: usize = 3;
const RESIZE: u8 = 4;

fn status(channels: &[Vec<u8>]) -> Value {
    serde_json::from_slice(&channels[RESULT]).unwrap()
}

#[tokio::test]
async fn output_and_result_come_on_their_channels_before_a_normal_close() {
    let node = start().await;
    for protocol in ["v4.channel.k8s.io", "v5.channel.k8s.io"] {
        let mut socket = upgrade(&node.exec(ALL, &["say", "out", "err"]), protocol).await;
        let (channels, code) = finish(&mut socket).await;
        assert_eq!(channels[STDOUT], b"out");
        assert_eq!(channels[STDERR], b"err");
        assert_eq!(status(&channels)["status"], "Success");
        assert_eq!(code, Some(1000));

        let mut socket = upgrade(&node.exec(OUT, &["exit", "9"]), protocol).await;
        let (channels, _) = finish(&mut socket).await;
        assert_eq!(status(&channels)["details"]["causes"][0]["message"], "9");
    }
}

#[tokio::test]
async fn an_empty_message_says_that_the_session_stands() {
    let node = start().await;
    let only_stdin = gantry_streaming::Stdio {
        stdin: true,
        ..Default::default()
    };
    for (stdio, channel) in [(OUT, 1), (ALL, 1), (only_stdin, 3)] {
        let mut socket = upgrade(&node.exec(stdio, &["deaf"]), "v4.channel.k8s.io").await;
        assert_eq!(next(&mut socket).await, (channel, vec![]));
    }
}

#[tokio::test]
async fn from_v5_on_a_channel_can_be_half_closed() {
    let node = start().await;
    let mut socket = upgrade(&node.exec(IN_OUT, &["cat"]), "v5.channel.k8s.io").await;
    send(&mut socket, STDIN, b"to the end").await;
    send(&mut socket, 255, &[STDIN]).await;
    let (channels, code) = finish(&mut socket).await;
    assert_eq!(channels[STDOUT], b"to the end");
    assert_eq!(status(&channels)["status"], "Success");
    assert_eq!(code, Some(1000));
}

#[tokio::test]
async fn before_v5_channel_255_means_nothing() {
    let node = start().await;
    let mut socket = upgrade(&node.exec(IN_OUT, &["cat"]), "v4.channel.k8s.io").await;
    send(&mut socket, 255, &[STDIN]).await;
    send(&mut socket, STDIN, b"more").await;
    assert_eq!(next(&mut socket).await, (1, vec![]));
    assert_eq!(next(&mut socket).await, (1, b"more".to_vec()));
}

#[tokio::test]
async fn a_mebibyte_arrives_whole_both_ways_also_in_one_message() {
    let node = start().await;
    let sent = noise(1 << 20);
    for piece in [30_000, 1 << 20] {
        let mut socket = upgrade(&node.exec(IN_OUT, &["sum"]), "v5.channel.k8s.io").await;
        for piece in sent.chunks(piece) {
            send(&mut socket, STDIN, piece).await;
        }
        send(&mut socket, 255, &[STDIN]).await;
        let (channels, _) = finish(&mut socket).await;
        assert_eq!(channels[STDOUT], sha256(&sent).into_bytes());
    }
    let mut socket = upgrade(&node.exec(OUT, &["noise", "1048576"]), "v5.channel.k8s.io").await;
    let (channels, _) = finish(&mut socket).await;
    assert_eq!(sha256(&channels[STDOUT]), sha256(&sent));
}

#[tokio::test]
async fn base64_protocols_speak_text() {
    let node = start().await;
    let mut socket = upgrade(&node.exec(IN_OUT, &["cat"]), "v4.base64.channel.k8s.io").await;
    let hello = format!("0{}", STANDARD.encode("hello"));
    socket.send(Message::text(hello)).await.unwrap();
    let text = |message: Option<Result<Message, Error>>| match message.unwrap().unwrap() {
        Message::Text(text) => text.to_string(),
        message => panic!("{message:?}"),
    };
    assert_eq!(text(soon(socket.next()).await), "1");
    assert_eq!(
        text(soon(socket.next()).await),
        format!("1{}", STANDARD.encode("hello"))
    );

    let mut socket = upgrade(&node.exec(OUT, &["fail", "this"]), "base64.channel.k8s.io").await;
    assert_eq!(text(soon(socket.next()).await), "1");
    let error = text(soon(socket.next()).await);
    let error = STANDARD.decode(error.strip_prefix('3').unwrap()).unwrap();
    assert!(error.ends_with(b"this"));
}

#[tokio::test]
async fn without_a_protocol_a_client_speaks_the_first() {
    let node = start().await;
    let mut socket = upgrade(&node.exec(OUT, &["exit", "3"]), "").await;
    let (channels, _) = finish(&mut socket).await;
    assert!(channels[RESULT].ends_with(b"exit code 3"));
}

#[tokio::test]
async fn a_terminal_is_resized() {
    let node = start().await;
    let mut socket = upgrade(&node.exec(TERMINAL, &["sizes", "1"]), "v4.channel.k8s.io").await;
    send(&mut socket, RESIZE, br#"{"Width":100,"Height":30}"#).await;
    let (channels, _) = finish(&mut socket).await;
    assert_eq!(channels[STDOUT], b"100x30\n");
}

#[tokio::test]
async fn a_client_that_goes_away_is_noticed_also_while_it_is_held_back() {
    let node = start().await;
    for (n, hold) in [false, true].into_iter().enumerate() {
        let mut socket = upgrade(&node.exec(IN_OUT, &["deaf"]), "v4.channel.k8s.io").await;
        assert_eq!(next(&mut socket).await, (1, vec![]));
        if hold {
            let flood = async {
                loop {
                    send(&mut socket, STDIN, &[0; 30_000]).await;
                }
            };
            let held = tokio::time::timeout(Duration::from_secs(1), flood).await;
            assert!(held.is_err());
        }
        drop(socket);
        until("gone", || node.memory.gone.load(SeqCst) == n + 1).await;
    }
    let mut socket = upgrade(&node.attach(IN_OUT), "v5.channel.k8s.io").await;
    assert_eq!(next(&mut socket).await, (1, vec![]));
    socket.close(None).await.unwrap();
    finish(&mut socket).await;
    until("gone", || node.memory.gone.load(SeqCst) == 3).await;
}

#[tokio::test]
async fn pings_are_answered_while_output_flows() {
    let node = start().await;
    let mut socket = upgrade(&node.exec(OUT, &["flood"]), "v5.channel.k8s.io").await;
    socket.send(Message::Ping("here?".into())).await.unwrap();
    let answer = async {
        loop {
            if let Message::Pong(data) = socket.next().await.unwrap().unwrap() {
                return data;
            }
        }
    };
    assert_eq!(&soon(answer).await[..], b"here?");
}

#[tokio::test]
async fn messages_that_break_the_protocol_end_the_session() {
    let node = start().await;
    let v5 = async || upgrade(&node.exec(IN_OUT, &["deaf"]), "v5.channel.k8s.io").await;
    for bad in [&[255][..], &[255, 0, 1], &[255, 77]] {
        let mut socket = v5().await;
        socket.send(Message::binary(bad.to_vec())).await.unwrap();
        assert_eq!(finish(&mut socket).await.1, Some(1002), "{bad:?}");
    }
    let mut socket = upgrade(&node.exec(IN_OUT, &["deaf"]), "v4.base64.channel.k8s.io").await;
    socket.send(Message::text("0***")).await.unwrap();
    let close = async {
        loop {
            if let Message::Close(frame) = socket.next().await.unwrap().unwrap() {
                return u16::from(frame.unwrap().code);
            }
        }
    };
    assert_eq!(soon(close).await, 1002);
    // Not masked; longer than is taken; a fragment of nothing.
    for raw in [
        &b"\x82\x01x"[..],
        b"\x82\xff\x00\x00\x00\x00\x10\x00\x00\x00abcd",
        b"\x82\xff\x00\x00\x00\x00\x00\x10\x00\x02abcd",
        b"\x80\x80abcd",
    ] {
        let mut socket = v5().await;
        socket.get_mut().write_all(raw).await.unwrap();
        assert_eq!(finish(&mut socket).await.1, Some(1002), "{raw:?}");
    }
    until("all noticed", || node.memory.gone.load(SeqCst) == 8).await;
    // Empty messages and channels that are not there carry nothing.
    let mut socket = upgrade(&node.exec(IN_OUT, &["cat"]), "v5.channel.k8s.io").await;
    socket.send(Message::binary(Vec::new())).await.unwrap();
    send(&mut socket, 77, b"for nobody").await;
    send(&mut socket, 1, b"the wrong way").await;
    send(&mut socket, STDIN, b"x").await;
    send(&mut socket, 255, &[STDIN]).await;
    assert_eq!(finish(&mut socket).await.0[STDOUT], b"x");
}

#[tokio::test]
async fn what_a_client_still_sends_costs_it_no_output_here_either() {
    let node = start().await;
    for late in [0, 500, 500] {
        let url = node.exec(IN_OUT, &["noise", "3000000"]);
        let mut socket = upgrade(&url, "v5.channel.k8s.io").await;
        // A masked message of 1000 bytes for channel 0 (RFC 6455, 5.2); the key of nought changes nothing.
        let head = [0x82, 0x80 | 126, 0x03, 0xe8, 0, 0, 0, 0];
        let flood = flood(socket.get_ref(), [&head[..], &[0; 1000]].concat());
        tokio::time::sleep(Duration::from_millis(late)).await;
        let (channels, code) = finish(&mut socket).await;
        assert_eq!(sha256(&channels[1]), sha256(&noise(3_000_000)));
        assert!(String::from_utf8_lossy(&channels[3]).contains("Success"));
        assert_eq!(code, Some(1000));
        flood.abort();
    }
}
