//! What containers have written, measured beside the calls that tell it.
//!
//! To know it, a tree has to be walked, which takes as long as the container wants it to. So a call
//! answers with what is known, and asks for what is old to be measured again. One thread does this,
//! one tree after the other, as long as there are any, and at the lowest priority. A tree is looked
//! at again after [`REFRESH`], or after [`SHARE`] times as long as the walk took if that is more:
//! the share of a CPU that a container can cost by making files is bounded. What does not run cannot
//! change and is measured once. A walk has bounds, which the snapshotter knows: of a tree that is
//! larger, what was counted is told if it is more than what was known, for a kubelet takes no number
//! for nothing written and evicts others. It is tried again ever less often, so that it cannot keep
//! others from theirs.
//!
//! Only for a container of which nothing is known yet a call waits, once and for [`FIRST`] at most:
//! who asks once gets a number for all but huge trees, and a disk that hangs holds up nobody twice.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gantry_ports::Snapshotter;
use gantry_ports::snapshotter::{Measured, Usage};
use gantry_types::{ContainerId, ContainerState, ErrorKind, Kind};
use tokio::sync::watch;

use crate::clock::now_ns;

/// How old a number may become.
const REFRESH: Duration = Duration::from_secs(20);
/// A walk may take one part in so many of the time.
const SHARE: u32 = 50;
/// What a call waits for a container's first number.
const FIRST: Duration = Duration::from_secs(2);
/// How long it is left alone after it could not be measured, each time twice as long, up to
/// [`RETRY_MAX`]: a walk that ends at its bounds is long, and others wait behind it.
const RETRY: Duration = Duration::from_secs(60);
const RETRY_MAX: Duration = Duration::from_secs(3600);

/// What a container has written, and where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskUsage {
    /// When it was measured, in nanoseconds since the epoch.
    pub at: i64,
    pub bytes: u64,
    pub inodes: u64,
    pub file_system: Arc<FileSystem>,
}

/// The file system that containers write to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileSystem {
    /// Directory in it, as ImageFsInfo names it.
    pub mountpoint: PathBuf,
    /// `/dev/NAME`, or the numbers of what has no name.
    pub device: String,
    pub bytes: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

/// What decides whether a measured number can still be true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Created,
    Running,
    Ended,
}

impl Phase {
    fn of(state: &ContainerState) -> Self {
        match state {
            ContainerState::Creating | ContainerState::Created => Self::Created,
            // Nobody can say of an unknown one that it does not run.
            ContainerState::Running { .. } | ContainerState::Unknown { .. } => Self::Running,
            ContainerState::Exited { .. } => Self::Ended,
        }
    }
}

/// A container to be measured.
#[derive(Clone)]
pub struct Subject {
    id: ContainerId,
    snapshotter: Arc<dyn Snapshotter>,
    phase: Phase,
}

impl Subject {
    pub fn new(id: ContainerId, snapshotter: Arc<dyn Snapshotter>, state: &ContainerState) -> Self {
        Self {
            id,
            snapshotter,
            phase: Phase::of(state),
        }
    }
}

#[derive(Clone)]
struct Known {
    usage: Option<DiskUsage>,
    phase: Phase,
    /// How often in a row it could not be measured.
    failures: u32,
    /// When to look again; `None` is never.
    due: Option<Instant>,
}

#[derive(Default)]
struct State {
    known: HashMap<ContainerId, Known>,
    /// Of which there is nothing yet, and for which a call has waited.
    awaited: HashSet<ContainerId>,
    queue: VecDeque<Subject>,
    queued: HashSet<ContainerId>,
    /// What the thread is at.
    walked: Option<ContainerId>,
    working: bool,
}

impl State {
    /// Whether a number of it may still come.
    fn expects(&self, id: &ContainerId) -> bool {
        self.queued.contains(id) || self.walked.as_ref() == Some(id)
    }
}

pub struct Disks {
    state: Mutex<State>,
    /// Counts measurements.
    measured: watch::Sender<u64>,
}

impl Default for Disks {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            measured: watch::Sender::new(0),
        }
    }
}

