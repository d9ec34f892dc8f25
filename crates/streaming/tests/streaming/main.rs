//! A real server over real sockets, with a backend in memory.

mod abuse;
mod common;
mod damage;
mod portforward;
mod relay;
mod remotecommand;
mod requests;
mod tls;
mod websocket;
mod windows;
