//! Cuts the power of a node's disk at random, and looks at what the next boot finds.
//!
//! No machine is switched off for it. A gantryd works on a file system whose disk is a file that
//! writes down, in order, each write and each flush that it sees, and beside them what gantryd has
//! acknowledged. From that log any number of disks can be made as a power loss would have left
//! them: all that was flushed, and of the rest whatever chance lets through, torn at sectors. Each
//! is mounted, which replays the file system's journal, and gets a gantryd in a boot of its own;
//! then everything that was acknowledged before the cut must be there, and nothing that is there
//! may be wrong.

pub mod check;
pub mod disk;
pub mod filesystem;
pub mod history;
pub mod medium;
pub mod run;
pub mod workload;

use std::io;
use std::process::Command;

/// Runs a program that must succeed.
pub(crate) fn succeed(command: &mut Command) -> io::Result<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "{command:?}: {}",
        said.trim_end()
    )))
}
