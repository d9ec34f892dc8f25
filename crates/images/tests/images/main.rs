//! The images of a node, from a registry on the loopback or from files to unpacked layers.

mod archive;
mod failure;
mod hosts;
mod native;
mod node;
mod pull;
mod snapshotters;
mod store;
mod transfer;
