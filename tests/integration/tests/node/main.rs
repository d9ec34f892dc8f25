//! Everything that crosses the whole node: gantryd, shim, runc, CNI plugins, registry.
//!
//! One program, so that the tests share what is built once and cargo links once.

mod adopted;
mod advisories;
mod cadvisor;
mod chaos;
mod check;
mod containers;
mod crossing;
mod devices;
mod events;
mod exec;
mod gantryctl;
mod images;
mod init;
mod isolation;
mod lists;
mod lost;
mod metrics;
mod mounts;
mod native;
mod pod_metrics;
mod pods;
mod pulls;
mod refused;
mod repeated;
mod resources;
mod restart;
mod security;
mod snapshotters;
mod state;
mod stats;
mod stop;
mod store;
mod streaming;
mod streaming_ends;
mod streaming_tls;
mod systemd;
mod top;
mod traces;
mod upgrade;
mod userns;
mod walk;
mod watchdog;
