//! StopContainer, RemoveContainer, and what an exit does.
//!
//! ```text
//! wish ──► stop signal ──deadline──► SIGKILL ──kill limit──► kill by cgroup ──► give up
//!             (once)        ▲ a second Stop with a shorter grace moves the deadline nearer
//! ```
//!
//! A Stop whose every caller has gone before its deadline ends there: the signal was sent, and
//! nobody is left who asked for SIGKILL.

use std::sync::Arc;
use std::time::Duration;

use gantry_shim_api::v1::{self, request};
use gantry_sys::signal::SIGKILL;
use gantry_types::{ContainerId, ContainerState, Decision, Exit};
use tokio::time::Instant;

use super::Container;
use crate::activity::{Of, Step};
use crate::clock::now_ns;
use crate::pod::{
    Driver, Reply, answer, blocking, delete_from_runtime, kill_cgroup, remove_container_cgroup,
    remove_state,
};
use crate::{Context, Error, failpoint};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Wished,
    Signalled,
    Killed {
        since: Instant,
    },
    /// By cgroup, from here: the shim did not or could not.
    CgroupKill,
}

pub(crate) struct StopWish {
    deadline: Instant,
    pub(super) waiters: Vec<Reply<()>>,
    /// The pod or a removal wants it, whoever else has gone.
    forced: bool,
    stage: Stage,
    /// The deadline for which a timer runs: one each, however often the pod is spoken to meanwhile.
    timer: Option<Instant>,
    /// Under way, once its first step is taken.
    pub(super) step: Option<Step>,
}

impl Container {
    /// Wishes the container stopped by `deadline`; repeats join, the nearest deadline wins.
    pub(crate) fn wish_stop(&mut self, deadline: Instant, waiter: Option<Reply<()>>) {
        let wish = self.stop.get_or_insert_with(|| StopWish {
            deadline,
            waiters: Vec::new(),
            forced: false,
            stage: Stage::Wished,
            timer: None,
            step: None,
        });
        wish.deadline = wish.deadline.min(deadline);
        match waiter {
            Some(waiter) => wish.waiters.push(waiter),
            None => wish.forced = true,
        }
        self.kill_failed = false;
    }
}

impl StopWish {
    fn wanted(&self) -> bool {
        self.forced || self.waiters.iter().any(|waiter| !waiter.is_closed())
    }
}

impl Driver {
    /// Takes the next step of a stop, if it is due.
    pub(super) fn drive_stop(&mut self, id: &ContainerId) {
        let (activity, of) = (&self.ctx.activity, Of::container(&self.facts, id));
        let now = Instant::now();
        let kill_limit = self.ctx.settings.timeouts.kill;
        let has_shim = self.shim.is_some();
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let signal = container.facts.record.stop_signal;
        let Some(wish) = container.stop.as_mut() else {
            return;
        };
        let begin = || activity.begin("stop container", of);
        let step = wish.step.get_or_insert_with(begin);
        // After its grace the first SIGKILL has this long. A grace may have no end that a clock has.
        if let Some(end) = wish.deadline.checked_add(kill_limit) {
            step.may_last_until(end.into_std());
        }
        let due = now >= wish.deadline;
        match wish.stage {
            Stage::CgroupKill => {}
            // Nobody to send signals for us, or nobody who knows the process.
            _ if !has_shim || matches!(container.state, ContainerState::Unknown { .. }) => {
                wish.stage = Stage::CgroupKill;
                self.kill_by_cgroup(id);
            }
            Stage::Killed { since } if now >= since + kill_limit => {
                wish.stage = Stage::CgroupKill;
                self.kill_by_cgroup(id);
            }
            Stage::Killed { .. } => {}
            Stage::Wished | Stage::Signalled if due && !wish.wanted() => container.stop = None,
            Stage::Wished | Stage::Signalled if due => {
                wish.stage = Stage::Killed { since: now };
                self.signal(id, SIGKILL);
                self.look_again(id, kill_limit);
            }
            Stage::Wished => {
                wish.stage = Stage::Signalled;
                wish.timer = Some(wish.deadline);
                let grace = wish.deadline - now;
                self.signal(id, signal);
                self.look_again(id, grace);
            }
            Stage::Signalled if wish.timer == Some(wish.deadline) => {}
            Stage::Signalled => {
                wish.timer = Some(wish.deadline);
                let left = wish.deadline - now;
                self.look_again(id, left);
            }
        }
    }

