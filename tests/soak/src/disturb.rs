//! What is done to the node: to the daemon by [`Keeper`], to everything else by [`Vandal`].

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use gantry_testkit::cri::Client;
use gantry_testkit::daemon::{self, Daemon};
use gantry_testkit::faults::{Ballast, Fault, Faults};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::actor::Shared;
use crate::history::{Run, Stopped};
use crate::rng::Rng;

/// A shim that is held for longer than this may be taken for dead by the daemon, which waits for 5 s:
/// the machine may be slow too.
const SHIM_LIMIT: Duration = Duration::from_secs(1);

/// How long the daemon may be armed before it is killed by hand.
const ARMED: Duration = Duration::from_secs(3);

/// Kills the daemon, and starts it again.
pub struct Keeper<'a> {
    pub daemon: &'a mut Daemon,
    rng: Rng,
    shared: Shared,
    /// Where the daemon notes failpoints, if it was built with them.
    trace: Option<PathBuf>,
    pub figures: Figures,
}

/// What a run amounts to, of the daemon.
#[derive(Debug, Default)]
pub struct Figures {
    /// Failpoints that were passed, and how often.
    pub passed: BTreeMap<String, u64>,
    /// Failpoints at which the daemon was killed, and how often.
    pub killed_at: BTreeMap<String, u64>,
    /// kill -9s of the daemon.
    pub kills: u64,
    /// How long each start took until the daemon answered, in seconds.
    pub recoveries: Vec<f64>,
}

impl<'a> Keeper<'a> {
    pub fn new(
        daemon: &'a mut Daemon,
        rng: Rng,
        shared: Shared,
        figures: Figures,
    ) -> std::io::Result<Self> {
        let trace = daemon::has_failpoints()?.then(|| daemon.path("failpoints"));
        Ok(Self {
            daemon,
            rng,
            shared,
            trace,
            figures,
        })
    }

    fn note(&self, what: impl std::fmt::Display) {
        self.shared.history.disturbance("daemon", what);
    }

    fn fault(&self, what: impl std::fmt::Display) -> Stopped {
        self.shared.history.fault("daemon", what)
    }

    /// A rest, and then one disturbance with what ends it.
    pub async fn step(&mut self) -> Run<()> {
        self.shared.history.check()?;
        let rest = self.rng.millis(50..1300);
        tokio::time::sleep(rest).await;
        let _window = self.shared.trouble.begin();
        match self.rng.number(0..100) {
            0..8 => self.terminate().await?,
            8..14 => return self.freeze().await,
            _ => self.kill()?,
        }
        if self.rng.percent(20) {
            // Things happen while there is no daemon.
            let rest = self.rng.millis(50..800);
            tokio::time::sleep(rest).await;
        }
        self.read_trace();
        if self.rng.percent(35) && !self.figures.passed.is_empty() {
            return self.die_at_a_failpoint().await;
        }
        self.start(None).await.map(drop)
    }

    fn signal(&self, signal: Signal) -> Run<()> {
        // kill(2) would take 0 for everybody in our own group.
        let Some(pid) = self.daemon.pid() else {
            return Err(self.fault(format!("{signal}: there is no daemon")));
        };
        kill(Pid::from_raw(pid), signal).map_err(|error| self.fault(format!("{signal}: {error}")))
    }

    fn kill(&mut self) -> Run<()> {
        self.note("kill -9");
        self.figures.kills += 1;
        self.daemon.kill().map_err(|error| self.fault(error))
    }

    async fn terminate(&mut self) -> Run<()> {
        self.note("SIGTERM");
        self.shared.history.count("SIGTERMs of the daemon");
        self.signal(Signal::SIGTERM)?;
        match self.daemon.wait_ended().await {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(self.fault(format!("SIGTERM: {status}"))),
            Err(error) => Err(self.fault(format!("SIGTERM: {error}"))),
        }
    }

    async fn freeze(&mut self) -> Run<()> {
        let moment = self.rng.millis(100..2500);
        self.note(format!("SIGSTOP for {moment:?}"));
        self.shared.history.count("freezes of the daemon");
        self.signal(Signal::SIGSTOP)?;
        tokio::time::sleep(moment).await;
        self.signal(Signal::SIGCONT)
    }

