//! What the daemon asks for, and what happens when the runtime has done its part.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use gantry_runtime::{Exec as ExecArgs, Invocation, Run};
use gantry_shim_api::v1;
use gantry_shim_api::v1::message::Body;
use gantry_shim_api::v1::request::Body as Ask;
use gantry_sys::failpoint;
use gantry_sys::pidfd::PidFd;
use gantry_sys::process::Ended;
use gantry_sys::signal::{SIGKILL, SIGRTMAX};
use gantry_types::ProcessRef;

use crate::call::{Asker, Call, PendingExec, Purpose, Streams};
use crate::console::Console;
use crate::container::{Container, Deletion, Exec, Phase, Process};
use crate::error::Error;
use crate::log::{Kind, LogFile};
use crate::output::Stream;
use crate::shim::{EXIT_FILE, Shim};
use crate::{cgroup, clock, tree};

/// Execs that may run in one container at a time.
const MAX_EXECS: usize = 1024;

/// What a shutdown grants the runtime before containers are taken down without it.
const SHUTDOWN_PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

pub fn done() -> Body {
    Body::Done(v1::Done {})
}

/// Names become parts of paths and arguments of the runtime.
pub fn check_name(what: &str, name: &str) -> Result<(), Error> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    let good =
        (1..=128).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with(['.', '-']);
    if good {
        Ok(())
    } else {
        Err(Error::InvalidArgument(format!(
            "{what} {name:?} is malformed"
        )))
    }
}

fn unknown(id: &str) -> Error {
    Error::NotFound {
        what: "container",
        id: id.to_owned(),
    }
}

impl Shim {
    pub fn request(&mut self, conn: u32, request: v1::Request, fds: Vec<OwnedFd>) {
        let asker = Asker {
            conn,
            request: request.id,
        };
        if request.id == 0 {
            // An answer to it would read as an event.
            crate::report!("request without an id");
            return self.hang_up(conn);
        }
        match self.handle_request(asker, request.body, fds) {
            Ok(Some(body)) => self.answer(asker, body),
            Ok(None) => {}
            Err(e) => self.refuse(asker, &e),
        }
    }

