//! The images by id and by name, as one immutable value that readers share.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::image::Image;
use crate::reference::Reference;
use crate::{Error, Result};

/// Shortest prefix of an id that finds an image; crictl shows thirteen digits.
const PREFIX_MIN: usize = 5;

#[derive(Clone, Debug, Default)]
pub struct Catalog {
    by_id: BTreeMap<String, Arc<Image>>,
    by_name: HashMap<String, String>,
}

impl Catalog {
    pub fn images(&self) -> impl Iterator<Item = &Arc<Image>> {
        self.by_id.values()
    }

    pub fn get(&self, id: &str) -> Option<&Arc<Image>> {
        self.by_id.get(id)
    }

    /// Puts an image in place of the one with its id. Names move to it from images that had them.
    /// Returns the ids of those that lost one.
    pub fn insert(&mut self, image: Image) -> Vec<String> {
        let mut losers = Vec::new();
        for name in image.tags.iter().chain(&image.digests) {
            let Some(owner) = self.by_name.insert(name.clone(), image.id.clone()) else {
                continue;
            };
            if owner != image.id
                && let Some(old) = self.by_id.get_mut(&owner)
            {
                let old = Arc::make_mut(old);
                old.tags.retain(|tag| tag != name);
                old.digests.retain(|digest| digest != name);
                if !losers.contains(&owner) {
                    losers.push(owner);
                }
            }
        }
        if let Some(old) = self.by_id.get(&image.id) {
            for name in old.tags.iter().chain(&old.digests) {
                if !image.tags.contains(name) && !image.digests.contains(name) {
                    self.by_name.remove(name);
                }
            }
        }
        self.by_id.insert(image.id.clone(), Arc::new(image));
        losers
    }

    pub fn remove(&mut self, id: &str) -> Option<Arc<Image>> {
        let image = self.by_id.remove(id)?;
        for name in image.tags.iter().chain(&image.digests) {
            self.by_name.remove(name);
        }
        Some(image)
    }

    /// The image that `name` means: an id with or without `sha256:`, a unique prefix of one, or a
    /// reference in full or short.
    pub fn find(&self, name: &str) -> Result<Option<Arc<Image>>> {
        let named = |name: &str| {
            self.by_name
                .get(name)
                .and_then(|id| self.by_id.get(id))
                .cloned()
        };
        if let Some(image) = self.by_id.get(name).cloned().or_else(|| named(name)) {
            return Ok(Some(image));
        }
        let hex = name.strip_prefix("sha256:").unwrap_or(name);
        let is_hex = hex
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if let Some(image) = self.by_id.get(&format!("sha256:{hex}")) {
            return Ok(Some(image.clone()));
        }
        // A name of hexadecimal letters is a name first.
        let by_name = name
            .parse::<Reference>()
            .map(|reference| named(&reference.to_string()));
        if let Ok(Some(image)) = by_name {
            return Ok(Some(image));
        }
        if is_hex && hex.len() >= PREFIX_MIN {
            return self.by_prefix(&format!("sha256:{hex}"));
        }
        // `sha256:beef` would read as a repository with a tag.
        if name.starts_with("sha256:") {
            Ok(None)
        } else {
            by_name.map(|_| None)
        }
    }

    fn by_prefix(&self, prefix: &str) -> Result<Option<Arc<Image>>> {
        let mut found = self
            .by_id
            .range(prefix.to_owned()..)
            .map(|(_, image)| image)
            .take_while(|image| image.id.starts_with(prefix));
        match (found.next(), found.next()) {
            (Some(_), Some(_)) => Err(Error::Reference {
                reference: prefix.to_owned(),
                reason: "it is the beginning of more than one image id".to_owned(),
            }),
            (one, _) => Ok(one.cloned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::tests::image;
    use gantry_types::{Digest, ErrorKind, Kind};

    const BUSYBOX: &str = "docker.io/library/busybox:latest";

    #[test]
    fn an_image_is_found_under_everything_it_is_called() {
        let by_digest = format!("docker.io/library/busybox@{}", Digest::sha256([9; 32]));
        let mut catalog = Catalog::default();
        catalog.insert(image(0xab, &[BUSYBOX], &[&by_digest]));
        catalog.insert(image(0xcd, &["r.io/abab:1"], &[]));
        let id = Digest::sha256([0xab; 32]).to_string();
        let hex = id.strip_prefix("sha256:").unwrap();
        let short_digest = by_digest.strip_prefix("docker.io/library/").unwrap();
        for name in [
            &id,
            hex,
            "ababa",
            "abababababab",
            "sha256:ababab",
            BUSYBOX,
            "busybox",
            "busybox:latest",
            "docker.io/busybox",
            &by_digest,
            short_digest,
        ] {
            assert_eq!(catalog.find(name).unwrap().expect(name).id, id);
        }
        for name in [
            "abab",
            "busybox:1",
            "other",
            "sha256:cdab",
            &Digest::sha256([9; 32]).to_string(),
        ] {
            assert!(catalog.find(name).unwrap().is_none(), "{name}");
        }
        assert_eq!(
            catalog.find("UPPER").unwrap_err().kind(),
            ErrorKind::InvalidArgument
        );
        assert_eq!(
            catalog.find("").unwrap_err().kind(),
            ErrorKind::InvalidArgument
        );
    }

    #[test]
    fn an_ambiguous_prefix_is_an_error_and_a_name_goes_before_it() {
        let mut catalog = Catalog::default();
        let mut twin = image(0xab, &[], &[]);
        twin.id.replace_range(70.., "0");
        catalog.insert(twin);
        catalog.insert(image(0xab, &[], &[]));
        assert!(catalog.find("ababab").is_err());
        catalog.insert(image(0xcd, &["docker.io/library/ababab:latest"], &[]));
        assert_eq!(
            catalog.find("ababab").unwrap().unwrap().id,
            Digest::sha256([0xcd; 32]).as_str()
        );
    }

    #[test]
    fn a_tag_moves_and_its_old_image_stays() {
        let mut catalog = Catalog::default();
        let old = image(1, &[BUSYBOX], &["r.io/a@x"]);
        let (old_id, new_id) = (old.id.clone(), image(2, &[], &[]).id);
        catalog.insert(old);
        assert_eq!(
            catalog.insert(image(2, &[BUSYBOX], &[])),
            std::slice::from_ref(&old_id)
        );
        assert_eq!(catalog.find(BUSYBOX).unwrap().unwrap().id, new_id);
        assert!(catalog.get(&old_id).unwrap().tags.is_empty());
        assert_eq!(catalog.get(&old_id).unwrap().digests, ["r.io/a@x"]);
        catalog.remove(&new_id);
        assert!(catalog.find(BUSYBOX).unwrap().is_none());
    }
}
