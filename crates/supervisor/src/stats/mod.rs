//! What containers and pods use: CPU, memory, swap, processes, pressure, network, disk.
//!
//! - Numbers come from the kernel when they are asked for (`read`, `parse`): each file once a call,
//!   on a blocking thread, of which few work at the same time. No lock is held meanwhile, and no
//!   driver is asked. What has gone in mid-call is left out, or its numbers are.
//! - A CPU rate needs an older sample (`rates`). Each call leaves one. As long as somebody asks, and
//!   [`LINGER`] beyond, a task looks every [`TICK`] for what has none, so that a container which
//!   started between two calls has a rate at the second. It reads what no call has read of late: a
//!   kubelet that asks every ten seconds leaves it only what is new. When nobody asks any more it
//!   ends and forgets: an idle node does nothing.
//! - What containers have written is measured by a thread of its own (`disk`).
//!
//! A pod's numbers are those of its cgroup parent where that is the pod's own, as the kubelet makes
//! one for each: with them comes whatever else is in there. A parent without the pod's uid in its
//! name may be that of many (`gantry.slice`, or whatever crictl was told). Then the pod's numbers
//! are the sum of its containers' and its holder's. Pressure has no sum and is left out; and the
//! counters are less by those of a container that has been removed.

mod disk;
mod parse;
mod rates;
mod read;
mod usage;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use gantry_types::{ContainerState, PodState, ProcessRef};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

pub use disk::{DiskUsage, FileSystem};
pub use read::DEFAULT_INTERFACE;
pub use usage::{
    Cpu, Descriptors, Details, Device, DeviceIo, HugePages, Interface, Limits, Memory, Pressure,
    Pressures, Processes, Stall, TaskLimit, Usage,
};

use crate::pod::{blocking, host_network};
use crate::registry::{ContainerView, PodView};
use crate::{Context, Error, Supervisor};
use disk::{Disks, Subject};
use rates::{Observed, Rates};
use read::{Reader, Want};

/// How often the task looks for what has no sample.
const TICK: Duration = Duration::from_secs(5);
/// A sample as old as this is renewed.
const STALE: Duration = Duration::from_secs(15);
/// How long samples are taken and kept after somebody has asked.
const LINGER: Duration = Duration::from_secs(180);
/// Calls that read at the same time. More would wait for the same locks of the kernel.
const READERS: usize = 2;
/// Of those that read details, which take far longer: they have turns of their own, so that no
/// number of scrapes keeps a kubelet from the numbers it evicts by.
const DETAIL_READERS: usize = 1;

pub(crate) struct Stats {
    rates: Rates,
    disks: Arc<Disks>,
    readers: Arc<Semaphore>,
    detail_readers: Arc<Semaphore>,
    sampler: Mutex<Sampler>,
}

#[derive(Default)]
struct Sampler {
    asked: Option<Instant>,
    running: bool,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            rates: Rates::default(),
            disks: Arc::default(),
            readers: Arc::new(Semaphore::new(READERS)),
            detail_readers: Arc::new(Semaphore::new(DETAIL_READERS)),
            sampler: Mutex::default(),
        }
    }
}

/// What there is to say of a container.
#[derive(Clone, Debug)]
pub struct ContainerStats {
    pub view: Arc<ContainerView>,
    /// Of one that runs.
    pub usage: Option<Usage>,
    /// Nanoseconds of CPU time a second; `None` until there are two samples.
    pub nano_cores: Option<u64>,
    /// `None` until it was measured.
    pub disk: Option<DiskUsage>,
    /// Of one that runs, if they were asked for.
    pub details: Option<Details>,
}

/// What there is to say of a pod that is ready.
#[derive(Clone, Debug)]
pub struct PodStats {
    pub view: Arc<PodView>,
    pub usage: Usage,
    /// The usage is that of the pod's own cgroup, and not a sum.
    pub own_cgroup: bool,
    /// As [`ContainerStats::nano_cores`].
    pub nano_cores: Option<u64>,
    /// Of the pod's network, the default one first; `None` with the host's.
    pub interfaces: Option<Vec<Interface>>,
    pub containers: Vec<ContainerStats>,
    /// Of the pod's own cgroup, if they were asked for.
    pub details: Option<Details>,
}

/// What a call reads beside the usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Depth {
    #[default]
    Usage,
    /// And what metrics need.
    Details,
}

