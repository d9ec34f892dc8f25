//! The content store: an OCI image layout (image-spec, image-layout.md) that describes itself.
//!
//! ```text
//! <root>/oci-layout
//!        index.json              one descriptor per image and name
//!        blobs/sha256/<hex>      manifests, configs, layers as they were served
//!        blobs/sha512/<hex>
//!        ingest/                 blobs on their way in or out
//!        ingest/sha256-<hex>.part
//! ```
//!
//! A blob appears under its digest by rename, after all of it was hashed and is on disk; so a
//! blob that is there is whole, and nothing but its name needs to be believed.
//!
//! What a pull downloads stays a part, also when it is whole, until [`Content::settle`] has made
//! all blobs of the image durable at once. Parts survive the process that began them; that one was
//! whole is forgotten with it, and it is hashed again.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gantry_types::Digest;
use gantry_types::digest::Algorithm;

use crate::hash::{self, Hasher};
use crate::partial::Partial;
use crate::{Error, Result, failpoint};

const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Content {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    serial: AtomicU64,
    /// Bytes of all blobs, so that nobody has to walk the disk to tell.
    used: AtomicU64,
    blobs: AtomicU64,
    /// Parts that are whole and verified, with their sizes.
    whole: Mutex<HashMap<Digest, u64>>,
}

/// End of a part's name.
const PART: &str = "part";

/// A blob that is being written. Dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub struct Ingest {
    content: Content,
    path: PathBuf,
    file: File,
    hasher: Hasher,
    written: u64,
}

impl Content {
    /// Opens or makes the layout at `root` and removes what a killed process left half written.
    pub fn open(root: &Path) -> Result<Self> {
        let inner = Inner {
            root: root.to_owned(),
            serial: AtomicU64::new(0),
            used: AtomicU64::new(0),
            blobs: AtomicU64::new(0),
            whole: Mutex::default(),
        };
        let content = Self {
            inner: Arc::new(inner),
        };
        for dir in [root.to_owned(), content.ingest_dir()]
            .into_iter()
            .chain(["sha256", "sha512"].map(|algorithm| root.join("blobs").join(algorithm)))
        {
            DirBuilder::new()
                .mode(0o700)
                .recursive(true)
                .create(&dir)
                .map_err(|e| Error::io(format_args!("create {}", dir.display()), e))?;
        }
        let marker = root.join("oci-layout");
        if !marker.exists() {
            gantry_sys::fs::write_atomic(&marker, LAYOUT, 0o600, true)
                .map_err(|e| Error::io(format_args!("write {}", marker.display()), e))?;
        }
        content.purge()?;
        for (_, size) in content.list()? {
            content.account(size);
        }
        Ok(content)
    }

    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    pub fn index_path(&self) -> PathBuf {
        self.inner.root.join("index.json")
    }

    /// Bytes and number of all blobs.
    pub fn used(&self) -> (u64, u64) {
        (
            self.inner.used.load(Ordering::Relaxed),
            self.inner.blobs.load(Ordering::Relaxed),
        )
    }

    fn account(&self, size: u64) {
        self.inner.used.fetch_add(size, Ordering::Relaxed);
        self.inner.blobs.fetch_add(1, Ordering::Relaxed);
    }

    fn ingest_dir(&self) -> PathBuf {
        self.inner.root.join("ingest")
    }

    fn new_name(&self) -> PathBuf {
        let serial = self.inner.serial.fetch_add(1, Ordering::Relaxed);
        self.ingest_dir()
            .join(format!("{}-{serial}", std::process::id()))
    }

