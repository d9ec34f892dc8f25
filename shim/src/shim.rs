//! The event loop: who becomes ready, who ended, whose time is up.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use gantry_runtime::{Invocation, Runtime};
use gantry_shim_api::v1;
use gantry_shim_api::v1::message::Body;
use gantry_sys::epoll::{Epoll, EventFlags, Ready};
use gantry_sys::failpoint;
use gantry_sys::memory::ProgramText;
use gantry_sys::pidfd::PidFd;
use gantry_sys::process::{self, Ended};
use gantry_sys::signal::{ChildSignal, SIGKILL};
use gantry_types::ProcessRef;

use crate::call::{self, Asker, Call, Purpose, Streams};
use crate::conn::Conn;
use crate::container::{Container, Death, Deletion, Exec, Phase};
use crate::error::Error;
use crate::holder::Holder;
use crate::log::Kind;
use crate::output::{Buffers, Pumped};
use crate::{cgroup, clock, tree};

/// Connections at a time: the daemon needs one, and a second while it reconnects.
const MAX_CONNS: usize = 8;

/// Exits of children whose start is not announced yet; beyond it the oldest are forgotten.
const MAX_PARKED: usize = 256;

/// How long output that grandchildren hold open is read after a container's first process ended.
const DRAIN: Duration = Duration::from_secs(1);

/// Without an event for so long, memory is given back.
const IDLE: Duration = Duration::from_secs(1);

/// How a container ended, in its bundle.
pub const EXIT_FILE: &str = "exit";

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);

/// Exit code of what died of SIGKILL.
const KILLED: i32 = 128 + SIGKILL;

/// What an epoll token means: the kind in the upper half, a number in the lower.
mod token {
    pub const LISTENER: u64 = 0;
    pub const CHILDREN: u64 = 1 << 32;
    pub const CONN: u64 = 2 << 32;
    pub const STDOUT: u64 = 3 << 32;
    pub const STDERR: u64 = 4 << 32;
    pub const OOM: u64 = 5 << 32;
    pub const ATTACH: u64 = 6 << 32;
    pub const PROCESS: u64 = 7 << 32;
    pub const HOLDER: u64 = 8 << 32;
    pub const KIND: u64 = !0 << 32;
}

pub struct Setup {
    pub pod_id: String,
    pub run_dir: PathBuf,
    pub runtime: Runtime,
    /// 0 means the default.
    pub timeout_ms: u32,
    pub own: ProcessRef,
    pub children: ChildSignal,
    pub listener: UnixListener,
    pub socket: PathBuf,
    pub holder: Holder,
    /// Cgroups of the shim itself, which it is yet to join.
    pub cgroups: Vec<PathBuf>,
}

pub struct Shim {
    pub pod_id: String,
    pub run_dir: PathBuf,
    pub runtime: Runtime,
    pub timeout: Duration,
    pub own: ProcessRef,
    pub holder: Holder,
    pub containers: BTreeMap<u32, Container>,
    /// Executions of the runtime by pid.
    pub calls: BTreeMap<i32, Call>,
    pub conns: BTreeMap<u32, Conn>,
    /// The connection that gets events.
    pub daemon: Option<u32>,
    pub buffers: Buffers,
    /// Who asked for the end, and when patience with containers ends.
    pub shutdown: Option<(Asker, Instant)>,
    cgroups: Vec<PathBuf>,
    /// Holder and shim are in their cgroups.
    settled: bool,
    epoll: Rc<Epoll>,
    children: ChildSignal,
    /// The runtime was executed since children were last reaped.
    spawned: bool,
    /// Something happened since memory was last given back.
    stirred: bool,
    text: ProgramText,
    listener: UnixListener,
    socket: PathBuf,
    parked: Vec<Death>,
    next_number: u32,
}