impl Supervisor {
    /// Stats of these containers. One that has been removed meanwhile is not among them; one that
    /// does not run has no usage.
    pub async fn container_stats(
        &self,
        views: Vec<Arc<ContainerView>>,
    ) -> Result<Vec<ContainerStats>, Error> {
        let measured = self.begin_stats(&views);
        let ctx = Arc::clone(&self.ctx);
        let mut stats = self
            .ctx
            .stats
            .read(Depth::Usage, move || {
                let mut work = Work::new(&ctx, Depth::Usage);
                let tasks = false;
                let stats: Vec<_> = views
                    .into_iter()
                    .filter_map(|view| work.container(view, tasks))
                    .collect();
                work.finish();
                stats
            })
            .await?;
        self.ctx.stats.disks.wait(measured).await;
        self.with_disks(&mut stats);
        Ok(stats)
    }

    /// Stats of these pods, without those that are not ready: a pod without its holder uses nothing
    /// that containers do not.
    pub async fn pod_stats(&self, pods: Vec<Arc<PodView>>) -> Result<Vec<PodStats>, Error> {
        self.pods_to(Depth::Usage, pods).await
    }

    /// As [`Supervisor::pod_stats`] with what metrics need, of all pods.
    pub async fn pod_details(&self) -> Result<Vec<PodStats>, Error> {
        self.pods_to(Depth::Details, self.ctx.registry.pods()).await
    }

    async fn pods_to(&self, depth: Depth, pods: Vec<Arc<PodView>>) -> Result<Vec<PodStats>, Error> {
        let views = pods.iter().filter(|pod| pod.state.is_ready());
        let views: Vec<_> = views.flat_map(|pod| pod.containers.clone()).collect();
        let measured = self.begin_stats(&views);
        let ctx = Arc::clone(&self.ctx);
        let mut stats = self
            .ctx
            .stats
            .read(depth, move || {
                let mut work = Work::new(&ctx, depth);
                let stats: Vec<_> = pods.iter().filter_map(|pod| work.pod(pod)).collect();
                work.finish();
                stats
            })
            .await?;
        self.ctx.stats.disks.wait(measured).await;
        for pod in &mut stats {
            self.with_disks(&mut pod.containers);
        }
        Ok(stats)
    }

    /// Whether this node's cgroups are those of v2.
    pub fn cgroup_v2(&self) -> bool {
        self.ctx.settings.cgroups.is_v2()
    }

    /// Wakes those who work in the background. Returns what to wait for.
    fn begin_stats(&self, views: &[Arc<ContainerView>]) -> Vec<gantry_types::ContainerId> {
        asked(&self.ctx);
        self.ctx.stats.disks.ask(&subjects(&self.ctx, views))
    }

    fn with_disks(&self, stats: &mut [ContainerStats]) {
        for one in stats {
            one.disk = self.ctx.stats.disks.usage(&one.view.facts.id);
        }
    }
}

/// What of these has a snapshot that can be measured.
fn subjects(ctx: &Context, views: &[Arc<ContainerView>]) -> Vec<Subject> {
    let subjects = views.iter().filter_map(|view| {
        // One whose snapshotter is not configured any more has no numbers until it is again.
        let snapshotter = ctx.snapshotter(&view.facts.record).ok()?;
        let id = view.facts.id.clone();
        Some(Subject::new(id, Arc::clone(snapshotter), &view.state))
    });
    subjects.collect()
}

/// One call's reading.
struct Work<'a> {
    ctx: &'a Context,
    reader: Reader<'a>,
    depth: Depth,
}

impl<'a> Work<'a> {
    fn new(ctx: &'a Context, depth: Depth) -> Self {
        Self {
            ctx,
            reader: Reader::new(&ctx.settings.cgroups),
            depth,
        }
    }

    /// `None` for a container that has been removed.
    fn container(&mut self, view: Arc<ContainerView>, tasks: bool) -> Option<ContainerStats> {
        let mut stats = ContainerStats {
            view,
            usage: None,
            nano_cores: None,
            disk: None,
            details: None,
        };
        let ContainerState::Running { process, .. } = stats.view.state else {
            return Some(stats);
        };
        let metrics = self.depth == Depth::Details;
        let dir = PathBuf::from(&stats.view.facts.record.cgroup_dir);
        let want = Want {
            limit: false,
            tasks: tasks || metrics,
            pressure: true,
            cpu_times: metrics,
        };
        let at = Instant::now();
        stats.usage = self.reader.usage(&dir, want);
        let Some(usage) = &mut stats.usage else {
            // It has ended since, and may have been removed.
            let known = self.ctx.registry.container(stats.view.facts.id.as_str());
            return known.is_ok().then_some(stats);
        };
        if let Some(memory) = &mut usage.memory {
            memory.limit = memory_limit(&stats.view);
        }
        stats.nano_cores = self.rate(stats.view.facts.id.as_str(), at, usage.cpu);
        if metrics {
            stats.details = Some(self.reader.details(&dir, Some(process)));
        }
        Some(stats)
    }

