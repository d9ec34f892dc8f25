//! Frames: encoding, and decoding as the bytes come.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use prost::Message;

use crate::Error;

/// Most bytes of one message.
pub const MAX_MESSAGE: usize = 4 << 20;

const HEADER: usize = 4;

/// Capacity that an empty decoder keeps; what a large frame needed beyond it is given back.
const KEPT_CAPACITY: usize = 1 << 10;

/// One whole frame. Its first byte is where descriptors attach.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, Error> {
    let len = message.encoded_len();
    if len > MAX_MESSAGE {
        return Err(Error::TooLarge(len));
    }
    let mut frame = Vec::with_capacity(HEADER + len);
    frame.extend_from_slice(&(len as u32).to_be_bytes());
    message.encode_raw(&mut frame);
    Ok(frame)
}

/// A message and the descriptors that came with it.
#[derive(Debug)]
pub struct Frame<M> {
    pub message: M,
    pub fds: Vec<OwnedFd>,
}

/// Takes bytes and descriptors as they arrive and gives whole frames.
///
/// Which frame descriptors belong to: a receive never reads past the bytes that were sent along
/// with descriptors (unix(7)), and a sender attaches them to one frame alone. So the last frame
/// that begins within the bytes of one receive is theirs.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Stream offset of `buffer[0]`, which is always where a frame begins.
    consumed: u64,
    /// Stream offset where the last frame known of begins; its header may be incomplete.
    last_start: u64,
    /// Descriptors by the stream offset of their frame.
    fds: VecDeque<(u64, Vec<OwnedFd>)>,
}

impl Decoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds what one receive returned. An error is final: the stream has lost its frames.
    pub fn feed(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<(), Error> {
        let before = self.consumed + self.buffer.len() as u64;
        self.buffer.extend_from_slice(bytes);
        let end = self.consumed + self.buffer.len() as u64;
        // Walk the frames that the new bytes complete.
        while let Some(len) = self.len_at(self.last_start)? {
            let next = self.last_start + (HEADER + len) as u64;
            if next >= end {
                break;
            }
            self.last_start = next;
        }
        if !fds.is_empty() {
            if self.last_start < before {
                return Err(Error::StrayDescriptors);
            }
            self.fds.push_back((self.last_start, fds));
        }
        Ok(())
    }

    /// The length that the header at a stream offset gives, `None` while it is incomplete.
    fn len_at(&self, offset: u64) -> Result<Option<usize>, Error> {
        let at = (offset - self.consumed) as usize;
        let Some(header) = self
            .buffer
            .get(at..)
            .and_then(|rest| rest.first_chunk::<HEADER>())
        else {
            return Ok(None);
        };
        match u32::from_be_bytes(*header) as usize {
            len if len > MAX_MESSAGE => Err(Error::TooLarge(len)),
            len => Ok(Some(len)),
        }
    }

    /// The next whole frame, `None` until more bytes have come.
    #[expect(
        clippy::should_implement_trait,
        reason = "the caller names the message's type"
    )]
    pub fn next<M: Message + Default>(&mut self) -> Result<Option<Frame<M>>, Error> {
        let Some(len) = self.len_at(self.consumed)? else {
            return Ok(None);
        };
        let Some(bytes) = self.buffer.get(HEADER..HEADER + len) else {
            return Ok(None);
        };
        let message = M::decode(bytes).map_err(|source| Error::Malformed {
            message: std::any::type_name::<M>()
                .rsplit("::")
                .next()
                .unwrap_or("message"),
            source,
        })?;
        let fds = match self.fds.front() {
            Some((start, _)) if *start == self.consumed => {
                self.fds.pop_front().map(|(_, fds)| fds).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        self.buffer.drain(..HEADER + len);
        self.consumed += (HEADER + len) as u64;
        // Reading the last frame that was known leaves its start behind.
        self.last_start = self.last_start.max(self.consumed);
        if self.buffer.is_empty() && self.buffer.capacity() > KEPT_CAPACITY {
            self.buffer = Vec::new();
        }
        Ok(Some(Frame { message, fds }))
    }

    /// Whether the stream may end here: nothing of an unfinished frame was received.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }
}

/// Reads exactly one frame, blocking.
pub fn read_frame<M: Message + Default>(reader: &mut impl Read) -> Result<M, Error> {
    let mut header = [0; HEADER];
    read_exact(reader, &mut header)?;
    let len = u32::from_be_bytes(header) as usize;
    if len > MAX_MESSAGE {
        return Err(Error::TooLarge(len));
    }
    let mut bytes = vec![0; len];
    read_exact(reader, &mut bytes)?;
    let mut decoder = Decoder::new();
    decoder.feed(&header, Vec::new())?;
    decoder.feed(&bytes, Vec::new())?;
    decoder
        .next()?
        .map(|frame| frame.message)
        .ok_or(Error::Truncated)
}

fn read_exact(reader: &mut impl Read, buffer: &mut [u8]) -> Result<(), Error> {
    reader.read_exact(buffer).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::Truncated,
        _ => Error::Io(e),
    })
}

