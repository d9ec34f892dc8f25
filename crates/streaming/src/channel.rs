//! One stream between a session and whoever uses it: two bounded byte queues and how each ended.
//!
//! A session (SPDY or WebSocket) holds the [`Channel`] and moves bytes between the queues and its
//! connection; the user holds the [`Input`] and the [`Output`]. Neither waits for the other: a user
//! sleeps on its own waker, a session on one [`Notify`] for all its channels. Both queues are
//! bounded, so that a slow end holds back the other and nothing else grows:
//!
//! - what the client sends is queued up to [`WINDOW`]; past it the session reads no further;
//! - what the user writes is queued up to [`OUTGOING`]; past it writes wait.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

/// Bytes from the client that wait for the user before the session stops reading.
pub(crate) const WINDOW: usize = 256 * 1024;

/// Bytes from the client that wait for users, over all streams of a session, before it stops reading.
pub(crate) const SESSION_WINDOW: usize = 1024 * 1024;

/// Bytes from the user that wait for the connection before writes wait.
pub(crate) const OUTGOING: usize = 64 * 1024;

/// An empty queue gives its memory back if it has grown past this.
const KEEP: usize = 16 * 1024;

/// The session's view of a stream.
pub(crate) struct Channel {
    state: Mutex<State>,
    session: Arc<Notify>,
}

#[derive(Default)]
struct State {
    incoming: BytesMut,
    incoming_end: Option<End>,
    /// Bytes that the user has taken since the session last asked.
    consumed: usize,
    input_dropped: bool,
    reader: Option<Waker>,

    outgoing: BytesMut,
    /// The user writes no more.
    finished: bool,
    /// The user wants the stream torn down.
    aborted: bool,
    /// Nothing that is written reaches the client any more.
    broken: bool,
    writer: Option<Waker>,
    /// Who waits for the stream to be broken.
    watcher: Option<Waker>,
}

impl State {
    /// The user has taken `count` of the bytes that waited, of which there were `before`; whether
    /// the session should hear of it.
    fn taken(&mut self, count: usize, before: usize) -> bool {
        if self.incoming.is_empty() && self.incoming.capacity() > KEEP {
            self.incoming = BytesMut::new();
        }
        self.consumed += count;
        self.consumed >= WINDOW / 2
            || self.incoming.is_empty()
            || (before > WINDOW && self.incoming.len() <= WINDOW)
    }

    /// Nothing more goes either way.
    fn break_off(&mut self) {
        self.incoming_end.get_or_insert(End::Reset);
        self.broken = true;
        self.outgoing = BytesMut::new();
        for waker in [&mut self.reader, &mut self.writer, &mut self.watcher] {
            wake(waker);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The client said that it sends no more.
    Finished,
    /// The client took the stream back, or is gone.
    Reset,
}

/// What the user side of a channel wants of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pending {
    /// Bytes to send.
    pub bytes: usize,
    /// No bytes come after these.
    pub finished: bool,
    /// The stream is to be reset.
    pub aborted: bool,
}

impl Channel {
    /// A channel and its user's ends; changes on their side wake `session`.
    pub fn new(session: Arc<Notify>) -> (Arc<Self>, Input, Output) {
        let channel = Arc::new(Self {
            state: Mutex::default(),
            session,
        });
        let input = Input {
            channel: channel.clone(),
        };
        let output = Output {
            channel: channel.clone(),
        };
        (channel, input, output)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues what the client sent; whether that is more than the window allows. Bytes that nobody
    /// will read count as consumed.
    pub fn deliver(&self, bytes: &[u8]) -> bool {
        let mut state = self.lock();
        if state.input_dropped || state.incoming_end.is_some() {
            state.consumed += bytes.len();
            return false;
        }
        state.incoming.extend_from_slice(bytes);
        wake(&mut state.reader);
        state.incoming.len() > WINDOW
    }

    /// More is queued than the window allows: the session reads no further until this is false.
    pub fn over_window(&self) -> bool {
        self.lock().incoming.len() > WINDOW
    }

    /// Bytes that wait for the user.
    pub fn queued(&self) -> usize {
        self.lock().incoming.len()
    }

    /// The client sends no more. What is queued is still read.
    pub fn finish_incoming(&self) {
        let mut state = self.lock();
        state.incoming_end.get_or_insert(End::Finished);
        wake(&mut state.reader);
    }

    /// The client took the stream back, both ways. What waits is for nobody and counts as consumed.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.consumed += state.incoming.len();
        state.incoming = BytesMut::new();
        state.break_off();
    }

    /// The connection is over. What the client sent before is still read.
    pub fn disconnect(&self) {
        self.lock().break_off();
    }

    /// The client took the stream back, or is gone.
    pub fn was_reset(&self) -> bool {
        self.lock().broken
    }