    /// `None` for a pod that is not ready.
    fn pod(&mut self, view: &Arc<PodView>) -> Option<PodStats> {
        let PodState::Ready { holder, .. } = view.state else {
            return None;
        };
        let own = own_cgroup(self.ctx, view);
        let mut details = None;
        let at = Instant::now();
        let whole = own.and_then(|dir| {
            let want = Want {
                limit: true,
                tasks: true,
                pressure: true,
                cpu_times: self.depth == Depth::Details,
            };
            let usage = self.reader.usage(&dir, want)?;
            if self.depth == Depth::Details {
                details = Some(Details {
                    limits: Some(self.reader.limits(&dir)),
                    ..self.reader.details(&dir, None)
                });
            }
            Some(usage)
        });
        let containers: Vec<_> = view
            .containers
            .iter()
            .filter_map(|container| self.container(Arc::clone(container), whole.is_none()))
            .collect();
        let own_cgroup = whole.is_some();
        let (usage, nano_cores) = match whole {
            Some(usage) => {
                let rate = self.rate(view.facts.id.as_str(), at, usage.cpu);
                (usage, rate)
            }
            None => (self.sum(view, &containers), sum_of_rates(&containers)),
        };
        Some(PodStats {
            view: Arc::clone(view),
            usage,
            own_cgroup,
            nano_cores,
            interfaces: self.interfaces(view, holder),
            containers,
            details,
        })
    }

    fn sum(&mut self, view: &PodView, containers: &[ContainerStats]) -> Usage {
        // The first is in the hierarchy that containers' directories are of.
        let dir = view.facts.record.cgroup_dirs.first();
        let want = Want {
            tasks: true,
            cpu_times: self.depth == Depth::Details,
            ..Want::default()
        };
        let holder = dir.and_then(|dir| self.reader.usage(dir.as_ref(), want));
        let mut sum = holder.unwrap_or_else(|| Usage {
            at: crate::now_ns(),
            ..Usage::default()
        });
        for usage in containers.iter().filter_map(|one| one.usage.as_ref()) {
            sum.add(usage);
        }
        sum
    }

    fn interfaces(&mut self, view: &PodView, holder: ProcessRef) -> Option<Vec<Interface>> {
        if host_network(&view.facts.config) {
            return None;
        }
        let interfaces = self.reader.interfaces(holder.pid)?;
        // Its pid may have become another's, in whatever network.
        gantry_sys::process::alive(holder).then_some(interfaces)
    }

    fn rate(&self, id: &str, at: Instant, cpu: Option<Cpu>) -> Option<u64> {
        let usage = cpu?.usage;
        let seen = Observed { id, at, usage };
        self.ctx.stats.rates.observe(&[seen]).pop().flatten()
    }

    fn finish(self) {
        if let Some((path, error)) = self.reader.trouble {
            tracing::warn!(path = %path.display(), %error, "stats are not complete");
        }
    }
}

/// What the kubelet made for this pod alone.
fn own_cgroup(ctx: &Context, view: &PodView) -> Option<PathBuf> {
    let cgroups = &ctx.settings.cgroups;
    let config = &view.facts.config;
    let parent = &config.linux.as_ref()?.cgroup_parent;
    let uid = &config.metadata.as_ref()?.uid;
    if !cgroups.is_pods_own(parent, uid) {
        return None;
    }
    cgroups.parent_dir(parent).ok()
}

/// As on record: what UpdateContainerResources changes, and nobody else should.
fn memory_limit(view: &ContainerView) -> Option<u64> {
    let limit = view.resources.as_ref()?.memory_limit_in_bytes;
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// `None` if that of one that runs is not known.
fn sum_of_rates(containers: &[ContainerStats]) -> Option<u64> {
    let running = containers.iter().filter(|one| one.usage.is_some());
    running.map(|one| one.nano_cores).sum()
}

/// Somebody asks for stats: samples are taken from now on.
fn asked(ctx: &Arc<Context>) {
    let mut sampler = ctx.stats.sampler();
    sampler.asked = Some(Instant::now());
    if !sampler.running {
        sampler.running = true;
        // It must not keep alive what the daemon puts down at its end.
        tokio::spawn(sample(Arc::downgrade(ctx)));
    }
}

impl Stats {
    fn sampler(&self) -> std::sync::MutexGuard<'_, Sampler> {
        self.sampler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn turn(&self, depth: Depth) -> Result<OwnedSemaphorePermit, AcquireError> {
        let turns = match depth {
            Depth::Usage => &self.readers,
            Depth::Details => &self.detail_readers,
        };
        Arc::clone(turns).acquire_owned().await
    }

    /// Reads when it is this call's turn. The turn ends with the work and not with the caller: who
    /// gives up and asks again would otherwise add to the threads that read.
    async fn read<T: Send + 'static>(
        &self,
        depth: Depth,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        // Never closed.
        let turn = self.turn(depth).await;
        blocking(move || {
            let _turn = turn;
            Ok(work())
        })
        .await
    }

    /// Whether nobody has asked for long; then the task that finds out is no more.
    fn rests(&self) -> bool {
        let mut sampler = self.sampler();
        let asked = sampler.asked.is_some_and(|at| at.elapsed() < LINGER);
        sampler.running = asked;
        !asked
    }
}

