//! WebSocket (RFC 6455) with Kubernetes' channels: each message carries its channel's number first.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{Sink, Stream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite;
use tungstenite::Message;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

use crate::channel::{Channel, Input, Output, SESSION_WINDOW};
use crate::conn::Transport;
use crate::negotiate::Encoding;
use crate::server::Limits;
use crate::session::{Control, End, Farewell, Idle, LOOK, PROBE, stopped};

/// Longest message that is taken: a mebibyte and its channel's number. Clients that send a file at
/// once make long ones.
const MAX_MESSAGE: usize = 1024 * 1024 + 1;

/// Bytes of a channel that go into one message.
const MAX_DATA: usize = 32 * 1024;

const BUFFER: usize = 16 * 1024;

/// Channels that base64 protocols can tell apart: the number is one character from `0` on, and text
/// has one byte for those up to 127 alone.
pub(crate) const BASE64_CHANNELS: usize = 128 - b'0' as usize;

/// The number that half-closes the channel after it, from v5 on.
const CLOSE_CHANNEL: u8 = 255;

/// A WebSocket over a connection on which the handshake is done.
pub(crate) async fn wrap<T: Transport>(io: T) -> WebSocketStream<T> {
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER)
        .write_buffer_size(BUFFER)
        .max_write_buffer_size(BUFFER + 4 * MAX_DATA)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}

/// How messages are to be read and written.
pub(crate) struct Options {
    pub encoding: Encoding,
    /// Clients half-close channels (v5).
    pub half_close: bool,
    /// Channels there are, from 0 on.
    pub channels: usize,
    /// A channel on which an empty message says that the session stands.
    pub hello: Option<usize>,
}

pub(crate) struct Session<T> {
    socket: WebSocketStream<T>,
    options: Options,
    channels: Vec<Arc<Channel>>,
    /// The channel that was sent last; the next one's turn is next.
    served: usize,
    /// A message that waits until the socket takes it.
    pending: Option<Message>,
    unflushed: bool,
    write_first: bool,
    control: Arc<Control>,
    idle: Idle,
    stop: watch::Receiver<bool>,
}

/// What one step did.
enum Step {
    Read(Message),
    /// The connection is over, or broke.
    Closed,
    /// The client broke the protocol.
    Broken(String),
    Wrote,
}

impl<T: Transport> Session<T> {
    /// A session over `io`, and both ends of each channel for its user.
    pub async fn new(
        io: T,
        options: Options,
        control: Arc<Control>,
        limits: &Limits,
        stop: watch::Receiver<bool>,
    ) -> (Self, Vec<(Input, Output)>) {
        let mut channels = Vec::with_capacity(options.channels);
        let mut ends = Vec::with_capacity(options.channels);
        for _ in 0..options.channels {
            let (channel, input, output) = Channel::new(control.notify.clone());
            channels.push(channel);
            ends.push((input, output));
        }
        let pending = options
            .hello
            .map(|channel| options.encode(channel, BytesMut::new()));
        let session = Self {
            socket: wrap(io).await,
            options,
            channels,
            served: 0,
            pending,
            unflushed: false,
            write_first: false,
            control,
            idle: Idle::new(limits),
            stop,
        };
        (session, ends)
    }

    /// Moves bytes until the session ends, however it ends; then its users have been told.
    pub async fn run(mut self) -> End {
        let end = self.serve().await;
        if !matches!(end, End::Done) {
            self.control.set_gone();
        }
        for channel in &self.channels {
            channel.disconnect();
        }
        let code = match &end {
            End::Done => CloseCode::Normal,
            End::Idle | End::Stopped => CloseCode::Away,
            End::Broken(_) => CloseCode::Protocol,
            End::Gone => return end,
        };
        let farewell = self.idle.farewell(&end);
        self.say_goodbye(code, farewell).await;
        end
    }

    /// Says goodbye after all that was sent, and waits for the client to do so too.
    async fn say_goodbye(&mut self, code: CloseCode, mut farewell: Farewell) {
        let reason = "".into();
        self.pending = Some(Message::Close(Some(CloseFrame { code, reason })));
        let mut stop = self.stop.clone();
        let (mut reading, mut hurried) = (true, false);
        loop {
            let waits = usize::from(self.pending.is_some()) + usize::from(self.unflushed);
            farewell.left(waits + self.socket.get_ref().unsent());
            tokio::select! {
                step = self.step(reading) => match step {
                    // Whatever it still sends is for nobody.
                    Step::Read(_) | Step::Wrote => {}
                    // What it sends makes no sense, or it sends no more; it may still read.
                    Step::Closed | Step::Broken(_) if reading && !farewell.delivered() => {
                        reading = false;
                        farewell.hurry();
                    }
                    Step::Closed | Step::Broken(_) => return,
                },
                () = sleep(LOOK), if !farewell.delivered() => {}
                () = sleep_until(farewell.deadline) => return,
                () = stopped(&mut stop), if !hurried => {
                    hurried = true;
                    farewell.hurry();
                }
            }
        }
    }

