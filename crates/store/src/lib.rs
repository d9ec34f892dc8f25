//! What gantryd must find again after a restart, in sled.
//!
//! # Schema
//!
//! | tree               | key          | value (`proto/record/v1`) | written                        |
//! |--------------------|--------------|---------------------------|--------------------------------|
//! | `pod-config`       | pod id       | `PodConfig`               | once, before the first effect  |
//! | `pod-status`       | pod id       | `PodStatus`               | at each transition             |
//! | `container-config` | container id | `ContainerConfig`         | once, before the first effect  |
//! | `container-status` | container id | `ContainerStatus`         | at each transition             |
//! | `image`            | image id     | `ImageRecord`             | when its layers are on disk    |
//!
//! Every value is an [`Envelope`](record::Envelope): schema version, payload, checksum. A value
//! that cannot be read is reported by [`Store::scan`] and stays where it is.
//!
//! # Durability
//!
//! [`Store::put`] and [`Store::remove`] return after `flush`; callers that come while a flush is
//! under way share the next one. sled's own flush does not outlive a power loss; `disk` makes it
//! do so. All calls block on the disk: async callers use a blocking thread.
//!
//! # When it will not open
//!
//! sled's 0.34 line can be damaged by an abrupt stop, and takes some of what one leaves for damage
//! (`snapshot`). Of what is damaged [`Store::open`] renames the directory to `<dir>.damaged-<n>` and
//! starts empty; [`Opened::set_aside`] says so. Some damage it does not notice: a log that was cut
//! opens as a shorter one. So whoever reads completes the store from what describes itself (run
//! directories, the content store's index, layer directories), each time.
//!
//! A disk that is full is no damage: the store is left where it is, and gantryd does not start. sled
//! that has met one writes nothing again, so the next call after that opens the store anew.

mod disk;
mod envelope;
mod flush;
mod snapshot;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use gantry_types::times::Reading;
use gantry_types::{ErrorKind, Kind};

pub use envelope::{EnvelopeError, seal as seal_envelope};

/// Generated from `proto/record/v1`.
pub mod record {
    #![allow(clippy::doc_lazy_continuation)]
    include!(concat!(env!("OUT_DIR"), "/gantry.record.v1.rs"));
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("store {path}: {source}")]
    Open { path: PathBuf, source: sled::Error },
    #[error("store {path}: preparing its directory: {source}")]
    Prepare {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("store {path}: setting it aside: {source}")]
    SetAside {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("store: {tree}/{key}: {source}")]
    Access {
        tree: &'static str,
        key: String,
        source: sled::Error,
    },
    #[error("store: flush: {message}")]
    Flush { kind: ErrorKind, message: String },
    #[error("store: {tree}/{key}: {source}")]
    Unreadable {
        tree: &'static str,
        key: String,
        source: EnvelopeError,
    },
}

impl Kind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Error::Access {
                source: sled::Error::Io(error),
                ..
            } => Kind::kind(error),
            Error::Flush { kind, .. } => *kind,
            Error::Open {
                source: sled::Error::Io(error),
                ..
            } => Kind::kind(error),
            Error::Prepare { source, .. } => Kind::kind(source),
            Error::Open { .. }
            | Error::SetAside { .. }
            | Error::Access { .. }
            | Error::Unreadable { .. } => ErrorKind::Internal,
        }
    }
}

/// A message that lives in a tree of its own.
pub trait Record: prost::Message + Default {
    /// Name of the tree.
    const TREE: &'static str;
    /// Version of the schema that this program writes and reads. It grows when a program that does
    /// not know what is new must leave the record alone. A field that it may pass over changes
    /// nothing here; what it then writes has no such field.
    const VERSION: u32 = 1;

    /// A field, and the value of an enumeration in it that came after this program was made. Read
    /// as its default, it would say something else.
    fn unknown(&self) -> Option<(&'static str, i32)> {
        None
    }
}

impl Record for record::PodConfig {
    const TREE: &'static str = "pod-config";
}
impl Record for record::PodStatus {
    const TREE: &'static str = "pod-status";

    fn unknown(&self) -> Option<(&'static str, i32)> {
        let known = record::PodPhase::try_from(self.phase).is_ok();
        (!known).then_some(("phase", self.phase))
    }
}
impl Record for record::ContainerConfig {
    const TREE: &'static str = "container-config";
}
impl Record for record::ContainerStatus {
    const TREE: &'static str = "container-status";

    fn unknown(&self) -> Option<(&'static str, i32)> {
        let known = record::ContainerPhase::try_from(self.phase).is_ok();
        (!known).then_some(("phase", self.phase))
    }
}
impl Record for record::ImageRecord {
    const TREE: &'static str = "image";
}

