//! Finding everything again after a restart.
//!
//! What recovery assumes: while the daemon was down, shims may have gone on, ended or hung;
//! containers may have exited, their exit written to the bundle; the machine may have rebooted,
//! which empties the run directories and makes recorded pids meaningless; a record may lack its
//! thing and a thing its record. The kernel and the shims win over records.
//!
//! [`reconcile`] decides, without I/O; the rest of this module observes and acts, pod by pod, in
//! parallel and bounded in time. What cannot be read is reported and kept.
//!
//! An object one of whose records cannot be read is left alone as a whole, and not shown: its
//! processes, its files and its records stay for the gantryd that can read them, which after a
//! downgrade is the one that was there before.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use gantry_cri_api::v1 as cri;
use gantry_shim_api::v1;
use gantry_store::{EnvelopeError, record};
use gantry_types::{ContainerId, ContainerState, Exit, PodId, PodState, ProcessRef};
use prost::Message;
use tokio::sync::{Semaphore, mpsc};

use crate::activity::Of;
use crate::audit::known::Known;
use crate::container::{
    Container, half_made, lost_exit, read_exit, remove_files, unknown_exit, unmount,
};
use crate::events::{Life, Told};
use crate::pod::{
    Driver, MAILBOX, Msg, blocking, end_holder, end_runtime_calls, end_shim, kill, release_network,
    sweep,
};
use crate::records::{container_state, pod_state, set_container_state, set_pod_state};
use crate::registry::{ContainerFacts, PodFacts, PodName};
use crate::rundir::{self, RunRecord, names, read_record};
use crate::shim::Shim;
use crate::{Context, Error};

/// What a look at a pod's shim gave.
#[derive(Clone, Debug, PartialEq)]
pub enum Observed {
    /// It answers.
    Shim {
        process: ProcessRef,
        holder: Option<ProcessRef>,
        containers: Vec<ObservedContainer>,
    },
    /// Its process is gone, or of an earlier boot.
    Gone,
    /// Its process lives and does not answer.
    Hung,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedContainer {
    pub id: String,
    pub process: Option<ProcessRef>,
    pub started_at: i64,
    pub exit: Option<Exit>,
}

/// What is to be done with a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodAction {
    /// It is as recorded; the shim, if any, is taken over.
    Keep(PodState),
    /// It was never acknowledged: take everything back and forget it.
    Undo,
    /// The shim lives but must not: kill it, then treat it as gone.
    KillShim,
}

/// What is to be done with a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContainerAction {
    Keep(ContainerState),
    Undo,
    /// Nobody watches it any more: read the exit record, kill what is left.
    Lost(&'static str),
}

/// What becomes of a pod, given its record and what was seen.
pub fn reconcile_pod(recorded: &PodState, observed: &Observed) -> PodAction {
    match (recorded, observed) {
        (_, Observed::Hung) => PodAction::KillShim,
        (PodState::Creating, _) => PodAction::Undo,
        (
            PodState::Ready { .. },
            Observed::Shim {
                process,
                holder: Some(holder),
                ..
            },
        ) => PodAction::Keep(PodState::Ready {
            shim: *process,
            holder: *holder,
        }),
        (PodState::Ready { .. }, Observed::Shim { holder: None, .. }) => {
            PodAction::Keep(PodState::NotReady {
                reason: "the pod's holder process ended".to_owned(),
            })
        }
        (PodState::Ready { .. }, Observed::Gone) => PodAction::Keep(PodState::NotReady {
            reason: "the pod's shim ended".to_owned(),
        }),
        (PodState::NotReady { .. }, _) => PodAction::Keep(recorded.clone()),
    }
}

/// What becomes of a container, given its record and what was seen of its pod's shim.
pub fn reconcile_container(
    id: &str,
    recorded: &ContainerState,
    observed: &Observed,
) -> ContainerAction {
    let seen = match observed {
        Observed::Shim { containers, .. } => containers.iter().find(|seen| seen.id == id),
        Observed::Gone | Observed::Hung => None,
    };
    match (recorded, seen) {
        (ContainerState::Creating, _) => ContainerAction::Undo,
        (ContainerState::Exited { .. }, _) => ContainerAction::Keep(recorded.clone()),
        (
            ContainerState::Created
            | ContainerState::Running { .. }
            | ContainerState::Unknown { .. },
            Some(ObservedContainer {
                process,
                started_at,
                exit,
                ..
            }),
        ) => {
            // What was acknowledged stays: the start time is the one that was told.
            let started_at = match recorded {
                ContainerState::Running { started_at, .. } => *started_at,
                _ => *started_at,
            };
            match (exit, process) {
                (Some(exit), _) => ContainerAction::Keep(ContainerState::Exited {
                    exit: exit.clone(),
                    started_at,
                }),
                (None, Some(process)) => ContainerAction::Keep(ContainerState::Running {
                    process: *process,
                    started_at,
                }),
                // The shim is about to start it: the reply went to the daemon before us.
                (None, None) => ContainerAction::Keep(recorded.clone()),
            }
        }
        (ContainerState::Created, None) => ContainerAction::Keep(recorded.clone()),
        (ContainerState::Running { .. }, None) => {
            ContainerAction::Lost("it ended while nobody watched")
        }
        (ContainerState::Unknown { .. }, None) => {
            ContainerAction::Lost("its state was unknown and its shim has gone")
        }
    }
}

