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
//!
//! A part has one download. Another one of the same blob, from a registry that does not wait for
//! the first, writes a file of its own; the first that is verified is the blob.

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
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
    settled: Mutex<Settled>,
    parts: Mutex<Parts>,
}

/// All blobs, so that nobody has to walk the disk to tell.
#[derive(Debug, Default)]
struct Settled {
    bytes: u64,
    blobs: u64,
}

/// What is in `ingest` of downloads.
#[derive(Debug, Default)]
struct Parts {
    /// Those that are whole and verified.
    whole: HashMap<Digest, Whole>,
    /// Every file, with the bytes that are there.
    files: HashMap<PathBuf, Arc<AtomicU64>>,
    /// Files that a download has.
    taken: HashSet<PathBuf>,
}

#[derive(Clone, Debug)]
struct Whole {
    path: PathBuf,
    size: u64,
}

impl Parts {
    /// Deletes a file, or forgets one that is gone.
    fn remove(&mut self, path: &Path) -> Result<()> {
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(format_args!("remove {}", path.display()), e));
            }
            _ => {}
        }
        self.files.remove(path);
        Ok(())
    }
}

/// A download's hold on its file, for as long as anybody may write to it.
#[derive(Debug)]
pub struct Claim {
    content: Content,
    digest: Digest,
    path: PathBuf,
    /// The file is nobody's next time.
    aside: bool,
    size: Arc<AtomicU64>,
}

