//! PortForward: many connections to a pod's ports over one client connection.
//!
//! Over SPDY, also inside a WebSocket, the client opens a pair of streams for each connection: their
//! header `streamType` says `data` or `error`, `port` where to, and `requestID` which two belong
//! together. The error stream carries the words of a failure and ends with the connection. Over
//! WebSocket alone the ports are those of the CRI request, each with two channels that are there
//! from the start and begin with the port's number.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use gantry_types::PodId;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::backend::{Backend, Duplex, Output, PortForwardRequest};
use crate::conn::Transport;
use crate::negotiate::Encoding;
use crate::server::Limits;
use crate::session::{Control, End};
use crate::spdy::Headers;
use crate::spdy::core::{Incoming, MAX_STREAMS, Policy};
use crate::spdy::session::Session;
use crate::websocket;

const STREAM_TYPE: &str = "streamtype";
const PORT: &str = "port";
const REQUEST_ID: &str = "requestid";

/// Connections into the pod that a session may have at a time; each has two streams.
const MAX_FORWARDS: usize = MAX_STREAMS / 2;

/// Serves a client over SPDY, to its end.
pub(crate) async fn spdy<T: Transport>(
    io: T,
    pod: PodId,
    backend: Arc<dyn Backend>,
    limits: &Limits,
    stop: watch::Receiver<bool>,
) -> End {
    let control = Control::new();
    let policy: Policy = Box::new(|headers| Kind::of(headers).is_some() && port(headers).is_some());
    let (session, incoming) = Session::new(io, policy, control.clone(), limits, stop);
    let user = forward_pairs(incoming, pod, backend, limits.creation_timeout, &control);
    let (end, ()) = tokio::join!(session.run(), user);
    end
}

/// Serves a client over WebSocket channels, to its end or that of all connections.
pub(crate) async fn websocket<T: Transport>(
    io: T,
    encoding: Encoding,
    request: PortForwardRequest,
    backend: Arc<dyn Backend>,
    limits: &Limits,
    stop: watch::Receiver<bool>,
) -> End {
    let control = Control::new();
    let options = websocket::Options {
        encoding,
        half_close: false,
        channels: request.ports.len() * 2,
        hello: None,
    };
    let (session, ends) = websocket::Session::new(io, options, control.clone(), limits, stop).await;
    let user = async {
        let (mut forwards, mut ends) = (JoinSet::new(), ends.into_iter());
        for port in request.ports {
            let (Some((input, mut data)), Some((_, mut error))) = (ends.next(), ends.next()) else {
                break;
            };
            // Fits the empty queue of a new channel.
            let number = port.to_le_bytes();
            if data.write_all(&number).await.is_ok() && error.write_all(&number).await.is_ok() {
                let (pod, backend) = (request.pod.clone(), backend.clone());
                forwards.spawn(forward(pod, port, Duplex::new(input, data), error, backend));
            }
        }
        let mut client = control.client();
        tokio::select! {
            () = async { while forwards.join_next().await.is_some() {} } => {}
            () = client.gone() => forwards.shutdown().await,
        }
        control.close();
    };
    let (end, ()) = tokio::join!(session.run(), user);
    end
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data,
    Error,
}

impl Kind {
    fn of(headers: &Headers) -> Option<Self> {
        match headers.get(STREAM_TYPE)? {
            "data" => Some(Kind::Data),
            "error" => Some(Kind::Error),
            _ => None,
        }
    }
}

fn port(headers: &Headers) -> Option<u16> {
    headers.get(PORT)?.parse().ok().filter(|port| *port > 0)
}

/// What two streams have in common. Clients that name none open the error stream first and the data
/// stream next, two ids on.
fn request_id(incoming: &Incoming, kind: Kind) -> String {
    match (incoming.headers.get(REQUEST_ID), kind) {
        (Some(id), _) if !id.is_empty() => id.to_owned(),
        (_, Kind::Error) => incoming.id.to_string(),
        (_, Kind::Data) => incoming.id.saturating_sub(2).to_string(),
    }
}

/// A pair of which one stream, or none yet, is there.
struct Half {
    data: Option<Incoming>,
    error: Option<Incoming>,
    expires: Instant,
}

