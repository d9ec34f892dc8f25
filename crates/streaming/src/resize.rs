//! The resize stream: JSON objects one after the other, each a terminal's size.

use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use crate::backend::{Input, TerminalSize};

/// Longest object, with space around it, that is waited for.
const MAX_OBJECT: usize = 1024;

#[derive(Deserialize)]
struct Size {
    #[serde(rename = "Width", alias = "width")]
    width: u16,
    #[serde(rename = "Height", alias = "height")]
    height: u16,
}

/// Hands on each size until the stream ends or is not what it should be. What comes after that is
/// discarded with the stream: a terminal that keeps its size does not fail a command.
pub(crate) async fn pump(mut input: Input, sizes: watch::Sender<Option<TerminalSize>>) {
    let mut pending = Vec::new();
    let mut buffer = [0; 256];
    loop {
        let count = match input.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        pending.extend_from_slice(&buffer[..count]);
        let mut objects = serde_json::Deserializer::from_slice(&pending).into_iter::<Size>();
        let mut used = 0;
        loop {
            match objects.next() {
                Some(Ok(Size { width, height })) => {
                    used = objects.byte_offset();
                    let new = Some(TerminalSize { width, height });
                    sizes.send_if_modified(|size| std::mem::replace(size, new) != new);
                }
                Some(Err(error)) if error.is_eof() => break,
                Some(Err(error)) => {
                    tracing::debug!(%error, "a resize stream that is not one");
                    return;
                }
                None => {
                    used = pending.len();
                    break;
                }
            }
        }
        pending.drain(..used);
        if pending.len() > MAX_OBJECT {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Resizes;
    use crate::channel::Channel;
    use std::sync::Arc;
    use tokio::sync::Notify;

    /// What is seen of a stream that sends `pieces` one by one, each read before the next.
    async fn seen(pieces: &[&str]) -> Vec<(u16, u16)> {
        let (channel, input, _output) = Channel::new(Arc::new(Notify::new()));
        let (sender, receiver) = watch::channel(None);
        let (mut resizes, mut all) = (Resizes::new(receiver), Vec::new());
        let pump = tokio::spawn(pump(input, sender));
        for piece in pieces {
            channel.deliver(piece.as_bytes());
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
        }
        channel.finish_incoming();
        pump.await.unwrap();
        while let Some(TerminalSize { width, height }) = resizes.next().await {
            all.push((width, height));
        }
        all
    }

    #[tokio::test]
    async fn the_last_size_is_seen_also_when_it_came_before_anybody_asked() {
        let one = r#"{"Width":80,"Height":24}"#;
        assert_eq!(seen(&[one]).await, [(80, 24)]);
        assert_eq!(
            seen(&[one, "\n", r#"{"Width":100,"#, r#""Height":50}"#]).await,
            [(100, 50)]
        );
        assert_eq!(seen(&[&format!("{one}{one}\n{one}")]).await, [(80, 24)]);
        assert_eq!(seen(&[]).await, []);
    }

    #[tokio::test]
    async fn what_is_no_size_ends_the_stream_and_nothing_else() {
        let one = r#"{"width":80,"height":24}"#;
        let long = format!("{{\"Width\":{}", " ".repeat(3000));
        for bad in ["[]", "nonsense", r#"{"Width":70000,"Height":1}"#, &long] {
            assert_eq!(
                seen(&[one, bad, r#"{"Width":1,"Height":1}"#]).await,
                [(80, 24)],
                "{bad}"
            );
        }
    }
}