    /// `None`: the answer comes later.
    fn handle_request(
        &mut self,
        asker: Asker,
        body: Option<Ask>,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Body>, Error> {
        let Some(body) = body else {
            let message = "this shim does not know the request".to_owned();
            return Err(Error::Unimplemented(message));
        };
        let greeted = self.conns.get(&asker.conn).is_some_and(|conn| conn.greeted);
        if !greeted && !matches!(body, Ask::Hello(_)) {
            let message = "the first request on a connection must be Hello".to_owned();
            return Err(Error::FailedPrecondition(message));
        }
        match body {
            Ask::Hello(_) => Ok(Some(self.hello(asker.conn))),
            Ask::State(_) => Ok(Some(Body::State(self.state()))),
            Ask::Start(start) => self.start(asker, start).map(|()| None),
            Ask::Signal(signal) => self.signal(&signal).map(|()| Some(done())),
            Ask::Delete(delete) => self.delete(asker, &delete),
            Ask::Exec(exec) => self.exec(asker, exec, fds).map(|()| None),
            Ask::Attach(attach) => self.attach(asker, &attach, fds).map(|()| None),
            Ask::Update(update) => self.update(asker, &update).map(|()| None),
            Ask::ReopenLog(reopen) => self.reopen_log(&reopen).map(|()| Some(done())),
            Ask::KillExec(kill) => self.kill_exec(&kill).map(|()| Some(done())),
            Ask::ResizePty(resize) => self.resize_pty(&resize).map(|()| Some(done())),
            Ask::Ack(ack) => self.find(&ack.container_id).map(|_| Some(done())),
            Ask::KeepHolder(_) => self.keep_holder(asker).map(|()| None),
            Ask::Custody(custody) => self.custody(asker, &custody).map(|()| None),
            Ask::Adopt(adopt) => self.adopt(asker, adopt, fds).map(|()| None),
            Ask::Shutdown(_) => self.begin_shutdown(asker).map(|()| None),
        }
    }

    pub fn find(&mut self, id: &str) -> Result<&mut Container, Error> {
        self.containers
            .values_mut()
            .find(|c| c.id() == id)
            .ok_or_else(|| unknown(id))
    }

    /// A container whose first process runs.
    pub fn find_running(&mut self, id: &str) -> Result<&mut Container, Error> {
        let container = self.find(id)?;
        match container.phase {
            Phase::Running => Ok(container),
            Phase::Starting => Err(Error::FailedPrecondition(format!(
                "container {id:?} is still starting"
            ))),
            Phase::Draining | Phase::Exited => Err(Error::FailedPrecondition(format!(
                "container {id:?} has ended"
            ))),
        }
    }

    fn hello(&mut self, number: u32) -> Body {
        let others: Vec<u32> = self
            .conns
            .iter()
            .filter(|(other, conn)| **other != number && conn.greeted)
            .map(|(other, _)| *other)
            .collect();
        for other in others {
            self.hang_up(other);
        }
        if let Some(conn) = self.conns.get_mut(&number) {
            conn.greeted = true;
        }
        self.daemon = Some(number);
        Body::Hello(v1::HelloReply {
            protocol: gantry_shim_api::PROTOCOL,
            shim_version: env!("CARGO_PKG_VERSION").to_owned(),
            pod_id: self.pod_id.clone(),
            shim: Some(self.own.into()),
            holder: self.holder_process(),
        })
    }

    fn holder_process(&self) -> Option<v1::Process> {
        self.holder.alive.then(|| self.holder.process.into())
    }

    fn state(&self) -> v1::StateReply {
        let containers = self.containers.values().map(Container::state).collect();
        v1::StateReply {
            holder: self.holder_process(),
            containers,
        }
    }

    fn start(&mut self, asker: Asker, start: v1::Start) -> Result<(), Error> {
        check_name("container id", &start.container_id)?;
        if !Path::new(&start.bundle).is_absolute() {
            let message = format!("bundle {:?} is not an absolute path", start.bundle);
            return Err(Error::InvalidArgument(message));
        }
        if self.shutdown.is_some() {
            return Err(Error::FailedPrecondition(
                "the pod is being shut down".into(),
            ));
        }
        if !self.holder.alive {
            return Err(Error::FailedPrecondition(
                "the pod's holder has died".into(),
            ));
        }
        if self.find(&start.container_id).is_ok() {
            return Err(Error::AlreadyExists {
                what: "container",
                id: start.container_id,
            });
        }
        let log = match start.log_path.as_str() {
            "" => None,
            path => Some(LogFile::open(Path::new(path))?),
        };
        let number = self.number();
        let bundle = PathBuf::from(&start.bundle);
        let mut container = Container::new(number, start, log);
        if self.runtime.systemd_cgroup {
            container.oom.watch_pod(&container.start.oom_file);
        }
        let owner = self.holder.mapped_root;
        let streams = open_streams(&mut container, &self.run_dir, owner)?;
        let pid_file = bundle.join("pid");
        // What an earlier attempt in the same bundle left must not be read as this one's.
        for stale in [&pid_file, &bundle.join(EXIT_FILE)] {
            remove(stale).map_err(Error::io("remove", stale))?;
        }
        let log = self.runtime_log(&bundle);
        let run = Run {
            id: container.id(),
            bundle: &bundle,
            pid_file: &pid_file,
            console_socket: container.console.as_ref().map(|c| c.address.as_path()),
            log: &log,
        };
        let mut rest = self.runtime.run(&run).into_iter();
        let Some(first) = rest.next() else {
            return Err(Error::Runtime(
                "the OCI runtime has no way to start a container".into(),
            ));
        };
        let process = self.spawn(&first, streams)?;
        self.containers.insert(number, container);
        let purpose = Purpose::Start {
            container: number,
            asker,
            rest: rest.collect(),
        };
        self.add_call(process, log, purpose);
        if let Err(e) = self.watch(number) {
            // The container would block on its first full pipe, unseen: the start fails, by the
            // runtime being taken away.
            crate::report!("watch output: {e}");
            tree::kill(process, None);
        }
        Ok(())
    }

    /// A log file that no other execution writes to.
    fn runtime_log(&mut self, bundle: &Path) -> PathBuf {
        bundle.join(format!("runtime-{}.log", self.number()))
    }

    /// The runtime has ended: go on with what it was for.
    pub fn call_ended(&mut self, call: Call, ended: Ended) {
        let command = call.purpose.command();
        // The deadline may have been moved to now (`kill_exec`) in the moment the call ended.
        let result = if call.timed_out || call.deadline <= Instant::now() {
            Err(Error::Deadline {
                command,
                seconds: self.timeout.as_secs(),
            })
        } else if ended.code == 0 {
            failpoint::at("runtime::ended").map_err(Error::call("run the OCI runtime"))
        } else {
            let message = gantry_runtime::log::last_error_in(&call.log).unwrap_or_else(|| {
                match ended.signal {
                    Some(signal) => format!("OCI runtime {command} was killed by signal {signal}"),
                    None => format!("OCI runtime {command} failed with code {}", ended.code),
                }
            });
            Err(Error::Runtime(message))
        };
        if let Err(e) = remove(&call.log) {
            crate::report!("remove {}: {e}", call.log.display());
        }
        match call.purpose {
            Purpose::Start {
                container,
                asker,
                rest,
            } => {
                self.start_ended(container, asker, rest, result);
            }
            Purpose::Undo {
                container,
                asker,
                error,
            } => {
                self.undo_ended(container, asker, &error, result);
            }
            Purpose::Exec {
                container,
                asker,
                exec,
            } => {
                self.exec_started(container, asker, exec, result);
            }
            Purpose::Delete { container, force } => self.delete_ended(container, force, result),
            Purpose::Update { asker } => match result {
                Ok(()) => self.answer(asker, done()),
                Err(e) => self.refuse(asker, &e),
            },
        }
    }

    fn start_ended(
        &mut self,
        number: u32,
        asker: Asker,
        rest: Vec<Invocation>,
        result: Result<(), Error>,
    ) {
        match result.and_then(|()| self.take_over(number, rest)) {
            Ok(Begun::Running(process)) => {
                self.answer(asker, Body::Started(process.into()));
                let Some(container) = self.containers.get_mut(&number) else {
                    return;
                };
                // An exit that came before the start was announced.
                if let Some(death) = container.ended.take() {
                    self.container_ended(number, death);
                }
            }
            Ok(Begun::Created(call, rest)) => {
                let bundle = match self.containers.get(&number) {
                    Some(container) => container.bundle(),
                    None => return,
                };
                let log = self.runtime_log(&bundle);
                match self.spawn(&with_log(call, &log), Streams::null()) {
                    Ok(process) => {
                        let purpose = Purpose::Start {
                            container: number,
                            asker,
                            rest,
                        };
                        self.add_call(process, log, purpose);
                    }
                    Err(e) => self.undo(number, asker, e),
                }
            }
            Err(e) => self.undo(number, asker, e),
        }
    }

    /// Takes over the container's first process, of which we are the parent now that the runtime
    /// has ended.
    fn take_over(&mut self, number: u32, rest: Vec<Invocation>) -> Result<Begun, Error> {
        let container = self
            .containers
            .get_mut(&number)
            .ok_or_else(|| unknown("?"))?;
        if let Some(console) = container.console.take() {
            let master = console.receive()?;
            gantry_sys::io::set_nonblocking(&master)
                .map_err(Error::call("prepare the terminal"))?;
            container.stdout = Some(Stream::new(master, Kind::Stdout));
            self.watch(number)
                .map_err(Error::call("watch the terminal"))?;
        }
        let container = self
            .containers
            .get_mut(&number)
            .ok_or_else(|| unknown("?"))?;
        if container.process.is_none() {
            let pid = read_pid(&container.bundle().join("pid"))?;
            let parked = self.parked(pid);
            let container = self
                .containers
                .get_mut(&number)
                .ok_or_else(|| unknown("?"))?;
            container.ended = parked;
            container.process = Some(open_process(pid, parked.is_some())?);
        }
        let mut rest = rest.into_iter();
        if let Some(next) = rest.next() {
            return Ok(Begun::Created(next, rest.collect()));
        }
        let container = self
            .containers
            .get_mut(&number)
            .ok_or_else(|| unknown("?"))?;
        container.oom.open(&container.start.oom_file);
        container.phase = Phase::Running;
        container.started_at = clock::now();
        if let Some(death) = container.ended {
            container.started_at = container.started_at.min(death.at);
        }
        let process = container.process.as_ref().map(|p| p.process);
        self.watch_oom(number);
        process.map(Begun::Running).ok_or_else(|| unknown("?"))
    }

    /// A start failed: what it left in the runtime goes before the daemon hears of it.
    fn undo(&mut self, number: u32, asker: Asker, error: Error) {
        let Some(container) = self.containers.get(&number) else {
            return self.refuse(asker, &error);
        };
        let (id, bundle) = (container.id().to_owned(), container.bundle());
        let log = self.runtime_log(&bundle);
        match self.spawn(&self.runtime.delete(&id, true, &log), Streams::null()) {
            Ok(process) => {
                self.add_call(
                    process,
                    log,
                    Purpose::Undo {
                        container: number,
                        asker,
                        error,
                    },
                );
            }
            Err(e) => self.undo_ended(number, asker, &error, Err(e)),
        }
    }

    fn undo_ended(&mut self, number: u32, asker: Asker, error: &Error, result: Result<(), Error>) {
        if let Some(mut container) = self.containers.remove(&number) {
            if let Err(e) = result {
                crate::report!("delete {} after a failed start: {e}", container.id());
            }
            // Without its runtime's help if need be.
            if let Some(process) = container.process.as_ref().and_then(|p| p.pidfd.as_ref()) {
                let _ = process.signal(SIGKILL);
            }
            if let Some(dir) = container.cgroup() {
                cgroup::kill(&dir);
            }
            container.drain(&mut self.buffers);
            container.close_streams(&mut self.buffers);
            let pid_file = container.bundle().join("pid");
            if let Err(e) = remove(&pid_file) {
                crate::report!("remove {}: {e}", pid_file.display());
            }
        }
        self.refuse(asker, error);
    }

    fn signal(&mut self, signal: &v1::Signal) -> Result<(), Error> {
        if !(1..=SIGRTMAX).contains(&signal.signal) {
            let message = format!("there is no signal {}", signal.signal);
            return Err(Error::InvalidArgument(message));
        }
        let id = &signal.container_id;
        let container = self.find_running(id)?;
        let ended = || Error::FailedPrecondition(format!("container {id:?} has ended"));
        let process = container.process.as_ref().and_then(|p| p.pidfd.as_ref());
        let sent = process.ok_or_else(ended)?.signal(signal.signal);
        if signal.all
            && let Some(dir) = container.cgroup()
        {
            let first = container.process.as_ref().map_or(0, |p| p.process.pid);
            cgroup::signal_others(&dir, signal.signal, first);
        }
        match sent {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(ended()),
            result => result.map_err(Error::call("signal the container")),
        }
    }

    fn delete(&mut self, asker: Asker, delete: &v1::Delete) -> Result<Option<Body>, Error> {
        let Ok(container) = self.find(&delete.container_id) else {
            return Ok(Some(done()));
        };
        if container.phase == Phase::Starting {
            let message = format!("container {:?} is still starting", delete.container_id);
            return Err(Error::FailedPrecondition(message));
        }
        container.delete_askers.push(asker);
        let (number, deletion) = (container.number, container.deletion);
        match deletion {
            Deletion::Done => self.forget(number),
            Deletion::UnderWay => {}
            Deletion::None => self.delete_in_runtime(number, true),
        }
        Ok(None)
    }

    pub fn delete_in_runtime(&mut self, number: u32, force: bool) {
        let Some(container) = self.containers.get_mut(&number) else {
            return;
        };
        container.deletion = Deletion::UnderWay;
        let (id, bundle) = (container.id().to_owned(), container.bundle());
        let log = self.runtime_log(&bundle);
        let delete = self.runtime.delete(&id, force, &log);
        match self.spawn(&delete, Streams::null()) {
            Ok(process) => {
                self.add_call(
                    process,
                    log,
                    Purpose::Delete {
                        container: number,
                        force,
                    },
                );
            }
            Err(e) => self.delete_ended(number, true, Err(e)),
        }
    }

    fn delete_ended(&mut self, number: u32, force: bool, result: Result<(), Error>) {
        let Some(container) = self.containers.get_mut(&number) else {
            return;
        };
        let Err(error) = result else {
            container.deletion = Deletion::Done;
            if container.phase == Phase::Running
                && let Some(pidfd) = container.process.as_ref().and_then(|p| p.pidfd.as_ref())
            {
                // The runtime has killed it, or says so; its end comes through the reaper.
                let _ = pidfd.signal(SIGKILL);
            }
            return self.forget(number);
        };
        container.deletion = Deletion::None;
        let shutting_down = self.shutdown.is_some();
        if !force && (!container.delete_askers.is_empty() || shutting_down) {
            return self.delete_in_runtime(number, true);
        }
        let askers = std::mem::take(&mut container.delete_askers);
        if askers.is_empty() {
            // The delete after an exit: the daemon's own Delete tries again.
            crate::report!("delete {}: {error}", container.id());
        }
        for asker in askers {
            self.refuse(asker, &error);
        }
    }

    fn exec(&mut self, asker: Asker, exec: v1::Exec, fds: Vec<OwnedFd>) -> Result<(), Error> {
        check_name("exec id", &exec.exec_id)?;
        let expected = if exec.tty { 0 } else { 3 };
        if fds.len() != expected {
            let message = format!("exec needs {expected} descriptors, {} came", fds.len());
            return Err(Error::InvalidArgument(message));
        }
        let container = self.find_running(&exec.container_id)?;
        let (number, bundle) = (container.number, container.bundle());
        let running = container.execs.iter().any(|other| other.id == exec.exec_id);
        if running
            || self
                .execs_pending(number)
                .any(|pending| pending == exec.exec_id)
        {
            return Err(Error::AlreadyExists {
                what: "exec",
                id: exec.exec_id,
            });
        }
        let count = self.containers[&number].execs.len() + self.execs_pending(number).count();
        if count >= MAX_EXECS {
            let message = format!("container {:?} has {count} execs", exec.container_id);
            return Err(Error::Exhausted(message));
        }
        let name = format!("console-{}", self.number());
        let console = exec
            .tty
            .then(|| Console::open(&self.run_dir, &name))
            .transpose()?;
        let pending = PendingExec {
            process_file: bundle.join(format!("exec-{}.json", exec.exec_id)),
            pid_file: bundle.join(format!("exec-{}.pid", exec.exec_id)),
            id: exec.exec_id,
            console,
            grace: exec.grace_ms.map(|ms| Duration::from_millis(ms.into())),
        };
        let log = self.runtime_log(&bundle);
        let result = self.spawn_exec(&exec.container_id, &pending, &exec.process_json, fds, &log);
        match result {
            Ok(process) => {
                let purpose = Purpose::Exec {
                    container: number,
                    asker,
                    exec: pending,
                };
                self.add_call(process, log, purpose);
                Ok(())
            }
            Err(e) => {
                pending.remove_files();
                Err(e)
            }
        }
    }

    fn execs_pending(&self, number: u32) -> impl Iterator<Item = &str> {
        self.calls
            .values()
            .filter_map(move |call| match &call.purpose {
                Purpose::Exec {
                    container, exec, ..
                } if *container == number => Some(exec.id.as_str()),
                _ => None,
            })
    }

    fn spawn_exec(
        &mut self,
        id: &str,
        exec: &PendingExec,
        process_json: &[u8],
        fds: Vec<OwnedFd>,
        log: &Path,
    ) -> Result<ProcessRef, Error> {
        gantry_sys::fs::write_atomic(&exec.process_file, process_json, 0o600, false)
            .map_err(Error::io("write", &exec.process_file))?;
        let arguments = ExecArgs {
            id,
            process: &exec.process_file,
            pid_file: &exec.pid_file,
            console_socket: exec.console.as_ref().map(|c| c.address.as_path()),
            log,
        };
        for fd in &fds {
            give(fd, self.holder.mapped_root)?;
        }
        let mut fds = fds.into_iter();
        let streams = match (fds.next(), fds.next(), fds.next()) {
            (Some(stdin), Some(stdout), Some(stderr)) => Streams {
                stdin: stdin.into(),
                stdout: stdout.into(),
                stderr: stderr.into(),
            },
            _ => Streams::null(),
        };
        let call = self.runtime.exec(&arguments);
        self.spawn(&call, streams)
    }

    fn exec_started(
        &mut self,
        number: u32,
        asker: Asker,
        exec: PendingExec,
        result: Result<(), Error>,
    ) {
        if result.is_err() {
            self.kill_late(number, &exec);
        }
        let pid = result.and_then(|()| read_pid(&exec.pid_file));
        exec.remove_files();
        let adopted = pid.and_then(|pid| {
            let parked = self.parked(pid);
            let process = open_process(pid, parked.is_some())?.process;
            let master = exec.console.as_ref().map(Console::receive).transpose()?;
            Ok((process, parked, master))
        });
        let (process, parked, master) = match adopted {
            Ok(adopted) => adopted,
            Err(e) => return self.refuse(asker, &e),
        };
        if !self.containers.contains_key(&number) {
            // Nobody would ever tell the daemon of its end.
            tree::kill(process, None);
            let message = "the container was removed meanwhile".to_owned();
            return self.refuse(asker, &Error::FailedPrecondition(message));
        }
        self.answer_with(
            asker,
            Body::Started(process.into()),
            master.into_iter().collect(),
        );
        let mut exec = Exec {
            id: exec.id,
            process,
            conn: asker.conn,
            grace: exec.grace,
            end_by: None,
        };
        if !self.conns.contains_key(&asker.conn) {
            exec.orphaned();
        }
        let Some(container) = self.containers.get_mut(&number) else {
            return;
        };
        container.execs.push(exec);
        let index = container.execs.len() - 1;
        if let Some(death) = parked {
            self.exec_ended(number, index, death.ended);
        }
    }

    /// Kills a process that was let go by a runtime which is said to have failed: one that ended by
    /// itself in the moment of its deadline.
    fn kill_late(&mut self, number: u32, exec: &PendingExec) {
        let Ok(pid) = read_pid(&exec.pid_file) else {
            return;
        };
        // Not reaped yet, the pid is still its own.
        if self.parked(pid).is_none()
            && let Ok(process) = gantry_sys::process::process_ref(pid)
        {
            let within = self.containers.get(&number).and_then(Container::cgroup);
            tree::kill(process, within.as_deref());
        }
    }

    fn kill_exec(&mut self, kill: &v1::KillExec) -> Result<(), Error> {
        // A container that is gone took its execs along.
        let Ok(container) = self.find(&kill.container_id) else {
            return Ok(());
        };
        let running = container.execs.iter().map(|exec| (&exec.id, exec.process));
        let ended = container.ended_execs.iter().map(|(id, was)| (id, *was));
        let exec = running
            .chain(ended)
            .find(|(id, _)| **id == kill.exec_id)
            .map(|(_, process)| process);
        let (number, within) = (container.number, container.cgroup());
        if let Some(process) = exec {
            tree::kill(process, within.as_deref());
            return Ok(());
        }
        let pending = self.calls.values_mut().find(|call| match &call.purpose {
            Purpose::Exec {
                container, exec, ..
            } => *container == number && exec.id == kill.exec_id,
            _ => false,
        });
        if let Some(call) = pending {
            // It does not run yet: its start fails now. The loop kills the runtime.
            call.deadline = Instant::now();
        }
        Ok(())
    }

    fn update(&mut self, asker: Asker, update: &v1::Update) -> Result<(), Error> {
        let container = self.find_running(&update.container_id)?;
        let bundle = container.bundle();
        let log = self.runtime_log(&bundle);
        let resources = gantry_sys::fs::memfd("resources", &update.resources_json)
            .map_err(Error::call("hold the resources in memory"))?;
        let streams = Streams {
            stdin: Stdio::from(resources),
            ..Streams::null()
        };
        let call = self.runtime.update(&update.container_id, &log);
        let process = self.spawn(&call, streams)?;
        self.add_call(process, log, Purpose::Update { asker });
        Ok(())
    }

    fn reopen_log(&mut self, reopen: &v1::ReopenLog) -> Result<(), Error> {
        let container = self.find_running(&reopen.container_id)?;
        match &mut container.log {
            Some(log) => log.reopen(),
            None => Ok(()),
        }
    }

    fn resize_pty(&mut self, resize: &v1::ResizePty) -> Result<(), Error> {
        let container = self.find_running(&resize.container_id)?;
        if !resize.exec_id.is_empty() {
            // A second master here would keep the terminal from hanging up when the daemon
            // closes its own, and a forgotten shell would live on.
            let message = "the daemon itself holds the terminal of an exec".to_owned();
            return Err(Error::FailedPrecondition(message));
        }
        let size = (u16::try_from(resize.width), u16::try_from(resize.height));
        let (Ok(width), Ok(height)) = size else {
            let message = format!("no terminal has {} by {}", resize.width, resize.height);
            return Err(Error::InvalidArgument(message));
        };
        match &container.stdout {
            Some(stream) if container.start.tty => {
                gantry_sys::pty::resize(stream.fd.as_fd(), width, height)
                    .map_err(Error::call("resize the terminal"))
            }
            _ => {
                let message = format!("container {:?} has no terminal", resize.container_id);
                Err(Error::FailedPrecondition(message))
            }
        }
    }

    fn begin_shutdown(&mut self, asker: Asker) -> Result<(), Error> {
        if self.shutdown.is_some() {
            return Err(Error::FailedPrecondition(
                "the pod is being shut down".into(),
            ));
        }
        let patience = SHUTDOWN_PATIENCE.min(self.timeout);
        self.shutdown = Some((asker, Instant::now() + patience));
        // Whatever is on its way is cut short by its deadline, and a failed start undone; only
        // what takes containers away goes on.
        for call in self.calls.values_mut() {
            if !matches!(call.purpose, Purpose::Delete { .. } | Purpose::Undo { .. }) {
                call.deadline = Instant::now();
            }
        }
        let all: Vec<(u32, Phase, Deletion)> = self
            .containers
            .values()
            .map(|c| (c.number, c.phase, c.deletion))
            .collect();
        for (number, phase, deletion) in all {
            match (phase, deletion) {
                (Phase::Starting, _) | (_, Deletion::UnderWay) => {}
                (_, Deletion::None) => self.delete_in_runtime(number, true),
                (_, Deletion::Done) => self.forget(number),
            }
        }
        Ok(())
    }
}

/// How far a start is.
enum Begun {
    Running(ProcessRef),
    /// The process waits for these executions.
    Created(Invocation, Vec<Invocation>),
}

impl PendingExec {
    fn remove_files(&self) {
        for file in [&self.process_file, &self.pid_file] {
            if let Err(e) = remove(file) {
                crate::report!("remove {}: {e}", file.display());
            }
        }
    }
}

/// The same execution with another log file.
fn with_log(mut call: Invocation, log: &Path) -> Invocation {
    if let Some(at) = call.args.iter().position(|arg| arg == "--log")
        && let Some(value) = call.args.get_mut(at + 1)
    {
        *value = log.into();
    }
    call
}

/// Makes the pipes, or the console socket, of a container; the ends for the runtime are returned.
fn open_streams(
    container: &mut Container,
    run_dir: &Path,
    owner: Option<(u32, u32)>,
) -> Result<Streams, Error> {
    if container.start.tty {
        let name = format!("console-{}", container.number);
        container.console = Some(Console::open(run_dir, &name)?);
        return Ok(Streams::null());
    }
    let pipe = || gantry_sys::io::pipe(true).map_err(Error::call("make a pipe"));
    let (stdout, theirs_out) = pipe()?;
    let (stderr, theirs_err) = pipe()?;
    let stdin = if container.start.stdin {
        let (theirs, ours) = gantry_sys::io::pipe(false).map_err(Error::call("make a pipe"))?;
        container.stdin = Some(ours);
        give(&theirs, owner)?;
        theirs.into()
    } else {
        Stdio::null()
    };
    give(&theirs_out, owner)?;
    give(&theirs_err, owner)?;
    container.stdout = Some(Stream::new(stdout, Kind::Stdout));
    container.stderr = Some(Stream::new(stderr, Kind::Stderr));
    Ok(Streams {
        stdin,
        stdout: theirs_out.into(),
        stderr: theirs_err.into(),
    })
}

/// Lets root of the pod's user namespace open a pipe once more by /dev/stdout, and hand it on to
/// the container's own user. What is no pipe (/dev/null) stays the host's.
fn give(pipe: &OwnedFd, owner: Option<(u32, u32)>) -> Result<(), Error> {
    let Some((uid, gid)) = owner else {
        return Ok(());
    };
    let is_pipe = gantry_sys::fs::is_fifo(pipe).map_err(Error::call("look at a stream"))?;
    if !is_pipe {
        return Ok(());
    }
    gantry_sys::fs::chown(pipe, uid, gid).map_err(Error::call("give a pipe to the pod"))
}

pub fn read_pid(path: &Path) -> Result<i32, Error> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    match text.trim().parse() {
        Ok(pid) if pid > 1 => Ok(pid),
        _ => {
            let text: String = text.chars().take(40).collect();
            Err(Error::Runtime(format!(
                "OCI runtime wrote {text:?} to {}",
                path.display()
            )))
        }
    }
}

/// Our child with this pid. One that was reaped already has no descriptor and no start time.
fn open_process(pid: i32, reaped: bool) -> Result<Process, Error> {
    if reaped {
        return Ok(Process {
            process: ProcessRef { pid, start_time: 0 },
            pidfd: None,
            adopted: false,
        });
    }
    // Not reaped yet, so the pid is still its own.
    let pidfd = PidFd::open(pid).map_err(Error::call("open the started process"))?;
    let process = gantry_sys::process::process_ref(pid)
        .map_err(Error::call("read the started process's start time"))?;
    Ok(Process {
        process,
        pidfd: Some(pidfd),
        adopted: false,
    })
}

/// Removes a file; absent is success.
pub fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
