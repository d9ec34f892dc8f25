//! Everything that crosses the whole node: gantryd, shim, runc, CNI plugins, registry.
//!
//! One program, so that the tests share what is built once and cargo links once.

mod walk;