async fn sample(ctx: Weak<Context>) {
    loop {
        tokio::time::sleep(TICK).await;
        let Some(ctx) = ctx.upgrade() else { return };
        if ctx.stats.rests() {
            ctx.stats.rates.retain(&HashSet::new());
            ctx.stats.disks.retain(|id| ctx.registry.has_container(id));
            return;
        }
        let sampled = Arc::clone(&ctx);
        let read = ctx.stats.read(Depth::Usage, move || sample_once(&sampled));
        if let Err(error) = read.await {
            tracing::error!(%error, "no samples for CPU rates");
        }
    }
}

fn sample_once(ctx: &Arc<Context>) {
    let stats = &ctx.stats;
    let pods = ctx.registry.pods();
    let mut places: Vec<(&str, PathBuf)> = Vec::new();
    let mut views = Vec::new();
    for pod in &pods {
        if pod.state.is_ready()
            && let Some(dir) = own_cgroup(ctx, pod)
        {
            places.push((pod.facts.id.as_str(), dir));
        }
        for container in &pod.containers {
            views.push(Arc::clone(container));
            if matches!(container.state, ContainerState::Running { .. }) {
                let dir = PathBuf::from(&container.facts.record.cgroup_dir);
                places.push((container.facts.id.as_str(), dir));
            }
        }
    }
    let ids: HashSet<_> = places.iter().map(|(id, _)| *id).collect();
    stats.rates.retain(&ids);
    let stale = stats.rates.older(ids.iter().copied(), STALE);
    let mut reader = Reader::new(&ctx.settings.cgroups);
    for (id, dir) in places.iter().filter(|(id, _)| stale.contains(id)) {
        let at = Instant::now();
        if let Some(cpu) = reader.cpu(dir, false) {
            let usage = cpu.usage;
            stats.rates.observe(&[Observed { id, at, usage }]);
        }
    }
    if let Some((path, error)) = reader.trouble {
        tracing::warn!(path = %path.display(), %error, "no sample for a CPU rate");
    }
    stats.disks.retain(|id| ctx.registry.has_container(id));
    // Calls ask for the rest; what is new has a number when the next comes.
    let unknown: Vec<_> = views
        .into_iter()
        .filter(|view| stats.disks.usage(&view.facts.id).is_none())
        .collect();
    stats.disks.ask(&subjects(ctx, &unknown));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_turn_ends_with_the_reading_and_not_with_the_caller() {
        let stats = Stats::default();
        let (began, begun) = tokio::sync::oneshot::channel();
        let (go_on, wait) = std::sync::mpsc::channel::<()>();
        let first = stats.read(Depth::Details, move || {
            let _ = began.send(());
            let _ = wait.recv();
        });
        tokio::select! {
            _ = first => unreachable!("it waits to be told to go on"),
            begun = begun => begun.unwrap(),
        }
        // The caller has gone away; the reading goes on.
        assert_eq!(stats.detail_readers.available_permits(), 0);
        // A kubelet's call has its turn meanwhile.
        assert_eq!(stats.read(Depth::Usage, || 1).await.unwrap(), 1);
        go_on.send(()).unwrap();
        assert_eq!(stats.read(Depth::Details, || 2).await.unwrap(), 2);
    }

    #[test]
    fn sums_leave_out_what_some_cannot_tell() {
        let usage = |cpu, user, swap| Usage {
            at: 1,
            cpu: Some(Cpu {
                usage: cpu,
                user,
                ..Cpu::default()
            }),
            memory: Some(Memory {
                usage: 10,
                inactive_file: 4,
                limit: Some(100),
                ..Memory::default()
            }),
            swap,
            tasks: Some(2),
            pressure: Pressures::default(),
        };
        let mut sum = usage(5, Some(1), Some(1));
        sum.add(&usage(7, Some(2), None));
        let cpu = sum.cpu.unwrap();
        assert_eq!((cpu.usage, cpu.user), (12, Some(3)));
        let memory = sum.memory.unwrap();
        assert_eq!((memory.usage, memory.working_set()), (20, 12));
        assert_eq!(
            memory.limit, None,
            "limits of containers are none of the pod's"
        );
        assert_eq!((sum.swap, sum.tasks), (Some(1), Some(4)));
        let mut none = Usage::default();
        none.add(&usage(7, None, None));
        assert_eq!(none.cpu.unwrap().usage, 7);
    }
}
