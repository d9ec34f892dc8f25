//! A client of the streaming server: Kubernetes' channels over WebSocket, blocking, as one end of
//! a connection that a test may drop at any moment.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use gantry_testkit::netns::Netns;

pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const STDERR: u8 = 2;
/// Where the result comes: a `Status` as JSON.
pub const RESULT: u8 = 3;
pub const RESIZE: u8 = 4;
/// Says that the client sends no more on the channel that follows (v5).
const CLOSE: u8 = 255;

/// How long a test waits for bytes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Longest frame that a test expects.
const LONGEST: u64 = 1 << 20;

const BINARY: u8 = 2;
const END: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// An upgraded connection.
pub struct Socket(BufReader<TcpStream>);

/// Everything that came.
#[derive(Debug, Default)]
pub struct Received {
    pub stdout: String,
    pub stderr: String,
    pub result: serde_json::Value,
}

impl Received {
    /// The exit code that the result tells; `None` when it tells another failure.
    pub fn exit_code(&self) -> Option<i32> {
        if self.result["status"] == "Success" {
            return Some(0);
        }
        let causes = self.result["details"]["causes"].as_array()?;
        let code = causes.iter().find(|cause| cause["reason"] == "ExitCode")?;
        code["message"].as_str()?.parse().ok()
    }
}

/// Takes up a URL in the namespace of the daemon that gave it; returns the status of an answer that
/// is not an upgrade.
pub fn connect(netns: &Netns, url: &str, protocol: &str) -> Result<Socket, String> {
    let (host, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .ok_or_else(|| format!("{url} is not absolute"))?;
    let connect = || -> io::Result<BufReader<TcpStream>> {
        let mut stream = netns.run(|| TcpStream::connect(host))??;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: {protocol}\r\n\r\n"
        )?;
        Ok(BufReader::new(stream))
    };
    let mut stream = connect().map_err(|error| format!("{url}: {error}"))?;
    let (mut status, mut line) = (String::new(), String::new());
    while line != "\r\n" {
        line.clear();
        let read = stream.read_line(&mut line);
        if !matches!(read, Ok(count) if count > 0) {
            return Err(format!("{url}: no answer: {read:?}"));
        }
        if status.is_empty() {
            status.clone_from(&line);
        }
    }
    match status.split(' ').nth(1) {
        Some("101") => Ok(Socket(stream)),
        _ => Err(status.trim().to_owned()),
    }
}

impl Socket {
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> io::Result<()> {
        let payload = [&[channel], bytes].concat();
        self.frame(BINARY, &payload)
    }

    /// The end of what is sent on a channel.
    pub fn finish(&mut self, channel: u8) -> io::Result<()> {
        self.frame(BINARY, &[CLOSE, channel])
    }

    pub fn resize(&mut self, width: u16, height: u16) -> io::Result<()> {
        let size = format!(r#"{{"Width":{width},"Height":{height}}}"#);
        self.send(RESIZE, size.as_bytes())
    }

    /// A client masks (RFC 6455, 5.3); the key of nought changes nothing.
    fn frame(&mut self, kind: u8, payload: &[u8]) -> io::Result<()> {
        let mut frame = vec![0x80 | kind];
        match u16::try_from(payload.len()).map_err(io::Error::other)? {
            length @ 0..=125 => frame.push(0x80 | length as u8),
            length => {
                frame.push(0x80 | 126);
                frame.extend(length.to_be_bytes());
            }
        }
        frame.extend([0; 4]);
        frame.extend(payload);
        self.0.get_mut().write_all(&frame)
    }

    /// The next bytes and their channel; `None` at the server's end.
    pub fn receive(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        loop {
            let mut head = [0; 2];
            self.0.read_exact(&mut head)?;
            let length = match head[1] & 0x7f {
                126 => {
                    let mut long = [0; 2];
                    self.0.read_exact(&mut long)?;
                    u16::from_be_bytes(long).into()
                }
                127 => {
                    let mut long = [0; 8];
                    self.0.read_exact(&mut long)?;
                    u64::from_be_bytes(long)
                }
                short => u64::from(short),
            };
            assert!(length <= LONGEST, "a frame of {length} bytes");
            let mut payload = vec![0; length as usize];
            self.0.read_exact(&mut payload)?;
            match head[0] & 0xf {
                END => return Ok(None),
                PING => self.frame(PONG, &payload)?,
                PONG => {}
                _ if payload.is_empty() => {}
                _ => {
                    let channel = payload.remove(0);
                    if !payload.is_empty() {
                        return Ok(Some((channel, payload)));
                    }
                }
            }
        }
    }

    /// Reads standard output until it ends in `text`.
    pub fn until(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.ends_with(text) {
            let next = self.receive();
            let Ok(Some((channel, bytes))) = next else {
                panic!("{next:?} after {seen:?}, before {text:?}");
            };
            if channel == STDOUT {
                seen.push_str(&String::from_utf8_lossy(&bytes));
            } else {
                panic!(
                    "channel {channel} after {seen:?}: {:?}",
                    String::from_utf8_lossy(&bytes)
                );
            }
        }
        seen
    }

    /// What comes on one channel until it ends in `text` or the server ends.
    pub fn channel(&mut self, wanted: u8, text: &str) -> Vec<u8> {
        let mut all = Vec::new();
        while !all.ends_with(text.as_bytes())
            && let Ok(Some((channel, bytes))) = self.receive()
        {
            if channel == wanted {
                all.extend(bytes);
            }
        }
        all
    }

    /// All that comes until the server's end.
    pub fn rest(&mut self) -> Received {
        let mut channels = [const { Vec::new() }; 4];
        while let Ok(Some((channel, bytes))) = self.receive() {
            channels[usize::from(channel)].extend(bytes);
        }
        let text =
            |channel: u8| String::from_utf8_lossy(&channels[usize::from(channel)]).into_owned();
        Received {
            stdout: text(STDOUT),
            stderr: text(STDERR),
            result: serde_json::from_str(&text(RESULT)).unwrap_or_default(),
        }
    }
}
