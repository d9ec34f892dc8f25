//! Random numbers that a seed makes again: SplitMix64 (Steele, Lea, Flood, 2014).

use std::ops::Range;
use std::time::Duration;

/// One stream of decisions.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A seed of this moment.
    pub fn fresh_seed() -> u64 {
        let since = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        // Short enough to be typed.
        (since.as_nanos() as u64 ^ u64::from(std::process::id())) % 1_000_000_000
    }

    /// A stream of its own for part `n`, so that what one part draws moves no other.
    pub fn part(&self, n: u64) -> Self {
        let mut from = Self(self.0 ^ n.wrapping_mul(0xd134_2543_de82_ef95));
        from.next();
        Self(from.next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number of `range`, which must not be empty.
    pub fn number(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// A place in a list of `length`, which must not be 0.
    pub fn place(&mut self, length: usize) -> usize {
        self.number(0..length as u64) as usize
    }

    /// One of a list that is not empty.
    pub fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.place(of.len())]
    }

    /// True so many times of a hundred.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.number(0..100) < percent
    }

    pub fn millis(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.number(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_the_same_numbers_again_and_parts_their_own() {
        let draw = |mut rng: Rng| -> Vec<u64> { (0..20).map(|_| rng.number(3..9)).collect() };
        let seed = Rng::new(7);
        assert_eq!(draw(seed.clone()), draw(Rng::new(7)));
        assert_ne!(draw(seed.part(1)), draw(seed.part(2)));
        assert_eq!(draw(seed.part(1)), draw(Rng::new(7).part(1)));
        let mut seen = draw(Rng::new(1));
        seen.sort_unstable();
        assert!((3..9).contains(&seen[0]) && (3..9).contains(&seen[19]));
        assert_ne!(seen[0], seen[19]);
    }
}
