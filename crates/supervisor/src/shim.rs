//! The daemon's end of a shim: starting one, speaking to it, noticing its death.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gantry_shim_api::v1::{self, message, request};
use gantry_shim_api::{ADOPTION, Decoder, PROTOCOL, encode};
use gantry_sys::pidfd::PidFd;
use gantry_sys::signal::SIGKILL;
use gantry_types::{ContainerId, ErrorKind, PodId, ProcessRef};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::activity::{Activity, Of};
use crate::pod::Msg;
use crate::{Error, failpoint};

/// Missed answers in a row after which a shim counts as hung and is killed.
const MISSES_UNTIL_HUNG: u32 = 3;

type Reply = Result<Answer, Error>;

/// What a shim answered, and the descriptors that came along.
#[derive(Debug)]
pub struct Answer {
    pub body: message::Body,
    pub fds: Vec<OwnedFd>,
}

/// Duplicates of a running container's descriptors. Nobody here reads or writes them: they keep the
/// container from noticing that its shim is gone, and the next shim gets them.
#[derive(Debug)]
pub struct Custody {
    has: v1::InCustody,
    /// In the order of the fields of `has`.
    fds: Vec<OwnedFd>,
}

impl Custody {
    fn count(has: &v1::InCustody) -> usize {
        let flags = [has.process, has.stdout, has.stderr, has.stdin];
        flags.into_iter().filter(|has| *has).count()
    }

    pub fn try_clone(&self) -> io::Result<Self> {
        let fds = self.fds.iter().map(OwnedFd::try_clone);
        Ok(Self {
            has: self.has,
            fds: fds.collect::<Result<_, _>>()?,
        })
    }
}

struct Outgoing {
    frame: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// A connection to a live shim. Cheap to share; requests may overlap.
pub struct Shim {
    pod: PodId,
    process: ProcessRef,
    /// What it speaks; 0 until it has said so.
    protocol: AtomicU32,
    pidfd: Arc<PidFd>,
    outgoing: mpsc::Sender<Outgoing>,
    waiting: Arc<Waiting>,
    next_id: AtomicU64,
    misses: AtomicU32,
    activity: Arc<Activity>,
}

impl std::fmt::Debug for Shim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shim({}, pid {})", self.pod.short(), self.process.pid)
    }
}

/// Who waits for what on one connection.
#[derive(Default)]
struct Waiting {
    replies: Mutex<HashMap<u64, Waiter>>,
    /// By exec id.
    execs: Mutex<HashMap<String, oneshot::Sender<i32>>>,
    /// By exec id: what runs, and in which container. Outlasts the connection.
    running: Mutex<HashMap<String, (String, v1::Process)>>,
}

