//! Frames of SPDY/3.1 (draft-mbelshe-httpbis-spdy-00, 2.2), decoded from and encoded to buffers.
//!
//! Every length is checked before anything is kept: a control frame is at most [`MAX_CONTROL`], and
//! a data frame, which may be 16 MiB long, is handed on in the pieces that it arrives in.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::headers::{CompressionError, HeaderReader, HeaderWriter, Headers, Malformed};

/// Longest control frame that is taken, without its first eight bytes.
pub const MAX_CONTROL: usize = 16 * 1024;

/// Most entries of a SETTINGS frame that are taken.
const MAX_SETTINGS: usize = 64;

const VERSION: u16 = 3;
const CONTROL: u16 = 0x8000;
const FLAG_FIN: u8 = 1;
const FLAG_UNIDIRECTIONAL: u8 = 2;
const HEAD: usize = 8;
/// Stream ids and window sizes have 31 bits.
const MASK: u32 = 0x7fff_ffff;

mod kind {
    pub const SYN_STREAM: u16 = 1;
    pub const SYN_REPLY: u16 = 2;
    pub const RST_STREAM: u16 = 3;
    pub const SETTINGS: u16 = 4;
    pub const PING: u16 = 6;
    pub const GOAWAY: u16 = 7;
    pub const HEADERS: u16 = 8;
    pub const WINDOW_UPDATE: u16 = 9;
}

/// Why a stream was reset (2.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Reset {
    ProtocolError = 1,
    InvalidStream = 2,
    RefusedStream = 3,
    Cancel = 5,
    FlowControlError = 7,
    StreamAlreadyClosed = 9,
}

/// Why a session ends (2.6.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Goaway {
    Ok = 0,
    ProtocolError = 1,
}

/// SETTINGS entry: streams that the sender lets its peer have open.
pub const SETTINGS_MAX_CONCURRENT_STREAMS: u32 = 4;
/// SETTINGS entry: the window that the sender gives each new stream.
pub const SETTINGS_INITIAL_WINDOW_SIZE: u32 = 7;

/// A frame, or a piece of a data frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    SynStream {
        id: u32,
        fin: bool,
        unidirectional: bool,
        headers: Result<Headers, Malformed>,
    },
    SynReply {
        id: u32,
        fin: bool,
        headers: Result<Headers, Malformed>,
    },
    RstStream {
        id: u32,
        status: u32,
    },
    /// Id and value of each entry.
    Settings(Vec<(u32, u32)>),
    Ping(u32),
    Goaway {
        last_id: u32,
        status: u32,
    },
    Headers {
        id: u32,
        fin: bool,
        headers: Result<Headers, Malformed>,
    },
    /// `id` 0 is the session's window.
    WindowUpdate {
        id: u32,
        delta: u32,
    },
    /// `fin` is set on the last piece alone.
    Data {
        id: u32,
        bytes: Bytes,
        fin: bool,
    },
    /// A control frame of another type, which is to be ignored.
    Unknown(u16),
}

/// The peer's bytes are not SPDY/3; the session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("control frame of version {0}")]
    Version(u16),
    #[error("control frame of type {kind} and {length} bytes")]
    Length { kind: u16, length: usize },
    #[error("SETTINGS of {0} entries")]
    Settings(usize),
    #[error("stream id 0")]
    ZeroStream,
    #[error(transparent)]
    Compression(#[from] CompressionError),
}

/// Cuts a connection's bytes into frames.
#[derive(Default)]
pub struct Decoder {
    headers: HeaderReader,
    data: Option<DataFrame>,
}

/// A data frame of which a part is still to come.
struct DataFrame {
    id: u32,
    fin: bool,
    left: usize,
}

