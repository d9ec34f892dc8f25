//! The driver of one pod: a task that owns the pod's state and its shim's connection.
//!
//! Requests, shim events and finished effects arrive in one mailbox and are handled one after the
//! other without awaiting. Whatever takes time (runtime calls, plugins, disks) is an *effect*: a
//! task of its own whose outcome comes back through the mailbox as a closure over the driver. So
//! no lock is held across I/O, a stuck effect delays only its own object, and an effect outlives
//! the client that asked for it.
//!
//! What is wanted (stopped, removed) is kept beside what is; [`Driver::advance`] compares the two
//! after every message and begins the next effect. Starting, stopping and removing are therefore
//! wishes in memory, never states in a record: after a crash the kubelet repeats them.

mod adoption;
mod files;
mod requests;
mod run;
mod stop;
mod teardown;

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::Arc;

use gantry_cri_api::v1 as cri;
use gantry_shim_api::v1;
use gantry_store::record;
use gantry_types::{ContainerId, ContainerState, PodId, PodState, ProcessRef};
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;

use crate::container::Container;
use crate::records::set_pod_state;
use crate::registry::{ContainerFacts, Doing, PodFacts, PodName, PodView};
use crate::shim::Shim;
use crate::{Context, Error};

pub(crate) use requests::{Awaited, Reply, Request};
pub(crate) use run::{Asked, check, host_network, hostname, selinux_options};
pub(crate) use teardown::{
    FOREIGN, cgroup_pids, delete_from_runtime, end_cgroup, end_holder, end_runtime_calls, end_shim,
    is_netns, kill, kill_cgroup, release_network, remove_container_cgroup, remove_state, sweep,
    unmount, unpin, wait_gone,
};

/// Messages that may wait in a driver's mailbox before senders are made to wait.
pub(crate) const MAILBOX: usize = 256;

/// Why a pod or container was lost whose shim is no more.
pub(crate) const SHIM_ENDED: &str = "the pod's shim ended";

pub(crate) enum Msg {
    /// With the span of the call that asks.
    Request(tracing::Span, Request),
    Event(v1::event::Body),
    /// The connection to this shim ended; its process may live on.
    Disconnected(ProcessRef),
    ShimExited(ProcessRef),
    /// An effect has ended.
    Apply(tracing::Span, Box<dyn FnOnce(&mut Driver) + Send>),
}

pub(crate) struct Driver {
    pub(crate) ctx: Arc<Context>,
    pub(crate) facts: Arc<PodFacts>,
    pub(crate) status: record::PodStatus,
    pub(crate) state: PodState,
    pub(crate) shim: Option<Arc<Shim>>,
    pub(crate) containers: BTreeMap<ContainerId, Container>,
    pub(crate) container_names: HashMap<(String, u32), ContainerId>,
    /// Containers of the pod that a newer daemon has on record. We know no more of them.
    pub(crate) newer: Vec<ContainerId>,
    /// Callers of RunPodSandbox.
    creating: Vec<Reply<Awaited>>,
    /// Wish to be stopped, with who asked.
    stop: Option<Vec<Reply<()>>>,
    /// Wish to be removed.
    remove: Option<Vec<Reply<()>>>,
    /// What the pod itself (not one of its containers) is doing.
    busy: Option<&'static str>,
    /// Everything outside the records was taken away in this daemon's life. Records alone cannot
    /// say so of a pod whose making or undoing was cut short.
    swept: bool,
    /// Shim or holder ended while the pod was made.
    lost_early: Option<&'static str>,
    /// The holder outlives the shim: the shim has said so.
    holder_kept: bool,
    /// It was told that the shim cannot be replaced.
    older_shim_noted: bool,
    /// Present while a shim that has died is replaced.
    adoption: Option<adoption::Adoption>,
    /// When a shim was replaced of late.
    adopted_at: Vec<tokio::time::Instant>,
    ended: bool,
    mailbox: mpsc::Sender<Msg>,
}