struct Waiter {
    reply: oneshot::Sender<Reply>,
    /// Container and exec id of what a Started answers.
    exec: Option<(String, String)>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a shim: one Bootstrap frame in, one Ready frame out. On error nothing is left running.
pub async fn spawn(
    binary: &Path,
    pod: &PodId,
    bootstrap: &v1::Bootstrap,
    limit: Duration,
) -> Result<v1::Ready, Error> {
    const STEP: &str = "start shim";
    let log_path = Path::new(&bootstrap.run_dir).join("shim.log");
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .map_err(|error| Error::io(STEP, &log_path, &error))?;
    let failpoints = failpoint::OF_SHIMS.iter();
    let failpoints =
        failpoints.filter_map(|(ours, theirs)| Some((theirs, std::env::var_os(ours)?)));
    let mut child = tokio::process::Command::new(binary)
        .arg(pod.as_str())
        .env_clear()
        .env("PATH", SHIM_PATH)
        .envs(failpoints)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(|error| Error::io(STEP, binary, &error))?;
    let handshake = async {
        failpoint::at("shim::spawned")?;
        let mut stdin = child
            .stdin
            .take()
            .ok_or_else(|| Error::internal(STEP, "no stdin"))?;
        let mut stdout = child
            .stdout
            .take()
            .ok_or_else(|| Error::internal(STEP, "no stdout"))?;
        let broken = |error: io::Error| Error::internal(STEP, error);
        let frame = encode(bootstrap).map_err(|error| Error::internal(STEP, error))?;
        stdin.write_all(&frame).await.map_err(broken)?;
        let mut decoder = Decoder::default();
        let mut buffer = [0; 1024];
        loop {
            let n = stdout.read(&mut buffer).await.map_err(broken)?;
            if n == 0 {
                return Err(Error::internal(STEP, "the shim ended before it was ready"));
            }
            let garbled = |error| Error::internal(STEP, error);
            decoder.feed(&buffer[..n], Vec::new()).map_err(garbled)?;
            if let Some(frame) = decoder.next::<v1::Ready>().map_err(garbled)? {
                return Ok(frame.message);
            }
        }
    };
    let outcome = timeout(limit, handshake).await.unwrap_or_else(|_| {
        Err(Error::Deadline {
            what: "start of the shim".into(),
            seconds: limit.as_secs(),
        })
    });
    match outcome {
        Ok(ready) if ready.error.is_empty() => Ok(ready),
        Ok(ready) => Err(Error::internal(STEP, ready.error)),
        Err(error) => {
            if let Err(kill) = child.kill().await {
                tracing::warn!(pod = %pod, error = %kill, "a shim that failed cannot be killed");
            }
            Err(error)
        }
    }
}

/// The process that listens on a pod's socket, which a stopped one does as well.
pub async fn listener_of(socket: &Path) -> Option<ProcessRef> {
    let connected = timeout(Duration::from_secs(1), UnixStream::connect(socket)).await;
    let pid = connected.ok()?.ok()?.peer_cred().ok()?.pid()?;
    gantry_sys::process::process_ref(pid).ok()
}

/// Where shim and runtime look for programs.
const SHIM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Shim {
    /// Connects and says hello. Events and the news of the shim's death go to `mailbox`.
    pub async fn connect(
        activity: &Arc<Activity>,
        pod: &PodId,
        socket: &Path,
        limit: Duration,
        mailbox: mpsc::Sender<Msg>,
    ) -> Result<(Arc<Self>, v1::HelloReply), Error> {
        Self::connect_to(activity, None, pod, socket, limit, mailbox).await
    }

    /// As `connect`, if the one who listens there is the process given. Another is left alone: its
    /// connection to whoever started it would be shut.
    pub async fn connect_to(
        activity: &Arc<Activity>,
        only: Option<ProcessRef>,
        pod: &PodId,
        socket: &Path,
        limit: Duration,
        mailbox: mpsc::Sender<Msg>,
    ) -> Result<(Arc<Self>, v1::HelloReply), Error> {
        let lost = |reason: String| Error::Shim {
            pod: pod.to_string(),
            reason,
        };
        let connect = async {
            UnixStream::connect(socket)
                .await
                .map_err(|e| lost(format!("{}: {e}", socket.display())))
        };
        let stream = timeout(limit, connect)
            .await
            .map_err(|_| lost(format!("{}: no connection", socket.display())))??;
        let credentials = stream.peer_cred().map_err(|e| lost(format!("peer: {e}")))?;
        let pid = credentials
            .pid()
            .ok_or_else(|| lost("peer has no pid".into()))?;
        let pidfd = PidFd::open(pid).map_err(|error| lost(format!("pidfd of {pid}: {error}")))?;
        let process = gantry_sys::process::process_ref(pid)
            .map_err(|error| lost(format!("start time of {pid}: {error}")))?;
        if only.is_some_and(|only| only != process) {
            return Err(lost(format!("the socket is that of process {pid}")));
        }

        let (read, write) = stream.into_split();
        let (outgoing, queue) = mpsc::channel(64);
        let waiting = Arc::new(Waiting::default());
        let pidfd = Arc::new(pidfd);
        let shim = Arc::new(Self {
            pod: pod.clone(),
            process,
            protocol: AtomicU32::new(0),
            pidfd: Arc::clone(&pidfd),
            outgoing,
            waiting: Arc::clone(&waiting),
            next_id: AtomicU64::new(1),
            misses: AtomicU32::new(0),
            activity: Arc::clone(activity),
        });
        tokio::spawn(write_frames(write, queue));
        tokio::spawn(read_frames(read, waiting, process, mailbox.clone()));
        tokio::spawn(watch(pidfd, process, mailbox));
        let hello = v1::Hello {
            protocol: PROTOCOL,
            daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        match shim.call(request::Body::Hello(hello), limit).await? {
            message::Body::Hello(reply) if reply.pod_id == pod.as_str() => {
                shim.protocol.store(reply.protocol, Ordering::Relaxed);
                Ok((shim, reply))
            }
            message::Body::Hello(reply) => {
                Err(lost(format!("the socket is that of pod {}", reply.pod_id)))
            }
            other => Err(unexpected(pod, &other)),
        }
    }

    pub fn process(&self) -> ProcessRef {
        self.process
    }

    /// Version of the protocol that it speaks. It may be older than ours, and newer.
    pub fn protocol(&self) -> u32 {
        self.protocol.load(Ordering::Relaxed)
    }

    /// Whether another shim can take over what this one leaves.
    pub fn knows_adoption(&self) -> bool {
        self.protocol() >= ADOPTION
    }

    /// Sends a request and waits for its answer.
    pub async fn call(&self, body: request::Body, limit: Duration) -> Result<message::Body, Error> {
        let answer = self.call_with_fds(body, Vec::new(), limit).await?;
        Ok(answer.body)
    }

    /// As `call`; `fds` travel with the frame, and the answer may bring some.
    pub async fn call_with_fds(
        &self,
        body: request::Body,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Reply {
        failpoint::at("shim::before-call")?;
        let reply = self.exchange(body, fds, limit).await;
        if reply.is_ok() {
            failpoint::at("shim::after-call")?;
        }
        reply
    }

    /// As `call_with_fds`, for what is a step of no other request: no failpoint of theirs.
    async fn exchange(&self, body: request::Body, fds: Vec<OwnedFd>, limit: Duration) -> Reply {
        let lost = |reason: &str| Error::Shim {
            pod: self.pod.to_string(),
            reason: reason.into(),
        };
        let exec = match &body {
            request::Body::Exec(exec) => Some((exec.container_id.clone(), exec.exec_id.clone())),
            _ => None,
        };
        let step = self.activity.begin(name_of(&body), Of::shim(&self.pod));
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let frame = encode(&v1::Request {
            id,
            body: Some(body),
        })
        .map_err(|error| Error::internal("encode shim request", error))?;
        let (reply, answer) = oneshot::channel();
        lock(&self.waiting.replies).insert(id, Waiter { reply, exec });
        let exchange = async {
            self.outgoing
                .send(Outgoing { frame, fds })
                .await
                .map_err(|_| lost("the connection is closed"))?;
            answer.await.map_err(|_| lost("the connection was lost"))?
        };
        match timeout(limit, exchange).await {
            Ok(reply) => {
                self.misses.store(0, Ordering::Relaxed);
                step.end(reply.is_ok());
                reply
            }
            Err(_) => {
                lock(&self.waiting.replies).remove(&id);
                let counts = &self.activity.shims;
                counts.missed.fetch_add(1, Ordering::Relaxed);
                let misses = self.misses.fetch_add(1, Ordering::Relaxed) + 1;
                if misses >= MISSES_UNTIL_HUNG {
                    tracing::error!(pod = %self.pod, misses, "the shim is hung: it is killed");
                    counts.killed.fetch_add(1, Ordering::Relaxed);
                    self.kill();
                }
                Err(Error::Shim {
                    pod: self.pod.to_string(),
                    reason: format!("no answer within {} s", limit.as_secs()),
                })
            }
        }
    }

    /// A request whose answer is Done.
    pub async fn done(&self, body: request::Body, limit: Duration) -> Result<(), Error> {
        match self.call(body, limit).await? {
            message::Body::Done(_) => Ok(()),
            other => Err(unexpected(&self.pod, &other)),
        }
    }

    /// A request whose answer is a process, and its terminal if it was to have one.
    pub async fn started(
        &self,
        body: request::Body,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<(ProcessRef, Option<OwnedFd>), Error> {
        let Answer { body, fds } = self.call_with_fds(body, fds, limit).await?;
        match body {
            message::Body::Started(process) => Ok((process.into(), fds.into_iter().next())),
            other => Err(unexpected(&self.pod, &other)),
        }
    }

    /// Attaches to a container; the answer is what writes to its input, if it has one to give.
    pub async fn attach(
        &self,
        attach: v1::Attach,
        pipes: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Option<OwnedFd>, Error> {
        let request = request::Body::Attach(attach);
        let Answer { body, fds } = self.call_with_fds(request, pipes, limit).await?;
        match body {
            message::Body::Attached(_) => Ok(fds.into_iter().next()),
            other => Err(unexpected(&self.pod, &other)),
        }
    }

    pub async fn state(&self, limit: Duration) -> Result<v1::StateReply, Error> {
        match self.call(request::Body::State(v1::State {}), limit).await? {
            message::Body::State(state) => Ok(state),
            other => Err(unexpected(&self.pod, &other)),
        }
    }

    /// Says that the pod's holder is on record: it outlives the shim from now on.
    pub async fn keep_holder(&self, limit: Duration) -> Result<(), Error> {
        let body = request::Body::KeepHolder(v1::KeepHolder {});
        match self.exchange(body, Vec::new(), limit).await?.body {
            message::Body::Done(_) => Ok(()),
            other => Err(unexpected(&self.pod, &other)),
        }
    }

    /// What keeps a container going should the shim die.
    pub async fn custody(&self, id: &ContainerId, limit: Duration) -> Result<Custody, Error> {
        let body = request::Body::Custody(v1::Custody {
            container_id: id.to_string(),
        });
        let Answer { body, fds } = self.exchange(body, Vec::new(), limit).await?;
        match body {
            message::Body::InCustody(has) if fds.len() == Custody::count(&has) => {
                Ok(Custody { has, fds })
            }
            other => Err(unexpected(&self.pod, &other)),
        }
    }

    /// Has a new shim take over a container of one that has died.
    pub async fn adopt(
        &self,
        mut adopt: v1::Adopt,
        custody: Custody,
        limit: Duration,
    ) -> Result<(), Error> {
        adopt.has = Some(custody.has);
        let body = request::Body::Adopt(adopt);
        match self.call_with_fds(body, custody.fds, limit).await?.body {
            message::Body::Done(_) => Ok(()),
            other => Err(unexpected(&self.pod, &other)),
        }
    }

    /// Execs of a container that have not ended, as far as this connection has told.
    pub fn running_execs(&self, id: &ContainerId) -> Vec<v1::Process> {
        let running = lock(&self.waiting.running);
        let of_container = running
            .values()
            .filter(|(container, _)| container == id.as_str());
        of_container.map(|(_, process)| *process).collect()
    }

    /// The exit code of an exec, once it ends. Call before the exec is requested.
    pub fn exec_exit(&self, exec_id: &str) -> oneshot::Receiver<i32> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting.execs).insert(exec_id.to_owned(), sender);
        receiver
    }

    /// No longer waits for an exec.
    pub fn forget_exec(&self, exec_id: &str) {
        lock(&self.waiting.execs).remove(exec_id);
    }

    /// SIGKILL. Its death then reaches the driver like any other.
    pub fn kill(&self) {
        if let Err(error) = self.pidfd.signal(SIGKILL) {
            tracing::debug!(pod = %self.pod, %error, "kill shim");
        }
    }
}

/// What a call is listed as while it is under way.
fn name_of(body: &request::Body) -> &'static str {
    match body {
        request::Body::Hello(_) => "shim: hello",
        request::Body::Start(_) => "shim: start container",
        request::Body::Signal(_) => "shim: signal",
        request::Body::Delete(_) => "shim: delete container",
        request::Body::State(_) => "shim: state",
        request::Body::Exec(_) => "shim: exec",
        request::Body::Update(_) => "shim: update",
        request::Body::ReopenLog(_) => "shim: reopen log",
        request::Body::Attach(_) => "shim: attach",
        request::Body::Custody(_) => "shim: custody",
        request::Body::Adopt(_) => "shim: adopt",
        request::Body::KeepHolder(_) => "shim: keep holder",
        request::Body::Shutdown(_) => "shim: shutdown",
        request::Body::KillExec(_) => "shim: kill exec",
        request::Body::ResizePty(_) => "shim: resize terminal",
        request::Body::Ack(_) => "shim: ack",
    }
}

fn unexpected(pod: &PodId, body: &message::Body) -> Error {
    Error::Shim {
        pod: pod.to_string(),
        reason: format!("unexpected answer {body:?}"),
    }
}

async fn write_frames(write: OwnedWriteHalf, mut queue: mpsc::Receiver<Outgoing>) {
    while let Some(Outgoing { frame, fds }) = queue.recv().await {
        if let Err(error) = write_frame(&write, &frame, &fds).await {
            // The reader sees the same loss and answers everyone who waits.
            tracing::debug!(%error, "write to shim");
            return;
        }
    }
}

async fn write_frame(write: &OwnedWriteHalf, frame: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let stream: &UnixStream = write.as_ref();
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let mut sent = 0;
    while sent < frame.len() {
        stream.writable().await?;
        let step = stream.try_io(Interest::WRITABLE, || {
            let rights = [ControlMessage::ScmRights(&raw)];
            // Descriptors belong to the frame's first byte.
            let control: &[_] = if sent == 0 && !raw.is_empty() {
                &rights
            } else {
                &[]
            };
            let data = [IoSlice::new(&frame[sent..])];
            let flags = MsgFlags::MSG_NOSIGNAL;
            Ok(sendmsg::<()>(
                stream.as_raw_fd(),
                &data,
                control,
                flags,
                None,
            )?)
        });
        match step {
            Ok(n) => sent += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Receives what is there, with the descriptors that came along. `Ok(0)` is the end.
async fn receive(
    read: &OwnedReadHalf,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let stream: &UnixStream = read.as_ref();
    loop {
        stream.readable().await?;
        let received = stream.try_io(Interest::READABLE, || {
            gantry_sys::socket::recv_with_fds(stream, buffer, fds)
        });
        match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            received => return received,
        }
    }
}

async fn read_frames(
    read: OwnedReadHalf,
    waiting: Arc<Waiting>,
    process: ProcessRef,
    mailbox: mpsc::Sender<Msg>,
) {
    let mut decoder = Decoder::default();
    let mut buffer = [0; 4096];
    let why = 'connection: loop {
        let mut fds = Vec::new();
        match receive(&read, &mut buffer, &mut fds).await {
            Ok(0) => break "closed".to_owned(),
            Ok(n) => {
                if let Err(error) = decoder.feed(&buffer[..n], fds) {
                    break error.to_string();
                }
            }
            Err(error) => break error.to_string(),
        }
        loop {
            match decoder.next::<v1::Message>() {
                Ok(None) => break,
                Ok(Some(frame)) => {
                    // A newer shim may send what this daemon does not know.
                    if let Some(body) = frame.message.body {
                        let answer = Answer {
                            body,
                            fds: frame.fds,
                        };
                        deliver(&waiting, &mailbox, frame.message.id, answer).await;
                    }
                }
                Err(error) => break 'connection error.to_string(),
            }
        }
    };
    tracing::debug!(%why, "connection to shim ended");
    // Dropping the senders tells every waiter.
    lock(&waiting.replies).clear();
    lock(&waiting.execs).clear();
    let _ = mailbox.send(Msg::Disconnected(process)).await;
}

async fn deliver(waiting: &Waiting, mailbox: &mpsc::Sender<Msg>, id: u64, answer: Answer) {
    let Answer { body, fds } = answer;
    match body {
        message::Body::Event(v1::Event { body: Some(event) }) => {
            if let v1::event::Body::ExecExited(exited) = &event {
                lock(&waiting.running).remove(&exited.exec_id);
                if let Some(waiter) = lock(&waiting.execs).remove(&exited.exec_id) {
                    let _ = waiter.send(exited.code);
                }
                return;
            }
            let _ = mailbox.send(Msg::Event(event)).await;
        }
        message::Body::Event(_) => {}
        body => {
            let waiter = lock(&waiting.replies).remove(&id);
            let reply = match body {
                message::Body::Error(error) => Err(refused(&error)),
                body => Ok(Answer { body, fds }),
            };
            let Some(waiter) = waiter else { return };
            if let (
                Some((container, exec)),
                Ok(Answer {
                    body: message::Body::Started(process),
                    ..
                }),
            ) = (waiter.exec, &reply)
            {
                lock(&waiting.running).insert(exec, (container, *process));
            }
            let _ = waiter.reply.send(reply);
        }
    }
}

/// A shim's error in the supervisor's terms.
fn refused(error: &v1::Error) -> Error {
    let kind = match error.kind() {
        v1::ErrorKind::Internal => ErrorKind::Internal,
        v1::ErrorKind::NotFound => ErrorKind::NotFound,
        v1::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
        v1::ErrorKind::FailedPrecondition => ErrorKind::FailedPrecondition,
        v1::ErrorKind::InvalidArgument => ErrorKind::InvalidArgument,
        v1::ErrorKind::DeadlineExceeded => ErrorKind::DeadlineExceeded,
        v1::ErrorKind::Unimplemented => ErrorKind::Unimplemented,
        v1::ErrorKind::Runtime => ErrorKind::Unknown,
        v1::ErrorKind::ResourceExhausted => ErrorKind::ResourceExhausted,
    };
    Error::Failed {
        step: "shim",
        kind,
        message: error.message.clone(),
    }
}

/// Tells the driver when the shim's process has ended.
async fn watch(pidfd: Arc<PidFd>, process: ProcessRef, mailbox: mpsc::Sender<Msg>) {
    let ended = async {
        #[expect(
            deprecated,
            reason = "its successor is unsafe; a PidFd owns its descriptor"
        )]
        let fd = AsyncFd::with_interest(ArcFd(pidfd), Interest::READABLE)?;
        fd.readable().await.map(|mut guard| guard.clear_ready())
    };
    tokio::select! {
        outcome = ended => {
            if let Err(error) = outcome {
                tracing::error!(%error, "a shim cannot be watched");
            }
        }
        () = mailbox.closed() => return,
    }
    let _ = mailbox.send(Msg::ShimExited(process)).await;
}

/// `AsyncFd` wants to own something with a descriptor.
struct ArcFd(Arc<PidFd>);

impl AsRawFd for ArcFd {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl AsFd for ArcFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_testkit::fake_shim::{Answer, FakeShim};
    use gantry_types::Kind;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A fake for `pod`, and our connection to it.
    async fn connected(
        answer: impl Fn(request::Body) -> Answer + Send + 'static,
    ) -> (tempfile::TempDir, FakeShim, Arc<Shim>, mpsc::Receiver<Msg>) {
        let dir = tempfile::tempdir().unwrap();
        let pod = PodId::from_random([7; 32]);
        let socket = dir.path().join("shim.sock");
        let fake = FakeShim::start(&socket, pod.as_str(), answer).unwrap();
        let (mailbox, messages) = mpsc::channel(8);
        let (shim, hello) = Shim::connect(&Arc::default(), &pod, &socket, LIMIT, mailbox)
            .await
            .unwrap();
        assert_eq!(hello.pod_id, pod.as_str());
        (dir, fake, shim, messages)
    }

