//! What sessions of both kinds share: how they end and how their users are told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::backend::Client;
use crate::server::Limits;

/// Longest that a session waits, at its end, for a client to hang up that has been sent everything.
pub(crate) const LINGER: Duration = Duration::from_secs(5);

/// How often a session that ends looks what has reached the client's machine.
pub(crate) const LOOK: Duration = Duration::from_millis(50);

/// How often a session that does not read looks whether its client is still there. The end of a
/// client that was still sending is not to be seen, since it comes behind what is not read: so it is
/// also sent something, to which the machine of a client that is gone answers with a reset.
pub(crate) const PROBE: Duration = Duration::from_secs(1);

/// How a session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// Its user closed it, and all was sent.
    Done,
    /// The client closed its connection or it broke.
    Gone,
    /// Nothing moved for the idle timeout, or the client did not take the last bytes.
    Idle,
    /// The server is shutting down.
    Stopped,
    /// The client broke the protocol.
    Broken(String),
}

/// The user's hold on its session.
pub(crate) struct Control {
    pub notify: Arc<Notify>,
    closing: AtomicBool,
    ending: AtomicBool,
    gone: watch::Sender<bool>,
}

impl Control {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            notify: Arc::new(Notify::new()),
            closing: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            gone: watch::Sender::new(false),
        })
    }

    /// Ends the session after all that was written has been sent.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.notify.notify_one();
    }

    pub fn closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Whether what the client is there for has ended, so that all that is left is for it to take
    /// what waits. A session that forwards ports may begin anew.
    pub fn set_ending(&self, ending: bool) {
        self.ending.store(ending, Ordering::Release);
        self.notify.notify_one();
    }

    pub fn ending(&self) -> bool {
        self.ending.load(Ordering::Acquire) || self.closing()
    }

    /// Tells the user that the client is gone.
    pub fn set_gone(&self) {
        self.gone.send_replace(true);
    }

    pub fn client(&self) -> Client {
        Client::new(self.gone.subscribe())
    }
}

/// Times out when nothing has moved for a while.
pub(crate) struct Idle {
    idle: Duration,
    drain: Duration,
    /// When something moved last, either way.
    moved: Instant,
    /// When something was sent last, or there was nothing that had to be.
    sent: Instant,
}

impl Idle {
    pub fn new(limits: &Limits) -> Self {
        Self {
            idle: limits.idle_timeout,
            drain: limits.drain_timeout,
            moved: Instant::now(),
            sent: Instant::now(),
        }
    }

    pub fn received(&mut self) {
        self.moved = Instant::now();
    }

    pub fn sent(&mut self) {
        self.moved = Instant::now();
        self.sent = self.moved;
    }

    /// For a session that ended so.
    pub fn farewell(&self, end: &End) -> Farewell {
        Farewell::new(match end {
            End::Done => self.drain,
            End::Gone | End::Idle | End::Stopped | End::Broken(_) => LINGER.min(self.drain),
        })
    }

    /// When the session's time is up; `draining` says that all that is left is for the client to
    /// take what waits. Whatever it sends then is no sign of that.
    pub fn deadline(&mut self, draining: bool) -> Instant {
        let idle = self.moved + self.idle;
        if !draining {
            self.sent = Instant::now();
            return idle;
        }
        idle.min(self.sent + self.drain)
    }
}

/// The time that a client gets, at the end of its session, to take what was sent to it last.
///
/// A socket that is closed with input unread answers with a reset, which throws away what its own
/// queue still holds: the end of the output, and the result. So nothing is closed before all has
/// reached the client's machine, and until then everything is read that it still sends.
pub(crate) struct Farewell {
    patience: Duration,
    left: usize,
    pub deadline: Instant,
}

impl Farewell {
    /// `patience` is how long a client may take nothing.
    pub fn new(patience: Duration) -> Self {
        Self {
            patience,
            left: usize::MAX,
            deadline: Instant::now() + patience,
        }
    }

    /// So many bytes have not reached the client's machine.
    pub fn left(&mut self, left: usize) {
        if left >= self.left {
            return;
        }
        self.left = left;
        let patience = match left {
            // It hangs up when it has read the end. Who said so first would cut off what a proxy in
            // between has yet to pass on.
            0 => LINGER,
            _ => self.patience,
        };
        self.deadline = Instant::now() + patience;
    }

    pub fn delivered(&self) -> bool {
        self.left == 0
    }

    pub fn hurry(&mut self) {
        self.patience = self.patience.min(LINGER);
        self.deadline = self.deadline.min(Instant::now() + LINGER);
    }
}

/// Resolves when the server stops; never, if whoever could say so is gone.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}
