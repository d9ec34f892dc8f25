//! Against a systemd of our own at the other end of a socket.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use gantry_types::Kind;
use tokio::net::UnixStream;
use zbus::connection::Builder;
use zbus::object_server::SignalEmitter;
use zbus::zvariant::OwnedValue;

use super::*;

const LIMIT: Duration = Duration::from_secs(60);

/// What the fake was asked for, and how it is to behave.
#[derive(Default)]
struct World {
    /// Units by name, with their properties.
    units: StdMutex<BTreeMap<String, BTreeMap<String, OwnedValue>>>,
    hangs: AtomicBool,
    fails: AtomicBool,
    dialled: AtomicU32,
    /// The other ends of connections, kept alive.
    servers: StdMutex<Vec<Connection>>,
}

struct Manager(Arc<World>);

#[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
impl Manager {
    async fn subscribe(&self) {}

    async fn start_transient_unit(
        &self,
        name: String,
        mode: String,
        properties: Vec<(String, OwnedValue)>,
        _auxiliary: Vec<(String, Vec<(String, OwnedValue)>)>,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> zbus::fdo::Result<OwnedObjectPath> {
        assert_eq!(mode, "fail");
        if self.0.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        let result = if self.0.fails.load(Ordering::Relaxed) {
            "failed"
        } else {
            "done"
        };
        lock(&self.0.units).insert(name.clone(), properties.into_iter().collect());
        ended(&emitter, "another.scope", "/job/1", "done").await;
        // Before its answer, as may happen.
        ended(&emitter, &name, "/job/7", "timeout").await;
        ended(&emitter, &name, "/job/2", result).await;
        Ok(path("/job/2"))
    }

    async fn stop_unit(
        &self,
        name: String,
        mode: String,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, NoSuchUnit> {
        assert_eq!(mode, "replace");
        if lock(&self.0.units).remove(&name).is_none() {
            return Err(NoSuchUnit::NoSuchUnit(format!("Unit {name} not loaded.")));
        }
        ended(&emitter, &name, "/job/3", "done").await;
        Ok(path("/job/3"))
    }

    #[zbus(signal)]
    async fn job_removed(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: OwnedObjectPath,
        unit: &str,
        result: &str,
    ) -> zbus::Result<()>;
}

#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.freedesktop.systemd1")]
enum NoSuchUnit {
    #[zbus(error)]
    ZBus(zbus::Error),
    NoSuchUnit(String),
}

fn path(text: &str) -> OwnedObjectPath {
    text.try_into().unwrap()
}

async fn ended(emitter: &SignalEmitter<'_>, unit: &str, job: &str, result: &str) {
    let job = path(job);
    Manager::job_removed(emitter, 1, job, unit, result)
        .await
        .unwrap();
}

struct Fake(Arc<World>);

#[async_trait]
impl Dial for Fake {
    async fn dial(&self) -> zbus::Result<Connection> {
        self.0.dialled.fetch_add(1, Ordering::Relaxed);
        let (ours, theirs) = UnixStream::pair()?;
        let server = Builder::unix_stream(theirs)
            .server(zbus::Guid::generate())?
            .p2p()
            .serve_at(PATH, Manager(Arc::clone(&self.0)))?;
        let client = Builder::unix_stream(ours).p2p();
        let (server, client) = tokio::try_join!(server.build(), client.build())?;
        lock(&self.0.servers).push(server);
        Ok(client)
    }
}

fn fake(limit: Duration) -> (Arc<World>, Systemd) {
    let world = Arc::new(World::default());
    (Arc::clone(&world), Systemd::new(Fake(world), limit))
}

fn scope(name: &str) -> Scope {
    Scope {
        name: name.to_owned(),
        slice: "kubepods-pod1.slice".to_owned(),
        description: "a pod".to_owned(),
        pid: 4711,
    }
}

#[tokio::test]
async fn a_scope_is_started_with_its_process_and_stopped() {
    let (world, systemd) = fake(LIMIT);
    systemd.start(&scope("a.scope")).await.unwrap();
    let properties = lock(&world.units)["a.scope"].clone();
    let pids: Vec<u32> = properties["PIDs"].try_clone().unwrap().try_into().unwrap();
    assert_eq!(pids, [4711]);
    let text = |name: &str| String::try_from(properties[name].try_clone().unwrap()).unwrap();
    assert_eq!(text("Slice"), "kubepods-pod1.slice");
    assert_eq!(text("CollectMode"), "inactive-or-failed");
    systemd.stop("a.scope").await.unwrap();
    assert!(lock(&world.units).is_empty());
    systemd
        .stop("a.scope")
        .await
        .expect("one that is not there is success");
    assert_eq!(world.dialled.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_job_that_fails_is_an_error_that_names_the_unit() {
    let (world, systemd) = fake(LIMIT);
    world.fails.store(true, Ordering::Relaxed);
    let error = systemd.start(&scope("a.scope")).await.unwrap_err();
    assert!(
        error.to_string().contains("a.scope") && error.to_string().contains("failed"),
        "{error}"
    );
    assert_eq!(error.kind(), ErrorKind::Internal);
}

#[tokio::test]
async fn a_systemd_that_hangs_costs_the_call_and_no_other() {
    let (world, systemd) = fake(Duration::from_secs(2));
    world.hangs.store(true, Ordering::Relaxed);
    let error = systemd.start(&scope("a.scope")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
    world.hangs.store(false, Ordering::Relaxed);
    systemd.start(&scope("b.scope")).await.unwrap();
}

#[tokio::test]
async fn a_lost_connection_is_made_anew() {
    let (world, systemd) = fake(LIMIT);
    systemd.start(&scope("a.scope")).await.unwrap();
    let server = lock(&world.servers).pop().unwrap();
    server.close().await.unwrap();
    // Whoever is first may meet the loss itself.
    if systemd.start(&scope("b.scope")).await.is_err() {
        systemd.start(&scope("b.scope")).await.unwrap();
    }
    assert_eq!(world.dialled.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn many_at_once_hear_of_their_own_jobs() {
    let (world, systemd) = fake(LIMIT);
    let names: Vec<_> = (0..50).map(|n| scope(&format!("{n}.scope"))).collect();
    let all = futures::future::join_all(names.iter().map(|one| systemd.start(one))).await;
    all.into_iter().for_each(|one| one.unwrap());
    assert_eq!(lock(&world.units).len(), 50);
    let link = systemd.link().await.unwrap();
    assert!(lock(&link.waiters).is_empty());
}
