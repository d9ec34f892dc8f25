//! Taking a pod apart. Every step is idempotent and works without a shim, so that whoever finds a
//! pod in whatever half-state can run all of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use gantry_shim_api::v1::{self, request};
use gantry_sys::pidfd::PidFd;
use gantry_sys::signal::SIGKILL;
use gantry_types::{ContainerId, ProcessRef};
use nix::mount::{MntFlags, umount2};

use super::{blocking, run};
use crate::activity::Of;
use crate::registry::PodFacts;
use crate::shim::Shim;
use crate::{Context, Error, failpoint};

/// Gives the network back. `raw` is the plugin's result, or the intent when there was none.
pub(crate) async fn release_network(
    ctx: &Arc<Context>,
    facts: &Arc<PodFacts>,
    raw: &[u8],
) -> Result<(), Error> {
    let path = Path::new(&facts.record.netns_path);
    // A namespace that is gone took its interfaces along; addresses are still to be given back.
    let netns = is_netns(path).then_some(path);
    let attachment = run::attachment(facts, netns)?;
    failpoint::at("network::before-release")?;
    let detached = ctx.network.detach(&attachment, raw);
    let detached = ctx.activity.during("network DEL", Of::pod(facts), detached);
    detached.await.map_err(Error::step("tear down network"))?;
    failpoint::at("network::released")
}

/// Whether a namespace is mounted at `path`: an empty file is what a half-done pin leaves.
pub(crate) fn is_netns(path: &Path) -> bool {
    use nix::sys::statfs::{NSFS_MAGIC, statfs};
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == NSFS_MAGIC)
}

/// Ends a pod's shim and with it the holder, and then their scopes. A holder that is on record may
/// have outlived its shim.
pub(crate) async fn end_shim(
    ctx: &Arc<Context>,
    facts: &Arc<PodFacts>,
    shim: Option<Arc<Shim>>,
    recorded: Option<ProcessRef>,
    holder: Option<ProcessRef>,
) -> Result<(), Error> {
    end_process(ctx, facts, shim, recorded).await?;
    failpoint::at("shim::ended")?;
    if let Some(holder) = holder {
        end_holder(ctx, holder).await?;
    }
    match &ctx.scopes {
        Some(_) => stop_scopes(ctx, facts).await,
        // It may have been killed in the middle of one.
        None => end_runtime_calls(ctx, facts).await?,
    }
    Ok(())
}

/// Kills a pod's holder and waits until it has ended.
pub(crate) async fn end_holder(ctx: &Context, holder: ProcessRef) -> Result<(), Error> {
    kill(holder).map_err(|error| Error::internal("kill holder", error))?;
    if wait_gone(holder, ctx.settings.timeouts.kill).await {
        return Ok(());
    }
    Err(Error::Deadline {
        what: format!("end of holder process {}", holder.pid),
        seconds: ctx.settings.timeouts.kill.as_secs(),
    })
}

/// Ends the calls of the OCI runtime that a dead shim has left: they are in its cgroup. Nobody
/// would read what they answer, and they would go on with containers that others now deal with.
pub(crate) async fn end_runtime_calls(
    ctx: &Arc<Context>,
    facts: &Arc<PodFacts>,
) -> Result<(), Error> {
    if let (Some(scopes), [_, shim]) = (&ctx.scopes, facts.record.scopes.as_slice()) {
        // Also the name becomes free.
        return scopes.stop(shim).await.map_err(Error::step("stop scope"));
    }
    let (facts, limit) = (Arc::clone(facts), ctx.settings.timeouts.kill);
    blocking(move || {
        let mut dirs = facts.record.shim_cgroup_dirs.iter();
        dirs.try_for_each(|dir| kill_cgroup(Path::new(dir), limit))
    })
    .await
}

/// Has systemd forget the pod's scopes. Their processes have ended, and without any they go by
/// themselves: a systemd that hangs must not keep the pod.
async fn stop_scopes(ctx: &Context, facts: &PodFacts) {
    let Some(scopes) = &ctx.scopes else { return };
    let stop = async |name: &String| {
        if let Err(error) = scopes.stop(name).await {
            tracing::warn!(pod = %facts.id, %error, "scope is left to systemd");
        }
    };
    match facts.record.scopes.as_slice() {
        [holder, shim] => drop(tokio::join!(stop(holder), stop(shim))),
        names => {
            for name in names {
                stop(name).await;
            }
        }
    }
}

