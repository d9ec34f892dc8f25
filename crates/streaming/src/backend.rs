//! What the server asks of the node: to run, to attach, to connect.

use async_trait::async_trait;
use gantry_ports::Error;
use gantry_types::{ContainerId, PodId};
use tokio::sync::watch;

pub use crate::channel::{Duplex, Input, Output};

/// A command to run in a container, as CRI's `ExecRequest` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecRequest {
    pub container: ContainerId,
    pub command: Vec<String>,
    pub stdio: Stdio,
}

/// A container to attach to, as CRI's `AttachRequest` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachRequest {
    pub container: ContainerId,
    pub stdio: Stdio,
}

/// A pod whose ports are to be reached, as CRI's `PortForwardRequest` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortForwardRequest {
    pub pod: PodId,
    /// What WebSocket clients of the old form connect to; all others name a port per connection.
    pub ports: Vec<u16>,
}

/// Which streams a client wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    /// The process has a terminal: stderr comes with stdout, and it can be resized.
    pub tty: bool,
}

/// A client's ends of a process's streams; those that it did not ask for are `None`.
///
/// Bytes written reach the client in order; an `Output` that is shut down or dropped is the
/// client's end of file. The client learns the result when the call that got these returns, so that
/// everything must be written by then.
pub struct Streams {
    pub stdin: Option<Input>,
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
    pub resizes: Resizes,
    pub client: Client,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

/// The sizes that the client gives its terminal. Only the last counts: sizes that nobody asked for
/// are not queued, and one that came before anybody asked is still there.
pub struct Resizes(watch::Receiver<Option<TerminalSize>>);

impl Resizes {
    pub(crate) fn new(sizes: watch::Receiver<Option<TerminalSize>>) -> Self {
        Self(sizes)
    }

    /// The latest size that was not returned yet, when there is one; `None` when none will come.
    /// May be dropped and called again without loss.
    pub async fn next(&mut self) -> Option<TerminalSize> {
        // A size that was not seen counts as a change also when no more can come.
        self.0.changed().await.ok()?;
        *self.0.borrow_and_update()
    }
}

/// Whether the client is still there.
#[derive(Clone)]
pub struct Client(watch::Receiver<bool>);

impl Client {
    pub(crate) fn new(gone: watch::Receiver<bool>) -> Self {
        Self(gone)
    }

    /// Resolves when the client has gone away: it closed or lost its connection, was idle for too
    /// long, broke the protocol, or the server is shutting down.
    pub async fn gone(&mut self) {
        // The sender is gone with the whole session.
        let _ = self.0.wait_for(|gone| *gone).await;
    }

    pub fn is_gone(&self) -> bool {
        *self.0.borrow()
    }
}

/// What a node does for its clients. Errors are shown to the client; their kind is not.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Runs a command and returns its exit code (128 + n after signal n) once it has ended and its
    /// output is written. Called when the client has opened all its streams.
    ///
    /// The call is always awaited to its end: a client that goes away is known from
    /// [`Streams::client`] and from failing streams, and ending what was begun for it is the
    /// backend's business.
    async fn exec(&self, request: ExecRequest, streams: Streams) -> Result<i32, Error>;

    /// Connects the client with a container's first process, until that ends or the client goes.
    /// Awaited to its end like [`Backend::exec`].
    async fn attach(&self, request: AttachRequest, streams: Streams) -> Result<(), Error>;

    /// Connects to `port` in the pod's network namespace and moves bytes both ways, with half-closes,
    /// until both are done. An error resets the connection and is shown to the client. Dropped when
    /// the client is gone.
    async fn port_forward(&self, pod: &PodId, port: u16, stream: Duplex) -> Result<(), Error>;
}