/// Writes one frame, blocking.
pub fn write_frame<M: Message>(writer: &mut impl Write, message: &M) -> Result<(), Error> {
    writer.write_all(&encode(message)?)?;
    Ok(writer.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{Request, Signal, request::Body};

    fn request(id: u64, container: &str) -> Request {
        let signal = Signal {
            container_id: container.into(),
            signal: 15,
            all: false,
        };
        Request {
            id,
            body: Some(Body::Signal(signal)),
        }
    }

    fn fd() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn frames_survive_every_split() {
        let mut stream = encode(&request(1, "a")).unwrap();
        stream.extend(encode(&Request::default()).unwrap());
        stream.extend(encode(&request(2, &"b".repeat(300))).unwrap());
        for step in 1..stream.len() {
            let mut decoder = Decoder::new();
            let mut ids = Vec::new();
            for chunk in stream.chunks(step) {
                decoder.feed(chunk, Vec::new()).unwrap();
                while let Some(frame) = decoder.next::<Request>().unwrap() {
                    ids.push(frame.message.id);
                }
            }
            assert_eq!(ids, [1, 0, 2], "step {step}");
            assert!(decoder.is_empty());
        }
    }

    #[test]
    fn descriptors_belong_to_the_frame_that_begins_with_them() {
        let (plain, with) = (
            encode(&request(1, "plain")).unwrap(),
            encode(&request(2, "with")).unwrap(),
        );
        // One receive brings the end of a frame, a whole one, and the first bytes of the one
        // with descriptors.
        for cut in 1..with.len() {
            let mut decoder = Decoder::new();
            decoder.feed(&plain[..3], Vec::new()).unwrap();
            let chunk = [&plain[3..], &plain[..], &with[..cut]].concat();
            decoder.feed(&chunk, vec![fd(), fd()]).unwrap();
            decoder.feed(&with[cut..], Vec::new()).unwrap();
            decoder.feed(&plain, Vec::new()).unwrap();
            let mut seen = Vec::new();
            while let Some(frame) = decoder.next::<Request>().unwrap() {
                seen.push((frame.message.id, frame.fds.len()));
            }
            assert_eq!(seen, [(1, 0), (1, 0), (2, 2), (1, 0)], "cut {cut}");
        }
    }

    #[test]
    fn frames_read_between_receives_keep_their_descriptors() {
        let with = encode(&request(2, "with")).unwrap();
        let mut decoder = Decoder::new();
        for _ in 0..3 {
            decoder.feed(&with, vec![fd()]).unwrap();
            let frame = decoder.next::<Request>().unwrap().unwrap();
            assert_eq!((frame.message.id, frame.fds.len()), (2, 1));
            assert!(decoder.next::<Request>().unwrap().is_none());
        }
    }

    #[test]
    fn descriptors_in_the_middle_are_refused() {
        let frame = encode(&request(1, "a")).unwrap();
        let mut decoder = Decoder::new();
        decoder.feed(&frame[..5], Vec::new()).unwrap();
        assert!(matches!(
            decoder.feed(&frame[5..], vec![fd()]),
            Err(Error::StrayDescriptors)
        ));
    }

    #[test]
    fn an_oversized_frame_is_refused_before_it_is_read() {
        let mut decoder = Decoder::new();
        let header = ((MAX_MESSAGE + 1) as u32).to_be_bytes();
        assert!(matches!(
            decoder.feed(&header, Vec::new()),
            Err(Error::TooLarge(_))
        ));
        let big = request(1, &"x".repeat(MAX_MESSAGE));
        assert!(matches!(encode(&big), Err(Error::TooLarge(_))));
        assert!(matches!(
            read_frame::<Request>(&mut &header[..]),
            Err(Error::TooLarge(_))
        ));
    }

    #[test]
    fn garbage_is_an_error_and_not_a_message() {
        let mut decoder = Decoder::new();
        decoder
            .feed(&[0, 0, 0, 3, 0xff, 0xff, 0xff], Vec::new())
            .unwrap();
        assert!(matches!(
            decoder.next::<Request>(),
            Err(Error::Malformed {
                message: "Request",
                ..
            })
        ));
        assert!(matches!(
            read_frame::<Request>(&mut &[0u8, 0][..]),
            Err(Error::Truncated)
        ));
    }

    #[test]
    fn a_body_from_the_future_is_no_body() {
        // Field 99, which no version has yet: a newer peer's request decodes without a body.
        let mut decoder = Decoder::new();
        decoder
            .feed(&[0, 0, 0, 5, 0x08, 7, 0x9a, 0x06, 0], Vec::new())
            .unwrap();
        let frame = decoder.next::<Request>().unwrap().unwrap();
        assert_eq!((frame.message.id, frame.message.body), (7, None));
    }

    #[test]
    fn a_large_frame_gives_its_memory_back() {
        let mut decoder = Decoder::new();
        decoder
            .feed(
                &encode(&request(1, &"x".repeat(1 << 20))).unwrap(),
                Vec::new(),
            )
            .unwrap();
        decoder.next::<Request>().unwrap().unwrap();
        assert!(decoder.buffer.capacity() <= KEPT_CAPACITY);
    }

    #[test]
    fn a_frame_written_is_the_frame_read() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &request(5, "c")).unwrap();
        assert_eq!(
            read_frame::<Request>(&mut &bytes[..]).unwrap(),
            request(5, "c")
        );
    }
}
