//! A blob on its way in.
//!
//! Downloads write it, in any order and from any host; one reader follows, in order, and hashes
//! and unpacks what is there while the rest still comes. The file is the only buffer between the
//! two, so that neither a slow disk nor a slow network makes memory grow.
//!
//! A byte that is there never changes: what the reader has hashed is what stays in the file. The
//! file outlives the process, and the next download of the blob goes on with it; the digest is
//! always taken over the whole.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use gantry_types::Digest;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tokio::sync::watch;

use crate::budget::{Turn, Turns};
use crate::cancel::Cancel;
use crate::content::Claim;
use crate::hash::Hasher;
use crate::{Error, Result};

/// Where a piece ends inside a block, the file system does not say; so the last block of a piece
/// is fetched again. For the same reason a piece begins at a multiple of it, or where bytes are. File
/// systems have blocks of up to 64 KiB.
pub const BLOCK: u64 = 64 << 10;

#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    file: File,
    pub digest: Digest,
    pub size: u64,
    /// Something was there when it was opened.
    pub resumed: bool,
    state: Mutex<State>,
    grown: Condvar,
    /// The first byte is there.
    begun: watch::Sender<bool>,
    claim: Option<Claim>,
}

#[derive(Debug, Default)]
struct State {
    have: Spans,
    /// No more will come.
    ended: bool,
    /// The reader wants no more.
    unwanted: bool,
}

impl Partial {
    /// Opens or makes the file at `path` for a blob of `size` bytes.
    pub fn open(path: PathBuf, digest: &Digest, size: u64) -> Result<Self> {
        let fail = |e: io::Error| Error::io(format_args!("open {}", path.display()), e);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(fail)?;
        let have = match file.metadata().map_err(fail)?.len() {
            0 => Spans::default(),
            // Of another blob of this name, which there cannot be, or damaged.
            length if length > size => {
                file.set_len(0).map_err(fail)?;
                Spans::default()
            }
            length => pieces(&file, length, size).map_err(fail)?,
        };
        let begun = watch::Sender::new(have.end_of(0).is_some());
        Ok(Self {
            path,
            file,
            digest: digest.clone(),
            size,
            resumed: !have.0.is_empty(),
            begun,
            claim: None,
            state: Mutex::new(State {
                have,
                ..State::default()
            }),
            grown: Condvar::new(),
        })
    }

