//! Time of day, and RFC 3339 as the CRI log format wants it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since the epoch.
pub fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as i64)
}

/// Length of `2006-01-02T15:04:05.000000000Z`.
pub const STAMP: usize = 30;

/// Formats times, remembering the second last formatted: only the nanoseconds differ from one
/// batch of lines to the next.
#[derive(Debug)]
pub struct Clock {
    second: i64,
    text: [u8; STAMP],
}

impl Clock {
    pub fn new() -> Self {
        Self {
            second: i64::MIN,
            text: *b"0000-00-00T00:00:00.000000000Z",
        }
    }

    /// `nanos` since the epoch, in UTC.
    pub fn format(&mut self, nanos: i64) -> &[u8; STAMP] {
        let second = nanos.div_euclid(1_000_000_000);
        if second != self.second {
            self.second = second;
            let (days, of_day) = (second.div_euclid(86_400), second.rem_euclid(86_400));
            let (year, month, day) = civil(days);
            put(&mut self.text[0..4], year);
            put(&mut self.text[5..7], month);
            put(&mut self.text[8..10], day);
            put(&mut self.text[11..13], of_day / 3600);
            put(&mut self.text[14..16], of_day / 60 % 60);
            put(&mut self.text[17..19], of_day % 60);
        }
        put(&mut self.text[20..29], nanos.rem_euclid(1_000_000_000));
        &self.text
    }
}

/// Writes `value` as decimal digits that fill `digits`.
fn put(digits: &mut [u8], mut value: i64) {
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Year, month and day of a count of days since 1970-01-01, in the proleptic Gregorian calendar:
/// years are counted from March, so that the leap day is a year's last, in eras of 400 years,
/// after which the calendar repeats (146 097 days).
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(nanos: i64) -> String {
        String::from_utf8(Clock::new().format(nanos).to_vec()).unwrap()
    }

    #[test]
    fn times_are_formatted_in_utc() {
        assert_eq!(text(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(
            text(951_782_399_000_000_001),
            "2000-02-28T23:59:59.000000001Z"
        );
        assert_eq!(
            text(951_782_400_999_999_999),
            "2000-02-29T00:00:00.999999999Z"
        );
        assert_eq!(
            text(4_107_542_400_000_000_000),
            "2100-03-01T00:00:00.000000000Z"
        );
        assert_eq!(
            text(1_709_251_199_120_000_000),
            "2024-02-29T23:59:59.120000000Z"
        );
    }

    #[test]
    fn a_clock_moves_within_and_across_seconds() {
        let mut clock = Clock::new();
        clock.format(1_000_000_000);
        assert_eq!(
            clock.format(1_500_000_000),
            b"1970-01-01T00:00:01.500000000Z"
        );
        assert_eq!(
            clock.format(2_000_000_000),
            b"1970-01-01T00:00:02.000000000Z"
        );
        assert_eq!(clock.format(999_999_999), b"1970-01-01T00:00:00.999999999Z");
    }
}