impl Disks {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has measured what is not known, or not well enough any more. Does not wait for it. Returns
    /// those of which nothing is known and nobody has waited for.
    pub fn ask(self: &Arc<Self>, subjects: &[Subject]) -> Vec<ContainerId> {
        let mut state = self.lock();
        let now = Instant::now();
        let mut unknown = Vec::new();
        for subject in subjects {
            let known = state.known.get(&subject.id);
            if known.is_some_and(|known| !known.is_due(subject.phase, now)) {
                continue;
            }
            if known.is_none() && state.awaited.insert(subject.id.clone()) {
                unknown.push(subject.id.clone());
            }
            // What is walked just now has its number soon: asked for anew, it would be walked twice.
            let walked = state.walked.as_ref() == Some(&subject.id);
            if !walked && state.queued.insert(subject.id.clone()) {
                state.queue.push_back(subject.clone());
            }
        }
        if !state.queue.is_empty() && !state.working {
            state.working = self.start();
        }
        unknown
    }

    /// Waits until there is something of these, or they have gone, or [`FIRST`] has passed.
    pub async fn wait(&self, mut unknown: Vec<ContainerId>) {
        let mut measured = self.measured.subscribe();
        let all = async {
            loop {
                measured.mark_unchanged();
                {
                    let state = self.lock();
                    unknown.retain(|id| !state.known.contains_key(id) && state.expects(id));
                }
                if unknown.is_empty() || measured.changed().await.is_err() {
                    return;
                }
            }
        };
        // What is not there in time is there for the next call.
        let _ = tokio::time::timeout(FIRST, all).await;
    }

    /// What is known of a container.
    pub fn usage(&self, id: &ContainerId) -> Option<DiskUsage> {
        self.lock().known.get(id)?.usage.clone()
    }

    /// Forgets all but these.
    pub fn retain(&self, there: impl Fn(&ContainerId) -> bool) {
        let mut state = self.lock();
        state.known.retain(|id, _| there(id));
        state.awaited.retain(|id| there(id));
    }

    /// Whether a thread was started that measures what is queued.
    fn start(self: &Arc<Self>) -> bool {
        let disks = Arc::clone(self);
        let thread = std::thread::Builder::new().name("gantry-disk".to_owned());
        let started = thread.spawn(move || disks.work());
        if let Err(error) = &started {
            tracing::warn!(%error, "what containers have written is not measured");
        }
        started.is_ok()
    }

    fn work(&self) {
        if let Err(error) = gantry_sys::process::lower_thread_priority() {
            tracing::debug!(%error, "the thread that measures disk usage has the usual priority");
        }
        let mut file_systems: HashMap<PathBuf, Arc<FileSystem>> = HashMap::new();
        loop {
            let subject = {
                let mut state = self.lock();
                let Some(subject) = state.queue.pop_front() else {
                    state.working = false;
                    return;
                };
                state.queued.remove(&subject.id);
                state.walked = Some(subject.id.clone());
                subject
            };
            let began = Instant::now();
            let containers = subject.snapshotter.containers();
            let file_system = file_systems.entry(containers.to_owned());
            let file_system = file_system.or_insert_with(|| Arc::new(file_system_of(containers)));
            // Its hook has written what has happened. The others want their numbers still.
            let walk = || subject.snapshotter.usage(&subject.id);
            let measured = catch_unwind(AssertUnwindSafe(walk))
                .unwrap_or_else(|_| Err(gantry_ports::Error::internal("the walk panicked")));
            let took = began.elapsed();
            let old = self.lock().known.get(&subject.id).cloned();
            let known = note(&subject, measured, took, old, file_system);
            let mut state = self.lock();
            state.walked = None;
            match known {
                Some(known) => state.known.insert(subject.id, known),
                // It was removed meanwhile.
                None => state.known.remove(&subject.id),
            };
            drop(state);
            self.measured.send_modify(|count| *count += 1);
        }
    }
}

impl Known {
    fn is_due(&self, phase: Phase, now: Instant) -> bool {
        self.phase != phase || self.due.is_some_and(|due| due <= now)
    }
}