/// Everything recorded of one pod.
struct Recorded {
    facts: Arc<PodFacts>,
    status: record::PodStatus,
    containers: Vec<(Arc<ContainerFacts>, record::ContainerStatus)>,
    /// Containers of it whose records are newer than we are.
    newer: Vec<ContainerId>,
}

/// Objects that have a record which cannot be read.
#[derive(Debug, Default)]
struct Unreadable {
    /// How many records that are.
    records: usize,
    pods: Keys,
    containers: Keys,
}

/// By key; whether the record is newer than we are, and not just damaged.
type Keys = BTreeMap<String, bool>;

/// Notes the object of a record that cannot be read.
fn note(keys: &mut Keys, key: String, newer: bool) {
    *keys.entry(key).or_default() |= newer;
}

/// What recovery found, for the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub pods: usize,
    pub containers: usize,
    /// Records that could not be read and were kept.
    pub unreadable: usize,
    /// Things without a record that were removed.
    pub orphans: usize,
}

/// Recovers all pods.
pub(crate) async fn recover(ctx: &Arc<Context>) -> Result<Summary, Error> {
    let ctx_ = Arc::clone(ctx);
    let (recorded, mut summary) = blocking(move || {
        let unreadable = complete_store(&ctx_)?;
        let (recorded, mut summary) = load(&ctx_, unreadable)?;
        if let Err(error) = ctx_.image_mounts.load(&ctx_.records.dirs.image_mounts()) {
            // It may name any layer.
            tracing::error!(%error, "which images are mounted is not known: no layer is removed");
            summary.unreadable += 1;
        }
        Ok((recorded, summary))
    })
    .await?;
    ctx.unreadable
        .store(summary.unreadable > 0, std::sync::atomic::Ordering::Release);
    ctx.activity.to_recover(recorded.len());
    summary.pods = recorded.len();
    summary.containers = recorded.iter().map(|pod| pod.containers.len()).sum();

    let limit = Arc::new(Semaphore::new(ctx.settings.recovery_parallelism.max(1)));
    let mut tasks = tokio::task::JoinSet::new();
    for pod in recorded {
        let (ctx, limit) = (Arc::clone(ctx), Arc::clone(&limit));
        tasks.spawn(async move {
            let _permit = limit.acquire_owned().await;
            let of = Of::pod(&pod.facts);
            let recovery = async {
                recover_pod(&ctx, pod).await;
                Ok::<_, Error>(())
            };
            // It reports what fails by itself.
            let _ = ctx.activity.during("recover pod", of, recovery).await;
            ctx.activity.recovered();
        });
    }
    while let Some(done) = tasks.join_next().await {
        if let Err(panic) = done {
            tracing::error!(%panic, "recovery of a pod was cut short; its records are kept");
        }
    }
    let ctx_ = Arc::clone(ctx);
    summary.orphans = blocking(move || Ok(remove_orphans(&ctx_))).await?;
    Ok(summary)
}

/// Takes from the run directories what the store has lost: a log that was cut opens as a shorter
/// one, without a word. Returns what can be read in neither place, or is newer in the run directory.
fn complete_store(ctx: &Context) -> Result<Unreadable, Error> {
    let dirs = &ctx.records.dirs;
    let list =
        |dir: &std::path::Path| names(dir).map_err(|error| Error::io("read records", dir, &error));
    let mut unreadable = Unreadable::default();
    for name in list(&dirs.pods())? {
        let Ok(id) = name.parse::<PodId>() else {
            continue;
        };
        let further =
            |ours: &record::PodStatus, stored: &record::PodStatus| pod_age(ours) > pod_age(stored);
        let complete = complete::<record::PodConfig, record::PodStatus>;
        if let Some(newer) = complete(ctx, id.as_str(), &dirs.pod(&id), further)? {
            unreadable.records += 1;
            note(&mut unreadable.pods, name, newer);
        }
    }
    for name in list(&dirs.containers())? {
        let Ok(id) = name.parse::<ContainerId>() else {
            continue;
        };
        let further = |ours: &record::ContainerStatus, stored: &record::ContainerStatus| {
            container_age(ours) > container_age(stored)
        };
        let complete = complete::<record::ContainerConfig, record::ContainerStatus>;
        if let Some(newer) = complete(ctx, id.as_str(), &dirs.container(&id), further)? {
            unreadable.records += 1;
            note(&mut unreadable.containers, name, newer);
        }
    }
    Ok(unreadable)
}