impl Shim {
    /// Everything that is needed before the daemon may hear that we are ready. After an error
    /// nothing is left.
    pub fn new(mut setup: Setup) -> Result<Self, Error> {
        let prepare = || {
            let epoll = Epoll::new()?;
            setup.listener.set_nonblocking(true)?;
            epoll.add(&setup.listener, token::LISTENER, EventFlags::IN)?;
            epoll.add(&setup.children, token::CHILDREN, EventFlags::IN)?;
            if setup.holder.adopted {
                epoll.add(setup.holder.pidfd(), token::HOLDER, EventFlags::IN)?;
            }
            Ok((epoll, Buffers::new()?))
        };
        let (epoll, buffers) = match prepare() {
            Ok(prepared) => prepared,
            Err(e) => {
                setup.holder.teardown();
                let _ = std::fs::remove_file(&setup.socket);
                return Err(Error::call("set up the event loop")(e));
            }
        };
        let timeout = match setup.timeout_ms {
            0 => DEFAULT_TIMEOUT,
            ms => Duration::from_millis(ms.into()),
        };
        Ok(Self {
            pod_id: setup.pod_id,
            run_dir: setup.run_dir,
            runtime: setup.runtime,
            timeout,
            own: setup.own,
            holder: setup.holder,
            containers: BTreeMap::new(),
            calls: BTreeMap::new(),
            conns: BTreeMap::new(),
            daemon: None,
            buffers,
            shutdown: None,
            cgroups: setup.cgroups,
            settled: false,
            epoll: Rc::new(epoll),
            children: setup.children,
            spawned: false,
            stirred: true,
            // Without it only memory is lost.
            text: ProgramText::own().unwrap_or_default(),
            listener: setup.listener,
            socket: setup.socket,
            parked: Vec::new(),
            next_number: 1,
        })
    }

    /// The daemon never heard of us: leave nothing.
    pub fn abandon(mut self) {
        self.leave();
    }

    fn leave(&mut self) {
        self.holder.teardown();
        if let Err(e) = std::fs::remove_file(&self.socket)
            && e.kind() != io::ErrorKind::NotFound
        {
            crate::report!("remove {}: {e}", self.socket.display());
        }
    }

    /// Runs until a Shutdown is done.
    pub fn run(&mut self) -> io::Result<()> {
        let mut ready = Vec::with_capacity(32);
        loop {
            self.epoll.wait(self.patience(), &mut ready)?;
            if !ready.is_empty() {
                self.stirred = true;
            } else if self.stirred {
                self.stirred = false;
                self.rest();
            }
            for event in &ready {
                self.handle(event);
            }
            while std::mem::take(&mut self.spawned) {
                self.reap();
            }
            self.expire();
            if self.daemon.is_some() && !std::mem::replace(&mut self.settled, true) {
                self.settle();
            }
            if let Some((asker, until)) = self.shutdown
                && (self.containers.is_empty() && self.calls.is_empty() || Instant::now() >= until)
            {
                self.finish_shutdown(asker);
                return Ok(());
            }
        }
    }

    /// Joins the cgroups that shim and holder were not born in. Once the daemon has heard from us:
    /// the first move to another cgroup waits for every CPU (cgroup_threadgroup_rwsem), about ten
    /// milliseconds in which the daemon now does other things, and those that follow are cheap.
    fn settle(&mut self) {
        let joined = self.holder.join_cgroups().and_then(|()| {
            self.cgroups.iter().try_for_each(|dir| {
                cgroup::make(dir)?;
                cgroup::join(dir, self.own.pid)
            })
        });
        if let Err(e) = joined {
            // A holder outside its cgroup is not accounted and not found by node agents; a shim
            // outside its own is at the mercy of limits on the daemon. The daemon has its answer
            // already, so it learns it as the loss of the holder.
            crate::report!("{e}; the holder is given up");
            self.holder.kill();
        }
    }

    /// Nothing has happened for a while: gives back what only work needs.
    fn rest(&mut self) {
        if self.buffers.used {
            self.buffers.release();
        }
        self.text.release();
    }

    /// How long to wait for events: to the next deadline.
    fn patience(&self) -> Option<Duration> {
        let drains = self
            .containers
            .values()
            .filter_map(|container| container.drain_until);
        let calls = self
            .calls
            .values()
            .filter(|call| !call.timed_out)
            .map(|call| call.deadline);
        let execs = self.containers.values().flat_map(|c| &c.execs);
        let orphans = execs.filter_map(|exec| exec.end_by);
        let shutdown = self.shutdown.map(|(_, until)| until);
        let next = drains.chain(calls).chain(orphans).chain(shutdown).min();
        let left = next.map(|next| next.saturating_duration_since(Instant::now()));
        match left {
            _ if !self.stirred => left,
            Some(left) => Some(left.min(IDLE)),
            None => Some(IDLE),
        }
    }

