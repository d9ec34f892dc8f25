//! Records in both places: the store, which is flushed, and the run directory, from which the
//! store can be rebuilt.

use std::path::Path;
use std::sync::Arc;

use gantry_store::{Record, Store, record};
use gantry_types::{ContainerId, ContainerState, Exit, PodId, PodState, ProcessRef};

use crate::Error;
use crate::rundir::{self, RunDirs, RunRecord};

/// Blocks on the disk: call on a blocking thread.
#[derive(Clone, Debug)]
pub struct Records {
    pub store: Arc<Store>,
    pub dirs: RunDirs,
}

const FLUSH: &str = "flush record";

impl Records {
    /// The intent to make a pod: nothing of it exists before this returns.
    pub fn begin_pod(&self, id: &PodId, config: &record::PodConfig) -> Result<(), Error> {
        let dir = self.dirs.pod(id);
        rundir::make_dir(&dir).map_err(|error| Error::io("make run directory", &dir, &error))?;
        let status = record::PodStatus::default();
        rundir::write_record(&dir, config)?;
        rundir::write_record(&dir, &status)?;
        self.store
            .put_both(id.as_str(), config, &status)
            .map_err(Error::step(FLUSH))
    }

    pub fn put_pod_status(&self, id: &PodId, status: &record::PodStatus) -> Result<(), Error> {
        self.put_status(id.as_str(), &self.dirs.pod(id), status)
    }

    /// The last step of a pod's removal.
    pub fn forget_pod(&self, id: &PodId) -> Result<(), Error> {
        self.forget::<record::PodConfig, record::PodStatus>(id.as_str(), &self.dirs.pod(id))
    }

    pub fn begin_container(
        &self,
        id: &ContainerId,
        config: &record::ContainerConfig,
        status: &record::ContainerStatus,
    ) -> Result<(), Error> {
        let dir = self.dirs.container(id);
        rundir::make_dir(&dir).map_err(|error| Error::io("make run directory", &dir, &error))?;
        rundir::write_record(&dir, config)?;
        rundir::write_record(&dir, status)?;
        self.store
            .put_both(id.as_str(), config, status)
            .map_err(Error::step(FLUSH))
    }

    pub fn put_container_status(
        &self,
        id: &ContainerId,
        status: &record::ContainerStatus,
    ) -> Result<(), Error> {
        self.put_status(id.as_str(), &self.dirs.container(id), status)
    }

    pub fn forget_container(&self, id: &ContainerId) -> Result<(), Error> {
        let dir = self.dirs.container(id);
        self.forget::<record::ContainerConfig, record::ContainerStatus>(id.as_str(), &dir)
    }

    /// Both copies, each whether or not the other's disk is full: recovery takes the one that is
    /// further on.
    fn put_status<S: Record + RunRecord>(
        &self,
        id: &str,
        dir: &Path,
        status: &S,
    ) -> Result<(), Error> {
        let stored = self.store.put(id, status).map_err(Error::step(FLUSH));
        // After a reboot there is no run directory, and nothing to rebuild from it.
        let copied = if dir.exists() {
            rundir::write_record(dir, status)
        } else {
            Ok(())
        };
        stored.and(copied)
    }

    /// The directory goes first: alone it would be taken for what a damaged store has lost.
    fn forget<C: Record + RunRecord, S: Record + RunRecord>(
        &self,
        id: &str,
        dir: &Path,
    ) -> Result<(), Error> {
        let copies = (rundir::read_record::<C>(dir), rundir::read_record::<S>(dir));
        rundir::remove_dir(dir)?;
        let removed = self
            .store
            .remove_both::<S, C>(id)
            .map_err(Error::step(FLUSH));
        if let (Err(_), (Some(config), Some(status))) = (&removed, copies) {
            // It stays, and a store that takes nothing may not know how it has ended.
            let put_back = rundir::make_dir(dir)
                .map_err(|error| Error::io("make run directory", dir, &error))
                .and_then(|()| rundir::write_record(dir, &config))
                .and_then(|()| rundir::write_record(dir, &status));
            if let Err(error) = put_back {
                tracing::error!(id, %error, "records of what could not be removed are lost");
            }
        }
        removed
    }
}

