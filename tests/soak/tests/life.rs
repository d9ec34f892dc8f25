//! A short life; tests/soak/run makes longer ones.

use gantry_soak::life::{self, Options, Until};
use gantry_testkit::daemon;

/// The seed of a run to be tried again.
const SEED: &str = "GANTRY_SOAK_SEED";

/// Otherwise it is the same life every time: what then goes wrong comes of a change. Other lives are
/// for `tests/soak/run`.
const USUAL: u64 = 1;

#[test]
fn clients_find_what_they_were_told_whatever_is_killed() {
    const NAME: &str = "clients_find_what_they_were_told_whatever_is_killed";
    if let Some(reason) = daemon::unable() {
        println!("SKIP {NAME}: {reason}");
        return;
    }
    let seed = match std::env::var(SEED) {
        Ok(seed) => seed.parse().expect("a number in GANTRY_SOAK_SEED"),
        Err(_) => USUAL,
    };
    let options = Options {
        seed,
        clients: 3,
        until: Until::Kills(20),
    };
    match life::run_blocking(options) {
        Ok(report) => println!("{report}"),
        Err(error) => panic!("{error}\ntry it again with {SEED}={seed}"),
    }
}
