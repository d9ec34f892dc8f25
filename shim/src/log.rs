//! The CRI log file: one record per line of output,
//! `2006-01-02T15:04:05.000000000Z stdout F text`, where `P` instead of `F` marks a piece whose
//! line goes on, or an unterminated last one (kubernetes, CRI container log format).

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use gantry_sys::memory::PageBuffer;

use crate::clock::STAMP;
use crate::error::Error;

/// Longest piece of a line in one record; more is split, as every reader of such logs expects.
pub const MAX_LINE: usize = 16 << 10;

/// Space for records before they are written.
pub const BATCH: usize = 128 << 10;

/// More than the longest record.
const TAIL: u64 = 32 << 10;

/// Which stream a record is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Stdout,
    Stderr,
}

/// Length of what precedes the text of a record: stamp and ` stdout F `.
const HEAD: usize = STAMP + 10;

impl Kind {
    fn tag(self, full: bool) -> &'static [u8; 10] {
        match (self, full) {
            (Kind::Stdout, true) => b" stdout F ",
            (Kind::Stdout, false) => b" stdout P ",
            (Kind::Stderr, true) => b" stderr F ",
            (Kind::Stderr, false) => b" stderr P ",
        }
    }

    fn head(self, full: bool, stamp: &[u8; STAMP]) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..STAMP].copy_from_slice(stamp);
        head[STAMP..].copy_from_slice(self.tag(full));
        head
    }
}

const O_NOFOLLOW: i32 = gantry_sys::fs::OFlags::NOFOLLOW.bits() as i32;

#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    /// Records that could not be written.
    pub dropped: u64,
    /// The last write failed, which was reported.
    failing: bool,
}

impl LogFile {
    /// Opens, or creates with mode 0640 and missing directories.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = open(path).map_err(Error::io("open log file", path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            dropped: 0,
            failing: false,
        })
    }

    /// Opens the log of a container that a shim has written to which was killed: a record that it
    /// had not finished is cut off, so that ours do not run into it.
    pub fn take_over(path: &Path) -> Result<Self, Error> {
        let log = Self::open(path)?;
        log.mend().map_err(Error::io("mend log file", path))?;
        Ok(log)
    }

    fn mend(&self) -> io::Result<()> {
        let reader = File::options()
            .read(true)
            .custom_flags(O_NOFOLLOW)
            .open(&self.path)?;
        let len = reader.metadata()?.size();
        let looked_at = TAIL.min(len);
        let mut tail = vec![0; looked_at as usize];
        reader.read_exact_at(&mut tail, len - looked_at)?;
        let unfinished = match memchr::memrchr(b'\n', &tail) {
            Some(at) => tail.len() - at - 1,
            // No record is as long as that: this is not what a shim writes.
            None if looked_at == TAIL => 0,
            None => tail.len(),
        };
        if unfinished > 0 {
            self.file.set_len(len - unfinished as u64)?;
        }
        Ok(())
    }

    /// Goes on in a new file of the same name; keeps the old one if that cannot be opened.
    pub fn reopen(&mut self) -> Result<(), Error> {
        self.file = open(&self.path).map_err(Error::io("reopen log file", &self.path))?;
        Ok(())
    }

    /// Writes whole records. What does not fit on the disk is dropped and counted, cut back to
    /// the last whole record: a container never waits for a full disk.
    fn write(&mut self, batch: &[u8]) {
        let mut written = 0;
        while written < batch.len() {
            match gantry_sys::io::write(&self.file, &batch[written..]) {
                Ok(count) if count > 0 => written += count,
                result => {
                    let error = result
                        .err()
                        .unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                    self.drop_rest(batch, written, error);
                    return;
                }
            }
        }
        self.failing = false;
    }

    fn drop_rest(&mut self, batch: &[u8], written: usize, error: io::Error) {
        let whole = memchr::memrchr(b'\n', &batch[..written]).map_or(0, |at| at + 1);
        if whole < written {
            // Only we append to this file, so its end is the piece just written.
            let cut = self.file.metadata().and_then(|meta| {
                self.file
                    .set_len(meta.size().saturating_sub((written - whole) as u64))
            });
            if let Err(error) = cut {
                crate::report!("cut log file {}: {error}", self.path.display());
            }
        }
        let lost = memchr::memchr_iter(b'\n', &batch[whole..]).count() as u64;
        self.dropped += lost;
        if !self.failing {
            self.failing = true;
            crate::report!("write log file {}: {error}; dropping", self.path.display());
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    // A link in place of the log would lead root's appends to any file of the host.
    options
        .append(true)
        .create(true)
        .mode(0o640)
        .custom_flags(O_NOFOLLOW);
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
            options.open(path)
        }
        result => result,
    }
}

