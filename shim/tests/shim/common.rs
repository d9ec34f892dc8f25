//! A pod under test: the real shim, spoken to as the daemon does.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use gantry_shim_api::v1::{self, event, message, request};
use gantry_shim_api::{Decoder, encode, read_frame, write_frame};
use serde_json::{Value, json};

/// Far beyond what anything here takes; only a hang gets there.
pub const PATIENCE: Duration = Duration::from_secs(60);

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Prints why and returns true when a test cannot run.
pub fn skip(name: &str) -> bool {
    let euid = std::fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m));
    if euid.unwrap_or(1) != 0 {
        println!("SKIP {name}: needs root");
        return true;
    }
    if !Path::new("/bin/busybox").exists() {
        println!("SKIP {name}: needs /bin/busybox");
        return true;
    }
    false
}

/// Runtimes that tests go over.
pub fn runtimes() -> Vec<PathBuf> {
    let unified = std::fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers");
    let mut found = Vec::new();
    for path in ["/usr/sbin/runc", "/usr/bin/crun"].map(PathBuf::from) {
        if !path.exists() {
            println!("SKIP {}: not installed", path.display());
        } else if path.ends_with("crun") && unified.as_ref().is_ok_and(|text| text != "\n") {
            println!(
                "SKIP {}: it refuses controllers on a hybrid's v2",
                path.display()
            );
        } else {
            found.push(path);
        }
    }
    found
}

