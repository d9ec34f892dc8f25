//! The end of a pull that has failed, or that nobody waits for any more.

use std::sync::Arc;

use tokio::sync::watch;

use crate::Error;

/// Told once, seen by every part of a pull. Cheap to clone.
///
/// Work is told to end and then waited for, never dropped: a thread that writes would outlive its
/// task.
#[derive(Clone, Debug)]
pub struct Cancel(Arc<watch::Sender<bool>>);

impl Default for Cancel {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

impl Cancel {
    pub fn cancel(&self) {
        self.0.send_replace(true);
    }

    pub fn is_cancelled(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns once [`Cancel::cancel`] was called.
    pub async fn cancelled(&self) -> Error {
        // The sender lives as long as `self`.
        let _ = self.0.subscribe().wait_for(|&cancelled| cancelled).await;
        Error::Cancelled
    }

    /// Fails if the work is to end.
    pub fn check(&self) -> Result<(), Error> {
        if self.is_cancelled() {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }
}