    /// Where a blob is once it is settled.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.inner
            .root
            .join("blobs")
            .join(digest.algorithm().as_str())
            .join(digest.hex())
    }

    fn part_path(&self, digest: &Digest) -> PathBuf {
        let name = format!("{}-{}.{PART}", digest.algorithm().as_str(), digest.hex());
        self.ingest_dir().join(name)
    }

    fn whole(&self) -> MutexGuard<'_, HashMap<Digest, u64>> {
        // The map is whole between any two statements.
        self.inner
            .whole
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a blob, settled or not; `None` if it is not here.
    fn open_found(&self, digest: &Digest) -> Result<Option<File>> {
        // Held over the opening: a blob that is being settled is in one of the two places.
        let whole = self.whole();
        let path = if whole.contains_key(digest) {
            self.part_path(digest)
        } else {
            self.path(digest)
        };
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format_args!("open {}", path.display()), e)),
        }
    }

    /// The part of a blob of `size` bytes, with what earlier downloads left. One at a time: the
    /// caller holds the blob's lock.
    pub fn part(&self, digest: &Digest, size: u64) -> Result<Partial> {
        Partial::open(self.part_path(digest), digest, size)
    }

    /// Throws a part away.
    pub fn discard(&self, digest: &Digest) -> Result<()> {
        let path = self.part_path(digest);
        self.whole().remove(digest);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(Error::io(format_args!("remove {}", path.display()), e))
            }
            _ => Ok(()),
        }
    }

    /// Takes a part that its reader has verified as a blob, which from now on is found.
    pub fn verified(&self, part: &Partial) {
        self.whole().insert(part.digest.clone(), part.size);
    }

    /// Keeps a small blob that has this digest, as a part.
    pub fn keep(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        if self.size(digest)?.is_some() {
            return Ok(());
        }
        self.discard(digest)?;
        let part = self.part(digest, bytes.len() as u64)?;
        part.write_at(0, &[bytes::Bytes::copy_from_slice(bytes)])?;
        self.verified(&part);
        Ok(())
    }

    /// Makes those of `blobs` durable that are not, and gives them their names.
    pub fn settle(&self, blobs: &[Digest]) -> Result<()> {
        let parts: Vec<Digest> = {
            let whole = self.whole();
            let mut parts: Vec<Digest> = blobs
                .iter()
                .filter(|digest| whole.contains_key(digest))
                .cloned()
                .collect();
            parts.sort();
            parts.dedup();
            parts
        };
        if parts.is_empty() {
            return Ok(());
        }
        let root = &self.inner.root;
        let sync = |e| Error::io(format_args!("sync file system of {}", root.display()), e);
        // Before the rename, and for all blobs at once: a sync for each costs a journal commit
        // for each. It also reports write-back errors that no write call has seen (syncfs(2)).
        File::open(root)
            .and_then(gantry_sys::fs::syncfs)
            .map_err(sync)?;
        for digest in &parts {
            let mut whole = self.whole();
            // Settled meanwhile by another pull that has it too.
            let Some(size) = whole.get(digest).copied() else {
                continue;
            };
            let to = self.path(digest);
            let known = to.exists();
            fs::rename(self.part_path(digest), &to)
                .map_err(|e| Error::io(format_args!("store {}", to.display()), e))?;
            whole.remove(digest);
            if !known {
                self.account(size);
            }
        }
        failpoint::at("pull::after-blob-rename")?;
        self.sync()
    }

    /// Parts, whole or not, with what they occupy. Walks the directory.
    pub fn parts(&self) -> Result<Vec<(Digest, fs::Metadata)>> {
        let dir = self.ingest_dir();
        let fail = |e| Error::io(format_args!("read {}", dir.display()), e);
        let mut parts = Vec::new();
        for entry in fs::read_dir(&dir).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name();
            if let Some(digest) = part_digest(&name.to_string_lossy())
                && let Ok(metadata) = entry.metadata()
            {
                parts.push((digest, metadata));
            }
        }
        Ok(parts)
    }

    /// Size of a blob; `None` if it is not here.
    pub fn size(&self, digest: &Digest) -> Result<Option<u64>> {
        if let Some(size) = self.whole().get(digest) {
            return Ok(Some(*size));
        }
        let path = self.path(digest);
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_file() => Ok(Some(meta.len())),
            Ok(_) => Err(Error::invalid(path.display(), "not a regular file")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format_args!("stat {}", path.display()), e)),
        }
    }

    pub fn open_blob(&self, digest: &Digest) -> Result<File> {
        self.open_found(digest)?
            .ok_or_else(|| Error::invalid(digest, "the blob is missing"))
    }

    /// A small blob whole, verified again. `None` if it is not here.
    pub fn read(&self, digest: &Digest, limit: u64) -> Result<Option<Vec<u8>>> {
        let path = self.path(digest);
        let what = || format!("read {}", path.display());
        let Some(file) = self.open_found(digest)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| Error::io(what(), e))?;
        if bytes.len() as u64 > limit {
            return Err(Error::Limit {
                what: what(),
                limit,
                unit: "bytes",
            });
        }
        if !hash::matches(&bytes, digest) {
            return Err(Error::mismatch(
                path.display(),
                "the content has another digest",
            ));
        }
        Ok(Some(bytes))
    }

    /// Starts a blob that is to have this digest.
    pub fn ingest(&self, digest: &Digest) -> Result<Ingest> {
        self.ingest_by(digest.algorithm())
    }

    /// Starts a blob whose digest nobody has said.
    pub fn ingest_by(&self, algorithm: Algorithm) -> Result<Ingest> {
        let path = self.new_name();
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| Error::io(format_args!("create {}", path.display()), e))?;
        let hasher = Hasher::new(algorithm);
        Ok(Ingest {
            content: self.clone(),
            path,
            file,
            hasher,
            written: 0,
        })
    }

    /// Stores a small blob under its SHA-256 digest.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = hash::sha256(bytes);
        self.put_as(&digest, bytes)?;
        Ok(digest)
    }

    /// Stores a small blob that must have this digest.
    pub fn put_as(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        if self.size(digest)?.is_some() {
            return Ok(());
        }
        let mut ingest = self.ingest(digest)?;
        ingest.write(bytes)?;
        ingest.finish(digest, bytes.len() as u64)
    }

    /// Makes the names of all finished blobs durable. Before a record mentions them.
    pub fn sync(&self) -> Result<()> {
        for algorithm in ["sha256", "sha512"] {
            let dir = self.inner.root.join("blobs").join(algorithm);
            File::open(&dir)
                .and_then(|dir| dir.sync_all())
                .map_err(|e| Error::io(format_args!("sync {}", dir.display()), e))?;
        }
        Ok(())
    }

    /// Takes a blob and its part out of sight, quick enough for a caller that holds a lock; the
    /// space of a settled one comes back with [`Content::purge`]. Absent is success.
    pub fn remove(&self, digest: &Digest) -> Result<()> {
        self.discard(digest)?;
        let Some(size) = self.size(digest)? else {
            return Ok(());
        };
        let path = self.path(digest);
        fs::rename(&path, self.new_name().with_extension("trash"))
            .map_err(|e| Error::io(format_args!("remove {}", path.display()), e))?;
        self.inner.used.fetch_sub(size, Ordering::Relaxed);
        self.inner.blobs.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }

    /// Deletes removed blobs, and what another process left half written; parts stay.
    pub fn purge(&self) -> Result<()> {
        let dir = self.ingest_dir();
        let own = format!("{}-", std::process::id());
        let fail = |e| Error::io(format_args!("empty {}", dir.display()), e);
        for entry in fs::read_dir(&dir).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if part_digest(&name).is_some() {
                continue;
            }
            let in_work = name.starts_with(&own) && !name.ends_with(".trash");
            if in_work && self.inner.serial.load(Ordering::Relaxed) > 0 {
                continue;
            }
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// All blobs with their sizes. Walks the disk.
    pub fn list(&self) -> Result<Vec<(Digest, u64)>> {
        let mut blobs = Vec::new();
        for algorithm in ["sha256", "sha512"] {
            let dir = self.inner.root.join("blobs").join(algorithm);
            let fail = |e| Error::io(format_args!("read {}", dir.display()), e);
            for entry in fs::read_dir(&dir).map_err(fail)? {
                let entry = entry.map_err(fail)?;
                let name = entry.file_name();
                let text = format!("{algorithm}:{}", name.to_string_lossy());
                match (text.parse::<Digest>(), entry.metadata()) {
                    (Ok(digest), Ok(meta)) if meta.is_file() => blobs.push((digest, meta.len())),
                    _ => tracing::warn!(path = %entry.path().display(), "not a blob: left alone"),
                }
            }
        }
        Ok(blobs)
    }
}

