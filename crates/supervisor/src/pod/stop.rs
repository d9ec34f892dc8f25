//! StopPodSandbox and RemovePodSandbox: what is wanted is compared with what is, and the next
//! step begun. Every step may fail and be asked for again.

use std::sync::Arc;

use gantry_types::{ContainerState, PodState};
use tokio::time::Instant;

use super::{Driver, answer, blocking, teardown};
use crate::Error;
use crate::activity::Of;

pub(super) const STOPPING: &str = "stopping";
const REMOVING: &str = "removing";

impl Driver {
    pub(super) fn advance_pod(&mut self) {
        if self.busy.is_some() {
            return;
        }
        if self.stop.is_some() || (self.remove.is_some() && !self.stopped()) {
            self.advance_stop();
        } else if self.remove.is_some() {
            self.advance_remove();
        }
    }

    /// Nothing of the pod is left outside its records and run directory.
    fn stopped(&self) -> bool {
        matches!(self.state, PodState::NotReady { .. }) && self.network_released() && self.swept
    }

    fn network_released(&self) -> bool {
        self.status.network_released || self.facts.record.netns_path.is_empty()
    }

    fn advance_stop(&mut self) {
        if self.stopped() {
            answer(self.stop.take().unwrap_or_default(), &Ok(()));
            return;
        }
        // The kubelet stops containers first, with their grace. Whatever still runs is killed.
        let mut waiting = false;
        for container in self.containers.values_mut() {
            if container.busy.is_some()
                || matches!(container.state, ContainerState::Running { .. })
                || matches!(container.state, ContainerState::Unknown { .. })
            {
                container.wish_stop(Instant::now(), None);
                waiting |= !container.kill_failed;
            }
        }
        if waiting {
            let ids: Vec<_> = self.containers.keys().cloned().collect();
            for id in ids {
                self.advance_container(&id);
            }
            return;
        }
        self.begin_stop();
    }

    /// Records that the pod ends before it is seen to, and before anything is taken from it: one
    /// that was shown NOT_READY must not come back after a crash, without its network.
    fn begin_stop(&mut self) {
        self.busy = Some(STOPPING);
        if matches!(self.state, PodState::NotReady { .. }) {
            return self.take_down();
        }
        let state = PodState::NotReady {
            reason: "stopped".to_owned(),
        };
        let mut status = self.status.clone();
        crate::records::set_pod_state(&mut status, &state);
        let (ctx, id) = (Arc::clone(&self.ctx), self.id().clone());
        self.blocking(
            move || ctx.records.put_pod_status(&id, &status),
            move |driver, outcome| {
                // A full disk keeps no pod alive; the outcome of the stop is recorded again.
                if let Err(error) = outcome {
                    tracing::warn!(pod = %driver.id(), %error, "end of the pod not recorded");
                }
                driver.set_state(state);
                driver.publish();
                driver.take_down();
            },
        );
    }

    fn take_down(&mut self) {
        let (ctx, facts) = (Arc::clone(&self.ctx), Arc::clone(&self.facts));
        let (shim, recorded) = (self.shim.take(), self.recorded_shim());
        let holder = self.recorded_holder();
        let released = self.network_released();
        let raw = if self.status.network_result.is_empty() {
            facts.record.network_intent.clone()
        } else {
            self.status.network_result.clone()
        };
        let mut status = self.status.clone();
        let step = self.ctx.activity.begin("stop pod", Of::pod(&facts));
        self.effect(
            async move {
                // Before the shim, which takes the network namespace along.
                let mut failed = None;
                if !released {
                    match teardown::release_network(&ctx, &facts, &raw).await {
                        Ok(()) => status.network_released = true,
                        Err(error) => failed = Some(error),
                    }
                }
                // The namespace stays while a plugin still has to detach from it.
                if failed.is_none() {
                    let ended = async {
                        teardown::end_shim(&ctx, &facts, shim.clone(), recorded, holder).await?;
                        let (ctx, facts) = (Arc::clone(&ctx), Arc::clone(&facts));
                        blocking(move || teardown::sweep(&ctx, &facts)).await
                    };
                    match ended.await {
                        Ok(()) => {
                            status.shim = None;
                            status.holder = None;
                        }
                        Err(error) => failed = Some(error),
                    }
                }
                let (id, copy) = (facts.id.clone(), status.clone());
                let recorded = blocking(move || ctx.records.put_pod_status(&id, &copy)).await;
                let keep = if failed.is_some() { shim } else { None };
                step.end(failed.is_none() && recorded.is_ok());
                (failed.map_or(recorded, Err), status, keep)
            },
            |driver, (outcome, status, shim)| {
                driver.busy = None;
                driver.status = status;
                driver.shim = shim;
                driver.swept = outcome.is_ok();
                driver.publish();
                if outcome.is_err() {
                    // Who wants it removed asks again too: nothing is retried without being asked.
                    answer(driver.remove.take().unwrap_or_default(), &outcome);
                }
                answer(driver.stop.take().unwrap_or_default(), &outcome);
            },
        );
    }

    fn advance_remove(&mut self) {
        if !self.containers.is_empty() {
            for container in self.containers.values_mut() {
                container.remove.get_or_insert_default();
            }
            let ids: Vec<_> = self.containers.keys().cloned().collect();
            for id in ids {
                self.advance_container(&id);
            }
            return;
        }
        self.busy = Some(REMOVING);
        let (ctx, facts) = (Arc::clone(&self.ctx), Arc::clone(&self.facts));
        let step = self.ctx.activity.begin("remove pod", Of::pod(&facts));
        self.blocking(
            move || {
                let forgotten = ctx.records.forget_pod(&facts.id);
                step.end(forgotten.is_ok());
                forgotten
            },
            |driver, outcome| {
                driver.busy = None;
                if outcome.is_ok() {
                    driver.ctx.registry.remove(&driver.name(), driver.id());
                    driver.ended = true;
                }
                answer(driver.remove.take().unwrap_or_default(), &outcome);
            },
        );
    }

    /// A container of a pod that is to be removed could not be: tell those who asked.
    pub(crate) fn give_up_removal(&mut self, error: &Error) {
        answer(self.remove.take().unwrap_or_default(), &Err(error.clone()));
    }

    /// A container of a pod that is to be stopped would not die.
    pub(crate) fn give_up_stop(&mut self, error: &Error) {
        answer(self.stop.take().unwrap_or_default(), &Err(error.clone()));
        self.give_up_removal(error);
    }
}
