//! Which entry of an index fits this node.

use crate::document::{Descriptor, Platform};

/// Platforms that run here, best first.
#[derive(Clone, Debug)]
pub struct Accepted(Vec<Platform>);

impl Accepted {
    /// Those of the machine that this program was built for.
    pub fn host() -> Self {
        match std::env::consts::ARCH {
            "x86_64" => Self::linux(&[("amd64", ""), ("386", "")]),
            "aarch64" => Self::linux(&[
                ("arm64", "v8"),
                ("arm", "v8"),
                ("arm", "v7"),
                ("arm", "v6"),
                ("arm", "v5"),
            ]),
            "arm" => Self::linux(&[("arm", "v7"), ("arm", "v6"), ("arm", "v5")]),
            "x86" => Self::linux(&[("386", "")]),
            "loongarch64" => Self::linux(&[("loong64", "")]),
            "powerpc64" => Self::linux(&[("ppc64le", "")]),
            other => Self::linux(&[(other, "")]),
        }
    }

    /// `linux` with each of these architectures and variants, best first.
    pub fn linux(list: &[(&str, &str)]) -> Self {
        let platform = |&(architecture, variant): &(&str, &str)| Platform {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        };
        Self(list.iter().map(platform).collect())
    }

    /// Position of `platform` in the list; `None` if it does not run here.
    fn rank(&self, platform: &Platform) -> Option<usize> {
        let wanted = normal(platform);
        self.0.iter().position(|own| *own == wanted)
    }

    /// The descriptors that may be used, best first. Entries without a platform come last, in
    /// their order: only their content tells.
    pub fn candidates<'a>(&self, index: &'a [Descriptor]) -> Vec<&'a Descriptor> {
        let mut ranked: Vec<(usize, &Descriptor)> = index
            .iter()
            .filter(|entry| !entry.is_reference)
            .filter_map(|entry| match &entry.platform {
                Some(platform) => Some((self.rank(platform)?, entry)),
                None => Some((self.0.len(), entry)),
            })
            .collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.into_iter().map(|(_, entry)| entry).collect()
    }

    /// Whether an image that says this of itself runs here. One that says nothing may.
    pub fn runs(&self, platform: &Platform) -> bool {
        (platform.os.is_empty() && platform.architecture.is_empty())
            || self.rank(platform).is_some()
    }

    /// The best platform, for messages.
    pub fn name(&self) -> String {
        self.0.first().map(Platform::to_string).unwrap_or_default()
    }
}

/// One spelling: architectures have older names, and a missing variant has a meaning.
fn normal(platform: &Platform) -> Platform {
    let (architecture, variant) = match (platform.architecture.as_str(), platform.variant.as_str())
    {
        ("x86_64" | "x86-64" | "amd64", "" | "v1") => ("amd64", ""),
        ("i386" | "386", _) => ("386", ""),
        ("aarch64" | "arm64", "" | "8" | "v8") => ("arm64", "v8"),
        ("armhf", _) => ("arm", "v7"),
        ("armel", _) => ("arm", "v6"),
        ("arm", "" | "7") => ("arm", "v7"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "6") => ("arm", "v6"),
        ("arm", "8") => ("arm", "v8"),
        other => other,
    };
    Platform {
        os: platform.os.to_ascii_lowercase(),
        architecture: architecture.to_owned(),
        variant: variant.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(n: u64, platform: Option<(&str, &str, &str)>) -> Descriptor {
        Descriptor {
            media_type: String::new(),
            digest: crate::hash::sha256(&n.to_be_bytes()),
            size: n,
            platform: platform.map(|(os, architecture, variant)| Platform {
                os: os.into(),
                architecture: architecture.into(),
                variant: variant.into(),
            }),
            is_reference: false,
        }
    }

    fn pick(accepted: &Accepted, index: &[Descriptor]) -> Vec<u64> {
        accepted
            .candidates(index)
            .iter()
            .map(|entry| entry.size)
            .collect()
    }

    #[test]
    fn the_best_variant_comes_first() {
        let index = [
            entry(1, Some(("linux", "arm", "v6"))),
            entry(2, Some(("linux", "arm", "v7"))),
            entry(3, Some(("linux", "arm64", ""))),
            entry(4, Some(("linux", "amd64", ""))),
            entry(5, Some(("windows", "amd64", ""))),
        ];
        let arm64 =
            Accepted::linux(&[("arm64", "v8"), ("arm", "v8"), ("arm", "v7"), ("arm", "v6")]);
        assert_eq!(pick(&arm64, &index), [3, 2, 1]);
        let arm7 = Accepted::linux(&[("arm", "v7"), ("arm", "v6"), ("arm", "v5")]);
        assert_eq!(pick(&arm7, &index), [2, 1]);
        let amd64 = Accepted::linux(&[("amd64", ""), ("386", "")]);
        assert_eq!(pick(&amd64, &index), [4]);
    }

    #[test]
    fn attestations_are_no_images() {
        let mut attestation = entry(1, None);
        attestation.is_reference = true;
        let index = [
            attestation,
            entry(2, Some(("unknown", "unknown", ""))),
            entry(3, None),
            entry(4, Some(("linux", "x86_64", ""))),
        ];
        assert_eq!(pick(&Accepted::linux(&[("amd64", "")]), &index), [4, 3]);
    }
}