impl Driver {
    pub(crate) fn new(
        ctx: Arc<Context>,
        facts: Arc<PodFacts>,
        status: record::PodStatus,
        state: PodState,
        mailbox: mpsc::Sender<Msg>,
    ) -> Self {
        Self {
            ctx,
            facts,
            status,
            state,
            shim: None,
            containers: BTreeMap::new(),
            container_names: HashMap::new(),
            newer: Vec::new(),
            creating: Vec::new(),
            stop: None,
            remove: None,
            busy: None,
            swept: false,
            lost_early: None,
            holder_kept: false,
            older_shim_noted: false,
            adoption: None,
            adopted_at: Vec::new(),
            ended: false,
            mailbox,
        }
    }

    /// Handles messages until the pod is removed.
    pub(crate) async fn run(mut self, mut messages: mpsc::Receiver<Msg>) {
        let doing = self.ctx.registry.doing(self.id());
        self.tell(&doing);
        while let Some(message) = messages.recv().await {
            doing.handles();
            self.handle(message);
            self.tell(&doing);
            if self.ended {
                break;
            }
        }
        // Whoever still sends finds the mailbox closed and answers NotFound.
    }

    fn tell(&self, doing: &Doing) {
        let of_pod = self.busy.map(|what| ("", what));
        let containers = self.containers.iter();
        let of_containers =
            containers.filter_map(|(id, container)| Some((id.as_str(), container.busy?)));
        doing.handled(of_pod.into_iter().chain(of_containers));
    }

    fn handle(&mut self, message: Msg) {
        let span = match &message {
            Msg::Request(span, _) | Msg::Apply(span, _) => span.clone(),
            _ => tracing::Span::none(),
        };
        // What it begins belongs to who asked for it.
        let _entered = span.entered();
        match message {
            Msg::Request(_, request) => self.request(request),
            Msg::Event(event) => self.event(event),
            Msg::Disconnected(shim) => self.disconnected(shim),
            Msg::ShimExited(shim) => self.shim_exited(shim),
            Msg::Apply(_, apply) => apply(self),
        }
        self.advance();
    }

    pub(crate) fn id(&self) -> &PodId {
        &self.facts.id
    }

    pub(crate) fn name(&self) -> PodName {
        self.facts
            .config
            .metadata
            .as_ref()
            .map(PodName::from)
            .unwrap_or_else(|| PodName {
                name: String::new(),
                namespace: String::new(),
                uid: String::new(),
                attempt: 0,
            })
    }

    pub(crate) fn mailbox(&self) -> mpsc::Sender<Msg> {
        self.mailbox.clone()
    }

