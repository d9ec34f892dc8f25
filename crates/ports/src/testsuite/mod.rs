//! The contract of each port as tests that every implementation runs.
//!
//! The functions panic where the contract is broken: they are the body of a `#[test]`.

pub mod snapshotter;
