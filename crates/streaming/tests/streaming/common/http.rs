//! HTTP/1.1 by hand.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// Head of an answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
}

impl Answer {
    pub fn all(&self, name: &str) -> Vec<&str> {
        let matching = self.headers.iter().filter(|(key, _)| key == name);
        matching.map(|(_, value)| value.as_str()).collect()
    }

    pub fn one(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }
}

/// Host and path of a URL.
pub fn split(url: &str) -> (&str, &str) {
    let rest = url.split_once("://").unwrap().1;
    let slash = rest.find('/').unwrap();
    (&rest[..slash], &rest[slash..])
}

pub async fn connect(url: &str) -> TcpStream {
    TcpStream::connect(split(url).0).await.unwrap()
}

/// Sends a request's head and reads the answer's, no byte further.
pub async fn ask<T: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut T,
    method: &str,
    url: &str,
    headers: &[(&str, &str)],
) -> Answer {
    let (host, path) = split(url);
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    super::soon(read_answer(stream)).await
}

pub async fn read_answer<T: AsyncRead + Unpin>(stream: &mut T) -> Answer {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("an answer"));
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let status = lines
        .next()
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    Answer { status, headers }
}

/// The status of the answer to a request on a connection of its own.
pub async fn status(method: &str, url: &str, headers: &[(&str, &str)]) -> u16 {
    ask(&mut connect(url).await, method, url, headers)
        .await
        .status
}

pub const SPDY: [(&str, &str); 2] = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")];

pub const WEBSOCKET: [(&str, &str); 4] = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];
