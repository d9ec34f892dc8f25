//! Taking all files of an archive into the content store, before anything is known about them:
//! the file that says what they are may be the last.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use gantry_types::Digest;

use crate::content::Content;
use crate::document::DOCUMENT_MAX;
use crate::lease::Lease;
use crate::tar::{self, Kind};
use crate::{Error, Expansion, Result, decompress};

/// Most files of an archive; an image has at most some hundred.
const FILES_MAX: usize = 100_000;
/// Most links that are followed for one file.
const LINKS_MAX: usize = 8;
/// Longest path, as PATH_MAX of Linux.
const NAME_MAX: usize = 4096;
/// Deepest directory below an image layout.
const DEPTH_MAX: usize = 8;

/// The files of an archive by their path, as blobs.
pub struct Files {
    content: Content,
    lease: Lease,
    blobs: HashMap<String, (Digest, u64)>,
    links: HashMap<String, String>,
    /// Files and links that were met, also under names that came before.
    entries: usize,
    /// Blobs that were written on behalf of the archive.
    made: Vec<Digest>,
}

impl Files {
    pub fn new(content: Content, lease: Lease) -> Self {
        Self {
            content,
            lease,
            blobs: HashMap::new(),
            links: HashMap::new(),
            entries: 0,
            made: Vec::new(),
        }
    }

    /// Digests of all files, for whoever clears up.
    pub fn digests(&self) -> Vec<Digest> {
        let files = self.blobs.values().map(|(digest, _)| digest);
        files.chain(&self.made).cloned().collect()
    }

    /// Stores what the archive should have had.
    pub fn make(&mut self, bytes: &[u8]) -> Result<Digest> {
        // Held first: another import may be about to drop the same bytes.
        let digest = crate::hash::sha256(bytes);
        self.lease.hold([&digest]);
        self.content.put(bytes)?;
        self.made.push(digest.clone());
        Ok(digest)
    }

    pub fn into_lease(self) -> Lease {
        self.lease
    }

    /// Reads a tar stream, compressed or not.
    pub fn read_tar(&mut self, stream: impl Read) -> Result<()> {
        let fail = |e| unreadable("image archive", e);
        let bounds = Expansion {
            bytes: 1 << 42,
            ratio: 1024,
            floor: 1 << 30,
        };
        let mut reader = tar::Reader::new(decompress::open(stream, bounds).map_err(fail)?);
        while let Some(entry) = reader.next().map_err(fail)? {
            let path = clean(&entry.path)?;
            match entry.kind {
                Kind::File if entry.sparse.is_none() => self.take(path, &mut reader)?,
                Kind::Symlink => {
                    // docker used to write a layer that it had written before as a link to it.
                    let link = String::from_utf8_lossy(&entry.link).into_owned();
                    check_length(link.as_bytes())?;
                    let target = beside(&path, &link);
                    self.links.extend(target.map(|target| (path, target)));
                }
                Kind::Hardlink => {
                    self.links.insert(path, clean(&entry.link)?);
                }
                _ => {}
            }
            self.count()?;
        }
        if self.blobs.is_empty() {
            return Err(Error::invalid("image archive", "it is empty"));
        }
        Ok(())
    }

    /// Reads a directory; links in it are not followed.
    pub fn read_dir(&mut self, root: &Path) -> Result<()> {
        let mut pending = vec![(root.to_owned(), String::new(), 0)];
        while let Some((dir, prefix, depth)) = pending.pop() {
            let fail = |e| Error::io(format_args!("read {}", dir.display()), e);
            for entry in std::fs::read_dir(&dir).map_err(fail)? {
                let entry = entry.map_err(fail)?;
                let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
                let kind = entry.file_type().map_err(fail)?;
                if kind.is_dir() && depth < DEPTH_MAX {
                    pending.push((entry.path(), format!("{path}/"), depth + 1));
                } else if kind.is_file() {
                    let mut file = File::open(entry.path()).map_err(fail)?;
                    self.take(path, &mut file)?;
                }
                self.count()?;
            }
        }
        Ok(())
    }

