//! Whether overlayfs works here, found out by doing it.

use std::fs;
use std::io;
use std::path::Path;

use gantry_ports::Error;
use gantry_snapshotter_directories::Layout;
use gantry_types::ErrorKind;

use crate::mount::{Overlay, Writable, overlay};

/// Mounts an overlay of a layer and a writable part and deletes a file of the layer: what fails
/// where overlayfs is missing, where mounting is not allowed, and where the file system of `layout`
/// cannot be its upper one (overlayfs itself, NFS) or has no whiteouts.
pub fn probe(layout: &Layout) -> Result<(), Error> {
    let stage = layout.new_stage_of_containers()?;
    let tried = gantry_sys::namespace::in_own_mounts(|| attempt(&stage))
        .map_err(|error| format!("unshare: {error}"))
        .and_then(|tried| tried);
    layout.delete(&stage)?;
    tried.map_err(|reason| {
        let root = layout.containers().display();
        Error::new(
            ErrorKind::FailedPrecondition,
            format!("overlayfs cannot be used at {root}: {reason}"),
        )
    })
}

fn attempt(stage: &Path) -> Result<(), String> {
    let at = |name: &str| stage.join(name);
    let told = |error: io::Error| error.to_string();
    for dir in ["lower", "upper", "work", "target"] {
        fs::create_dir(at(dir)).map_err(told)?;
    }
    fs::write(at("lower/file"), "").map_err(told)?;
    let dirs = Overlay {
        lower: vec![at("lower")],
        writable: Some(Writable {
            upper: at("upper"),
            work: at("work"),
        }),
        label: None,
    };
    // The mount goes with its namespace.
    overlay(&dirs, &at("target")).map_err(|error| error.to_string())?;
    fs::remove_file(at("target/file"))
        .map_err(|error| format!("a file of a layer cannot be deleted: {error}"))
}

#[cfg(test)]
mod tests {
    use gantry_types::Kind;

    use super::*;

    #[test]
    fn overlayfs_is_refused_where_it_cannot_be() {
        const NAME: &str = "overlayfs_is_refused_where_it_cannot_be";
        if !rustix::process::geteuid().is_root() {
            println!("SKIP {NAME}: mounting needs root");
            return;
        }
        let work = tempfile::tempdir().unwrap();
        let layout = Layout::open(&work.path().join("plain")).unwrap();
        if let Err(error) = probe(&layout) {
            println!("SKIP {NAME}: {error}");
            return;
        }
        assert_eq!(
            fs::read_dir(layout.root().join("stages")).unwrap().count(),
            0
        );

        // On overlayfs itself, as in a node that is a container.
        for dir in ["lower", "upper", "work", "merged"] {
            fs::create_dir(work.path().join(dir)).unwrap();
        }
        let dirs = Overlay {
            lower: vec![work.path().join("lower")],
            writable: Some(Writable {
                upper: work.path().join("upper"),
                work: work.path().join("work"),
            }),
            label: None,
        };
        let merged = work.path().join("merged");
        overlay(&dirs, &merged).unwrap();
        let layout = Layout::open(&merged.join("root")).unwrap();
        let probed = probe(&layout);
        let left = fs::read_dir(layout.root().join("stages")).unwrap().count();
        gantry_snapshotter_directories::mounts::unmount(&merged).unwrap();
        let error = probed.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
        assert!(error.to_string().contains("merged/root"), "{error}");
        assert_eq!(left, 0);
    }
}
