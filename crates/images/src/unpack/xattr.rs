//! Which extended attributes of an image are set.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// `user.*`, POSIX ACLs and file capabilities. Not taken: overlayfs's own attributes, under both
/// names, because they would make the layer lie about what it hides and redirects; the rest of
/// `trusted.*`, which no container can see; labels and signatures of the build host's security
/// modules, which are this node's to give.
pub fn wanted(name: &[u8]) -> bool {
    let system: [&[u8]; 3] = [
        b"security.capability",
        b"system.posix_acl_access",
        b"system.posix_acl_default",
    ];
    if system.contains(&name) {
        return true;
    }
    name.starts_with(b"user.") && !name.starts_with(b"user.overlay.") && !name.contains(&0)
}

/// overlayfs: the directory hides what lies below it (Documentation/filesystems/overlayfs.rst).
pub const OPAQUE: &[u8] = b"trusted.overlay.opaque";

pub fn os(name: &[u8]) -> &OsStr {
    OsStr::from_bytes(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_attributes_and_labels_are_dropped() {
        for name in [
            "user.mime",
            "security.capability",
            "system.posix_acl_access",
        ] {
            assert!(wanted(name.as_bytes()), "{name}");
        }
        for name in [
            "trusted.overlay.opaque",
            "trusted.overlay.redirect",
            "user.overlay.whiteout",
            "trusted.x",
            "security.selinux",
            "security.ima",
            "system.other",
            "",
        ] {
            assert!(!wanted(name.as_bytes()), "{name}");
        }
    }
}
