//! Which runtime it is, as far as command lines differ.

use std::path::Path;

/// A family of OCI runtimes with one command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    Runc,
    Crun,
    Youki,
    /// Anything else: only the commands that every OCI runtime has.
    Other,
}

impl Flavour {
    /// Guesses from the name of the binary (`runc`, `crun-wasm`, `/opt/bin/runc-1.3`): the shim
    /// must not pay a start of the runtime to learn it.
    pub fn of_binary(binary: &Path) -> Self {
        let name = binary
            .file_name()
            .map(|name| name.to_string_lossy())
            .unwrap_or_default();
        Self::of_name(&name)
    }

    fn of_name(name: &str) -> Self {
        if name.contains("youki") {
            Flavour::Youki
        } else if name.contains("crun") {
            Flavour::Crun
        } else if name.contains("runc") {
            Flavour::Runc
        } else {
            Flavour::Other
        }
    }

    /// Whether `run --detach` makes and starts a container in one execution.
    pub fn has_detached_run(self) -> bool {
        match self {
            Flavour::Runc | Flavour::Crun => true,
            Flavour::Youki | Flavour::Other => false,
        }
    }
}

/// What `--version` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    pub flavour: Flavour,
    /// `1.1.5+ds1`.
    pub version: String,
    /// Version of the OCI runtime specification; empty when not told.
    pub spec: String,
}

impl Version {
    /// Parses `NAME version VERSION` and the `key: value` lines after it.
    pub fn parse(output: &str) -> Option<Self> {
        let mut lines = output.lines();
        let mut words = lines.next()?.split_ascii_whitespace();
        let name = words.next()?;
        let version = match words.next()? {
            "version" => words.next()?,
            // A few builds leave the word out.
            version => version,
        };
        let spec = lines
            .filter_map(|line| line.split_once(':'))
            .find_map(|(key, value)| (key.trim() == "spec").then(|| value.trim().to_owned()))
            .unwrap_or_default();
        Some(Self {
            flavour: Flavour::of_name(name),
            version: version.to_owned(),
            spec,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parsed() {
        let runc =
            "runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1+deb12u1\nspec: 1.0.2-dev\ngo: go1.19.8\n";
        let expected = Version {
            flavour: Flavour::Runc,
            version: "1.1.5+ds1".into(),
            spec: "1.0.2-dev".into(),
        };
        assert_eq!(Version::parse(runc), Some(expected));
        let crun = Version::parse("crun version 1.8.1\nspec: 1.0.0\n+SYSTEMD +YAJL\n").unwrap();
        assert_eq!((crun.flavour, crun.spec.as_str()), (Flavour::Crun, "1.0.0"));
        let youki = Version::parse("youki version 0.5.4\ncommit: 0.5.4-0-abc\n").unwrap();
        assert_eq!(
            (youki.flavour, youki.version.as_str()),
            (Flavour::Youki, "0.5.4")
        );
        assert_eq!(Version::parse(""), None);
    }

    #[test]
    fn a_binary_is_known_by_its_name() {
        assert_eq!(
            Flavour::of_binary(Path::new("/usr/sbin/runc")),
            Flavour::Runc
        );
        assert_eq!(Flavour::of_binary(Path::new("/opt/runc-fp")), Flavour::Runc);
        assert_eq!(
            Flavour::of_binary(Path::new("/usr/bin/crun")),
            Flavour::Crun
        );
        assert_eq!(
            Flavour::of_binary(Path::new("/usr/bin/kata-runtime")),
            Flavour::Other
        );
        assert_eq!(Flavour::of_binary(Path::new("/runc/runsc")), Flavour::Other);
    }
}
