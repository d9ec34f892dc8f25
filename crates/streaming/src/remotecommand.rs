//! Exec and Attach: a client's streams brought together, the backend's call, the result.
//!
//! Over SPDY each stream is one that the client opens, named by its header `streamType`: `error`
//! always, `stdin`, `stdout` and `stderr` as the request says, `resize` with a terminal from v3 on.
//! They come in any order, and nothing is run before all are there. Over WebSocket they are the
//! channels 0 to 4, there from the start.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use gantry_ports::Error;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::backend::{AttachRequest, Backend, ExecRequest, Input, Output, Resizes, Stdio, Streams};
use crate::conn::Transport;
use crate::negotiate::{Encoding, Version};
use crate::resize;
use crate::server::Limits;
use crate::session::{Control, End};
use crate::spdy::Headers;
use crate::spdy::core::{Incoming, Policy};
use crate::spdy::session::Session;
use crate::status::Outcome;
use crate::websocket;

const STREAM_TYPE: &str = "streamtype";

/// Channel numbers of the WebSocket protocols.
mod channel {
    pub const STDIN: usize = 0;
    pub const STDOUT: usize = 1;
    pub const STDERR: usize = 2;
    pub const ERROR: usize = 3;
    pub const RESIZE: usize = 4;
    pub const COUNT: usize = 5;
}

/// What the client was granted.
pub(crate) enum Command {
    Exec(ExecRequest),
    Attach(AttachRequest),
}

impl Command {
    fn stdio(&self) -> Stdio {
        match self {
            Command::Exec(request) => request.stdio,
            Command::Attach(request) => request.stdio,
        }
    }
}

/// A client's streams, all there.
struct Ends {
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    resize: Option<Input>,
    error: Output,
    /// Our half of a stream that only the client writes to. A client takes its end for the end of
    /// the command, so that it stays until then.
    _held: Vec<Output>,
}

/// Serves a client over SPDY, to its end.
pub(crate) async fn spdy<T: Transport>(
    io: T,
    version: Version,
    command: Command,
    backend: &dyn Backend,
    limits: &Limits,
    stop: watch::Receiver<bool>,
) -> End {
    let control = Control::new();
    let (session, incoming) = Session::new(io, policy(), control.clone(), limits, stop);
    let user = async {
        let stdio = command.stdio();
        match collect(incoming, stdio, version, limits.creation_timeout).await {
            Some(ends) => run(ends, command, version, backend, &control).await,
            None => tracing::debug!("the client did not open the streams that it asked for"),
        }
        control.close();
    };
    let (end, ()) = tokio::join!(session.run(), user);
    end
}

/// Serves a client over WebSocket, to its end.
pub(crate) async fn websocket<T: Transport>(
    io: T,
    (version, encoding): (Version, Encoding),
    command: Command,
    backend: &dyn Backend,
    limits: &Limits,
    stop: watch::Receiver<bool>,
) -> End {
    let control = Control::new();
    let stdio = command.stdio();
    let options = websocket::Options {
        encoding,
        half_close: version >= Version::V5,
        channels: channel::COUNT,
        // Clients wait for a message on the first channel that can be written to.
        hello: Some(match stdio {
            Stdio { stdout: true, .. } => channel::STDOUT,
            Stdio { stderr: true, .. } => channel::STDERR,
            _ => channel::ERROR,
        }),
    };
    let (session, ends) = websocket::Session::new(io, options, control.clone(), limits, stop).await;
    let user = async {
        if let Some(ends) = from_channels(ends, stdio) {
            run(ends, command, version, backend, &control).await;
        }
        control.close();
    };
    let (end, ()) = tokio::join!(session.run(), user);
    end
}

/// Takes one stream of each known type.
fn policy() -> Policy {
    let mut seen = HashSet::new();
    Box::new(move |headers: &Headers| match headers.get(STREAM_TYPE) {
        Some(kind @ ("error" | "stdin" | "stdout" | "stderr" | "resize")) => {
            seen.insert(kind.to_owned())
        }
        _ => false,
    })
}

