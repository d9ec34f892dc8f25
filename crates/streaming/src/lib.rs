//! The HTTP upgrade server behind CRI's Exec, Attach and PortForward.
//!
//! A client is granted a URL over CRI ([`Server::exec`] and its like): `http://127.0.0.1:PORT/exec/`
//! and a token that is good once, for a minute. It comes with an HTTP request that upgrades the
//! connection, and the two speak one of Kubernetes' streaming protocols from there:
//!
//! ```text
//!                 SPDY/3.1                  WebSocket
//!                    |             ____________|____________
//!                    |            |                         |
//!                    |      SPDY in messages             channels
//!                    |        (the tunnel)                  |
//!                    |____________|                         |
//!             streams that the client opens       channels that are there
//!                    |_________________________________________|
//!                                       |
//!                    Exec, Attach (remotecommand), PortForward
//!                                       |
//!                                    Backend
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | `server`, `lobby`, `tokens`, `negotiate`, `tls` | HTTP: who may come, what is spoken |
//! | `spdy` | frames, header compression, windows, the session |
//! | `websocket`, `tunnel` | channels in messages; SPDY in messages |
//! | `channel`, `session`, `wire`, `conn` | bounded queues and how a connection is driven |
//! | `remotecommand`, `status`, `resize`, `portforward` | Kubernetes' protocols |
//! | [`backend`], `relay`, `splice` | what the node does, a process's pipes, a pod's sockets |
//!
//! The server knows nothing of pods: [`Backend`] does the work. Its streams are bounded queues, so
//! that a slow client holds back the process that writes to it and nothing else, and a client that
//! does not read holds no more than these queues.

pub mod backend;
mod channel;
mod config;
mod conn;
mod error;
mod lobby;
mod negotiate;
mod portforward;
mod relay;
mod remotecommand;
mod resize;
mod server;
mod session;
pub mod spdy;
mod splice;
mod status;
mod tls;
mod tokens;
mod tunnel;
mod websocket;
mod wire;

pub use backend::{
    AttachRequest, Backend, Client, Duplex, ExecRequest, Input, Output, PortForwardRequest,
    Resizes, Stdio, Streams, TerminalSize,
};
pub use config::Config;
pub use error::{Error, Result};
pub use relay::{Drain, ProcessIo, feed, relay};
pub use server::Server;
pub use splice::splice;
pub use tls::Certificate;