/// Reads what [`seal_envelope`] made of a record.
///
/// # Errors
/// It is damaged, of another version, or says what this program does not know.
pub fn open_record<R: Record>(bytes: &[u8]) -> Result<R, EnvelopeError> {
    let record: R = envelope::open(R::VERSION, bytes)?;
    match record.unknown() {
        Some((field, value)) => Err(EnvelopeError::Unknown { field, value }),
        None => Ok(record),
    }
}

/// What a scan of one tree found.
#[derive(Debug)]
pub struct Scan<R> {
    pub records: Vec<(String, R)>,
    /// Keys whose value is damaged or of a version that this program does not know.
    pub unreadable: Vec<(String, EnvelopeError)>,
}

/// An opened store.
#[derive(Debug)]
pub struct Opened {
    pub store: Arc<Store>,
    /// Where a store that would not open was moved; the new one is empty.
    pub set_aside: Option<PathBuf>,
}

pub struct Store {
    dir: PathBuf,
    /// `None` while it cannot be opened again.
    db: RwLock<Option<sled::Db>>,
    /// A write has failed: nothing more is written before the store is opened anew.
    broken: AtomicBool,
    disk: disk::Disk,
    flusher: flush::Shared,
}

/// How long sled may keep its lock after its last handle has gone.
const UNLOCKED: Duration = Duration::from_secs(2);

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

impl Store {
    /// Opens the store in directory `dir`, made if absent. A second process that opens it gets
    /// [`Error::Open`]: the lock is sled's own and a store in use is never set aside.
    pub fn open(dir: &Path) -> Result<Opened, Error> {
        let prepare = || {
            disk::Disk::prepare(dir).map_err(|source| Error::Prepare {
                path: dir.into(),
                source,
            })
        };
        match Self::try_open(dir, prepare()?) {
            Ok(store) => Ok(Opened {
                store: Arc::new(store),
                set_aside: None,
            }),
            Err(source) if in_use(&source) || refused(&source) => Err(Error::Open {
                path: dir.into(),
                source,
            }),
            Err(source) => {
                tracing::error!(path = %dir.display(), error = %source,
                    "the store will not open: it is set aside and rebuilt");
                let aside = set_aside(dir).map_err(|source| Error::SetAside {
                    path: dir.into(),
                    source,
                })?;
                let store = Self::try_open(dir, prepare()?).map_err(|source| Error::Open {
                    path: dir.into(),
                    source,
                })?;
                Ok(Opened {
                    store: Arc::new(store),
                    set_aside: Some(aside),
                })
            }
        }
    }

    fn try_open(dir: &Path, disk: disk::Disk) -> Result<Self, sled::Error> {
        Ok(Self {
            dir: dir.to_owned(),
            db: RwLock::new(Some(open_db(dir)?)),
            broken: AtomicBool::new(false),
            disk,
            flusher: flush::Shared::default(),
        })
    }

    /// Works on the open store. After an error the next call opens it anew: sled remembers one for
    /// as long as it is open, and refuses whatever comes after.
    fn with<T>(&self, work: impl FnOnce(&sled::Db) -> Result<T, Error>) -> Result<T, Error> {
        if self.broken.load(Ordering::Acquire) {
            self.reopen()?;
        }
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        let outcome = match &*db {
            Some(db) => work(db),
            // Another call is at it and has failed.
            None => Err(self.closed()),
        };
        if let Err(Error::Access { .. } | Error::Flush { .. }) = outcome {
            self.broken.store(true, Ordering::Release);
        }
        outcome
    }

    fn closed(&self) -> Error {
        Error::Open {
            path: self.dir.clone(),
            source: sled::Error::Unsupported("it is closed after an error".to_owned()),
        }
    }