/// Asks a shim to end, then kills it.
async fn end_process(
    ctx: &Arc<Context>,
    facts: &Arc<PodFacts>,
    shim: Option<Arc<Shim>>,
    recorded: Option<ProcessRef>,
) -> Result<(), Error> {
    let limits = ctx.settings.timeouts;
    let shim = match shim {
        Some(shim) => Some(shim),
        // A shim whose start was cut short is found by its socket.
        None => {
            let socket = ctx.records.dirs.socket(&facts.id);
            let (mailbox, _closed) = tokio::sync::mpsc::channel(1);
            Shim::connect(&ctx.activity, &facts.id, &socket, limits.shim_call, mailbox)
                .await
                .ok()
                .map(|(s, _)| s)
        }
    };
    let process = match (&shim, recorded) {
        (Some(shim), _) => Some(shim.process()),
        (None, Some(recorded)) if gantry_sys::process::alive(recorded) => Some(recorded),
        // Nobody has recorded it yet, and it does not answer: whoever holds the socket is it.
        (None, _) => crate::shim::listener_of(&ctx.records.dirs.socket(&facts.id)).await,
    };
    if let Some(shim) = &shim {
        let body = request::Body::Shutdown(v1::Shutdown {});
        if let Err(error) = shim.done(body, limits.kill).await {
            tracing::warn!(pod = %facts.id, %error, "shim does not end when asked: it is killed");
            shim.kill();
        }
    }
    let Some(process) = process else {
        return Ok(());
    };
    if !wait_gone(process, Duration::from_secs(2)).await {
        kill(process).map_err(|error| Error::internal("kill shim", error))?;
        if !wait_gone(process, limits.kill).await {
            return Err(Error::Deadline {
                what: format!("end of shim process {}", process.pid),
                seconds: limits.kill.as_secs(),
            });
        }
    }
    Ok(())
}

/// SIGKILL to exactly this process; one that has ended is success.
pub(crate) fn kill(process: ProcessRef) -> std::io::Result<()> {
    match PidFd::open_process(process).and_then(|pidfd| pidfd.signal(SIGKILL)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Waits until a process has ended; false when it has not.
pub(crate) async fn wait_gone(process: ProcessRef, limit: Duration) -> bool {
    let deadline = tokio::time::Instant::now() + limit;
    let mut pause = Duration::from_micros(200);
    while gantry_sys::process::alive(process) {
        if tokio::time::Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    true
}

/// Removes what the shim would have removed, and the pod's own mounts: pins, the network
/// namespace, /dev/shm, the cgroups of holder and shim. Needs no shim and minds nothing that is gone.
pub(crate) fn sweep(ctx: &Context, facts: &PodFacts) -> Result<(), Error> {
    let dirs = &ctx.records.dirs;
    let mut failed = Vec::new();
    let mut note = |outcome: Result<(), Error>| {
        if let Err(error) = outcome {
            failed.push(error.to_string());
        }
    };
    let pins = dirs.pins(&facts.id);
    match crate::rundir::names(&pins) {
        Ok(names) => names.iter().for_each(|name| note(unpin(&pins.join(name)))),
        Err(error) => note(Err(Error::io("list pins", &pins, &error))),
    }
    if !facts.record.netns_path.is_empty() {
        note(unpin(Path::new(&facts.record.netns_path)));
    }
    note(unmount(&dirs.shm(&facts.id)));
    note(unmount(&dirs.etc(&facts.id)));
    let cgroups = facts.record.cgroup_dirs.iter();
    for dir in cgroups.chain(&facts.record.shim_cgroup_dirs) {
        note(remove_cgroup(Path::new(dir)));
    }
    if failed.is_empty() {
        failpoint::at("pod::swept")
    } else {
        Err(Error::internal("sweep", failed.join("; ")))
    }
}

/// Unmounts a pinned namespace and removes its file.
pub(crate) fn unpin(path: &Path) -> Result<(), Error> {
    unmount(path)?;
    match std::fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("remove pin", path, &error)),
    }
}

/// Unmounts; not mounted or not there is success. Lazily: a process elsewhere that still holds a
/// file must not keep the pod from ending.
pub(crate) fn unmount(path: &Path) -> Result<(), Error> {
    use nix::errno::Errno;
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(error) => Err(Error::io("unmount", path, &error.into())),
    }
}

