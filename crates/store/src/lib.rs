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
//! under way share the next one. All calls block on the disk: async callers use a blocking thread.
//!
//! # When it will not open
//!
//! sled's 0.34 line can be damaged by an abrupt stop. [`Store::open`] then renames the directory
//! to `<dir>.damaged-<n>` and starts empty; [`Opened::set_aside`] says so. Some damage it does not
//! notice: a log that was cut opens as a shorter one. So whoever reads completes the store from what
//! describes itself (run directories, the content store's index, layer directories), each time.

mod envelope;
mod flush;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use gantry_types::{ErrorKind, Kind};

pub use envelope::{EnvelopeError, open as open_envelope, seal as seal_envelope};

/// Generated from `proto/record/v1`.
pub mod record {
    #![allow(clippy::doc_lazy_continuation)]
    include!(concat!(env!("OUT_DIR"), "/gantry.record.v1.rs"));
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("store {path}: {source}")]
    Open { path: PathBuf, source: sled::Error },
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
    #[error("store: flush: {0}")]
    Flush(String),
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
            Error::Open { .. }
            | Error::SetAside { .. }
            | Error::Access { .. }
            | Error::Flush(_)
            | Error::Unreadable { .. } => ErrorKind::Internal,
        }
    }
}

/// A message that lives in a tree of its own.
pub trait Record: prost::Message + Default {
    /// Name of the tree.
    const TREE: &'static str;
    /// Version of the schema that this program writes and reads.
    const VERSION: u32 = 1;
}

impl Record for record::PodConfig {
    const TREE: &'static str = "pod-config";
}
impl Record for record::PodStatus {
    const TREE: &'static str = "pod-status";
}
impl Record for record::ContainerConfig {
    const TREE: &'static str = "container-config";
}
impl Record for record::ContainerStatus {
    const TREE: &'static str = "container-status";
}
impl Record for record::ImageRecord {
    const TREE: &'static str = "image";
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
    db: sled::Db,
    flusher: flush::Shared,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

impl Store {
    /// Opens the store in directory `dir`, made if absent. A second process that opens it gets
    /// [`Error::Open`]: the lock is sled's own and a store in use is never set aside.
    pub fn open(dir: &Path) -> Result<Opened, Error> {
        match Self::try_open(dir) {
            Ok(store) => Ok(Opened {
                store: Arc::new(store),
                set_aside: None,
            }),
            Err(source) if in_use(&source) => Err(Error::Open {
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
                let store = Self::try_open(dir).map_err(|source| Error::Open {
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

    fn try_open(dir: &Path) -> Result<Self, sled::Error> {
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
        let db = opened.unwrap_or_else(|_| {
            Err(sled::Error::ReportableBug(
                "sled panicked while opening".to_owned(),
            ))
        })?;
        Ok(Self {
            db,
            flusher: flush::Shared::default(),
        })
    }

    /// Writes a record and returns once it is on disk.
    pub fn put<R: Record>(&self, key: &str, record: &R) -> Result<(), Error> {
        self.tree::<R>(key)?
            .insert(key, envelope::seal(R::VERSION, record))
            .map_err(|source| Error::Access {
                tree: R::TREE,
                key: key.to_owned(),
                source,
            })?;
        self.flush()
    }

    /// Writes two records of one object and returns once both are on disk: one flush, not two.
    /// A crash between them leaves the first alone.
    pub fn put_both<A: Record, B: Record>(&self, key: &str, a: &A, b: &B) -> Result<(), Error> {
        self.tree::<A>(key)?
            .insert(key, envelope::seal(A::VERSION, a))
            .map_err(|source| Error::Access {
                tree: A::TREE,
                key: key.to_owned(),
                source,
            })?;
        self.put(key, b)
    }

    pub fn get<R: Record>(&self, key: &str) -> Result<Option<R>, Error> {
        let value = self
            .tree::<R>(key)?
            .get(key)
            .map_err(|source| Error::Access {
                tree: R::TREE,
                key: key.to_owned(),
                source,
            })?;
        value
            .map(|bytes| envelope::open(R::VERSION, &bytes))
            .transpose()
            .map_err(|source| Error::Unreadable {
                tree: R::TREE,
                key: key.to_owned(),
                source,
            })
    }

    /// Removes a record and returns once that is on disk; absent is success.
    pub fn remove<R: Record>(&self, key: &str) -> Result<(), Error> {
        self.tree::<R>(key)?
            .remove(key)
            .map_err(|source| Error::Access {
                tree: R::TREE,
                key: key.to_owned(),
                source,
            })?;
        self.flush()
    }

    /// Removes both records of one object with one flush.
    pub fn remove_both<A: Record, B: Record>(&self, key: &str) -> Result<(), Error> {
        self.tree::<A>(key)?
            .remove(key)
            .map_err(|source| Error::Access {
                tree: A::TREE,
                key: key.to_owned(),
                source,
            })?;
        self.remove::<B>(key)
    }

    /// Every record of a tree, readable or not.
    pub fn scan<R: Record>(&self) -> Result<Scan<R>, Error> {
        let mut scan = Scan {
            records: Vec::new(),
            unreadable: Vec::new(),
        };
        for entry in self.tree::<R>("")?.iter() {
            let (key, value) = entry.map_err(|source| Error::Access {
                tree: R::TREE,
                key: String::new(),
                source,
            })?;
            let key = String::from_utf8_lossy(&key).into_owned();
            match envelope::open(R::VERSION, &value) {
                Ok(record) => scan.records.push((key, record)),
                Err(error) => scan.unreadable.push((key, error)),
            }
        }
        Ok(scan)
    }

    fn tree<R: Record>(&self, key: &str) -> Result<sled::Tree, Error> {
        self.db.open_tree(R::TREE).map_err(|source| Error::Access {
            tree: R::TREE,
            key: key.to_owned(),
            source,
        })
    }

    fn flush(&self) -> Result<(), Error> {
        self.flusher
            .flush(|| {
                gantry_sys::failpoint::at("store::written")?;
                self.db.flush()?;
                gantry_sys::failpoint::at("store::flushed")
            })
            .map_err(Error::Flush)
    }
}

/// sled keeps several segments in memory: with its default of 512 KiB an empty store costs about
/// 21 MiB.
const SEGMENT_BYTES: usize = 64 * 1024;

/// Whether another process holds the store's lock.
fn in_use(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(io) if io.to_string().contains("could not acquire lock"))
}

fn set_aside(dir: &Path) -> std::io::Result<PathBuf> {
    let mut n = 1;
    loop {
        let mut name = dir.as_os_str().to_owned();
        name.push(format!(".damaged-{n}"));
        let aside = PathBuf::from(name);
        if !aside.exists() {
            std::fs::rename(dir, &aside)?;
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
        let tree = store.db.open_tree(ImageRecord::TREE).unwrap();
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
}
