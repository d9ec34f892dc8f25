//! gantry-shim: one per pod. Holds the pod's namespaces, runs the OCI runtime for its containers,
//! owns their output, log files and exit statuses, and outlives the daemon.
//!
//! Single-threaded: one epoll loop ([`shim::Shim`]) over the daemon's connections, the containers'
//! output, and signals. What takes time runs as a child whose end the loop sees.
//!
//! Started by the daemon as `gantry-shim POD_ID` with a Bootstrap frame on standard input; answers
//! one Ready frame on standard output. It must not be the leader of a process group, since it
//! makes its own session. Under another name it is the init of containers ([`init`]).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use gantry_runtime::Runtime;
use gantry_shim_api::{read_frame, v1, write_frame};
use gantry_sys::{failpoint, process, signal};

mod adopt;
mod attach;
mod call;
mod cgroup;
mod clock;
mod conn;
mod console;
mod container;
mod error;
mod holder;
mod init;
mod log;
mod oom;
mod output;
mod report;
mod requests;
mod shim;
mod tree;

use error::Error;
use holder::Holder;
use shim::Shim;

fn main() -> ExitCode {
    if let Some(command) = init::command() {
        return init::run(&command);
    }
    let _failpoints = failpoint::arm();
    // The order is law. First everything inherited goes: a descriptor of the daemon's that lived
    // on in a shim would keep sockets and mounts busy for a pod's life. The environment is left
    // behind by giving each child a new one (`Invocation::command`).
    if let Err(e) = process::close_from(3) {
        report!("close inherited descriptors: {e}");
        return ExitCode::FAILURE;
    }
    let mut ready = v1::Ready::default();
    let started = start(&mut ready);
    if let Err(e) = &started {
        ready = v1::Ready {
            error: e.to_string(),
            ..Default::default()
        };
    }
    if let Err(e) = write_frame(&mut std::io::stdout().lock(), &ready) {
        report!("answer the daemon: {e}");
        if let Ok(shim) = started {
            shim.abandon();
        }
        return ExitCode::FAILURE;
    }
    let Ok(mut shim) = started else {
        return ExitCode::FAILURE;
    };
    if let Err(e) = let_go() {
        report!("let go of standard input and output: {e}");
    }
    match shim.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            report!("event loop: {e}");
            ExitCode::FAILURE
        }
    }
}

fn start(ready: &mut v1::Ready) -> Result<Shim, Error> {
    let bootstrap: v1::Bootstrap = read_frame(&mut std::io::stdin().lock())
        .map_err(|e| Error::InvalidArgument(format!("read Bootstrap: {e}")))?;
    let missing = |what: &str| Error::InvalidArgument(format!("Bootstrap has no {what}"));
    let spec = bootstrap.holder.ok_or_else(|| missing("holder"))?;
    let wanted = bootstrap.runtime.ok_or_else(|| missing("runtime"))?;
    if !Path::new(&wanted.binary).is_absolute() {
        let message = format!("runtime binary {:?} is not an absolute path", wanted.binary);
        return Err(Error::InvalidArgument(message));
    }
    let cgroups: Vec<PathBuf> = bootstrap.cgroup_dirs.iter().map(PathBuf::from).collect();
    cgroup::check(&cgroups)?;
    process::setsid().map_err(Error::call("make a session"))?;
    std::env::set_current_dir("/").map_err(Error::call("change to /"))?;
    gantry_sys::fs::umask(0o022);
    process::set_child_subreaper().map_err(Error::call("become a subreaper"))?;
    process::set_thp_disabled(true).map_err(Error::call("disable huge pages"))?;
    process::set_name(c"gantry-shim").map_err(Error::call("set name"))?;
    let own = process::own_process().map_err(Error::call("read own start time"))?;
    gantry_sys::oom::set_oom_score_adj(own.pid, bootstrap.oom_score_adj)
        .map_err(Error::call("set OOM score"))?;
    signal::survive_signals().map_err(Error::call("handle signals"))?;
    let children = signal::ChildSignal::block().map_err(Error::call("block SIGCHLD"))?;
    if bootstrap.open_files > 0 {
        // The daemon needs more than containers are to inherit.
        process::set_open_files(bootstrap.open_files)
            .map_err(Error::call("set limit of open files"))?;
    }
    let mut holder = match bootstrap.adopt {
        Some(process) => {
            failpoint::at("adopt::holder").map_err(Error::call("adopt the pod"))?;
            Holder::adopt(&spec, process.into())?
        }
        None => Holder::start(&spec)?,
    };
    ready.shim = Some(own.into());
    ready.holder = Some(holder.process.into());
    let mut runtime = Runtime::new(wanted.binary);
    runtime.root = (!wanted.root.is_empty()).then(|| wanted.root.into());
    runtime.systemd_cgroup = wanted.systemd_cgroup;
    let socket = Path::new(&bootstrap.run_dir).join("shim.sock");
    let listener = failpoint::at("shim::held")
        .and_then(|()| gantry_sys::socket::listen(&socket))
        .map_err(Error::io("listen on", &socket));
    let listener = match listener {
        Ok(listener) => listener,
        Err(e) => {
            holder.teardown();
            return Err(e);
        }
    };
    let setup = shim::Setup {
        pod_id: bootstrap.pod_id,
        run_dir: bootstrap.run_dir.into(),
        runtime,
        timeout_ms: wanted.timeout_ms,
        own,
        children,
        listener,
        socket,
        holder,
        cgroups,
    };
    Shim::new(setup)
}

/// Nothing of the daemon is held once it has its answer.
fn let_go() -> std::io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    process::replace_stdio(&null, 0)?;
    process::replace_stdio(&null, 1)
}
