//! systemd's watchdog: with `WatchdogSec=` in the unit, whoever is silent for so long is killed and
//! started again. So a ping must mean that a restart would help nobody.
//!
//! It is sent, at half of that time, when all of these are so; where one is not, they are looked at
//! again soon:
//!
//! - the async runtime runs what is due: this task, on one of its workers;
//! - a call comes through: the socket accepts, HTTP/2 and the services answer a list that reads the
//!   registry, which takes its lock. That it is told to wait for recovery is an answer too;
//! - the store answers a look-up, by a thread of its own, so that it needs none of those that a hung
//!   disk or plugin has used up. An error is an answer: a full disk is no reason to restart.
//!
//! Silence counts, of a call too, unless a flush is under way or one of our threads was seen to sleep
//! in the kernel for a disk (state D): then the disk is slow or gone, and the next daemon would wait
//! for it as well. What is left is a lock that nobody gives back.
//!
//! What hangs in one pod (shim, plugin, runtime) is not asked at all: it has deadlines of its own, and
//! containers do not care. systemd counts from READY=1 on; before that a recovery that makes progress
//! asks for more time ([`while_recovering`]).

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use gantry_cri_api::v1::{ListPodSandboxRequest, PodSandboxFilter};
use gantry_supervisor::Supervisor;
use gantry_sys::process::Stat;
use hyper_util::rt::TokioIo;
use sd_notify::NotifyState;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior};
use tonic::transport::Endpoint;

/// How often recovery's progress is looked at, and the time that it is given on from there.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
const MORE_TIME: Duration = Duration::from_secs(60);

/// How often threads are looked at while an answer is waited for.
const LOOKS: u32 = 16;

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
    /// It was told that a disk is waited for.
    disk_noted: bool,
}

impl Watchdog {
    async fn run(mut self, limit: Duration) {
        let mut ticks = tokio::time::interval(limit / 2);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            until_well(limit, &mut self).await;
            if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
                tracing::warn!(%error, "watchdog");
            }
        }
    }

    fn disk(&mut self) {
        if !std::mem::replace(&mut self.disk_noted, true) {
            tracing::error!("we wait for a disk, which a restart would not change");
        }
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
        let supervisor = &self.supervisor;
        let disk = || supervisor.store_now().flushing.is_some() || waits_for_disk();
        match unless_disk(limit, answer, disk).await {
            Waited::Answer(_) => {
                self.probe = None;
                self.disk_noted = false;
                Ok(())
            }
            Waited::Disk => {
                self.disk();
                Ok(())
            }
            Waited::Silence => Err("the store does not answer, and not for its disk"),
        }
    }
}

/// What a ping depends on.
trait Check {
    /// Why there is to be none. An answer is waited for until `limit`.
    fn check(&mut self, limit: Duration) -> impl Future<Output = Result<(), &'static str>> + Send;
}

impl Check for Watchdog {
    async fn check(&mut self, limit: Duration) -> Result<(), &'static str> {
        match unless_disk(limit, call(&self.socket), waits_for_disk).await {
            Waited::Answer(Ok(())) => {}
            Waited::Answer(Err(error)) => {
                tracing::error!(%error, "watchdog: a call over our own socket");
                return Err("a call over our own socket failed");
            }
            Waited::Disk => {
                self.disk();
                return Ok(());
            }
            Waited::Silence => return Err("a call over our own socket is not answered"),
        }
        self.store(limit).await
    }
}

/// Returns when a check has gone well. One that failed is made again soon: a ping at half the limit
/// and the next a whole half later leave room for a slow check, but not for one that is missed.
async fn until_well(limit: Duration, of: &mut impl Check) {
    let pause = limit / 8;
    let mut told = false;
    loop {
        let began = Instant::now();
        let Err(reason) = of.check(pause).await else {
            return;
        };
        if !std::mem::replace(&mut told, true) {
            tracing::error!(reason, "systemd is not told that we are well");
        }
        // One that took its time is made again at once.
        tokio::time::sleep_until(began + pause).await;
    }
}

/// How a wait ended.
enum Waited<T> {
    Answer(T),
    /// There was no answer, and a disk was waited for meanwhile.
    Disk,
    Silence,
}

/// Waits for an answer. Whether a disk is waited for is looked at again and again: what reads block
/// by block is between two of them for a moment, which may be the last one.
async fn unless_disk<T>(
    limit: Duration,
    answer: impl Future<Output = T>,
    disk: impl Fn() -> bool,
) -> Waited<T> {
    let mut seen = false;
    let look = async {
        let mut looks = tokio::time::interval(limit / LOOKS);
        // There is nothing to see before the first wait.
        looks.tick().await;
        while !seen {
            looks.tick().await;
            seen = disk();
        }
        std::future::pending::<Infallible>().await
    };
    let answered = tokio::select! {
        // An answer that has come counts, however late we are.
        biased;
        answer = answer => Some(answer),
        () = tokio::time::sleep(limit) => None,
        never = look => match never {},
    };
    match answered {
        Some(answer) => Waited::Answer(answer),
        None if seen || disk() => Waited::Disk,
        None => Waited::Silence,
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
    let mut ids = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
    ids.any(|id| Stat::read(id).is_ok_and(|thread| thread.state == b'D'))
}

/// Asks systemd for more time for as long as recovery makes progress. Never ends.
pub async fn while_recovering(supervisor: &Supervisor) -> Infallible {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const LIMIT: Duration = Duration::from_secs(60);

    /// Fails so many times.
    struct Slow {
        takes: Duration,
        left: u32,
    }

    impl Check for Slow {
        async fn check(&mut self, limit: Duration) -> Result<(), &'static str> {
            assert_eq!(limit, LIMIT / 8);
            if self.left == 0 {
                return Ok(());
            }
            self.left -= 1;
            tokio::time::sleep(self.takes).await;
            Err("slow")
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_that_fails_is_made_again_before_systemd_has_waited_for_long() {
        for takes in [Duration::ZERO, LIMIT / 8] {
            let began = Instant::now();
            let mut slow = Slow { takes, left: 3 };
            until_well(LIMIT, &mut slow).await;
            assert_eq!(slow.left, 0);
            // With half the limit since the ping before it: no later than systemd waits.
            let took = began.elapsed();
            assert!((LIMIT * 3 / 8..=LIMIT / 2).contains(&took), "{took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_excused_by_a_disk_that_was_waited_for_at_any_time_of_it() {
        let never = || std::future::pending::<()>();
        let silence = unless_disk(LIMIT, never(), || false).await;
        assert!(matches!(silence, Waited::Silence));
        // For a moment in the middle, which is over when the time is up.
        let began = Instant::now();
        let middle = || (LIMIT / 3..LIMIT / 2).contains(&began.elapsed());
        let disk = unless_disk(LIMIT, never(), middle).await;
        assert!(matches!(disk, Waited::Disk));
        assert_eq!(began.elapsed(), LIMIT);
        // An answer that comes late enough is one all the same, and nobody looks for a disk on and on.
        let looks = Cell::new(0);
        let late = async {
            tokio::time::sleep(LIMIT * 3 / 4).await;
            7
        };
        let disk = || looks.replace(looks.get() + 1) == 2;
        let answer = unless_disk(LIMIT, late, disk).await;
        assert!(matches!(answer, Waited::Answer(7)));
        assert_eq!(looks.get(), 3);
    }
}
