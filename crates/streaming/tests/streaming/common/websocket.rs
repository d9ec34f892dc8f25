//! A WebSocket client of Kubernetes' channels.

use futures::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::{http, soon};

pub type Socket = WebSocketStream<TcpStream>;

/// Upgrades; an empty protocol names none.
pub async fn upgrade(url: &str, protocol: &str) -> Socket {
    let mut tcp = http::connect(url).await;
    let mut headers = http::WEBSOCKET.to_vec();
    if !protocol.is_empty() {
        headers.push(("Sec-WebSocket-Protocol", protocol));
    }
    let answer = http::ask(&mut tcp, "GET", url, &headers).await;
    assert_eq!(answer.status, 101, "{answer:?}");
    assert_eq!(answer.one("sec-websocket-protocol").unwrap_or(""), protocol);
    // RFC 6455, 1.3: the answer to the key of its example.
    assert_eq!(
        answer.one("sec-websocket-accept"),
        Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
    );
    WebSocketStream::from_raw_socket(tcp, Role::Client, None).await
}

pub async fn send(socket: &mut Socket, channel: u8, bytes: &[u8]) {
    let message = [&[channel], bytes].concat();
    socket.send(Message::binary(message)).await.unwrap();
}

/// What came on each channel until the server closed, and the close code.
pub async fn finish(socket: &mut Socket) -> (Vec<Vec<u8>>, Option<u16>) {
    let mut channels = vec![Vec::new(); 256];
    let code = soon(async {
        while let Some(message) = socket.next().await {
            match message.unwrap() {
                Message::Binary(data) => {
                    channels[usize::from(data[0])].extend_from_slice(&data[1..])
                }
                Message::Close(frame) => return frame.map(|frame| frame.code.into()),
                Message::Pong(_) => {}
                message => panic!("{message:?}"),
            }
        }
        None
    })
    .await;
    (channels, code)
}

/// The next message of bytes: its channel and what it carries.
pub async fn next(socket: &mut Socket) -> (u8, Vec<u8>) {
    match soon(socket.next()).await.unwrap().unwrap() {
        Message::Binary(data) => (data[0], data[1..].to_vec()),
        message => panic!("{message:?}"),
    }
}
