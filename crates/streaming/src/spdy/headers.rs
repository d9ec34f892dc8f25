//! Header blocks: name and value pairs, compressed with one zlib stream a direction and session
//! (draft-mbelshe-httpbis-spdy-00, 2.6.10).
//!
//! The stream's state runs through all blocks of a session: a block that cannot be decompressed
//! ends the session, as nothing after it could be read. A block that decompresses and is malformed
//! inside concerns its stream alone.

use bytes::BytesMut;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::dictionary::DICTIONARY;

/// Largest block after decompression.
pub const MAX_BLOCK: usize = 16 * 1024;

/// Most pairs in a block.
pub const MAX_PAIRS: usize = 64;

/// A window of 2^11 is what the SPDY authors advise for servers; it bounds what a session's
/// compressor holds.
const WINDOW_BITS: u8 = 11;

/// Header pairs in the order of the block; names are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The value of `name` (in lower case), or the first of several.
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.0.iter().find(|(key, _)| key == name)?;
        value.split('\0').next()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Reads a decompressed block.
    pub fn parse(block: &[u8]) -> Result<Self, Malformed> {
        let mut rest = block;
        let count = take_length(&mut rest)?;
        if count > MAX_PAIRS {
            return Err(Malformed("too many headers"));
        }
        let mut pairs: Vec<(String, String)> = Vec::with_capacity(count);
        for _ in 0..count {
            // Names are to be sent in lower case; a client that does not is understood.
            let name = take_text(&mut rest)?.to_ascii_lowercase();
            let value = take_text(&mut rest)?.to_owned();
            if name.is_empty() {
                return Err(Malformed("header without a name"));
            }
            if pairs.iter().any(|(other, _)| *other == name) {
                return Err(Malformed("header sent twice"));
            }
            pairs.push((name, value));
        }
        if !rest.is_empty() {
            return Err(Malformed("bytes after the last header"));
        }
        Ok(Self(pairs))
    }

    /// The block, not compressed.
    pub fn to_block(&self) -> Vec<u8> {
        let mut block = (self.0.len() as u32).to_be_bytes().to_vec();
        for text in self.0.iter().flat_map(|(name, value)| [name, value]) {
            block.extend((text.len() as u32).to_be_bytes());
            block.extend(text.bytes());
        }
        block
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        let pairs = pairs.into_iter();
        Self(
            pairs
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
        )
    }
}

/// A block that decompressed well and is not a list of headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(&'static str);

/// The session's header compression cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("header compression: {0}")]
pub struct CompressionError(&'static str);

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8], Malformed> {
    let (taken, left) = rest
        .split_at_checked(count)
        .ok_or(Malformed("a length reaches past the block"))?;
    *rest = left;
    Ok(taken)
}

fn take_length(rest: &mut &[u8]) -> Result<usize, Malformed> {
    let bytes = take(rest, 4)?;
    let length = bytes.iter().fold(0u32, |n, byte| n << 8 | u32::from(*byte));
    // A length that does not fit is longer than any block.
    Ok(usize::try_from(length).unwrap_or(usize::MAX))
}

fn take_text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, Malformed> {
    let length = take_length(rest)?;
    let bytes = take(rest, length)?;
    std::str::from_utf8(bytes).map_err(|_| Malformed("header is not UTF-8"))
}

/// Decompresses the blocks of one direction of a session, in their order.
pub struct HeaderReader {
    zlib: Decompress,
    block: Vec<u8>,
}

impl Default for HeaderReader {
    fn default() -> Self {
        Self {
            zlib: Decompress::new(true),
            block: Vec::new(),
        }
    }
}