    /// Keeps the file's claim for as long as this lives.
    pub fn with_claim(self, claim: Claim) -> Self {
        Self {
            claim: Some(claim),
            ..self
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that are there.
    pub fn there(&self) -> u64 {
        self.lock().have.bytes()
    }

    /// Returns once the first byte is there.
    pub async fn begun(&self) {
        // The sender lives as long as `self`.
        let _ = self.begun.subscribe().wait_for(|&begun| begun).await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment or insertion.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first piece of `within` that is not there.
    pub fn missing(&self, within: Range<u64>) -> Option<Range<u64>> {
        self.lock().have.gap(within)
    }

    /// Bytes that are not there.
    pub fn absent(&self) -> u64 {
        self.size.saturating_sub(self.there())
    }

    /// Writes what is not there yet of `data`, which belongs at `offset`. Blocks.
    pub fn write_at(&self, mut offset: u64, data: &[Bytes]) -> Result<()> {
        let start = offset;
        for chunk in data {
            let end = offset + chunk.len() as u64;
            let mut at = offset;
            while let Some(gap) = self.missing(at..end) {
                let from = usize::try_from(gap.start - offset).unwrap_or(usize::MAX);
                let to = usize::try_from(gap.end - offset).unwrap_or(usize::MAX);
                self.file
                    .write_all_at(chunk.get(from..to).unwrap_or_default(), gap.start)
                    .map_err(|e| Error::io(format_args!("write {}", self.path.display()), e))?;
                at = gap.end;
                if let Some(claim) = &self.claim {
                    claim.grown(gap.end - gap.start);
                }
                let first = gap.start == 0;
                self.lock().have.add(gap);
                if first {
                    self.begun.send_replace(true);
                }
            }
            self.grown.notify_all();
            offset = end;
        }
        // The disk begins now, and not when somebody waits for it.
        gantry_sys::fs::start_writeback(&self.file, start, offset - start);
        crate::failpoint::at("pull::mid-download")
    }

    /// No more will come: whoever waits for more is told.
    pub fn end(&self) {
        self.lock().ended = true;
        self.grown.notify_all();
    }

    /// The reader has failed, and not for the blob's sake: nothing more need come.
    pub fn refuse(&self) {
        self.lock().unwanted = true;
    }

    pub fn is_unwanted(&self) -> bool {
        self.lock().unwanted
    }

    /// How far the blob is there without a gap, from `at`; `None` if the byte at `at` is not.
    fn ready(&self, at: u64) -> Option<u64> {
        self.lock().have.end_of(at)
    }

    /// Waits for the byte at `at`.
    fn wait(&self, at: u64) -> io::Result<u64> {
        let mut state = self.lock();
        loop {
            if let Some(end) = state.have.end_of(at) {
                return Ok(end);
            }
            if state.ended {
                return Err(io::Error::other("the download has ended"));
            }
            state = self
                .grown
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The pieces of an earlier download, as the file system knows them (lseek(2), SEEK_HOLE). On one
/// that does not, all of it counts as there, and the digest says the rest.
fn pieces(file: &File, length: u64, size: u64) -> io::Result<Spans> {
    let mut have = Spans::default();
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        let kept = if end == size {
            end
        } else {
            end.saturating_sub(1) / BLOCK * BLOCK
        };
        if kept > start {
            have.add(start..kept);
        }
        at = end;
    }
    Ok(have)
}

/// Sorted pieces that neither touch nor overlap.
#[derive(Debug, Default, PartialEq, Eq)]
struct Spans(Vec<Range<u64>>);

impl Spans {
    fn add(&mut self, new: Range<u64>) {
        let first = self.0.partition_point(|span| span.end < new.start);
        let last = self.0.partition_point(|span| span.start <= new.end);
        let joined = self.0[first..last].iter().fold(new, |sum, span| {
            sum.start.min(span.start)..sum.end.max(span.end)
        });
        self.0.splice(first..last, [joined]);
    }

    fn bytes(&self) -> u64 {
        self.0.iter().map(|span| span.end - span.start).sum()
    }

    fn end_of(&self, at: u64) -> Option<u64> {
        let next = self.0.partition_point(|span| span.end <= at);
        let span = self.0.get(next)?;
        (span.start <= at).then_some(span.end)
    }

    fn gap(&self, within: Range<u64>) -> Option<Range<u64>> {
        let start = self.end_of(within.start).unwrap_or(within.start);
        if start >= within.end {
            return None;
        }
        let next = self.0.partition_point(|span| span.end <= start);
        let end = self.0.get(next).map_or(within.end, |span| span.start);
        Some(start..end.min(within.end))
    }
}

/// Reads a blob from its beginning while it comes, and hashes it.
pub struct Follow<'a> {
    partial: &'a Partial,
    at: u64,
    hasher: Hasher,
    cancel: &'a Cancel,
    turns: Option<&'a Turns>,
    turn: Option<Turn>,
}

impl<'a> Follow<'a> {
    /// With `turns` it keeps a turn from one read to the next, unless it must wait for bytes. Once
    /// `cancel` is told, every read fails.
    pub fn new(partial: &'a Partial, cancel: &'a Cancel, turns: Option<&'a Turns>) -> Self {
        Self {
            partial,
            at: 0,
            hasher: Hasher::new(partial.digest.algorithm()),
            cancel,
            turns,
            turn: None,
        }
    }

    /// Reads the rest, and tells whether all of it is what the digest names.
    pub fn verify(mut self) -> io::Result<bool> {
        let mut buffer = vec![0; 128 * 1024];
        while self.read(&mut buffer)? > 0 {}
        Ok(self.hasher.is(&self.partial.digest))
    }
}

impl Read for Follow<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.partial.size || buffer.is_empty() {
            return Ok(0);
        }
        self.cancel.check().map_err(io::Error::other)?;
        let end = match self.partial.ready(self.at) {
            Some(end) => end,
            None => {
                self.turn = None;
                self.partial.wait(self.at)?
            }
        };
        if let (Some(turns), None) = (self.turns, &self.turn) {
            self.turn = Some(turns.take());
        }
        let most = usize::try_from(end - self.at).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        let n = self.partial.file.read_at(&mut buffer[..most], self.at)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.hasher.update(&buffer[..n]);
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash;

    fn spans(list: &[Range<u64>]) -> Spans {
        let mut spans = Spans::default();
        for span in list {
            spans.add(span.clone());
        }
        spans
    }

    #[test]
    fn pieces_join_and_gaps_are_found() {
        let have = spans(&[10..20, 30..40, 20..25, 0..5]);
        assert_eq!(have.0, [0..5, 10..25, 30..40]);
        assert_eq!(have.gap(0..50), Some(5..10));
        assert_eq!(have.gap(12..50), Some(25..30));
        assert_eq!(have.gap(12..28), Some(25..28));
        assert_eq!(have.gap(30..40), None);
        assert_eq!(have.gap(40..50), Some(40..50));
        assert_eq!(
            (have.end_of(3), have.end_of(5), have.end_of(39)),
            (Some(5), None, Some(40))
        );
        let all = spans(&[0..5, 10..25, 30..40, 4..31]);
        assert_eq!((all.0.len(), all.end_of(0)), (1, Some(40)));
    }

    fn partial(dir: &Path, content: &[u8]) -> Partial {
        let digest = hash::sha256(content);
        Partial::open(dir.join("x.part"), &digest, content.len() as u64).unwrap()
    }

    #[test]
    fn a_reader_follows_a_blob_that_comes_in_any_order() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..40_000_u32).flat_map(u32::to_le_bytes).collect();
        let partial = partial(dir.path(), &content);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut out = Vec::new();
                let cancel = Cancel::default();
                let mut follow = Follow::new(&partial, &cancel, None);
                follow.by_ref().take(1000).read_to_end(&mut out).unwrap();
                (out, follow.verify().unwrap())
            });
            for n in [3, 1, 0, 2] {
                let at = n * 40_000;
                let chunk = Bytes::copy_from_slice(&content[at..at + 40_000]);
                partial.write_at(at as u64, &[chunk]).unwrap();
            }
            let (out, whole) = reader.join().unwrap();
            assert!(whole && out == content[..1000]);
        });
    }

    #[test]
    fn what_is_there_never_changes() {
        let dir = tempfile::tempdir().unwrap();
        let partial = partial(dir.path(), b"0123456789");
        partial.write_at(3, &["345".into()]).unwrap();
        partial
            .write_at(0, &["01xxxx".into(), "6789".into()])
            .unwrap();
        assert_eq!(std::fs::read(partial.path()).unwrap(), b"01x3456789");
        assert!(
            !Follow::new(&partial, &Cancel::default(), None)
                .verify()
                .unwrap()
        );
    }

    #[test]
    fn a_reader_is_told_when_no_more_comes() {
        let dir = tempfile::tempdir().unwrap();
        let partial = partial(dir.path(), b"0123456789");
        partial.write_at(0, &["0123".into()]).unwrap();
        partial.end();
        assert!(
            Follow::new(&partial, &Cancel::default(), None)
                .verify()
                .is_err()
        );
    }

    #[test]
    fn a_reader_of_what_nobody_wants_ends_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let partial = partial(dir.path(), b"0123456789");
        partial.write_at(0, &["0123456789".into()]).unwrap();
        let cancel = Cancel::default();
        let mut follow = Follow::new(&partial, &cancel, None);
        assert_eq!(follow.read(&mut [0; 4]).unwrap(), 4);
        cancel.cancel();
        assert!(follow.read(&mut [0; 4]).is_err());
        assert_eq!(follow.at, 4);
        assert!(follow.verify().is_err(), "the rest is not hashed");
    }

    #[test]
    fn pieces_are_found_again_without_their_uncertain_ends() {
        let dir = tempfile::tempdir().unwrap();
        let content = vec![7_u8; 1 << 20];
        let write = |partial: &Partial, range: Range<usize>| {
            let at = range.start as u64;
            let chunk = Bytes::copy_from_slice(&content[range]);
            partial.write_at(at, &[chunk]).unwrap();
        };
        let first = partial(dir.path(), &content);
        assert!(!first.resumed);
        write(&first, 0..100_000);
        write(&first, 512 << 10..768 << 10);
        drop(first);
        let again = partial(dir.path(), &content);
        assert!(again.resumed);
        assert_eq!(again.missing(0..1 << 20), Some(64 << 10..512 << 10));
        assert_eq!(again.missing(512 << 10..1 << 20), Some(704 << 10..1 << 20));
        while let Some(gap) = again.missing(0..1 << 20) {
            write(
                &again,
                usize::try_from(gap.start).unwrap()..usize::try_from(gap.end).unwrap(),
            );
        }
        assert!(
            Follow::new(&again, &Cancel::default(), None)
                .verify()
                .unwrap()
        );
        drop(again);
        // All there: nothing needs to be fetched again, not even the last block.
        assert_eq!(partial(dir.path(), &content).missing(0..1 << 20), None);
        // Longer than the blob: not the blob.
        let digest = hash::sha256(b"x");
        let shorter = Partial::open(dir.path().join("x.part"), &digest, 1).unwrap();
        assert!(!shorter.resumed);
    }
}