/// As [`complete_store`], for one object; and the other way, for a run directory that is behind.
/// What a newer daemon wrote is never replaced. Returns whether the run directory's records are of a
/// newer one, if they cannot be read and the store's do not tell more.
fn complete<C: RunRecord + Default, S: RunRecord + Default + PartialEq>(
    ctx: &Context,
    id: &str,
    dir: &Path,
    further: impl Fn(&S, &S) -> bool,
) -> Result<Option<bool>, Error> {
    let store = &ctx.records.store;
    let step = Error::step("complete store");
    let stored = (store.get::<C>(id), store.get::<S>(id));
    let copies = rundir::newer::<C, S>(dir);
    for (path, error) in &copies {
        tracing::error!(path = %path.display(), %error,
            "a record file is newer than this gantryd: it is kept and left alone");
    }
    if !copies.is_empty() {
        return Ok(Some(true));
    }
    if is_newer(&stored.0) || is_newer(&stored.1) {
        // Reported when all are read.
        return Ok(None);
    }
    let (Some(config), Some(status)) = (read_record::<C>(dir), read_record::<S>(dir)) else {
        // What the store has and cannot read is reported when all are read.
        let damaged = matches!(stored.0, Ok(None)) && rundir::damaged::<C, S>(dir);
        if damaged {
            tracing::error!(
                id,
                "record files cannot be read: they are kept and left alone"
            );
        }
        return Ok(damaged.then_some(false));
    };
    let behind = match &stored {
        (Ok(Some(_)), Ok(Some(stored))) => further(&status, stored),
        // Not there, or damaged: the copy is as good.
        _ => true,
    };
    if behind {
        tracing::warn!(
            id,
            "the store is behind the run directory, which it is completed from"
        );
        store.put_both(id, &config, &status).map_err(&step)?;
    } else if let (_, Ok(Some(stored))) = &stored
        && *stored != status
        && let Err(error) = rundir::write_record(dir, stored)
    {
        // A daemon that was killed between the two; what the store says may be acknowledged since,
        // and must not be lost with it.
        tracing::warn!(id, %error, "the run directory stays behind the store");
    }
    Ok(None)
}

/// Whether the store has a record that is newer than we are.
fn is_newer<R>(stored: &Result<Option<R>, gantry_store::Error>) -> bool {
    matches!(stored, Err(gantry_store::Error::Unreadable { source, .. }) if source.is_newer())
}

/// How far a pod is in its life. The store is written first, so only a store that has lost
/// something is behind.
fn pod_age(status: &record::PodStatus) -> u8 {
    match status.phase() {
        record::PodPhase::Creating => 0,
        record::PodPhase::Ready => 1,
        record::PodPhase::NotReady => 2,
    }
}

/// As [`pod_age`].
fn container_age(status: &record::ContainerStatus) -> u8 {
    match status.phase() {
        record::ContainerPhase::Creating => 0,
        record::ContainerPhase::Created => 1,
        // Comes after any other, and before the end.
        record::ContainerPhase::Unknown | record::ContainerPhase::Running => 2,
        record::ContainerPhase::Exited => 3,
    }
}