    fn count(&mut self) -> Result<()> {
        self.entries += 1;
        if self.entries > FILES_MAX {
            let what = "image archive".to_owned();
            return Err(Error::Limit {
                what,
                limit: FILES_MAX as u64,
                unit: "files",
            });
        }
        Ok(())
    }

    fn take(&mut self, path: String, data: &mut dyn Read) -> Result<()> {
        let said = blob_name(&path);
        let mut ingest = match &said {
            Some(digest) => self.content.ingest(digest)?,
            None => self
                .content
                .ingest_by(gantry_types::digest::Algorithm::Sha256)?,
        };
        let mut buffer = vec![0; 128 * 1024];
        loop {
            match data.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => ingest.write(&buffer[..n])?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(unreadable(format_args!("image archive: {path}"), e)),
            }
        }
        let found = match said {
            Some(digest) => {
                let size = ingest.written();
                self.lease.hold([&digest]);
                let finished = ingest.finish(&digest, size);
                finished.map_err(super::import::of_archive)?;
                (digest, size)
            }
            None => {
                let lease = &mut self.lease;
                ingest.finish_as_found(|digest| lease.hold([digest]))?
            }
        };
        // A name that comes twice means the later one, as tar has it.
        if let Some((former, _)) = self.blobs.insert(path, found) {
            self.made.push(former);
        }
        Ok(())
    }

    /// The blob behind a name of the archive.
    pub fn find(&self, name: &str) -> Option<&(Digest, u64)> {
        let mut name = clean(name.as_bytes()).ok()?;
        for _ in 0..=LINKS_MAX {
            if let Some(found) = self.blobs.get(&name) {
                return Some(found);
            }
            name = self.links.get(&name)?.clone();
        }
        None
    }

    /// A small file whole.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match self.find(name) {
            Some((digest, _)) => self.content.read(digest, DOCUMENT_MAX),
            None => Ok(None),
        }
    }
}

/// What is wrong with the archive is not an error of this node.
fn unreadable(what: impl std::fmt::Display, error: io::Error) -> Error {
    use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    match error.kind() {
        InvalidData | InvalidInput | UnexpectedEof => Error::invalid(what, error),
        _ => Error::io(what, error),
    }
}

fn check_length(path: &[u8]) -> Result<()> {
    if path.len() > NAME_MAX {
        let what = "image archive: a path".to_owned();
        return Err(Error::Limit {
            what,
            limit: NAME_MAX as u64,
            unit: "bytes",
        });
    }
    Ok(())
}

/// `blobs/<algorithm>/<hex>` of an image layout names what it must hold.
fn blob_name(path: &str) -> Option<Digest> {
    let (algorithm, hex) = path.strip_prefix("blobs/")?.split_once('/')?;
    format!("{algorithm}:{hex}").parse().ok()
}

fn clean(path: &[u8]) -> Result<String> {
    check_length(path)?;
    let text = String::from_utf8_lossy(path);
    let parts: Vec<&str> = text
        .split('/')
        .filter(|part| !matches!(*part, "" | "."))
        .collect();
    if parts.contains(&"..") {
        return Err(Error::invalid(
            format_args!(
                "image archive: {:?}",
                text.chars().take(256).collect::<String>()
            ),
            "the path has a `..` in it",
        ));
    }
    Ok(parts.join("/"))
}

/// Where a link in the archive leads; `None` if out of it.
fn beside(path: &str, link: &str) -> Option<String> {
    let mut parts: Vec<&str> = match link.starts_with('/') {
        true => return None,
        false => path.split('/').collect(),
    };
    parts.pop();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_in_the_archive() {
        assert_eq!(
            beside("b/layer.tar", "../a/layer.tar").as_deref(),
            Some("a/layer.tar")
        );
        assert_eq!(beside("b/layer.tar", "x").as_deref(), Some("b/x"));
        assert_eq!(beside("b/layer.tar", "../../etc/passwd"), None);
        assert_eq!(beside("b/layer.tar", "/etc/passwd"), None);
        assert!(clean(b"a/../b").is_err());
        assert_eq!(clean(b"./a//b").unwrap(), "a/b");
        assert!(clean(&[b'a'; NAME_MAX]).is_ok() && clean(&[b'a'; NAME_MAX + 1]).is_err());
    }
}
