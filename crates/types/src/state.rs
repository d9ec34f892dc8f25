//! The states of pods and containers, and what each allows.
//!
//! ```text
//! pod:        Creating ──► Ready ──► NotReady          removed from any state but Creating;
//!                │                       ▲             a half-made pod is undone or, when the
//!                └───────────────────────┘             undo fails, NotReady
//!
//! container:  Creating ──► Created ──► Running ──► Exited
//!                             │                      ▲  ▲
//!                             └──────────────────────┘  │ (start failed: 128, StartError)
//!                          Unknown ─────────────────────┘ (stop kills by cgroup)
//! ```
//!
//! A state carries its data, so that an impossible mix cannot be written. What is in flight
//! (starting, stopping, removing) is not state: it lives in the pod's driver and dies with it.
//! The kubelet repeats everything, so start, stop and remove of what is already so are `Done`.

use crate::{Exit, ProcessRef};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodState {
    /// Being made: no reply was sent. Listed as not ready.
    Creating,
    Ready {
        shim: ProcessRef,
        holder: ProcessRef,
    },
    NotReady {
        reason: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContainerState {
    /// Being made: no reply was sent. Not listed.
    Creating,
    Created,
    /// `started_at` in nanoseconds since the epoch.
    Running {
        process: ProcessRef,
        started_at: i64,
    },
    /// `started_at` is 0 when it never ran.
    Exited {
        exit: Exit,
        started_at: i64,
    },
    /// Neither the kernel nor the shim could say.
    Unknown {
        why: String,
    },
}

/// What a request may do in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Go,
    /// Already so: answer success.
    Done,
    Deny(&'static str),
}

impl PodState {
    pub fn is_ready(&self) -> bool {
        matches!(self, PodState::Ready { .. })
    }

    pub fn may_create_container(&self) -> Decision {
        match self {
            PodState::Ready { .. } => Decision::Go,
            PodState::Creating => Decision::Deny("the pod sandbox is still being made"),
            PodState::NotReady { .. } => Decision::Deny("the pod sandbox is not ready"),
        }
    }
}

impl ContainerState {
    pub fn name(&self) -> &'static str {
        match self {
            ContainerState::Creating => "creating",
            ContainerState::Created => "created",
            ContainerState::Running { .. } => "running",
            ContainerState::Exited { .. } => "exited",
            ContainerState::Unknown { .. } => "unknown",
        }
    }

    pub fn may_start(&self, pod: &PodState) -> Decision {
        match self {
            ContainerState::Running { .. } => Decision::Done,
            ContainerState::Created if pod.is_ready() => Decision::Go,
            ContainerState::Created => Decision::Deny("the pod sandbox is not ready"),
            ContainerState::Creating => Decision::Deny("the container is still being made"),
            ContainerState::Exited { .. } => Decision::Deny("the container has exited"),
            ContainerState::Unknown { .. } => Decision::Deny("the container's state is unknown"),
        }
    }

    pub fn may_stop(&self) -> Decision {
        match self {
            ContainerState::Running { .. } | ContainerState::Unknown { .. } => Decision::Go,
            ContainerState::Creating | ContainerState::Created | ContainerState::Exited { .. } => {
                Decision::Done
            }
        }
    }

    /// For what needs the first process: exec, attach, log reopen.
    pub fn must_run(&self) -> Decision {
        match self {
            ContainerState::Running { .. } => Decision::Go,
            ContainerState::Creating
            | ContainerState::Created
            | ContainerState::Exited { .. }
            | ContainerState::Unknown { .. } => Decision::Deny("the container is not running"),
        }
    }

    pub fn may_update(&self) -> Decision {
        match self {
            ContainerState::Created | ContainerState::Running { .. } => Decision::Go,
            ContainerState::Creating => Decision::Deny("the container is still being made"),
            ContainerState::Exited { .. } => Decision::Deny("the container has exited"),
            ContainerState::Unknown { .. } => Decision::Deny("the container's state is unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containers() -> Vec<ContainerState> {
        let process = ProcessRef {
            pid: 7,
            start_time: 9,
        };
        let exit = Exit {
            code: 0,
            finished_at: 1,
            oom_killed: false,
            reason: String::new(),
            message: String::new(),
        };
        vec![
            ContainerState::Creating,
            ContainerState::Created,
            ContainerState::Running {
                process,
                started_at: 1,
            },
            ContainerState::Exited {
                exit,
                started_at: 1,
            },
            ContainerState::Unknown { why: String::new() },
        ]
    }

    /// One letter a state, in the order of `containers`: Go, Done, deNied.
    fn row(decide: impl Fn(&ContainerState) -> Decision) -> String {
        let letter = |decision| match decision {
            Decision::Go => 'G',
            Decision::Done => 'D',
            Decision::Deny(_) => 'N',
        };
        containers()
            .iter()
            .map(|state| letter(decide(state)))
            .collect()
    }

    #[test]
    fn what_each_container_state_allows() {
        let process = ProcessRef {
            pid: 1,
            start_time: 1,
        };
        let ready = PodState::Ready {
            shim: process,
            holder: process,
        };
        let stopped = PodState::NotReady {
            reason: String::new(),
        };
        assert_eq!(row(|c| c.may_start(&ready)), "NGDNN");
        assert_eq!(row(|c| c.may_start(&stopped)), "NNDNN");
        assert_eq!(row(ContainerState::may_stop), "DDGDG");
        assert_eq!(row(ContainerState::must_run), "NNGNN");
        assert_eq!(row(ContainerState::may_update), "NGGNN");
    }

    #[test]
    fn only_a_ready_pod_takes_containers() {
        let process = ProcessRef {
            pid: 1,
            start_time: 1,
        };
        assert_eq!(
            PodState::Ready {
                shim: process,
                holder: process
            }
            .may_create_container(),
            Decision::Go
        );
        assert!(matches!(
            PodState::Creating.may_create_container(),
            Decision::Deny(_)
        ));
        let stopped = PodState::NotReady {
            reason: String::new(),
        };
        assert!(matches!(stopped.may_create_container(), Decision::Deny(_)));
    }
}