    /// Resolves when the client takes the stream back, or is gone. For one waiter at a time.
    pub async fn gone(&self) {
        std::future::poll_fn(|cx| {
            let mut state = self.lock();
            if state.broken {
                return Poll::Ready(());
            }
            state.watcher = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Bytes that were consumed since the last call.
    pub fn take_consumed(&self) -> usize {
        std::mem::take(&mut self.lock().consumed)
    }

    /// Bytes that were consumed since the last call, and those that wait: one look, since a user that
    /// reads in between would be counted twice.
    pub fn take_held(&self) -> usize {
        let mut state = self.lock();
        state.incoming.len() + std::mem::take(&mut state.consumed)
    }

    pub fn input_dropped(&self) -> bool {
        self.lock().input_dropped
    }

    pub fn pending(&self) -> Pending {
        let state = self.lock();
        Pending {
            bytes: state.outgoing.len(),
            finished: state.finished,
            aborted: state.aborted,
        }
    }

    /// Moves up to `max` bytes of what the user wrote to the end of `out`.
    pub fn pull(&self, max: usize, out: &mut BytesMut) -> usize {
        let mut state = self.lock();
        let count = state.outgoing.len().min(max);
        out.extend_from_slice(&state.outgoing[..count]);
        state.outgoing.advance(count);
        if state.outgoing.is_empty() && state.outgoing.capacity() > KEEP {
            state.outgoing = BytesMut::new();
        }
        if count > 0 {
            wake(&mut state.writer);
        }
        count
    }

    /// Ends the user's writing from the session's side; what is queued is still sent.
    pub fn finish_outgoing(&self) {
        let mut state = self.lock();
        state.finished = true;
        wake(&mut state.writer);
    }

    /// Waits until all that was written is on its way, or can never be. For after the [`Output`] is
    /// gone: its writer and this share a waker.
    pub async fn flushed(&self) {
        std::future::poll_fn(|cx| {
            let mut state = self.lock();
            if state.broken || state.outgoing.is_empty() {
                return Poll::Ready(());
            }
            state.writer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Asks the session to reset the stream: the user failed.
    pub fn abort(&self) {
        let mut state = self.lock();
        state.aborted = true;
        state.finished = true;
        drop(state);
        self.session.notify_one();
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

/// What the client sends on one stream. End of file is the client's half-close. A stream that the
/// client took back gives `ConnectionReset`, one whose client is gone does so after what was sent
/// before. Dropping it discards what still comes.
pub struct Input {
    channel: Arc<Channel>,
}

impl Input {
    /// What waits, at most `max` bytes, as it was received and without a copy; `None` at the end of
    /// file. Fails as reads do. May be dropped and called again without loss.
    pub async fn receive(&mut self, max: usize) -> io::Result<Option<Bytes>> {
        std::future::poll_fn(|cx| {
            let mut state = match self.poll_ready(cx) {
                Poll::Ready(Ok(Some(state))) => state,
                Poll::Ready(Ok(None)) => return Poll::Ready(Ok(None)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            };
            let before = state.incoming.len();
            let bytes = state.incoming.split_to(before.min(max)).freeze();
            let tell = state.taken(bytes.len(), before);
            drop(state);
            if tell {
                self.channel.session.notify_one();
            }
            Poll::Ready(Ok(Some(bytes)))
        })
        .await
    }

    /// The queue, when there is something in it; `None` at the end of file.
    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<Option<MutexGuard<'_, State>>>> {
        let mut state = self.channel.lock();
        if !state.incoming.is_empty() {
            return Poll::Ready(Ok(Some(state)));
        }
        match state.incoming_end {
            Some(End::Finished) => Poll::Ready(Ok(None)),
            Some(End::Reset) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            None => {
                state.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl AsyncRead for Input {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(mut state) = ready!(self.poll_ready(cx))? else {
            return Poll::Ready(Ok(()));
        };
        let before = state.incoming.len();
        let count = before.min(buf.remaining());
        buf.put_slice(&state.incoming[..count]);
        state.incoming.advance(count);
        let tell = state.taken(count, before);
        drop(state);
        if tell {
            self.channel.session.notify_one();
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        let mut state = self.channel.lock();
        state.input_dropped = true;
        state.consumed += state.incoming.len();
        state.incoming = BytesMut::new();
        state.reader = None;
        drop(state);
        self.channel.session.notify_one();
    }
}

/// What the client receives on one stream. A write waits while [`OUTGOING`] bytes wait for the
/// client, and fails with `BrokenPipe` once nothing can reach it. Shutting it down or dropping it is
/// the half-close, after what was written before.
pub struct Output {
    channel: Arc<Channel>,
}

impl Output {
    /// The session's view of this stream.
    pub(crate) fn channel(&self) -> Arc<Channel> {
        self.channel.clone()
    }
}

impl AsyncWrite for Output {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.channel.lock();
        if state.broken || state.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = OUTGOING.saturating_sub(state.outgoing.len());
        if room == 0 {
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let count = buf.len().min(room);
        state.outgoing.extend_from_slice(&buf[..count]);
        drop(state);
        self.channel.session.notify_one();
        Poll::Ready(Ok(count))
    }

    /// Does nothing: what is queued is sent as soon as the client takes it.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.channel.lock().finished = true;
        self.channel.session.notify_one();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut state = self.channel.lock();
        state.finished = true;
        state.writer = None;
        drop(state);
        self.channel.session.notify_one();
    }
}

/// A forwarded connection: both ways of one stream, each with its own half-close.
pub struct Duplex {
    input: Input,
    output: Output,
}

impl Duplex {
    pub(crate) fn new(input: Input, output: Output) -> Self {
        Self { input, output }
    }

    pub(crate) fn channel(&self) -> Arc<Channel> {
        self.output.channel()
    }

    pub fn into_split(self) -> (Input, Output) {
        (self.input, self.output)
    }
}

impl AsyncRead for Duplex {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.input).poll_read(cx, buf)
    }
}

impl AsyncWrite for Duplex {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.output).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.output).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.output).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::poll;
    use std::pin::pin;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn channel() -> (Arc<Channel>, Input, Output) {
        Channel::new(Arc::new(Notify::new()))
    }

    #[tokio::test]
    async fn what_was_queued_is_read_before_the_end() {
        let (channel, mut input, _output) = channel();
        channel.deliver(b"ab");
        channel.finish_incoming();
        channel.deliver(b"too late");
        let mut text = String::new();
        input.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "ab");
        assert_eq!(channel.take_consumed(), b"too late".len() + 2);
        assert_eq!(channel.take_consumed(), 0);
    }

    #[tokio::test]
    async fn a_reset_is_an_error_both_ways_and_releases_what_was_queued() {
        let (channel, mut input, mut output) = channel();
        channel.deliver(b"ab");
        let gone = channel.gone();
        let mut gone = pin!(gone);
        assert!(poll!(&mut gone).is_pending());
        channel.reset();
        gone.await;
        assert_eq!((channel.queued(), channel.take_consumed()), (0, 2));
        assert_eq!(
            input.read(&mut [0; 2]).await.unwrap_err().kind(),
            io::ErrorKind::ConnectionReset
        );
        assert_eq!(
            output.write_all(b"x").await.unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[tokio::test]
    async fn what_came_before_the_connection_was_lost_is_still_read() {
        let (channel, mut input, mut output) = channel();
        channel.deliver(b"abc");
        channel.disconnect();
        channel.gone().await;
        assert_eq!(input.receive(2).await.unwrap().unwrap(), "ab");
        assert_eq!(input.receive(2).await.unwrap().unwrap(), "c");
        let error = input.receive(2).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(output.write_all(b"x").await.is_err());
    }

    #[tokio::test]
    async fn a_write_waits_for_room_and_a_reset_ends_the_wait() {
        let (channel, _input, mut output) = channel();
        output.write_all(&[7; OUTGOING]).await.unwrap();
        {
            let mut write = pin!(output.write_all(b"more"));
            assert!(poll!(&mut write).is_pending());
            let mut out = BytesMut::new();
            assert_eq!(channel.pull(10, &mut out), 10);
            assert!(poll!(&mut write).is_ready());
        }
        let mut write = pin!(output.write_all(&[7; 10]));
        assert!(poll!(&mut write).is_pending());
        channel.reset();
        assert!(write.await.is_err());
    }

    #[tokio::test]
    async fn a_window_is_over_until_it_is_read_down() {
        let notify = Arc::new(Notify::new());
        let (channel, mut input, _output) = Channel::new(notify.clone());
        channel.deliver(&vec![0; WINDOW]);
        assert!(!channel.over_window());
        channel.deliver(b"x");
        assert!(channel.over_window());
        let mut woken = pin!(notify.notified());
        assert!(poll!(&mut woken).is_pending());
        input.read_u8().await.unwrap();
        assert!(!channel.over_window());
        assert!(poll!(&mut woken).is_ready());
    }

    #[tokio::test]
    async fn a_dropped_output_is_a_half_close_and_a_dropped_input_discards() {
        let (channel, input, mut output) = channel();
        output.write_all(b"end").await.unwrap();
        drop(output);
        assert_eq!(
            channel.pending(),
            Pending {
                bytes: 3,
                finished: true,
                aborted: false
            }
        );
        channel.deliver(b"unread");
        drop(input);
        channel.deliver(b"unwanted");
        assert!(channel.input_dropped());
        assert_eq!(channel.take_consumed(), 14);
        assert!(!channel.over_window());
    }
}