    /// What was acknowledged is on disk; the rest was refused, and is asked for again.
    fn reopen(&self) -> Result<(), Error> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        if !self.broken.load(Ordering::Acquire) {
            return Ok(());
        }
        // The last handle: readers are kept out.
        drop(db.take());
        let deadline = Instant::now() + UNLOCKED;
        loop {
            match open_db(&self.dir) {
                Ok(opened) => {
                    tracing::warn!(path = %self.dir.display(), "the store was opened anew after an error");
                    *db = Some(opened);
                    self.broken.store(false, Ordering::Release);
                    return Ok(());
                }
                Err(source) if in_use(&source) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(source) => {
                    return Err(Error::Open {
                        path: self.dir.clone(),
                        source,
                    });
                }
            }
        }
    }

    /// Writes a record and returns once it is on disk.
    pub fn put<R: Record>(&self, key: &str, record: &R) -> Result<(), Error> {
        self.with(|db| {
            insert(db, key, record)?;
            self.flush(db)
        })
    }

    /// Writes two records of one object and returns once both are on disk: one flush, not two.
    /// A crash between them leaves the first alone.
    pub fn put_both<A: Record, B: Record>(&self, key: &str, a: &A, b: &B) -> Result<(), Error> {
        self.with(|db| {
            insert(db, key, a)?;
            insert(db, key, b)?;
            self.flush(db)
        })
    }

    pub fn get<R: Record>(&self, key: &str) -> Result<Option<R>, Error> {
        let value = self.with(|db| tree::<R>(db, key)?.get(key).map_err(access::<R>(key)))?;
        value
            .map(|bytes| open_record(&bytes))
            .transpose()
            .map_err(|source| Error::Unreadable {
                tree: R::TREE,
                key: key.to_owned(),
                source,
            })
    }

    /// Removes a record and returns once that is on disk; absent is success.
    pub fn remove<R: Record>(&self, key: &str) -> Result<(), Error> {
        self.with(|db| {
            remove::<R>(db, key)?;
            self.flush(db)
        })
    }

    /// Removes both records of one object with one flush.
    pub fn remove_both<A: Record, B: Record>(&self, key: &str) -> Result<(), Error> {
        self.with(|db| {
            remove::<A>(db, key)?;
            remove::<B>(db, key)?;
            self.flush(db)
        })
    }

    /// Every record of a tree, readable or not.
    pub fn scan<R: Record>(&self) -> Result<Scan<R>, Error> {
        let mut scan = Scan {
            records: Vec::new(),
            unreadable: Vec::new(),
        };
        self.with(|db| {
            for entry in tree::<R>(db, "")?.iter() {
                let (key, value) = entry.map_err(access::<R>(""))?;
                let key = String::from_utf8_lossy(&key).into_owned();
                match open_record(&value) {
                    Ok(record) => scan.records.push((key, record)),
                    Err(error) => scan.unreadable.push((key, error)),
                }
            }
            Ok(())
        })?;
        Ok(scan)
    }

    /// How long flushes took.
    pub fn flush_times(&self) -> Reading {
        self.flusher.times.read()
    }

    /// For how long a flush is under way, and how many writers wait for one.
    pub fn flushing(&self) -> (Option<Duration>, usize) {
        let (since, waiting) = self.flusher.now();
        (since.map(|since| since.elapsed()), waiting)
    }

    /// Asks the store for nothing in particular: returns when it has answered. Blocks as any other
    /// call does.
    pub fn probe(&self) -> Result<(), Error> {
        gantry_sys::failpoint::pass("store::probed");
        let access = access::<record::PodConfig>;
        self.with(|db| {
            tree::<record::PodConfig>(db, "")?
                .get("")
                .map_err(access(""))
        })
        .map(drop)
    }

    fn flush(&self, db: &sled::Db) -> Result<(), Error> {
        self.flusher
            .flush(|| {
                gantry_sys::failpoint::at("store::written")?;
                // Of the disk's errors this makes what they were.
                db.flush().map_err(std::io::Error::from)?;
                self.disk.flushed()?;
                gantry_sys::failpoint::at("store::flushed")
            })
            .map_err(|flush::Failed { kind, message }| Error::Flush { kind, message })
    }
}

/// An error of sled about a key of a tree.
fn access<R: Record>(key: &str) -> impl FnOnce(sled::Error) -> Error {
    let key = key.to_owned();
    move |source| Error::Access {
        tree: R::TREE,
        key,
        source,
    }
}

fn tree<R: Record>(db: &sled::Db, key: &str) -> Result<sled::Tree, Error> {
    db.open_tree(R::TREE).map_err(access::<R>(key))
}

fn insert<R: Record>(db: &sled::Db, key: &str, record: &R) -> Result<(), Error> {
    tree::<R>(db, key)?
        .insert(key, envelope::seal(R::VERSION, record))
        .map(drop)
        .map_err(access::<R>(key))
}

fn remove<R: Record>(db: &sled::Db, key: &str) -> Result<(), Error> {
    tree::<R>(db, key)?
        .remove(key)
        .map(drop)
        .map_err(access::<R>(key))
}