pub fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let started = Instant::now();
    while !check() {
        assert!(started.elapsed() < PATIENCE, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub struct Pod {
    pub dir: tempfile::TempDir,
    pub name: String,
    pub shim: v1::Process,
    pub holder: v1::Process,
    pub netns: PathBuf,
    pub daemon: Daemon,
    child: std::process::Child,
    bootstrap: v1::Bootstrap,
    cgroup_mounts: Vec<PathBuf>,
}

/// One connection.
pub struct Daemon {
    pub stream: UnixStream,
    decoder: Decoder,
    next_id: u64,
    pub events: VecDeque<event::Body>,
}

pub type Answer = Result<message::Body, v1::Error>;

impl Daemon {
    pub fn connect(socket: &Path) -> Self {
        let stream = gantry_sys::socket::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream,
            decoder: Decoder::new(),
            next_id: 0,
            events: VecDeque::new(),
        }
    }

    pub fn greet(&mut self) -> v1::HelloReply {
        let hello = v1::Hello {
            protocol: 1,
            daemon_version: "test".into(),
        };
        match self.ask(request::Body::Hello(hello)) {
            Ok(message::Body::Hello(reply)) => reply,
            other => panic!("{other:?}"),
        }
    }

    pub fn ask(&mut self, body: request::Body) -> Answer {
        self.ask_with(body, &[]).map(|(body, _)| body)
    }

    pub fn send(&mut self, body: Option<request::Body>, fds: &[BorrowedFd<'_>]) -> u64 {
        self.next_id += 1;
        let frame = encode(&v1::Request {
            id: self.next_id,
            body,
        })
        .unwrap();
        let sent = gantry_sys::socket::send_with_fds(&self.stream, &frame, fds).unwrap();
        assert_eq!(sent, frame.len());
        self.next_id
    }

    pub fn ask_with(
        &mut self,
        body: request::Body,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(message::Body, Vec<OwnedFd>), v1::Error> {
        let id = self.send(Some(body), fds);
        self.wait_for(id)
    }

    pub fn wait_for(&mut self, id: u64) -> Result<(message::Body, Vec<OwnedFd>), v1::Error> {
        loop {
            let (message, fds) = self.receive();
            match (message.id, message.body.unwrap()) {
                (0, message::Body::Event(event)) => self.events.push_back(event.body.unwrap()),
                (answered, message::Body::Error(error)) if answered == id => return Err(error),
                (answered, body) if answered == id => return Ok((body, fds)),
                (answered, body) => panic!("answer {answered}: {body:?}"),
            }
        }
    }

    fn receive(&mut self) -> (v1::Message, Vec<OwnedFd>) {
        self.try_receive().expect("the shim hung up")
    }

    /// `None` at the end of the connection.
    pub fn try_receive(&mut self) -> Option<(v1::Message, Vec<OwnedFd>)> {
        loop {
            if let Some(frame) = self.decoder.next::<v1::Message>().unwrap() {
                return Some((frame.message, frame.fds));
            }
            let (mut buffer, mut fds) = ([0; 4096], Vec::new());
            let len =
                gantry_sys::socket::recv_with_fds(&self.stream, &mut buffer, &mut fds).unwrap();
            if len == 0 {
                return None;
            }
            self.decoder.feed(&buffer[..len], fds).unwrap();
        }
    }

    pub fn event(&mut self) -> event::Body {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        match self.receive().0 {
            v1::Message {
                id: 0,
                body: Some(message::Body::Event(event)),
            } => event.body.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// The next event of a kind; others are dropped.
    pub fn exited(&mut self, id: &str) -> v1::ExitRecord {
        loop {
            match self.event() {
                event::Body::Exited(exited) if exited.container_id == id => {
                    return exited.exit.unwrap();
                }
                _ => {}
            }
        }
    }

    pub fn exec_exited(&mut self, exec: &str) -> i32 {
        loop {
            match self.event() {
                event::Body::ExecExited(exited) if exited.exec_id == exec => return exited.code,
                _ => {}
            }
        }
    }

    pub fn state(&mut self) -> v1::StateReply {
        match self.ask(request::Body::State(v1::State {})) {
            Ok(message::Body::State(state)) => state,
            other => panic!("{other:?}"),
        }
    }
}

/// Starts a shim; `Err` is what its Ready says.
pub fn boot(runtime: &Path, change: impl FnOnce(&mut v1::Bootstrap, &Path)) -> Result<Pod, String> {
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    // Ends in a sign, so that no name is the beginning of another.
    let name = format!("gantry-test-{}-{number}_", std::process::id());
    let dir = tempfile::Builder::new().prefix(&name).tempdir().unwrap();
    let run_dir = dir.path().join("run");
    std::fs::create_dir(&run_dir).unwrap();
    let netns = dir.path().join("netns");
    let mut bootstrap = v1::Bootstrap {
        protocol: gantry_shim_api::PROTOCOL,
        pod_id: name.clone(),
        run_dir: run_dir.to_str().unwrap().into(),
        holder: Some(v1::Holder {
            netns_path: netns.to_str().unwrap().into(),
            pin_dir: run_dir.join("ns").to_str().unwrap().into(),
            new_ipc: true,
            new_uts: true,
            hostname: "pod-host".into(),
            ..Default::default()
        }),
        runtime: Some(v1::Runtime {
            binary: runtime.to_str().unwrap().into(),
            root: dir.path().join("root").to_str().unwrap().into(),
            systemd_cgroup: false,
            timeout_ms: 60_000,
        }),
        oom_score_adj: -998,
        ..Default::default()
    };
    change(&mut bootstrap, dir.path());
    let (mut child, ready) = spawn(&bootstrap);
    if !ready.error.is_empty() {
        assert!(!child.wait().unwrap().success());
        assert!(!run_dir.join("shim.sock").exists());
        return Err(ready.error);
    }
    // It lets go of both.
    let mut rest = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    let mut daemon = Daemon::connect(&run_dir.join("shim.sock"));
    let hello = daemon.greet();
    assert_eq!(hello.pod_id, name);
    Ok(Pod {
        dir,
        name,
        shim: ready.shim.unwrap(),
        holder: ready.holder.unwrap(),
        netns,
        daemon,
        child,
        bootstrap,
        cgroup_mounts: cgroup_mounts(),
    })
}

fn spawn(bootstrap: &v1::Bootstrap) -> (std::process::Child, v1::Ready) {
    let binary =
        std::env::var_os("GANTRY_SHIM").unwrap_or_else(|| env!("CARGO_BIN_EXE_gantry-shim").into());
    let mut child = Command::new(binary)
        .arg0("gantry-shim")
        .arg(&bootstrap.pod_id)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    write_frame(child.stdin.as_mut().unwrap(), bootstrap).unwrap();
    let ready = read_frame(child.stdout.as_mut().unwrap()).unwrap();
    (child, ready)
}

fn cgroup_mounts() -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let fields = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    fields
        .filter(|f| f[2].starts_with("cgroup"))
        .map(|f| f[1].into())
        .collect()
}

/// The memory hierarchy: v2's own, or v1's.
pub fn memory_mount() -> PathBuf {
    let v1 = PathBuf::from("/sys/fs/cgroup/memory");
    if v1.exists() {
        v1
    } else {
        "/sys/fs/cgroup".into()
    }
}

pub fn pod(runtime: &Path) -> Pod {
    boot(runtime, |_, _| ()).unwrap()
}

/// One container's bundle; change `config` and `start` before starting it.
pub struct Bundle {
    pub config: Value,
    pub start: v1::Start,
    pub log: PathBuf,
}

impl Pod {
    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("shim.sock")
    }

    /// A container that runs a shell script of busybox.
    pub fn bundle(&self, id: &str, script: &str) -> Bundle {
        let bundle = self.dir.path().join(id);
        let rootfs = bundle.join("rootfs");
        for sub in ["bin", "proc", "dev", "sys", "tmp"] {
            std::fs::create_dir_all(rootfs.join(sub)).unwrap();
        }
        // By a process of its own, as `script_runtime` writes.
        let copied = Command::new("cp")
            .arg("/bin/busybox")
            .arg(rootfs.join("bin/busybox"))
            .status();
        assert!(copied.unwrap().success());
        for applet in [
            "sh", "sleep", "cat", "echo", "setsid", "stty", "hostname", "seq", "kill", "ps",
            "head", "tr",
        ] {
            let _ = std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet));
        }
        let log = self.dir.path().join(format!("logs/{id}/0.log"));
        let namespaces = json!([
            {"type": "pid"}, {"type": "mount"},
            {"type": "network", "path": self.netns},
            {"type": "ipc", "path": self.run_dir().join("ns/ipc")},
            {"type": "uts", "path": self.run_dir().join("ns/uts")},
        ]);
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": ["/bin/sh", "-c", script], "cwd": "/", "user": {"uid": 0, "gid": 0},
                "env": ["PATH=/bin"], "noNewPrivileges": true,
            },
            "root": {"path": rootfs},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{}/{id}", self.name), "namespaces": namespaces,
                "resources": {"devices": [{"allow": true, "access": "rwm"}]},
            },
        });
        let start = v1::Start {
            container_id: id.into(),
            bundle: bundle.to_str().unwrap().into(),
            log_path: log.to_str().unwrap().into(),
            ..Default::default()
        };
        Bundle { config, start, log }
    }

    pub fn start(&mut self, bundle: &Bundle) -> Result<v1::Process, v1::Error> {
        let path = Path::new(&bundle.start.bundle);
        std::fs::write(path.join("config.json"), bundle.config.to_string()).unwrap();
        match self
            .daemon
            .ask(request::Body::Start(bundle.start.clone()))?
        {
            message::Body::Started(process) => Ok(process),
            other => panic!("{other:?}"),
        }
    }

    /// Starts a shell script as container `id`.
    pub fn run(&mut self, id: &str, script: &str) -> Bundle {
        let bundle = self.bundle(id, script);
        self.start(&bundle).unwrap();
        bundle
    }

    pub fn delete(&mut self, id: &str) {
        let answer = self.daemon.ask(request::Body::Delete(v1::Delete {
            container_id: id.into(),
        }));
        assert!(matches!(answer, Ok(message::Body::Done(_))), "{answer:?}");
    }

    pub fn signal(&mut self, id: &str, signal: i32, all: bool) -> Answer {
        let container_id = id.into();
        self.daemon.ask(request::Body::Signal(v1::Signal {
            container_id,
            signal,
            all,
        }))
    }

    /// An exec with the ends of three pipes; returns ours: stdin, stdout, stderr.
    pub fn exec(&mut self, id: &str, exec: &str, script: &str) -> Result<Exec, v1::Error> {
        let body = self.exec_body(id, exec, script, false);
        self.exec_as(body)
    }

    /// As `exec`, with a request that is made already.
    pub fn exec_as(&mut self, body: request::Body) -> Result<Exec, v1::Error> {
        let (in_theirs, stdin) = gantry_sys::io::pipe(false).unwrap();
        let (stdout, out_theirs) = gantry_sys::io::pipe(false).unwrap();
        let (stderr, err_theirs) = gantry_sys::io::pipe(false).unwrap();
        let fds = [in_theirs.as_fd(), out_theirs.as_fd(), err_theirs.as_fd()];
        let process = match self.daemon.ask_with(body, &fds)?.0 {
            message::Body::Started(process) => process,
            other => panic!("{other:?}"),
        };
        Ok(Exec {
            process,
            stdin: stdin.into(),
            stdout: stdout.into(),
            stderr: stderr.into(),
        })
    }

    pub fn exec_body(&self, id: &str, exec: &str, script: &str, tty: bool) -> request::Body {
        let process = json!({
            "args": ["/bin/sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0}, "terminal": tty, "noNewPrivileges": true,
        });
        request::Body::Exec(v1::Exec {
            container_id: id.into(),
            exec_id: exec.into(),
            process_json: process.to_string().into_bytes(),
            tty,
            grace_ms: None,
        })
    }

    pub fn shutdown(&mut self) {
        let answer = self.daemon.ask(request::Body::Shutdown(v1::Shutdown {}));
        assert!(matches!(answer, Ok(message::Body::Done(_))), "{answer:?}");
        assert!(self.child.wait().unwrap().success());
    }

    pub fn keep_holder(&mut self) {
        let answer = self
            .daemon
            .ask(request::Body::KeepHolder(v1::KeepHolder {}));
        assert!(matches!(answer, Ok(message::Body::Done(_))), "{answer:?}");
    }

    pub fn custody(&mut self, id: &str) -> Result<(v1::InCustody, Vec<OwnedFd>), v1::Error> {
        let custody = v1::Custody {
            container_id: id.into(),
        };
        match self.daemon.ask_with(request::Body::Custody(custody), &[])? {
            (message::Body::InCustody(has), fds) => Ok((has, fds)),
            other => panic!("{other:?}"),
        }
    }

    /// Another shim for the pod whose shim has died; `Err` is what its Ready says.
    pub fn next_shim(&mut self) -> Result<(), String> {
        self.bootstrap.adopt = Some(self.holder);
        let (mut child, ready) = spawn(&self.bootstrap);
        if !ready.error.is_empty() {
            assert!(!child.wait().unwrap().success());
            return Err(ready.error);
        }
        assert_eq!(ready.holder, Some(self.holder));
        self.child = child;
        self.shim = ready.shim.unwrap();
        self.daemon = Daemon::connect(&self.socket());
        let hello = self.daemon.greet();
        assert_eq!(
            (hello.shim, hello.holder),
            (Some(self.shim), Some(self.holder))
        );
        Ok(())
    }

    pub fn kill_shim(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn fd_count(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.shim.pid))
            .unwrap()
            .count()
    }

    /// Of the shim, in KiB. From the page tables (proc_pid_smaps_rollup(5)): the counters of
    /// proc_pid_status(5) lag behind by some pages for each CPU.
    pub fn anonymous_memory(&self) -> u64 {
        let path = format!("/proc/{}/smaps_rollup", self.shim.pid);
        let text = std::fs::read_to_string(path).unwrap();
        let mut fields = text.lines().filter_map(|line| line.split_once(':'));
        let (_, size) = fields.find(|(name, _)| *name == "Anonymous").unwrap();
        size.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Everything that bears the pod's name: processes, mounts, cgroups.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        found.extend(
            mounts
                .lines()
                .filter(|l| l.contains(&self.name))
                .map(str::to_owned),
        );
        for mount in &self.cgroup_mounts {
            let dir = mount.join(&self.name);
            // The parent of the containers' cgroups is the tests' own, and stays.
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    found.push(entry.path().display().to_string());
                }
            }
        }
        for process in [&self.shim, &self.holder] {
            if gantry_sys::process::alive((*process).into()) {
                found.push(format!("process {}", process.pid));
            }
        }
        for path in [
            self.socket(),
            self.netns.clone(),
            self.run_dir().join("ns/ipc"),
        ] {
            if path.symlink_metadata().is_ok() {
                found.push(path.display().to_string());
            }
        }
        let root = self.dir.path().join("root");
        found.extend(
            std::fs::read_dir(root)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path().display().to_string()),
        );
        found
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // A test that failed: take away what it left, so that the next starts clean.
        if let Ok(holder) = gantry_sys::pidfd::PidFd::open_process(self.holder.into()) {
            let _ = holder.signal(9);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        for mount in &self.cgroup_mounts {
            let dir = mount.join(&self.name);
            for _ in 0..100 {
                for sub in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                    for pid in std::fs::read_to_string(sub.path().join("cgroup.procs"))
                        .unwrap_or_default()
                        .lines()
                    {
                        if let Ok(process) = gantry_sys::pidfd::PidFd::open(pid.parse().unwrap()) {
                            let _ = process.signal(9);
                        }
                    }
                    let _ = std::fs::remove_dir(sub.path());
                }
                if std::fs::remove_dir(&dir).is_ok() || !dir.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for mount in mounts.lines().filter(|line| line.contains(&self.name)) {
            let target = mount.split(' ').nth(1).unwrap();
            let _ = gantry_sys::mount::umount_all(Path::new(target));
        }
    }
}