/// What is known after a walk, from what was known before. `None` for a container that has no
/// snapshot.
fn note(
    subject: &Subject,
    measured: Result<Measured, gantry_ports::Error>,
    took: Duration,
    old: Option<Known>,
    file_system: &Arc<FileSystem>,
) -> Option<Known> {
    let phase = subject.phase;
    let counted = |usage: Usage| DiskUsage {
        at: now_ns(),
        bytes: usage.bytes,
        inodes: usage.inodes,
        file_system: Arc::clone(file_system),
    };
    let failures = old.as_ref().map_or(0, |old| old.failures);
    let kept = old.and_then(|old| old.usage);
    let (usage, error) = match measured {
        Ok(Measured::Whole(usage)) => {
            return Some(Known {
                usage: Some(counted(usage)),
                phase,
                failures: 0,
                due: (phase == Phase::Running)
                    .then(|| Instant::now() + REFRESH.max(took.saturating_mul(SHARE))),
            });
        }
        Ok(Measured::AtLeast(part, error)) => (Some(at_least(counted(part), kept)), error),
        Err(error) if error.kind() == ErrorKind::NotFound => return None,
        Err(error) => (kept, error),
    };
    match failures {
        0 => tracing::warn!(container = %subject.id, %error, "disk usage not measured"),
        _ => tracing::debug!(container = %subject.id, %error, "disk usage not measured"),
    }
    let retry = RETRY.saturating_mul(1 << failures.min(16)).min(RETRY_MAX);
    Some(Known {
        usage,
        phase,
        failures: failures.saturating_add(1),
        due: Some(Instant::now() + retry.max(took.saturating_mul(SHARE))),
    })
}

/// What is counted of a part, or what was known if that is more.
fn at_least(part: DiskUsage, known: Option<DiskUsage>) -> DiskUsage {
    match known {
        Some(known) if known.bytes >= part.bytes && known.inodes >= part.inodes => known,
        Some(known) => DiskUsage {
            bytes: part.bytes.max(known.bytes),
            inodes: part.inodes.max(known.inodes),
            ..part
        },
        None => part,
    }
}

fn file_system_of(containers: &Path) -> FileSystem {
    let mut found = FileSystem {
        mountpoint: containers.to_owned(),
        device: device_of(containers),
        ..FileSystem::default()
    };
    match gantry_sys::fs::statfs(containers) {
        Ok(stat) => {
            let block = u64::try_from(stat.f_bsize).unwrap_or_default();
            found.bytes = stat.f_blocks.saturating_mul(block);
            found.inodes = stat.f_files;
            found.inodes_free = stat.f_ffree;
        }
        Err(error) => {
            tracing::warn!(path = %containers.display(), %error, "file system not looked at");
        }
    }
    found
}

fn device_of(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = std::fs::metadata(path) else {
        return String::new();
    };
    let number = metadata.dev();
    device_name(nix::sys::stat::major(number), nix::sys::stat::minor(number))
}

