//! A SPDY session from its first byte on; the first byte says in what pieces the rest arrives.
#![no_main]

use gantry_streaming::spdy::replay;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some((piece, bytes)) = bytes.split_first() {
        let held = replay(bytes, usize::from(*piece) * 16 + 1);
        assert!(held.out < 256 * 1024 && held.streams <= 256, "{held:?}");
    }
});
