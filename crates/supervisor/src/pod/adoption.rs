//! The loss of a shim: another takes the pod over, or the pod is lost.
//!
//! What makes it possible is prepared while all is well: the holder is told to outlive its shim, and
//! of each container that runs we keep duplicates of its output, its input and its pidfd.
//!
//! ```text
//! shim ended ──► its runtime calls are killed ──► new shim ──► Adopt per container ──► READY
//!                     │ cannot be, or any step fails
//!                     └──► new shim and holder killed, containers killed by cgroup, NOT_READY
//! ```
//!
//! Meanwhile the pod is busy: what needs a shim waits, and what was published stays published.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use gantry_shim_api::v1;
use gantry_types::{ContainerId, ContainerState, Decision, PodState, ProcessRef};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Asked, Driver, Msg, Request, SHIM_ENDED, run, teardown};
use crate::activity::Of;
use crate::container::start_request;
use crate::registry::PodFacts;
use crate::shim::{Custody, Shim, spawn};
use crate::{Context, Error, failpoint};

const ADOPTING: &str = "adopting";

/// A pod whose shims die faster than so many in so long is given up.
const MAX_ADOPTIONS: usize = 5;
const WITHIN: Duration = Duration::from_secs(60);

/// While a shim is replaced.
pub(super) struct Adoption {
    /// Since when.
    began: Instant,
    /// What needs the shim that is to come.
    pub(super) deferred: Vec<Request>,
    /// A connection that has ended meanwhile.
    pub(super) disconnected: Option<ProcessRef>,
}

/// A container that is to go on.
struct Adoptee {
    request: v1::Adopt,
    custody: Custody,
}

/// What an adoption needs to know of the pod.
struct Plan {
    ctx: Arc<Context>,
    facts: Arc<PodFacts>,
    mailbox: mpsc::Sender<Msg>,
    holder: Option<ProcessRef>,
    /// Or why there is none.
    adoptees: Result<Vec<Adoptee>, &'static str>,
}

impl Driver {
    pub(crate) fn adopting(&self) -> bool {
        self.adoption.is_some()
    }

    /// Whether this is the pod's shim now.
    pub(crate) fn has_shim(&self, process: ProcessRef) -> bool {
        self.shim.as_ref().map(|shim| shim.process()) == Some(process)
    }

    /// Prepares for the loss of the shim that the pod now has: the holder is on record, and what
    /// runs is taken into custody. In the background: nobody waits for it.
    pub(crate) fn prepare_for_loss(&mut self) {
        let Some(shim) = self.shim.clone() else {
            return;
        };
        if !self.state.is_ready() {
            return;
        }
        if !shim.knows_adoption() {
            if !std::mem::replace(&mut self.older_shim_noted, true) {
                tracing::info!(pod = %self.id(), protocol = shim.protocol(),
                    "the pod has a shim of an earlier version: it ends when its shim does");
            }
            return;
        }
        let limit = self.ctx.settings.timeouts.shim_call;
        self.effect(
            async move { shim.keep_holder(limit).await },
            |driver, kept| match kept {
                Ok(()) => {
                    driver.holder_kept = true;
                    driver.publish();
                }
                // It dies with its shim.
                Err(error) => {
                    tracing::debug!(pod = %driver.id(), %error, "the holder is not kept");
                }
            },
        );
        let ids: Vec<_> = self.containers.keys().cloned().collect();
        for id in ids {
            self.take_custody(&id);
        }
    }

    /// Asks for what lets a running container outlive its shim.
    pub(crate) fn take_custody(&mut self, id: &ContainerId) {
        let (Some(shim), Some(container)) = (self.shim.clone(), self.containers.get(id)) else {
            return;
        };
        let running = matches!(container.state, ContainerState::Running { .. });
        if !shim.knows_adoption() || !running || container.end_noted || container.custody.is_some()
        {
            return;
        }
        let limit = self.ctx.settings.timeouts.shim_call;
        let (key, id) = (id.clone(), id.clone());
        self.effect(
            async move { shim.custody(&key, limit).await },
            move |driver, custody| match custody {
                Ok(custody) => {
                    if let Some(container) = driver.containers.get_mut(&id)
                        && !container.end_noted
                        && matches!(container.state, ContainerState::Running { .. })
                    {
                        container.custody = Some(custody);
                        driver.publish();
                    }
                }
                // It has ended.
                Err(error) => tracing::debug!(container = %id, %error, "not in custody"),
            },
        );
    }

