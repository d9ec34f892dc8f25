//! Runs a session's state machine over a connection.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::core::{Core, Incoming, Policy};
use super::frame::Goaway;
use crate::conn::Transport;
use crate::server::Limits;
use crate::session::{Control, End, Idle, PROBE, stopped};
use crate::wire::{Step, Wire};

pub(crate) struct Session<T> {
    wire: Wire<T>,
    core: Core,
    control: Arc<Control>,
    idle: Idle,
    stop: watch::Receiver<bool>,
}

impl<T: Transport> Session<T> {
    /// A session over `io`, and the streams that its client will open.
    pub fn new(
        io: T,
        policy: Policy,
        control: Arc<Control>,
        limits: &Limits,
        stop: watch::Receiver<bool>,
    ) -> (Self, mpsc::Receiver<Incoming>) {
        let (core, incoming) = Core::new(policy, control.notify.clone());
        let session = Self {
            wire: Wire::new(io),
            core,
            control,
            idle: Idle::new(limits),
            stop,
        };
        (session, incoming)
    }

    /// Moves bytes until the session ends, however it ends; then its users have been told.
    pub async fn run(mut self) -> End {
        let end = self.serve().await;
        // Also after an orderly end that the client asked for by GOAWAY.
        if !self.control.closing() || !matches!(end, End::Done) {
            self.control.set_gone();
        }
        self.core.end();
        let status = match &end {
            End::Done | End::Stopped | End::Idle => Goaway::Ok,
            End::Broken(_) => Goaway::ProtocolError,
            End::Gone => return end,
        };
        self.core.goaway(status);
        let Self {
            wire,
            core,
            idle,
            mut stop,
            ..
        } = self;
        wire.close(core.out, idle.farewell(&end), &mut stop).await;
        end
    }

    async fn serve(&mut self) -> End {
        let Self {
            wire,
            core,
            control,
            idle,
            stop,
        } = self;
        let notify = control.notify.clone();
        let mut probing = false;
        // Kept over other events, which may come all the time.
        let mut probe_at = None;
        loop {
            if control.closing() {
                core.close();
                core.finish_all();
            }
            if let Err(error) = core.receive(&mut wire.input) {
                return End::Broken(error.to_string());
            }
            core.sweep();
            if core.drained() && core.out.is_empty() && wire.flushed() {
                return End::Done;
            }
            let stalled = core.stalled();
            probe_at = match (stalled, probe_at) {
                (false, _) => None,
                (true, None) => Some(Instant::now() + PROBE),
                (true, at) => at,
            };
            let owes = core.owes() || !wire.flushed();
            let deadline = idle.deadline(control.ending() && owes);
            tokio::select! {
                step = wire.step(!stalled, &mut core.out) => match step {
                    Ok(Step::Closed) | Err(_) => return End::Gone,
                    // A probe is nothing that moves.
                    Ok(Step::Wrote) if probing => {
                        probing = !(core.out.is_empty() && wire.flushed());
                    }
                    Ok(Step::Read(_)) => idle.received(),
                    Ok(Step::Wrote) => idle.sent(),
                },
                () = notify.notified() => {}
                () = sleep_until(deadline) => return End::Idle,
                () = stopped(stop) => return End::Stopped,
                () = sleep_until(probe_at.unwrap_or(deadline)), if stalled => {
                    probe_at = None;
                    if wire.peer_closed() {
                        control.set_gone();
                    }
                    if core.out.is_empty() && wire.flushed() {
                        core.probe();
                        probing = true;
                    }
                }
            }
        }
    }
}
