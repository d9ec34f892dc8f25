//! PortForward: over SPDY, over SPDY in WebSocket, over WebSocket channels.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use gantry_streaming::Config;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_tungstenite::tungstenite::Message;

use crate::common::backend::{BYE, COUNT, DEAF, ECHO, REFUSED};
use crate::common::spdy::{Client, upgrade};
use crate::common::{http, noise, pod, sha256, soon, start, start_with, until, websocket};

const PROTOCOL: &str = "portforward.k8s.io";

/// Opens the pair of streams of a connection, the error stream first: its id, and that of the other.
async fn pair<T>(client: &mut Client<T>, port: u16, request: &str) -> (u32, u32)
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let port = port.to_string();
    let mut headers = vec![
        ("streamType", "error"),
        ("port", &port),
        ("requestID", request),
    ];
    if request.is_empty() {
        headers.pop();
    }
    let error = client.open(&headers).await;
    headers[0].1 = "data";
    let data = client.open(&headers).await;
    (error, data)
}

#[tokio::test]
async fn many_connections_share_one_session_and_end_on_their_own() {
    let node = start().await;
    let mut client = upgrade(&node.forward(&[]), PROTOCOL).await;
    let mut pairs = Vec::new();
    for n in 0..100 {
        pairs.push(pair(&mut client, ECHO, &n.to_string()).await);
    }
    for (n, (_, data)) in pairs.iter().enumerate() {
        client
            .send(*data, format!("connection {n}").as_bytes())
            .await;
    }
    for (_, data) in &pairs {
        client.fin(*data).await;
    }
    let all: Vec<u32> = pairs
        .iter()
        .flat_map(|(error, data)| [*error, *data])
        .collect();
    client.until(|c| all.iter().all(|id| c.seen(*id).fin)).await;
    for (n, (error, data)) in pairs.iter().enumerate() {
        assert_eq!(client.text(*data), format!("connection {n}"));
        assert_eq!(client.text(*error), "");
    }
    // Their streams count no more: as many again, and again.
    for n in 100..300 {
        let (error, data) = pair(&mut client, ECHO, &n.to_string()).await;
        client.fin(data).await;
        client
            .until(|c| c.seen(error).fin && c.seen(data).fin)
            .await;
    }
    assert_eq!(node.memory.ended.load(SeqCst), 300);
}

#[tokio::test]
async fn each_direction_is_closed_on_its_own() {
    let node = start().await;
    let mut client = upgrade(&node.forward(&[]), PROTOCOL).await;
    // The client first.
    let (_, data) = pair(&mut client, COUNT, "a").await;
    client.send(data, &[0; 1000]).await;
    client.settle().await;
    assert!(!client.seen(data).fin);
    client.fin(data).await;
    client.until(|c| c.seen(data).fin).await;
    assert_eq!(client.text(data), "1000");
    // The pod first.
    let (error, data) = pair(&mut client, BYE, "b").await;
    client.until(|c| c.seen(data).fin).await;
    assert_eq!(client.text(data), "bye");
    client.send(data, &[0; 500]).await;
    client.fin(data).await;
    client.until(|c| c.seen(error).fin).await;
    assert_eq!(node.memory.written.load(SeqCst), 500);
}

#[tokio::test]
async fn a_failure_is_told_on_its_connections_error_stream() {
    let node = start().await;
    let mut client = upgrade(&node.forward(&[]), PROTOCOL).await;
    let (_, healthy) = pair(&mut client, ECHO, "1").await;
    let (error, data) = pair(&mut client, REFUSED, "2").await;
    client
        .until(|c| c.seen(error).fin && c.seen(data).reset.is_some())
        .await;
    let text = client.text(error);
    let expected = format!(
        "error forwarding port {REFUSED} to pod {}: connection refused",
        pod()
    );
    assert_eq!(text, expected);
    client.send(healthy, b"still here").await;
    client.until(|c| c.text(healthy) == "still here").await;
}

/// As kubectl does with each connection that the pod has ended.
#[tokio::test]
async fn a_connection_that_its_client_resets_is_no_failure() {
    let node = start().await;
    let mut client = upgrade(&node.forward(&[]), PROTOCOL).await;
    let (error, data) = pair(&mut client, BYE, "0").await;
    client.until(|c| c.seen(data).fin).await;
    client.reset(data).await;
    client.until(|c| c.seen(error).fin).await;
    assert_eq!(client.text(error), "");
    assert_eq!(node.memory.ended.load(SeqCst), 1);
}

