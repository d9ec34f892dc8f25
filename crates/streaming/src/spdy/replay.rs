//! A session without a connection.

use std::sync::Arc;

use bytes::BytesMut;
use futures::FutureExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

use super::core::{Core, Incoming, MAX_STREAMS};
use crate::channel::SESSION_WINDOW;

/// Most that a session held at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Bytes for the client.
    pub out: usize,
    /// Bytes from the client that no frame could be made of yet, or that a stalled session left.
    pub input: usize,
    /// Streams that its user was given and the client did not take back.
    pub streams: usize,
    /// Bytes that waited for its user, also on streams that the client took back.
    pub queued: usize,
}

/// Most that [`check`] lets a session hold.
const BOUNDS: Held = Held {
    out: 256 * 1024,
    // The longest frame that is waited for, and a piece.
    input: 24 * 1024,
    streams: MAX_STREAMS,
    queued: SESSION_WINDOW + 24 * 1024,
};

/// What fuzzers run: a session, the first byte of which says in what pieces the rest arrives. Panics
/// when it holds more than it may.
pub fn check(bytes: &[u8]) {
    let Some((piece, bytes)) = bytes.split_first() else {
        return;
    };
    let held = replay(bytes, usize::from(*piece) * 16 + 1);
    let bounds = [
        (held.out, BOUNDS.out),
        (held.input, BOUNDS.input),
        (held.streams, BOUNDS.streams),
        (held.queued, BOUNDS.queued),
    ];
    assert!(bounds.iter().all(|(held, most)| held <= most), "{held:?}");
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
        let taken_back = |user: &Incoming| user.output.channel().was_reset();
        let queued = |user: &Incoming| user.output.channel().queued();
        held.streams = held
            .streams
            .max(users.iter().filter(|user| !taken_back(user)).count());
        held.queued = held.queued.max(users.iter().map(queued).sum());
        // Whoever serves a stream lets go of it when its client does.
        users.retain(|user| !taken_back(user));
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
