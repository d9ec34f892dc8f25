//! A node's images over a temporary directory, and a registry to pull from.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use gantry_images::{Images, LayersInUse, Options, PullRequest, Result};
use gantry_ports::Snapshotter;
use gantry_snapshotter_overlayfs::Overlayfs;
use gantry_store::Store;
use gantry_testkit::image::{Compression, Image, ImageBuilder, Layer};
use gantry_types::Digest;

/// Unpacking sets owners and makes whiteouts.
pub fn not_root(name: &str) -> bool {
    let not_root = !rustix::process::geteuid().is_root();
    if not_root {
        println!("SKIP {name}: unpacking needs root");
    }
    not_root
}

pub struct Node {
    pub dir: tempfile::TempDir,
    pub images: Images,
    pub snapshotter: Arc<dyn Snapshotter>,
}

/// Nothing is given up for being slow, as a loaded machine may make it.
pub fn options() -> Options {
    let mut options = Options::default();
    options.registry.retry_wait = Duration::from_millis(1);
    options.registry.header_timeout = Duration::from_secs(30);
    options.registry.progress_timeout = Duration::from_secs(30);
    options
}

/// Opens the store once nobody else has it open: a pull that was given up may still be on its way
/// out, and sled's own threads end behind it.
pub fn open_store(path: &Path) -> Arc<Store> {
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    loop {
        match Store::open(path) {
            Ok(opened) => return opened.store,
            Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn open(root: &Path, options: Options) -> Result<(Images, Arc<dyn Snapshotter>)> {
    open_with_store(root, &root.join("store"), options)
}

pub fn open_with_store(
    root: &Path,
    store: &Path,
    options: Options,
) -> Result<(Images, Arc<dyn Snapshotter>)> {
    let snapshotter: Arc<dyn Snapshotter> = Arc::new(Overlayfs::open(root)?);
    snapshotter.clean()?;
    // As the collection after a start does.
    snapshotter.purge()?;
    let store = open_store(store);
    let images = Images::open(root, store, snapshotter.clone(), options)?;
    Ok((images, snapshotter))
}

impl Node {
    pub fn new() -> Self {
        Self::with(options())
    }

    pub fn with(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (images, snapshotter) = open(dir.path(), options).unwrap();
        Self {
            dir,
            images,
            snapshotter,
        }
    }

    /// The node after its daemon was stopped and started.
    pub fn restart(self) -> Self {
        self.restart_after(|_| ())
    }

    /// The same, with something happening in between.
    pub fn restart_after(self, between: impl FnOnce(&Path)) -> Self {
        let Self {
            dir,
            images,
            snapshotter,
        } = self;
        drop((images, snapshotter));
        between(dir.path());
        let (images, snapshotter) = open(dir.path(), options()).unwrap();
        Self {
            dir,
            images,
            snapshotter,
        }
    }

    pub async fn pull(&self, reference: &str) -> Result<String> {
        self.images.pull(request(reference)).await
    }

    pub async fn remove(&self, name: &str) {
        self.images.remove(name, nothing_in_use()).await.unwrap();
    }

    /// Names in a directory below the root.
    pub fn names(&self, path: &str) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.dir.path().join(path))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Blobs that a failed pull has fetched, whole or not, for the next one.
    pub fn parts(&self) -> Vec<String> {
        let mut names = self.names("content/ingest");
        names.retain(|name| name.ends_with(".part"));
        names
    }

    /// Fails if work that has ended left anything half done but such parts.
    pub fn assert_tidy(&self) {
        let ingest = self.names("content/ingest");
        assert_eq!(ingest, self.parts(), "content/ingest");
        for dir in ["overlayfs/stages", "overlayfs/trash"] {
            assert_eq!(self.names(dir), [""; 0], "{dir}");
        }
    }

    /// Nothing but an empty store.
    pub fn assert_empty(&self) {
        self.assert_tidy();
        assert_eq!(self.parts(), [""; 0]);
        assert!(self.images.list().is_empty());
        assert_eq!(self.names("content/blobs/sha256"), [""; 0]);
        assert_eq!(self.names("overlayfs/layers"), [""; 0]);
        assert_eq!(self.images.fs_info()[0].used_bytes, 0);
        assert_eq!(self.images.fs_info()[0].inodes_used, 0);
    }

    pub fn layer(&self, chain: &Digest) -> PathBuf {
        self.snapshotter.layer_dir(chain).unwrap()
    }
}

pub fn request(reference: &str) -> PullRequest {
    PullRequest {
        reference: reference.to_owned(),
        ..PullRequest::default()
    }
}

pub fn nothing_in_use() -> Arc<dyn LayersInUse> {
    Arc::new(|_: &str| HashSet::new())
}

/// Two layers; `mark` makes it unlike others.
pub fn image(mark: &str) -> Image {
    let base = Layer::new()
        .dir("./", 0o755)
        .dir("etc", 0o755)
        .file("etc/base", b"base");
    let top = Layer::new()
        .file("etc/top", mark.as_bytes())
        .whiteout("etc/base");
    ImageBuilder::new()
        .layer(base, Compression::Gzip)
        .layer(top, Compression::Zstd)
        .config("Env", serde_json::json!(["A=b"]))
        .user("1000:1000")
        .cmd(["/bin/sh", mark])
        .build()
}
