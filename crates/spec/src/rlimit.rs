//! Resource limits as administrators write them: `nofile=1024:524288`.

pub use oci_spec::runtime::PosixRlimit;
use oci_spec::runtime::PosixRlimitBuilder;

/// RLIM_INFINITY (getrlimit(2)).
pub const UNLIMITED: u64 = u64::MAX;

/// Parses `name=soft:hard` or `name=both`; a value is a number, `unlimited` or `-1`. Both
/// are lowered to `most`.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str, most: u64) -> Result<PosixRlimit, String> {
    let bad = |reason: &str| format!("{text:?} {reason}");
    let (name, values) = text
        .split_once('=')
        .ok_or_else(|| bad("is not name=soft:hard"))?;
    let kind = format!("RLIMIT_{}", name.to_ascii_uppercase());
    let kind = serde_json::from_value(serde_json::Value::String(kind));
    let kind = kind.map_err(|_| bad("names no resource limit"))?;
    let number = |value: &str| match value {
        "unlimited" | "-1" => Ok(UNLIMITED),
        _ => value
            .parse()
            .map_err(|_| bad("has a value that is no number")),
    };
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let (soft, hard) = (number(soft)?, number(hard)?);
    if soft > hard {
        return Err(bad("has a soft limit above the hard one"));
    }
    PosixRlimitBuilder::default()
        .typ::<oci_spec::runtime::PosixRlimitType>(kind)
        .soft(soft.min(most))
        .hard(hard.min(most))
        .build()
        .map_err(|error| bad(&error.to_string()))
}

/// As getrlimit(2) calls it: `RLIMIT_NOFILE`.
pub fn name(limit: &PosixRlimit) -> String {
    limit.typ().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_parsed_and_lowered() {
        let values = |text: &str| {
            parse(text, UNLIMITED).map(|limit| (name(&limit), limit.soft(), limit.hard()))
        };
        let nofile = |soft, hard| Ok(("RLIMIT_NOFILE".to_owned(), soft, hard));
        assert_eq!(values("nofile=1024:524288"), nofile(1024, 524_288));
        assert_eq!(values("NOFILE=7"), nofile(7, 7));
        assert_eq!(values("nofile=1:unlimited"), nofile(1, UNLIMITED));
        assert_eq!(values("nofile=-1"), nofile(UNLIMITED, UNLIMITED));
        for bad in [
            "",
            "nofile",
            "nofile=",
            "nofile=x",
            "nofile=2:1",
            "nofile=1:2:3",
            "no=1",
            "=1",
        ] {
            assert!(parse(bad, UNLIMITED).unwrap_err().contains(bad), "{bad:?}");
        }
        let lowered = |most| {
            let limit = parse("nofile=1024:524288", most).unwrap();
            (limit.soft(), limit.hard())
        };
        assert_eq!(lowered(4096), (1024, 4096));
        assert_eq!(lowered(100), (100, 100));
    }
}
