//! Shims and holders, also those that are in no cgroup of ours yet or any more, and whose run
//! directory is gone: each has its log there for standard error, as long as it lives.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use gantry_sys::process::process_ref;

use super::mounts::{of_state, real};
use super::{Found, Place};
use crate::{Context, Error};

/// As they call themselves.
const NAMES: [&str; 2] = ["gantry-shim", "gantry-holder"];

pub(super) fn list(ctx: &Context) -> Result<Vec<Found>, Error> {
    let state = real(&ctx.settings.state);
    let device = fs::metadata(&state).map_err(|error| Error::io("look at", &state, &error))?;
    let device = device.dev();
    let proc = Path::new("/proc");
    let names = crate::rundir::names(proc);
    let names = names.map_err(|error| Error::io("list processes", proc, &error))?;
    let pids = names.iter().filter_map(|name| name.parse().ok());
    Ok(pids.filter_map(|pid| of(pid, &state, device)).collect())
}

fn of(pid: i32, state: &Path, device: u64) -> Option<Found> {
    // Before all else: what is read next is of this process, or it is not found later.
    let process = process_ref(pid).ok()?;
    let proc = Path::new("/proc").join(pid.to_string());
    let name = fs::read_to_string(proc.join("comm")).ok()?;
    let name = name.trim_end();
    if !NAMES.contains(&name) {
        return None;
    }
    let log = proc.join("fd/2");
    // The path is that of whoever opened it: in a container of another root it means another file.
    if fs::metadata(&log).ok()?.dev() != device {
        return None;
    }
    let log = fs::read_link(log).ok()?;
    let claim = of_state(log.strip_prefix(state).ok()?)?;
    Some(Found::new(
        Place::Process(process),
        format!("{pid} {name}"),
        claim,
    ))
}
