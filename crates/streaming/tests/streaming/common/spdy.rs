//! A small SPDY client. Like the library of kubelet and kubectl it keeps no windows, unless told.

use std::collections::{BTreeMap, VecDeque};

use bytes::{BufMut, Bytes, BytesMut};
use gantry_streaming::spdy::{Decoder, Frame, HeaderWriter, Headers};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{http, soon};

/// What a client saw of one stream.
#[derive(Debug, Default)]
pub struct Seen {
    pub replied: bool,
    pub data: Vec<u8>,
    pub fin: bool,
    pub reset: Option<u32>,
    /// Window that was given back.
    pub window: usize,
}

pub struct Client<T> {
    io: T,
    decoder: Decoder,
    input: BytesMut,
    headers: HeaderWriter,
    next: u32,
    pub streams: BTreeMap<u32, Seen>,
    pub settings: Vec<(u32, u32)>,
    pub session_window: usize,
    pub pongs: VecDeque<u32>,
    pub goaway: Option<u32>,
    pub closed: bool,
}

/// Asks for an upgrade as kubelet does.
pub async fn upgrade(url: &str, protocol: &str) -> Client<TcpStream> {
    let mut tcp = http::connect(url).await;
    tcp.set_nodelay(true).unwrap();
    let mut headers = http::SPDY.to_vec();
    headers.push(("X-Stream-Protocol-Version", protocol));
    let answer = http::ask(&mut tcp, "POST", url, &headers).await;
    assert_eq!(answer.status, 101, "{answer:?}");
    assert_eq!(answer.all("connection"), ["Upgrade"]);
    assert_eq!(answer.one("upgrade"), Some("SPDY/3.1"));
    assert_eq!(answer.one("x-stream-protocol-version"), Some(protocol));
    Client::new(tcp)
}

/// Upgrades with v4 and opens streams of these types, ids 1, 3, ...
pub async fn open(url: &str, types: &[&str]) -> Client<TcpStream> {
    let mut client = upgrade(url, "v4.channel.k8s.io").await;
    for kind in types {
        client.open(&[("streamType", kind)]).await;
    }
    client
}

impl<T: AsyncRead + AsyncWrite + Unpin> Client<T> {
    pub fn new(io: T) -> Self {
        Self {
            io,
            decoder: Decoder::default(),
            input: BytesMut::new(),
            headers: HeaderWriter::default(),
            next: 1,
            streams: BTreeMap::new(),
            settings: Vec::new(),
            session_window: 0,
            pongs: VecDeque::new(),
            goaway: None,
            closed: false,
        }
    }

    pub fn io(&mut self) -> &mut T {
        &mut self.io
    }

    pub fn into_io(self) -> T {
        self.io
    }

    pub async fn raw(&mut self, bytes: &[u8]) {
        self.io.write_all(bytes).await.unwrap();
        self.io.flush().await.unwrap();
    }