fn open_db(dir: &Path) -> Result<sled::Db, sled::Error> {
    snapshot::remove_unfinished(dir)?;
    // sled answers some damage with a panic (spacejam/sled#1533): that is damage too, not a
    // reason to crash at every start.
    let opened = std::panic::catch_unwind(|| {
        // Records are small and few, so little memory is asked for. Nothing is flushed by
        // the clock: every acknowledged change was flushed by its writer.
        sled::Config::new()
            .path(dir)
            .mode(sled::Mode::LowSpace)
            .cache_capacity(256 * 1024)
            .segment_size(SEGMENT_BYTES)
            .flush_every_ms(None)
            .open()
    });
    opened.unwrap_or_else(|_| {
        Err(sled::Error::ReportableBug(
            "sled panicked while opening".to_owned(),
        ))
    })
}

/// sled keeps several segments in memory: with its default of 512 KiB an empty store costs about
/// 21 MiB.
const SEGMENT_BYTES: usize = 64 * 1024;

/// Whether another process holds the store's lock.
fn in_use(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(io) if io.to_string().contains("could not acquire lock"))
}

/// Whether the machine refuses what opening takes. That says nothing about the store.
fn refused(error: &sled::Error) -> bool {
    use std::io::ErrorKind::{
        OutOfMemory, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull,
    };
    // EMFILE and ENFILE, which have no kind.
    const NO_DESCRIPTOR: [i32; 2] = [24, 23];
    let sled::Error::Io(error) = error else {
        return false;
    };
    matches!(
        error.kind(),
        OutOfMemory | PermissionDenied | QuotaExceeded | ReadOnlyFilesystem | StorageFull
    ) || error
        .raw_os_error()
        .is_some_and(|number| NO_DESCRIPTOR.contains(&number))
}

