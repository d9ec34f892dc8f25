//! A session without a connection.

use std::sync::Arc;

use bytes::BytesMut;
use futures::FutureExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

use super::core::Core;

/// Most that a session held at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Bytes for the client.
    pub out: usize,
    /// Bytes from the client that no frame could be made of yet, or that a stalled session left.
    pub input: usize,
    /// Streams that its user was given.
    pub streams: usize,
}

/// Runs a session's state machine over what a client sent, in pieces of `piece` bytes, with a user
/// that answers some of its streams, reads others and drops the rest.
pub fn replay(bytes: &[u8], piece: usize) -> Held {
    let (mut core, mut incoming) = Core::new(Box::new(|_| true), Arc::new(Notify::new()));
    let (mut held, mut input, mut users) = (Held::default(), BytesMut::new(), Vec::new());
    for bytes in bytes.chunks(piece.max(1)) {
        // A stalled session's connection is not read.
        if !core.stalled() {
            input.extend_from_slice(bytes);
        }
        let over = core.receive(&mut input).is_err();
        while let Ok(stream) = incoming.try_recv() {
            users.push(stream);
        }
        held.streams = held.streams.max(users.len());
        for user in &mut users {
            let id = user.id / 2;
            if id.is_multiple_of(3) {
                // One attempt each, as a user's task would make when it is woken.
                let _ = user.output.write(&[0; 100]).now_or_never();
            }
            if id.is_multiple_of(2) {
                let _ = user.input.read(&mut [0; 1000]).now_or_never();
            }
        }
        users.retain(|user| !user.id.is_multiple_of(7));
        core.sweep();
        held.out = held.out.max(core.out.len());
        held.input = held.input.max(input.len());
        if over {
            break;
        }
        // The client reads now and then.
        if bytes.first().is_some_and(|byte| byte.is_multiple_of(2)) {
            core.out.clear();
        }
    }
    core.end();
    held
}
