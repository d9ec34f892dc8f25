//! The shim's own log: one line each on standard error.

use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::Duration;

/// Writes a line unless that would block: whoever reads standard error may be gone or stuck, and
/// a pod must not wait for it. A line that cannot be written is lost.
pub fn report(message: fmt::Arguments<'_>) {
    let stderr = std::io::stderr();
    if gantry_sys::io::writable_within(stderr.as_fd(), Duration::ZERO).unwrap_or(false) {
        let line = format!("gantry-shim[{}]: {message}\n", std::process::id());
        let _ = stderr.lock().write_all(line.as_bytes());
    }
}

/// [`report`] with a format string.
#[macro_export]
macro_rules! report {
    ($($argument:tt)*) => {
        $crate::report::report(format_args!($($argument)*))
    };
}