impl Claim {
    /// Bytes have come, so many more.
    pub fn grown(&self, bytes: u64) {
        self.size.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut parts = self.content.parts_now();
        parts.taken.remove(&self.path);
        let whole = parts.whole.values().any(|whole| whole.path == self.path);
        let done = match self.aside && !whole {
            true => parts.remove(&self.path),
            false => self.content.move_in(&mut parts, &self.digest),
        };
        if let Err(error) = done {
            tracing::warn!(%error, "a part stays until the next start");
        }
    }
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
            settled: Mutex::default(),
            parts: Mutex::default(),
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
        for file in [&marker, &content.index_path()] {
            gantry_sys::fs::remove_temporaries(file)
                .map_err(|e| Error::io(format_args!("tidy {}", root.display()), e))?;
        }
        if !marker.exists() {
            gantry_sys::fs::write_atomic(&marker, LAYOUT, 0o600, true)
                .map_err(|e| Error::io(format_args!("write {}", marker.display()), e))?;
        }
        content.purge()?;
        for (_, size) in content.list()? {
            content.account(size);
        }
        for (digest, metadata) in content.parts()? {
            let occupied = Arc::new(AtomicU64::new(metadata.blocks() * 512));
            let mut parts = content.parts_now();
            parts.files.insert(content.part_path(&digest), occupied);
        }
        Ok(content)
    }

    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    pub fn index_path(&self) -> PathBuf {
        self.inner.root.join("index.json")
    }

    /// Bytes and number of all blobs and parts.
    pub fn used(&self) -> (u64, u64) {
        let parts = self.parts_now();
        let bytes = parts
            .files
            .values()
            .map(|size| size.load(Ordering::Relaxed));
        let settled = self.settled_now();
        (
            bytes.fold(settled.bytes, u64::saturating_add),
            settled.blobs + parts.files.len() as u64,
        )
    }

    fn account(&self, size: u64) {
        let mut settled = self.settled_now();
        settled.bytes += size;
        settled.blobs += 1;
    }

    fn discount(&self, size: u64) {
        // A blob that somebody else put there was never counted.
        let mut settled = self.settled_now();
        settled.bytes = settled.bytes.saturating_sub(size);
        settled.blobs = settled.blobs.saturating_sub(1);
    }

    fn settled_now(&self) -> MutexGuard<'_, Settled> {
        let settled = self.inner.settled.lock();
        settled.unwrap_or_else(PoisonError::into_inner)
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

    fn parts_now(&self) -> MutexGuard<'_, Parts> {
        // What a panic could leave half changed are counts for people.
        self.inner
            .parts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A part that is whole. One whose file somebody has taken away is forgotten.
    fn whole(&self, parts: &mut Parts, digest: &Digest) -> Option<Whole> {
        let whole = parts.whole.get(digest)?;
        // An error of the disk is for whoever reads.
        if whole.path.try_exists().unwrap_or(true) {
            return Some(whole.clone());
        }
        tracing::warn!(%digest, "a blob that was fetched is gone from the disk");
        let path = whole.path.clone();
        parts.whole.remove(digest);
        parts.files.remove(&path);
        None
    }

    /// Opens a blob, settled or not; `None` if it is not here.
    fn open_found(&self, digest: &Digest) -> Result<Option<File>> {
        // Held over the opening: a blob that is being settled is in one of the two places.
        let mut parts = self.parts_now();
        let path = match self.whole(&mut parts, digest) {
            Some(whole) => whole.path,
            None => self.path(digest),
        };
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format_args!("open {}", path.display()), e)),
        }
    }

    /// The part of a blob of `size` bytes, with what earlier downloads left, unless another
    /// download has that.
    pub fn part(&self, digest: &Digest, size: u64) -> Result<Partial> {
        let claim = {
            let mut parts = self.parts_now();
            let usual = self.part_path(digest);
            let aside = parts.taken.contains(&usual) || parts.whole.contains_key(digest);
            let path = if aside { self.new_name() } else { usual };
            parts.taken.insert(path.clone());
            Claim {
                content: self.clone(),
                digest: digest.clone(),
                path,
                aside,
                size: Arc::default(),
            }
        };
        let part = Partial::open(claim.path.clone(), digest, size)?;
        claim.grown(part.there());
        let counted = claim.size.clone();
        self.parts_now().files.insert(claim.path.clone(), counted);
        Ok(part.with_claim(claim))
    }

    /// Throws away what a download brought, which is to begin anew.
    pub fn scrap(&self, part: &Partial) -> Result<()> {
        // Nobody else's: it has the claim.
        self.parts_now().remove(part.path())
    }

    /// Throws away what is here of a blob and not settled. What a download has at this moment it
    /// keeps.
    pub fn discard(&self, digest: &Digest) -> Result<()> {
        let mut parts = self.parts_now();
        if let Some(whole) = parts.whole.remove(digest) {
            parts.remove(&whole.path)?;
        }
        let usual = self.part_path(digest);
        if parts.taken.contains(&usual) {
            return Ok(());
        }
        parts.remove(&usual)
    }

    /// Takes a part that its reader has verified as a blob, which from now on is found.
    pub fn verified(&self, part: &Partial) -> Result<()> {
        let mut parts = self.parts_now();
        // Another download may have been first.
        if self.whole(&mut parts, &part.digest).is_some() || self.path(&part.digest).exists() {
            return parts.remove(part.path());
        }
        let whole = Whole {
            path: part.path().to_owned(),
            size: part.size,
        };
        parts.whole.insert(part.digest.clone(), whole);
        Ok(())
    }

    /// Once no download has the usual name of a blob's part: gives it to the blob if that was fetched
    /// aside.
    fn move_in(&self, parts: &mut Parts, digest: &Digest) -> Result<()> {
        let usual = self.part_path(digest);
        let Some(whole) = parts.whole.get_mut(digest) else {
            // Nor does a download need to go on of a blob that is here.
            return match self.path(digest).exists() && !parts.taken.contains(&usual) {
                true => parts.remove(&usual),
                false => Ok(()),
            };
        };
        if whole.path == usual || parts.taken.contains(&usual) || parts.taken.contains(&whole.path)
        {
            return Ok(());
        }
        fs::rename(&whole.path, &usual)
            .map_err(|e| Error::io(format_args!("rename {}", whole.path.display()), e))?;
        let before = std::mem::replace(&mut whole.path, usual.clone());
        if let Some(size) = parts.files.remove(&before) {
            parts.files.insert(usual, size);
        }
        Ok(())
    }

    /// Keeps a small blob that has this digest, as a part.
    pub fn keep(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        if self.size(digest)?.is_some() {
            return Ok(());
        }
        self.discard(digest)?;
        let part = self.part(digest, bytes.len() as u64)?;
        part.write_at(0, &[bytes::Bytes::copy_from_slice(bytes)])?;
        self.verified(&part)
    }

    /// Makes those of `blobs` durable that are not, and gives them their names. Whether all that
    /// were to be were still there.
    pub fn settle(&self, blobs: &[Digest]) -> Result<bool> {
        let parts: Vec<Digest> = {
            let parts = self.parts_now();
            let mut unsettled: Vec<Digest> = blobs
                .iter()
                .filter(|digest| parts.whole.contains_key(digest))
                .cloned()
                .collect();
            unsettled.sort();
            unsettled.dedup();
            unsettled
        };
        if parts.is_empty() {
            return Ok(true);
        }
        let root = &self.inner.root;
        let sync = |e| Error::io(format_args!("sync file system of {}", root.display()), e);
        // Before the rename, and for all blobs at once: a sync for each costs a journal commit
        // for each. It also reports write-back errors that no write call has seen (syncfs(2)).
        File::open(root)
            .and_then(gantry_sys::fs::syncfs)
            .map_err(sync)?;
        let mut complete = true;
        for digest in &parts {
            let mut parts = self.parts_now();
            // Settled meanwhile by another pull that has it too.
            if !parts.whole.contains_key(digest) {
                continue;
            }
            let Some(whole) = self.whole(&mut parts, digest) else {
                complete = false;
                continue;
            };
            self.place(&whole.path, digest, whole.size)?;
            parts.whole.remove(digest);
            parts.files.remove(&whole.path);
        }
        failpoint::at("pull::after-blob-rename")?;
        self.sync()?;
        Ok(complete)
    }

    /// Gives a file that is on disk its name as a blob. The caller holds the parts.
    fn place(&self, from: &Path, digest: &Digest, size: u64) -> Result<()> {
        let to = self.path(digest);
        let before = fs::symlink_metadata(&to).ok();
        fs::rename(from, &to).map_err(|e| Error::io(format_args!("store {}", to.display()), e))?;
        if let Some(before) = before {
            self.discount(before.len());
        }
        self.account(size);
        Ok(())
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
        for (digest, whole) in &self.parts_now().whole {
            if whole.path != self.part_path(digest)
                && let Ok(metadata) = fs::metadata(&whole.path)
            {
                parts.push((digest.clone(), metadata));
            }
        }
        Ok(parts)
    }

    /// Size of a blob; `None` if it is not here.
    pub fn size(&self, digest: &Digest) -> Result<Option<u64>> {
        if let Some(whole) = self.whole(&mut self.parts_now(), digest) {
            return Ok(Some(whole.size));
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
        let path = self.path(digest);
        let size = match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            // A link in a blob's place is nobody's blob, and goes like one.
            Ok(found) if !found.is_dir() => found.len(),
            Ok(_) => return Err(Error::invalid(path.display(), "a directory and no blob")),
            Err(e) => return Err(Error::io(format_args!("stat {}", path.display()), e)),
        };
        fs::rename(&path, self.new_name().with_extension("trash"))
            .map_err(|e| Error::io(format_args!("remove {}", path.display()), e))?;
        self.discount(size);
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
        // A pull may have the same blob unsettled: then there are two for the moment, and two are
        // counted.
        let _parts = self.content.parts_now();
        self.content.place(&self.path, digest, size)
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
        assert_eq!((content.used(), in_ingest(&content)), ((5, 1), 1));
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
    fn an_import_that_meets_an_unsettled_blob_is_counted_right() {
        let (_dir, content) = open();
        let digest = hash::sha256(b"hello");
        content.keep(&digest, b"hello").unwrap();
        let mut ingest = content.ingest(&digest).unwrap();
        ingest.write(b"hello").unwrap();
        ingest.finish(&digest, 5).unwrap();
        assert_eq!(content.used(), (10, 2), "there are two of it");
        content.settle(std::slice::from_ref(&digest)).unwrap();
        assert_eq!(content.used(), (5, 1));
        content.remove(&digest).unwrap();
        assert_eq!(content.used(), (0, 0));
        // Nor does one that was never counted make the sum wrap around.
        fs::write(content.path(&digest), b"hello").unwrap();
        content.remove(&digest).unwrap();
        assert_eq!(content.used(), (0, 0));
    }

    #[test]
    fn parts_are_counted_from_the_start() {
        let (_dir, content) = open();
        let data = vec![7; 1 << 20];
        let digest = hash::sha256(&data);
        let part = content.part(&digest, 1 << 20).unwrap();
        part.write_at(0, &[data.clone().into()]).unwrap();
        assert_eq!(content.used(), (1 << 20, 1));
        drop(part);
        assert_eq!(content.used(), (1 << 20, 1));
        let next = Content::open(content.root()).unwrap();
        assert_eq!(next.used(), (1 << 20, 1));
        // Taken up again, it is what is believed of it that counts.
        assert_eq!(next.part(&digest, 1 << 20).unwrap().there(), 1 << 20);
        assert_eq!(next.used(), (1 << 20, 1));
        next.discard(&digest).unwrap();
        assert_eq!(next.used(), (0, 0));
    }

    #[test]
    fn two_downloads_of_a_blob_have_files_of_their_own() {
        for first_wins in [true, false] {
            let (_dir, content) = open();
            let digest = hash::sha256(b"hello");
            let [first, second] = [(); 2].map(|()| content.part(&digest, 5).unwrap());
            first.write_at(0, &["hel".into()]).unwrap();
            second.write_at(0, &["hello".into()]).unwrap();
            assert_eq!(first.there(), 3);
            // Nobody takes away what is being written.
            content.discard(&digest).unwrap();
            assert_eq!(in_ingest(&content), 2);
            let (winner, loser) = match first_wins {
                true => (first, second),
                false => (second, first),
            };
            winner.write_at(0, &["hello".into()]).unwrap();
            content.verified(&winner).unwrap();
            drop(winner);
            let read = || content.read(&digest, 100).unwrap().unwrap();
            assert_eq!(read(), b"hello");
            // The one that comes late is not needed, and what is here stays.
            loser.write_at(0, &["hello".into()]).unwrap();
            content.verified(&loser).unwrap();
            drop(loser);
            assert_eq!((read().as_slice(), in_ingest(&content)), (&b"hello"[..], 1));
            assert!(
                content.part_path(&digest).exists(),
                "also for the next start"
            );
            assert_eq!(
                (content.parts().unwrap().len(), content.used()),
                (1, (5, 1))
            );
            content.purge().unwrap();
            assert!(content.settle(std::slice::from_ref(&digest)).unwrap());
            assert_eq!((read().as_slice(), in_ingest(&content)), (&b"hello"[..], 0));
            assert_eq!(content.used(), (5, 1));
        }
        // Settled by the one while the other still comes.
        let (_dir, content) = open();
        let digest = hash::sha256(b"hello");
        let [first, second] = [(); 2].map(|()| content.part(&digest, 5).unwrap());
        first.write_at(0, &["hel".into()]).unwrap();
        second.write_at(0, &["hello".into()]).unwrap();
        content.verified(&second).unwrap();
        drop(second);
        content.settle(std::slice::from_ref(&digest)).unwrap();
        drop(first);
        assert_eq!((content.used(), in_ingest(&content)), ((5, 1), 0));

        // One that is given up leaves its bytes if it was alone, and nothing beside another.
        let (_dir, content) = open();
        let digest = hash::sha256(b"hello");
        let [first, second] = [(); 2].map(|()| content.part(&digest, 5).unwrap());
        second.write_at(0, &["hel".into()]).unwrap();
        drop((first, second));
        assert_eq!(content.used(), (0, 1));
        let anew = content.part(&digest, 5).unwrap();
        anew.write_at(0, &["HELLO".into()]).unwrap();
        content.scrap(&anew).unwrap();
        drop(anew);
        assert_eq!((content.used(), in_ingest(&content)), ((0, 0), 0));
    }

    #[test]
    fn a_blob_that_somebody_took_away_is_not_here() {
        let (_dir, content) = open();
        let digest = hash::sha256(b"hello");
        let lose = || {
            content.keep(&digest, b"hello").unwrap();
            fs::remove_file(content.part_path(&digest)).unwrap();
        };
        lose();
        assert!(content.read(&digest, 100).unwrap().is_none());
        lose();
        assert_eq!(content.size(&digest).unwrap(), None);
        lose();
        assert!(!content.settle(std::slice::from_ref(&digest)).unwrap());
        assert_eq!(content.used(), (0, 0));
        content.keep(&digest, b"hello").unwrap();
        assert!(content.settle(std::slice::from_ref(&digest)).unwrap());
        assert_eq!(content.read(&digest, 100).unwrap().unwrap(), b"hello");
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
