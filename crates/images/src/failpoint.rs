//! The stages of a pull, for tests that cut it there (gantry_sys::failpoint).

use crate::{Error, Result};

/// The failpoint `name`: to be called between an effect and whatever must survive its loss.
pub(crate) fn at(name: &'static str) -> Result<()> {
    gantry_sys::failpoint::at(name).map_err(|source| Error::io(name, source))
}