    async fn serve(&mut self) -> End {
        let control = self.control.clone();
        let mut stop = self.stop.clone();
        let mut probing = false;
        // Kept over other events, which may come all the time.
        let mut probe_at = None;
        loop {
            let closing = control.closing();
            if self.pending.is_none() {
                self.pending = self.next_message();
            }
            if closing && self.pending.is_none() && !self.unflushed {
                return End::Done;
            }
            let stalled = self.stalled();
            probe_at = match (stalled, probe_at) {
                (false, _) => None,
                (true, None) => Some(Instant::now() + PROBE),
                (true, at) => at,
            };
            let owes = self.pending.is_some() || self.unflushed;
            let deadline = self.idle.deadline(control.ending() && owes);
            tokio::select! {
                step = self.step(!stalled) => match step {
                    Step::Read(message) => {
                        self.idle.received();
                        if let Err(reason) = self.receive(message) {
                            return End::Broken(reason.into());
                        }
                    }
                    Step::Closed => return End::Gone,
                    Step::Broken(reason) => return End::Broken(reason),
                    // A probe is nothing that moves.
                    Step::Wrote if probing => probing = self.unflushed,
                    Step::Wrote => self.idle.sent(),
                },
                () = control.notify.notified() => {}
                () = sleep_until(deadline) => return End::Idle,
                () = stopped(&mut stop) => return End::Stopped,
                () = sleep_until(probe_at.unwrap_or(deadline)), if stalled => {
                    probe_at = None;
                    if self.socket.get_ref().peer_closed() {
                        control.set_gone();
                    }
                    if self.pending.is_none() && !self.unflushed {
                        // Needs no answer (RFC 6455, 5.5.3).
                        self.pending = Some(Message::Pong(Bytes::new()));
                        probing = true;
                    }
                }
            }
        }
    }

    /// The client sent more than its users keep up with: nothing is read until this is false.
    fn stalled(&self) -> bool {
        let queued: usize = self.channels.iter().map(|channel| channel.queued()).sum();
        queued > SESSION_WINDOW || self.channels.iter().any(|channel| channel.over_window())
    }

    /// Reads a message, if `read`, or writes what waits, whichever can be done. May be dropped and
    /// called again without loss.
    async fn step(&mut self, read: bool) -> Step {
        poll_fn(|cx| {
            // Taking turns, so that neither direction starves the other.
            self.write_first = !self.write_first;
            for write in [self.write_first, !self.write_first] {
                let polled = match write {
                    true => self.poll_write(cx),
                    false if read => self.poll_read(cx),
                    false => Poll::Pending,
                };
                if polled.is_ready() {
                    return polled;
                }
            }
            Poll::Pending
        })
        .await
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        Pin::new(&mut self.socket)
            .poll_next(cx)
            .map(|message| match message {
                Some(Ok(message)) => Step::Read(message),
                None | Some(Err(tungstenite::Error::Io(_))) => Step::Closed,
                // A connection that is cut off is no fault of the client's.
                Some(Err(tungstenite::Error::Protocol(
                    tungstenite::error::ProtocolError::ResetWithoutClosingHandshake,
                ))) => Step::Closed,
                Some(Err(error)) => Step::Broken(error.to_string()),
            })
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        let mut socket = Pin::new(&mut self.socket);
        if self.pending.is_some() {
            match socket.as_mut().poll_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(Step::Closed),
                Poll::Pending => return Poll::Pending,
            }
            if let Some(message) = self.pending.take() {
                self.unflushed = true;
                if socket.start_send(message).is_err() {
                    return Poll::Ready(Step::Closed);
                }
            }
            return Poll::Ready(Step::Wrote);
        }
        if !self.unflushed {
            return Poll::Pending;
        }
        socket.poll_flush(cx).map(|result| match result {
            Ok(()) => {
                self.unflushed = false;
                Step::Wrote
            }
            Err(_) => Step::Closed,
        })
    }

    /// The next channel's bytes as a message.
    fn next_message(&mut self) -> Option<Message> {
        let count = self.channels.len();
        for offset in 1..=count {
            let number = (self.served + offset) % count;
            let mut data = BytesMut::new();
            if self.channels[number].pull(MAX_DATA, &mut data) > 0 {
                self.served = number;
                return Some(self.options.encode(number, data));
            }
        }
        None
    }

    fn receive(&mut self, message: Message) -> Result<(), &'static str> {
        match message {
            Message::Binary(data) => self.data(data),
            Message::Text(text) => self.data(text.into()),
            Message::Ping(_) => {
                // The answer is queued; flushing sends it.
                self.unflushed = true;
                Ok(())
            }
            // A close is answered by the library, and the next read ends.
            Message::Pong(_) | Message::Close(_) | Message::Frame(_) => Ok(()),
        }
    }

    fn data(&mut self, data: Bytes) -> Result<(), &'static str> {
        let Some((number, data)) = data.split_first() else {
            return Ok(());
        };
        if self.options.half_close && *number == CLOSE_CHANNEL {
            let [number] = data else {
                return Err("a half-close names one channel");
            };
            let channel = self.channels.get(usize::from(*number));
            channel
                .ok_or("half-close of a channel that is not there")?
                .finish_incoming();
            return Ok(());
        }
        let decoded;
        let (number, data) = match self.options.encoding {
            Encoding::Binary => (*number, data),
            Encoding::Base64 => {
                decoded = STANDARD
                    .decode(data)
                    .map_err(|_| "a message that is not base64")?;
                (number.wrapping_sub(b'0'), &decoded[..])
            }
        };
        // Other channels than there are carry nothing that anybody wants.
        if let Some(channel) = self.channels.get(usize::from(number)) {
            channel.deliver(data);
        }
        Ok(())
    }
}

impl Options {
    /// A message with a channel's bytes. Channels are few enough for one byte, or one digit.
    fn encode(&self, channel: usize, data: BytesMut) -> Message {
        let number = channel as u8;
        match self.encoding {
            Encoding::Binary => {
                let mut message = BytesMut::with_capacity(1 + data.len());
                message.put_u8(number);
                message.put_slice(&data);
                Message::Binary(message.freeze())
            }
            Encoding::Base64 => {
                let mut message = String::from(char::from(b'0'.wrapping_add(number)));
                STANDARD.encode_string(&data, &mut message);
                Message::text(message)
            }
        }
    }
}
