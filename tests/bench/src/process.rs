//! The runtime's processes, as `/proc` shows them. The bench runs in a PID namespace of its own,
//! so whatever is there and is not the bench belongs to a runtime or to a container.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

/// What a program is to the runtime that started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Daemon,
    /// Whatever the runtime keeps running for a pod beside the workload: shim, holder, pause.
    PerPod,
}

/// The program's runtime and role; `None` for workloads and for the bench itself.
fn role(program: &str) -> Option<(&'static str, Role)> {
    Some(match program {
        "gantryd" => ("gantry", Role::Daemon),
        "gantry-shim" => ("gantry", Role::PerPod),
        "containerd" => ("containerd", Role::Daemon),
        "containerd-shim-runc-v2" | "pause" => ("containerd", Role::PerPod),
        _ => return None,
    })
}

/// Sums over the processes of one program.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Program {
    pub processes: u64,
    pub threads: u64,
    /// Kilobytes of 1024 bytes (proc(5), smaps_rollup).
    pub pss_kb: u64,
    pub private_dirty_kb: u64,
    /// User and system time since start, in clock ticks.
    pub cpu_ticks: u64,
    /// When it was started, in clock ticks after boot; of one process alone.
    #[serde(skip)]
    start: u64,
}

impl std::ops::AddAssign for Program {
    fn add_assign(&mut self, other: Self) {
        self.processes += other.processes;
        self.threads += other.threads;
        self.pss_kb += other.pss_kb;
        self.private_dirty_kb += other.private_dirty_kb;
        self.cpu_ticks += other.cpu_ticks;
    }
}

pub type Programs = BTreeMap<String, Program>;

/// All programs of `runtime` that run now, by name.
pub fn programs(runtime: &str) -> Result<Programs> {
    let mut programs = Programs::new();
    for (_, name, process) in processes(runtime)? {
        *programs.entry(name).or_default() += process;
    }
    Ok(programs)
}

/// CPU ticks of each process of `runtime`, by pid and start.
pub type Lives = BTreeMap<(u32, u64), (Role, u64)>;

/// What each process has spent so far.
pub fn lives(runtime: &str) -> Result<Lives> {
    let of = |(pid, name, process): (u32, String, Program)| {
        let (_, role) = role(&name)?;
        Some(((pid, process.start), (role, process.cpu_ticks)))
    };
    Ok(processes(runtime)?.into_iter().filter_map(of).collect())
}

/// What those that are there after have spent since. What has ended meanwhile does not count.
pub fn spent(before: &Lives, after: &Lives, wanted: Role) -> u64 {
    let after = after.iter().filter(|(_, (role, _))| *role == wanted);
    let since = |(key, (_, ticks)): (&(u32, u64), &(Role, u64))| {
        ticks - before.get(key).map_or(0, |(_, ticks)| *ticks)
    };
    after.map(since).sum()
}

/// Every process of `runtime`: pid, program, figures.
fn processes(runtime: &str) -> Result<Vec<(u32, String, Program)>> {
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc").context("list /proc")? {
        let entry = entry?;
        let pid = entry.file_name();
        let Some(pid) = pid.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let dir = entry.path();
        let Ok(exe) = fs::read_link(dir.join("exe")) else {
            continue;
        };
        let exe = exe.to_string_lossy();
        let name = exe
            .trim_end_matches(" (deleted)")
            .rsplit('/')
            .next()
            .unwrap_or_default();
        let name = name.trim_start_matches("memfd:");
        if role(name).is_none_or(|(owner, _)| owner != runtime) {
            continue;
        }
        // A process may end between two of these reads: then it is simply not counted.
        let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
        if let Some(process) = parse(&read("smaps_rollup"), &read("stat")) {
            processes.push((pid, name.to_owned(), process));
        }
    }
    Ok(processes)
}

fn parse(smaps_rollup: &str, stat: &str) -> Option<Program> {
    let kb = |key: &str| {
        let line = smaps_rollup
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line?.split_whitespace().next()?.parse::<u64>().ok()
    };
    // The command name may hold anything, so fields are counted from its closing parenthesis:
    // the first one after it is field 3 of proc_pid_stat(5).
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(Program {
        processes: 1,
        threads: field(20)?,
        pss_kb: kb("Pss")?,
        private_dirty_kb: kb("Private_Dirty")?,
        cpu_ticks: field(14)? + field(15)?,
        start: field(22)?,
    })
}

/// Sum over the programs of one role.
pub fn sum(programs: &Programs, wanted: Role) -> Program {
    let mut total = Program::default();
    for (name, program) in programs {
        if role(name).is_some_and(|(_, role)| role == wanted) {
            total += *program;
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_an_odd_command_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 11 22 0 0 20 0 3 0 99 1000 10";
        let smaps = "00400000-7ff [rollup]\nRss: 900 kB\nPss:   120 kB\nPss_Dirty: 7 kB\nPrivate_Dirty:  48 kB\n";
        let process = parse(smaps, stat).unwrap();
        assert_eq!((process.pss_kb, process.private_dirty_kb), (120, 48));
        assert_eq!((process.threads, process.cpu_ticks), (3, 33));
        assert_eq!(process.start, 99);
        assert!(
            parse("", stat).is_none(),
            "a kernel thread or one that has just ended"
        );
    }

    #[test]
    fn what_is_spent_is_counted_by_process() {
        let before = Lives::from([((1, 5), (Role::Daemon, 10)), ((2, 5), (Role::PerPod, 7))]);
        // The second has ended, and another has its number.
        let after = Lives::from([
            ((1, 5), (Role::Daemon, 14)),
            ((2, 9), (Role::PerPod, 3)),
            ((3, 9), (Role::PerPod, 2)),
        ]);
        assert_eq!(spent(&before, &after, Role::Daemon), 4);
        assert_eq!(spent(&before, &after, Role::PerPod), 5);
    }

    #[test]
    fn roles_are_told_apart() {
        let one = Program {
            processes: 1,
            pss_kb: 5,
            ..Default::default()
        };
        let programs = Programs::from([("gantryd".into(), one), ("gantry-shim".into(), one)]);
        assert_eq!(sum(&programs, Role::Daemon).pss_kb, 5);
        assert_eq!(sum(&programs, Role::PerPod).processes, 1);
    }
}
