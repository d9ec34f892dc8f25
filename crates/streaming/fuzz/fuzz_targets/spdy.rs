//! A SPDY session from its first byte on. `tests/run` runs it for a moment where cargo-fuzz is there;
//! the tests of the crate (tests/streaming/damage.rs) run the same check over damage of their own.
#![no_main]

use gantry_streaming::spdy::check;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| check(bytes));