    /// Runs `work` beside the driver and `then` inside it.
    pub(crate) fn effect<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
        then: impl FnOnce(&mut Driver, T) + Send + 'static,
    ) {
        self.effect_of(tracing::Span::current(), work, then);
    }

    /// As [`Driver::effect`], on behalf of the call with this span.
    pub(crate) fn effect_of<T: Send + 'static>(
        &self,
        span: tracing::Span,
        work: impl Future<Output = T> + Send + 'static,
        then: impl FnOnce(&mut Driver, T) + Send + 'static,
    ) {
        let mailbox = self.mailbox.clone();
        tokio::spawn(async move {
            let outcome = work.instrument(span.clone()).await;
            let apply = Box::new(move |driver: &mut Driver| then(driver, outcome));
            // A closed mailbox means that the pod was removed meanwhile.
            let _ = mailbox.send(Msg::Apply(span, apply)).await;
        });
    }

    /// Runs blocking `work` beside the driver and `then` inside it. A panic in `work` becomes an
    /// error: it must not leave the object busy for ever.
    pub(crate) fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
        then: impl FnOnce(&mut Driver, Result<T, Error>) + Send + 'static,
    ) {
        self.effect(blocking(work), then);
    }

    /// Makes the present state visible to readers. A half-made pod stays hidden: nobody has its id.
    pub(crate) fn publish(&self) {
        if self.state == PodState::Creating {
            return;
        }
        let containers = self
            .containers
            .values()
            .filter(|container| container.state != ContainerState::Creating)
            .map(|container| Arc::new(container.view()))
            .collect();
        let linux = self.pod_config().linux.as_ref();
        // What was updated, else what the pod was made with.
        let told = |updated: &Vec<u8>, made: Option<cri::LinuxContainerResources>| {
            if updated.is_empty() {
                return made;
            }
            prost::Message::decode(updated.as_slice()).ok()
        };
        self.ctx.registry.publish(PodView {
            facts: Arc::clone(&self.facts),
            state: self.state.clone(),
            half_made: self.status.half_made,
            ips: self.status.ips.clone(),
            network_result: self.status.network_result.clone(),
            shim_adoptions: self.status.shim_adoptions,
            holder_kept: self.holder_kept,
            overhead: told(
                &self.status.overhead,
                linux.and_then(|linux| linux.overhead.clone()),
            ),
            resources: told(
                &self.status.resources,
                linux.and_then(|linux| linux.resources.clone()),
            ),
            containers,
        });
    }

    /// Changes the pod's state in memory and in the copy of the record that is flushed next.
    pub(crate) fn set_state(&mut self, state: PodState) {
        set_pod_state(&mut self.status, &state);
        self.state = state;
    }

    /// Begins whatever the wishes still need.
    fn advance(&mut self) {
        let ids: Vec<_> = self.containers.keys().cloned().collect();
        for id in ids {
            self.advance_container(&id);
        }
        self.advance_pod();
    }

    fn event(&mut self, event: v1::event::Body) {
        match event {
            v1::event::Body::Exited(exited) => {
                let Some(record) = exited.exit else { return };
                if let Ok(id) = exited.container_id.parse::<ContainerId>() {
                    self.container_exited(&id, &record);
                }
            }
            v1::event::Body::HolderExited(_) => {
                self.lose("the pod's holder process ended");
            }
            v1::event::Body::Oom(oom) => {
                tracing::info!(pod = %self.id(), container = %oom.container_id, "out of memory");
            }
            // Delivered to whoever waits for it, never to the driver.
            v1::event::Body::ExecExited(_) => {}
        }
    }

    /// A shim that closed the connection and lives: it was taken over or it is broken. Connect
    /// again; a shim that cannot be reached is killed, and its death is handled as such.
    fn disconnected(&mut self, process: ProcessRef) {
        if let Some(adoption) = &mut self.adoption {
            adoption.disconnected = Some(process);
            return;
        }
        let Some(shim) = self.shim.clone() else {
            return;
        };
        // One that has ended is not to be reached: the news of that is on its way.
        if shim.process() != process || !gantry_sys::process::alive(process) {
            return;
        }
        if self.stop.is_some() || self.busy.is_some() {
            return;
        }
        let ctx = Arc::clone(&self.ctx);
        let id = self.id().clone();
        let mailbox = self.mailbox();
        self.effect(
            async move {
                let socket = ctx.records.dirs.socket(&id);
                let limit = ctx.settings.timeouts.shim_call;
                let connected =
                    Shim::connect_to(&ctx.activity, Some(process), &id, &socket, limit, mailbox)
                        .await;
                if connected.is_err() {
                    shim.kill();
                }
                connected
            },
            move |driver, connected| match connected {
                // It may have ended, and even been replaced, meanwhile.
                Ok(_) if driver.shim.as_ref().map(|shim| shim.process()) != Some(process) => {}
                Ok((shim, _)) => {
                    driver.shim = Some(shim);
                    driver.resynchronise();
                    driver.prepare_for_loss();
                }
                Err(error) => {
                    tracing::warn!(pod = %driver.id(), %error, "shim cannot be reached again");
                }
            },
        );
    }

    /// Asks the shim for what was missed while no connection stood.
    pub(crate) fn resynchronise(&mut self) {
        let Some(shim) = self.shim.clone() else {
            return;
        };
        let limit = self.ctx.settings.timeouts.shim_call;
        self.effect(
            async move { shim.state(limit).await },
            |driver, state| match state {
                Ok(state) => {
                    for container in state.containers {
                        let (Ok(id), Some(exit)) = (container.id.parse(), container.exit) else {
                            continue;
                        };
                        driver.container_exited(&id, &exit);
                    }
                }
                Err(error) => tracing::warn!(pod = %driver.id(), %error, "shim state"),
            },
        );
    }

    fn shim_exited(&mut self, process: ProcessRef) {
        if self.state == PodState::Creating {
            // The holder's end, which comes along, says less.
            self.lost_early = Some(SHIM_ENDED);
            return;
        }
        // Every connection to it has told; one of them counts.
        if self.shim.as_ref().map(|shim| shim.process()) != Some(process) {
            return;
        }
        // A shim that was asked to end is no loss.
        let lost = self.shim.take();
        if let Some(lost) = lost
            && self.busy != Some(stop::STOPPING)
        {
            self.replace_shim(&lost);
        }
    }

    /// The pod can no longer serve: the kubelet makes a new one only when the state flips.
    fn lose(&mut self, reason: &'static str) {
        if self.state == PodState::Creating {
            // Taken up when the outcome of the making is there.
            self.lost_early.get_or_insert(reason);
            return;
        }
        if !self.state.is_ready() {
            return;
        }
        tracing::warn!(pod = %self.id(), reason, "pod sandbox lost");
        self.set_state(PodState::NotReady {
            reason: reason.to_owned(),
        });
        // Published at once: the kernel has spoken, and recovery would find the same.
        self.publish();
        let (ctx, id, status) = (
            Arc::clone(&self.ctx),
            self.id().clone(),
            self.status.clone(),
        );
        self.blocking(
            move || ctx.records.put_pod_status(&id, &status),
            |driver, outcome| {
                if let Err(error) = outcome {
                    tracing::error!(pod = %driver.id(), %error, "loss of the pod not recorded");
                }
            },
        );
    }

    /// Stopping or removing has been asked for.
    pub(crate) fn ending(&self) -> bool {
        self.stop.is_some() || self.remove.is_some()
    }

    pub(crate) fn pod_config(&self) -> &cri::PodSandboxConfig {
        &self.facts.config
    }

    pub(crate) fn add_container(&mut self, facts: Arc<ContainerFacts>, container: Container) {
        // The name of one that could not be made must not block the retry.
        if let Some(metadata) = &facts.config.metadata
            && !container.failed_to_be_made()
        {
            self.container_names
                .insert((metadata.name.clone(), metadata.attempt), facts.id.clone());
        }
        self.ctx.registry.hold(facts.id.clone());
        self.containers.insert(facts.id.clone(), container);
    }

    pub(crate) fn drop_container(&mut self, id: &ContainerId) {
        self.ctx.registry.let_go(id);
        if let Some(container) = self.containers.remove(id) {
            for request in container.queue {
                requests::refuse(request, requests::not_found(id));
            }
        }
        self.container_names.retain(|_, holder| holder != id);
    }

    /// The recorded shim process, for a pod whose shim cannot be reached by its socket. One of an
    /// earlier boot is none: its pid and start time may be somebody else's now.
    pub(crate) fn recorded_shim(&self) -> Option<ProcessRef> {
        self.of_this_boot(self.status.shim)
    }

    /// The recorded holder, which may outlive every shim. As `recorded_shim` for an earlier boot.
    pub(crate) fn recorded_holder(&self) -> Option<ProcessRef> {
        self.of_this_boot(self.status.holder)
    }

    fn of_this_boot(&self, process: Option<record::ProcessRef>) -> Option<ProcessRef> {
        if self.facts.record.boot_id != self.ctx.settings.boot_id {
            return None;
        }
        process.map(|process| ProcessRef {
            pid: process.pid,
            start_time: process.start_time,
        })
    }
}

/// Runs blocking work on a blocking thread; a panic there is an error here.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::internal("blocking work", error)))
}

/// Answers everyone who waits; one who is gone is no error.
pub(crate) fn answer<T: Clone>(waiters: Vec<Reply<T>>, outcome: &Result<T, Error>) {
    for waiter in waiters {
        let _ = waiter.send(outcome.clone());
    }
}

/// A reply channel whose other end waits for `Result<T, Error>`.
pub(crate) fn reply<T>() -> (Reply<T>, oneshot::Receiver<Result<T, Error>>) {
    oneshot::channel()
}
