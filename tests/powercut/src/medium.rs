//! What is on a disk after its power was cut.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::disk::{self, Entry, Log};

/// What a disk writes whole or not at all, in bytes: disks have physical sectors of 4 KiB today, and
/// file systems need it of them. The superblocks of ext4 and of its journal, with one checksum each,
/// do not outlive it if one half of them is new.
const SECTOR: u32 = 4096;

/// What of the writes since the last flush has reached the medium. A disk may keep them in its
/// cache for any time and write them in any order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    None,
    All,
    /// Each with this probability.
    Some(f64),
    /// Each sector of each with this probability.
    Torn(f64),
}

impl Fate {
    pub fn any(random: &mut fastrand::Rng) -> Self {
        let probability = [0.1, 0.5, 0.9][random.usize(..3)];
        match random.u8(..6) {
            0 => Fate::None,
            1 => Fate::All,
            2 | 3 => Fate::Some(probability),
            _ => Fate::Torn(probability),
        }
    }
}

/// A disk as it was made, and the log of what was asked of it since; gives what is left of it
/// after cuts, the earlier ones first.
#[derive(Debug)]
pub struct Medium {
    log: Log,
    entries: Vec<Entry>,
    /// With all writes before entry `durable`, which is a flush or the first one.
    file: PathBuf,
    durable: usize,
}

impl Medium {
    /// `file` is the disk as it was at the log's beginning, and is changed.
    pub fn new(log: &Log, file: &Path) -> Self {
        Self {
            log: log.clone(),
            entries: log.entries(),
            file: file.to_owned(),
            durable: 0,
        }
    }

    /// Writes to `to` what is left when the power goes just before entry `cut`, and says how many
    /// writes were at stake. Not for a cut before an earlier one.
    pub fn cut(
        &mut self,
        cut: usize,
        fate: Fate,
        random: &mut fastrand::Rng,
        to: &Path,
    ) -> io::Result<usize> {
        let before = &self.entries[..cut];
        let flushed = before.iter().rposition(|entry| *entry == Entry::Flush);
        if let Some(flushed) = flushed.filter(|flushed| *flushed > self.durable) {
            let file = File::options().write(true).open(&self.file)?;
            for entry in &before[self.durable..flushed] {
                self.write(&file, *entry, |_| true)?;
            }
            self.durable = flushed;
        }
        disk::copy(&self.file, to)?;
        let file = File::options().write(true).open(to)?;
        let mut at_stake = 0;
        for entry in &before[self.durable..] {
            at_stake += usize::from(matches!(entry, Entry::Write { .. }));
            let whole = match fate {
                Fate::None => false,
                Fate::All | Fate::Torn(_) => true,
                Fate::Some(probability) => random.f64() < probability,
            };
            if whole {
                self.write(&file, *entry, |_| match fate {
                    Fate::Torn(probability) => random.f64() < probability,
                    _ => true,
                })?;
            }
        }
        Ok(at_stake)
    }

    /// Does a write, those sectors of it that `wanted` says.
    fn write(
        &self,
        file: &File,
        entry: Entry,
        mut wanted: impl FnMut(u32) -> bool,
    ) -> io::Result<()> {
        let Entry::Write { offset, length, at } = entry else {
            return Ok(());
        };
        let data = self.log.data(at, length)?;
        let mut sectors = 0..length.div_ceil(SECTOR);
        // Runs of sectors, not one call for each.
        while let Some(first) = sectors.find(|sector| wanted(*sector)) {
            let mut end = first + 1;
            let run = sectors.by_ref().take_while(|sector| wanted(*sector));
            end += u32::try_from(run.count()).unwrap_or(u32::MAX);
            let from = first * SECTOR;
            let to = (end * SECTOR).min(length);
            let piece = &data[from as usize..to as usize];
            file.write_all_at(piece, offset + u64::from(from))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = SECTOR as usize;

    /// What is in each sector after a cut at the end, of a disk of eight, one number each.
    fn after(writes: &[(u64, &[u8])], flush_after: usize, fate: Fate, seed: u64) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let (disk, cut) = (dir.path().join("disk"), dir.path().join("cut"));
        std::fs::write(&disk, vec![0; 8 * BLOCK]).unwrap();
        let log = Log::new().unwrap();
        for (number, (sector, content)) in writes.iter().enumerate() {
            if number == flush_after {
                log.flush();
            }
            let data: Vec<u8> = content.iter().flat_map(|byte| [*byte; BLOCK]).collect();
            log.write(sector * u64::from(SECTOR), &data).unwrap();
        }
        let mut medium = Medium::new(&log, &disk);
        let mut random = fastrand::Rng::with_seed(seed);
        medium.cut(log.len(), fate, &mut random, &cut).unwrap();
        std::fs::read(cut)
            .unwrap()
            .iter()
            .step_by(BLOCK)
            .copied()
            .collect()
    }

    #[test]
    fn what_was_flushed_is_there_and_the_rest_is_chance() {
        let writes: [(u64, &[u8]); 3] = [(0, &[1, 2]), (1, &[3, 4, 5, 6]), (7, &[7])];
        assert_eq!(after(&writes, 1, Fate::None, 1), [1, 2, 0, 0, 0, 0, 0, 0]);
        assert_eq!(after(&writes, 3, Fate::All, 1), [1, 3, 4, 5, 6, 0, 0, 7]);
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..64 {
            let some = after(&writes, 1, Fate::Some(0.5), seed);
            // Whole or not at all.
            assert!([[2, 0, 0, 0], [3, 4, 5, 6]].contains(&some[1..5].try_into().unwrap()));
            let torn = after(&writes, 1, Fate::Torn(0.5), seed);
            assert_eq!(torn[0], 1, "flushed");
            for (found, [old, new]) in torn[1..5].iter().zip([[2, 3], [0, 4], [0, 5], [0, 6]]) {
                assert!([old, new].contains(found), "{torn:?}");
            }
            seen.insert(torn);
        }
        assert!(seen.len() > 16, "{seen:?}");
    }
}