impl Decoder {
    /// Takes the next frame off the front of `buf`; `None` asks for more bytes. An error is final.
    pub fn decode(&mut self, buf: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        if let Some(data) = self.data.take() {
            return Ok(self.data(data, buf));
        }
        let Some(head) = buf.first_chunk::<HEAD>() else {
            return Ok(None);
        };
        let mut head = &head[..];
        let first = head.get_u16();
        let second = head.get_u16();
        let flags = head.get_u8();
        let length = head.get_uint(3) as usize;
        if first & CONTROL == 0 {
            let id = u32::from(first) << 16 | u32::from(second);
            if id == 0 {
                return Err(FrameError::ZeroStream);
            }
            buf.advance(HEAD);
            let fin = flags & FLAG_FIN != 0;
            let left = length;
            return Ok(self.data(DataFrame { id, fin, left }, buf));
        }
        let kind = second;
        if first != CONTROL | VERSION {
            return Err(FrameError::Version(first & !CONTROL));
        }
        if length > MAX_CONTROL {
            return Err(FrameError::Length { kind, length });
        }
        if buf.len() < HEAD + length {
            return Ok(None);
        }
        buf.advance(HEAD);
        let payload = buf.split_to(length);
        self.control(kind, flags, &payload).map(Some)
    }

    /// As much of a data frame as is there.
    fn data(&mut self, data: DataFrame, buf: &mut BytesMut) -> Option<Frame> {
        let DataFrame { id, fin, left } = data;
        let count = left.min(buf.len());
        let rest = left - count;
        if rest > 0 {
            let left = rest;
            self.data = Some(DataFrame { id, fin, left });
            if count == 0 {
                return None;
            }
        }
        Some(Frame::Data {
            id,
            bytes: buf.split_to(count).freeze(),
            fin: fin && rest == 0,
        })
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<Frame, FrameError> {
        let length = payload.len();
        let fin = flags & FLAG_FIN != 0;
        let fixed = match kind {
            kind::SYN_STREAM => 10,
            kind::SYN_REPLY | kind::HEADERS | kind::SETTINGS | kind::PING => 4,
            kind::RST_STREAM | kind::GOAWAY | kind::WINDOW_UPDATE => 8,
            _ => return Ok(Frame::Unknown(kind)),
        };
        let exact = !matches!(
            kind,
            kind::SYN_STREAM | kind::SYN_REPLY | kind::HEADERS | kind::SETTINGS
        );
        if length < fixed || exact && length != fixed {
            return Err(FrameError::Length { kind, length });
        }
        let (mut head, rest) = payload.split_at(fixed);
        let first = head.get_u32();
        let id = first & MASK;
        if id == 0
            && !matches!(
                kind,
                kind::SETTINGS | kind::PING | kind::GOAWAY | kind::WINDOW_UPDATE
            )
        {
            return Err(FrameError::ZeroStream);
        }
        Ok(match kind {
            kind::SYN_STREAM => Frame::SynStream {
                id,
                fin,
                unidirectional: flags & FLAG_UNIDIRECTIONAL != 0,
                headers: self.block(rest)?,
            },
            kind::SYN_REPLY => Frame::SynReply {
                id,
                fin,
                headers: self.block(rest)?,
            },
            kind::HEADERS => Frame::Headers {
                id,
                fin,
                headers: self.block(rest)?,
            },
            kind::RST_STREAM => Frame::RstStream {
                id,
                status: head.get_u32(),
            },
            kind::PING => Frame::Ping(first),
            kind::GOAWAY => Frame::Goaway {
                last_id: id,
                status: head.get_u32(),
            },
            kind::WINDOW_UPDATE => Frame::WindowUpdate {
                id,
                delta: head.get_u32() & MASK,
            },
            _ => Frame::Settings(settings(first, rest)?),
        })
    }

    fn block(&mut self, compressed: &[u8]) -> Result<Result<Headers, Malformed>, FrameError> {
        Ok(Headers::parse(self.headers.decompress(compressed)?))
    }
}

fn settings(count: u32, mut rest: &[u8]) -> Result<Vec<(u32, u32)>, FrameError> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > MAX_SETTINGS {
        return Err(FrameError::Settings(count));
    }
    if rest.len() != count * 8 {
        return Err(FrameError::Length {
            kind: kind::SETTINGS,
            length: rest.len() + 4,
        });
    }
    // The first byte of an entry is flags about keeping it, which nobody does.
    let entry = |_| (rest.get_u32() & 0x00ff_ffff, rest.get_u32());
    Ok((0..count).map(entry).collect())
}