/// Reads all records; what cannot be read is reported and kept.
fn load(ctx: &Context, unreadable: Unreadable) -> Result<(Vec<Recorded>, Summary), Error> {
    let step = Error::step("read records");
    let store = &ctx.records.store;
    let report = |tree: &str, found: Vec<(String, EnvelopeError)>, keys: &mut Keys| {
        let records = found.len();
        for (key, error) in found {
            tracing::error!(tree, key, %error, "a record cannot be read: it is kept and left alone");
            note(keys, key, error.is_newer());
        }
        records
    };
    let pods = store.scan::<record::PodConfig>().map_err(&step)?;
    let statuses = store.scan::<record::PodStatus>().map_err(&step)?;
    let containers = store.scan::<record::ContainerConfig>().map_err(&step)?;
    let container_statuses = store.scan::<record::ContainerStatus>().map_err(&step)?;
    let mut summary = Summary {
        unreadable: unreadable.records,
        ..Default::default()
    };
    let (mut unread_pods, mut unread_containers) = (unreadable.pods, unreadable.containers);
    for records in [
        report("pod-config", pods.unreadable, &mut unread_pods),
        report("pod-status", statuses.unreadable, &mut unread_pods),
        report(
            "container-config",
            containers.unreadable,
            &mut unread_containers,
        ),
        report(
            "container-status",
            container_statuses.unreadable,
            &mut unread_containers,
        ),
    ] {
        summary.unreadable += records;
    }
    // By pod: they are in the way of its removal.
    let mut newer: BTreeMap<String, BTreeSet<ContainerId>> = BTreeMap::new();
    for (key, _) in unread_containers.iter().filter(|(_, newer)| **newer) {
        // Where the configuration can be read it names the same pod.
        if let Ok(id) = key.parse::<ContainerId>()
            && let Some(pod) = pod_of_bundle(&ctx.records.dirs.container(&id))
        {
            newer.entry(pod).or_default().insert(id);
        }
    }

    let mut statuses: BTreeMap<_, _> = statuses.records.into_iter().collect();
    let mut container_statuses: BTreeMap<_, _> = container_statuses.records.into_iter().collect();
    let mut by_pod: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for (key, config) in containers.records {
        let status = container_statuses.remove(&key).unwrap_or_default();
        match container_facts(config) {
            Ok(facts) if unread_containers.contains_key(&key) => {
                if unread_containers[&key] {
                    let of_pod = newer.entry(facts.pod.to_string()).or_default();
                    of_pod.insert(facts.id);
                }
            }
            Ok(facts) => {
                by_pod
                    .entry(facts.pod.to_string())
                    .or_default()
                    .push((Arc::new(facts), status));
            }
            Err(error) => {
                summary.unreadable += 1;
                tracing::error!(key, %error, "container record kept and left alone");
            }
        }
    }
    let mut recorded = Vec::new();
    for (key, config) in pods.records {
        let status = statuses.remove(&key).unwrap_or_default();
        let containers = by_pod.remove(&key).unwrap_or_default();
        if unread_pods.contains_key(&key) {
            let containers = containers.len();
            tracing::error!(key, containers, "a pod is left alone with its containers");
            continue;
        }
        let newer = newer.remove(&key).unwrap_or_default();
        match pod_facts(config) {
            Ok(facts) => recorded.push(Recorded {
                facts: Arc::new(facts),
                status,
                containers,
                newer: newer.into_iter().collect(),
            }),
            Err(error) => {
                summary.unreadable += 1;
                tracing::error!(key, %error, "pod record kept and left alone");
            }
        }
    }
    by_pod.retain(|pod, _| !unread_pods.contains_key(pod));
    for (pod, containers) in by_pod {
        summary.unreadable += containers.len();
        tracing::error!(
            pod,
            containers = containers.len(),
            "containers of a pod without a record"
        );
    }
    for (what, keys) in [
        ("pod sandbox", &unread_pods),
        ("container", &unread_containers),
    ] {
        let newer = keys.iter().filter(|(_, newer)| **newer);
        ctx.registry.keep(what, newer.map(|(key, _)| key.clone()));
    }
    Ok((recorded, summary))
}

/// The pod of a container whose records cannot be read, from its OCI bundle.
fn pod_of_bundle(bundle: &Path) -> Option<String> {
    let spec = std::fs::read(bundle.join("config.json")).ok()?;
    let spec: serde_json::Value = serde_json::from_slice(&spec).ok()?;
    let id = spec["annotations"][gantry_spec::SANDBOX_ID].as_str()?;
    Some(id.to_owned())
}

pub(crate) fn pod_facts(record: record::PodConfig) -> Result<PodFacts, String> {
    let id = record.id.parse().map_err(|error| format!("{error}"))?;
    let config = cri::PodSandboxConfig::decode(record.cri_config.as_slice())
        .map_err(|error| error.to_string())?;
    Ok(PodFacts { id, config, record })
}

fn container_facts(record: record::ContainerConfig) -> Result<ContainerFacts, String> {
    let id = record.id.parse().map_err(|error| format!("{error}"))?;
    let pod = record.pod_id.parse().map_err(|error| format!("{error}"))?;
    let config = cri::ContainerConfig::decode(record.cri_config.as_slice())
        .map_err(|error| error.to_string())?;
    Ok(ContainerFacts {
        id,
        pod,
        config,
        record,
    })
}

