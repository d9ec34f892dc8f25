//! Deletions as an image layer writes them (OCI image-spec, layer.md, Whiteouts).

/// What an entry's last component says.
#[derive(Debug, PartialEq, Eq)]
pub enum Name<'a> {
    Plain,
    /// `.wh.NAME`: NAME of the layers below is gone.
    Deletes(&'a [u8]),
    /// `.wh..wh..opq`: the directory hides what the layers below have in it.
    Opaque,
    /// Any other `.wh..wh.` name: bookkeeping of the union file system that invented them.
    Metadata,
    /// A whiteout of nothing, of the directory itself or of its parent.
    Bad,
}

const PREFIX: &[u8] = b".wh.";

pub fn read(name: &[u8]) -> Name<'_> {
    match name.strip_prefix(PREFIX) {
        None => Name::Plain,
        Some(b".wh..opq") => Name::Opaque,
        Some(rest) if rest.starts_with(PREFIX) => Name::Metadata,
        Some(b"" | b"." | b"..") => Name::Bad,
        Some(rest) => Name::Deletes(rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        assert_eq!(read(b"passwd"), Name::Plain);
        assert_eq!(read(b".wh.passwd"), Name::Deletes(b"passwd"));
        assert_eq!(read(b".wh..wh..opq"), Name::Opaque);
        assert_eq!(read(b".wh..wh.plnk"), Name::Metadata);
        assert_eq!(read(b".wh.."), Name::Bad);
        assert_eq!(read(b".wh..."), Name::Bad);
        assert_eq!(read(b".wh."), Name::Bad);
        assert_eq!(read(b".wh...."), Name::Deletes(b"..."));
    }
}