    /// The shim has ended, unasked.
    pub(super) fn replace_shim(&mut self, lost: &Shim) {
        self.busy = Some(ADOPTING);
        self.adoption = Some(Adoption {
            began: Instant::now(),
            deferred: Vec::new(),
            disconnected: None,
        });
        let plan = Plan {
            ctx: Arc::clone(&self.ctx),
            facts: Arc::clone(&self.facts),
            mailbox: self.mailbox(),
            holder: self.recorded_holder(),
            adoptees: self.adoptees(lost),
        };
        let (activity, of) = (Arc::clone(&self.ctx.activity), Of::pod(&self.facts));
        self.effect(
            async move { activity.during("replace shim", of, carry_out(plan)).await },
            Self::finish_adoption,
        );
    }

    /// What is to go on; `Err` says why the pod does not.
    fn adoptees(&mut self, lost: &Shim) -> Result<Vec<Adoptee>, &'static str> {
        if self.ending() {
            return Err("the pod is being stopped");
        }
        if !self.state.is_ready() {
            return Err("the pod is not ready");
        }
        if !self.holder_kept {
            return Err("the holder ends with the shim");
        }
        self.adopted_at.retain(|at| at.elapsed() < WITHIN);
        if self.adopted_at.len() >= MAX_ADOPTIONS {
            return Err("its shims end again and again");
        }
        let asked = Asked::of(self.pod_config());
        let adoptees = self.containers.iter().filter_map(|(id, container)| {
            let ContainerState::Running {
                process,
                started_at,
            } = container.state
            else {
                return None;
            };
            // Its end is known.
            if container.end_noted || container.early_exit.is_some() {
                return None;
            }
            // Without it is lost; so it is when descriptors have run out.
            let custody = container.custody.as_ref()?.try_clone();
            let custody = custody.inspect_err(
                |error| tracing::error!(container = %id, %error, "custody cannot be handed on"),
            );
            let request = v1::Adopt {
                start: Some(start_request(&self.ctx, &container.facts, asked)),
                process: Some(process.into()),
                started_at,
                has: None,
                execs: lost.running_execs(id),
            };
            Some(Adoptee {
                request,
                custody: custody.ok()?,
            })
        });
        Ok(adoptees.collect())
    }

    fn finish_adoption(&mut self, outcome: Result<(Arc<Shim>, Vec<ContainerId>), String>) {
        self.busy = None;
        let Some(adoption) = self.adoption.take() else {
            return;
        };
        let (adopted, why) = match outcome {
            Ok((shim, adopted)) => {
                self.ctx
                    .activity
                    .shims
                    .adopted
                    .fetch_add(1, Ordering::Relaxed);
                let took = adoption.began.elapsed();
                let containers = adopted.len();
                tracing::warn!(pod = %self.id(), ?took, containers, "shim ended: another took over");
                self.adopted_at.push(Instant::now());
                self.status.shim_adoptions += 1;
                // The holder may have ended meanwhile.
                if let PodState::Ready { holder, .. } = self.state {
                    let shim = shim.process();
                    self.set_state(PodState::Ready { shim, holder });
                }
                self.shim = Some(shim);
                self.record_adoption();
                (adopted, "its shim ended")
            }
            Err(why) => {
                if self.state.is_ready() {
                    self.ctx.activity.shims.lost.fetch_add(1, Ordering::Relaxed);
                }
                tracing::warn!(pod = %self.id(), why, "shim ended: nobody takes over");
                self.lose(SHIM_ENDED);
                (Vec::new(), SHIM_ENDED)
            }
        };
        let lost: Vec<_> = self
            .containers
            .iter()
            .filter(|(id, container)| {
                // A start whose outcome is about to come looks for the shim itself.
                let over = container.end_noted || container.early_exit.is_some();
                container.state.may_stop() == Decision::Go && !over && !adopted.contains(id)
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in lost {
            self.container_lost(&id, why);
        }
        for request in adoption.deferred {
            self.request(request);
        }
        // News that came while nobody had this shim.
        if let Some(process) = self.shim.as_ref().map(|shim| shim.process()) {
            if !gantry_sys::process::alive(process) {
                self.shim_exited(process);
            } else if adoption.disconnected == Some(process) {
                self.disconnected(process);
            }
        }
    }

    fn record_adoption(&self) {
        let (ctx, id) = (Arc::clone(&self.ctx), self.id().clone());
        let status = self.status.clone();
        self.blocking(
            move || ctx.records.put_pod_status(&id, &status),
            |driver, outcome| {
                // Recovery finds the shim by its socket.
                if let Err(error) = outcome {
                    tracing::error!(pod = %driver.id(), %error, "adoption not recorded");
                }
                // What was seen of it is true after a restart too.
                driver.publish();
            },
        );
    }
}

/// Puts a new shim in place; after an error nothing of the pod's processes is left but what is in
/// its containers' cgroups.
async fn carry_out(plan: Plan) -> Result<(Arc<Shim>, Vec<ContainerId>), String> {
    let (ctx, facts) = (&plan.ctx, &plan.facts);
    let ended = teardown::end_runtime_calls(ctx, facts).await;
    let adopted = match (ended, plan.adoptees, plan.holder) {
        (Err(error), ..) => Err(error.to_string()),
        (_, Err(why), _) => Err(why.to_owned()),
        (.., None) => Err("no holder is on record".to_owned()),
        (Ok(()), Ok(adoptees), Some(holder)) => {
            let adopted = adopt(ctx, facts, plan.mailbox, holder, adoptees).await;
            adopted.map_err(|error| error.to_string())
        }
    };
    if adopted.is_err()
        && let Some(holder) = plan.holder
        && let Err(error) = teardown::end_holder(ctx, holder).await
    {
        tracing::error!(pod = %facts.id, %error, "holder of a lost pod");
    }
    adopted
}

async fn adopt(
    ctx: &Arc<Context>,
    facts: &Arc<PodFacts>,
    mailbox: mpsc::Sender<Msg>,
    holder: ProcessRef,
    adoptees: Vec<Adoptee>,
) -> Result<(Arc<Shim>, Vec<ContainerId>), Error> {
    failpoint::at("adoption::begun")?;
    let name = &facts.record.runtime_handler;
    let handler = ctx.settings.handler(name).ok_or_else(|| {
        Error::internal("adopt pod", format!("no runtime handler {name:?} any more"))
    })?;
    let mut bootstrap = run::bootstrap(ctx, facts, handler)?;
    bootstrap.adopt = Some(holder.into());
    let limit = ctx.settings.timeouts.shim_start;
    let started = spawn(&ctx.settings.shim, &facts.id, &bootstrap, limit);
    let ready = ctx
        .activity
        .during(run::START_SHIM, Of::pod(facts), started);
    let ready = ready.await?;
    let process = ready
        .shim
        .ok_or_else(|| Error::internal("start shim", "it told no process of its own"))?;
    let process = ProcessRef::from(process);
    let adopted = introduce(ctx, facts, mailbox, process, adoptees).await;
    if adopted.is_err() {
        // Nothing of the pod may be left to it, which it would take away in its own time.
        teardown::kill(process).map_err(|error| Error::internal("kill shim", error))?;
        teardown::wait_gone(process, ctx.settings.timeouts.kill).await;
    }
    adopted
}

/// Gives the pod's containers to its new shim.
async fn introduce(
    ctx: &Arc<Context>,
    facts: &Arc<PodFacts>,
    mailbox: mpsc::Sender<Msg>,
    process: ProcessRef,
    adoptees: Vec<Adoptee>,
) -> Result<(Arc<Shim>, Vec<ContainerId>), Error> {
    failpoint::at("adoption::spawned")?;
    run::place_shim(ctx, facts, process).await?;
    let socket = ctx.records.dirs.socket(&facts.id);
    let limit = ctx.settings.timeouts.shim_call;
    let (shim, _) = Shim::connect(&ctx.activity, &facts.id, &socket, limit, mailbox).await?;
    if !shim.knows_adoption() {
        let message = format!(
            "its shim is older than this daemon: protocol {}",
            shim.protocol()
        );
        return Err(Error::internal("adopt pod", message));
    }
    failpoint::at("adoption::connected")?;
    let mut adopted = Vec::new();
    for Adoptee { request, custody } in adoptees {
        let id = request
            .start
            .as_ref()
            .map(|start| start.container_id.parse());
        shim.adopt(request, custody, limit).await?;
        failpoint::at("adoption::container")?;
        adopted.extend(id.and_then(Result::ok));
    }
    Ok((shim, adopted))
}
