//! Failpoints ([`gantry_sys::failpoint`]) with this crate's error.

use crate::Error;

/// What shims are told of failpoints, whose environment is otherwise empty: from which variable of
/// the daemon's environment which of theirs is taken.
#[cfg(feature = "failpoints")]
pub(crate) const OF_SHIMS: &[(&str, &str)] = &[
    ("SHIM_FAILPOINTS", "FAILPOINTS"),
    ("SHIM_FAILPOINT_TRACE", "FAILPOINT_TRACE"),
];
#[cfg(not(feature = "failpoints"))]
pub(crate) const OF_SHIMS: &[(&str, &str)] = &[];

pub(crate) fn at(name: &'static str) -> Result<(), Error> {
    gantry_sys::failpoint::at(name).map_err(|error| Error::internal(name, error))
}