async fn recover_pod(ctx: &Arc<Context>, mut pod: Recorded) {
    let (mailbox, messages) = mpsc::channel(MAILBOX);
    let (shim, mut observed) = observe(ctx, &pod, &mailbox).await;
    let recorded = pod_state(&pod.status);
    let mut action = reconcile_pod(&recorded, &observed);
    let mut shim = shim;
    if action == PodAction::KillShim {
        tracing::error!(pod = %pod.facts.id, "shim hung: it is killed and its containers with it");
        if let Some(process) = process_of(&pod.status)
            && let Err(error) = kill(process)
        {
            tracing::error!(pod = %pod.facts.id, %error, "hung shim");
        }
        shim = None;
        observed = Observed::Gone;
        action = reconcile_pod(&recorded, &observed);
    }
    let same_boot = pod.facts.record.boot_id == ctx.settings.boot_id;
    // One that was stopped has nothing on record.
    if observed == Observed::Gone && same_boot && process_of(&pod.status).is_some() {
        end_left(ctx, &pod).await;
    }
    let state = match action {
        PodAction::Undo => {
            // Bounded: a plugin that hangs must not keep the whole node from being served. The
            // pod is then listed, and its removal runs the plugin again.
            let limit = ctx.settings.timeouts.recovery;
            let undone = tokio::time::timeout(limit, undo_pod(ctx, &pod, shim.take())).await;
            let undone = undone.unwrap_or_else(|_| {
                Err(Error::Deadline {
                    what: "clean-up of a half-made pod".to_owned(),
                    seconds: limit.as_secs(),
                })
            });
            if let Err(error) = undone {
                tracing::error!(pod = %pod.facts.id, %error, "half-made pod is left to be removed");
                pod.status.half_made = true;
                PodState::NotReady {
                    reason: format!("half made; {error}"),
                }
            } else {
                tracing::info!(pod = %pod.facts.id, "half-made pod taken back");
                return;
            }
        }
        PodAction::Keep(state) => state,
        PodAction::KillShim => PodState::NotReady {
            reason: "its shim hung".to_owned(),
        },
    };
    adopt(ctx, pod, state, shim, &observed, mailbox, messages).await;
}

/// Ends what may have outlived a shim of this boot: its calls of the OCI runtime, and the holder. The
/// daemon that could have had another shim adopt the pod has died too, and with it what it kept.
async fn end_left(ctx: &Arc<Context>, pod: &Recorded) {
    if let Err(error) = end_runtime_calls(ctx, &pod.facts).await {
        tracing::error!(pod = %pod.facts.id, %error, "what a dead shim has left");
    }
    if let Some(holder) = holder_of(&pod.status)
        && let Err(error) = end_holder(ctx, holder).await
    {
        tracing::error!(pod = %pod.facts.id, %error, "holder of a dead shim");
    }
}

fn process_of(status: &record::PodStatus) -> Option<ProcessRef> {
    status.shim.map(recorded_process)
}

fn holder_of(status: &record::PodStatus) -> Option<ProcessRef> {
    status.holder.map(recorded_process)
}

fn recorded_process(process: record::ProcessRef) -> ProcessRef {
    ProcessRef {
        pid: process.pid,
        start_time: process.start_time,
    }
}

async fn observe(
    ctx: &Arc<Context>,
    pod: &Recorded,
    mailbox: &mpsc::Sender<Msg>,
) -> (Option<Arc<Shim>>, Observed) {
    let same_boot = pod.facts.record.boot_id == ctx.settings.boot_id;
    if !same_boot {
        return (None, Observed::Gone);
    }
    let limit = ctx.settings.timeouts.recovery;
    let socket = ctx.records.dirs.socket(&pod.facts.id);
    let look = async {
        let (shim, hello) = Shim::connect(
            &ctx.activity,
            &pod.facts.id,
            &socket,
            limit,
            mailbox.clone(),
        )
        .await?;
        let state = shim.state(limit).await?;
        Ok::<_, Error>((shim, hello, state))
    };
    match tokio::time::timeout(limit, look).await {
        Ok(Ok((shim, _, state))) => {
            let process = shim.process();
            let observed = Observed::Shim {
                process,
                holder: state.holder.map(process_ref),
                containers: state
                    .containers
                    .into_iter()
                    .map(observed_container)
                    .collect(),
            };
            (Some(shim), observed)
        }
        Ok(Err(error)) => match process_of(&pod.status) {
            Some(process) if gantry_sys::process::alive(process) => {
                tracing::warn!(pod = %pod.facts.id, %error, "shim lives and does not answer");
                (None, Observed::Hung)
            }
            Some(_) | None => (None, Observed::Gone),
        },
        Err(_) => (None, Observed::Hung),
    }
}