    pub async fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) {
        self.raw(&control(kind, flags, payload)).await;
    }

    /// The bytes of a SYN_STREAM, which must be sent in the order they are made.
    pub fn syn_stream(&mut self, id: u32, flags: u8, headers: &[(&str, &str)]) -> Bytes {
        let headers: Headers = headers
            .iter()
            .map(|(name, value)| (name.to_lowercase(), *value))
            .collect();
        let mut payload = BytesMut::new();
        payload.put_u32(id);
        payload.put_u32(0);
        payload.put_u16(0);
        self.headers.compress(&headers, &mut payload).unwrap();
        control(1, flags, &payload)
    }

    /// Opens the next stream.
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next;
        self.next += 2;
        let frame = self.syn_stream(id, 0, headers);
        self.streams.insert(id, Seen::default());
        self.raw(&frame).await;
        id
    }

    pub async fn send(&mut self, id: u32, bytes: &[u8]) {
        for piece in bytes.chunks(32 * 1024) {
            let frame = data(id, piece, false);
            self.raw(&frame).await;
        }
    }

    pub async fn fin(&mut self, id: u32) {
        let frame = data(id, b"", true);
        self.raw(&frame).await;
    }

    pub async fn reset(&mut self, id: u32) {
        let payload = [id.to_be_bytes(), 5u32.to_be_bytes()].concat();
        self.control(3, 0, &payload).await;
    }

    pub async fn ping(&mut self, id: u32) {
        self.control(6, 0, &id.to_be_bytes()).await;
    }

    pub async fn window_update(&mut self, id: u32, delta: u32) {
        let payload = [id.to_be_bytes(), delta.to_be_bytes()].concat();
        self.control(9, 0, &payload).await;
    }

    pub async fn initial_window(&mut self, size: u32) {
        let payload = [1u32.to_be_bytes(), 7u32.to_be_bytes(), size.to_be_bytes()].concat();
        self.control(4, 0, &payload).await;
    }

    pub fn seen(&self, id: u32) -> &Seen {
        &self.streams[&id]
    }

    pub fn text(&self, id: u32) -> String {
        String::from_utf8(self.seen(id).data.clone()).unwrap()
    }

    /// The JSON status on an error stream.
    pub fn status(&self, id: u32) -> serde_json::Value {
        serde_json::from_slice(&self.seen(id).data).unwrap()
    }

    /// Reads until `done` holds or the connection is closed.
    pub async fn until(&mut self, done: impl Fn(&Self) -> bool) {
        soon(async {
            while !done(self) && !self.closed {
                self.read().await;
            }
        })
        .await;
    }

    /// Reads to the connection's end, and hangs up.
    pub async fn finish(&mut self) {
        self.until(|_| false).await;
        let _ = self.io.shutdown().await;
    }

    /// Reads for a while.
    pub async fn settle(&mut self) {
        let quiet = std::time::Duration::from_millis(300);
        while !self.closed && tokio::time::timeout(quiet, self.read()).await.is_ok() {}
    }

    /// Reads once. May be dropped and called again without loss.
    async fn read(&mut self) {
        match self.io.read_buf(&mut self.input).await {
            Ok(0) | Err(_) => self.closed = true,
            Ok(_) => {}
        }
        while let Some(frame) = self.decoder.decode(&mut self.input).unwrap() {
            self.see(frame);
        }
    }

    fn see(&mut self, frame: Frame) {
        assert!(self.goaway.is_none(), "after GOAWAY: {frame:?}");
        match frame {
            Frame::SynReply { id, .. } => self.streams.get_mut(&id).unwrap().replied = true,
            Frame::Data { id, bytes, fin } => {
                let stream = self.streams.get_mut(&id).unwrap();
                assert!(stream.replied, "data before the reply on {id}");
                assert!(!stream.fin, "data after the end of {id}");
                stream.data.extend_from_slice(&bytes);
                stream.fin = fin;
            }
            Frame::RstStream { id, status } => {
                self.streams.entry(id).or_default().reset = Some(status);
            }
            Frame::WindowUpdate { id: 0, delta } => self.session_window += delta as usize,
            Frame::WindowUpdate { id, delta } => {
                self.streams.get_mut(&id).unwrap().window += delta as usize;
            }
            Frame::Settings(entries) => self.settings = entries,
            Frame::Ping(id) => self.pongs.push_back(id),
            Frame::Goaway { status, .. } => self.goaway = Some(status),
            frame => panic!("no server sends {frame:?}"),
        }
    }
}

pub fn control(kind: u16, flags: u8, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u16(0x8003);
    frame.put_u16(kind);
    frame.put_u8(flags);
    frame.put_uint(payload.len() as u64, 3);
    frame.put_slice(payload);
    frame.freeze()
}

pub fn data(id: u32, payload: &[u8], fin: bool) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u32(id);
    frame.put_u8(u8::from(fin));
    frame.put_uint(payload.len() as u64, 3);
    frame.put_slice(payload);
    frame.freeze()
}
