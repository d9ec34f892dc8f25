//! Whether the layers are still those that containers stand on.
//!
//! `images.root` holds the layers, `root` what containers write: who changes the one while there are
//! containers takes their layers out of gantryd's sight, and the next collection, or a mount after a
//! reboot, does not know of them. So the directory of the layers has an id, in `layers.id`, and
//! `layers.at` in `root` says which it was and where. A path alone would not do: the file system that
//! belongs there may not be mounted, or be mounted elsewhere by now.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::snapshotter::{END, Users};

const ID: &str = "layers.id";
const NOTE: &str = "layers.at";

/// proc_sys_kernel(5)
const UUID: &str = "/proc/sys/kernel/random/uuid";

/// Notes which directory of layers, `images`, this node has. `has_layers`: whether there is any.
///
/// # Errors
/// It is another than the one that `users` stand on.
pub fn keep(root: &Path, images: &Path, users: Users, has_layers: bool) -> Result<()> {
    let here = read(&images.join(ID))?;
    let noted = read(&root.join(NOTE))?;
    let noted = noted.as_deref().and_then(|noted| noted.split_once(' '));
    let noted = noted.map(|(id, path)| (id, PathBuf::from(path)));
    let same = match (&here, &noted) {
        (Some(here), Some((id, _))) => here == id,
        // Somebody has tidied up.
        (None, Some((_, path))) => path == images && has_layers,
        // Of a version that did not take notes.
        (_, None) => has_layers,
    };
    if !same && !users.are_none() {
        let former = match &noted {
            Some((_, path)) => format!("those at {}", path.display()),
            None => "others".to_owned(),
        };
        bail!(
            "images.root: {users} do not stand on the layers at {}, but on {former}: start with \
             these (is their file system mounted?), {END}, and change it then",
            images.display()
        );
    }
    let id = match here {
        Some(id) => id,
        None => {
            let id = read(Path::new(UUID))?.with_context(|| format!("{UUID} is missing"))?;
            write(&images.join(ID), &id)?;
            id
        }
    };
    let current = (id.as_str(), images.to_owned());
    if noted.as_ref() != Some(&current) {
        write(&root.join(NOTE), &format!("{id} {}", images.display()))?;
    }
    Ok(())
}

/// The line in a file; `None` if there is none.
fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end().to_owned()).filter(|line| !line.is_empty())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

fn write(path: &Path, line: &str) -> Result<()> {
    let line = format!("{line}\n");
    gantry_sys::fs::remove_temporaries(path)
        .and_then(|()| gantry_sys::fs::write_atomic(path, line.as_bytes(), 0o600, true))
        .with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_told_from_others_by_their_id_and_not_by_their_path() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["root", "one", "two", "empty"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        let keep = |images: &str, containers: usize, has_layers: bool| {
            let users = Users {
                containers,
                mounted: 0,
            };
            super::keep(&at("root"), &at(images), users, has_layers)
                .map_err(|error| error.to_string())
        };
        // A version that took no notes has left containers, and layers or none.
        let error = keep("empty", 2, false).unwrap_err();
        assert!(
            error.starts_with("images.root: 2 containers") && !at("empty/layers.id").exists(),
            "{error}"
        );
        keep("one", 2, true).unwrap();
        keep("one", 2, false).unwrap();
        keep("one", 0, false).unwrap();

        let error = keep("two", 1, true).unwrap_err();
        assert!(error.contains(&at("one").display().to_string()), "{error}");
        assert!(
            error.starts_with("images.root: 1 containers") && error.contains("rmp -fa"),
            "{error}"
        );
        keep("one", 1, true).unwrap();
        // The same under another name.
        std::fs::rename(at("one"), at("moved")).unwrap();
        keep("moved", 1, true).unwrap();
        // Nothing is mounted there.
        std::fs::create_dir(at("one")).unwrap();
        std::fs::rename(at("moved"), at("away")).unwrap();
        std::fs::create_dir(at("moved")).unwrap();
        assert!(keep("moved", 1, false).is_err());
        std::fs::remove_dir(at("moved")).unwrap();
        std::fs::rename(at("away"), at("moved")).unwrap();
        // The id was deleted by hand.
        std::fs::remove_file(at("moved/layers.id")).unwrap();
        keep("moved", 1, true).unwrap();

        keep("two", 0, true).unwrap();
        keep("two", 1, true).unwrap();
        assert!(keep("moved", 1, true).is_err());
        let users = Users {
            containers: 0,
            mounted: 2,
        };
        let error = super::keep(&at("root"), &at("moved"), users, true).unwrap_err();
        assert!(error.to_string().contains("2 mounted images"), "{error}");
    }
}