    fn handle(&mut self, event: &Ready) {
        let number = event.token as u32;
        match event.token & token::KIND {
            token::LISTENER => self.accept(),
            token::CHILDREN => self.children_ended(),
            token::CONN => self.serve(number, event.flags),
            token::STDOUT => self.output(number, Kind::Stdout),
            token::STDERR => self.output(number, Kind::Stderr),
            token::OOM => self.oom_event(number),
            token::ATTACH => self.detach(number),
            token::PROCESS => self.adopted_ended(number),
            token::HOLDER => self.adopted_holder_ended(),
            _ => {}
        }
    }

    fn accept(&mut self) {
        let (stream, _) = match self.listener.accept() {
            Ok(accepted) => accepted,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Err(e) => {
                crate::report!("accept: {e}");
                return;
            }
        };
        while self.conns.len() >= MAX_CONNS {
            // Whoever connected first and is not the daemon goes.
            let idle = self
                .conns
                .keys()
                .copied()
                .find(|&number| Some(number) != self.daemon);
            let Some(idle) = idle else { break };
            self.hang_up(idle);
        }
        let number = self.number();
        let added = stream.set_nonblocking(true).and_then(|()| {
            self.epoll
                .add(&stream, token::CONN | u64::from(number), EventFlags::IN)
        });
        match added {
            Ok(()) => {
                self.conns.insert(number, Conn::new(stream));
            }
            Err(e) => crate::report!("watch connection: {e}"),
        }
    }

    pub fn number(&mut self) -> u32 {
        self.next_number += 1;
        self.next_number
    }

    pub fn hang_up(&mut self, number: u32) {
        // Dropping the descriptor takes it out of epoll, as nobody else has it.
        self.conns.remove(&number);
        // Whoever waited for these will never hear of them again.
        for container in self.containers.values_mut() {
            let execs = container.execs.iter_mut();
            execs
                .filter(|exec| exec.conn == number)
                .for_each(Exec::orphaned);
        }
        if self.daemon == Some(number) {
            self.daemon = None;
        }
    }

