//! Drives the real shim as the daemon does, with real OCI runtimes and with scripted ones.
//!
//! Needs root; `GANTRY_SHIM` names another binary to test, such as the static one.

mod adopted;
mod attach;
mod budget;
mod common;
mod containers;
mod execs;
mod faults;
mod pod;
