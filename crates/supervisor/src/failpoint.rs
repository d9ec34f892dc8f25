//! Failpoints ([`gantry_sys::failpoint`]) with this crate's error.

use crate::Error;

pub(crate) fn at(name: &'static str) -> Result<(), Error> {
    gantry_sys::failpoint::at(name).map_err(|error| Error::internal(name, error))
}
