//! A tar stream, entry by entry: POSIX ustar and pax, GNU long names and sparse files.
//!
//! Header fields are decoded by the `tar` crate. Its own entry iterator is not used, because it
//! reads extension records (long names, pax) into memory whatever their size, and the stream
//! comes from strangers.

use std::io::{self, Read};

/// Most bytes of one extension header: a path, a link target, or all pax records of an entry.
const EXTENSION_MAX: u64 = 1 << 20;
/// Most pieces of a sparse file.
const PIECES_MAX: usize = 1 << 16;
const BLOCK: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Directory,
    Symlink,
    Hardlink,
    Char,
    Block,
    Fifo,
}

/// A piece of a sparse file that has data in the archive; the rest is holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub offset: u64,
    pub length: u64,
}

#[derive(Clone, Debug)]
pub struct Entry {
    /// As the archive spells it: not checked, not necessarily UTF-8.
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: Kind,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (i64, u32),
    /// Length of the file; holes included.
    pub size: u64,
    pub device: (u32, u32),
    /// `SCHILY.xattr.*` pax records.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: Option<Vec<Piece>>,
}

/// Reads entries; after [`Reader::next`] the reader itself yields the entry's data (of a sparse
/// file, its pieces one after the other).
pub struct Reader<R> {
    inner: R,
    /// Data of the current entry not yet read, and what fills its last block.
    left: u64,
    padding: u64,
    done: bool,
}

/// What the extension headers before an entry say about it.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Option<Vec<u8>>,
}

#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse_major: Option<u64>,
    sparse_size: Option<u64>,
    sparse_name: Option<Vec<u8>>,
    sparse_numbers: Option<Vec<u64>>,
}