impl Half {
    fn slot(&mut self, kind: Kind) -> &mut Option<Incoming> {
        match kind {
            Kind::Data => &mut self.data,
            Kind::Error => &mut self.error,
        }
    }

    fn was_reset(&self) -> bool {
        let streams = [&self.data, &self.error];
        streams
            .into_iter()
            .flatten()
            .any(|stream| stream.output.channel().was_reset())
    }
}

/// Starts a connection for each pair of streams, until the session is over.
async fn forward_pairs(
    mut incoming: mpsc::Receiver<Incoming>,
    pod: PodId,
    backend: Arc<dyn Backend>,
    limit: Duration,
    control: &Control,
) {
    let mut client = control.client();
    // Half pairs are open streams, and the session bounds how many there are. One that was reset
    // does not count there any more, so it must not stay here.
    let mut halves: HashMap<String, Half> = HashMap::new();
    let mut forwards = JoinSet::new();
    loop {
        let expires = halves.values().map(|half| half.expires).min();
        control.set_ending(forwards.is_empty());
        tokio::select! {
            // A session that is held back by a pod does not see the end of its client's streams.
            () = client.gone() => break,
            next = incoming.recv() => {
                let Some(next) = next else { break };
                halves.retain(|_, half| !half.was_reset());
                let Some(kind) = Kind::of(&next.headers) else { continue };
                let id = request_id(&next, kind);
                let half = halves.entry(id.clone()).or_insert_with(|| Half {
                    data: None,
                    error: None,
                    expires: Instant::now() + limit,
                });
                if half.slot(kind).is_some() {
                    next.output.channel().abort();
                    // Once: what is said again and again fills the queue of who does not read.
                    if let Some(mut half) = halves.remove(&id) {
                        let what = "two streams of one type for a connection";
                        complain(half.error.as_mut(), what).await;
                    }
                    continue;
                }
                *half.slot(kind) = Some(next);
                if half.data.is_none() || half.error.is_none() {
                    continue;
                }
                // The session counts no stream that was reset, but its connection may be about to end.
                while forwards.try_join_next().is_some() {}
                if let Some(Half { data: Some(data), error: Some(mut error), .. }) = halves.remove(&id)
                    && let Some(port) = port(&data.headers)
                {
                    if forwards.len() >= MAX_FORWARDS {
                        data.output.channel().abort();
                        complain(Some(&mut error), "too many connections in one session").await;
                        continue;
                    }
                    let stream = Duplex::new(data.input, data.output);
                    let (pod, backend) = (pod.clone(), backend.clone());
                    forwards.spawn(forward(pod, port, stream, error.output, backend));
                }
            }
            Some(_) = forwards.join_next() => {}
            () = sleep_until(expires.unwrap_or_else(Instant::now)), if expires.is_some() => {
                let now = Instant::now();
                for (_, mut half) in halves.extract_if(|_, half| half.expires <= now) {
                    complain(half.error.as_mut(), "the other stream of the connection did not come")
                        .await;
                }
            }
        }
    }
    // The client is gone: nobody is left to forward for.
    forwards.shutdown().await;
}

/// Says on an error stream what is wrong.
async fn complain(error: Option<&mut Incoming>, what: &str) {
    if let Some(error) = error {
        // Fits the empty queue of a stream that nothing was written to; fails when it is gone.
        let _ = error.output.write_all(what.as_bytes()).await;
    }
}

/// Forwards one connection.
async fn forward(
    pod: PodId,
    port: u16,
    stream: Duplex,
    mut error: Output,
    backend: Arc<dyn Backend>,
) {
    let data = stream.channel();
    let ended = tokio::select! {
        ended = backend.port_forward(&pod, port, stream) => ended,
        // Also when nothing moves that would fail. kubectl does so with each connection that is over
        // at its end; told of a failure, it would end the whole session.
        () = data.gone() => return,
    };
    if let Err(failure) = ended {
        if data.was_reset() {
            return;
        }
        tracing::debug!(%pod, port, error = %failure, "port forward failed");
        let text = format!("error forwarding port {port} to pod {pod}: {failure}");
        // Fails when the client is gone, and then nobody wants to know.
        let _ = error.write_all(text.as_bytes()).await;
        data.abort();
    }
}
