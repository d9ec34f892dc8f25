//! Other gantryds on this machine.
//!
//! They may share the directory of network namespaces, the parents of cgroups and a CNI network
//! with this one, so that a thing which no record of ours names is not for that nobody's. Whose it
//! is stands in its daemon's run directories: they are made before the first thing of a pod or
//! container, and go after the last one, whether or not that daemon runs. To be found by the others
//! each daemon leaves a link to its state directory in a place that all know.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::rundir::{make_dir, names};

/// On the tmpfs that state directories are on, or should be: pods do not outlive it.
const DIR: &str = "/run/gantryd-states";

/// Lets the daemons on this machine know of this state directory; forgets those that are gone.
pub(crate) fn announce(state: &Path) -> io::Result<()> {
    announce_in(Path::new(DIR), state)
}

fn announce_in(dir: &Path, state: &Path) -> io::Result<()> {
    make_dir(dir)?;
    let state = fs::canonicalize(state)?;
    for name in names(dir)? {
        let link = dir.join(name);
        if fs::read_link(&link).is_ok_and(|other| !other.exists()) {
            ignore(fs::remove_file(&link), io::ErrorKind::NotFound)?;
        }
    }
    // As many names as there are paths: a slash is in none, so it stands for the separator.
    let name = state
        .to_string_lossy()
        .replace('%', "%25")
        .replace('/', "%2f");
    let linked = std::os::unix::fs::symlink(&state, dir.join(name));
    ignore(linked, io::ErrorKind::AlreadyExists)
}

fn ignore(outcome: io::Result<()>, kind: io::ErrorKind) -> io::Result<()> {
    outcome.or_else(|error| match error.kind() == kind {
        true => Ok(()),
        false => Err(error),
    })
}

/// The state directories of all daemons but the one with state directory `own`.
pub(crate) fn states(own: &Path) -> io::Result<Vec<PathBuf>> {
    states_in(Path::new(DIR), own)
}

fn states_in(dir: &Path, own: &Path) -> io::Result<Vec<PathBuf>> {
    let own = fs::canonicalize(own)?;
    let links = names(dir)?.into_iter();
    let states = links.filter_map(|name| fs::read_link(dir.join(name)).ok());
    Ok(states.filter(|state| *state != own).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemons_know_of_each_other_and_not_of_those_that_are_gone() {
        let work = tempfile::tempdir().unwrap();
        let dir = work.path().join("states");
        let state = |name: &str| fs::canonicalize(work.path()).unwrap().join(name);
        assert!(states_in(&dir, work.path()).unwrap().is_empty());
        for name in ["a", "b%2fc", "gone"] {
            fs::create_dir(state(name)).unwrap();
            announce_in(&dir, &state(name)).unwrap();
        }
        announce_in(&dir, &state("a")).unwrap();
        fs::remove_dir(state("gone")).unwrap();
        announce_in(&dir, &state("a")).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
        assert_eq!(states_in(&dir, &state("a")).unwrap(), [state("b%2fc")]);
        // By another name it is the same.
        let link = work.path().join("link");
        std::os::unix::fs::symlink(state("a"), &link).unwrap();
        announce_in(&dir, &link).unwrap();
        assert_eq!(states_in(&dir, &link).unwrap(), [state("b%2fc")]);
        assert!(announce_in(&dir, &state("missing")).is_err());
    }
}
