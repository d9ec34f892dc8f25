//! Trouble on request, for tests; without the feature `failpoints` nothing of it is compiled in.
//!
//! Driven by the environment variable `FAILPOINTS` in the grammar of the `fail` crate. The action
//! `return(kill)` kills the process there with SIGKILL, any other `return(text)` makes the step
//! fail with that text.

use crate::Result;

/// The failpoint `name`: to be called between an effect and whatever must survive its loss.
#[cfg(feature = "failpoints")]
pub(crate) fn at(name: &'static str) -> Result<()> {
    fail::fail_point!(name, |action: Option<String>| {
        let action = action.unwrap_or_default();
        if action == "kill" {
            let own = i32::try_from(std::process::id()).unwrap_or_default();
            let killed = gantry_sys::pidfd::PidFd::open(own).and_then(|own| own.signal(9));
            tracing::error!(?killed, "failpoint cannot kill the process");
        }
        Err(crate::Error::io(name, std::io::Error::other(action)))
    });
    Ok(())
}

#[cfg(not(feature = "failpoints"))]
#[expect(clippy::unnecessary_wraps, reason = "the twin above fails")]
pub(crate) fn at(_name: &'static str) -> Result<()> {
    Ok(())
}
