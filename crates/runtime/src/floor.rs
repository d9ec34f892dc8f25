//! Versions of OCI runtimes with holes that are known and mended.
//!
//! A runtime below the floor is told of, not refused: distributions mend old versions and keep
//! their numbers, and a node that stops is no safer for its owner.

use crate::{Flavour, Version};

/// Some holes, and the first versions without them: one for each line of releases that was
/// mended, oldest line first. Lines before the first were not, those after the last never had it.
struct Mended {
    flavour: Flavour,
    advisories: &'static str,
    first: &'static [[u32; 3]],
}

/// Advisories of github.com/opencontainers/runc, containers/crun and youki-dev/youki.
const MENDED: [Mended; 5] = [
    Mended {
        flavour: Flavour::Runc,
        advisories: "CVE-2024-21626",
        first: &[[1, 1, 12]],
    },
    Mended {
        flavour: Flavour::Runc,
        advisories: "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881",
        first: &[[1, 2, 8], [1, 3, 3]],
    },
    Mended {
        flavour: Flavour::Runc,
        advisories: "CVE-2026-41579",
        first: &[[1, 3, 6], [1, 4, 3]],
    },
    Mended {
        flavour: Flavour::Crun,
        advisories: "CVE-2025-24965",
        first: &[[1, 20, 0]],
    },
    Mended {
        flavour: Flavour::Youki,
        advisories: "CVE-2025-62161, CVE-2025-62596",
        first: &[[0, 5, 7]],
    },
];

impl Version {
    /// Advisories that this version is too old for, in words; `None` if none is known. The number
    /// alone decides.
    pub fn known_holes(&self) -> Option<String> {
        let number = number(&self.version)?;
        let open: Vec<_> = MENDED
            .iter()
            .filter(|mended| mended.flavour == self.flavour && mended.concerns(number))
            .map(|mended| mended.advisories)
            .collect();
        (!open.is_empty()).then(|| open.join(", "))
    }
}

impl Mended {
    fn concerns(&self, number: [u32; 3]) -> bool {
        let line = [number[0], number[1]];
        match self.first.iter().find(|first| first[..2] == line) {
            Some(first) => number < *first,
            // Between two mended lines lies one that was given up.
            None => self.first.last().is_some_and(|last| number < *last),
        }
    }
}

/// `1.2.8` of `1.2.8+ds1-2`, `1.20` or `1.4.0-rc.3`: a candidate counts as the release.
fn number(version: &str) -> Option<[u32; 3]> {
    let end = version.find(|c: char| !c.is_ascii_digit() && c != '.');
    let mut parts = version[..end.unwrap_or(version.len())].split('.');
    let first = parts.next()?.parse().ok()?;
    let mut rest = || parts.next().map_or(Some(0), |part| part.parse().ok());
    Some([first, rest()?, rest()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holes(name: &str, version: &str) -> String {
        let text = format!("{name} version {version}\n");
        let version = Version::parse(&text).unwrap();
        version.known_holes().unwrap_or_default()
    }

    #[test]
    fn runtimes_with_known_holes_are_known() {
        let all = holes("runc", "1.1.5+ds1");
        for advisory in ["CVE-2024-21626", "CVE-2025-31133", "CVE-2026-41579"] {
            assert!(all.contains(advisory), "{all}");
        }
        assert!(!holes("runc", "1.1.15").contains("CVE-2024-21626"));
        assert_eq!(holes("runc", "1.2.8"), "CVE-2026-41579");
        assert!(holes("runc", "1.3.2").contains("CVE-2025-52881"));
        assert_eq!(holes("runc", "1.3.3"), "CVE-2026-41579");
        assert_eq!(holes("runc", "1.4.2"), "CVE-2026-41579");
        for fine in ["1.3.6", "1.4.3", "1.5.0-rc.2", "2.0"] {
            assert_eq!(holes("runc", fine), "", "{fine}");
        }
        assert_eq!(holes("crun", "1.8.1"), "CVE-2025-24965");
        assert_eq!(holes("crun", "1.20"), "");
        assert_eq!(holes("youki", "0.5.7"), "");
        assert!(holes("youki", "0.5.4").contains("CVE-2025-62161"));
        assert_eq!(holes("kata-runtime", "0.1"), "");
        assert_eq!(holes("runc", "unknown"), "");
    }
}
