//! Versions of the CNI specification.

use std::fmt;

/// A version; ordered as one would expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u16, u16, u16);

impl Version {
    /// Chains and results as we know them begin here.
    pub const OLDEST: Version = Version(0, 3, 0);
    /// Addresses lost their `version` field.
    pub const V1_0: Version = Version(1, 0, 0);
    /// STATUS and GC.
    pub const V1_1: Version = Version(1, 1, 0);
    pub const NEWEST: Version = Self::V1_1;

    pub fn supported(self) -> bool {
        (Self::OLDEST..=Self::NEWEST).contains(&self)
    }

    /// `None` for text that is not `major.minor.patch`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(|part| part.parse().ok());
        let version = Self(parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(version)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

#[cfg(test)]
mod tests {
    use super::Version;

    #[test]
    fn versions_are_parsed_and_ordered() {
        assert!(Version::parse("0.4.0").unwrap() < Version::parse("0.10.0").unwrap());
        assert!(Version::parse("1.0.0").unwrap().supported());
        assert!(!Version::parse("0.2.0").unwrap().supported());
        assert!(!Version::parse("2.0.0").unwrap().supported());
        for bad in ["", "1", "1.0", "1.0.0.0", "a.b.c", "1..0", "-1.0.0"] {
            assert_eq!(Version::parse(bad), None, "{bad}");
        }
    }
}