/// Collects records and writes them in batches. The buffer belongs to the shim and serves one
/// stream after the other.
pub struct Writer<'a> {
    log: &'a mut LogFile,
    buffer: &'a mut PageBuffer,
    used: usize,
    full: [u8; HEAD],
    part: [u8; HEAD],
}

impl<'a> Writer<'a> {
    pub fn new(
        log: &'a mut LogFile,
        buffer: &'a mut PageBuffer,
        stamp: &[u8; STAMP],
        kind: Kind,
    ) -> Self {
        let (full, part) = (kind.head(true, stamp), kind.head(false, stamp));
        Self {
            log,
            buffer,
            used: 0,
            full,
            part,
        }
    }

    /// Adds a record of a whole line: `head`, then `tail` up to and with its newline; together at
    /// most [`MAX_LINE`] bytes of text.
    fn line(&mut self, head: &[u8], tail: &[u8]) {
        let space = Self::space(
            self.log,
            self.buffer,
            &mut self.used,
            head.len() + tail.len(),
        );
        let (place, rest) = space.split_at_mut(HEAD);
        place.copy_from_slice(&self.full);
        if head.is_empty() {
            rest.copy_from_slice(tail);
        } else {
            let (place, rest) = rest.split_at_mut(head.len());
            place.copy_from_slice(head);
            rest.copy_from_slice(tail);
        }
    }

    /// Adds a record of a piece of a line, at most [`MAX_LINE`] bytes.
    fn piece(&mut self, head: &[u8], tail: &[u8]) {
        let len = head.len() + tail.len() + 1;
        let space = Self::space(self.log, self.buffer, &mut self.used, len);
        let (place, rest) = space.split_at_mut(HEAD);
        place.copy_from_slice(&self.part);
        let (place, rest) = rest.split_at_mut(head.len());
        place.copy_from_slice(head);
        let (place, rest) = rest.split_at_mut(tail.len());
        place.copy_from_slice(tail);
        rest.copy_from_slice(b"\n");
    }