    fn delete(id: &str) -> request::Body {
        request::Body::Delete(v1::Delete {
            container_id: id.to_owned(),
        })
    }

    #[tokio::test]
    async fn the_shim_of_another_pod_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("shim.sock");
        let _fake = FakeShim::start(&socket, "another", |_| Answer::Silence).unwrap();
        let (mailbox, _messages) = mpsc::channel(8);
        let pod = PodId::from_random([7; 32]);
        let error = Shim::connect(&Arc::default(), &pod, &socket, LIMIT, mailbox)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("another"), "{error}");
    }

    #[tokio::test]
    async fn a_refusal_keeps_kind_and_words_and_the_next_call_is_served() {
        let (_dir, _fake, shim, _messages) = connected(|body| match body {
            request::Body::Delete(delete) if delete.container_id == "bad" => {
                Answer::Body(message::Body::Error(v1::Error {
                    kind: v1::ErrorKind::FailedPrecondition.into(),
                    message: "it runs".to_owned(),
                }))
            }
            _ => Answer::Body(message::Body::Done(v1::Done {})),
        })
        .await;
        let error = shim.done(delete("bad"), LIMIT).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        assert!(error.to_string().contains("it runs"), "{error}");
        shim.done(delete("good"), LIMIT).await.unwrap();
    }

    #[tokio::test]
    async fn an_answer_that_never_comes_ends_one_call_alone() {
        let (_dir, _fake, shim, _messages) = connected(|body| match body {
            request::Body::Delete(delete) if delete.container_id == "lost" => Answer::Silence,
            _ => Answer::Body(message::Body::Done(v1::Done {})),
        })
        .await;
        let lost = shim.done(delete("lost"), Duration::from_millis(50));
        let (lost, good) = tokio::join!(lost, shim.done(delete("good"), LIMIT));
        assert_eq!(lost.unwrap_err().kind(), ErrorKind::Unavailable);
        good.unwrap();
        assert!(lock(&shim.waiting.replies).is_empty());
    }

    #[tokio::test]
    async fn a_lost_connection_is_told_to_callers_and_to_the_driver() {
        let (_dir, _fake, shim, mut messages) = connected(|_| Answer::HangUp).await;
        let exec = shim.exec_exit("exec");
        let error = shim.done(delete("any"), LIMIT).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(exec.await.is_err());
        assert!(matches!(messages.recv().await, Some(Msg::Disconnected(_))));
    }

    #[tokio::test]
    async fn custody_without_what_it_names_is_none() {
        let has = v1::InCustody {
            process: true,
            stdout: true,
            ..Default::default()
        };
        let (_dir, _fake, shim, _messages) =
            connected(move |_| Answer::Body(message::Body::InCustody(has))).await;
        let id = ContainerId::from_random([8; 32]);
        let error = shim.custody(&id, LIMIT).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
    }

    #[tokio::test]
    async fn execs_are_known_from_their_start_to_their_end() {
        let process = v1::Process {
            pid: 7,
            start_time: 70,
        };
        let (_dir, fake, shim, _messages) =
            connected(move |_| Answer::Body(message::Body::Started(process))).await;
        let id = ContainerId::from_random([8; 32]);
        for exec_id in ["one", "two"] {
            let body = request::Body::Exec(v1::Exec {
                container_id: id.to_string(),
                exec_id: exec_id.to_owned(),
                ..Default::default()
            });
            shim.started(body, Vec::new(), LIMIT).await.unwrap();
        }
        assert_eq!(shim.running_execs(&id), [process; 2]);
        let other = ContainerId::from_random([9; 32]);
        assert!(shim.running_execs(&other).is_empty());
        let mut connection = fake.connection();
        let ended = shim.exec_exit("two");
        for exec_id in ["one", "two"] {
            connection.event(v1::event::Body::ExecExited(v1::ExecExited {
                container_id: id.to_string(),
                exec_id: exec_id.to_owned(),
                code: 0,
            }));
        }
        ended.await.unwrap();
        assert!(shim.running_execs(&id).is_empty());
    }

    #[tokio::test]
    async fn a_shim_that_is_not_the_one_meant_is_left_alone() {
        let (dir, _fake, shim, _messages) = connected(|_| Answer::Silence).await;
        let own = shim.process();
        let stranger = ProcessRef {
            start_time: own.start_time + 1,
            ..own
        };
        let (mailbox, _) = mpsc::channel(8);
        let socket = dir.path().join("shim.sock");
        let pod = PodId::from_random([7; 32]);
        let outcome = Shim::connect_to(
            &Arc::default(),
            Some(stranger),
            &pod,
            &socket,
            LIMIT,
            mailbox,
        )
        .await;
        assert!(outcome.unwrap_err().to_string().contains("socket"));
    }

    #[tokio::test]
    async fn events_go_to_the_driver_and_ends_of_execs_to_who_waits() {
        let (_dir, fake, shim, mut messages) = connected(|_| Answer::Silence).await;
        let exec = shim.exec_exit("exec");
        let mut connection = fake.connection();
        connection.event(v1::event::Body::ExecExited(v1::ExecExited {
            container_id: "c".to_owned(),
            exec_id: "exec".to_owned(),
            code: 7,
        }));
        connection.event(v1::event::Body::HolderExited(v1::HolderExited {}));
        assert_eq!(exec.await.unwrap(), 7);
        let event = messages.recv().await;
        assert!(matches!(
            event,
            Some(Msg::Event(v1::event::Body::HolderExited(_)))
        ));
    }
}
