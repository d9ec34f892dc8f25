//! Files out of Debian packages, read without installing them.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Longest chain of symbolic links that is followed.
const LINKS: usize = 8;

/// Packages that were downloaded into one directory as `NAME_VERSION_ARCHITECTURE.deb`.
pub struct Packages {
    dir: PathBuf,
    read: HashMap<String, Package>,
}

/// What one package holds, by path without a leading slash.
#[derive(Default)]
struct Package {
    files: HashMap<PathBuf, Vec<u8>>,
    links: HashMap<PathBuf, PathBuf>,
}

impl Packages {
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            read: HashMap::new(),
        }
    }

    /// The content of the first of `paths` that any of the packages `names` has, links followed.
    /// Several names are those that one package has had in different releases of Debian.
    pub fn file(&mut self, names: &[&str], paths: &[&str]) -> Result<Vec<u8>> {
        let archive = names
            .iter()
            .find_map(|name| Some((*name, self.find(name)?)));
        let Some((name, archive)) = archive else {
            anyhow::bail!(
                "no package {} in {}",
                names.join(" or "),
                self.dir.display()
            );
        };
        if !self.read.contains_key(name) {
            let package = Package::read(&archive)
                .with_context(|| format!("read package {}", archive.display()))?;
            self.read.insert(name.to_owned(), package);
        }
        let found = paths.iter().find_map(|path| self.read[name].get(path));
        found
            .map(<[u8]>::to_vec)
            .with_context(|| format!("package {name} has none of {}", paths.join(", ")))
    }

    /// The archive of a package; of several versions the last by name.
    fn find(&self, name: &str) -> Option<PathBuf> {
        let mut found: Vec<_> = std::fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                let file = path.file_name().unwrap_or_default().to_string_lossy();
                file.strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with('_') && rest.ends_with(".deb"))
            })
            .collect();
        found.sort();
        found.pop()
    }
}

impl Package {
    fn read(archive: &Path) -> Result<Self> {
        let mut dpkg = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(archive)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("run dpkg-deb")?;
        let output = dpkg.stdout.take().context("output of dpkg-deb")?;
        let mut package = Self::default();
        let mut tar = tar::Archive::new(output);
        for entry in tar.entries()? {
            let mut entry = entry?;
            let path = normal(&entry.path()?);
            match entry.header().entry_type() {
                tar::EntryType::Regular => {
                    let mut data = Vec::new();
                    entry.read_to_end(&mut data)?;
                    package.files.insert(path, data);
                }
                tar::EntryType::Symlink => {
                    let target = entry.link_name()?.context("a link without a target")?;
                    let beside = path.parent().unwrap_or(Path::new(""));
                    package
                        .links
                        .insert(path.clone(), normal(&beside.join(target)));
                }
                _ => {}
            }
        }
        let status = dpkg.wait()?;
        ensure!(status.success(), "dpkg-deb: {status}");
        Ok(package)
    }

    fn get(&self, path: &str) -> Option<&[u8]> {
        let mut path = Path::new(path);
        for _ in 0..LINKS {
            match self.links.get(path) {
                Some(target) => path = target,
                None => break,
            }
        }
        self.files.get(path).map(Vec::as_slice)
    }
}

/// The path with `.`, `..` and a leading slash resolved by their names alone.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => {
                normal.pop();
            }
            Component::RootDir => normal.clear(),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_packages_are_followed_through_links() {
        assert_eq!(
            normal(Path::new("./usr/lib/../bin/x")),
            Path::new("usr/bin/x")
        );
        assert_eq!(
            normal(Path::new("usr/lib//usr/x")),
            Path::new("usr/lib/usr/x")
        );
        assert_eq!(normal(Path::new("/etc/x")), Path::new("etc/x"));
        let mut package = Package::default();
        package.files.insert("lib/libc.so".into(), b"libc".to_vec());
        package
            .links
            .insert("lib/libc.so.6".into(), "lib/libc.so".into());
        package.links.insert("a".into(), "b".into());
        package.links.insert("b".into(), "a".into());
        assert_eq!(package.get("lib/libc.so.6"), Some(&b"libc"[..]));
        assert_eq!(package.get("a"), None);
        assert_eq!(package.get("lib"), None);
    }
}