/// `/dev/NAME` as the kernel names a block device, or its numbers, as of a tmpfs.
pub fn device_name(major: u64, minor: u64) -> String {
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"));
    let name = link.ok().and_then(|target| {
        let name = target.file_name()?.to_str()?;
        // A slash in a name is written so (sysfs).
        Some(format!("/dev/{}", name.replace('!', "/")))
    });
    name.unwrap_or_else(|| format!("{major}:{minor}"))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use gantry_ports::Error;
    use gantry_ports::snapshotter::{Owner, Stage, Whiteouts};
    use gantry_types::Digest;

    use super::*;

    /// What keeps a container's next walk from its end.
    enum Tree {
        /// The walk ends at its bounds, with so much counted.
        Huge(u64),
        /// There is none any more.
        Gone,
        Panics,
        /// The walk goes on when it is told.
        Hangs(mpsc::Receiver<()>),
    }

    #[derive(Default)]
    struct Fake {
        trees: Mutex<HashMap<ContainerId, Tree>>,
        walks: Mutex<Vec<ContainerId>>,
    }

    impl Fake {
        fn set(&self, n: u8, tree: Tree) {
            self.trees.lock().unwrap().insert(id(n), tree);
        }

        fn walks_of(&self, n: u8) -> usize {
            let walks = self.walks.lock().unwrap();
            walks.iter().filter(|walked| **walked == id(n)).count()
        }
    }

    fn not_called<T>() -> Result<T, Error> {
        Err(Error::internal("not called by a measurement"))
    }

    impl Snapshotter for Fake {
        fn usage(&self, container: &ContainerId) -> Result<Measured, Error> {
            self.walks.lock().unwrap().push(container.clone());
            let small = Measured::Whole(Usage {
                bytes: 5,
                inodes: 5,
            });
            let tree = self.trees.lock().unwrap().remove(container);
            match tree {
                None => Ok(small),
                Some(Tree::Huge(inodes)) => {
                    let error = Error::new(ErrorKind::DeadlineExceeded, "not at its end");
                    Ok(Measured::AtLeast(Usage { bytes: 3, inodes }, error))
                }
                Some(Tree::Gone) => Err(Error::new(ErrorKind::NotFound, "no snapshot")),
                Some(Tree::Panics) => panic!("a walk that panics"),
                Some(Tree::Hangs(told)) => {
                    let _ = told.recv();
                    Ok(small)
                }
            }
        }

        fn name(&self) -> &'static str {
            "fake"
        }

        fn root(&self) -> &Path {
            Path::new("/")
        }

        fn containers(&self) -> &Path {
            Path::new("/")
        }

        fn whiteouts(&self) -> Whiteouts {
            Whiteouts::Overlay
        }

        fn has_layer(&self, _: &Digest) -> bool {
            false
        }

        fn stage(&self, _: &Digest, _: Option<&Digest>) -> Result<Stage, Error> {
            not_called()
        }

        fn commit(&self, _: Vec<(Stage, Usage)>) -> Result<Vec<(Digest, Usage)>, Error> {
            not_called()
        }

        fn abort(&self, _: Stage) -> Result<(), Error> {
            not_called()
        }

        fn layers(&self) -> Result<Vec<(Digest, Usage)>, Error> {
            not_called()
        }

        fn layer_dir(&self, _: &Digest) -> Option<PathBuf> {
            None
        }

        fn remove_layer(&self, _: &Digest) -> Result<(), Error> {
            not_called()
        }

        fn purge(&self) -> Result<(), Error> {
            not_called()
        }

        fn prepare(&self, _: &ContainerId, _: &[Digest], _: Owner<'_>) -> Result<(), Error> {
            not_called()
        }

        fn mount(
            &self,
            _: &ContainerId,
            _: &[Digest],
            _: &Path,
            _: Owner<'_>,
        ) -> Result<(), Error> {
            not_called()
        }

        fn view(&self, _: &[Digest], _: &Path, _: Owner<'_>) -> Result<(), Error> {
            not_called()
        }

        fn volumes(&self, _: &ContainerId) -> Result<PathBuf, Error> {
            not_called()
        }

        fn unmount(&self, _: &Path) -> Result<(), Error> {
            not_called()
        }

        fn snapshots(&self) -> Result<Vec<ContainerId>, Error> {
            not_called()
        }

        fn remove(&self, _: &ContainerId) -> Result<(), Error> {
            not_called()
        }

        fn clean(&self) -> Result<(), Error> {
            not_called()
        }
    }

    fn id(n: u8) -> ContainerId {
        ContainerId::from_random([n; 32])
    }

    fn subjects(fake: &Arc<Fake>, phase: Phase) -> Vec<Subject> {
        let subject = |n| Subject {
            id: id(n),
            snapshotter: Arc::clone(fake) as Arc<dyn Snapshotter>,
            phase,
        };
        (1..=3).map(subject).collect()
    }

    /// Waits until so many trees were walked, or tried.
    async fn walked(disks: &Disks, walks: u64) {
        let mut measured = disks.measured.subscribe();
        let done = measured.wait_for(|count| *count >= walks);
        tokio::time::timeout(Duration::from_secs(60), done)
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn a_huge_tree_has_what_was_counted_and_keeps_nobody_from_theirs() {
        let (disks, fake) = (Arc::<Disks>::default(), Arc::<Fake>::default());
        fake.set(1, Tree::Huge(3));
        disks.ask(&subjects(&fake, Phase::Created));
        walked(&disks, 3).await;
        let counted = || {
            let usage = disks.usage(&id(1)).unwrap();
            (usage.bytes, usage.inodes)
        };
        assert_eq!(counted(), (3, 3), "better than nothing");
        assert!(disks.usage(&id(2)).is_some() && disks.usage(&id(3)).is_some());
        // It is left alone, and no call waits for it.
        assert_eq!(disks.ask(&subjects(&fake, Phase::Created)), []);
        assert_eq!(fake.walks_of(1), 1);

        let measured = async |phase, walks| {
            disks.ask(&subjects(&fake, phase));
            walked(&disks, walks).await;
        };
        measured(Phase::Running, 6).await;
        let number = disks.usage(&id(1));
        assert_eq!(counted(), (5, 5));
        fake.set(1, Tree::Huge(4));
        measured(Phase::Ended, 9).await;
        assert_eq!(fake.walks_of(1), 3);
        assert_eq!(disks.usage(&id(1)), number, "the one it had is more");
        fake.set(1, Tree::Huge(8));
        measured(Phase::Running, 12).await;
        assert_eq!(counted(), (5, 8), "each is at least that");
    }

    #[tokio::test]
    async fn nobody_waits_for_what_has_gone() {
        let (disks, fake) = (Arc::<Disks>::default(), Arc::<Fake>::default());
        fake.set(2, Tree::Gone);
        let asked = disks.ask(&subjects(&fake, Phase::Running));
        assert_eq!(asked.len(), 3);
        walked(&disks, 3).await;
        let began = Instant::now();
        disks.wait(asked).await;
        assert!(began.elapsed() < FIRST);
        assert_eq!(disks.usage(&id(2)), None);
        assert!(disks.usage(&id(3)).is_some());
    }

    #[tokio::test]
    async fn a_walk_that_panics_keeps_nobody_from_theirs() {
        let (disks, fake) = (Arc::<Disks>::default(), Arc::<Fake>::default());
        fake.set(1, Tree::Panics);
        disks.ask(&subjects(&fake, Phase::Running));
        walked(&disks, 3).await;
        assert_eq!(disks.usage(&id(1)), None);
        assert!(disks.usage(&id(2)).is_some() && disks.usage(&id(3)).is_some());
        // It is left alone as what cannot be measured.
        assert_eq!(disks.ask(&subjects(&fake, Phase::Running)), []);
        assert_eq!(fake.walks_of(1), 1);
    }

    #[tokio::test]
    async fn a_walk_that_hangs_holds_up_one_call_and_not_for_long() {
        let (disks, fake) = (Arc::<Disks>::default(), Arc::<Fake>::default());
        let (go_on, told) = mpsc::channel();
        fake.set(2, Tree::Hangs(told));
        let began = Instant::now();
        disks
            .wait(disks.ask(&subjects(&fake, Phase::Running)))
            .await;
        let took = began.elapsed();
        assert!(
            (FIRST..FIRST + Duration::from_secs(10)).contains(&took),
            "{took:?}"
        );
        assert!(disks.usage(&id(1)).is_some());
        assert_eq!(disks.usage(&id(2)), None);
        assert_eq!(
            disks.ask(&subjects(&fake, Phase::Running)),
            [],
            "nobody waits again"
        );
        go_on.send(()).unwrap();
        walked(&disks, 3).await;
        assert!(disks.usage(&id(2)).is_some() && disks.usage(&id(3)).is_some());
        assert_eq!(fake.walks_of(2), 1, "it was not asked for anew meanwhile");
    }

    #[test]
    fn what_cannot_be_measured_is_tried_ever_less_often() {
        let subject = subjects(&Arc::default(), Phase::Running).remove(0);
        let again = |failures, took| {
            let failed = Err(Error::new(ErrorKind::PermissionDenied, "not ours"));
            let old = Known {
                usage: None,
                phase: Phase::Running,
                failures,
                due: None,
            };
            let now = Instant::now();
            let known = note(&subject, failed, took, Some(old), &Arc::default()).unwrap();
            assert_eq!(
                (known.usage, known.failures),
                (None, failures.saturating_add(1))
            );
            known.due.unwrap() - now
        };
        let quick = Duration::ZERO;
        let near = |span: Duration, expected| {
            (expected..expected + Duration::from_secs(30)).contains(&span)
        };
        assert!(near(again(0, quick), RETRY));
        assert!(near(again(2, quick), RETRY * 4));
        assert!(near(again(u32::MAX, quick), RETRY_MAX));
        // Nor does it cost a larger share of a CPU than others.
        let long = Duration::from_secs(100);
        assert!(near(again(0, long), long * SHARE));
    }
}
