//! What a pod's driver can be asked, and how it takes each request.

use std::sync::Arc;
use std::time::Duration;

use gantry_cri_api::v1 as cri;
use gantry_shim_api::v1::{self, request};
use gantry_types::{ContainerId, Decision, PodId, PodState};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Driver, answer};
use crate::Error;
use crate::container::Container;
use crate::registry::ContainerView;
use crate::shim::Shim;

pub(crate) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What a repeated RunPodSandbox learns of the pod that has its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Awaited {
    Ready(PodId),
    /// Stopped or lost: another may be made under its name.
    Ended,
}

pub(crate) enum Request {
    /// Legal always. Answered once the pod is ready, or will never be.
    AwaitReady(Reply<Awaited>),
    /// Legal always.
    Stop(Reply<()>),
    /// Legal unless a container of the pod has a newer record; stops first.
    Remove(Reply<()>),
    /// Legal in a ready pod.
    CreateContainer {
        config: Box<cri::ContainerConfig>,
        config_hash: [u8; 32],
        reply: Reply<ContainerId>,
    },
    /// Legal in CREATED.
    Start { id: ContainerId, reply: Reply<()> },
    /// Legal always.
    StopContainer {
        id: ContainerId,
        grace: Duration,
        reply: Reply<()>,
    },
    /// Legal always; kills first.
    RemoveContainer { id: ContainerId, reply: Reply<()> },
    /// Legal in CREATED and RUNNING.
    Update {
        id: ContainerId,
        resources: Box<cri::LinuxContainerResources>,
        reply: Reply<()>,
    },
    /// Legal in a ready pod.
    UpdatePod {
        overhead: Vec<u8>,
        resources: Vec<u8>,
        reply: Reply<()>,
    },
    /// Legal in RUNNING.
    ReopenLog { id: ContainerId, reply: Reply<()> },
    /// Legal in RUNNING: what an exec needs.
    Running {
        id: ContainerId,
        reply: Reply<(Arc<Shim>, Arc<ContainerView>)>,
    },
}

impl Driver {
    pub(super) fn request(&mut self, request: Request) {
        if let (Some(adoption), Request::ReopenLog { .. } | Request::Running { .. }) =
            (&mut self.adoption, &request)
        {
            // They need the shim that is to come.
            adoption.deferred.push(request);
            return;
        }
        match request {
            Request::AwaitReady(reply) => match &self.state {
                PodState::Creating => self.creating.push(reply),
                PodState::Ready { .. } if !self.ending() => {
                    answer(vec![reply], &Ok(Awaited::Ready(self.id().clone())));
                }
                PodState::Ready { .. } | PodState::NotReady { .. } => {
                    answer(vec![reply], &Ok(Awaited::Ended));
                }
            },
            Request::Stop(reply) => self.stop.get_or_insert_default().push(reply),
            Request::Remove(reply) => match self.newer.first() {
                // Without its pod nobody could ever do anything with it.
                Some(container) => {
                    let reason = format!(
                        "the record of its container {container} is of a newer gantryd, for which \
                         both are kept"
                    );
                    let _ = reply.send(Err(Error::State {
                        what: "pod sandbox",
                        id: self.id().to_string(),
                        reason,
                    }));
                }
                None => self.remove.get_or_insert_default().push(reply),
            },
            Request::CreateContainer {
                config,
                config_hash,
                reply,
            } => {
                self.create_container(*config, config_hash, reply);
            }
            Request::Start { id, reply } => self.with_container(&id, reply, |container, reply| {
                container.queue.push_back(Request::Start {
                    id: id.clone(),
                    reply,
                });
            }),
            Request::Update {
                id,
                resources,
                reply,
            } => {
                self.with_container(&id, reply, |container, reply| {
                    let id = id.clone();
                    container.queue.push_back(Request::Update {
                        id,
                        resources,
                        reply,
                    });
                });
            }
            Request::StopContainer { id, grace, reply } => {
                let deadline = Instant::now() + grace;
                self.with_container(&id, reply, |container, reply| {
                    container.wish_stop(deadline, Some(reply));
                });
            }
            Request::RemoveContainer { id, reply } => {
                // Idempotent: what is not there is removed.
                match self.containers.get_mut(&id) {
                    Some(container) => container.remove.get_or_insert_default().push(reply),
                    None => answer(vec![reply], &Ok(())),
                }
            }
            Request::UpdatePod {
                overhead,
                resources,
                reply,
            } => self.update_resources(overhead, resources, reply),
            Request::ReopenLog { id, reply } => self.reopen_log(&id, reply),
            Request::Running { id, reply } => {
                let answer = self.running(&id).and_then(|view| {
                    let shim = self.shim.clone().ok_or_else(|| self.no_shim())?;
                    Ok((shim, view))
                });
                let _ = reply.send(answer);
            }
        }
    }

