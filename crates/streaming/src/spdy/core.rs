//! A session as a state machine: bytes from the client in, bytes for the client out, no I/O.
//!
//! The client opens streams, odd ids upwards. Each that the session's [`Policy`] takes is answered
//! with SYN_REPLY and handed to the session's user as [`Incoming`]; the user's bytes and half-closes
//! are picked up by [`Core::sweep`]:
//!
//! ```text
//!             SYN_STREAM, taken            FIN or RST_STREAM both ways,
//!   (none) ----------------------> open ----------------------------------> (none)
//!             refused: RST_STREAM          or the user is done with it
//! ```
//!
//! **Windows.** What the client may send is bounded by [`WINDOW`] a stream and [`SESSION_WINDOW`] a
//! session, both announced at the start and given back as bytes are consumed. The library that
//! kubelet, kubectl and crictl share neither keeps these windows nor ever sends WINDOW_UPDATE. So:
//!
//! - a client that sends more than its window is not reset; nothing more is read from its connection
//!   until the window fits again ([`Core::stalled`]);
//! - a client's own windows are kept from the moment it speaks of any (SETTINGS with a window, or
//!   WINDOW_UPDATE); until then the connection itself is the bound.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::sync::{Notify, mpsc};

use super::Decoder;
use super::frame::{self, Frame, FrameError, Goaway, Reset};
use super::headers::{CompressionError, HeaderWriter, Headers};
use super::window::{INITIAL, Window};
use crate::channel::{Channel, Input, Output, SESSION_WINDOW, WINDOW};

/// Streams that a client may have open at a time; a forwarded connection takes two.
pub(crate) const MAX_STREAMS: usize = 256;

/// Longest data frame that is sent.
const MAX_DATA: usize = 16 * 1024;

/// Data is put into the outgoing buffer up to here.
const OUT_DATA: usize = 64 * 1024;

/// Answers to frames are put into the outgoing buffer up to here; past it nothing is read.
const OUT_MAX: usize = 128 * 1024;

/// Decides about a new stream, by its headers, before it is answered.
pub(crate) type Policy = Box<dyn FnMut(&Headers) -> bool + Send>;

/// A stream that the client opened.
pub(crate) struct Incoming {
    pub id: u32,
    pub headers: Headers,
    pub input: Input,
    pub output: Output,
}

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Compression(#[from] CompressionError),
    #[error("stream {id} after stream {last}")]
    StreamId { id: u32, last: u32 },
    #[error("session window over 2^31 - 1")]
    Window,
}

pub(crate) struct Core {
    decoder: Decoder,
    headers: HeaderWriter,
    /// Bytes for the client.
    pub out: BytesMut,
    streams: BTreeMap<u32, Stream>,
    /// The client's last stream.
    last_id: u32,
    /// Whose data was sent last; the next one's turn is next.
    served: u32,
    policy: Policy,
    accepted: mpsc::Sender<Incoming>,
    notify: Arc<Notify>,
    peer: Peer,
    /// Consumed bytes for which the session's window was not given back yet.
    consumed: usize,
    /// Bytes that wait for users.
    queued: usize,
    /// A stream may be over its window.
    over: bool,
    closing: bool,
}

/// What the client said about its windows.
struct Peer {
    keeps_windows: bool,
    initial: i64,
    session: Window,
}

struct Stream {
    channel: Arc<Channel>,
    window: Window,
    /// Consumed bytes for which the stream's window was not given back yet.
    consumed: usize,
    fin_received: bool,
    fin_sent: bool,
}

impl Core {
    /// The state at the start of a session and the streams that the client will open. `notify` is
    /// woken by whatever a user does to a stream.
    pub fn new(policy: Policy, notify: Arc<Notify>) -> (Self, mpsc::Receiver<Incoming>) {
        let (accepted, incoming) = mpsc::channel(MAX_STREAMS);
        let mut out = BytesMut::new();
        let settings = [
            (frame::SETTINGS_MAX_CONCURRENT_STREAMS, MAX_STREAMS as u32),
            (frame::SETTINGS_INITIAL_WINDOW_SIZE, WINDOW as u32),
        ];
        frame::put_settings(&mut out, &settings);
        frame::put_window_update(&mut out, 0, (SESSION_WINDOW - INITIAL as usize) as u32);
        let core = Self {
            decoder: Decoder::default(),
            headers: HeaderWriter::default(),
            out,
            streams: BTreeMap::new(),
            last_id: 0,
            served: 0,
            policy,
            accepted,
            notify,
            peer: Peer {
                keeps_windows: false,
                initial: INITIAL,
                session: Window::new(INITIAL),
            },
            consumed: 0,
            queued: 0,
            over: false,
            closing: false,
        };
        (core, incoming)
    }

