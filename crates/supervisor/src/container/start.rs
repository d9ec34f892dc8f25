//! StartContainer: the runtime's create and start, so that a bad command fails here.

use std::sync::Arc;
use std::time::Duration;

use gantry_shim_api::v1::{self, request};
use gantry_types::{ContainerId, ContainerState, Decision, ErrorKind, Exit, ProcessRef};
use tokio::time::Instant;

use crate::activity::Of;
use crate::clock::now_ns;
use crate::pod::{Asked, Driver, Reply, SHIM_ENDED, blocking};
use crate::registry::ContainerFacts;
use crate::shim::Shim;
use crate::{Context, Error};

pub(super) const STARTING: &str = "starting";

/// Exit code of a container whose start failed, as Docker and containerd report it.
const START_FAILED: i32 = 128;

impl Driver {
    pub(super) fn start(&mut self, id: &ContainerId, reply: Reply<()>) {
        let shim = self.shim.clone();
        let asked = Asked::of(self.pod_config());
        let ending = self.ending();
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        match container.state.may_start(&self.state) {
            Decision::Done => {
                let _ = reply.send(Ok(()));
                return;
            }
            Decision::Deny(reason) => {
                let _ = reply.send(Err(container.denied(reason)));
                return;
            }
            // It may have waited in the queue while the pod was asked to stop.
            Decision::Go if ending => {
                let _ = reply.send(Err(container.denied("the pod sandbox is being stopped")));
                return;
            }
            Decision::Go => {}
        }
        let Some(shim) = shim else {
            let _ = reply.send(Err(self.no_shim()));
            return;
        };
        container.busy = Some(STARTING);
        let facts = Arc::clone(&container.facts);
        let body = start_request(&self.ctx, &facts, asked);
        let process = shim.process();
        let ctx = Arc::clone(&self.ctx);
        let base = container.status.clone();
        let step = ctx
            .activity
            .begin("start container", Of::container(&self.facts, id));
        let key = id.clone();
        let id = id.clone();
        self.effect(
            async move {
                // The shim gives up first, and says why.
                let limit = ctx.settings.timeouts.runtime * 2;
                let started = shim
                    .started(request::Body::Start(body), Vec::new(), limit)
                    .await
                    .map(|(process, _)| process);
                let mut adopted = false;
                let started = match started {
                    // An earlier daemon asked, and died before it learnt the outcome.
                    Err(Error::Failed {
                        kind: ErrorKind::AlreadyExists,
                        ..
                    }) => {
                        adopted = true;
                        outcome_of_earlier_start(&shim, &key, limit).await
                    }
                    started => started,
                };
                let state = after_start(&started);
                let mut status = base;
                crate::records::set_container_state(&mut status, &state);
                let copy = status.clone();
                let recorded =
                    blocking(move || ctx.records.put_container_status(&key, &copy)).await;
                step.end(started.is_ok() && recorded.is_ok());
                (started, status, recorded, adopted)
            },
            move |driver, (started, status, recorded, adopted)| {
                driver.finish_start(&id, process, (started, status, recorded), reply);
                if adopted {
                    // Its exit may have been told to nobody.
                    driver.resynchronise();
                }
            },
        );
    }

    /// Joins a start that is under way in the shim, so that its outcome is recorded.
    pub(crate) fn finish_earlier_start(&mut self, id: &ContainerId) {
        if self.containers.contains_key(id) {
            let (reply, _nobody) = crate::pod::reply();
            self.start(id, reply);
        }
    }