/// As kubectl does when its own side of a connection is over while the pod does not read.
#[tokio::test]
async fn a_connection_that_is_reset_is_dropped_though_its_pod_reads_nothing() {
    let node = start().await;
    let mut client = upgrade(&node.forward(&[]), PROTOCOL).await;
    // More than a session may have at a time.
    for n in 0..500 {
        let (_, data) = pair(&mut client, DEAF, &n.to_string()).await;
        client.send(data, &[0; 4000]).await;
        client.ping(1).await;
        client.until(|c| c.pongs.len() > n).await;
        client.reset(data).await;
    }
    let (begun, ended) = (&node.memory.begun, &node.memory.ended);
    until("all over", || ended.load(SeqCst) == begun.load(SeqCst)).await;
    let (_, healthy) = pair(&mut client, ECHO, "healthy").await;
    client.send(healthy, b"still here").await;
    client.until(|c| c.text(healthy) == "still here").await;
    assert!(begun.load(SeqCst) > 400, "{}", begun.load(SeqCst));
}

#[tokio::test]
async fn a_client_that_goes_away_while_a_pod_holds_it_back_is_noticed() {
    let node = start().await;
    let mut client = upgrade(&node.forward(&[]), PROTOCOL).await;
    let (_, data) = pair(&mut client, DEAF, "0").await;
    let flood = async {
        loop {
            client.send(data, &[0; 32 * 1024]).await;
        }
    };
    let held = tokio::time::timeout(Duration::from_secs(1), flood).await;
    assert!(held.is_err());
    drop(client);
    until("ended", || node.memory.ended.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn what_waits_over_all_channels_of_a_websocket_is_bounded() {
    const PORTS: usize = 64;
    let node = start().await;
    let mut socket = websocket::upgrade(&node.forward(&[DEAF; PORTS]), "v4.channel.k8s.io").await;
    // Each channel for itself would take that much: 16 MB, more than sockets hold.
    let fill = async {
        for _ in 0..10 {
            for channel in 0..PORTS {
                websocket::send(&mut socket, channel as u8 * 2, &[0; 25_000]).await;
            }
        }
    };
    let held = tokio::time::timeout(Duration::from_secs(3), fill).await;
    assert!(held.is_err(), "all of it was taken");
    drop(socket);
    until("ended", || node.memory.ended.load(SeqCst) == PORTS).await;
}

#[tokio::test]
async fn base64_has_no_more_channels_than_it_has_characters() {
    let node = start().await;
    for (ports, status) in [(40, 101), (41, 400)] {
        let url = node.forward(&vec![ECHO; ports]);
        let mut headers = http::WEBSOCKET.to_vec();
        headers.push(("Sec-WebSocket-Protocol", "v4.base64.channel.k8s.io"));
        assert_eq!(http::status("GET", &url, &headers).await, status, "{ports}");
    }
    // The last channel is one character still.
    let mut socket =
        websocket::upgrade(&node.forward(&[ECHO; 40]), "v4.base64.channel.k8s.io").await;
    let last = char::from(b'0' + 79);
    loop {
        let message = soon(socket.next()).await.unwrap().unwrap();
        if message.to_text().unwrap() == format!("{last}BwA=") {
            break;
        }
    }
}

#[tokio::test]
async fn clients_that_name_no_request_are_paired_by_stream_ids() {
    let node = start().await;
    let mut client = upgrade(&node.forward(&[]), PROTOCOL).await;
    for _ in 0..3 {
        let (_, data) = pair(&mut client, ECHO, "").await;
        client.send(data, b"x").await;
        client.until(|c| c.text(data) == "x").await;
    }
}

#[tokio::test]
async fn streams_that_are_no_pair_are_refused_or_given_up() {
    let config = Config {
        creation_timeout: Duration::from_secs(2),
        ..Config::default()
    };
    let node = start_with(config).await;
    let mut client = upgrade(&node.forward(&[]), PROTOCOL).await;
    for bad in [
        &[("streamType", "data")][..],
        &[("streamType", "data"), ("port", "0")],
        &[("streamType", "data"), ("port", "65536")],
        &[("streamType", "data"), ("port", "http")],
        &[("streamType", "stdin"), ("port", "80")],
        &[("port", "80")],
    ] {
        let id = client.open(bad).await;
        client.until(|c| c.seen(id).reset.is_some()).await;
        assert_eq!(client.seen(id).reset, Some(3), "{bad:?}");
    }
    let alone = [("streamType", "error"), ("port", "7"), ("requestID", "x")];
    let first = client.open(&alone).await;
    let second = client.open(&alone).await;
    client.until(|c| c.seen(second).reset.is_some()).await;
    client.until(|c| c.seen(first).fin).await;
    let text = client.text(first);
    assert!(text.contains("two streams of one type"), "{text}");
    let alone = client.open(&alone).await;
    client.until(|c| c.seen(alone).fin).await;
    let text = client.text(alone);
    assert!(text.contains("did not come"), "{text}");
    assert_eq!(node.memory.begun.load(SeqCst), 0);
}

#[tokio::test]
async fn connections_of_a_client_that_goes_away_are_dropped() {
    let node = start().await;
    let mut client = upgrade(&node.forward(&[]), PROTOCOL).await;
    for n in 0..20 {
        let (_, data) = pair(&mut client, DEAF, &n.to_string()).await;
        client.fin(data).await;
    }
    until("begun", || node.memory.begun.load(SeqCst) == 20).await;
    drop(client);
    until("ended", || node.memory.ended.load(SeqCst) == 20).await;
}

/// A WebSocket as a connection, the client's side of the tunnel.
async fn tunnel(url: &str) -> Client<tokio::io::DuplexStream> {
    let socket = websocket::upgrade(url, "SPDY/3.1+portforward.k8s.io").await;
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (mut sink, mut stream) = socket.split();
    let (mut read, mut write) = tokio::io::split(far);
    tokio::spawn(async move {
        let mut buffer = vec![0; 8000];
        while let Ok(count) = read.read(&mut buffer).await {
            let end = count == 0;
            let message = match end {
                true => Message::Close(None),
                false => Message::binary(buffer[..count].to_vec()),
            };
            if sink.send(message).await.is_err() || end {
                return;
            }
        }
    });
    tokio::spawn(async move {
        while let Some(Ok(message)) = stream.next().await {
            if let Message::Binary(data) = message
                && write.write_all(&data).await.is_err()
            {
                return;
            }
        }
    });
    Client::new(near)
}

#[tokio::test]
async fn spdy_runs_inside_a_websocket() {
    let node = start().await;
    let mut client = tunnel(&node.forward(&[])).await;
    let sent = noise(600_000);
    let (error, data) = pair(&mut client, ECHO, "0").await;
    let (_, other) = pair(&mut client, COUNT, "1").await;
    for piece in sent.chunks(50_000) {
        client.send(data, piece).await;
        let so_far = client.seen(data).data.len();
        client.until(|c| c.seen(data).data.len() > so_far).await;
    }
    client.fin(data).await;
    client.fin(other).await;
    client
        .until(|c| c.seen(error).fin && c.seen(data).fin && c.seen(other).fin)
        .await;
    assert_eq!(sha256(&client.seen(data).data), sha256(&sent));
    assert_eq!(client.text(other), "0");
    drop(client);
    until("ended", || node.memory.ended.load(SeqCst) == 2).await;
}

#[tokio::test]
async fn a_tunnel_whose_client_goes_away_is_over() {
    let node = start().await;
    let mut client = tunnel(&node.forward(&[])).await;
    pair(&mut client, DEAF, "0").await;
    until("begun", || node.memory.begun.load(SeqCst) == 1).await;
    drop(client);
    until("ended", || node.memory.ended.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn websocket_channels_come_in_pairs_that_begin_with_the_port() {
    let node = start().await;
    for protocol in ["v4.channel.k8s.io", ""] {
        let mut socket = websocket::upgrade(&node.forward(&[ECHO, REFUSED]), protocol).await;
        websocket::send(&mut socket, 0, b"hello").await;
        let mut channels = vec![Vec::new(); 4];
        while channels[0].len() < 7 || channels[3].len() < 20 {
            let (channel, data) = websocket::next(&mut socket).await;
            channels[usize::from(channel)].extend(data);
        }
        assert_eq!(channels[0], [&[7, 0][..], b"hello"].concat());
        assert_eq!(channels[1], [7, 0]);
        assert_eq!(channels[2], [1, 0]);
        assert_eq!(&channels[3][..2], [1, 0]);
        assert!(channels[3].ends_with(b"connection refused"));
        socket.close(None).await.unwrap();
        soon(async { while let Some(Ok(_)) = socket.next().await {} }).await;
    }
    until("ended", || node.memory.ended.load(SeqCst) == 4).await;
}
