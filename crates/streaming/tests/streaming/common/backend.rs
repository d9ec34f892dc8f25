//! A backend that needs no containers: the words of a command say what to do.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use async_trait::async_trait;
use futures::FutureExt;
use gantry_ports::Error;
use gantry_streaming::{AttachRequest, Backend, Duplex, ExecRequest, Streams, TerminalSize};
use gantry_types::PodId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Ports with a behaviour.
pub const ECHO: u16 = 7;
pub const REFUSED: u16 = 1;
/// Reads to the end, then answers with the count of bytes.
pub const COUNT: u16 = 9;
/// Says `bye` and its end at once, and reads on.
pub const BYE: u16 = 13;
/// Neither reads nor writes.
pub const DEAF: u16 = 99;

/// What was seen of clients.
#[derive(Default)]
pub struct Memory {
    /// Calls that were begun, and calls that are over.
    pub begun: AtomicUsize,
    pub ended: AtomicUsize,
    /// Clients that were noticed to be gone.
    pub gone: AtomicUsize,
    /// Bytes that a flood could write.
    pub written: AtomicUsize,
    /// Writes that failed.
    pub broken: AtomicUsize,
}

/// Counts a call as over also when it is dropped.
struct Call<'a>(&'a Memory);

impl<'a> Call<'a> {
    fn new(memory: &'a Memory) -> Self {
        memory.begun.fetch_add(1, SeqCst);
        Self(memory)
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, SeqCst);
    }
}

fn failed(error: std::io::Error) -> Error {
    Error::io("the test's backend", error)
}

#[async_trait]
impl Backend for Memory {
    async fn exec(&self, request: ExecRequest, mut streams: Streams) -> Result<i32, Error> {
        let _call = Call::new(self);
        let words: Vec<&str> = request.command.iter().map(String::as_str).collect();
        match words[..] {
            ["cat"] => {
                let mut stdin = streams.stdin.take().unwrap();
                let mut stdout = streams.stdout.take().unwrap();
                tokio::io::copy(&mut stdin, &mut stdout)
                    .await
                    .map_err(failed)?;
            }
            ["say", out, err] => {
                streams
                    .stdout
                    .take()
                    .unwrap()
                    .write_all(out.as_bytes())
                    .await
                    .map_err(failed)?;
                streams
                    .stderr
                    .take()
                    .unwrap()
                    .write_all(err.as_bytes())
                    .await
                    .map_err(failed)?;
            }
            ["sum"] => {
                let mut all = Vec::new();
                streams
                    .stdin
                    .take()
                    .unwrap()
                    .read_to_end(&mut all)
                    .await
                    .map_err(failed)?;
                let sum = super::sha256(&all);
                streams
                    .stdout
                    .take()
                    .unwrap()
                    .write_all(sum.as_bytes())
                    .await
                    .map_err(failed)?;
            }
            ["noise", count] => {
                let noise = super::noise(count.parse().unwrap());
                streams
                    .stdout
                    .take()
                    .unwrap()
                    .write_all(&noise)
                    .await
                    .map_err(failed)?;
            }
            ["size"] => {
                let known = streams.resizes.next().now_or_never().flatten();
                let text = known.map_or("none".to_owned(), |TerminalSize { width, height }| {
                    format!("{width}x{height}")
                });
                let mut stdout = streams.stdout.take().unwrap();
                stdout.write_all(text.as_bytes()).await.map_err(failed)?;
            }
            ["exit", code] => return Ok(code.parse().unwrap()),
            ["panic"] => panic!("as asked"),
            ["fail", why] => return Err(Error::internal(why)),
            ["flood"] => {
                let mut stdout = streams.stdout.take().unwrap();
                while let Ok(count) = stdout.write(&[b'y'; 1000]).await {
                    self.written.fetch_add(count, SeqCst);
                }
                self.broken.fetch_add(1, SeqCst);
            }
            ["deaf"] => {
                // Keeps its streams, and does nothing with them.
                streams.client.gone().await;
                self.gone.fetch_add(1, SeqCst);
                return Ok(137);
            }
            ["sizes", count] => {
                let mut stdout = streams.stdout.take().unwrap();
                for _ in 0..count.parse().unwrap() {
                    let Some(TerminalSize { width, height }) = streams.resizes.next().await else {
                        break;
                    };
                    let line = format!("{width}x{height}\n");
                    stdout.write_all(line.as_bytes()).await.map_err(failed)?;
                }
            }
            _ => return Err(Error::internal(format!("{words:?}?"))),
        }
        Ok(0)
    }

    async fn attach(&self, _request: AttachRequest, mut streams: Streams) -> Result<(), Error> {
        let _call = Call::new(self);
        let (stdin, stdout) = (streams.stdin.take(), streams.stdout.take());
        let echo = async {
            if let (Some(mut stdin), Some(mut stdout)) = (stdin, stdout) {
                stdout.write_all(b"attached\n").await?;
                tokio::io::copy(&mut stdin, &mut stdout).await?;
            }
            std::io::Result::Ok(())
        };
        // A client that is gone also ends its streams.
        tokio::select! {
            biased;
            () = streams.client.gone() => {
                self.gone.fetch_add(1, SeqCst);
            }
            _ = echo => {}
        }
        Ok(())
    }

    async fn port_forward(&self, _pod: &PodId, port: u16, stream: Duplex) -> Result<(), Error> {
        let _call = Call::new(self);
        let (mut input, mut output) = stream.into_split();
        match port {
            ECHO => {
                tokio::io::copy(&mut input, &mut output)
                    .await
                    .map_err(failed)?;
            }
            COUNT => {
                let count = tokio::io::copy(&mut input, &mut tokio::io::sink()).await;
                let text = count.map_err(failed)?.to_string();
                output.write_all(text.as_bytes()).await.map_err(failed)?;
            }
            BYE => {
                output.write_all(b"bye").await.map_err(failed)?;
                drop(output);
                let count = tokio::io::copy(&mut input, &mut tokio::io::sink()).await;
                self.written
                    .fetch_add(count.map_err(failed)? as usize, SeqCst);
            }
            DEAF => std::future::pending().await,
            _ => return Err(Error::internal("connection refused")),
        }
        Ok(())
    }
}
