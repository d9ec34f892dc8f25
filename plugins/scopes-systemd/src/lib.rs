//! Scopes by asking systemd over D-Bus (org.freedesktop.systemd1(5)).
//!
//! ```text
//! us                                         systemd
//!  |-- StartTransientUnit(name, "fail", ..) -->|
//!  |<------------------------- path of a job --|
//!  |<-- JobRemoved(job, name, result) ---------|   the process is in its cgroup
//! ```
//!
//! A job may end before its path has reached whoever waits for it. So each waiter is listed by the
//! unit's name before it asks, hears of all jobs of that unit, and picks its own.
//!
//! One connection to the system bus serves all pods and is made anew when it is lost.

use std::collections::HashMap;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use gantry_ports::Error;
use gantry_ports::scopes::{Scope, Scopes};
use gantry_types::ErrorKind;
use tokio::sync::{Mutex, mpsc};
use zbus::zvariant::{OwnedObjectPath, Value};
use zbus::{Connection, MatchRule, MessageStream};

#[cfg(test)]
mod tests;

const DESTINATION: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";

/// Ends of jobs that one unit may have before its waiter looks.
const JOBS: usize = 8;

/// How connections are made.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    async fn dial(&self) -> zbus::Result<Connection>;
}

/// The system bus; `DBUS_SYSTEM_BUS_ADDRESS` may name another.
#[derive(Debug, Default)]
pub struct SystemBus;

#[async_trait]
impl Dial for SystemBus {
    async fn dial(&self) -> zbus::Result<Connection> {
        Connection::system().await
    }
}

/// systemd, as PID 1 of this machine.
pub struct Systemd {
    dial: Box<dyn Dial>,
    /// For one call as a whole, connecting included.
    limit: Duration,
    link: Mutex<Option<Arc<Link>>>,
}

/// The end of a job.
struct JobEnd {
    job: OwnedObjectPath,
    result: String,
}

/// Who waits for jobs, by the name of the unit.
type Waiters = Arc<StdMutex<HashMap<String, mpsc::Sender<JobEnd>>>>;

struct Link {
    connection: Connection,
    waiters: Waiters,
    listener: tokio::task::JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

fn lock<T>(mutex: &StdMutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Systemd {
    /// Nothing is asked before the first call. `limit` bounds each call.
    pub fn new(dial: impl Dial, limit: Duration) -> Self {
        Self {
            dial: Box::new(dial),
            limit,
            link: Mutex::default(),
        }
    }

    /// Connects now, so that the first pod need not.
    pub async fn connect(&self) -> Result<(), Error> {
        self.bounded("connect", async |_| Ok(Ok(()))).await
    }

    /// Runs `call` on the connection, within the limit. The connection is given up when it did not
    /// serve: a lost one, or one whose other end hangs.
    async fn bounded<T>(
        &self,
        what: &str,
        call: impl AsyncFnOnce(&Link) -> zbus::Result<Result<T, Error>>,
    ) -> Result<T, Error> {
        let attempt = async {
            let link = self.link().await?;
            call(&link).await
        };
        let failed = match tokio::time::timeout(self.limit, attempt).await {
            Ok(Ok(outcome)) => return outcome,
            // It answers, and refuses.
            Ok(Err(zbus::Error::MethodError(name, text, _))) => {
                let text = text.unwrap_or_default();
                return Err(Error::internal(format!("systemd: {what}: {name}: {text}")));
            }
            Ok(Err(error)) => {
                Error::new(ErrorKind::Unavailable, format!("systemd: {what}: {error}"))
            }
            Err(_) => Error::new(
                ErrorKind::DeadlineExceeded,
                format!("systemd: {what}: no answer within {:?}", self.limit),
            ),
        };
        // Others on it go on: they hold it themselves.
        if let Ok(mut link) = self.link.try_lock() {
            *link = None;
        }
        Err(failed)
    }

    async fn link(&self) -> zbus::Result<Arc<Link>> {
        let mut slot = self.link.lock().await;
        if let Some(link) = &*slot
            && !link.listener.is_finished()
        {
            return Ok(Arc::clone(link));
        }
        let link = Arc::new(Link::new(self.dial.dial().await?).await?);
        *slot = Some(Arc::clone(&link));
        Ok(link)
    }
}

impl Link {
    async fn new(connection: Connection) -> zbus::Result<Self> {
        let rule = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .interface(MANAGER)?
            .member("JobRemoved")?
            .path(PATH)?
            .build();
        let jobs = MessageStream::for_match_rule(rule, &connection, None).await?;
        // systemd tells nobody of jobs before somebody has asked it to.
        connection
            .call_method(Some(DESTINATION), PATH, Some(MANAGER), "Subscribe", &())
            .await?;
        let waiters = Waiters::default();
        let listener = tokio::spawn(listen(jobs, Arc::clone(&waiters)));
        Ok(Self {
            connection,
            waiters,
            listener,
        })
    }

    /// Calls a method whose answer is a job for `unit`, and waits for the job's end.
    async fn job<B>(&self, unit: &str, method: &str, body: &B) -> zbus::Result<Result<(), Error>>
    where
        B: zbus::export::serde::Serialize + zbus::zvariant::DynamicType,
    {
        let (sender, mut ends) = mpsc::channel(JOBS);
        lock(&self.waiters).insert(unit.to_owned(), sender);
        let _listed = Listed {
            waiters: &self.waiters,
            unit,
        };
        let answer = self
            .connection
            .call_method(Some(DESTINATION), PATH, Some(MANAGER), method, body)
            .await?;
        let job: OwnedObjectPath = answer.body().deserialize()?;
        while let Some(end) = ends.recv().await {
            if end.job == job {
                return Ok(match end.result.as_str() {
                    "done" => Ok(()),
                    result => Err(Error::internal(format!(
                        "systemd: {method} {unit}: the job ended with {result:?}"
                    ))),
                });
            }
        }
        Err(zbus::Error::InputOutput(Arc::new(
            std::io::ErrorKind::ConnectionAborted.into(),
        )))
    }
}

/// Takes a waiter off the list, however it ends.
struct Listed<'a> {
    waiters: &'a Waiters,
    unit: &'a str,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        lock(self.waiters).remove(self.unit);
    }
}