    /// Room for a record with so many bytes after its head.
    fn space<'b>(
        log: &mut LogFile,
        buffer: &'b mut PageBuffer,
        used: &mut usize,
        len: usize,
    ) -> &'b mut [u8] {
        if buffer.len() - *used < HEAD + len {
            log.write(&buffer[..*used]);
            *used = 0;
        }
        let start = *used;
        *used += HEAD + len;
        &mut buffer[start..*used]
    }

    fn flush(&mut self) {
        self.log.write(&self.buffer[..self.used]);
        self.used = 0;
    }

    /// Makes records of what a stream gave. What is left of an unfinished line stays in
    /// `partial`, at most [`MAX_LINE`] bytes.
    pub fn lines(&mut self, partial: &mut Vec<u8>, bytes: &[u8]) {
        let mut rest = bytes;
        if !partial.is_empty() {
            // One byte more than fits: a line of exactly MAX_LINE bytes is not split.
            let room = MAX_LINE - partial.len();
            let window = &rest[..rest.len().min(room + 1)];
            match memchr::memchr(b'\n', window) {
                Some(end) => {
                    self.line(partial, &rest[..=end]);
                    rest = &rest[end + 1..];
                }
                None if rest.len() > room => {
                    self.piece(partial, &rest[..room]);
                    rest = &rest[room..];
                }
                None => {
                    partial.extend_from_slice(rest);
                    return;
                }
            }
            *partial = Vec::new();
        }
        while !rest.is_empty() {
            let window = &rest[..rest.len().min(MAX_LINE + 1)];
            match memchr::memchr(b'\n', window) {
                Some(end) => {
                    self.line(&[], &rest[..=end]);
                    rest = &rest[end + 1..];
                }
                None if rest.len() > MAX_LINE => {
                    self.piece(&[], &rest[..MAX_LINE]);
                    rest = &rest[MAX_LINE..];
                }
                None => {
                    *partial = rest.to_vec();
                    return;
                }
            }
        }
    }

    /// The stream has ended: an unterminated line is a partial record.
    pub fn end(&mut self, partial: &mut Vec<u8>) {
        let partial = std::mem::take(partial);
        if !partial.is_empty() {
            self.piece(&partial, &[]);
        }
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        if self.used > 0 {
            self.flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use std::os::unix::fs::PermissionsExt;

    /// The records, as (tag, text), that these pieces of output make.
    fn records(pieces: &[&[u8]]) -> Vec<(char, Vec<u8>)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/0.log");
        let mut log = LogFile::open(&path).unwrap();
        let mut buffer = PageBuffer::new(BATCH).unwrap();
        let mut clock = Clock::new();
        let mut partial = Vec::new();
        for piece in pieces {
            let stamp = clock.format(0);
            let mut writer = Writer::new(&mut log, &mut buffer, stamp, Kind::Stderr);
            writer.lines(&mut partial, piece);
        }
        Writer::new(&mut log, &mut buffer, clock.format(0), Kind::Stderr).end(&mut partial);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        let text = std::fs::read(&path).unwrap();
        text.split_inclusive(|&b| b == b'\n')
            .map(|line| {
                let head = b"1970-01-01T00:00:00.000000000Z stderr ";
                assert!(line.starts_with(head) && line.ends_with(b"\n"));
                let rest = &line[head.len()..line.len() - 1];
                assert_eq!(rest[1], b' ');
                (rest[0] as char, rest[2..].to_vec())
            })
            .collect()
    }

    #[test]
    fn a_record_that_was_cut_off_by_a_kill_goes_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let long = "x".repeat(70 << 10);
        for (text, left) in [
            ("", ""),
            ("whole\n", "whole\n"),
            ("whole\npart", "whole\n"),
            ("part", ""),
            (long.as_str(), long.as_str()),
        ] {
            std::fs::write(&path, text).unwrap();
            LogFile::take_over(&path).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), left);
        }
        std::fs::remove_file(&path).unwrap();
        LogFile::take_over(&path).unwrap();
        assert!(path.exists());
    }

    #[test]
    fn lines_become_records_however_they_arrive() {
        let expected = vec![
            ('F', b"one".to_vec()),
            ('F', b"".to_vec()),
            ('F', b"two\r".to_vec()),
            ('P', b"rest".to_vec()),
        ];
        let bytes = b"one\n\ntwo\r\nrest";
        for size in 1..=bytes.len() {
            let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
            assert_eq!(records(&pieces), expected, "pieces of {size}");
        }
        assert!(records(&[]).is_empty());
    }

    #[test]
    fn long_lines_are_split_at_16_kib_and_only_longer_ones() {
        let exact = [vec![b'x'; MAX_LINE], b"\n".to_vec()].concat();
        let longer = [vec![b'y'; MAX_LINE + 1], b"\n".to_vec()].concat();
        let bytes = [exact, longer].concat();
        let expected = vec![
            ('F', vec![b'x'; MAX_LINE]),
            ('P', vec![b'y'; MAX_LINE]),
            ('F', vec![b'y']),
        ];
        for size in [
            1,
            1000,
            MAX_LINE - 1,
            MAX_LINE,
            MAX_LINE + 1,
            MAX_LINE + 2,
            65536,
        ] {
            let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
            assert_eq!(records(&pieces), expected, "pieces of {size}");
        }
    }

    #[test]
    fn many_short_lines_outgrow_one_batch() {
        let bytes = b"\n".repeat(10_000);
        assert_eq!(records(&[&bytes]).len(), 10_000);
    }

    #[test]
    fn a_full_disk_drops_and_counts_whole_records() {
        let path = Path::new("/dev/full");
        let Ok(file) = File::options().write(true).open(path) else {
            println!("SKIP a_full_disk_drops_and_counts_whole_records: no /dev/full");
            return;
        };
        let mut log = LogFile {
            path: path.into(),
            file,
            dropped: 0,
            failing: false,
        };
        let mut buffer = PageBuffer::new(BATCH).unwrap();
        let mut clock = Clock::new();
        let mut partial = Vec::new();
        Writer::new(&mut log, &mut buffer, clock.format(0), Kind::Stdout)
            .lines(&mut partial, b"a\nb\nc\n");
        assert_eq!(log.dropped, 3);
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        std::fs::write(&target, "").unwrap();
        let link = dir.path().join("0.log");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let error = LogFile::open(&link).unwrap_err().to_string();
        assert!(error.contains("0.log"), "{error}");
    }
}
