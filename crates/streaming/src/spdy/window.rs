//! What may still be sent: a window of SPDY/3.1 flow control.

use std::fmt;

/// Largest window (draft-mbelshe-httpbis-spdy-00, 2.6.8).
const MAX: i64 = 0x7fff_ffff;

/// Window of a stream and of a session before anything is said about it.
pub(super) const INITIAL: i64 = 64 * 1024;

/// Bytes that the peer is ready to take. SETTINGS may make it negative: then that much must be
/// given back before anything is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Window(i64);

/// The peer gave more than 2^31 - 1 bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overflow;

impl Window {
    pub fn new(size: i64) -> Self {
        Self(size)
    }

    pub fn available(self) -> usize {
        usize::try_from(self.0).unwrap_or(0)
    }

    /// Counts what was sent. More than is available is possible: a peer may begin to keep windows
    /// after it was sent to without.
    pub fn spend(&mut self, count: usize) {
        self.0 = self
            .0
            .saturating_sub(i64::try_from(count).unwrap_or(i64::MAX));
    }

    pub fn add(&mut self, delta: i64) -> Result<(), Overflow> {
        let size = self.0.saturating_add(delta);
        if size > MAX {
            return Err(Overflow);
        }
        self.0 = size;
        Ok(())
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_spent_given_back_and_bounded() {
        let mut window = Window::new(INITIAL);
        window.spend(65_536);
        assert_eq!(window.available(), 0);
        window.add(-100).unwrap();
        assert_eq!(window.available(), 0);
        window.add(150).unwrap();
        assert_eq!(window.available(), 50);
        assert_eq!(window.add(MAX), Err(Overflow));
        assert_eq!(window.available(), 50);
        window.add(MAX - 50).unwrap();
        assert_eq!(window.add(1), Err(Overflow));
    }
}
