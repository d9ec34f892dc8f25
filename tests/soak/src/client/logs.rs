//! Logs of containers, moved aside now and then as a kubelet does.

use std::path::{Path, PathBuf};

use gantry_integration::log;

use super::Client;
use crate::history::Run;

impl Client {
    /// All that was ever written to the log of a container, and what it must be.
    pub(super) fn check_log(&mut self, at: usize, n: usize) -> Run<()> {
        let (path, lost) = (self.log_path(at, n), self.is_lost(at));
        let held = self.held(at, n);
        let mut text = String::new();
        for turn in 1..=held.rotated {
            let aside = PathBuf::from(format!("{}.{turn}", path.display()));
            text.push_str(&log::text(&log::read(&aside), "stdout"));
        }
        text.push_str(&log::text(&log::read(&path), "stdout"));
        let seen = held.model.observe_log(&text, lost);
        let about = path.display().to_string();
        self.actor.expect(&about, seen)
    }

    /// Removes what an earlier container of that name has written.
    pub(super) fn forget_log(&mut self, at: usize, n: usize) {
        let path = self.log_path(at, n);
        let held = self.held(at, n);
        let aside = (1..=held.rotated).map(|turn| format!("{}.{turn}", path.display()).into());
        for path in aside.chain([path.clone()]) {
            // It may not have come to write anything.
            let _ = std::fs::remove_file(path);
        }
        held.rotated = 0;
    }

    pub(super) fn log_path(&self, at: usize, n: usize) -> PathBuf {
        let slot = &self.slots[at];
        Path::new(&slot.config.log_directory).join(&slot.containers[n].config.log_path)
    }
}