impl HeaderReader {
    /// Decompresses the next block. An error ends the session.
    pub fn decompress(&mut self, mut input: &[u8]) -> Result<&[u8], CompressionError> {
        // One byte more than is allowed, so that a block of the exact size is told from a larger.
        self.block.resize(MAX_BLOCK + 1, 0);
        let mut filled = 0;
        while !input.is_empty() {
            let (total_in, total_out) = (self.zlib.total_in(), self.zlib.total_out());
            let room = &mut self.block[filled..];
            let status = match self.zlib.decompress(input, room, FlushDecompress::Sync) {
                Ok(status) => status,
                Err(error) if error.needs_dictionary().is_some() => {
                    input = &input[(self.zlib.total_in() - total_in) as usize..];
                    self.zlib
                        .set_dictionary(&DICTIONARY)
                        .map_err(|_| CompressionError("not the dictionary of SPDY/3"))?;
                    continue;
                }
                Err(_) => return Err(CompressionError("damaged")),
            };
            let consumed = (self.zlib.total_in() - total_in) as usize;
            let produced = (self.zlib.total_out() - total_out) as usize;
            input = &input[consumed..];
            filled += produced;
            if filled > MAX_BLOCK {
                return Err(CompressionError("block is too large"));
            }
            match status {
                Status::StreamEnd => return Err(CompressionError("stream ended")),
                _ if consumed == 0 && produced == 0 => return Err(CompressionError("no progress")),
                _ => {}
            }
        }
        Ok(&self.block[..filled])
    }
}

/// Compresses the blocks of one direction of a session, in their order.
pub struct HeaderWriter {
    zlib: Compress,
    ready: bool,
}

impl Default for HeaderWriter {
    fn default() -> Self {
        Self {
            zlib: Compress::new_with_window_bits(Compression::fast(), true, WINDOW_BITS),
            ready: false,
        }
    }
}

impl HeaderWriter {
    /// Appends the next block to `out`. An error ends the session.
    pub fn compress(
        &mut self,
        headers: &Headers,
        out: &mut BytesMut,
    ) -> Result<(), CompressionError> {
        if !self.ready {
            self.zlib
                .set_dictionary(&DICTIONARY)
                .map_err(|_| CompressionError("the dictionary was refused"))?;
            self.ready = true;
        }
        let block = headers.to_block();
        let mut input = &block[..];
        let mut chunk = [0; 1024];
        loop {
            let (total_in, total_out) = (self.zlib.total_in(), self.zlib.total_out());
            self.zlib
                .compress(input, &mut chunk, FlushCompress::Sync)
                .map_err(|_| CompressionError("compression failed"))?;
            input = &input[(self.zlib.total_in() - total_in) as usize..];
            let produced = (self.zlib.total_out() - total_out) as usize;
            out.extend_from_slice(&chunk[..produced]);
            // A full chunk may have more behind it; a chunk with room left is the flush's end.
            if input.is_empty() && produced < chunk.len() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().copied().collect()
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16);
        digits.chunks(2).map(|pair| byte(pair).unwrap()).collect()
    }

    #[test]
    fn blocks_share_one_stream_in_both_directions() {
        let (mut writer, mut reader) = (HeaderWriter::default(), HeaderReader::default());
        let mut sizes = Vec::new();
        for kind in ["error", "stdin", "stdout", "stderr", "resize", "resize"] {
            let sent = headers(&[("streamtype", kind), ("port", "80")]);
            let mut wire = BytesMut::new();
            writer.compress(&sent, &mut wire).unwrap();
            sizes.push(wire.len());
            let block = reader.decompress(&wire).unwrap();
            assert_eq!(Headers::parse(block).unwrap(), sent);
        }
        assert!(
            sizes[5] < sizes[0],
            "later blocks refer to earlier: {sizes:?}"
        );
    }

    #[test]
    fn a_block_of_any_size_is_written_whole() {
        for size in [0, 1, 1000, 1024, 5000, 15_000] {
            let value: String = (0..size)
                .map(|i| char::from(b'!' + (i * 7919 % 90) as u8))
                .collect();
            let sent = headers(&[("x", &value)]);
            let (mut writer, mut reader) = (HeaderWriter::default(), HeaderReader::default());
            for _ in 0..3 {
                let mut wire = BytesMut::new();
                writer.compress(&sent, &mut wire).unwrap();
                let block = reader.decompress(&wire).unwrap();
                assert_eq!(Headers::parse(block).unwrap(), sent, "{size}");
            }
        }
    }