/// Waits until the client has opened all that it asked for. `None` when it does not within `limit`
/// or is gone before.
async fn collect(
    mut incoming: mpsc::Receiver<Incoming>,
    wanted: Stdio,
    version: Version,
    limit: Duration,
) -> Option<Ends> {
    let resizes = wanted.tty && version >= Version::V3;
    let (mut stdin, mut stdout, mut stderr, mut error, mut resize) = (None, None, None, None, None);
    let mut held = Vec::new();
    let all = async {
        while wanted.stdin && stdin.is_none()
            || wanted.stdout && stdout.is_none()
            || wanted.stderr && stderr.is_none()
            || resizes && resize.is_none()
            || error.is_none()
        {
            let Incoming {
                headers,
                input,
                output,
                ..
            } = incoming.recv().await?;
            match headers.get(STREAM_TYPE) {
                Some("stdin") if wanted.stdin => {
                    stdin = Some(input);
                    // v1 clients are used to see this end at once.
                    if version > Version::V1 {
                        held.push(output);
                    }
                }
                Some("stdout") if wanted.stdout => stdout = Some(output),
                Some("stderr") if wanted.stderr => stderr = Some(output),
                Some("resize") if resizes => {
                    resize = Some(input);
                    held.push(output);
                }
                Some("error") => error = Some(output),
                // Not asked for: at its end, and what it sends is discarded.
                _ => {}
            }
        }
        Some(())
    };
    timeout(limit, all).await.ok()??;
    Some(Ends {
        stdin,
        stdout,
        stderr,
        resize,
        error: error?,
        _held: held,
    })
}

fn from_channels(ends: Vec<(Input, Output)>, wanted: Stdio) -> Option<Ends> {
    let (inputs, outputs): (Vec<_>, Vec<_>) = ends
        .into_iter()
        .map(|(input, output)| (Some(input), Some(output)))
        .unzip();
    let (mut inputs, mut outputs) = (inputs, outputs);
    let mut input = |channel: usize| inputs.get_mut(channel).and_then(Option::take);
    let mut output = |channel: usize| outputs.get_mut(channel).and_then(Option::take);
    Some(Ends {
        stdin: input(channel::STDIN).filter(|_| wanted.stdin),
        stdout: output(channel::STDOUT).filter(|_| wanted.stdout),
        stderr: output(channel::STDERR).filter(|_| wanted.stderr),
        resize: input(channel::RESIZE).filter(|_| wanted.tty),
        error: output(channel::ERROR)?,
        _held: Vec::new(),
    })
}

/// Makes the backend's call and tells the client what became of it, after all output.
async fn run(
    ends: Ends,
    command: Command,
    version: Version,
    backend: &dyn Backend,
    control: &Arc<Control>,
) {
    let Ends {
        stdin,
        stdout,
        stderr,
        resize,
        mut error,
        _held,
    } = ends;
    let (sizes, receiver) = watch::channel(None);
    let outputs: Vec<_> = [&stdout, &stderr]
        .into_iter()
        .flatten()
        .map(Output::channel)
        .collect();
    let streams = Streams {
        stdin,
        stdout,
        stderr,
        resizes: Resizes::new(receiver),
        client: control.client(),
    };
    let resizes = async {
        if let Some(resize) = resize {
            resize::pump(resize, sizes).await;
        } else {
            drop(sizes);
        }
        std::future::pending().await
    };
    // Who takes back the stream for the result has no use for the rest.
    let result = error.channel();
    let taken_back = async {
        result.gone().await;
        control.set_gone();
        std::future::pending().await
    };
    // A client that is told nothing takes that for success.
    let call = AssertUnwindSafe(call(command, streams, backend)).catch_unwind();
    let outcome = tokio::select! {
        // A size that waits already is seen before the command starts.
        biased;
        never = resizes => never,
        never = taken_back => never,
        outcome = call => outcome.unwrap_or_else(|_| Outcome::Failed {
            what: "streaming",
            error: Error::internal("it panicked, see the log"),
        }),
    };
    control.set_ending(true);
    // Some clients take the result for the end of everything.
    for output in outputs {
        output.flushed().await;
    }
    // Fails when the client is gone, and then nobody wants to know.
    let _ = error.write_all(&outcome.encode(version)).await;
}

async fn call(command: Command, streams: Streams, backend: &dyn Backend) -> Outcome {
    match command {
        Command::Exec(request) => match backend.exec(request, streams).await {
            Ok(0) => Outcome::Success,
            Ok(code) => Outcome::Exit(code),
            Err(error) => Outcome::Failed {
                what: "error executing command in container",
                error,
            },
        },
        Command::Attach(request) => match backend.attach(request, streams).await {
            Ok(()) => Outcome::Success,
            Err(error) => Outcome::Failed {
                what: "error attaching to container",
                error,
            },
        },
    }
}