fn put_control(out: &mut BytesMut, kind: u16, flags: u8, length: usize) {
    out.put_u16(CONTROL | VERSION);
    out.put_u16(kind);
    out.put_u8(flags);
    out.put_uint(length as u64, 3);
}

/// Appends a SYN_REPLY without headers, which is all that Kubernetes' protocols answer.
pub fn put_syn_reply(
    out: &mut BytesMut,
    id: u32,
    headers: &mut HeaderWriter,
) -> Result<(), CompressionError> {
    let mut block = BytesMut::new();
    headers.compress(&Headers::default(), &mut block)?;
    put_control(out, kind::SYN_REPLY, 0, 4 + block.len());
    out.put_u32(id);
    out.put_slice(&block);
    Ok(())
}

pub fn put_rst_stream(out: &mut BytesMut, id: u32, status: Reset) {
    put_control(out, kind::RST_STREAM, 0, 8);
    out.put_u32(id);
    out.put_u32(status as u32);
}

pub fn put_settings(out: &mut BytesMut, entries: &[(u32, u32)]) {
    put_control(out, kind::SETTINGS, 0, 4 + 8 * entries.len());
    out.put_u32(entries.len() as u32);
    for (id, value) in entries {
        out.put_u32(*id);
        out.put_u32(*value);
    }
}

pub fn put_ping(out: &mut BytesMut, id: u32) {
    put_control(out, kind::PING, 0, 4);
    out.put_u32(id);
}

pub fn put_goaway(out: &mut BytesMut, last_id: u32, status: Goaway) {
    put_control(out, kind::GOAWAY, 0, 8);
    out.put_u32(last_id);
    out.put_u32(status as u32);
}

pub fn put_window_update(out: &mut BytesMut, id: u32, delta: u32) {
    put_control(out, kind::WINDOW_UPDATE, 0, 8);
    out.put_u32(id);
    out.put_u32(delta);
}

