//! systemd's watchdog: with `WatchdogSec=` in the unit, whoever is silent for so long is killed and
//! started again. So a ping must mean that a restart would help nobody.
//!
//! It is sent, at half of that time, when all of these are so:
//!
//! - the async runtime runs what is due: this task, on one of its workers;
//! - a call comes through: the socket accepts, HTTP/2 and the services answer a list that reads the
//!   registry, which takes its lock. That it is told to wait for recovery is an answer too;
//! - the store answers a look-up, by a thread of its own, so that it needs none of those that a hung
//!   disk or plugin has used up. An error is an answer: a full disk is no reason to restart. Silence
//!   counts unless a flush is under way or one of our threads sleeps in the kernel for a disk (state
//!   D): then the disk is slow or gone, and the next daemon would wait for it as well. What is left is
//!   a lock that nobody gives back.
//!
//! What hangs in one pod (shim, plugin, runtime) is not asked at all: it has deadlines of its own, and
//! containers do not care. systemd counts from READY=1 on; before that a recovery that makes progress
//! asks for more time ([`while_recovering`]).

use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use gantry_cri_api::v1::{ListPodSandboxRequest, PodSandboxFilter};
use gantry_supervisor::Supervisor;
use hyper_util::rt::TokioIo;
use sd_notify::NotifyState;
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, timeout};
use tonic::transport::Endpoint;

/// How often recovery's progress is looked at, and the time that it is given on from there.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
const MORE_TIME: Duration = Duration::from_secs(60);

/// Begins to ping, if systemd wants it.
pub fn start(socket: &Path, supervisor: Supervisor) {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return;
    };
    let watchdog = Watchdog {
        socket: socket.to_owned(),
        supervisor,
        probe: None,
        disk_noted: false,
    };
    tracing::info!(?limit, "systemd's watchdog");
    tokio::spawn(watchdog.run(limit));
}

struct Watchdog {
    socket: PathBuf,
    supervisor: Supervisor,
    /// A look-up that the store has not answered.
    probe: Option<oneshot::Receiver<()>>,
    /// It was told that the store waits for its disk.
    disk_noted: bool,
}

impl Watchdog {
    async fn run(mut self, limit: Duration) {
        let mut ticks = tokio::time::interval(limit / 2);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // With the tick before it less than the limit.
            if let Err(reason) = self.check(limit / 8).await {
                tracing::error!(reason, "systemd is not told that we are well");
                continue;
            }
            if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
                tracing::warn!(%error, "watchdog");
            }
        }
    }

    async fn check(&mut self, limit: Duration) -> Result<(), &'static str> {
        match timeout(limit, call(&self.socket)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(%error, "watchdog: a call over our own socket");
                return Err("a call over our own socket failed");
            }
            Err(_) => return Err("a call over our own socket is not answered"),
        }
        self.store(limit).await
    }

    async fn store(&mut self, limit: Duration) -> Result<(), &'static str> {
        let answer = match &mut self.probe {
            Some(answer) => answer,
            none => {
                let (sender, answer) = oneshot::channel();
                let supervisor = self.supervisor.clone();
                let thread = std::thread::Builder::new()
                    .name("store-probe".to_owned())
                    .spawn(move || {
                        // An error is for those who ask for something.
                        if let Err(error) = supervisor.probe_store() {
                            tracing::debug!(%error, "watchdog: store");
                        }
                        let _ = sender.send(());
                    });
                if let Err(error) = thread {
                    // Out of threads or memory: a restart frees them, but so does the end of whoever
                    // has them, and that may be a container.
                    tracing::warn!(%error, "watchdog: no thread for a look at the store");
                    return Ok(());
                }
                none.insert(answer)
            }
        };
        if timeout(limit, answer).await.is_ok() {
            self.probe = None;
            self.disk_noted = false;
            return Ok(());
        }
        if self.supervisor.store_now().flushing.is_none() && !waits_for_disk() {
            return Err("the store does not answer, and not for its disk");
        }
        if !std::mem::replace(&mut self.disk_noted, true) {
            tracing::error!("the store waits for its disk, which a restart would not change");
        }
        Ok(())
    }
}

/// A list that finds nothing.
async fn call(socket: &Path) -> Result<(), tonic::Status> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move {
            tokio::net::UnixStream::connect(path)
                .await
                .map(TokioIo::new)
        }
    });
    // The authority names nothing: the connection goes to the socket.
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .map_err(|error| tonic::Status::unknown(error.to_string()))?;
    let filter = PodSandboxFilter {
        id: "watchdog".to_owned(),
        ..Default::default()
    };
    let request = ListPodSandboxRequest {
        filter: Some(filter),
    };
    let mut client = RuntimeServiceClient::new(channel);
    match client.list_pod_sandbox(request).await {
        Ok(_) => Ok(()),
        // Recovery.
        Err(status) if status.code() == tonic::Code::Unavailable => Ok(()),
        Err(status) => Err(status),
    }
}

/// Whether one of our threads is in an uninterruptible wait.
fn waits_for_disk() -> bool {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else {
        return false;
    };
    let states = tasks.filter_map(|task| {
        let stat = std::fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
        stat.rsplit_once(')')?.1.trim_start().chars().next()
    });
    states.into_iter().any(|state| state == 'D')
}

/// Asks systemd for more time for as long as recovery makes progress. Never ends.
pub async fn while_recovering(supervisor: &Supervisor) -> std::convert::Infallible {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return std::future::pending().await;
    }
    let mut before = None;
    loop {
        let (done, found) = supervisor.activity().recovery();
        if before != Some((done, found)) {
            before = Some((done, found));
            let usec = u32::try_from(MORE_TIME.as_micros()).unwrap_or(u32::MAX);
            let status = format!("recovering: {done} of {found} pods");
            let states = [
                NotifyState::ExtendTimeoutUsec(usec),
                NotifyState::Status(&status),
            ];
            if let Err(error) = sd_notify::notify(&states) {
                tracing::warn!(%error, "systemd was not asked for more time");
            }
        }
        tokio::time::sleep(PROGRESS_INTERVAL).await;
    }
}