    /// Starts a daemon that kills itself at one of the steps that were seen so far.
    async fn die_at_a_failpoint(&mut self) -> Run<()> {
        let names: Vec<_> = self.figures.passed.keys().cloned().collect();
        let name = self.rng.one(&names).clone();
        let turn = self.rng.number(0..3);
        let action = match turn {
            0 => format!("{name}=return(kill)"),
            turn => format!("{name}={turn}*off->return(kill)"),
        };
        self.note(format!("is to die at {action}"));
        let deadline = Instant::now() + ARMED;
        if self.start(Some(&action)).await? {
            while self.daemon.running() && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        if self.daemon.running() {
            self.kill()?;
        } else {
            self.note("has died there");
            self.figures.kills += 1;
            *self.figures.killed_at.entry(name).or_default() += 1;
        }
        self.start(None).await.map(drop)
    }

    /// Starts the daemon, which must answer in time unless it is armed to die; returns whether it
    /// did.
    async fn start(&mut self, armed: Option<&str>) -> Run<bool> {
        let trace = self.trace.as_ref().map(|path| path.display().to_string());
        let mut env = Vec::new();
        env.extend(trace.as_deref().map(|path| ("FAILPOINT_TRACE", path)));
        env.extend(armed.map(|action| ("FAILPOINTS", action)));
        self.daemon.set_env(&env);
        loop {
            let full = self.shared.trouble.disk_is_full();
            let began = Instant::now();
            self.daemon.spawn().map_err(|error| self.fault(error))?;
            match self.daemon.ready().await {
                Ok(()) => {
                    let took = began.elapsed();
                    self.note(format!("answers after {took:.0?}"));
                    self.figures.recoveries.push(took.as_secs_f64());
                    self.shared.trouble.started();
                    return Ok(true);
                }
                Err(_) if armed.is_some() && !self.daemon.running() => return Ok(false),
                Err(error) if full || self.shared.trouble.disk_is_full() => {
                    self.note(format!("does not start on a full disk: {error}"));
                    self.daemon.kill().map_err(|error| self.fault(error))?;
                    while self.shared.trouble.disk_is_full() {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                Err(error) => return Err(self.fault(format!("start: {error}"))),
            }
            self.shared.history.check()?;
        }
    }

    /// Counts the failpoints that were passed since.
    fn read_trace(&mut self) {
        let Some(path) = &self.trace else { return };
        // Absent before the first one is passed.
        let text = fs::read_to_string(path).unwrap_or_default();
        let _ = fs::remove_file(path);
        for name in text.lines() {
            *self.figures.passed.entry(name.to_owned()).or_default() += 1;
        }
    }

    /// One more kill, and a daemon that nothing is done to.
    pub async fn finish(&mut self) -> Run<()> {
        self.kill()?;
        self.start(None).await?;
        self.read_trace();
        Ok(())
    }
}

/// Disturbs what is around the daemon.
pub struct Vandal {
    rng: Rng,
    shared: Shared,
    plugin: Faults,
    runtime: Faults,
    /// File systems of the daemon's: state and root.
    disks: Vec<PathBuf>,
    socket: PathBuf,
}

impl Vandal {
    pub fn new(daemon: &Daemon, rng: Rng, shared: Shared) -> Self {
        let places = daemon.places();
        Self {
            rng,
            shared,
            plugin: daemon.plugin_faults().clone(),
            runtime: daemon.runtime_faults().clone(),
            disks: vec![places.state.clone(), places.root.clone()],
            socket: daemon.socket().to_owned(),
        }
    }

    fn note(&self, what: impl std::fmt::Display) {
        self.shared.history.disturbance("node", what);
    }

    /// A rest, and then one disturbance with what ends it.
    pub async fn step(&mut self) -> Run<()> {
        self.shared.history.check()?;
        let rest = self.rng.millis(200..2500);
        tokio::time::sleep(rest).await;
        let _window = self.shared.trouble.begin();
        match self.rng.number(0..100) {
            0..22 => {
                let faults = self.plugin.clone();
                self.shared.history.count("faults of the CNI plugin");
                self.fault_of("plugin", &faults, &["ADD", "DEL"]).await;
            }
            22..50 => {
                let faults = self.runtime.clone();
                self.shared.history.count("faults of the OCI runtime");
                let commands = ["run", "create", "start", "exec", "kill", "delete", "update"];
                self.fault_of("runtime", &faults, &commands).await;
            }
            50..68 => self.fill_a_disk().await?,
            68..86 => self.kill_a_shim().await?,
            _ => self.freeze_a_shim().await?,
        }
        Ok(())
    }

    async fn fault_of(&mut self, of: &str, faults: &Faults, commands: &[&str]) {
        let command = *self.rng.one(commands);
        let all = [Fault::Fail, Fault::Hang, Fault::Die, Fault::FailAfter];
        let fault = *self.rng.one(&all);
        let moment = self.rng.millis(200..2000);
        self.note(format!("{of} {command}: {fault:?} for {moment:?}"));
        faults.set(command, fault);
        tokio::time::sleep(moment).await;
        faults.clear(command);
    }

    /// Takes all the space there is.
    async fn fill_a_disk(&mut self) -> Run<()> {
        let disk = self.rng.one(&self.disks).clone();
        let moment = self.rng.millis(100..1500);
        self.note(format!("{} is full for {moment:?}", disk.display()));
        self.shared.history.count("full disks");
        self.shared.trouble.set_disk_full(true);
        let ballast = Ballast::fill(&disk);
        tokio::time::sleep(moment).await;
        let filled = ballast.map(drop);
        self.shared.trouble.set_disk_full(false);
        self.note("there is space again");
        filled.map_err(|error| self.shared.history.fault("ballast", error))
    }

    /// A pod that lives, and its shim.
    async fn a_shim(&mut self) -> Option<(String, Pid)> {
        let client = Client::connect(&self.socket).ok()?;
        let rng = &mut self.rng;
        let find = async {
            let pods = client.list_pods(None).await.ok()?;
            if pods.is_empty() {
                return None;
            }
            let id = rng.one(&pods).id.clone();
            let status = client.pod_status_of(&id, true).await.ok()?;
            let info = status.info.get("info")?;
            // Of JSON this one number.
            let at = info.split("\"shimPid\":").nth(1)?;
            let digits: String = at
                .trim_start()
                .chars()
                .take_while(char::is_ascii_digit)
                .collect();
            let pid: i32 = digits.parse().ok().filter(|pid| *pid > 1)?;
            Some((id, Pid::from_raw(pid)))
        };
        // There may be no daemon at this moment.
        let found = tokio::time::timeout(Duration::from_millis(500), find).await;
        found.ok().flatten()
    }

    async fn kill_a_shim(&mut self) -> Run<()> {
        let Some((pod, shim)) = self.a_shim().await else {
            return Ok(());
        };
        self.shared.trouble.lose(&pod);
        if is_shim_of(shim, &pod) {
            self.note(format!("kill -9 of the shim of {pod}"));
            self.shared.history.count("kills of a shim");
            // One that ends by itself in this moment is as well.
            let _ = kill(shim, Signal::SIGKILL);
        }
        Ok(())
    }

    async fn freeze_a_shim(&mut self) -> Run<()> {
        let Some((pod, shim)) = self.a_shim().await else {
            return Ok(());
        };
        let long = self.rng.percent(15);
        let moment = if long { 7000..9000 } else { 100..2500 };
        let moment = self.rng.millis(moment);
        if moment >= SHIM_LIMIT {
            self.shared.trouble.lose(&pod);
        }
        if !is_shim_of(shim, &pod) {
            return Ok(());
        }
        self.note(format!("SIGSTOP of the shim of {pod} for {moment:?}"));
        self.shared.history.count("freezes of a shim");
        let stopped = kill(shim, Signal::SIGSTOP).is_ok();
        tokio::time::sleep(moment).await;
        if stopped && is_shim_of(shim, &pod) {
            // Killed by the daemon meanwhile, it needs no more.
            let _ = kill(shim, Signal::SIGCONT);
        }
        Ok(())
    }
}

/// Whether a process is still what it was said to be: pids are used again.
fn is_shim_of(pid: Pid, pod: &str) -> bool {
    let text = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.contains("gantry-shim") && text.contains(pod)
}
