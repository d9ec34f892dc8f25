//! OOM scores (proc_pid_oom_score_adj(5)).

use std::io;

fn current() -> i32 {
    std::fs::read_to_string("/proc/self/oom_score_adj")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// What an OCI spec may ask for: without CAP_SYS_RESOURCE nobody can go below the score that we
/// run with, and an OCI runtime that must write a lower one fails the container.
pub fn clamp_oom_score_adj(wanted: i32) -> i32 {
    let wanted = wanted.clamp(-1000, 1000);
    if crate::caps::has_sys_resource() {
        wanted
    } else {
        wanted.max(current())
    }
}

/// Sets the OOM score of `pid`, raised to what the kernel lets us write. Returns what was set.
pub fn set_oom_score_adj(pid: i32, wanted: i32) -> io::Result<i32> {
    let path = format!("/proc/{pid}/oom_score_adj");
    let value = clamp_oom_score_adj(wanted);
    match std::fs::write(&path, value.to_string()) {
        // A user namespace can take the capability's effect away though we seem to have it.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            let value = value.max(current());
            std::fs::write(&path, value.to_string())?;
            Ok(value)
        }
        result => result.map(|()| value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clamped_score_can_be_written() {
        let me = std::process::id() as i32;
        let set = set_oom_score_adj(me, -1000).unwrap();
        assert_eq!(current(), set);
        assert!(clamp_oom_score_adj(5000) == 1000);
    }
}
