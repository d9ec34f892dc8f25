//! A container inside its pod's driver: its state, what is wanted of it, and the effects that
//! bring the one to the other.

mod attach;
mod cdi;
mod create;
mod devices;
mod exec;
mod mounts;
mod relabel;
mod resolve;
mod root;
mod session;
mod start;
mod stop;
mod update;

use std::collections::VecDeque;
use std::sync::Arc;

use gantry_cri_api::v1 as cri;
use gantry_store::record;
use gantry_types::{ContainerId, ContainerState, Decision, Exit};
use prost::Message;
use tokio::time::Instant;

use crate::Error;
use crate::pod::{Driver, Reply, Request, answer};
use crate::records::{container_state, set_container_state};
use crate::registry::{ContainerFacts, ContainerView};
use crate::shim::Custody;

pub(crate) use attach::attach;
pub use attach::{Attachment, AttachmentEnd, ContainerTerminal};
pub(crate) use create::half_made;
pub(crate) use exec::exec_sync;
pub use exec::{ExecOutput, TerminalSize};
pub(crate) use mounts::unmount;
pub(crate) use session::exec;
pub use session::{Exec, ExecIo, ExecProcess, Terminal};
pub(crate) use start::start_request;
pub(crate) use stop::{StopWish, lost_exit, read_exit, remove_files, unknown_exit};

pub(crate) struct Container {
    pub(crate) facts: Arc<ContainerFacts>,
    pub(crate) state: ContainerState,
    pub(crate) status: record::ContainerStatus,
    /// Callers of CreateContainer.
    pub(crate) creating: Vec<Reply<ContainerId>>,
    /// Start and Update requests that wait for what is under way.
    pub(crate) queue: VecDeque<Request>,
    pub(crate) stop: Option<StopWish>,
    pub(crate) remove: Option<Vec<Reply<()>>>,
    /// The effect under way, of which there is one at a time.
    pub(crate) busy: Option<&'static str>,
    /// The exit came before the outcome of the start that it belongs to, or during an update.
    pub(crate) early_exit: Option<Exit>,
    /// Its end is being recorded. News of it comes by several ways, and a second record could be
    /// written after the container's removal.
    pub(crate) end_noted: bool,
    /// SIGKILL did not help; cleared by the next attempt.
    pub(crate) kill_failed: bool,
    /// Present while it runs: with it the container outlives its shim.
    pub(crate) custody: Option<Custody>,
}

impl Container {
    pub(crate) fn new(facts: Arc<ContainerFacts>, status: record::ContainerStatus) -> Self {
        Self {
            facts,
            state: container_state(&status),
            status,
            creating: Vec::new(),
            queue: VecDeque::new(),
            stop: None,
            remove: None,
            busy: None,
            early_exit: None,
            end_noted: false,
            kill_failed: false,
            custody: None,
        }
    }

    pub(crate) fn view(&self) -> ContainerView {
        let resources = cri::LinuxContainerResources::decode(self.status.resources.as_slice());
        ContainerView {
            facts: Arc::clone(&self.facts),
            state: self.state.clone(),
            resources: resources.ok(),
            user: self.status.user.clone(),
            in_custody: self.custody.is_some(),
        }
    }

    pub(crate) fn denied(&self, reason: &str) -> Error {
        Error::State {
            what: "container",
            id: self.facts.id.to_string(),
            reason: reason.to_owned(),
        }
    }

    /// What is left of a CreateContainer that failed; it waits to be removed.
    pub(crate) fn failed_to_be_made(&self) -> bool {
        matches!(&self.state, ContainerState::Exited { exit, .. }
            if exit.reason == create::CREATE_ERROR)
    }

    /// Takes over a status that was recorded.
    pub(crate) fn set_status(&mut self, status: record::ContainerStatus) {
        self.state = container_state(&status);
        self.status = status;
    }

    /// The status record that says `state`.
    pub(crate) fn status_with(&self, state: &ContainerState) -> record::ContainerStatus {
        let mut status = self.status.clone();
        set_container_state(&mut status, state);
        status
    }
}

impl Driver {
    /// Begins what the wishes for one container still need.
    pub(crate) fn advance_container(&mut self, id: &ContainerId) {
        // Whatever it is, it needs the shim that is to come, or its absence to be certain.
        if self.adopting() {
            return;
        }
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if container.busy.is_some() {
            return;
        }
        let may_stop = container.state.may_stop();
        if container.remove.is_some() && may_stop == Decision::Go {
            container.wish_stop(Instant::now(), None);
        }
        if container.stop.is_some() {
            match may_stop {
                Decision::Go => self.drive_stop(id),
                Decision::Done | Decision::Deny(_) => {
                    let Some(mut wish) = container.stop.take() else {
                        return;
                    };
                    if let Some(step) = wish.step.take() {
                        step.end(true);
                    }
                    answer(wish.waiters, &Ok(()));
                }
            }
        }
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if container.busy.is_some() {
            return;
        }
        if container.remove.is_some() && container.stop.is_none() {
            self.begin_remove(id);
            return;
        }
        // One that is answered at once leaves nothing that would bring us back here for the next.
        while let Some(request) = self.next_queued(id) {
            match request {
                Request::Start { reply, .. } => self.start(id, reply),
                Request::Update {
                    resources, reply, ..
                } => self.update(id, *resources, reply),
                // Only these two are ever queued.
                _ => {}
            }
        }
    }

    fn next_queued(&mut self, id: &ContainerId) -> Option<Request> {
        let container = self.containers.get_mut(id)?;
        match container.busy {
            None => container.queue.pop_front(),
            Some(_) => None,
        }
    }

    /// Records a container's new status, then shows it.
    pub(crate) fn record_container(
        &mut self,
        id: &ContainerId,
        state: &ContainerState,
        then: impl FnOnce(&mut Driver, &ContainerId) + Send + 'static,
    ) {
        let Some(container) = self.containers.get(id) else {
            return;
        };
        let status = container.status_with(state);
        let (ctx, key) = (Arc::clone(&self.ctx), id.clone());
        let (id, state) = (id.clone(), state.clone());
        self.blocking(
            move || ctx.records.put_container_status(&key, &status),
            move |driver, outcome| {
                // What the kernel did is true whether or not the disk took it: the shim's exit
                // record and recovery stand in for the lost write.
                if let Err(error) = outcome {
                    tracing::error!(container = %id, %error, "container status not recorded");
                }
                if let Some(container) = driver.containers.get_mut(&id) {
                    // Not the whole status: an update may have changed the resources meanwhile.
                    set_container_state(&mut container.status, &state);
                    container.state = state;
                    driver.publish();
                }
                then(driver, &id);
            },
        );
    }
}