/// Removes an empty cgroup; absent is success. Its processes were killed a moment ago and may
/// take the kernel another moment to leave.
fn remove_cgroup(dir: &Path) -> Result<(), Error> {
    let mut tries = 0;
    loop {
        match std::fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) if tries == 50 => return Err(Error::io("remove cgroup", dir, &error)),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
        tries += 1;
    }
}

/// Kills every process of a cgroup and waits, bounded, until none is left. By cgroup.kill where
/// the kernel has it; else by list until the list stays empty, as a fork may outrun one pass.
pub(crate) fn kill_cgroup(dir: &Path, limit: Duration) -> Result<(), Error> {
    let deadline = std::time::Instant::now() + limit;
    let kill = dir.join("cgroup.kill");
    loop {
        let pids = cgroup_pids(dir)?;
        if pids.is_empty() {
            return Ok(());
        }
        if pids.contains(&FOREIGN) {
            let message = format!(
                "{}: it has processes of another pid namespace",
                dir.display()
            );
            return Err(Error::internal("kill cgroup", message));
        }
        if std::time::Instant::now() >= deadline {
            return Err(Error::internal(
                "kill cgroup",
                format!(
                    "{}: {} processes outlive SIGKILL",
                    dir.display(),
                    pids.len()
                ),
            ));
        }
        if kill.exists() {
            match std::fs::write(&kill, "1") {
                Err(error) if !vanished(&error) => {
                    return Err(Error::io("kill cgroup", &kill, &error));
                }
                Ok(()) | Err(_) => {}
            }
        } else {
            // Pinned, and then listed again: a number may have passed to a stranger in between.
            let pinned = pids.into_iter().map(|pid| (pid, PidFd::open(pid)));
            let pinned: Vec<_> = pinned.collect();
            let still = cgroup_pids(dir)?;
            for (_, process) in pinned.into_iter().filter(|(pid, _)| still.contains(pid)) {
                // Gone between the listing and now is what we want.
                let _ = process.and_then(|process| process.signal(SIGKILL));
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Kills what is in a container's cgroup and removes it from every hierarchy. An OCI runtime that
/// is killed before it has written down that it made one leaves it, and its `delete` then knows of
/// none.
pub(crate) fn remove_container_cgroup(ctx: &Context, dir: &Path) -> Result<(), Error> {
    let dirs = ctx.settings.cgroups.everywhere(dir);
    let limit = ctx.settings.timeouts.kill;
    dirs.iter().try_for_each(|dir| end_cgroup(dir, limit))
}

/// Kills what is in a cgroup and removes it, with those below it.
pub(crate) fn end_cgroup(dir: &Path, limit: Duration) -> Result<(), Error> {
    kill_cgroup(dir, limit)?;
    let dirs = subtree(dir)?;
    dirs.iter().rev().try_for_each(|dir| remove_cgroup(dir))
}

/// How `cgroup.procs` tells of a process that has no number in the reader's pid namespace: one of
/// ours always has.
pub(crate) const FOREIGN: i32 = 0;

/// Processes of a cgroup and of those below it: with cgroup v2 a container that manages cgroups
/// of its own has all its processes in those.
pub(crate) fn cgroup_pids(dir: &Path) -> Result<Vec<i32>, Error> {
    let mut pids = Vec::new();
    for dir in subtree(dir)? {
        let path = dir.join("cgroup.procs");
        match std::fs::read_to_string(&path) {
            Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
            Err(error) if vanished(&error) => {}
            // A threaded cgroup's are told by the one that it is in (cgroups(7)).
            Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => {}
            Err(error) => return Err(Error::io("read cgroup", &path, &error)),
        }
    }
    Ok(pids)
}

/// A cgroup and those below it, each after the one that it is in; without those that vanish.
fn subtree(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        let failed = |error: std::io::Error| Error::io("read cgroup", &dir, &error);
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if vanished(&error) => continue,
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            match entry.and_then(|entry| Ok((entry.file_type()?, entry.path()))) {
                Ok((kind, path)) if kind.is_dir() => dirs.push(path),
                Ok(_) => {}
                Err(error) if vanished(&error) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        found.push(dir);
    }
    Ok(found)
}

/// A cgroup that is removed while it is looked at is ENOENT or, once opened, ENODEV.
fn vanished(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ENODEV)
}

/// Removes a container from the OCI runtime when no shim is there to do it.
pub(crate) async fn delete_from_runtime(
    ctx: &Arc<Context>,
    handler: &str,
    id: &ContainerId,
) -> Result<(), Error> {
    let Some(handler) = ctx.settings.handler(handler).cloned() else {
        // The handler was taken out of the configuration; its state is out of reach.
        tracing::warn!(container = %id, handler, "no such handler: not deleted from the runtime");
        return Ok(());
    };
    let (id, limit) = (id.clone(), ctx.settings.timeouts.runtime);
    let bundle = ctx.records.dirs.container(&id);
    let is_there = std::fs::symlink_metadata(&bundle).is_ok_and(|bundle| bundle.is_dir());
    let bundle = is_there.then_some(bundle);
    let systemd = ctx.settings.cgroups.driver == crate::cgroup::Driver::Systemd;
    blocking(move || {
        let state = handler.root.join(id.as_str());
        if !state.exists() {
            return Ok(());
        }
        let runtime = gantry_runtime::Runtime {
            root: Some(handler.root.clone()),
            systemd_cgroup: systemd,
            ..gantry_runtime::Runtime::new(&handler.binary)
        };
        // What is left of a container may be the runtime's state alone.
        let log = bundle.as_ref().unwrap_or(&state).join("delete.log");
        let call = runtime.delete(id.as_str(), true, &log);
        let step = Error::step("delete from runtime");
        let output = gantry_runtime::probe::run_to_completion(&call, limit).map_err(step)?;
        // What counts is that its state is gone: a container that it never knew is an error to it.
        if output.status.success() || !state.exists() {
            return remove_state(&state);
        }
        let message = gantry_runtime::log::last_error_in(&log).unwrap_or(output.stderr);
        Err(Error::internal("delete from runtime", message))
    })
    .await
}

/// Removes what the OCI runtime left of its state directory of a container that it has deleted.
/// runc bind-mounts its own binary there for a moment of each call; one killed in that moment
/// leaves the mount, and then `delete` cannot remove the directory and says that it is done.
pub(crate) fn remove_state(state: &Path) -> Result<(), Error> {
    let failed = |error| Error::io("remove runtime state", state, &error);
    let entries = match std::fs::read_dir(state) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    for entry in entries {
        unmount(&entry.map_err(failed)?.path())?;
    }
    crate::rundir::remove_dir(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn processes_in_cgroups_below_count_too() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("container");
        fs::create_dir_all(top.join("init.scope/deeper")).unwrap();
        fs::write(top.join("cgroup.procs"), "").unwrap();
        fs::write(top.join("init.scope/cgroup.procs"), "7\n8\n").unwrap();
        fs::write(top.join("init.scope/deeper/cgroup.procs"), "9\n").unwrap();
        let mut pids = cgroup_pids(&top).unwrap();
        pids.sort_unstable();
        assert_eq!(pids, [7, 8, 9]);
        assert!(cgroup_pids(&dir.path().join("gone")).unwrap().is_empty());
    }

    #[test]
    fn what_is_of_another_pid_namespace_is_not_killed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.procs"), "0\n0\n").unwrap();
        fs::write(dir.path().join("cgroup.kill"), "").unwrap();
        let error = end_cgroup(dir.path(), Duration::from_secs(1)).unwrap_err();
        assert!(
            error.to_string().contains("another pid namespace"),
            "{error}"
        );
        assert_eq!(fs::read(dir.path().join("cgroup.kill")).unwrap(), b"");
    }
}
