//! Sessions of clients that were damaged on the way: whatever comes, it is refused or taken, and
//! nothing grows.

use gantry_streaming::spdy::{HeaderReader, Headers, check, replay};

use crate::common::spdy::{Client, control, data};

/// A repeatable source of damage.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % sides
    }
}

/// What a healthy client sends: streams, data, windows, half-closes, resets.
fn session() -> Vec<u8> {
    let mut client = Client::new(tokio::io::empty());
    let mut bytes = Vec::new();
    let mut add = |frame: &[u8]| bytes.extend_from_slice(frame);
    add(&control(
        4,
        0,
        &[1u32, 7, 30_000].map(u32::to_be_bytes).concat(),
    ));
    for id in (1..80).step_by(2) {
        let request = (id / 4).to_string();
        let kind = if id % 4 == 1 { "error" } else { "data" };
        let headers = [
            ("streamType", kind),
            ("port", "80"),
            ("requestID", &request),
        ];
        add(&client.syn_stream(id, 0, &headers));
        add(&data(id, &[7; 700], id % 3 == 0));
        add(&control(9, 0, &[id, 5000].map(u32::to_be_bytes).concat()));
    }
    add(&control(6, 0, &1u32.to_be_bytes()));
    add(&control(8, 1, &[&9u32.to_be_bytes()[..], b""].concat()));
    for id in (1..40).step_by(4) {
        add(&control(3, 0, &[id, 5].map(u32::to_be_bytes).concat()));
    }
    add(&control(7, 0, &[0; 8]));
    bytes
}

#[test]
fn a_damaged_session_ends_or_goes_on_and_holds_no_more_than_its_bounds() {
    let healthy = session();
    assert!(
        replay(&healthy, 100).streams >= 30,
        "{:?}",
        replay(&healthy, 100)
    );
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for _ in 0..4000 {
        let mut bytes = healthy.clone();
        for _ in 0..=dice.roll(8) {
            let at = dice.roll(bytes.len());
            match dice.roll(5) {
                0 => bytes[at] ^= 1 << dice.roll(8),
                1 => bytes[at] = dice.roll(256) as u8,
                2 => bytes.truncate(at.max(1)),
                3 => {
                    let end = (at + dice.roll(40)).min(bytes.len());
                    bytes.drain(at..end);
                    bytes.push(0);
                }
                _ => {
                    let end = (at + dice.roll(400)).min(bytes.len());
                    let again = bytes[at..end].to_vec();
                    let to = dice.roll(bytes.len());
                    bytes.splice(to..to, again);
                }
            }
        }
        // In what pieces it arrives.
        bytes.insert(0, dice.roll(256) as u8);
        check(&bytes);
    }
}

/// Streams that are opened, filled and taken back, over and over.
#[test]
fn streams_that_are_taken_back_leave_nothing() {
    let mut client = Client::new(tokio::io::empty());
    let mut bytes = Vec::new();
    for id in (1..6001).step_by(2) {
        bytes.extend_from_slice(&client.syn_stream(id, 0, &[("streamType", "data")]));
        bytes.extend_from_slice(&data(id, &[7; 3000], false));
        let reset = [id, 5].map(u32::to_be_bytes).concat();
        bytes.extend_from_slice(&control(3, 0, &reset));
    }
    for piece in [10, 1000, 4000] {
        let held = replay(&bytes, piece);
        assert!(held.streams <= 1 && held.queued <= 3000, "{held:?}");
    }
}

#[test]
fn noise_is_refused() {
    let mut dice = Dice(0xdead_beef_1234_5678);
    for _ in 0..4000 {
        let length = dice.roll(2000);
        let mut bytes: Vec<u8> = (0..length).map(|_| dice.roll(256) as u8).collect();
        if length > 8 && dice.roll(2) == 0 {
            // At least a head that is believed.
            bytes[..8].copy_from_slice(&[0x80, 3, 0, dice.roll(10) as u8, 0, 0, 4, 0]);
        }
        check(&bytes);
        // Neither may anything else that is read from a client panic.
        if let Ok(block) = HeaderReader::default().decompress(&bytes) {
            let _ = Headers::parse(block);
        }
        let _ = Headers::parse(&bytes);
    }
}