fn process_ref(process: v1::Process) -> ProcessRef {
    ProcessRef {
        pid: process.pid,
        start_time: process.start_time,
    }
}

fn observed_container(state: v1::ContainerState) -> ObservedContainer {
    ObservedContainer {
        id: state.id,
        process: state.process.map(process_ref),
        started_at: state.started_at,
        exit: state.exit.map(|exit| Exit {
            code: exit.code,
            finished_at: exit.finished_at,
            oom_killed: exit.oom_killed,
            ..unknown_exit(exit.unknown)
        }),
    }
}

/// Takes a pod back that was never acknowledged.
async fn undo_pod(
    ctx: &Arc<Context>,
    pod: &Recorded,
    shim: Option<Arc<Shim>>,
) -> Result<(), Error> {
    if !pod.facts.record.netns_path.is_empty() {
        release_network(ctx, &pod.facts, &pod.facts.record.network_intent).await?;
    }
    let status = &pod.status;
    end_shim(ctx, &pod.facts, shim, process_of(status), holder_of(status)).await?;
    let (ctx, facts) = (Arc::clone(ctx), Arc::clone(&pod.facts));
    blocking(move || {
        sweep(&ctx, &facts)?;
        ctx.records.forget_pod(&facts.id)
    })
    .await
}

/// Gives a pod its driver back.
async fn adopt(
    ctx: &Arc<Context>,
    pod: Recorded,
    state: PodState,
    shim: Option<Arc<Shim>>,
    observed: &Observed,
    mailbox: mpsc::Sender<Msg>,
    messages: mpsc::Receiver<Msg>,
) {
    let id = pod.facts.id.clone();
    let mut status = pod.status;
    let recorded = pod_state(&status);
    let told = told(&recorded, &pod.containers);
    let changed = recorded != state;
    set_pod_state(&mut status, &state);
    if changed {
        let (ctx, id, status) = (Arc::clone(ctx), id.clone(), status.clone());
        if let Err(error) = blocking(move || ctx.records.put_pod_status(&id, &status)).await {
            tracing::error!(%error, "recovered pod state not recorded");
        }
    }
    let mut driver = Driver::new(
        Arc::clone(ctx),
        Arc::clone(&pod.facts),
        status,
        state,
        mailbox.clone(),
    );
    driver.shim = shim;
    driver.newer = pod.newer;
    for (facts, status) in pod.containers {
        if let Some(container) = recover_container(ctx, facts, status, observed).await {
            driver.add_container(Arc::clone(&container.facts), container);
        }
    }
    if let Some(metadata) = &pod.facts.config.metadata {
        let config_hash = pod
            .facts
            .record
            .config_hash
            .as_slice()
            .try_into()
            .unwrap_or_default();
        let name = PodName::from(metadata);
        let (facts, ready) = (Arc::clone(&pod.facts), driver.state.is_ready());
        ctx.registry
            .adopt(name, facts, config_hash, ready, told, mailbox);
    }
    driver.prepare_for_loss();
    driver.publish();
    for id in starting(observed) {
        driver.finish_earlier_start(&id);
    }
    tokio::spawn(driver.run(messages));
}

/// What an earlier daemon has shown of a pod, as far as the records say: what has become of it since
/// is told to subscribers.
fn told(
    pod: &PodState,
    containers: &[(Arc<ContainerFacts>, record::ContainerStatus)],
) -> Option<Told> {
    if *pod == PodState::Creating {
        return None;
    }
    let now = crate::clock::now_ns();
    let states = containers
        .iter()
        .map(|(facts, status)| (&facts.id, container_state(status)))
        .filter(|(_, state)| *state != ContainerState::Creating);
    let lives = states.map(|(id, state)| (id.clone(), Life::of_record(&state, now)));
    Some(Told {
        ready: pod.is_ready(),
        containers: lives.collect(),
    })
}

/// Containers that an earlier daemon had started and whose start has not ended: nobody would
/// hear of its outcome.
fn starting(observed: &Observed) -> Vec<ContainerId> {
    let containers = match observed {
        Observed::Shim { containers, .. } => containers.as_slice(),
        Observed::Gone | Observed::Hung => &[],
    };
    containers
        .iter()
        .filter(|seen| seen.process.is_none() && seen.exit.is_none())
        .filter_map(|seen| seen.id.parse().ok())
        .collect()
}