fn set_aside(dir: &Path) -> std::io::Result<PathBuf> {
    let mut n = 1;
    loop {
        let mut name = dir.as_os_str().to_owned();
        name.push(format!(".damaged-{n}"));
        let aside = PathBuf::from(name);
        if !aside.exists() {
            std::fs::rename(dir, &aside)?;
            // Else a power loss could bring the damaged one back, under the records that were
            // rebuilt meanwhile.
            disk::sync_parent(dir)?;
            return Ok(aside);
        }
        n += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use record::{ImageRecord, PodConfig, PodStatus};

    fn image(id: &str) -> ImageRecord {
        ImageRecord {
            id: id.to_owned(),
            size: 7,
            ..Default::default()
        }
    }

    #[test]
    fn a_record_is_found_after_the_store_was_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let opened = Store::open(&path).unwrap();
        opened.store.put("a", &image("a")).unwrap();
        opened.store.put("b", &image("b")).unwrap();
        opened.store.remove::<ImageRecord>("b").unwrap();
        opened.store.remove::<ImageRecord>("never there").unwrap();
        drop(opened);
        let opened = Store::open(&path).unwrap();
        assert!(opened.set_aside.is_none());
        assert_eq!(
            opened.store.get::<ImageRecord>("a").unwrap().unwrap(),
            image("a")
        );
        assert_eq!(opened.store.get::<ImageRecord>("b").unwrap(), None);
        let scan = opened.store.scan::<ImageRecord>().unwrap();
        assert_eq!(scan.records.len(), 1);
        assert!(scan.unreadable.is_empty());
    }

    #[test]
    fn both_records_of_an_object_come_and_go_together() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap().store;
        let config = PodConfig {
            id: "p".into(),
            ..Default::default()
        };
        store.put_both("p", &config, &PodStatus::default()).unwrap();
        assert_eq!(store.get::<PodConfig>("p").unwrap().unwrap(), config);
        assert!(store.get::<PodStatus>("p").unwrap().is_some());
        store.remove_both::<PodConfig, PodStatus>("p").unwrap();
        assert!(store.scan::<PodConfig>().unwrap().records.is_empty());
        assert!(store.scan::<PodStatus>().unwrap().records.is_empty());
    }

    #[test]
    fn a_value_that_cannot_be_read_is_reported_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap().store;
        store.put("good", &image("good")).unwrap();
        let db = store.db.read().unwrap();
        let tree = tree::<ImageRecord>(db.as_ref().unwrap(), "").unwrap();
        tree.insert("torn", b"\x01\x02torn".as_slice()).unwrap();
        tree.insert("newer", envelope::seal(99, &image("newer")))
            .unwrap();
        for _ in 0..2 {
            let scan = store.scan::<ImageRecord>().unwrap();
            assert_eq!(scan.records.len(), 1);
            let keys: Vec<_> = scan
                .unreadable
                .iter()
                .map(|(key, _)| key.as_str())
                .collect();
            assert_eq!(keys, ["newer", "torn"]);
        }
        assert!(matches!(
            store.get::<ImageRecord>("newer"),
            Err(Error::Unreadable { .. })
        ));
    }

    #[test]
    fn a_value_that_came_later_is_no_other_value() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap().store;
        let mut status = PodStatus::default();
        status.set_phase(record::PodPhase::Ready);
        store.put("known", &status).unwrap();
        status.phase = 77;
        store.put("later", &status).unwrap();
        let container = record::ContainerStatus {
            phase: -1,
            ..Default::default()
        };
        store.put("later", &container).unwrap();
        let pods = store.scan::<PodStatus>().unwrap();
        assert_eq!(pods.records.len(), 1);
        let field = "phase";
        let unknown = EnvelopeError::Unknown { field, value: 77 };
        assert_eq!(pods.unreadable, [("later".to_owned(), unknown.clone())]);
        let containers = store.scan::<record::ContainerStatus>().unwrap();
        assert_eq!(containers.unreadable.len(), 1);
        assert!(unknown.is_newer());
        for (found, newer) in [(2, true), (0, false)] {
            let version = EnvelopeError::Version { found, known: 1 };
            assert_eq!(version.is_newer(), newer, "{version}");
        }
        assert!(!EnvelopeError::Damaged.is_newer());
    }

    #[test]
    fn a_store_that_will_not_open_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let opened = Store::open(&path).unwrap();
        opened.store.put("a", &image("a")).unwrap();
        drop(opened);
        std::fs::write(path.join("conf"), b"not what sled wrote").unwrap();
        let opened = Store::open(&path).unwrap();
        let aside = opened.set_aside.expect("the damaged store was moved");
        assert!(
            aside.join("conf").exists(),
            "the damaged store is kept for people to look at"
        );
        assert!(
            opened
                .store
                .scan::<ImageRecord>()
                .unwrap()
                .records
                .is_empty()
        );
        opened.store.put("b", &image("b")).unwrap();
    }

    #[test]
    fn a_snapshot_that_was_not_finished_is_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let opened = Store::open(&path).unwrap();
        opened.store.put("a", &image("a")).unwrap();
        drop(opened);
        // Its name sorts behind that of every finished one.
        std::fs::write(path.join("snap.FFFFFFFFFFFFFFFF.generating"), "").unwrap();
        let opened = Store::open(&path).unwrap();
        assert_eq!(opened.set_aside, None);
        assert_eq!(opened.store.scan::<ImageRecord>().unwrap().records.len(), 1);
        // In the same process, after a disk that was full.
        std::fs::write(path.join("snap.FFFFFFFFFFFFFFFF.generating"), "").unwrap();
        opened.store.broken.store(true, Ordering::Release);
        opened.store.put("b", &image("b")).unwrap();
    }

    #[test]
    fn a_store_in_use_is_refused_not_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let first = Store::open(&path).unwrap();
        assert!(matches!(Store::open(&path), Err(Error::Open { .. })));
        first.store.put("a", &image("a")).unwrap();
    }

    #[test]
    fn concurrent_writers_all_find_their_record_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let store = Store::open(&path).unwrap().store;
        std::thread::scope(|scope| {
            for writer in 0..8 {
                let store = &store;
                scope.spawn(move || {
                    for n in 0..20 {
                        let key = format!("{writer}-{n}");
                        store.put(&key, &image(&key)).unwrap();
                    }
                });
            }
        });
        drop(store);
        let store = Store::open(&path).unwrap().store;
        assert_eq!(store.scan::<ImageRecord>().unwrap().records.len(), 160);
    }

    /// Anything else is: it is set aside, and made anew of what describes itself.
    #[test]
    fn what_the_machine_refuses_is_no_damage() {
        let by_kind = |kind: std::io::ErrorKind| sled::Error::Io(kind.into());
        let by_number = |number| sled::Error::Io(std::io::Error::from_raw_os_error(number));
        for number in [28, 122, 30, 13, 12, 24, 23] {
            assert!(refused(&by_number(number)), "{:?}", by_number(number));
        }
        for kind in [
            std::io::ErrorKind::InvalidData,
            std::io::ErrorKind::UnexpectedEof,
        ] {
            assert!(!refused(&by_kind(kind)), "{kind:?}");
        }
        assert!(!refused(&sled::Error::Corruption { at: None, bt: () }));
    }

    #[test]
    fn a_store_that_has_met_an_error_is_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap().store;
        store.put("a", &image("a")).unwrap();
        store.broken.store(true, Ordering::Release);
        std::thread::scope(|scope| {
            for n in 0..8 {
                let store = &store;
                scope.spawn(move || store.put(&n.to_string(), &image("b")).unwrap());
            }
        });
        assert!(!store.broken.load(Ordering::Acquire));
        assert_eq!(store.scan::<ImageRecord>().unwrap().records.len(), 9);
    }
}