fn process_record(process: ProcessRef) -> record::ProcessRef {
    record::ProcessRef {
        pid: process.pid,
        start_time: process.start_time,
    }
}

fn process_ref(process: Option<record::ProcessRef>) -> ProcessRef {
    let process = process.unwrap_or_default();
    ProcessRef {
        pid: process.pid,
        start_time: process.start_time,
    }
}

/// Writes a pod's state into its status record.
pub fn set_pod_state(status: &mut record::PodStatus, state: &PodState) {
    match state {
        PodState::Creating => status.phase = record::PodPhase::Creating.into(),
        PodState::Ready { shim, holder } => {
            status.phase = record::PodPhase::Ready.into();
            status.shim = Some(process_record(*shim));
            status.holder = Some(process_record(*holder));
        }
        PodState::NotReady { reason } => {
            status.phase = record::PodPhase::NotReady.into();
            status.reason.clone_from(reason);
        }
    }
}

pub fn pod_state(status: &record::PodStatus) -> PodState {
    match status.phase() {
        record::PodPhase::Creating => PodState::Creating,
        record::PodPhase::Ready => PodState::Ready {
            shim: process_ref(status.shim),
            holder: process_ref(status.holder),
        },
        record::PodPhase::NotReady => PodState::NotReady {
            reason: status.reason.clone(),
        },
    }
}

/// Writes a container's state into its status record.
pub fn set_container_state(status: &mut record::ContainerStatus, state: &ContainerState) {
    use record::ContainerPhase as Phase;
    match state {
        ContainerState::Creating => status.phase = Phase::Creating.into(),
        ContainerState::Created => status.phase = Phase::Created.into(),
        ContainerState::Running {
            process,
            started_at,
        } => {
            status.phase = Phase::Running.into();
            status.process = Some(process_record(*process));
            status.started_at = *started_at;
        }
        ContainerState::Exited { exit, started_at } => {
            status.phase = Phase::Exited.into();
            status.started_at = *started_at;
            status.finished_at = exit.finished_at;
            status.exit_code = exit.code;
            status.oom_killed = exit.oom_killed;
            status.reason.clone_from(&exit.reason);
            status.message.clone_from(&exit.message);
        }
        ContainerState::Unknown { why } => {
            status.phase = Phase::Unknown.into();
            status.message.clone_from(why);
        }
    }
}

pub fn container_state(status: &record::ContainerStatus) -> ContainerState {
    use record::ContainerPhase as Phase;
    match status.phase() {
        Phase::Creating => ContainerState::Creating,
        Phase::Created => ContainerState::Created,
        Phase::Running => ContainerState::Running {
            process: process_ref(status.process),
            started_at: status.started_at,
        },
        Phase::Exited => ContainerState::Exited {
            exit: Exit {
                code: status.exit_code,
                finished_at: status.finished_at,
                oom_killed: status.oom_killed,
                reason: status.reason.clone(),
                message: status.message.clone(),
            },
            started_at: status.started_at,
        },
        Phase::Unknown => ContainerState::Unknown {
            why: status.message.clone(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_survive_the_way_through_a_record() {
        let process = ProcessRef {
            pid: 7,
            start_time: 99,
        };
        let exit = Exit {
            code: 137,
            finished_at: 5,
            oom_killed: true,
            reason: "r".into(),
            message: "m".into(),
        };
        for state in [
            ContainerState::Creating,
            ContainerState::Created,
            ContainerState::Running {
                process,
                started_at: 3,
            },
            ContainerState::Exited {
                exit,
                started_at: 3,
            },
            ContainerState::Unknown { why: "lost".into() },
        ] {
            let mut status = record::ContainerStatus::default();
            set_container_state(&mut status, &state);
            assert_eq!(container_state(&status), state);
        }
        for state in [
            PodState::Creating,
            PodState::Ready {
                shim: process,
                holder: process,
            },
            PodState::NotReady {
                reason: "stopped".into(),
            },
        ] {
            let mut status = record::PodStatus::default();
            set_pod_state(&mut status, &state);
            assert_eq!(pod_state(&status), state);
        }
    }
}
