//! Layers: staged, made durable, renamed into place.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use gantry_ports::Error;
use gantry_ports::snapshotter::{Stage, Usage};
use gantry_types::{Digest, ErrorKind};

use crate::layout::{self, Layout};

/// An empty stage, its root 0755.
pub fn stage(layout: &Layout, chain: &Digest, parent: Option<&Digest>) -> Result<Stage, Error> {
    let dir = layout.new_stage()?.join("fs");
    // The merged root takes the mode of the top layer's root: not the umask's.
    fs::create_dir(&dir)
        .and_then(|()| fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)))
        .map_err(|e| Error::io(format_args!("create {}", dir.display()), e))?;
    Ok(Stage {
        chain: chain.clone(),
        parent: parent.cloned(),
        dir,
    })
}

/// The directory of a stage, which holds its `fs`.
fn home(stage: &Stage) -> Result<&Path, Error> {
    stage.dir.parent().ok_or_else(|| {
        Error::internal(format!(
            "stage {} has no parent directory",
            stage.dir.display()
        ))
    })
}

/// Makes the stages durable and then visible, with one `syncfs` for all; returns what each layer
/// occupies. On error the stages that are not committed yet are thrown away.
pub fn commit(layout: &Layout, stages: Vec<(Stage, Usage)>) -> Result<Vec<(Digest, Usage)>, Error> {
    if let Err(error) = try_commit(layout, &stages) {
        abort_all(layout, stages.iter().map(|(stage, _)| stage));
        return Err(error);
    }
    Ok(stages
        .into_iter()
        .map(|(stage, usage)| (stage.chain, usage))
        .collect())
}

/// Throws stages away after a failure, which is the one to tell.
pub fn abort_all<'a>(layout: &Layout, stages: impl Iterator<Item = &'a Stage>) {
    for stage in stages {
        if let Err(error) = abort(layout, stage) {
            tracing::warn!(%error, chain = %stage.chain, "a stage that failed to commit stays until the next start");
        }
    }
}

fn try_commit(layout: &Layout, stages: &[(Stage, Usage)]) -> Result<(), Error> {
    if stages.is_empty() {
        return Ok(());
    }
    for (stage, usage) in stages {
        let path = home(stage)?.join("usage");
        fs::write(&path, format!("{} {}\n", usage.bytes, usage.inodes))
            .map_err(|e| Error::io(format_args!("write {}", path.display()), e))?;
    }
    let layers = layout.layers();
    let dir =
        File::open(&layers).map_err(|e| Error::io(format_args!("open {}", layers.display()), e))?;
    // Before the rename: a power cut must never show a layer whose files are empty. It also
    // reports write-back errors that no write call has seen (syncfs(2), since Linux 5.8).
    rustix::fs::syncfs(&dir).map_err(|e| {
        Error::io(
            format_args!("sync file system of {}", layers.display()),
            e.into(),
        )
    })?;
    for (stage, _) in stages {
        let to = layout.layer(&stage.chain);
        match fs::rename(home(stage)?, &to) {
            Ok(()) => {}
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                abort(layout, stage)?;
            }
            Err(e) => return Err(Error::io(format_args!("commit layer {}", to.display()), e)),
        }
    }
    dir.sync_all()
        .map_err(|e| Error::io(format_args!("sync {}", layers.display()), e))
}

/// Throws a stage away.
pub fn abort(layout: &Layout, stage: &Stage) -> Result<(), Error> {
    layout.delete(home(stage)?)
}

/// Committed layers with what each occupies.
pub fn list(layout: &Layout) -> Result<Vec<(Digest, Usage)>, Error> {
    let mut layers = Vec::new();
    for path in layout::entries(&layout.layers())? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let algorithm = if name.len() == 128 {
            "sha512"
        } else {
            "sha256"
        };
        let Ok(chain) = format!("{algorithm}:{name}").parse::<Digest>() else {
            tracing::warn!(path = %path.display(), "not a layer of ours: left alone");
            continue;
        };
        match read_usage(&path) {
            Ok(usage) => layers.push((chain, usage)),
            // Its size is unknown but the layer is whole: usage is written before the rename.
            Err(error) => {
                tracing::warn!(%error, %chain, "layer without usage");
                layers.push((chain, Usage::default()));
            }
        }
    }
    Ok(layers)
}

fn read_usage(layer: &Path) -> Result<Usage, Error> {
    let path = layer.join("usage");
    let text = fs::read_to_string(&path)
        .map_err(|e| Error::io(format_args!("read {}", path.display()), e))?;
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(bytes)), Some(Ok(inodes))) => Ok(Usage { bytes, inodes }),
        _ => Err(Error::internal(format!(
            "{}: not two numbers",
            path.display()
        ))),
    }
}

/// Tree of a committed layer.
pub fn tree(layout: &Layout, chain: &Digest) -> Result<PathBuf, Error> {
    let dir = layout.layer(chain).join("fs");
    match dir.exists() {
        true => Ok(dir),
        false => Err(Error::new(
            ErrorKind::NotFound,
            format!("layer {chain} is not on disk"),
        )),
    }
}

/// Gives the directory `to` the owner and mode of the directory `from`.
pub fn copy_root(from: &Path, to: &Path) -> Result<(), Error> {
    use std::os::unix::fs::MetadataExt;
    let copy = || -> io::Result<()> {
        let meta = fs::metadata(from)?;
        std::os::unix::fs::chown(to, Some(meta.uid()), Some(meta.gid()))?;
        fs::set_permissions(to, fs::Permissions::from_mode(meta.mode() & 0o7777))
    };
    copy().map_err(|e| {
        Error::io(
            format_args!("copy mode of {} to {}", from.display(), to.display()),
            e,
        )
    })
}
