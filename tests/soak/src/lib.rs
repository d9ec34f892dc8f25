//! Random life of a node, held against a model of what was acknowledged.
//!
//! Clients make pods and containers, use and remove them by every call there is, wait for their
//! answers or go away from them. Meanwhile the daemon is killed, terminated, frozen, and killed at
//! failpoints; shims are killed and frozen; plugin and runtime fail, hang and die; disks are full.
//! Each client knows by what it was told what must be ([`model`]), looks at it after every restart
//! and whenever it likes, and removes all of it in the end, after which nothing may be left.
//!
//! What is drawn is made of one seed, so that a run can be tried again: the same decisions, though
//! not at the same moments.

pub mod actor;
pub mod churn;
pub mod client;
pub mod conflict;
pub mod disturb;
pub mod history;
pub mod life;
pub mod model;
pub mod ready;
pub mod rng;
pub mod trouble;
