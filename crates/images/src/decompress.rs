//! Layer streams: gzip, zstd or plain, told by their first bytes, bounded in what they expand to.

use std::io::{self, BufReader, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// zstd frames ask the reader for a window of memory; 128 MiB is what `zstd -19 --long` needs and
/// what other node programs accept.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// Skippable zstd frame (RFC 8878, 3.1.2): 0x184D2A50 to 0x184D2A5F, little-endian.
const ZSTD_SKIPPABLE: &[u8] = &[0x2a, 0x4d, 0x18];

/// How far a layer may expand.
#[derive(Clone, Copy, Debug)]
pub struct Expansion {
    /// Most bytes of a decompressed layer.
    pub bytes: u64,
    /// Most times its compressed size, looked at once `floor` bytes came out: small layers of
    /// zeros compress a thousandfold and harm nobody.
    pub ratio: u64,
    pub floor: u64,
}

/// The decompressed stream of `source`.
pub fn open<'a>(source: impl Read + 'a, expansion: Expansion) -> io::Result<impl Read + 'a> {
    let taken = Arc::new(AtomicU64::new(0));
    let mut source = BufReader::with_capacity(
        64 * 1024,
        Counted {
            inner: source,
            taken: taken.clone(),
        },
    );
    let magic = peek(&mut source)?;
    let source = Cursor::new(magic.clone()).chain(source);
    let stream: Box<dyn Read + 'a> = if magic.starts_with(GZIP) {
        Box::new(flate2::bufread::MultiGzDecoder::new(source))
    } else if magic.starts_with(ZSTD)
        || (magic.len() >= 4 && magic[0] & 0xf0 == 0x50 && &magic[1..4] == ZSTD_SKIPPABLE)
    {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        Box::new(decoder)
    } else {
        Box::new(source)
    };
    Ok(Bounded {
        inner: stream,
        taken,
        given: 0,
        expansion,
    })
}

/// Takes the first bytes; fewer than four only at the end of the stream. A pipe or a client may
/// give less at once.
fn peek(source: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut magic = Vec::with_capacity(4);
    source.take(4).read_to_end(&mut magic)?;
    Ok(magic)
}

struct Counted<R> {
    inner: R,
    taken: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.taken.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

struct Bounded<R> {
    inner: R,
    taken: Arc<AtomicU64>,
    given: u64,
    expansion: Expansion,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.given += n as u64;
        let Expansion {
            bytes,
            ratio,
            floor,
        } = self.expansion;
        let too_much = |text: String| Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        if self.given > bytes {
            return too_much(format!("the layer expands to more than {bytes} bytes"));
        }
        let taken = self.taken.load(Ordering::Relaxed);
        if self.given > floor && self.given / ratio > taken {
            return too_much(format!(
                "the layer expands to more than {ratio} times its size"
            ));
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const WIDE: Expansion = Expansion {
        bytes: 1 << 30,
        ratio: 1 << 20,
        floor: 0,
    };

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn read(source: &[u8], expansion: Expansion) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        open(source, expansion)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn the_form_is_told_by_the_first_bytes() {
        let zstd = zstd::encode_all(&b"hello"[..], 1).unwrap();
        let skippable = [&[0x53, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9][..], &zstd].concat();
        for source in [gzip(b"hello"), zstd, skippable, b"hello".to_vec()] {
            assert_eq!(read(&source, WIDE).unwrap(), b"hello");
        }
        assert!(read(b"", WIDE).unwrap().is_empty());
    }

    /// As a pipe gives them.
    struct ByteByByte<'a>(&'a [u8]);

    impl Read for ByteByByte<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let one = buffer.len().min(1);
            self.0.read(&mut buffer[..one])
        }
    }

    #[test]
    fn the_form_is_told_however_slowly_the_bytes_come() {
        let zstd = zstd::encode_all(&b"hello"[..], 1).unwrap();
        for source in [gzip(b"hello"), zstd, b"hello".to_vec(), b"h".to_vec()] {
            let mut out = Vec::new();
            let mut stream = open(ByteByByte(&source), WIDE).unwrap();
            stream.read_to_end(&mut out).unwrap();
            assert!(b"hello".starts_with(&out) && !out.is_empty());
        }
    }

    #[test]
    fn concatenated_gzip_members_are_one_stream() {
        let two = [gzip(b"hello "), gzip(b"world")].concat();
        assert_eq!(read(&two, WIDE).unwrap(), b"hello world");
    }

    #[test]
    fn a_cut_or_damaged_stream_is_an_error() {
        let whole = gzip(&vec![7; 100_000]);
        assert!(read(&whole[..whole.len() - 5], WIDE).is_err());
        let zstd = zstd::encode_all(&vec![7u8; 100_000][..], 1).unwrap();
        assert!(read(&zstd[..zstd.len() - 1], WIDE).is_err());
        let mut bad = whole.clone();
        let at = bad.len() - 6;
        bad[at] ^= 1;
        assert!(read(&bad, WIDE).is_err());
        assert!(read(&[&whole[..], b"garbage"].concat(), WIDE).is_err());
    }

    #[test]
    fn bombs_are_stopped() {
        let bomb = gzip(&vec![0; 8 << 20]);
        let error = read(
            &bomb,
            Expansion {
                bytes: 1 << 20,
                ..WIDE
            },
        )
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
        let error = read(&bomb, Expansion { ratio: 100, ..WIDE }).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
        assert!(
            read(
                &bomb,
                Expansion {
                    ratio: 100,
                    floor: 16 << 20,
                    ..WIDE
                }
            )
            .is_ok()
        );
    }

    #[test]
    fn a_zstd_window_beyond_the_bound_is_refused() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(28).unwrap();
        encoder.long_distance_matching(true).unwrap();
        encoder.include_contentsize(false).unwrap();
        let chunk = vec![1; 1 << 20];
        for _ in 0..2 {
            encoder.write_all(&chunk).unwrap();
        }
        let frame = encoder.finish().unwrap();
        assert!(read(&frame, WIDE).is_err());
    }
}