    fn serve(&mut self, number: u32, flags: EventFlags) {
        if flags.contains(EventFlags::OUT) {
            let flushed = self.conns.get_mut(&number).map(Conn::flush);
            if let Some(Err(_)) = flushed {
                return self.hang_up(number);
            }
            self.watch_write(number);
        }
        if !flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            return;
        }
        let Some(conn) = self.conns.get_mut(&number) else {
            return;
        };
        let mut fds = Vec::new();
        let buffer = &mut self.buffers.input;
        let len = match gantry_sys::socket::recv_with_fds(&conn.stream, buffer, &mut fds) {
            Ok(0) => return self.hang_up(number),
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => return self.hang_up(number),
        };
        self.buffers.used = true;
        let fed = conn.decoder.feed(&self.buffers.input[..len], fds);
        if let Err(e) = fed {
            crate::report!("connection: {e}");
            return self.hang_up(number);
        }
        // The connection may be hung up by what it asks for.
        while let Some(conn) = self.conns.get_mut(&number) {
            match conn.decoder.next::<v1::Request>() {
                Ok(Some(frame)) => self.request(number, frame.message, frame.fds),
                Ok(None) => break,
                Err(e) => {
                    crate::report!("connection: {e}");
                    return self.hang_up(number);
                }
            }
        }
    }

    fn watch_write(&mut self, number: u32) {
        let Some(conn) = self.conns.get_mut(&number) else {
            return;
        };
        if conn.wants_write() != conn.watched_for_write {
            conn.watched_for_write = conn.wants_write();
            let mut flags = EventFlags::IN;
            if conn.watched_for_write {
                flags |= EventFlags::OUT;
            }
            let token = token::CONN | u64::from(number);
            if let Err(e) = self.epoll.modify(&conn.stream, token, flags) {
                crate::report!("watch connection: {e}");
                self.hang_up(number);
            }
        }
    }

    fn send(&mut self, number: u32, message: &v1::Message, fds: Vec<OwnedFd>) {
        // A daemon that has gone asks State when it is back.
        let Some(conn) = self.conns.get_mut(&number) else {
            return;
        };
        match conn.send(message, fds) {
            Ok(()) => self.watch_write(number),
            Err(_) => self.hang_up(number),
        }
    }

    pub fn answer(&mut self, asker: Asker, body: Body) {
        self.answer_with(asker, body, Vec::new());
    }

    pub fn answer_with(&mut self, asker: Asker, body: Body, fds: Vec<OwnedFd>) {
        failpoint::pass("shim::answers");
        let message = v1::Message {
            id: asker.request,
            body: Some(body),
        };
        self.send(asker.conn, &message, fds);
    }

    /// As `answer_with`, of a request that is a step of no other: no failpoint of theirs.
    pub fn answer_aside(&mut self, asker: Asker, body: Body, fds: Vec<OwnedFd>) {
        let message = v1::Message {
            id: asker.request,
            body: Some(body),
        };
        self.send(asker.conn, &message, fds);
    }

    pub fn refuse(&mut self, asker: Asker, error: &Error) {
        self.answer(asker, Body::Error(error.wire()));
    }

    pub fn event(&mut self, event: v1::event::Body) {
        let Some(daemon) = self.daemon else { return };
        failpoint::pass("shim::tells");
        let body = Body::Event(v1::Event { body: Some(event) });
        self.send(
            daemon,
            &v1::Message {
                id: 0,
                body: Some(body),
            },
            Vec::new(),
        );
    }

    /// Starts to read a container's streams, and its OOM counter where the kernel tells changes.
    pub fn watch(&mut self, number: u32) -> io::Result<()> {
        let Some(container) = self.containers.get_mut(&number) else {
            return Ok(());
        };
        let streams = [&mut container.stdout, &mut container.stderr];
        for stream in streams.into_iter().flatten() {
            let kind = match stream.kind {
                Kind::Stdout => token::STDOUT,
                Kind::Stderr => token::STDERR,
            };
            stream.watch(&self.epoll, kind | u64::from(number))?;
        }
        Ok(())
    }

    /// Notices the end of a process that is not our child.
    pub fn watch_adopted(&self, number: u32, process: &PidFd) -> io::Result<()> {
        let token = token::PROCESS | u64::from(number);
        // Once: the daemon has a duplicate, for which the kernel would go on telling us.
        self.epoll
            .add(process, token, EventFlags::IN | EventFlags::ONESHOT)
    }

    fn adopted_holder_ended(&mut self) {
        // Fails when it was told before.
        let _ = self.epoll.remove(self.holder.pidfd());
        if std::mem::replace(&mut self.holder.alive, false) {
            self.event(v1::event::Body::HolderExited(v1::HolderExited {}));
        }
    }

    /// Notices when the daemon lets go of an attachment, of which it is told once: the same pipe
    /// may be open elsewhere after we have closed it, and must not wake us for ever.
    pub fn watch_attachment(&self, number: u32, pipe: impl AsFd) -> io::Result<()> {
        let token = token::ATTACH | u64::from(number);
        self.epoll.add(pipe, token, EventFlags::ONESHOT)
    }

    pub fn watch_oom(&mut self, number: u32) {
        let Some(fd) = self
            .containers
            .get(&number)
            .and_then(|container| container.oom.fd())
        else {
            return;
        };
        // v1 files cannot be polled, EPERM; there the counter is read at the end.
        let _ = self
            .epoll
            .add(fd, token::OOM | u64::from(number), EventFlags::PRI);
    }

    fn output(&mut self, number: u32, kind: Kind) {
        let Some(container) = self.containers.get_mut(&number) else {
            return;
        };
        let pumped = container.pump(kind, &mut self.buffers);
        let quiet = container.stdout.is_none() && container.stderr.is_none();
        if pumped == Pumped::End && container.phase == Phase::Draining && quiet {
            self.publish_exit(number);
        }
    }

    fn oom_event(&mut self, number: u32) {
        let Some(container) = self.containers.get_mut(&number) else {
            return;
        };
        if container.oom.update() {
            self.struck(number);
        }
    }

    /// A container's OOM counter has grown.
    fn struck(&mut self, number: u32) {
        for (&other, container) in &mut self.containers {
            if other != number {
                container.oom.another_was_struck();
            }
        }
        self.tell_oom(number);
    }

    fn tell_oom(&mut self, number: u32) {
        let Some(container) = self.containers.get_mut(&number) else {
            return;
        };
        if !std::mem::replace(&mut container.oom_told, true) {
            let container_id = container.id().to_owned();
            self.event(v1::event::Body::Oom(v1::Oom { container_id }));
        }
    }

    fn children_ended(&mut self) {
        match self.children.take() {
            Ok(_) => self.reap(),
            Err(e) => crate::report!("read signals: {e}"),
        }
    }

    /// The one place that waits for children while the loop runs.
    fn reap(&mut self) {
        loop {
            match process::reap_any() {
                Ok(Some(ended)) => self.child_ended(Death {
                    ended,
                    at: clock::now(),
                    unknown: false,
                }),
                Ok(None) => return,
                Err(e) => {
                    crate::report!("reap: {e}");
                    return;
                }
            }
        }
    }

    fn child_ended(&mut self, death: Death) {
        let pid = death.ended.pid;
        let holder = &self.holder;
        if holder.alive && !holder.adopted && pid == holder.process.pid {
            self.holder.alive = false;
            return self.event(v1::event::Body::HolderExited(v1::HolderExited {}));
        }
        if let Some(call) = self.calls.remove(&pid) {
            self.call_ended(call, death.ended);
            if self.calls.is_empty() {
                // Nobody will announce a process any more that has ended by now.
                self.parked = Vec::new();
            }
            return;
        }
        let is_container = |container: &Container| {
            container.ended.is_none()
                && container
                    .process
                    .as_ref()
                    .is_some_and(|p| !p.adopted && p.process.pid == pid)
        };
        if let Some(number) = self
            .containers
            .values()
            .find(|c| is_container(c))
            .map(|container| container.number)
        {
            return self.container_ended(number, death);
        }
        let exec = self.containers.values().find_map(|container| {
            let index = container
                .execs
                .iter()
                .position(|exec| exec.process.pid == pid)?;
            Some((container.number, index))
        });
        if let Some((number, index)) = exec {
            return self.exec_ended(number, index, death.ended);
        }
        // An orphan of a container, or a first process whose pid file is not read yet.
        if !self.calls.is_empty() {
            if self.parked.len() == MAX_PARKED {
                self.parked.remove(0);
            }
            self.parked.push(death);
        }
    }

    /// The exit of a process that was reaped before its start was announced.
    pub fn parked(&mut self, pid: i32) -> Option<Death> {
        let index = self
            .parked
            .iter()
            .position(|death| death.ended.pid == pid)?;
        Some(self.parked.swap_remove(index))
    }

    /// A container's first process has ended: what it wrote is still in the pipes.
    pub fn container_ended(&mut self, number: u32, death: Death) {
        let Some(container) = self.containers.get_mut(&number) else {
            return;
        };
        container.ended = Some(death);
        if container.phase != Phase::Running {
            // Announced by the end of the runtime's `start`.
            return;
        }
        container.phase = Phase::Draining;
        // Before anything that could make the cgroup vanish.
        if container.oom.update() {
            self.struck(number);
        }
        let Some(container) = self.containers.get_mut(&number) else {
            return;
        };
        if container.start.kill_cgroup_on_exit
            && let Some(dir) = container.cgroup()
        {
            cgroup::kill(&dir);
        }
        if container.drain(&mut self.buffers) {
            return self.publish_exit(number);
        }
        if let Some(container) = self.containers.get_mut(&number) {
            container.drain_until = Some(Instant::now() + DRAIN);
        }
    }

    /// Output is complete: the exit goes to disk, then to the daemon, and the runtime forgets
    /// the container.
    fn publish_exit(&mut self, number: u32) {
        let Some(container) = self.containers.get_mut(&number) else {
            return;
        };
        let Some(death) = container.ended else { return };
        container.close_streams(&mut self.buffers);
        container.drain_until = None;
        let oom_killed = death.ended.signal == Some(SIGKILL) && container.oom.struck();
        container.oom.close();
        let record = v1::ExitRecord {
            code: death.ended.code,
            finished_at: death.at,
            oom_killed,
            unknown: death.unknown,
        };
        if let Some(process) = &mut container.process {
            process.pidfd = None;
        }
        let path = container.bundle().join(EXIT_FILE);
        let bytes = prost::Message::encode_to_vec(&record);
        // No fsync: the bundle lies on a tmpfs that a power cut takes along with the container.
        let written = failpoint::at("exit::drained")
            .and_then(|()| gantry_sys::fs::write_atomic(&path, &bytes, 0o600, false));
        failpoint::pass("exit::written");
        if let Err(e) = written {
            crate::report!("write {}: {e}", path.display());
        }
        self.tell_exit(number, record);
    }

    /// An exit is on disk: the daemon hears of it, and the runtime forgets the container.
    pub fn tell_exit(&mut self, number: u32, record: v1::ExitRecord) {
        let Some(container) = self.containers.get_mut(&number) else {
            return;
        };
        container.phase = Phase::Exited;
        container.record = Some(record);
        let container_id = container.id().to_owned();
        let deletion = container.deletion;
        if record.oom_killed {
            self.tell_oom(number);
        }
        self.event(v1::event::Body::Exited(v1::Exited {
            container_id,
            exit: Some(record),
        }));
        match deletion {
            Deletion::None => self.delete_in_runtime(number, false),
            Deletion::UnderWay => {}
            Deletion::Done => self.forget(number),
        }
    }

    pub fn exec_ended(&mut self, number: u32, index: usize, ended: Ended) {
        let Some(container) = self.containers.get_mut(&number) else {
            return;
        };
        let exec = container.exec_ended(index);
        if exec.end_by.is_some() {
            // The time that it had to end by itself was its children's too.
            tree::kill(exec.process, container.cgroup().as_deref());
        }
        let container_id = container.id().to_owned();
        let exited = v1::ExecExited {
            container_id,
            exec_id: exec.id,
            code: ended.code,
        };
        self.event(v1::event::Body::ExecExited(exited));
    }

    /// Deadlines that have passed.
    fn expire(&mut self) {
        let now = Instant::now();
        let late: Vec<u32> = self
            .containers
            .values()
            .filter(|container| container.drain_until.is_some_and(|until| until <= now))
            .map(|container| container.number)
            .collect();
        for number in late {
            self.publish_exit(number);
        }
        for container in self.containers.values_mut() {
            let within = container.cgroup();
            for exec in &mut container.execs {
                if exec.end_by.take_if(|by| *by <= now).is_some() {
                    tree::kill(exec.process, within.as_deref());
                }
            }
        }
        let mut late = Vec::new();
        for call in self.calls.values_mut() {
            if !call.timed_out && call.deadline <= now {
                call.timed_out = true;
                late.push(call.process);
            }
        }
        for call in late {
            // The runtime leads a group but its helpers have left it (runc init makes a session).
            // Its end comes through the reaper.
            tree::kill(call, None);
            if let Err(e) = process::kill_group(call.pid, SIGKILL) {
                crate::report!("kill OCI runtime {}: {e}", call.pid);
            }
        }
    }

    /// The container is gone from the runtime: forgotten once its exit is published, and whoever
    /// waits for that is told.
    pub fn forget(&mut self, number: u32) {
        let leaving = self.shutdown.is_some();
        let gone = |container: &Container| {
            container.deletion == Deletion::Done
                && container.phase == Phase::Exited
                && (leaving || !container.delete_askers.is_empty())
        };
        if !self.containers.get(&number).is_some_and(gone) {
            return;
        }
        if let Some(container) = self.containers.remove(&number) {
            // Killed along with the container, and not reaped yet: nobody would find whose they are.
            for exec in &container.execs {
                let exited = v1::ExecExited {
                    container_id: container.id().to_owned(),
                    exec_id: exec.id.clone(),
                    code: KILLED,
                };
                self.event(v1::event::Body::ExecExited(exited));
            }
            for asker in container.delete_askers {
                self.answer(asker, Body::Done(v1::Done {}));
            }
        }
    }

    fn finish_shutdown(&mut self, asker: Asker) {
        for call in self.calls.values() {
            tree::kill(call.process, None);
        }
        for container in self.containers.values_mut() {
            crate::report!("container {} is left to the runtime", container.id());
            if let Some(process) = &container.process
                && let Some(pidfd) = &process.pidfd
            {
                let _ = pidfd.signal(SIGKILL);
            }
            if let Some(dir) = container.cgroup() {
                cgroup::kill(&dir);
            }
            container.close_streams(&mut self.buffers);
        }
        self.leave();
        self.answer(asker, Body::Done(v1::Done {}));
        // What the socket did not take yet: the daemon gets a moment, then it sees the end.
        if let Some(conn) = self.conns.get_mut(&asker.conn)
            && conn.wants_write()
        {
            let fd = conn.stream.as_fd();
            let _ = gantry_sys::io::writable_within(fd, IDLE);
            let _ = conn.flush();
        }
    }

    /// Executes the runtime; the reaper sees it end.
    pub fn spawn(&mut self, call: &Invocation, streams: Streams) -> Result<ProcessRef, Error> {
        // A spawn may swallow the signal of another child.
        self.spawned = true;
        call::spawn(call, streams)
    }

    pub fn add_call(&mut self, process: ProcessRef, log: PathBuf, purpose: Purpose) {
        let deadline = Instant::now() + self.timeout;
        let call = Call {
            process,
            deadline,
            timed_out: false,
            log,
            purpose,
        };
        self.calls.insert(process.pid, call);
    }
}