impl Ingest {
    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .map_err(|e| Error::io(format_args!("write {}", self.path.display()), e))?;
        self.hasher.update(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Makes durable and names the blob by what it turned out to be. `hold` is told the digest
    /// before anybody can find the blob, and take it away.
    pub fn finish_as_found(mut self, hold: impl FnOnce(&Digest)) -> Result<(Digest, u64)> {
        let hasher = std::mem::replace(&mut self.hasher, Hasher::new(Algorithm::Sha256));
        let text = format!("{}:{}", hasher.algorithm().as_str(), hasher.hex());
        let digest = text.parse().map_err(|e| Error::invalid(&text, e))?;
        let size = self.written;
        hold(&digest);
        self.store(&digest, size)?;
        Ok((digest, size))
    }

    /// Verifies, makes durable, and gives the blob its name.
    pub fn finish(mut self, digest: &Digest, size: u64) -> Result<()> {
        if self.written != size {
            let reason = format!("{} bytes came instead of {size}", self.written);
            return Err(Error::mismatch(digest, reason));
        }
        let hasher = std::mem::replace(&mut self.hasher, Hasher::new(digest.algorithm()));
        if !hasher.is(digest) {
            return Err(Error::mismatch(digest, "the content has another digest"));
        }
        self.store(digest, size)
    }

    fn store(self, digest: &Digest, size: u64) -> Result<()> {
        self.file
            .sync_all()
            .map_err(|e| Error::io(format_args!("sync {}", self.path.display()), e))?;
        let to = self.content.path(digest);
        let known = self.content.size(digest)?.is_some();
        fs::rename(&self.path, &to)
            .map_err(|e| Error::io(format_args!("store {}", to.display()), e))?;
        if !known {
            self.content.account(size);
        }
        Ok(())
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        // After finish the name is gone already.
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, path = %self.path.display(),
                    "a half-written blob stays until the next start");
            }
            _ => {}
        }
    }
}