    fn finish_start(
        &mut self,
        id: &ContainerId,
        asked: ProcessRef,
        (started, status, recorded): Outcome,
        reply: Reply<()>,
    ) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.busy = None;
        container.set_status(status);
        let early_exit = container.early_exit.take();
        let runs = container.state.may_stop() == Decision::Go;
        self.publish();
        let outcome = match started {
            Ok(_) => recorded,
            Err(Error::Failed { message, kind, .. }) => Err(Error::Failed {
                step: "start container",
                kind,
                message,
            }),
            Err(error) => Err(error),
        };
        let _ = reply.send(outcome);
        if let Some(exit) = early_exit {
            self.exited(id, exit);
        } else if runs && !self.adopting() && !self.has_shim(asked) {
            // The news of the shim's end came first, when there was nothing to be lost yet.
            self.container_lost(id, SHIM_ENDED);
        } else {
            self.take_custody(id);
        }
    }
}

/// What became of a start: the process, the status that says so, and whether that is on record.
type Outcome = (
    Result<ProcessRef, Error>,
    gantry_store::record::ContainerStatus,
    Result<(), Error>,
);

/// What the shim needs to know of a container, whether it starts it or takes it over.
pub(crate) fn start_request(ctx: &Context, facts: &ContainerFacts, asked: Asked) -> v1::Start {
    let config = &facts.config;
    let bundle = ctx.records.dirs.container(&facts.id);
    v1::Start {
        container_id: facts.id.to_string(),
        bundle: bundle.to_string_lossy().into_owned(),
        log_path: facts.record.log_path.clone(),
        tty: config.tty,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        oom_file: facts.record.oom_file.clone(),
        cgroup_dir: facts.record.cgroup_dir.clone(),
        // The end of a PID namespace's first process ends all others by itself.
        kill_cgroup_on_exit: !super::resolve::own_pid_namespace(config, asked),
    }
}

/// Waits for the end of a start that is under way in the shim.
async fn outcome_of_earlier_start(
    shim: &Shim,
    id: &ContainerId,
    limit: Duration,
) -> Result<ProcessRef, Error> {
    let deadline = Instant::now() + limit;
    loop {
        let state = shim.state(limit).await?;
        let seen = state
            .containers
            .into_iter()
            .find(|seen| seen.id == id.as_str());
        match seen.map(|seen| seen.process) {
            Some(Some(process)) => {
                return Ok(ProcessRef {
                    pid: process.pid,
                    start_time: process.start_time,
                });
            }
            None => {
                return Err(Error::internal(
                    "start container",
                    "an earlier start has failed",
                ));
            }
            Some(None) if Instant::now() >= deadline => {
                return Err(Error::Deadline {
                    what: format!("start of container {id}"),
                    seconds: limit.as_secs(),
                });
            }
            Some(None) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// The state that the outcome of a start leads to.
fn after_start(started: &Result<ProcessRef, Error>) -> ContainerState {
    let failed = |message: String| ContainerState::Exited {
        exit: Exit {
            code: START_FAILED,
            finished_at: now_ns(),
            oom_killed: false,
            reason: Exit::START_ERROR.to_owned(),
            message,
        },
        started_at: 0,
    };
    match started {
        Ok(process) => ContainerState::Running {
            process: *process,
            started_at: now_ns(),
        },
        // The shim may have started it and died before it could say so.
        Err(Error::Shim { reason, .. }) => ContainerState::Unknown {
            why: reason.clone(),
        },
        Err(Error::Failed { message, .. }) => failed(message.clone()),
        Err(error) => failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_start_is_an_exit_and_a_lost_shim_is_not() {
        let refused = Err(Error::Failed {
            step: "shim",
            kind: gantry_types::ErrorKind::Unknown,
            message: "exec: \"nope\": executable file not found".into(),
        });
        match after_start(&refused) {
            ContainerState::Exited {
                exit,
                started_at: 0,
            } => {
                assert_eq!((exit.code, exit.cri_reason()), (128, "StartError"));
                assert!(exit.message.contains("nope"));
            }
            other => panic!("{other:?}"),
        }
        let lost = Err(Error::Shim {
            pod: "p".into(),
            reason: "gone".into(),
        });
        assert!(matches!(after_start(&lost), ContainerState::Unknown { .. }));
    }
}
