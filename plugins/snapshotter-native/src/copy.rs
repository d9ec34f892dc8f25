//! Copying a tree, with the owners and labels that it is to have.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use gantry_ports::Error;
use gantry_ports::snapshotter::{Owner, UserNamespace};
use gantry_sys::fs::open_root;
use gantry_sys::tree::Dress;

/// Where SELinux keeps a file's context (selinux(8)).
const CONTEXT: &str = "security.selinux";

/// Copies the tree `from` into the empty directory `to`.
pub fn tree(from: &Path, to: &Path, owner: Owner<'_>) -> Result<(), Error> {
    // The value on disk ends in NUL.
    let label = owner.label.map(|label| [label.as_bytes(), b"\0"].concat());
    let user = owner.user_namespace.map(|ids| -> Result<_, Error> {
        Ok(User {
            ids,
            nobody: (overflow("overflowuid")?, overflow("overflowgid")?),
        })
    });
    let rules = Rules {
        user: user.transpose()?,
        label: label.as_deref(),
    };
    let copy = || -> io::Result<()> {
        let (from, to) = (open_root(from)?, open_root(to)?);
        gantry_sys::tree::copy(&from, &to, rules)
    };
    copy().map_err(|e| {
        let (from, to) = (from.display(), to.display());
        Error::io(format_args!("copy {from} to {to}"), e)
    })
}

/// The id that the kernel shows for one that is not mapped (proc_sys_kernel(5)). Files of such an
/// owner are nobody's in the pod, as they are through an id-mapped mount; under the number that the
/// image gives they would be a user's of the host, set-id bits and all.
fn overflow(name: &str) -> Result<u32, Error> {
    let path = Path::new("/proc/sys/kernel").join(name);
    let read = || -> io::Result<u32> {
        let text = std::fs::read_to_string(&path)?;
        text.trim().parse().map_err(io::Error::other)
    };
    read().map_err(|e| Error::io(format_args!("read {}", path.display()), e))
}

#[derive(Clone, Copy)]
struct User<'a> {
    ids: UserNamespace<'a>,
    /// Uid and gid of what belongs to nobody inside.
    nobody: (u32, u32),
}

impl User<'_> {
    fn uid(&self, inside: u32) -> u32 {
        self.ids.uids.outside(inside).unwrap_or(self.nobody.0)
    }

    fn gid(&self, inside: u32) -> u32 {
        self.ids.gids.outside(inside).unwrap_or(self.nobody.1)
    }
}

struct Rules<'a> {
    user: Option<User<'a>>,
    label: Option<&'a [u8]>,
}

impl Dress for Rules<'_> {
    fn keeps(&self, attribute: &OsStr) -> bool {
        attribute != CONTEXT
    }

    fn owner(&self, uid: u32, gid: u32) -> (u32, u32) {
        match self.user {
            Some(user) => (user.uid(uid), user.gid(gid)),
            None => (uid, gid),
        }
    }

    fn value(&self, attribute: &OsStr, value: Vec<u8>) -> Vec<u8> {
        match self.user {
            Some(user) if attribute.as_bytes().starts_with(b"system.posix_acl_") => {
                shift_acl(value, user)
            }
            _ => value,
        }
    }

    fn label(&self) -> Option<(&OsStr, &[u8])> {
        self.label.map(|label| (OsStr::new(CONTEXT), label))
    }
}

/// The named users and groups of an access control list, as the kernel takes it: four bytes of
/// version, then for each entry tag and permissions of two bytes and an id of four, all little
/// endian (include/uapi/linux/posix_acl_xattr.h).
fn shift_acl(mut acl: Vec<u8>, user: User<'_>) -> Vec<u8> {
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    for entry in acl.get_mut(4..).unwrap_or_default().chunks_exact_mut(8) {
        let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        let outside = match u16::from_le_bytes([entry[0], entry[1]]) {
            USER => user.uid(id),
            GROUP => user.gid(id),
            _ => continue,
        };
        entry[4..].copy_from_slice(&outside.to_le_bytes());
    }
    acl
}

#[cfg(test)]
mod tests {
    use gantry_ports::snapshotter::Ids;

    use super::*;

    #[test]
    fn named_users_of_an_acl_are_those_of_the_user_namespace() {
        let entry = |tag: u16, id: u32| {
            let mut bytes = tag.to_le_bytes().to_vec();
            bytes.extend(7_u16.to_le_bytes());
            bytes.extend(id.to_le_bytes());
            bytes
        };
        let acl = |entries: &[(u16, u32)]| {
            let mut bytes = 2_u32.to_le_bytes().to_vec();
            bytes.extend(entries.iter().flat_map(|&(tag, id)| entry(tag, id)));
            bytes
        };
        let ids = UserNamespace {
            path: Path::new("/"),
            uids: Ids {
                first: 100_000,
                length: 1000,
            },
            gids: Ids {
                first: 200_000,
                length: 1000,
            },
        };
        let nobody = (65_534, 65_533);
        let user = User { ids, nobody };
        let undefined = u32::MAX;
        let of = [
            (1, undefined),
            (2, 33),
            (2, 5000),
            (8, 44),
            (8, 1000),
            (32, undefined),
        ];
        let is = [
            (1, undefined),
            (2, 100_033),
            (2, nobody.0),
            (8, 200_044),
            (8, nobody.1),
            (32, undefined),
        ];
        assert_eq!(shift_acl(acl(&of), user), acl(&is));
        let torn = vec![2, 0, 0, 0, 2, 0];
        assert_eq!(shift_acl(torn.clone(), user), torn);
    }
}
