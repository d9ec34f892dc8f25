//! What the streaming server asks of this node, done by the supervisor: clients' streams meet those
//! of processes and pods here.

use std::future::pending;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use gantry_ports::Error;
use gantry_streaming::{
    AttachRequest, Backend, Client, Drain, Duplex, ExecRequest, ProcessIo, Streams, feed, relay,
    splice,
};
use gantry_supervisor::{Exec, ExecIo, Forward, Stdio, Supervisor, TerminalSize};
use gantry_types::{ErrorKind, Kind, PodId};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// The pods of this node.
pub struct Node {
    supervisor: Supervisor,
    drain: Drain,
}

impl Node {
    /// `stall` is how long a client may take nothing of what is left at the end.
    pub fn new(supervisor: Supervisor, stall: Duration) -> Self {
        let silence = supervisor.settings().timeouts.exec_drain;
        let drain = Drain { silence, stall };
        Self { supervisor, drain }
    }
}

fn failed(error: gantry_supervisor::Error) -> Error {
    Error::new(error.kind(), error.to_string())
}

fn client_gone() -> Error {
    Error::new(ErrorKind::Unavailable, "the client has gone")
}

/// What of a process is wanted that has a terminal if `tty`.
fn stdio(wanted: gantry_streaming::Stdio, tty: bool) -> Stdio {
    Stdio {
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr && !tty,
    }
}

fn size(size: gantry_streaming::TerminalSize) -> TerminalSize {
    TerminalSize {
        width: size.width,
        height: size.height,
    }
}

/// The outcome of `work`, unless the client goes first.
async fn while_there<T>(client: &mut Client, work: impl Future<Output = T>) -> Result<T, Error> {
    tokio::select! {
        biased;
        // First: what the work sees of a client that is gone is of no account any more.
        () = client.gone() => Err(client_gone()),
        outcome = work => Ok(outcome),
    }
}

#[async_trait]
impl Backend for Node {
    /// A client that goes away takes along its ends of the streams: the command sees the end of its
    /// input, or its terminal hangs up. What still runs after the grace is killed, and what the
    /// command leaves behind when it ends before.
    async fn exec(&self, request: ExecRequest, streams: Streams) -> Result<i32, Error> {
        let Streams {
            stdin,
            stdout,
            stderr,
            mut resizes,
            mut client,
        } = streams;
        let grace = self.supervisor.settings().timeouts.exec_grace;
        // A size that is known already spares the command a first look at a wrong one.
        let terminal = request.stdio.tty.then(|| {
            let known = resizes.next().now_or_never().flatten();
            known.map(size).unwrap_or_default()
        });
        let id = request.container.as_str();
        let stdio = stdio(request.stdio, request.stdio.tty);
        let start = self.supervisor.exec(id, request.command, stdio, terminal);
        let Exec {
            io,
            terminal,
            mut process,
        } = while_there(&mut client, start).await?.map_err(failed)?;
        let io = match io {
            ExecIo::Pipes {
                stdin,
                stdout,
                stderr,
            } => ProcessIo::pipes(stdin, stdout, stderr),
            ExecIo::Terminal(master) => ProcessIo::terminal(master),
        };
        let io = io.map_err(|error| Error::io("take over the command's streams", error))?;
        let ended = AtomicBool::new(false);
        {
            let clients = (stdin, stdout, stderr);
            let exit = async {
                let code = process.exit().await;
                ended.store(true, Relaxed);
                code
            };
            let relayed = relay(clients, io, exit, self.drain);
            let resized = async {
                while let Some(new) = resizes.next().await {
                    if let Some(terminal) = &terminal
                        && let Err(error) = terminal.resize(size(new))
                    {
                        tracing::debug!(%error, "a command's terminal");
                    }
                }
                pending::<()>().await;
            };
            let session = async {
                tokio::select! {
                    code = relayed => code,
                    () = resized => pending().await,
                }
            };
            if let Ok(code) = while_there(&mut client, session).await {
                return code.map_err(failed);
            }
        }
        drop(terminal);
        if ended.load(Relaxed) {
            // Before its client left, who may have meant what it began to stay.
            return process.exit().await.map_err(failed);
        }
        let code = timeout(grace, process.exit()).await;
        process.kill().await.map_err(failed)?;
        match code {
            Ok(code) => code.map_err(failed),
            Err(_) => Err(client_gone()),
        }
    }

    /// Lasts until the container ends, the client goes, or its input ends that others may use after
    /// it.
    async fn attach(&self, request: AttachRequest, streams: Streams) -> Result<(), Error> {
        let Streams {
            stdin,
            stdout,
            stderr,
            mut resizes,
            mut client,
        } = streams;
        let id = request.container.as_str();
        let view = self.supervisor.running_container(id).await;
        let view = view.map_err(failed)?;
        // The container's own: what the client has asked for cannot change it.
        let tty = view.facts.config.tty;
        let last_input = view.facts.config.stdin_once && !tty;
        let attach = self.supervisor.attach(id, stdio(request.stdio, tty));
        let attached = while_there(&mut client, attach).await?.map_err(failed)?;
        let output = ProcessIo::pipes(None, attached.stdout, attached.stderr);
        let output =
            output.map_err(|error| Error::io("take over the container's output", error))?;

        // The container's end is followed by the rest of its output. Being cut off is not: the
        // client would never take it.
        let (cut, was_cut) = oneshot::channel();
        let end = attached.end;
        let ended = async move {
            if let Err(error) = end.wait().await {
                // Received below, by who then drops this.
                let _ = cut.send(error);
                pending::<()>().await;
            }
        };
        let shown = relay((None, stdout, stderr), output, ended, self.drain);
        let input = async {
            let ended = match (stdin, attached.stdin) {
                (Some(from), Some(to)) => feed(from, to).await.unwrap_or_else(|error| {
                    tracing::debug!(container = id, %error, "a container's input");
                    false
                }),
                // There is nobody to write to.
                (_, None) | (None, _) => false,
            };
            if !ended || last_input {
                pending::<()>().await;
            }
        };
        let resized = async {
            while let Some(new) = resizes.next().await {
                if let Err(error) = attached.terminal.resize(size(new)).await {
                    tracing::debug!(container = id, %error, "a container's terminal");
                }
            }
            pending::<()>().await;
        };
        let session = async {
            tokio::select! {
                () = shown => Ok(()),
                Ok(error) = was_cut => Err(failed(error)),
                () = input => Ok(()),
                () = resized => Ok(()),
            }
        };
        while_there(&mut client, pin!(session)).await?
    }

    async fn port_forward(&self, pod: &PodId, port: u16, stream: Duplex) -> Result<(), Error> {
        let connect = self.supervisor.port_forward(pod.as_str(), port);
        let Forward {
            stream: socket,
            permit: _permit,
        } = connect.await.map_err(failed)?;
        // Told to the client as an end: for clients an error is the end of all connections.
        match splice(stream, socket, self.drain.stall).await {
            Ok(moved) => tracing::debug!(%pod, port, ?moved, "forwarded"),
            Err(error) => tracing::debug!(%pod, port, %error, "a forwarded connection broke"),
        }
        Ok(())
    }
}
