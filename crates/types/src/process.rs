//! A process as we may refer to it later, and how one ended.

/// A process named so that a recycled pid is never mistaken for it: pid plus the start time that
/// the kernel gives (`/proc/PID/stat` field 22, clock ticks since boot). Both mean anything only
/// within one boot; whoever stores this stores the boot id beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProcessRef {
    pub pid: i32,
    pub start_time: u64,
}

/// How a container's first process ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exit {
    /// Exit code; 128 + n after signal n.
    pub code: i32,
    /// Nanoseconds since the epoch.
    pub finished_at: i64,
    /// The kernel's OOM killer struck the container's cgroup and the process died of SIGKILL.
    pub oom_killed: bool,
    /// Why, where the code does not say it: `StartError`, `Unknown`; empty otherwise.
    pub reason: String,
    /// Text for people; the runtime's own message after a failed start.
    pub message: String,
}

impl Exit {
    /// `reason` of a container that could not be started.
    pub const START_ERROR: &str = "StartError";
    /// `reason` of a container whose real exit nobody could see.
    pub const UNKNOWN: &str = "Unknown";

    /// The reason as CRI reports it: what was recorded, else derived from the code.
    pub fn cri_reason(&self) -> &str {
        if !self.reason.is_empty() {
            &self.reason
        } else if self.oom_killed {
            "OOMKilled"
        } else if self.code == 0 {
            "Completed"
        } else {
            "Error"
        }
    }
}
