//! Quantities as Kubernetes writes them: `10M`, `1.5Gi`, `3e6`.

/// Parses a quantity that is not negative, rounded up to a whole number; `None` for what is none
/// or exceeds the type.
pub fn parse(text: &str) -> Option<u64> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let scale = scale(suffix)?;
    let divisor = 10u128
        .checked_pow(fraction.len().try_into().ok()?)?
        .checked_mul(scale.1)?;
    digits
        .checked_mul(scale.0)?
        .div_ceil(divisor)
        .try_into()
        .ok()
}

/// What the suffix multiplies by and divides by.
fn scale(suffix: &str) -> Option<(u128, u128)> {
    const UNITS: [(&str, u128, u128); 16] = [
        ("", 1, 1),
        ("n", 1, 1_000_000_000),
        ("u", 1, 1_000_000),
        ("m", 1, 1_000),
        ("k", 1_000, 1),
        ("M", 1_000_000, 1),
        ("G", 1_000_000_000, 1),
        ("T", 1_000_000_000_000, 1),
        ("P", 1_000_000_000_000_000, 1),
        ("E", 1_000_000_000_000_000_000, 1),
        ("Ki", 1 << 10, 1),
        ("Mi", 1 << 20, 1),
        ("Gi", 1 << 30, 1),
        ("Ti", 1 << 40, 1),
        ("Pi", 1 << 50, 1),
        ("Ei", 1 << 60, 1),
    ];
    if let Some((_, times, by)) = UNITS.iter().find(|(unit, ..)| *unit == suffix) {
        return Some((*times, *by));
    }
    let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
    let power = 10u128.checked_pow(exponent.unsigned_abs())?;
    Some(if exponent < 0 { (1, power) } else { (power, 1) })
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn quantities_are_read_as_kubernetes_means_them() {
        for (text, value) in [
            ("10M", 10_000_000),
            ("1.5Gi", 1_610_612_736),
            ("1500m", 2),
            ("100", 100),
            ("+1k", 1000),
            ("3e6", 3_000_000),
            ("3E6", 3_000_000),
            ("1E", 1_000_000_000_000_000_000),
            ("25e-1", 3),
            (".5k", 500),
            ("1.", 1),
        ] {
            assert_eq!(parse(text), Some(value), "{text}");
        }
        for junk in [
            "",
            ".",
            "-1",
            "1.2.3",
            "10 M",
            "10Mb",
            "ten",
            "1e",
            "99999999E",
            "1e99999",
            "1K",
        ] {
            assert_eq!(parse(junk), None, "{junk}");
        }
    }
}
