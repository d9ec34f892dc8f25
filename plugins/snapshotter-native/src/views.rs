//! Copies that are mounted to be read, each with the path where it is mounted.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use gantry_ports::Error;
use gantry_snapshotter_directories::{Layout, entries};

pub const DIRECTORY: &str = "views";

/// Mounts what `fill` makes of the path that it gets at `target`.
pub fn make(
    layout: &Layout,
    target: &Path,
    fill: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<(), Error> {
    // Of a view whose mount went with a reboot.
    remove(layout, target)?;
    let stage = layout.new_stage()?;
    let note = stage.join("target");
    let made = fill(&stage.join("fs")).and_then(|()| {
        fs::write(&note, target.as_os_str().as_bytes())
            .map_err(|e| Error::io(format_args!("write {}", note.display()), e))?;
        publish(layout, &stage)
    });
    let view = match made {
        Ok(view) => view,
        Err(error) => {
            layout.delete(&stage)?;
            return Err(error);
        }
    };
    let mounted = gantry_sys::mount::detached_read_only(&view.join("fs"))
        .and_then(|tree| gantry_sys::mount::attach(tree, target));
    mounted.map_err(|e| {
        if let Err(error) = layout.delete(&view) {
            tracing::warn!(%error, "a view that is mounted nowhere stays until the next start");
        }
        Error::io(format_args!("mount at {}", target.display()), e)
    })
}

/// Moves a finished copy to a name that is free: daemons before this one have left theirs.
fn publish(layout: &Layout, stage: &Path) -> Result<PathBuf, Error> {
    let views = layout.directory(DIRECTORY)?;
    for n in 0_u64.. {
        let view = views.join(n.to_string());
        match fs::rename(stage, &view) {
            Ok(()) => return Ok(view),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty
                ) => {}
            Err(e) => return Err(Error::io(format_args!("create {}", view.display()), e)),
        }
    }
    Err(Error::internal("no name is free for a view"))
}

/// Deletes the copies that were mounted at `target`.
pub fn remove(layout: &Layout, target: &Path) -> Result<(), Error> {
    for view in entries(&layout.directory(DIRECTORY)?)? {
        match fs::read(view.join("target")) {
            Ok(noted) if OsStr::from_bytes(&noted) == target => layout.delete(&view)?,
            Ok(_) => {}
            // Removed by another call.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(format_args!("read {}", view.display()), e)),
        }
    }
    Ok(())
}

/// Deletes the copies that are mounted nowhere.
pub fn clean(layout: &Layout) -> Result<(), Error> {
    let mut result = Ok(());
    for view in entries(&layout.directory(DIRECTORY)?)? {
        let mounted = fs::read(view.join("target")).and_then(|target| {
            let at = fs::metadata(OsStr::from_bytes(&target))?;
            let own = fs::metadata(view.join("fs"))?;
            Ok((at.dev(), at.ino()) == (own.dev(), own.ino()))
        });
        // What cannot be told is kept: a container may live on it.
        let gone = match mounted {
            Ok(mounted) => !mounted,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if gone {
            result = result.and(layout.delete(&view));
        }
    }
    result
}