    /// `advance` runs after every message: an empty one is enough.
    fn look_again(&self, id: &ContainerId, after: Duration) {
        let id = id.clone();
        let mailbox = self.mailbox();
        let wait = async move {
            tokio::select! {
                () = tokio::time::sleep(after) => {}
                // The pod is gone: a grace of hours must not outlive it.
                () = mailbox.closed() => {}
            }
        };
        // Nobody's: a grace of hours must not keep the call's span open.
        let span = tracing::Span::none();
        self.effect_of(span, wait, move |driver, ()| driver.advance_container(&id));
    }

    fn signal(&self, id: &ContainerId, signal: i32) {
        let Some(shim) = self.shim.clone() else {
            return;
        };
        let limit = self.ctx.settings.timeouts.shim_call;
        let body = v1::Signal {
            container_id: id.to_string(),
            signal,
            // What outlives the first process in a shared PID namespace is killed by the shim
            // when that has ended.
            all: false,
        };
        let id = id.clone();
        let process = shim.process();
        self.effect(
            async move { shim.done(request::Body::Signal(body), limit).await },
            move |driver, outcome| {
                // It may have ended by itself; the exit event tells. A shim that does not answer
                // is found out at the deadline.
                let Err(error) = outcome else { return };
                tracing::debug!(container = %id, signal, %error, "signal");
                let wish = driver.containers.get_mut(&id);
                let wish = wish.and_then(|container| container.stop.as_mut());
                if let Some(wish) = wish
                    && matches!(wish.stage, Stage::Signalled | Stage::Killed { .. })
                    && !gantry_sys::process::alive(process)
                {
                    // The next shim is to send it.
                    wish.stage = Stage::Wished;
                }
            },
        );
    }

    fn kill_by_cgroup(&mut self, id: &ContainerId) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.busy = Some("killing");
        let (ctx, facts) = (Arc::clone(&self.ctx), Arc::clone(&container.facts));
        let id = id.clone();
        self.blocking(
            move || kill_cgroup(facts.record.cgroup_dir.as_ref(), ctx.settings.timeouts.kill),
            move |driver, outcome| {
                let Some(container) = driver.containers.get_mut(&id) else {
                    return;
                };
                container.busy = None;
                match outcome {
                    Ok(()) => driver.container_lost(&id, "killed by cgroup"),
                    Err(error) => {
                        let waiters = container.stop.take().map(|wish| wish.waiters);
                        container.kill_failed = true;
                        answer(waiters.unwrap_or_default(), &Err(error.clone()));
                        answer(
                            container.remove.take().unwrap_or_default(),
                            &Err(error.clone()),
                        );
                        driver.give_up_stop(&error);
                    }
                }
            },
        );
    }

    /// The shim saw a container's first process end.
    pub(crate) fn container_exited(&mut self, id: &ContainerId, exit: &v1::ExitRecord) {
        let exit = Exit {
            code: exit.code,
            finished_at: exit.finished_at,
            oom_killed: exit.oom_killed,
            ..unknown_exit(exit.unknown)
        };
        self.exited(id, exit);
    }

    /// Nobody saw a container's end: the shim's record tells if there is one.
    pub(crate) fn container_lost(&mut self, id: &ContainerId, why: &'static str) {
        let ctx = Arc::clone(&self.ctx);
        let Some(container) = self.containers.get(id) else {
            return;
        };
        let facts = Arc::clone(&container.facts);
        let id = id.clone();
        self.effect(
            async move { lost_exit(&ctx, facts, why).await },
            move |driver, exit| driver.exited(&id, exit),
        );
    }

    pub(super) fn exited(&mut self, id: &ContainerId, exit: Exit) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if container.end_noted {
            return;
        }
        let started_at = match &container.state {
            // The update's record, written beside ours, would say that it runs.
            ContainerState::Running { .. } if container.busy == Some(super::update::UPDATING) => {
                container.early_exit = Some(exit);
                return;
            }
            ContainerState::Running { started_at, .. } => *started_at,
            ContainerState::Unknown { .. } => container.status.started_at,
            // The event overtook the outcome of the start, which looks here.
            ContainerState::Created if container.busy == Some(super::start::STARTING) => {
                container.early_exit = Some(exit);
                return;
            }
            // An earlier daemon had it started, and died before it learnt so.
            ContainerState::Created => 0,
            ContainerState::Creating | ContainerState::Exited { .. } => return,
        };
        container.end_noted = true;
        container.custody = None;
        // We note a start when its answer arrives; a short command has ended by then.
        let started_at = started_at.min(exit.finished_at);
        let state = ContainerState::Exited { exit, started_at };
        self.record_container(id, &state, |driver, id| driver.unmount_root(id));
    }

    /// A dead container needs no root mount; its removal would do the same later.
    fn unmount_root(&mut self, id: &ContainerId) {
        let (ctx, key) = (Arc::clone(&self.ctx), id.clone());
        let id = id.clone();
        self.blocking(
            move || super::unmount(&ctx, &key),
            move |_, outcome| {
                if let Err(error) = outcome {
                    tracing::warn!(container = %id, %error, "root of a dead container");
                }
            },
        );
    }

    pub(super) fn begin_remove(&mut self, id: &ContainerId) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        debug_assert_ne!(container.state.may_stop(), Decision::Go);
        container.busy = Some("removing");
        let ctx = Arc::clone(&self.ctx);
        let shim = self.shim.clone();
        let handler = self.facts.record.runtime_handler.clone();
        let cgroup = std::path::PathBuf::from(&container.facts.record.cgroup_dir);
        let key = id.clone();
        let id = id.clone();
        let step = ctx
            .activity
            .begin("remove container", Of::container(&self.facts, &id));
        self.effect(
            async move {
                let removal = async {
                    let body = v1::Delete {
                        container_id: key.to_string(),
                    };
                    let limit = ctx.settings.timeouts.runtime;
                    if let Some(shim) = shim {
                        shim.done(request::Body::Delete(body), limit).await?;
                    }
                    // What the shim never knew, because another had started it; nothing else.
                    delete_from_runtime(&ctx, &handler, &key).await?;
                    let state = ctx.settings.handler(&handler);
                    let state = state.map(|handler| handler.root.join(key.as_str()));
                    blocking(move || {
                        state.as_deref().map_or(Ok(()), remove_state)?;
                        remove_container_cgroup(&ctx, &cgroup)?;
                        remove_files(&ctx, &key)
                    })
                    .await
                };
                let removed = removal.await;
                step.end(removed.is_ok());
                removed
            },
            move |driver, outcome| {
                let Some(container) = driver.containers.get_mut(&id) else {
                    return;
                };
                container.busy = None;
                answer(container.remove.take().unwrap_or_default(), &outcome);
                match outcome {
                    Ok(()) => {
                        let facts = Arc::clone(&container.facts);
                        driver.drop_container(&id);
                        driver.publish();
                        driver.ctx.layers_freed(&facts.record);
                    }
                    Err(error) => driver.give_up_removal(&error),
                }
            },
        );
    }
}

