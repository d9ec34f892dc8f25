//! Paths inside a container, cleaned by text alone: nothing here may follow a link.

use std::path::{Component, Path, PathBuf};

/// Resolves `.` and `..` in an absolute path; `..` at the root stays there. `None` for a relative
/// path and for one with a NUL byte.
pub(crate) fn clean(path: &Path) -> Option<PathBuf> {
    if !path.is_absolute() || path.as_os_str().as_encoded_bytes().contains(&0) {
        return None;
    }
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::Normal(part) => cleaned.push(part),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Some(cleaned)
}

/// The path is, or is below, a directory of open files of some process: `/proc/PID/fd` and its
/// like. As working directory it would be a file of the runtime's (CVE-2024-21626).
pub(crate) fn is_open_file(path: &Path) -> bool {
    let mut parts = path.iter().skip(1).filter_map(|part| part.to_str());
    match parts.next() {
        Some("dev") => parts.next() == Some("fd"),
        Some("proc") => parts.skip(1).any(|part| part == "fd"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_by_text() {
        for (path, cleaned) in [
            ("/", "/"),
            ("//a//b/", "/a/b"),
            ("/a/./b/../c", "/a/c"),
            ("/../../etc", "/etc"),
            ("/..", "/"),
        ] {
            assert_eq!(clean(Path::new(path)).unwrap(), Path::new(cleaned));
        }
        assert_eq!(clean(Path::new("a/b")), None);
        assert_eq!(clean(Path::new("")), None);
        assert_eq!(clean(Path::new("/a\0b")), None);
    }

    #[test]
    fn open_files_are_told_apart() {
        for path in [
            "/proc/self/fd/7",
            "/proc/self/fd",
            "/proc/1/task/1/fd/3",
            "/proc/thread-self/fd/9",
            "/dev/fd/3",
        ] {
            assert!(is_open_file(Path::new(path)), "{path}");
        }
        for path in [
            "/",
            "/proc",
            "/proc/self",
            "/srv/proc/self/fd",
            "/dev/shm",
            "/home/fd",
        ] {
            assert!(!is_open_file(Path::new(path)), "{path}");
        }
    }
}