    #[test]
    fn a_bomb_ends_the_session() {
        let bomb = headers(&[("x", &"a".repeat(1 << 20))]);
        let mut wire = BytesMut::new();
        HeaderWriter::default().compress(&bomb, &mut wire).unwrap();
        assert!(wire.len() < 16 * 1024, "{}", wire.len());
        assert_eq!(
            HeaderReader::default().decompress(&wire).unwrap_err(),
            CompressionError("block is too large")
        );
    }

    #[test]
    fn another_dictionary_or_none_ends_the_session() {
        let mut zlib = Compress::new(Compression::fast(), true);
        zlib.set_dictionary(b"options head post").unwrap();
        let mut wire = Vec::with_capacity(100);
        zlib.compress_vec(&[0; 4], &mut wire, FlushCompress::Sync)
            .unwrap();
        assert_eq!(
            HeaderReader::default().decompress(&wire).unwrap_err(),
            CompressionError("not the dictionary of SPDY/3")
        );
        for damaged in [&b"\x00"[..], b"\xff\xff\xff\xff", b"GET / HTTP/1.1"] {
            let mut reader = HeaderReader::default();
            let _ = reader.decompress(damaged);
            assert!(reader.decompress(damaged).is_err(), "{damaged:?}");
        }
    }

    #[test]
    fn a_stream_that_ends_is_refused() {
        let mut zlib = Compress::new(Compression::fast(), true);
        zlib.set_dictionary(&DICTIONARY).unwrap();
        let mut wire = Vec::with_capacity(100);
        zlib.compress_vec(&[0; 4], &mut wire, FlushCompress::Finish)
            .unwrap();
        assert_eq!(
            HeaderReader::default().decompress(&wire).unwrap_err(),
            CompressionError("stream ended")
        );
    }

    #[test]
    fn lists_that_are_none_are_refused() {
        let cases: [(&[u8], &str); 9] = [
            (b"", "a length reaches past the block"),
            (b"\0\0\0", "a length reaches past the block"),
            (b"\0\0\0\x01", "a length reaches past the block"),
            (b"\xff\xff\xff\xff", "too many headers"),
            (
                b"\0\0\0\x01\xff\xff\xff\xffab",
                "a length reaches past the block",
            ),
            (
                b"\0\0\0\x01\0\0\0\x01a\0\0\0\x01\xff",
                "header is not UTF-8",
            ),
            (b"\0\0\0\x01\0\0\0\0\0\0\0\0", "header without a name"),
            (
                b"\0\0\0\x02\0\0\0\x01a\0\0\0\0\0\0\0\x01A\0\0\0\0",
                "header sent twice",
            ),
            (b"\0\0\0\0x", "bytes after the last header"),
        ];
        for (block, reason) in cases {
            assert_eq!(Headers::parse(block), Err(Malformed(reason)), "{block:?}");
        }
    }

    #[test]
    fn the_first_of_several_values_counts() {
        let parsed = Headers::parse(b"\0\0\0\x01\0\0\0\x01K\0\0\0\x03a\0b").unwrap();
        assert_eq!(parsed.get("k"), Some("a"));
        assert_eq!(parsed.get("x"), None);
    }

    /// Two blocks in a row as the library of kubelet and kubectl (spdystream 0.5.1) sends them.
    #[test]
    fn blocks_of_the_kubernetes_library_are_read() {
        let blocks = [
            (hex(GOLDEN_ERROR), headers(&[("streamtype", "error")])),
            (hex(GOLDEN_STDIN), headers(&[("streamtype", "stdin")])),
        ];
        let mut reader = HeaderReader::default();
        for (wire, expected) in blocks {
            let block = reader.decompress(&wire).unwrap();
            assert_eq!(Headers::parse(block).unwrap(), expected);
        }
    }

    const GOLDEN_ERROR: &str = "78f9e3c6a7c26260606004a7b392a2d4c45c6851c29a0a0a6800000000ffff";
    const GOLDEN_STDIN: &str = "c22e555c92929907000000ffff";
}
