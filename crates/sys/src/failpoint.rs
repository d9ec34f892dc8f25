//! Trouble on request, for tests; without the feature `failpoints` nothing of it is compiled in.
//!
//! Driven by the environment variable `FAILPOINTS` in the grammar of the `fail` crate, for example
//! `store::flushed=2*off->1*return(no space)->1*delay(5000)->return(kill)`. The action
//! `return(kill)` kills the process there with SIGKILL, any other `return(text)` makes the step fail
//! with that text. The names of the failpoints that a process passes are appended to the file that
//! `FAILPOINT_TRACE` names, one a line: so a test finds all there are without knowing any.

use std::io;

/// Failpoints stay armed as the environment says for as long as this lives.
#[must_use]
pub struct Armed {
    #[cfg(feature = "failpoints")]
    _scenario: fail::FailScenario<'static>,
}

/// Reads the environment. To be called once, at the start of a process.
pub fn arm() -> Armed {
    Armed {
        #[cfg(feature = "failpoints")]
        _scenario: fail::FailScenario::setup(),
    }
}

/// A failpoint where nothing can fail any more: a process can wait there, or end.
#[inline]
pub fn pass(name: &'static str) {
    // Only ever said by a test that asked for it where it means nothing.
    let _ = at(name);
}

/// The failpoint `name`: to be called between an effect and whatever must survive its loss.
#[cfg(feature = "failpoints")]
pub fn at(name: &'static str) -> io::Result<()> {
    trace(name)?;
    fail::fail_point!(name, |action: Option<String>| {
        let action = action.unwrap_or_default();
        if action == "kill" {
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL)?;
        }
        Err(io::Error::other(action))
    });
    Ok(())
}

#[cfg(feature = "failpoints")]
fn trace(name: &str) -> io::Result<()> {
    use std::io::Write;
    let Some(path) = std::env::var_os("FAILPOINT_TRACE") else {
        return Ok(());
    };
    let mut file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(path)?;
    file.write_all(format!("{name}\n").as_bytes())
}

#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn at(_name: &'static str) -> io::Result<()> {
    Ok(())
}