pub struct Exec {
    pub process: v1::Process,
    pub stdin: std::fs::File,
    pub stdout: std::fs::File,
    pub stderr: std::fs::File,
}

/// The text of the records of a log, stream and tag included.
pub fn records(log: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    // A reader may meet a write half done: what has no end yet is not a record yet.
    let text = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    // Not `lines`, which would swallow a terminal's carriage returns.
    text.split_terminator('\n')
        .map(|line| line[31..].to_owned())
        .collect()
}

/// A runtime written in shell: `name` decides the flavour.
pub fn script_runtime(dir: &Path, name: &str, body: &str) -> PathBuf {
    let path = dir.join(name);
    let text = format!(
        r#"#!/bin/sh
id=; bundle=; pid_file=; log=; process=; command=
while [ $# -gt 0 ]; do
    case $1 in
    --root|--log-format|--console-socket|--resources) shift ;;
    --log) log=$2; shift ;;
    --bundle) bundle=$2; shift ;;
    --pid-file) pid_file=$2; shift ;;
    --process) process=$2; shift ;;
    --*) ;;
    *) if [ -z "$command" ]; then command=$1; else id=$1; fi ;;
    esac
    shift
done
{body}
"#
    );
    // By a process of its own: one that another test forks meanwhile would inherit a descriptor for
    // writing, and executing the file would fail with ETXTBSY.
    let mut writer = Command::new("sh")
        .args(["-c", "cat >\"$0\" && chmod 755 \"$0\""])
        .arg(&path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = writer.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    assert!(writer.wait().unwrap().success());
    path
}