async fn recover_container(
    ctx: &Arc<Context>,
    facts: Arc<ContainerFacts>,
    mut status: record::ContainerStatus,
    observed: &Observed,
) -> Option<Container> {
    let recorded = container_state(&status);
    // The bundle's exit record is read even when the shim has gone: it was written first.
    let bundle = ctx.records.dirs.container(&facts.id);
    let state = match reconcile_container(facts.id.as_str(), &recorded, observed) {
        ContainerAction::Keep(state) => state,
        ContainerAction::Undo => {
            let (ctx_, id) = (Arc::clone(ctx), facts.id.clone());
            match blocking(move || remove_files(&ctx_, &id)).await {
                Ok(()) => return None,
                Err(error) => half_made(format!("half made; {error}")),
            }
        }
        ContainerAction::Lost(why) => {
            let same_boot = facts.record.boot_id == ctx.settings.boot_id;
            let exit = match read_exit(&bundle) {
                Some(exit) => exit,
                None if same_boot => lost_exit(ctx, Arc::clone(&facts), why).await,
                // Of an earlier boot: nothing is left to kill, and a cgroup of that name is new.
                None => Exit {
                    code: 137,
                    finished_at: crate::clock::now_ns(),
                    oom_killed: false,
                    reason: Exit::UNKNOWN.to_owned(),
                    message: "the machine was restarted".to_owned(),
                },
            };
            ContainerState::Exited {
                exit,
                started_at: status.started_at,
            }
        }
    };
    if state != recorded {
        set_container_state(&mut status, &state);
        let (ctx_, id, copy) = (Arc::clone(ctx), facts.id.clone(), status.clone());
        if let Err(error) = blocking(move || ctx_.records.put_container_status(&id, &copy)).await {
            tracing::error!(container = %facts.id, %error, "recovered state not recorded");
        }
    }
    Some(Container::new(facts, status))
}

/// Removes things of ours that no record names: directories, snapshots, network namespaces. Kept
/// when a record that cannot be read may belong to them, or another gantryd's.
fn remove_orphans(ctx: &Context) -> usize {
    let dirs = &ctx.records.dirs;
    let known = || {
        let told = |error: &Error| tracing::error!(%error, "what no record names stays");
        Known::new(ctx).inspect_err(told).ok()
    };
    let Some(own) = known() else { return 0 };
    let mut removed = 0;
    let mut note = |what: &str, name: &str, outcome: Result<(), String>| match outcome {
        Ok(()) => {
            removed += 1;
            tracing::info!(what, name, "removed: no record names it");
        }
        Err(error) => tracing::error!(what, name, error, "orphan stays"),
    };
    for name in names(&dirs.containers()).unwrap_or_default() {
        let Ok(id) = name.parse::<ContainerId>() else {
            continue;
        };
        if own.container(&id).is_none() {
            let outcome = unmount(ctx, &id)
                .and_then(|()| rundir::remove_dir(&dirs.container(&id)))
                .map_err(|error| error.to_string());
            note("container directory", id.as_str(), outcome);
        }
    }
    for snapshotter in ctx.snapshotters.iter() {
        match snapshotter.snapshots() {
            Ok(snapshots) => {
                for id in snapshots.iter().filter(|id| own.container(id).is_none()) {
                    let outcome = snapshotter.remove(id).map_err(|error| error.to_string());
                    note("snapshot", id.as_str(), outcome);
                }
            }
            Err(error) => tracing::error!(%error, "snapshots cannot be listed"),
        }
    }
    let pods = names(&dirs.pods()).unwrap_or_default();
    let pods = pods.iter().filter_map(|name| name.parse::<PodId>().ok());
    let pinned = dirs.pinned_netns().unwrap_or_default();
    // Asked anew: a gantryd that has started since may have pinned some of these.
    let Some(known) = known() else { return removed };
    for id in pods.chain(pinned) {
        if known.pod(&id).is_none() {
            let facts = orphan_facts(ctx, &id);
            let outcome = sweep(ctx, &facts)
                .and_then(|()| rundir::remove_dir(&dirs.pod(&id)))
                .map_err(|error| error.to_string());
            note("pod directory", id.as_str(), outcome);
        }
    }
    removed
}

