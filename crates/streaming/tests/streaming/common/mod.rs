//! A server on a backend that lives in memory, and clients as raw as the tests need them.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod backend;
pub mod http;
pub mod spdy;
pub mod websocket;

use std::sync::Arc;
use std::time::Duration;

use gantry_streaming::{AttachRequest, Config, ExecRequest, PortForwardRequest, Server, Stdio};
use gantry_types::{ContainerId, PodId};
use tokio::io::AsyncWriteExt;

pub use backend::Memory;

/// Longest that anything here may take; a test that waits longer has failed.
pub const SOON: Duration = Duration::from_secs(30);

/// Fails the test when `future` does not resolve soon.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future)
        .await
        .expect("this takes too long")
}

/// Waits until `condition` holds.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < SOON, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub const OUT: Stdio = Stdio {
    stdin: false,
    stdout: true,
    stderr: false,
    tty: false,
};

pub const IN_OUT: Stdio = Stdio { stdin: true, ..OUT };

pub const ALL: Stdio = Stdio {
    stderr: true,
    ..IN_OUT
};

pub const TERMINAL: Stdio = Stdio {
    tty: true,
    ..IN_OUT
};

pub struct Node {
    pub server: Server,
    pub memory: Arc<Memory>,
}

pub async fn start() -> Node {
    start_with(Config::default()).await
}

pub async fn start_with(config: Config) -> Node {
    let memory = Arc::new(Memory::default());
    let server = Server::bind(config, memory.clone()).await.unwrap();
    Node { server, memory }
}

impl Node {
    pub fn exec(&self, stdio: Stdio, command: &[&str]) -> String {
        let request = ExecRequest {
            container: container(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            stdio,
        };
        self.server.exec(request).unwrap()
    }

    pub fn attach(&self, stdio: Stdio) -> String {
        let container = container();
        self.server
            .attach(AttachRequest { container, stdio })
            .unwrap()
    }

    pub fn forward(&self, ports: &[u16]) -> String {
        let (pod, ports) = (pod(), ports.to_vec());
        self.server
            .port_forward(PortForwardRequest { pod, ports })
            .unwrap()
    }
}

pub fn container() -> ContainerId {
    ContainerId::from_random([0xc0; 32])
}

pub fn pod() -> PodId {
    PodId::from_random([0x0d; 32])
}

/// Bytes that no compression or repetition could hide.
pub fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..count).map(|_| next()).collect()
}

/// Sends the same bytes for as long as they are taken, beside whatever else the connection does.
pub fn flood(connection: &tokio::net::TcpStream, bytes: Vec<u8>) -> tokio::task::JoinHandle<()> {
    let copy = rustix::io::dup(connection).unwrap();
    let mut copy = tokio::net::TcpStream::from_std(copy.into()).unwrap();
    tokio::spawn(async move { while copy.write_all(&bytes).await.is_ok() {} })
}

pub fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