/// Hands the ends of jobs to who waits for them. When the connection ends, so do they.
async fn listen(mut jobs: MessageStream, waiters: Waiters) {
    while let Some(Ok(message)) = jobs.next().await {
        // JobRemoved(u id, o job, s unit, s result)
        let body = message.body();
        match body.deserialize::<(u32, OwnedObjectPath, String, String)>() {
            Ok((_, job, unit, result)) => {
                if let Some(waiter) = lock(&waiters).get(&unit) {
                    // Full only if the unit has many more jobs than the waiter asked for.
                    let _ = waiter.try_send(JobEnd { job, result });
                }
            }
            Err(error) => tracing::warn!(%error, "systemd: a JobRemoved that cannot be read"),
        }
    }
    lock(&waiters).clear();
}

#[async_trait]
impl Scopes for Systemd {
    async fn start(&self, scope: &Scope) -> Result<(), Error> {
        let pid = u32::try_from(scope.pid)
            .map_err(|_| Error::internal(format!("{} is not a process", scope.pid)))?;
        let properties: Vec<(&str, Value<'_>)> = vec![
            ("Description", scope.description.as_str().into()),
            ("Slice", scope.slice.as_str().into()),
            ("PIDs", vec![pid].into()),
            // It ends with its process, not with the shutdown's first round.
            ("DefaultDependencies", false.into()),
            // Also after the OOM killer was in it: nobody resets failed units of ours.
            ("CollectMode", "inactive-or-failed".into()),
            // Without controllers of its own node agents find no counters in it.
            ("CPUAccounting", true.into()),
            ("MemoryAccounting", true.into()),
            ("TasksAccounting", true.into()),
            // What is stopped as a scope was asked to end before; neither shim nor holder heeds
            // SIGTERM.
            ("KillSignal", SIGKILL.into()),
        ];
        let auxiliary: Vec<(&str, Vec<(&str, Value<'_>)>)> = Vec::new();
        let body = (scope.name.as_str(), "fail", properties, auxiliary);
        let what = format!("start {}", scope.name);
        self.bounded(&what, async |link| {
            link.job(&scope.name, "StartTransientUnit", &body).await
        })
        .await
    }

    async fn stop(&self, name: &str) -> Result<(), Error> {
        let what = format!("stop {name}");
        self.bounded(&what, async |link| {
            match link.job(name, "StopUnit", &(name, "replace")).await {
                Err(zbus::Error::MethodError(error, ..)) if error == NO_SUCH_UNIT => Ok(Ok(())),
                other => other,
            }
        })
        .await
    }
}

const SIGKILL: i32 = 9;