/// What can be told of a pod without a record. The holder's cgroup cannot: its parent was in the
/// request.
pub(crate) fn orphan_facts(ctx: &Context, id: &PodId) -> PodFacts {
    let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let shim_cgroup_dirs = ctx.settings.cgroups.shim(id).unwrap_or_default();
    PodFacts {
        id: id.clone(),
        config: cri::PodSandboxConfig::default(),
        record: record::PodConfig {
            netns_path: text(&ctx.records.dirs.netns(id)),
            shim_cgroup_dirs: shim_cgroup_dirs.iter().map(|dir| text(dir)).collect(),
            ..Default::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIM: ProcessRef = ProcessRef {
        pid: 10,
        start_time: 100,
    };
    const HOLDER: ProcessRef = ProcessRef {
        pid: 11,
        start_time: 101,
    };
    const INIT: ProcessRef = ProcessRef {
        pid: 12,
        start_time: 102,
    };

    fn exit(code: i32) -> Exit {
        Exit {
            code,
            finished_at: 9,
            oom_killed: false,
            reason: String::new(),
            message: String::new(),
        }
    }

    fn shim(holder: bool, containers: Vec<ObservedContainer>) -> Observed {
        Observed::Shim {
            process: SHIM,
            holder: holder.then_some(HOLDER),
            containers,
        }
    }

    fn seen(process: Option<ProcessRef>, exit: Option<Exit>) -> Vec<ObservedContainer> {
        vec![ObservedContainer {
            id: "c".into(),
            process,
            started_at: 5,
            exit,
        }]
    }

    #[test]
    fn pods() {
        let ready = PodState::Ready {
            shim: SHIM,
            holder: HOLDER,
        };
        let stopped = PodState::NotReady {
            reason: "stopped".into(),
        };
        let not_ready = |action: PodAction| match action {
            PodAction::Keep(PodState::NotReady { reason }) => reason,
            other => panic!("{other:?}"),
        };
        // record, observed -> action
        assert_eq!(
            reconcile_pod(&ready, &shim(true, vec![])),
            PodAction::Keep(ready.clone())
        );
        assert!(not_ready(reconcile_pod(&ready, &shim(false, vec![]))).contains("holder"));
        assert!(not_ready(reconcile_pod(&ready, &Observed::Gone)).contains("shim"));
        assert_eq!(reconcile_pod(&ready, &Observed::Hung), PodAction::KillShim);
        for observed in [shim(true, vec![]), shim(false, vec![]), Observed::Gone] {
            assert_eq!(
                reconcile_pod(&PodState::Creating, &observed),
                PodAction::Undo
            );
            assert_eq!(not_ready(reconcile_pod(&stopped, &observed)), "stopped");
        }
        assert_eq!(
            reconcile_pod(&PodState::Creating, &Observed::Hung),
            PodAction::KillShim
        );
    }

    #[test]
    fn containers() {
        let running = ContainerState::Running {
            process: INIT,
            started_at: 3,
        };
        let exited = ContainerState::Exited {
            exit: exit(7),
            started_at: 3,
        };
        let unknown = ContainerState::Unknown { why: "lost".into() };
        let keep = ContainerAction::Keep;
        let look =
            |state: &ContainerState, observed: &Observed| reconcile_container("c", state, observed);
        let alive = shim(true, seen(Some(INIT), None));
        let dead = shim(true, seen(Some(INIT), Some(exit(7))));
        let absent = shim(true, vec![]);

        assert_eq!(
            look(&running, &alive),
            keep(running.clone()),
            "the start time that was told"
        );
        assert_eq!(
            look(&running, &dead),
            keep(exited.clone()),
            "exited while we were down"
        );
        assert!(matches!(look(&running, &absent), ContainerAction::Lost(_)));
        assert!(matches!(
            look(&running, &Observed::Gone),
            ContainerAction::Lost(_)
        ));

        let started = ContainerState::Running {
            process: INIT,
            started_at: 5,
        };
        assert_eq!(
            look(&ContainerState::Created, &alive),
            keep(started.clone()),
            "reply lost"
        );
        assert_eq!(look(&unknown, &alive), keep(started));
        let ended = ContainerState::Exited {
            exit: exit(7),
            started_at: 5,
        };
        assert_eq!(look(&ContainerState::Created, &dead), keep(ended));
        assert_eq!(
            look(&ContainerState::Created, &absent),
            keep(ContainerState::Created)
        );
        assert_eq!(
            look(&ContainerState::Created, &Observed::Gone),
            keep(ContainerState::Created)
        );

        for observed in [alive, dead, absent, Observed::Gone] {
            assert_eq!(look(&exited, &observed), keep(exited.clone()));
            assert_eq!(
                look(&ContainerState::Creating, &observed),
                ContainerAction::Undo
            );
        }
        assert!(matches!(
            look(&unknown, &Observed::Gone),
            ContainerAction::Lost(_)
        ));
    }
}