/// Appends the head of a data frame; `length` bytes are to follow.
pub fn put_data_head(out: &mut BytesMut, id: u32, length: usize, fin: bool) {
    out.put_u32(id);
    out.put_u8(if fin { FLAG_FIN } else { 0 });
    out.put_uint(length as u64, 3);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(kind: u16, payload: &[u8]) -> BytesMut {
        let mut out = BytesMut::new();
        put_control(&mut out, kind, 0, payload.len());
        out.extend_from_slice(payload);
        out
    }

    fn decode(mut wire: BytesMut) -> Result<Option<Frame>, FrameError> {
        Decoder::default().decode(&mut wire)
    }

    #[test]
    fn what_is_encoded_is_decoded_however_it_is_cut() {
        let mut wire = BytesMut::new();
        put_settings(&mut wire, &[(4, 100), (7, 65_536)]);
        put_syn_reply(&mut wire, 1, &mut HeaderWriter::default()).unwrap();
        put_ping(&mut wire, 7);
        put_window_update(&mut wire, 0, 9);
        put_data_head(&mut wire, 1, 3, true);
        wire.extend_from_slice(b"abc");
        put_rst_stream(&mut wire, 3, Reset::Cancel);
        put_goaway(&mut wire, 5, Goaway::ProtocolError);
        let headers = Ok(Headers::default());
        let (id, fin) = (1, false);
        let expected = [
            Frame::Settings(vec![(4, 100), (7, 65_536)]),
            Frame::SynReply { id, fin, headers },
            Frame::Ping(7),
            Frame::WindowUpdate { id: 0, delta: 9 },
            Frame::Data {
                id: 1,
                bytes: Bytes::from_static(b"abc"),
                fin: true,
            },
            Frame::RstStream { id: 3, status: 5 },
            Frame::Goaway {
                last_id: 5,
                status: 1,
            },
        ];
        for piece in [1, 2, 3, 7, wire.len()] {
            let (mut decoder, mut buf) = (Decoder::default(), BytesMut::new());
            let mut frames: Vec<Frame> = Vec::new();
            for bytes in wire.chunks(piece) {
                buf.extend_from_slice(bytes);
                while let Some(frame) = decoder.decode(&mut buf).unwrap() {
                    frames.push(frame);
                }
            }
            assert_eq!(joined(frames), expected, "in pieces of {piece}");
            assert!(buf.is_empty());
        }
    }

    /// Pieces of one data frame as one.
    fn joined(frames: Vec<Frame>) -> Vec<Frame> {
        let mut all: Vec<Frame> = Vec::new();
        for frame in frames {
            if let (
                Some(Frame::Data { id, bytes, fin }),
                Frame::Data {
                    id: next,
                    bytes: more,
                    fin: last,
                },
            ) = (all.last_mut(), &frame)
                && *id == *next
                && !*fin
            {
                *bytes = [&bytes[..], more].concat().into();
                *fin = *last;
                continue;
            }
            all.push(frame);
        }
        all
    }

    #[test]
    fn a_data_frame_of_16_mib_is_handed_on_in_pieces() {
        let mut decoder = Decoder::default();
        let mut buf = BytesMut::new();
        put_data_head(&mut buf, 1, (1 << 24) - 1, true);
        assert_eq!(decoder.decode(&mut buf).unwrap(), None);
        let mut got = 0;
        while got < (1 << 24) - 1 {
            let count = ((1 << 24) - 1 - got).min(10_000);
            buf.extend_from_slice(&vec![0; count]);
            let Some(Frame::Data { bytes, fin, .. }) = decoder.decode(&mut buf).unwrap() else {
                panic!("a piece of data");
            };
            got += bytes.len();
            assert_eq!(fin, got == (1 << 24) - 1);
        }
        put_ping(&mut buf, 1);
        assert_eq!(decoder.decode(&mut buf).unwrap(), Some(Frame::Ping(1)));
    }

    #[test]
    fn an_empty_data_frame_carries_its_end() {
        let mut buf = BytesMut::new();
        put_data_head(&mut buf, 9, 0, true);
        let bytes = Bytes::new();
        let (id, fin) = (9, true);
        assert_eq!(decode(buf), Ok(Some(Frame::Data { id, bytes, fin })));
    }

    #[test]
    fn lengths_that_no_frame_has_end_the_session() {
        for kind in [3, 6, 7, 9] {
            for length in [0, 3, 5, 7, 9, 12] {
                if (kind == 6 && length == 4) || (kind != 6 && length == 8) {
                    continue;
                }
                let error = decode(control(kind, &vec![1; length])).unwrap_err();
                assert_eq!(error, FrameError::Length { kind, length });
            }
        }
        for (kind, length) in [(1, 9), (2, 3), (4, 3), (8, 0)] {
            let error = decode(control(kind, &vec![1; length])).unwrap_err();
            assert_eq!(error, FrameError::Length { kind, length });
        }
    }

    #[test]
    fn a_control_frame_of_16_mib_is_refused_at_its_head() {
        for kind in [1, 4, 5, 77] {
            let mut head = BytesMut::new();
            let length = (1 << 24) - 1;
            put_control(&mut head, kind, 0, length);
            assert_eq!(decode(head), Err(FrameError::Length { kind, length }));
        }
    }

    #[test]
    fn other_versions_and_stream_0_are_refused_and_other_types_skipped() {
        let mut other = control(6, &[0, 0, 0, 1]);
        other[1] = 2;
        assert_eq!(decode(other), Err(FrameError::Version(2)));
        assert_eq!(decode(control(3, &[0; 8])), Err(FrameError::ZeroStream));
        assert_eq!(decode(BytesMut::zeroed(8)), Err(FrameError::ZeroStream));
        assert_eq!(decode(control(77, b"what")), Ok(Some(Frame::Unknown(77))));
    }

    #[test]
    fn settings_must_be_as_many_as_they_say() {
        let count = |n: u32| [&n.to_be_bytes()[..], &[0; 8]].concat();
        assert_eq!(
            decode(control(4, &count(1))),
            Ok(Some(Frame::Settings(vec![(0, 0)])))
        );
        assert!(decode(control(4, &count(2))).is_err());
        assert!(decode(control(4, &count(0))).is_err());
        assert_eq!(
            decode(control(4, &count(u32::MAX))),
            Err(FrameError::Settings(u32::MAX as usize))
        );
    }
}
