//! The mounts that this process sees (proc(5), /proc/pid/mountinfo).

use std::fs;
use std::path::{Path, PathBuf};

use crate::Error;

const PATH: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountInfo {
    /// Unique among the mounts that there are.
    pub id: u64,
    pub point: PathBuf,
    /// It passes events on (`shared:`).
    pub shared: bool,
    /// It takes events from another (`master:`).
    pub slave: bool,
}

/// All mounts; later ones cover earlier ones at the same point. Asks no file system, so that one
/// that hangs holds up nobody.
pub(crate) fn read() -> Result<Vec<MountInfo>, Error> {
    let text = fs::read(PATH).map_err(|error| Error::io("read mounts", Path::new(PATH), &error))?;
    // Somebody's mount point may be no text.
    Ok(parse(&String::from_utf8_lossy(&text)))
}

pub(crate) fn parse(table: &str) -> Vec<MountInfo> {
    let mounts = table.lines().filter_map(|line| {
        let (head, _) = line.split_once(" - ")?;
        let mut fields = head.split(' ');
        let id = fields.next()?.parse().ok()?;
        let point = fields.nth(3).map(|field| PathBuf::from(unescape(field)))?;
        let optional: Vec<_> = fields.skip(1).collect();
        let has = |tag| optional.iter().any(|field| field.starts_with(tag));
        Some(MountInfo {
            id,
            point,
            shared: has("shared:"),
            slave: has("master:"),
        })
    });
    mounts.collect()
}

/// The mount that holds `path`, whose links are resolved.
pub(crate) fn holding<'a>(mounts: &'a [MountInfo], path: &Path) -> Option<&'a MountInfo> {
    let above = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    // The last of those that are equally deep.
    above.max_by_key(|mount| mount.point.as_os_str().len())
}

/// Space, tab, newline and backslash are written as three octal digits.
pub(crate) fn unescape(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (code, plain)| {
            text.replace(code, plain)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_held_by_the_deepest_and_last_mount_above_it() {
        let mounts = parse(
            "\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:25 / /run rw - tmpfs tmpfs rw
30 22 0:25 / /run rw shared:5 - tmpfs tmpfs rw
31 30 0:26 / /run/with\\040space rw shared:7 master:6 - tmpfs tmpfs rw
",
        );
        for (path, point, shared, slave) in [
            ("/etc", "/", false, false),
            ("/run/x", "/run", true, false),
            ("/run/with space/x", "/run/with space", true, true),
            ("/running", "/", false, false),
        ] {
            let held = holding(&mounts, Path::new(path)).unwrap();
            assert_eq!(held.point, Path::new(point), "{path}");
            assert_eq!((held.shared, held.slave), (shared, slave), "{path}");
        }
        assert_eq!(holding(&[], Path::new("/")), None);
    }
}
