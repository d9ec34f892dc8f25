//! What the streaming server asks of this node, done by the supervisor: clients' streams meet those
//! of processes and pods here.

use std::future::pending;
use std::pin::pin;

use async_trait::async_trait;
use futures::FutureExt;
use gantry_ports::Error;
use gantry_streaming::{
    AttachRequest, Backend, Client, Duplex, ExecRequest, ProcessIo, Streams, relay,
};
use gantry_supervisor::{Exec, ExecIo, Stdio, Supervisor, TerminalSize};
use gantry_types::{ErrorKind, Kind, PodId};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// The pods of this node.
pub struct Node {
    supervisor: Supervisor,
}

impl Node {
    pub fn new(supervisor: Supervisor) -> Self {
        Self { supervisor }
    }
}

fn failed(error: gantry_supervisor::Error) -> Error {
    Error::new(error.kind(), error.to_string())
}

fn client_gone() -> Error {
    Error::new(ErrorKind::Unavailable, "the client has gone")
}

fn stdio(wanted: gantry_streaming::Stdio) -> Stdio {
    Stdio {
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr && !wanted.tty,
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
        outcome = work => Ok(outcome),
        () = client.gone() => Err(client_gone()),
    }
}

#[async_trait]
impl Backend for Node {
    /// A client that goes away takes along its ends of the streams: the command sees the end of its
    /// input, or its terminal hangs up. What still runs after the grace is killed.
    async fn exec(&self, request: ExecRequest, streams: Streams) -> Result<i32, Error> {
        let Streams {
            stdin,
            stdout,
            stderr,
            mut resizes,
            mut client,
        } = streams;
        let timeouts = self.supervisor.settings().timeouts;
        // A size that is known already spares the command a first look at a wrong one.
        let terminal = request.stdio.tty.then(|| {
            let known = resizes.next().now_or_never().flatten();
            known.map(size).unwrap_or_default()
        });
        let id = request.container.as_str();
        let start = self
            .supervisor
            .exec(id, request.command, stdio(request.stdio), terminal);
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
        {
            let clients = (stdin, stdout, stderr);
            let relayed = relay(clients, io, process.exit(), timeouts.exec_drain);
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
        match timeout(timeouts.exec_grace, process.exit()).await {
            Ok(code) => code.map_err(failed),
            Err(_) => {
                process.kill().await.map_err(failed)?;
                Err(client_gone())
            }
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
        let last_input = view.facts.config.stdin_once && !view.facts.config.tty;
        let attach = self.supervisor.attach(id, stdio(request.stdio));
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
        let silence = self.supervisor.settings().timeouts.exec_drain;
        let shown = relay((None, stdout, stderr), output, ended, silence);
        let input = async {
            let ended = match (stdin, attached.stdin) {
                (Some(from), Some(to)) => to.write_from(from).await,
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

    async fn port_forward(&self, pod: &PodId, port: u16, mut stream: Duplex) -> Result<(), Error> {
        let connect = self.supervisor.port_forward(pod.as_str(), port);
        let mut forward = connect.await.map_err(failed)?;
        // Told to the client as an end: for clients an error is the end of all connections.
        match tokio::io::copy_bidirectional(&mut stream, &mut forward.stream).await {
            Ok((sent, received)) => tracing::debug!(%pod, port, sent, received, "forwarded"),
            Err(error) => tracing::debug!(%pod, port, %error, "a forwarded connection broke"),
        }
        Ok(())
    }
}
