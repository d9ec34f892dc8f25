//! Image references: `[host[:port]/]path[:tag][@digest]`, normalised as Docker does it (grammar:
//! distribution/reference).

use std::fmt;
use std::str::FromStr;

use gantry_types::Digest;

use crate::Error;

/// Host that a name without one belongs to.
pub const DEFAULT_HOST: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";
/// Longest name (host and path), by the grammar.
const NAME_MAX: usize = 255;
const TAG_MAX: usize = 128;

/// A normalised reference: the host is always there, and at least one of tag and digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    host: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Registry, with port if one was given: `docker.io`, `localhost:5000`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Repository on that registry: `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Host and path: `docker.io/library/busybox`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.path)
    }

    /// The name by tag; `None` if a digest is given, because then the tag does not matter.
    pub fn tagged(&self) -> Option<String> {
        match (&self.tag, &self.digest) {
            (Some(tag), None) => Some(format!("{}:{tag}", self.name())),
            _ => None,
        }
    }

    /// The name by `digest`.
    pub fn with_digest(&self, digest: &Digest) -> String {
        format!("{}@{digest}", self.name())
    }
}

/// The canonical text. With a digest the tag is left out: it was not looked at.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)?;
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "@{digest}"),
            (None, Some(tag)) => write!(f, ":{tag}"),
            (None, None) => Ok(()),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map_err(|reason| Error::Reference {
            reference: text.chars().take(300).collect(),
            reason: reason.to_owned(),
        })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            let digest = digest
                .parse::<Digest>()
                .map_err(|_| "the digest is not sha256:<64 hex digits> or sha512:<128>")?;
            (rest, Some(digest))
        }
        None => (text, None),
    };
    // A colon after the last slash starts a tag; before it, a port.
    let (name, tag) = match rest.rfind(':') {
        Some(colon) if !rest[colon..].contains('/') => (&rest[..colon], Some(&rest[colon + 1..])),
        _ => (rest, None),
    };
    if name.len() == 64
        && name
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    {
        return Err("64 hexadecimal digits are an image id, not a name");
    }
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (host, path) = match name.split_once('/') {
        Some((first, path)) if is_host(first) => (first, path.to_owned()),
        _ => (DEFAULT_HOST, name.to_owned()),
    };
    let host = if host == "index.docker.io" {
        DEFAULT_HOST
    } else {
        host
    };
    let path = if host == DEFAULT_HOST && !path.contains('/') {
        format!("library/{path}")
    } else {
        path
    };
    check_host(host)?;
    check_path(&path)?;
    if host.len() + 1 + path.len() > NAME_MAX {
        return Err("the name is longer than 255 characters");
    }
    let tag = match (tag, &digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, None) => Some(DEFAULT_TAG.to_owned()),
        (None, Some(_)) => None,
    };
    Ok(Reference {
        host: host.to_owned(),
        path,
        tag,
        digest,
    })
}

/// Whether the first component is a host and not the first directory of a path.
fn is_host(first: &str) -> bool {
    first.contains(['.', ':'])
        || first == "localhost"
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn check_host(host: &str) -> Result<(), &'static str> {
    let bad = Err("the host is not a DNS name or address with an optional port");
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) if address.parse::<std::net::Ipv6Addr>().is_ok() => (
                "v6",
                port.strip_prefix(':')
                    .or((!port.is_empty()).then_some("bad")),
            ),
            _ => return bad,
        },
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if !name.split('.').all(label) {
        return bad;
    }
    match port {
        None => Ok(()),
        Some(port)
            if port.bytes().all(|b| b.is_ascii_digit())
                && port.parse::<u16>().is_ok_and(|port| port > 0) =>
        {
            Ok(())
        }
        Some(_) => bad,
    }
}

/// Components of lower-case letters and digits, joined inside by `.`, `_`, `__` or dashes.
fn check_path(path: &str) -> Result<(), &'static str> {
    let alnum = |b: u8| b.is_ascii_digit() || b.is_ascii_lowercase();
    for component in path.split('/') {
        let bytes = component.as_bytes();
        let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
            return Err("the name has an empty component");
        };
        if bytes.iter().any(u8::is_ascii_uppercase) {
            return Err("the repository name must be lower case");
        }
        if !alnum(first) || !alnum(last) {
            return Err("a name's component must start and end with a letter or digit");
        }
        let separators = component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        for separator in separators.filter(|s| !s.is_empty()) {
            if !matches!(separator, "." | "_" | "__") && !separator.bytes().all(|b| b == b'-') {
                return Err("the name has characters that are not allowed");
            }
        }
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = tag.as_bytes();
    let good = !bytes.is_empty()
        && bytes.len() <= TAG_MAX
        && word(bytes[0])
        && bytes.iter().all(|&b| word(b) || b == b'.' || b == b'-');
    if good {
        Ok(())
    } else {
        Err("the tag is not [A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_types::{ErrorKind, Kind};

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_normalised() {
        for (text, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            (
                "index.docker.io/library/busybox",
                "docker.io/library/busybox:latest",
            ),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:v1", "localhost:5000/app:v1"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            (
                "registry.k8s.io/e2e-test-images/agnhost:2.53",
                "registry.k8s.io/e2e-test-images/agnhost:2.53",
            ),
            ("a/b__c/d-e--f.g_h", "docker.io/a/b__c/d-e--f.g_h:latest"),
        ] {
            assert_eq!(
                text.parse::<Reference>().unwrap().to_string(),
                full,
                "{text}"
            );
        }
    }

    #[test]
    fn with_a_digest_the_tag_does_not_count() {
        let both: Reference = format!("busybox:1.36@sha256:{HEX}").parse().unwrap();
        assert_eq!(
            both.to_string(),
            format!("docker.io/library/busybox@sha256:{HEX}")
        );
        assert_eq!((both.tag(), both.tagged()), (Some("1.36"), None));
        let bare: Reference = format!("busybox@sha256:{HEX}").parse().unwrap();
        assert_eq!(bare.tag(), None);
    }

    #[test]
    fn what_is_no_reference_is_refused_by_name() {
        for bad in [
            "",
            ":tag",
            "/busybox",
            "a//b",
            "upper/Case",
            "host.io/Upper",
            "busybox:",
            "busybox:-x",
            "busybox:a/b:c:",
            "busybox@sha256:abc",
            "busybox@md5:d41d8cd98f00b204e9800998ecf8427e",
            "a/../b",
            "../../etc/passwd",
            "host:port/app",
            "host:0/app",
            "host:99999/app",
            "http://host/app",
            "a b",
            "user@host/app",
            "app\0x",
            "-a.io/app",
            "a___b",
            HEX,
            &"a/".repeat(200),
        ] {
            let error = bad.parse::<Reference>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{bad}");
            assert!(error.to_string().contains("image reference"), "{error}");
        }
    }
}