    /// Keeps what the kubelet tells of the pod's size. The pod's cgroup, whose limits these are, is
    /// the kubelet's; ours are leaves below it.
    fn update_resources(&mut self, overhead: Vec<u8>, resources: Vec<u8>, reply: Reply<()>) {
        if self.ending() || !self.state.is_ready() {
            let _ = reply.send(Err(Error::State {
                what: "pod sandbox",
                id: self.id().to_string(),
                reason: "it is not ready".to_owned(),
            }));
            return;
        }
        self.status.overhead = overhead;
        self.status.resources = resources;
        self.publish();
        let write = |driver: &Driver| {
            let ctx = Arc::clone(&driver.ctx);
            let (id, status) = (driver.id().clone(), driver.status.clone());
            move || ctx.records.put_pod_status(&id, &status)
        };
        self.blocking(write(self), move |driver, outcome| {
            if driver.state.is_ready() {
                let _ = reply.send(outcome);
                return;
            }
            // Its loss was recorded at the same time, and the later of the two writes counts.
            driver.blocking(write(driver), move |_, again| {
                let _ = reply.send(outcome.and(again));
            });
        });
    }

    fn with_container<T>(
        &mut self,
        id: &ContainerId,
        reply: Reply<T>,
        then: impl FnOnce(&mut Container, Reply<T>),
    ) {
        match self.containers.get_mut(id) {
            Some(container) => then(container, reply),
            None => {
                let _ = reply.send(Err(not_found(id)));
            }
        }
    }

    pub(crate) fn no_shim(&self) -> Error {
        Error::Shim {
            pod: self.id().to_string(),
            reason: "not connected".to_owned(),
        }
    }

    fn running(&self, id: &ContainerId) -> Result<Arc<ContainerView>, Error> {
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        match container.state.must_run() {
            Decision::Go => Ok(Arc::new(container.view())),
            Decision::Done => Ok(Arc::new(container.view())),
            Decision::Deny(reason) => Err(container.denied(reason)),
        }
    }

    fn reopen_log(&mut self, id: &ContainerId, reply: Reply<()>) {
        let ready = self.running(id).and_then(|view| {
            let shim = self.shim.clone().ok_or_else(|| self.no_shim())?;
            Ok((shim, view))
        });
        let (shim, view) = match ready {
            Ok(ready) => ready,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let limit = self.ctx.settings.timeouts.shim_call;
        let body = v1::ReopenLog {
            container_id: view.facts.id.to_string(),
        };
        tokio::spawn(async move {
            let _ = reply.send(shim.done(request::Body::ReopenLog(body), limit).await);
        });
    }
}

/// Answers a request that waited for a container which has gone meanwhile.
pub(super) fn refuse(request: Request, error: Error) {
    match request {
        Request::Start { reply, .. } | Request::Update { reply, .. } => {
            let _ = reply.send(Err(error));
        }
        // Nothing else is ever queued.
        _ => {}
    }
}

pub(crate) fn not_found(id: &ContainerId) -> Error {
    Error::NotFound {
        what: "container",
        id: id.to_string(),
    }
}