    /// Handles the frames at the front of `input`, as far as they are there and the session is not
    /// stalled. An error ends the session.
    pub fn receive(&mut self, input: &mut BytesMut) -> Result<(), Error> {
        while !self.stalled() {
            match self.decoder.decode(input)? {
                Some(frame) => self.handle(frame)?,
                None => break,
            }
        }
        Ok(())
    }

    /// The client sent more than its users, or its own reading, keep up with: nothing is to be read
    /// until this is false.
    pub fn stalled(&mut self) -> bool {
        // Only what is delivered puts a stream over its window, so that a frame does not cost a look
        // at every stream.
        self.over = self.over
            && self
                .streams
                .values()
                .any(|stream| stream.channel.over_window());
        self.over || self.out.len() > OUT_MAX || self.queued > SESSION_WINDOW
    }

    fn handle(&mut self, frame: Frame) -> Result<(), Error> {
        match frame {
            Frame::SynStream {
                id,
                fin,
                unidirectional,
                headers,
            } => {
                if id <= self.last_id || id.is_multiple_of(2) {
                    let last = self.last_id;
                    return Err(Error::StreamId { id, last });
                }
                self.last_id = id;
                match headers {
                    Ok(headers) => self.open(id, headers, fin, unidirectional)?,
                    Err(_) => self.reset(id, Reset::ProtocolError),
                }
            }
            Frame::Data { id, bytes, fin } => self.data(id, &bytes, fin),
            Frame::Headers { id, fin, .. } => {
                if fin {
                    self.data(id, &[], true);
                }
            }
            Frame::RstStream { id, .. } => {
                if let Some(stream) = self.streams.get(&id) {
                    stream.channel.reset();
                }
                self.forget(id);
            }
            Frame::Settings(entries) => {
                for (id, value) in entries {
                    if id == frame::SETTINGS_INITIAL_WINDOW_SIZE {
                        self.initial_window(value)?;
                    }
                }
            }
            Frame::WindowUpdate { id, delta } => self.window_update(id, delta)?,
            // Even ids would answer pings of ours, and we send none.
            Frame::Ping(id) if id % 2 == 1 => frame::put_ping(&mut self.out, id),
            Frame::Goaway { .. } => self.closing = true,
            Frame::Ping(_) | Frame::SynReply { .. } | Frame::Unknown(_) => {}
        }
        Ok(())
    }

    fn open(
        &mut self,
        id: u32,
        headers: Headers,
        fin: bool,
        unidirectional: bool,
    ) -> Result<(), Error> {
        if self.closing || self.streams.len() >= MAX_STREAMS || !(self.policy)(&headers) {
            self.reset(id, Reset::RefusedStream);
            return Ok(());
        }
        let (channel, input, output) = Channel::new(self.notify.clone());
        let incoming = Incoming {
            id,
            headers,
            input,
            output,
        };
        if self.accepted.try_send(incoming).is_err() {
            self.reset(id, Reset::RefusedStream);
            return Ok(());
        }
        if unidirectional {
            channel.finish_outgoing();
        } else {
            frame::put_syn_reply(&mut self.out, id, &mut self.headers)?;
        }
        if fin {
            channel.finish_incoming();
        }
        let stream = Stream {
            channel,
            window: Window::new(self.peer.initial),
            consumed: 0,
            fin_received: fin,
            fin_sent: unidirectional,
        };
        self.streams.insert(id, stream);
        Ok(())
    }

    fn data(&mut self, id: u32, bytes: &[u8], fin: bool) {
        let Some(stream) = self.streams.get_mut(&id) else {
            // Of a stream that is over, which its client may not know yet, or that never was.
            self.consumed += bytes.len();
            if id > self.last_id || id.is_multiple_of(2) {
                self.reset(id, Reset::InvalidStream);
            }
            return;
        };
        if stream.fin_received {
            self.consumed += bytes.len();
            self.reset(id, Reset::StreamAlreadyClosed);
            return;
        }
        self.over |= stream.channel.deliver(bytes);
        self.queued += bytes.len();
        if fin {
            stream.fin_received = true;
            stream.channel.finish_incoming();
        }
    }

    fn initial_window(&mut self, size: u32) -> Result<(), Error> {
        let size = i64::from(size);
        let delta = size - self.peer.initial;
        Window::new(0).add(size).map_err(|_| Error::Window)?;
        self.peer.keeps_windows = true;
        self.peer.initial = size;
        for stream in self.streams.values_mut() {
            stream.window.add(delta).map_err(|_| Error::Window)?;
        }
        Ok(())
    }

    fn window_update(&mut self, id: u32, delta: u32) -> Result<(), Error> {
        self.peer.keeps_windows = true;
        let delta = i64::from(delta);
        if id == 0 {
            return self.peer.session.add(delta).map_err(|_| Error::Window);
        }
        // A stream that is over may still be given room.
        let Some(stream) = self.streams.get_mut(&id) else {
            return Ok(());
        };
        if stream.window.add(delta).is_err() {
            self.reset(id, Reset::FlowControlError);
        }
        Ok(())
    }

