//! SPDY inside WebSocket: the bytes of binary messages, one after the other, as a connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::conn::Transport;

/// Bytes that go into one message.
const MAX_DATA: usize = 32 * 1024;

pub(crate) struct Tunnel<T> {
    socket: WebSocketStream<T>,
    /// What is left of the message that is being read.
    message: Bytes,
}

impl<T: Transport> Tunnel<T> {
    pub fn new(socket: WebSocketStream<T>) -> Self {
        Self {
            socket,
            message: Bytes::new(),
        }
    }
}

impl<T: Transport> Transport for Tunnel<T> {
    fn peer_closed(&self) -> bool {
        self.socket.get_ref().peer_closed()
    }

    fn unsent(&self) -> usize {
        self.socket.get_ref().unsent()
    }
}

fn failed(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        error => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}

impl<T: Transport> AsyncRead for Tunnel<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.message.is_empty() {
            let message = ready!(Pin::new(&mut self.socket).poll_next(cx));
            match message.transpose().map_err(failed)? {
                None | Some(Message::Close(_)) => return Poll::Ready(Ok(())),
                Some(Message::Binary(message)) => self.message = message,
                Some(Message::Text(_)) => {
                    return Poll::Ready(Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "a text message in a tunnel",
                    )));
                }
                // Pings are answered by the library as it reads on.
                Some(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
            }
        }
        let count = self.message.len().min(buf.remaining());
        buf.put_slice(&self.message.split_to(count));
        Poll::Ready(Ok(()))
    }
}

impl<T: Transport> AsyncWrite for Tunnel<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(failed)?;
        let count = buf.len().min(MAX_DATA);
        let message = Message::Binary(Bytes::copy_from_slice(&buf[..count]));
        Pin::new(&mut self.socket)
            .start_send(message)
            .map_err(failed)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(failed)
    }

    /// Sends a close frame.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx).map_err(failed)
    }
}