fn bad(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

impl<R: Read> Reader<R> {
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            left: 0,
            padding: 0,
            done: false,
        }
    }

    /// The next entry, or `None` at the end of the archive. What was not read of the one before
    /// is skipped.
    pub fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut extensions = Extensions::default();
        loop {
            self.skip()?;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let size = header
                .entry_size()
                .map_err(|_| bad("the size of an entry is no number"))?;
            match header.entry_type().as_byte() {
                b'L' => extensions.path = Some(self.extension(size, true)?),
                b'K' => extensions.link = Some(self.extension(size, true)?),
                b'x' | b'X' => extensions.pax = Some(self.extension(size, false)?),
                // Global records concern archives, not layers; no builder of images relies on
                // them.
                b'g' => {
                    self.extension(size, false)?;
                }
                _ => return self.entry(&header, size, extensions).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &tar::Header,
        size: u64,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let pax = match &extensions.pax {
            Some(records) => parse_pax(records)?,
            None => Pax::default(),
        };
        let kind = match header.entry_type().as_byte() {
            // NUL is the old spelling of a file, 7 a contiguous file, S a GNU sparse one.
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::Hardlink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(bad(format!(
                    "entry type {:?} is not known",
                    char::from(other)
                )));
            }
        };
        let old = header.as_old();
        let number = |what: &str, field: &[u8], value: io::Result<u64>| match value {
            // Writers leave fields that they do not care for empty.
            Err(_) if field.iter().all(|b| matches!(b, 0 | b' ')) => Ok(0),
            other => other.map_err(|_| bad(format!("the {what} of an entry is no number"))),
        };
        let device = match kind {
            Kind::Char | Kind::Block => {
                let part = |value: io::Result<Option<u32>>| {
                    value
                        .map(Option::unwrap_or_default)
                        .map_err(|_| bad("a device number is no number"))
                };
                (part(header.device_major())?, part(header.device_minor())?)
            }
            _ => (0, 0),
        };
        let mut path = pax
            .sparse_name
            .or(pax.path)
            .or(extensions.path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax.link.or(extensions.link).unwrap_or_else(|| {
            header
                .link_name_bytes()
                .map(|link| link.into_owned())
                .unwrap_or_default()
        });
        // Before POSIX a directory was a file whose name ends in a slash.
        let kind = match kind {
            Kind::File if header.entry_type().as_byte() == 0 && path.ends_with(b"/") => {
                Kind::Directory
            }
            kind => kind,
        };
        if path.contains(&0) || link.contains(&0) {
            return Err(bad("a name has a NUL in it"));
        }
        if path.is_empty() {
            path.push(b'.');
        }
        let stored = pax.size.unwrap_or(size);
        if stored > i64::MAX as u64 {
            return Err(bad("the size of an entry is negative or absurd"));
        }
        let mut entry = Entry {
            path,
            link,
            kind,
            mode: number("mode", &old.mode, header.mode().map(u64::from))? as u32 & 0o7777,
            uid: match pax.uid {
                Some(uid) => uid,
                None => number("owner", &old.uid, header.uid())?,
            },
            gid: match pax.gid {
                Some(gid) => gid,
                None => number("group", &old.gid, header.gid())?,
            },
            // The crate reads base-256 numbers as two's complement.
            mtime: match pax.mtime {
                Some(mtime) => mtime,
                None => (number("time", &old.mtime, header.mtime())? as i64, 0),
            },
            size: stored,
            device,
            xattrs: pax.xattrs,
            sparse: None,
        };
        // A link has no data, whatever its size field says: writers differ on hard links.
        let data = match kind {
            Kind::File => stored,
            _ => 0,
        };
        entry.size = data;
        self.expect(data);
        if header.entry_type().as_byte() == b'S' {
            let (size, numbers) = self.gnu_sparse(header)?;
            entry.size = size;
            entry.sparse = Some(pieces(&numbers, size, data)?);
        } else if kind == Kind::File && pax.sparse_major == Some(1) {
            let size = pax
                .sparse_size
                .ok_or_else(|| bad("a sparse file without its size"))?;
            let (numbers, used) = self.sparse_map_in_data()?;
            entry.size = size;
            entry.sparse = Some(pieces(&numbers, size, data - used)?);
        } else if let (Kind::File, Some(numbers)) = (kind, pax.sparse_numbers) {
            let size = pax
                .sparse_size
                .ok_or_else(|| bad("a sparse file without its size"))?;
            entry.size = size;
            entry.sparse = Some(pieces(&numbers, size, data)?);
        }
        Ok(entry)
    }

    /// The next header; `None` after a block of zeros or at the end of the stream.
    fn header(&mut self) -> io::Result<Option<tar::Header>> {
        if self.done {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        let mut have = 0;
        while have < BLOCK {
            match self.inner.read(&mut block[have..]) {
                Ok(0) if have == 0 => {
                    self.done = true;
                    return Ok(None);
                }
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => have += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if block.iter().all(|&b| b == 0) {
            self.done = true;
            return Ok(None);
        }
        let header = tar::Header::from_byte_slice(&block);
        // The sum of all bytes with the checksum field itself counted as spaces. Old writers
        // added signed bytes.
        let counted = || block[..148].iter().chain(&block[156..]);
        let unsigned = 8 * 32 + counted().map(|&b| u32::from(b)).sum::<u32>();
        let signed = 8 * 32 + counted().map(|&b| i32::from(b as i8)).sum::<i32>();
        match header.cksum() {
            Ok(sum) if sum == unsigned || i64::from(sum) == i64::from(signed) => {
                Ok(Some(header.clone()))
            }
            _ => Err(bad("an entry's header has a wrong checksum")),
        }
    }

    fn expect(&mut self, data: u64) {
        self.left = data;
        self.padding = data.next_multiple_of(BLOCK as u64) - data;
    }

    fn skip(&mut self) -> io::Result<()> {
        let rest = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        let skipped = io::copy(&mut (&mut self.inner).take(rest), &mut io::sink())?;
        if skipped < rest {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// The body of an extension header; `text` ends at a NUL.
    fn extension(&mut self, size: u64, text: bool) -> io::Result<Vec<u8>> {
        if size > EXTENSION_MAX {
            return Err(bad(format!(
                "an extension header of more than {EXTENSION_MAX} bytes"
            )));
        }
        self.expect(size);
        let mut body = Vec::new();
        self.read_to_end(&mut body)?;
        if body.len() as u64 != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if text && body.last() == Some(&0) {
            body.pop();
        }
        Ok(body)
    }

    /// Size and map of an old GNU sparse file, whose extension blocks precede the data.
    fn gnu_sparse(&mut self, header: &tar::Header) -> io::Result<(u64, Vec<u64>)> {
        let gnu = header
            .as_gnu()
            .ok_or_else(|| bad("a sparse file without a GNU header"))?;
        let size = gnu
            .real_size()
            .map_err(|_| bad("a sparse file without its size"))?;
        let mut numbers = Vec::new();
        let mut add = |block: &tar::GnuSparseHeader| -> io::Result<()> {
            if !block.is_empty() {
                let broken = |_| bad("a sparse map that is no numbers");
                numbers.push(block.offset().map_err(broken)?);
                numbers.push(block.length().map_err(broken)?);
            }
            if numbers.len() > 2 * PIECES_MAX {
                return Err(bad(format!(
                    "a sparse file of more than {PIECES_MAX} pieces"
                )));
            }
            Ok(())
        };
        gnu.sparse.iter().try_for_each(&mut add)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            self.inner.read_exact(block.as_mut_bytes())?;
            block.sparse.iter().try_for_each(&mut add)?;
            more = block.is_extended();
        }
        Ok((size, numbers))
    }

    /// The map of a pax sparse file of version 1.0: decimal lines at the start of the data, filled
    /// up to a block. Returns the numbers and how much data they took.
    fn sparse_map_in_data(&mut self) -> io::Result<(Vec<u64>, u64)> {
        let mut used = 0;
        let mut block = [0; BLOCK];
        let mut at = BLOCK;
        let mut line = |reader: &mut Self| -> io::Result<u64> {
            let mut value: Option<u64> = None;
            loop {
                if at == BLOCK {
                    reader.read_exact(&mut block)?;
                    (at, used) = (0, used + BLOCK as u64);
                }
                let byte = block[at];
                at += 1;
                match (byte, value) {
                    (b'\n', Some(value)) => return Ok(value),
                    (b'0'..=b'9', _) => {
                        let digit = u64::from(byte - b'0');
                        let next = value
                            .unwrap_or(0)
                            .checked_mul(10)
                            .and_then(|v| v.checked_add(digit));
                        value =
                            Some(next.ok_or_else(|| bad("a sparse map with an absurd number"))?);
                    }
                    _ => return Err(bad("a sparse map that is no numbers")),
                }
            }
        };
        let count = line(self)?;
        if count > PIECES_MAX as u64 {
            return Err(bad(format!(
                "a sparse file of more than {PIECES_MAX} pieces"
            )));
        }
        let numbers = (0..2 * count)
            .map(|_| line(self))
            .collect::<io::Result<_>>()?;
        Ok((numbers, used))
    }
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let n = self.inner.read(&mut buffer[..most])?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        Ok(n)
    }
}

/// The pieces of a sparse file of length `size` whose data in the archive is `data` long.
fn pieces(numbers: &[u64], size: u64, data: u64) -> io::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let (mut end, mut sum) = (0, 0);
    for pair in numbers.chunks(2) {
        let &[offset, length] = pair else {
            return Err(bad("a sparse map with half a piece"));
        };
        let stop = offset
            .checked_add(length)
            .filter(|&stop| offset >= end && stop <= size);
        end = stop.ok_or_else(|| bad("a sparse map whose pieces overlap or leave the file"))?;
        sum += length;
        if length > 0 {
            pieces.push(Piece { offset, length });
        }
    }
    if sum != data {
        return Err(bad("a sparse map that does not add up to the data"));
    }
    Ok(pieces)
}

/// Parses `length key=value\n` records (pax(1), Extended Header).
fn parse_pax(mut body: &[u8]) -> io::Result<Pax> {
    let broken = || bad("a malformed pax record");
    let mut pax = Pax::default();
    while !body.is_empty() {
        let space = body
            .iter()
            .take(20)
            .position(|&b| b == b' ')
            .ok_or_else(broken)?;
        let length: usize = text(&body[..space])?.parse().map_err(|_| broken())?;
        if length <= space + 1 || length > body.len() || body[length - 1] != b'\n' {
            return Err(broken());
        }
        let record = &body[space + 1..length - 1];
        body = &body[length..];
        let equals = record.iter().position(|&b| b == b'=').ok_or_else(broken)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        // An empty value takes back what the header says.
        let bytes = || (!value.is_empty()).then(|| value.to_vec());
        let number = || match value {
            [] => Ok(None),
            _ => text(value)?.parse::<u64>().map(Some).map_err(|_| broken()),
        };
        match key {
            b"path" => pax.path = bytes(),
            b"linkpath" => pax.link = bytes(),
            b"size" => pax.size = number()?,
            b"uid" => pax.uid = number()?,
            b"gid" => pax.gid = number()?,
            b"mtime" => pax.mtime = parse_time(value)?,
            b"GNU.sparse.major" => pax.sparse_major = number()?,
            b"GNU.sparse.name" => pax.sparse_name = bytes(),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => pax.sparse_size = number()?,
            b"GNU.sparse.map" => {
                let numbers = text(value)?.split(',').filter(|n| !n.is_empty());
                let numbers = numbers.map(|n| n.parse::<u64>().map_err(|_| broken()));
                pax.sparse_numbers = Some(numbers.collect::<io::Result<_>>()?);
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                pax.sparse_numbers.get_or_insert_default().extend(number()?);
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    pax.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        if pax
            .sparse_numbers
            .as_ref()
            .is_some_and(|n| n.len() > 2 * PIECES_MAX)
        {
            return Err(bad(format!(
                "a sparse file of more than {PIECES_MAX} pieces"
            )));
        }
    }
    Ok(pax)
}

fn text(bytes: &[u8]) -> io::Result<&str> {
    std::str::from_utf8(bytes).map_err(|_| bad("a malformed pax record"))
}

/// `[-]seconds[.fraction]`; `None` for an empty value.
fn parse_time(value: &[u8]) -> io::Result<Option<(i64, u32)>> {
    if value.is_empty() {
        return Ok(None);
    }
    let broken = || bad("a time in a pax record is no number");
    let value = text(value)?;
    let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
    let seconds: i64 = match whole {
        "" | "-" => 0,
        whole => whole.parse().map_err(|_| broken())?,
    };
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(broken());
    }
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanos: u32 = digits.parse().map_err(|_| broken())?;
    // The fraction counts away from zero, a timespec's nanoseconds always forward.
    Ok(Some(match (value.starts_with('-'), nanos) {
        (true, 1..) => (seconds.saturating_sub(1), 1_000_000_000 - nanos),
        _ => (seconds, nanos),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_and_fractions() {
        let time = |text: &str| parse_time(text.as_bytes()).unwrap();
        assert_eq!(time("1.5"), Some((1, 500_000_000)));
        assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time("-7"), Some((-7, 0)));
        assert_eq!(time("1.1234567891"), Some((1, 123_456_789)));
        assert!(parse_time(b"soon").is_err());
    }

    #[test]
    fn sparse_maps_are_checked() {
        assert_eq!(pieces(&[0, 2, 8, 2], 10, 4).unwrap().len(), 2);
        for (numbers, size, data) in [
            (&[0, 2, 1, 2][..], 10, 4),
            (&[8, 4], 10, 4),
            (&[0, 4], 10, 5),
            (&[u64::MAX, 2], 10, 2),
            (&[0], 10, 0),
        ] {
            assert!(pieces(numbers, size, data).is_err(), "{numbers:?}");
        }
    }

    #[test]
    fn an_extension_header_is_bounded() {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(1 << 30);
        header.set_cksum();
        let stream = header.as_bytes().chain(io::repeat(b'a'));
        let error = Reader::new(stream).next().unwrap_err();
        assert!(error.to_string().contains("extension header"), "{error}");
    }

    #[test]
    fn garbage_is_an_error_not_a_panic() {
        for stream in [&[1; 512][..], &[b'x'; 100], b"12 path=\0\n"] {
            assert!(Reader::new(stream).next().is_err());
        }
        assert!(Reader::new(&[][..]).next().unwrap().is_none());
        for record in [
            "", "5 a=", "3 a=b\n", "99 a=b\n", "x a=b\n", "6 ab\n\n", "0 \n",
        ] {
            let _ = parse_pax(record.as_bytes());
        }
        assert!(parse_pax(b"99 a=b\n").is_err());
    }
}