    /// Ends a stream from our side.
    fn reset(&mut self, id: u32, status: Reset) {
        frame::put_rst_stream(&mut self.out, id, status);
        self.forget(id);
    }

    fn forget(&mut self, id: u32) {
        if let Some(stream) = self.streams.remove(&id) {
            stream.channel.disconnect();
            // Its user may go on reading; the session does not count that.
            let held = stream.channel.take_held();
            self.consumed += held;
            self.queued = self.queued.saturating_sub(held);
        }
    }

    /// Picks up what users did since the last time: gives windows back, sends data and half-closes
    /// in turn as far as windows and the outgoing buffer allow, drops streams that are over.
    pub fn sweep(&mut self) {
        self.give_windows_back();
        self.send_data();
        // A stream that both sides have finished is kept until its user has read it all.
        let over = |stream: &Stream| stream.fin_sent && stream.channel.input_dropped();
        let over: Vec<u32> = self
            .streams
            .iter()
            .filter(|(_, stream)| over(stream))
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            self.forget(id);
        }
    }

    fn give_windows_back(&mut self) {
        for (id, stream) in &mut self.streams {
            let consumed = stream.channel.take_consumed();
            self.consumed += consumed;
            self.queued = self.queued.saturating_sub(consumed);
            stream.consumed += consumed;
            if stream.consumed >= WINDOW / 2 && !stream.fin_received {
                frame::put_window_update(&mut self.out, *id, stream.consumed as u32);
                stream.consumed = 0;
            }
        }
        if self.consumed >= SESSION_WINDOW / 2 {
            frame::put_window_update(&mut self.out, 0, self.consumed as u32);
            self.consumed = 0;
        }
    }

    fn send_data(&mut self) {
        let aborted: Vec<u32> = self
            .streams
            .iter()
            .filter(|(_, stream)| stream.channel.pending().aborted)
            .map(|(id, _)| *id)
            .collect();
        for id in aborted {
            self.reset(id, Reset::Cancel);
        }
        // Streams that have something to send, the one after the last served first.
        let (before, after): (Vec<u32>, Vec<u32>) = self
            .streams
            .iter()
            .filter(|(_, stream)| !stream.fin_sent)
            .map(|(id, _)| *id)
            .partition(|id| *id <= self.served);
        let order: Vec<u32> = after.into_iter().chain(before).collect();
        let mut progress = true;
        while progress && self.out.len() < OUT_DATA {
            progress = false;
            for id in &order {
                if self.out.len() >= OUT_DATA {
                    return;
                }
                progress |= self.send_one(*id);
            }
        }
    }

    /// Sends one frame of a stream, if it has one and its windows allow.
    fn send_one(&mut self, id: u32) -> bool {
        let Some(stream) = self.streams.get_mut(&id) else {
            return false;
        };
        if stream.fin_sent {
            return false;
        }
        let pending = stream.channel.pending();
        let mut length = pending.bytes.min(MAX_DATA);
        if self.peer.keeps_windows {
            length = length.min(stream.window.available());
            length = length.min(self.peer.session.available());
        }
        let fin = pending.finished && length == pending.bytes;
        if length == 0 && !fin {
            return false;
        }
        frame::put_data_head(&mut self.out, id, length, fin);
        // The user only adds to the queue, so that what was pending is still there.
        stream.channel.pull(length, &mut self.out);
        stream.window.spend(length);
        self.peer.session.spend(length);
        stream.fin_sent = fin;
        self.served = id;
        true
    }

    /// Says something that needs no answer: SETTINGS of nothing.
    pub fn probe(&mut self) {
        frame::put_settings(&mut self.out, &[]);
    }

    /// The client or the session's user wants to end: no new streams.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// The session is ending and every stream has been sent to its end.
    pub fn drained(&self) -> bool {
        self.closing && self.streams.values().all(|stream| stream.fin_sent)
    }

    /// Whether something waits for the client to take it.
    pub fn owes(&self) -> bool {
        let waits = |stream: &Stream| !stream.fin_sent && stream.channel.pending().bytes > 0;
        !self.out.is_empty() || self.streams.values().any(waits)
    }

    /// Ends every user's writing; what is queued is still sent.
    pub fn finish_all(&self) {
        for stream in self.streams.values() {
            stream.channel.finish_outgoing();
        }
    }

    /// The connection is over: users are told.
    pub fn end(&mut self) {
        for (_, stream) in std::mem::take(&mut self.streams) {
            stream.channel.disconnect();
        }
    }

    pub fn goaway(&mut self, status: Goaway) {
        frame::put_goaway(&mut self.out, self.last_id, status);
    }
}