/// The exit of a container whose shim is gone: as the shim wrote it, else what we can say after
/// killing whatever is left of it.
pub(crate) async fn lost_exit(
    ctx: &Arc<Context>,
    facts: Arc<crate::registry::ContainerFacts>,
    why: &'static str,
) -> Exit {
    let dir = ctx.records.dirs.container(&facts.id);
    let limit = ctx.settings.timeouts.kill;
    let outcome = blocking(move || {
        kill_cgroup(facts.record.cgroup_dir.as_ref(), limit)?;
        Ok(read_exit(&dir))
    })
    .await;
    match outcome {
        Ok(Some(exit)) => exit,
        Ok(None) => Exit {
            code: 128 + SIGKILL,
            finished_at: now_ns(),
            oom_killed: false,
            reason: Exit::UNKNOWN.to_owned(),
            message: why.to_owned(),
        },
        Err(error) => Exit {
            code: 255,
            finished_at: now_ns(),
            oom_killed: false,
            reason: Exit::UNKNOWN.to_owned(),
            message: format!("{why}; {error}"),
        },
    }
}

/// What is told of an exit whose code the shim could not learn; nothing of any other.
pub(crate) fn unknown_exit(unknown: bool) -> Exit {
    let mut exit = Exit::default();
    if unknown {
        exit.reason = Exit::UNKNOWN.to_owned();
        exit.message = "its shim had died, and this kernel tells nobody else the code".to_owned();
    }
    exit
}

/// The exit record that a shim left in the bundle.
pub(crate) fn read_exit(bundle: &std::path::Path) -> Option<Exit> {
    use prost::Message;
    let path = bundle.join("exit");
    let bytes = std::fs::read(&path).ok()?;
    match v1::ExitRecord::decode(bytes.as_slice()) {
        Ok(record) => Some(Exit {
            code: record.code,
            finished_at: record.finished_at,
            oom_killed: record.oom_killed,
            ..unknown_exit(record.unknown)
        }),
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "exit record cannot be read");
            None
        }
    }
}

/// Mounts, snapshot, run directory and records, in this order: the record goes last.
pub(crate) fn remove_files(ctx: &Context, id: &ContainerId) -> Result<(), Error> {
    super::unmount(ctx, id)?;
    failpoint::at("root::unmounted")?;
    // Of all that there are: which made it is only in the record, and handlers change theirs.
    for snapshotter in ctx.snapshotters.iter() {
        let removed = snapshotter.remove(id);
        removed.map_err(Error::step("remove container"))?;
    }
    failpoint::at("root::removed")?;
    ctx.records.forget_container(id)
}
