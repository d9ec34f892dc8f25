//! gantryd as a library: the configuration, and the wiring of everything behind the socket.

pub mod config;
mod dump;
mod handlers;
mod image_root;
mod metrics;
mod server;
mod snapshotter;
mod socket;
mod streaming;
pub mod traces;
mod watchdog;

pub use server::run;