/// The blob that a file in `ingest` is a part of.
fn part_digest(name: &str) -> Option<Digest> {
    let (algorithm, hex) = name
        .strip_suffix(PART)?
        .strip_suffix('.')?
        .split_once('-')?;
    format!("{algorithm}:{hex}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> (tempfile::TempDir, Content) {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(&dir.path().join("content")).unwrap();
        (dir, content)
    }

    fn in_ingest(content: &Content) -> usize {
        fs::read_dir(content.ingest_dir()).unwrap().count()
    }

    #[test]
    fn a_blob_is_found_under_its_digest_and_counted_once() {
        let (_dir, content) = open();
        let digest = content.put(b"hello").unwrap();
        content.put(b"hello").unwrap();
        assert_eq!(content.read(&digest, 100).unwrap().unwrap(), b"hello");
        assert_eq!(content.used(), (5, 1));
        assert_eq!(Content::open(content.root()).unwrap().used(), (5, 1));
        content.remove(&digest).unwrap();
        content.remove(&digest).unwrap();
        content.purge().unwrap();
        assert_eq!((content.used(), in_ingest(&content)), ((0, 0), 0));
        assert!(content.read(&digest, 100).unwrap().is_none());
    }

    #[test]
    fn wrong_digest_or_size_is_refused_and_leaves_nothing() {
        let (_dir, content) = open();
        let digest = hash::sha256(b"hello");
        for (bytes, size) in [(&b"hellO"[..], 5), (b"hello", 6), (b"hell", 4)] {
            let mut ingest = content.ingest(&digest).unwrap();
            ingest.write(bytes).unwrap();
            assert!(matches!(
                ingest.finish(&digest, size),
                Err(Error::Mismatch { .. })
            ));
        }
        assert_eq!(content.size(&digest).unwrap(), None);
        assert_eq!(in_ingest(&content), 0);
    }

    #[test]
    fn damage_on_disk_is_seen_when_read() {
        let (_dir, content) = open();
        let digest = content.put(b"hello").unwrap();
        fs::write(content.path(&digest), b"").unwrap();
        assert!(matches!(
            content.read(&digest, 100),
            Err(Error::Mismatch { .. })
        ));
        assert!(matches!(
            content.read(&content.put(&[0; 9]).unwrap(), 8),
            Err(Error::Limit { .. })
        ));
    }

    #[test]
    fn a_part_is_found_when_it_is_verified_and_named_when_it_is_settled() {
        let (_dir, content) = open();
        let digest = hash::sha256(b"hello");
        content.keep(&digest, b"hello").unwrap();
        content.keep(&digest, b"hello").unwrap();
        assert_eq!(content.size(&digest).unwrap(), Some(5));
        assert_eq!(content.read(&digest, 100).unwrap().unwrap(), b"hello");
        assert!(content.open_blob(&digest).is_ok() && !content.path(&digest).exists());
        assert_eq!((content.used(), in_ingest(&content)), ((0, 0), 1));
        // A process that is killed here forgets that it was whole, and keeps the bytes.
        let next = Content::open(content.root()).unwrap();
        assert_eq!(next.size(&digest).unwrap(), None);
        assert_eq!(next.parts().unwrap().len(), 1);
        assert_eq!(next.part(&digest, 5).unwrap().missing(0..5), None);

        let all = [digest.clone(), digest.clone()];
        content.settle(&all).unwrap();
        content.settle(&all).unwrap();
        assert_eq!((content.used(), in_ingest(&content)), ((5, 1), 0));
        assert_eq!(content.read(&digest, 100).unwrap().unwrap(), b"hello");

        let other = hash::sha256(b"other");
        content.keep(&other, b"other").unwrap();
        content.remove(&other).unwrap();
        assert_eq!(content.size(&other).unwrap(), None);
        assert_eq!(in_ingest(&content), 0);
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_work_of_ours_is_not() {
        let (_dir, content) = open();
        fs::write(content.ingest_dir().join("1-1"), "half").unwrap();
        let ours = content.ingest(&hash::sha256(b"x")).unwrap();
        content.purge().unwrap();
        assert_eq!(in_ingest(&content), 1);
        drop(ours);
        assert_eq!(in_ingest(&content), 0);
    }
}
