//! A client with pods of its own. Nobody else asks for anything about them, so what it was told is
//! what must be, in order.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use gantry_integration::{log, script_config};
use gantry_testkit::cri::{self, v1};
use gantry_testkit::daemon::FAULTY;

use crate::actor::{Actor, Answer};
use crate::history::Run;
use crate::model::{Container, Does, Exit, Pod, PodState, State};

/// Pods of a client at a time, and containers of a pod.
const PODS: usize = 3;
const CONTAINERS: usize = 3;

/// Labels of a pod and its containers: whose they are, and which.
const OWNER: &str = "soak-owner";
const NAME: &str = "soak-name";

/// A container: what it was asked to be and what may have become of it.
struct Held {
    name: String,
    config: v1::ContainerConfig,
    /// Known once its making was acknowledged.
    id: Option<String>,
    model: Container,
    /// A making of it was not acknowledged: what that left may be listed, ended, beside it.
    in_doubt: bool,
    /// Times that its log was moved aside.
    rotated: u32,
}

struct Slot {
    name: String,
    config: v1::PodSandboxConfig,
    handler: &'static str,
    made: Option<Made>,
    containers: Vec<Held>,
}

/// A pod whose making was acknowledged.
struct Made {
    id: String,
    pod: Pod,
}

/// Where things are for every client.
#[derive(Clone, Debug)]
pub struct Surroundings {
    pub logs: PathBuf,
    /// An image that stays.
    pub image: String,
    /// An image that is this client's alone.
    pub own_image: String,
}

pub struct Client {
    actor: Actor,
    place: Surroundings,
    slots: Vec<Slot>,
    made: u64,
    /// Names of pods with a making that was not acknowledged: what it left may be listed.
    abandoned: BTreeSet<String>,
    /// The same of containers that were removed since.
    doubtful: BTreeSet<String>,
    /// Ids of pods and containers whose removal was acknowledged.
    removed: BTreeSet<String>,
    /// Whether the image of its own is there; `None` while that is in doubt.
    image: Option<bool>,
    /// Start of the daemon after which all was looked at.
    verified: u64,
}

impl Client {
    pub fn new(actor: Actor, place: Surroundings) -> Self {
        Self {
            verified: actor.shared.trouble.starts(),
            actor,
            place,
            slots: Vec::new(),
            made: 0,
            abandoned: BTreeSet::new(),
            doubtful: BTreeSet::new(),
            removed: BTreeSet::new(),
            image: Some(false),
        }
    }

    pub fn actor(&mut self) -> &mut Actor {
        &mut self.actor
    }

    /// One step of a life.
    pub async fn step(&mut self) -> Run<()> {
        let starts = self.actor.shared.trouble.starts();
        if starts != self.verified {
            self.verified = starts;
            self.verify(true).await?;
        }
        match self.actor.rng.number(0..100) {
            0..6 => self.image_step().await?,
            6..10 => self.read_step().await?,
            10..16 => self.verify(false).await?,
            _ if self.slots.len() < PODS && self.actor.rng.percent(50) => self.new_slot(),
            _ => {}
        }
        if self.slots.is_empty() {
            return Ok(());
        }
        let at = self.actor.rng.place(self.slots.len());
        let gone = self.pod_step(at).await?;
        if gone {
            self.slots.remove(at);
        }
        self.actor.pause(0..60).await;
        Ok(())
    }

    fn new_slot(&mut self) {
        self.made += 1;
        let name = format!("{}-p{}", self.actor.who, self.made);
        let mut config = cri::pod_config(&name, &self.place.logs.join(&name));
        // The network costs most of a pod's time.
        if self.actor.rng.percent(60) {
            cri::pod_namespaces(&mut config).network = v1::NamespaceMode::Node.into();
        }
        config.labels.insert(OWNER.into(), self.actor.who.clone());
        config.labels.insert(NAME.into(), name.clone());
        let handler = if self.actor.rng.percent(35) {
            FAULTY
        } else {
            ""
        };
        self.slots.push(Slot {
            name,
            config,
            handler,
            made: None,
            containers: Vec::new(),
        });
    }

    /// Does something to a pod or to what is in it; returns whether it is no more.
    async fn pod_step(&mut self, at: usize) -> Run<bool> {
        let Some(made) = &self.slots[at].made else {
            if self.actor.rng.percent(3) {
                self.abandoned.insert(self.slots[at].name.clone());
                return Ok(true);
            }
            self.run_pod(at).await?;
            return Ok(false);
        };
        if made.pod.ends() || self.is_lost(at) {
            return if self.actor.rng.percent(60) {
                self.remove_pod(at, true).await
            } else if self.actor.rng.percent(50) {
                self.stop_pod(at, true).await.map(|()| false)
            } else {
                self.container_step(at).await.map(|()| false)
            };
        }
        match self.actor.rng.number(0..100) {
            0..4 => self.remove_pod(at, true).await,
            4..8 => self.stop_pod(at, true).await.map(|()| false),
            8..12 => self.run_pod(at).await.map(|()| false),
            12..18 => self.pod_status(at).await.map(|()| false),
            _ => self.container_step(at).await.map(|()| false),
        }
    }

    fn is_lost(&self, at: usize) -> bool {
        let trouble = &self.actor.shared.trouble;
        let made = self.slots[at].made.as_ref();
        made.is_some_and(|made| trouble.is_lost(&made.id))
    }

    /// Whether calls about the pod of a slot may fail, by what was done to it.
    fn excuse(&self, at: usize) -> impl Fn(&tonic::Status) -> bool + use<> {
        let trouble = self.actor.shared.trouble.clone();
        let made = self.slots[at].made.as_ref();
        let (id, ends) = made.map_or((String::new(), false), |made| {
            (made.id.clone(), made.pod.ends())
        });
        move |_| ends || trouble.is_lost(&id)
    }

    /// Makes the pod, or asks for the one that is there again.
    async fn run_pod(&mut self, at: usize) -> Run<()> {
        let slot = &self.slots[at];
        let (config, handler) = (slot.config.clone(), slot.handler);
        std::fs::create_dir_all(&config.log_directory)
            .map_err(|error| self.actor.shared.history.fault("log directory", error))?;
        let what = format!("RunPodSandbox {}", slot.name);
        let (cut, excuse) = (self.actor.cut(), self.excuse(at));
        let call = async |c: &cri::Client| c.run_pod_by(&config, handler).await;
        let Some(id) = self.actor.call(&what, cut, excuse, call).await?.done() else {
            // What a failed making could not take back is listed, and has to be removed.
            self.abandoned.insert(self.slots[at].name.clone());
            return Ok(());
        };
        let lost = self.is_lost(at);
        match &self.slots[at].made {
            Some(made) if made.id == id => {}
            // A pod that has ended holds no name.
            Some(_) if lost => {
                let name = self.slots[at].name.clone();
                self.abandoned.insert(name);
            }
            Some(made) => {
                let error = format!("is {id} by the same request, and was {}", made.id);
                return self.actor.expect(&self.slots[at].name, Err(error));
            }
            None => {
                self.actor.shared.history.count("pods");
                let pod = Pod::default();
                self.slots[at].made = Some(Made { id, pod });
            }
        }
        Ok(())
    }

    fn made(&mut self, at: usize) -> &mut Made {
        self.slots[at].made.as_mut().expect("a pod that was made")
    }

    async fn stop_pod(&mut self, at: usize, may_cut: bool) -> Run<()> {
        let id = self.made(at).id.clone();
        let what = format!("StopPodSandbox {}", self.slots[at].name);
        let cut = if may_cut { self.actor.cut() } else { None };
        let call = async |c: &cri::Client| c.stop_pod(&id).await;
        let answer = self.actor.call(&what, cut, |_| false, call).await?;
        self.made(at).pod.stop(answer.is_done());
        for held in &mut self.slots[at].containers {
            held.model.stop(answer.is_done());
        }
        Ok(())
    }

    /// Returns whether it was acknowledged.
    async fn remove_pod(&mut self, at: usize, may_cut: bool) -> Run<bool> {
        let id = self.made(at).id.clone();
        let what = format!("RemovePodSandbox {}", self.slots[at].name);
        let cut = if may_cut { self.actor.cut() } else { None };
        let call = async |c: &cri::Client| c.remove_pod(&id).await;
        let answer = self.actor.call(&what, cut, |_| false, call).await?;
        self.made(at).pod.remove(answer.is_done());
        for held in &mut self.slots[at].containers {
            held.model.remove(answer.is_done());
        }
        if !answer.is_done() {
            return Ok(false);
        }
        for held in 0..self.slots[at].containers.len() {
            self.check_log(at, held)?;
        }
        let containers = self.slots[at].containers.iter();
        self.removed
            .extend(containers.filter_map(|held| held.id.clone()));
        self.removed.insert(id);
        // Kept for as long as somebody may want to read them; not by thousands.
        let _ = std::fs::remove_dir_all(&self.slots[at].config.log_directory);
        Ok(true)
    }

    async fn pod_status(&mut self, at: usize) -> Run<()> {
        let id = self.made(at).id.clone();
        let about = self.slots[at].name.clone();
        let what = format!("PodSandboxStatus {about}");
        let ends = self.made(at).pod.ends();
        let call = async |c: &cri::Client| c.pod_status(&id).await;
        // Only a pod that may be removed already may be unknown.
        let answer = self.actor.call(&what, None, |_| ends, call).await?;
        let Some(status) = answer.done() else {
            return Ok(());
        };
        let lost = self.is_lost(at);
        let ready = status.state() == v1::PodSandboxState::SandboxReady;
        let state = if ready {
            PodState::Ready
        } else {
            PodState::NotReady
        };
        let pod = &mut self.made(at).pod;
        let mut seen = pod.observe(state, lost);
        if seen.is_ok() && ready {
            seen = pod.observe_ip(&status.network.unwrap_or_default().ip);
        }
        self.actor.expect(&about, seen)
    }

    async fn container_step(&mut self, at: usize) -> Run<()> {
        let count = self.slots[at].containers.len();
        let healthy = !self.is_lost(at) && !self.made(at).pod.ends();
        if healthy && (count == 0 || count < CONTAINERS && self.actor.rng.percent(30)) {
            self.new_container(at);
            return self.create(at, count).await;
        }
        if count == 0 {
            return Ok(());
        }
        let n = self.actor.rng.place(count);
        let held = &self.slots[at].containers[n];
        if held.id.is_none() {
            return self.create(at, n).await;
        }
        let dice = self.actor.rng.number(0..100);
        if held.model.is(State::Created) {
            return match dice {
                0..75 => self.start(at, n).await,
                75..82 => self.update(at, n).await,
                82..88 => self.stop(at, n, true).await.map(drop),
                88..94 => self.remove(at, n, true).await,
                _ => self.container_status(at, n).await,
            };
        }
        if held.model.is(State::Exited) {
            self.container_status(at, n).await?;
            return match dice {
                0..70 => self.remove(at, n, true).await,
                70..80 => self.stop(at, n, true).await.map(drop),
                _ => Ok(()),
            };
        }
        match dice {
            0..28 => self.exec(at, n).await,
            28..38 => self.update(at, n).await,
            38..50 => self.reopen(at, n).await,
            50..64 => self.stop(at, n, true).await.map(drop),
            64..70 => self.remove(at, n, true).await,
            // Asked for again, it is the same one.
            70..74 => self.create(at, n).await,
            _ => self.container_status(at, n).await,
        }
    }

    fn new_container(&mut self, at: usize) {
        self.made += 1;
        let name = format!("c{}", self.made);
        let rng = &mut self.actor.rng;
        let does = match rng.number(0..10) {
            0..4 => Does::Ends {
                after_ms: rng.number(0..2500),
                code: rng.number(0..100) as i32,
            },
            4..8 => Does::Counts,
            _ => Does::Sleeps,
        };
        let own = self.image == Some(true) && rng.percent(50);
        let image = if own {
            &self.place.own_image
        } else {
            &self.place.image
        };
        let shares = rng.number(2..1000) as i64;
        let mut config = script_config(&name, image, &does.script());
        config.labels.insert(OWNER.into(), self.actor.who.clone());
        config.labels.insert(NAME.into(), name.clone());
        cri::resources(&mut config).cpu_shares = shares;
        self.slots[at].containers.push(Held {
            name,
            config,
            id: None,
            model: Container::new(does, shares),
            in_doubt: false,
            rotated: 0,
        });
    }

    /// Makes the container, or asks for the one that is there again.
    async fn create(&mut self, at: usize, n: usize) -> Run<()> {
        let pod = self.made(at).id.clone();
        let slot = &self.slots[at];
        let (held, pod_config) = (&slot.containers[n], slot.config.clone());
        let (config, about) = (held.config.clone(), held.name.clone());
        let what = format!("CreateContainer {}/{about}", slot.name);
        let excuse = self.excuse(at);
        let may_vanish = !held.model.is(State::Created) && held.id.is_some();
        let cut = self.actor.cut();
        let call = async |c: &cri::Client| c.create(&pod, &config, &pod_config).await;
        let excuse = |status: &tonic::Status| excuse(status) || may_vanish;
        let Some(id) = self.actor.call(&what, cut, excuse, call).await?.done() else {
            self.held(at, n).in_doubt = true;
            return Ok(());
        };
        let held = &mut self.slots[at].containers[n];
        match &held.id {
            None => {
                held.id = Some(id);
                self.actor.shared.history.count("containers");
            }
            Some(before)
                if *before != id && held.model.clone().observe(State::Absent, false).is_err() =>
            {
                let error = format!("is {id} by the same request, and was {before}");
                return self.actor.expect(&about, Err(error));
            }
            Some(before) if *before != id => {
                // Removed by a call that was cut short, and now made anew.
                held.model = Container::new(held.model.does, held.config_shares());
                held.id = Some(id);
                self.forget_log(at, n);
            }
            Some(_) => {}
        }
        Ok(())
    }

    async fn start(&mut self, at: usize, n: usize) -> Run<()> {
        let (id, what) = self.about(at, n, "StartContainer");
        let (cut, excuse) = (self.actor.cut(), self.excuse(at));
        let call = async |c: &cri::Client| c.start(&id).await;
        let answer = self.actor.call(&what, cut, excuse, call).await?;
        self.held(at, n).model.start(answer.is_done());
        Ok(())
    }

    /// Returns whether it was acknowledged.
    async fn stop(&mut self, at: usize, n: usize, may_cut: bool) -> Run<bool> {
        let (id, what) = self.about(at, n, "StopContainer");
        let cut = if may_cut { self.actor.cut() } else { None };
        let grace = self.actor.rng.number(0..3) as i64;
        let call = async |c: &cri::Client| c.stop(&id, grace).await;
        let answer = self.actor.call(&what, cut, |_| false, call).await?;
        self.held(at, n).model.stop(answer.is_done());
        Ok(answer.is_done())
    }

    async fn remove(&mut self, at: usize, n: usize, may_cut: bool) -> Run<()> {
        let (id, what) = self.about(at, n, "RemoveContainer");
        let cut = if may_cut { self.actor.cut() } else { None };
        let call = async |c: &cri::Client| c.remove(&id).await;
        let answer = self.actor.call(&what, cut, |_| false, call).await?;
        self.held(at, n).model.remove(answer.is_done());
        if answer.is_done() {
            self.check_log(at, n)?;
            let held = self.slots[at].containers.remove(n);
            self.removed.insert(id);
            if held.in_doubt {
                self.doubtful.insert(held.name);
            }
        }
        Ok(())
    }

    async fn update(&mut self, at: usize, n: usize) -> Run<()> {
        let (id, what) = self.about(at, n, "UpdateContainerResources");
        let shares = self.actor.rng.number(2..1000) as i64;
        let resources = v1::LinuxContainerResources {
            cpu_shares: shares,
            ..Default::default()
        };
        let (cut, excuse, stays) = (self.actor.cut(), self.excuse(at), self.stays(at, n));
        let excuse = |status: &tonic::Status| excuse(status) || !stays;
        let call = async |c: &cri::Client| c.update(&id, resources).await;
        let answer = self.actor.call(&what, cut, excuse, call).await?;
        self.held(at, n).model.update(shares, answer.is_done());
        Ok(())
    }

    async fn reopen(&mut self, at: usize, n: usize) -> Run<()> {
        let (id, what) = self.about(at, n, "ReopenContainerLog");
        let path = self.log_path(at, n);
        let held = self.held(at, n);
        // Absent where an earlier call has not reached the shim: then that is repeated.
        if path.exists() {
            held.rotated += 1;
            let aside = format!("{}.{}", path.display(), held.rotated);
            if let Err(error) = std::fs::rename(&path, &aside) {
                return Err(self.actor.shared.history.fault(&aside, error));
            }
        }
        let (cut, excuse, stays) = (self.actor.cut(), self.excuse(at), self.stays(at, n));
        let excuse = |status: &tonic::Status| excuse(status) || !stays;
        let call = async |c: &cri::Client| c.reopen_log(&id).await;
        self.actor.call(&what, cut, excuse, call).await?;
        Ok(())
    }

    async fn exec(&mut self, at: usize, n: usize) -> Run<()> {
        let (id, what) = self.about(at, n, "ExecSync");
        let code = self.actor.rng.number(0..100) as i32;
        let script = format!("echo out; echo err >&2; exit {code}");
        let (cut, excuse, stays) = (self.actor.cut(), self.excuse(at), self.stays(at, n));
        let excuse = |status: &tonic::Status| excuse(status) || !stays;
        let call = async |c: &cri::Client| c.exec(&id, &["sh", "-c", &script], 20).await;
        let answer = self.actor.call(&what, cut, excuse, call).await?;
        let Answer::Done(output) = answer else {
            return Ok(());
        };
        let seen = (output.exit_code, &*output.stdout, &*output.stderr);
        // In a container that ends at this moment it is killed.
        if self.stays(at, n) && !self.is_lost(at) && seen != (code, b"out\n", b"err\n") {
            let error = format!("ended with {output:?}, expected {code}");
            return self.actor.expect(&what, Err(error));
        }
        Ok(())
    }

    async fn container_status(&mut self, at: usize, n: usize) -> Run<()> {
        let (id, what) = self.about(at, n, "ContainerStatus");
        // Only one that may be removed already may be unknown.
        let gone = self
            .held(at, n)
            .model
            .clone()
            .observe(State::Absent, false)
            .is_ok();
        let call = async |c: &cri::Client| c.status(&id).await;
        let answer = self.actor.call(&what, None, |_| gone, call).await?;
        match answer.done() {
            Some(status) => self.see_status(at, n, &status),
            None => Ok(()),
        }
    }

    fn see_status(&mut self, at: usize, n: usize, status: &v1::ContainerStatus) -> Run<()> {
        let lost = self.is_lost(at);
        let about = format!(
            "{}/{}",
            self.slots[at].name, self.slots[at].containers[n].name
        );
        let model = &mut self.held(at, n).model;
        let seen = (|| {
            let state = State::of(status.state()).ok_or("is UNKNOWN")?;
            model.observe(state, lost)?;
            if state == State::Exited {
                let exit = Exit {
                    code: status.exit_code,
                    reason: status.reason.clone(),
                    created_at: status.created_at,
                    started_at: status.started_at,
                    finished_at: status.finished_at,
                };
                model.observe_exit(exit, lost)?;
            }
            let linux = status.resources.as_ref().and_then(|r| r.linux.as_ref());
            let shares = linux.ok_or("has no resources")?.cpu_shares;
            model.observe_shares(shares)
        })();
        self.actor.expect(&about, seen)?;
        self.check_log(at, n)
    }

    /// All that was ever written to the log of a container, and what it must be.
    fn check_log(&mut self, at: usize, n: usize) -> Run<()> {
        let path = self.log_path(at, n);
        let held = self.held(at, n);
        let mut text = String::new();
        for turn in 1..=held.rotated {
            let aside = PathBuf::from(format!("{}.{turn}", path.display()));
            text.push_str(&log::text(&log::read(&aside), "stdout"));
        }
        text.push_str(&log::text(&log::read(&path), "stdout"));
        let seen = held.model.observe_log(&text);
        let about = path.display().to_string();
        self.actor.expect(&about, seen)
    }

    /// Removes what an earlier container of that name has written.
    fn forget_log(&mut self, at: usize, n: usize) {
        let path = self.log_path(at, n);
        let held = self.held(at, n);
        let aside = (1..=held.rotated).map(|turn| format!("{}.{turn}", path.display()).into());
        for path in aside.chain([path.clone()]) {
            // It may not have come to write anything.
            let _ = std::fs::remove_file(path);
        }
        held.rotated = 0;
    }

    fn held(&mut self, at: usize, n: usize) -> &mut Held {
        &mut self.slots[at].containers[n]
    }

    fn stays(&self, at: usize, n: usize) -> bool {
        self.slots[at].containers[n].model.stays()
    }

    fn log_path(&self, at: usize, n: usize) -> PathBuf {
        let slot = &self.slots[at];
        Path::new(&slot.config.log_directory).join(&slot.containers[n].config.log_path)
    }

    /// Id of a container that was made, and words for a call about it.
    fn about(&self, at: usize, n: usize, call: &str) -> (String, String) {
        let held = &self.slots[at].containers[n];
        let id = held.id.clone().unwrap_or_default();
        (id, format!("{call} {}/{}", self.slots[at].name, held.name))
    }

    async fn image_step(&mut self) -> Run<()> {
        let name = self.place.own_image.clone();
        let cut = self.actor.cut();
        let wanted = match self.image {
            Some(there) if self.actor.rng.percent(30) => {
                let what = format!("ImageStatus {name}");
                let call = async |c: &cri::Client| c.image(&name).await;
                let answer = self.actor.call(&what, None, |_| false, call).await?;
                let seen = answer.done().is_none_or(|image| image.is_some() == there);
                let outcome = if seen {
                    Ok(())
                } else {
                    Err(format!("is there: {}", !there))
                };
                return self.actor.expect(&what, outcome);
            }
            Some(there) => !there,
            None => self.actor.rng.percent(50),
        };
        let answer = if wanted {
            let what = format!("PullImage {name}");
            let call = async |c: &cri::Client| c.pull(&name).await.map(drop);
            self.actor.call(&what, cut, |_| false, call).await?
        } else {
            let what = format!("RemoveImage {name}");
            let call = async |c: &cri::Client| c.remove_image(&name).await;
            self.actor.call(&what, cut, |_| false, call).await?
        };
        self.image = answer.is_done().then_some(wanted);
        Ok(())
    }

    /// Calls that are answered from memory.
    async fn read_step(&mut self) -> Run<()> {
        let which = self.actor.rng.number(0..6);
        let what = format!("read {which}");
        let call = async |c: &cri::Client| match which {
            0 => c.version().await.map(drop),
            1 => c.node_status(true).await.map(drop),
            2 => c.list_images().await.map(drop),
            3 => {
                let request = v1::ImageFsInfoRequest {};
                c.images.clone().image_fs_info(request).await.map(drop)
            }
            4 => {
                let request = v1::RuntimeConfigRequest {};
                c.runtime.clone().runtime_config(request).await.map(drop)
            }
            _ => {
                let request = v1::UpdateRuntimeConfigRequest::default();
                c.runtime
                    .clone()
                    .update_runtime_config(request)
                    .await
                    .map(drop)
            }
        };
        self.actor.call(&what, None, |_| false, call).await?;
        Ok(())
    }

    /// Holds everything that is listed as this client's against what it knows.
    async fn verify(&mut self, whole: bool) -> Run<()> {
        self.actor
            .shared
            .history
            .count("comparisons with the model");
        let labels = || {
            [(OWNER.to_owned(), self.actor.who.clone())]
                .into_iter()
                .collect()
        };
        let of_pods = v1::PodSandboxFilter {
            label_selector: labels(),
            ..Default::default()
        };
        let of_containers = v1::ContainerFilter {
            label_selector: labels(),
            ..Default::default()
        };
        let call = async |c: &cri::Client| c.list_pods(Some(of_pods.clone())).await;
        let pods = self
            .actor
            .call("ListPodSandbox", None, |_| false, call)
            .await?;
        let call = async |c: &cri::Client| c.list(Some(of_containers.clone())).await;
        let containers = self
            .actor
            .call("ListContainers", None, |_| false, call)
            .await?;
        if let Some(pods) = pods.done() {
            self.verify_pods(&pods)?;
        }
        if let Some(containers) = containers.done() {
            self.verify_containers(&containers)?;
        }
        if whole {
            for at in 0..self.slots.len() {
                for n in 0..self.slots[at].containers.len() {
                    if self.slots[at].containers[n].id.is_some() {
                        self.container_status(at, n).await?;
                    }
                }
                if self.slots[at].made.is_some() {
                    self.pod_status(at).await?;
                }
            }
        }
        Ok(())
    }

    fn verify_pods(&mut self, listed: &[v1::PodSandbox]) -> Run<()> {
        let name = |pod: &v1::PodSandbox| pod.labels.get(NAME).cloned().unwrap_or_default();
        let ready = |pod: &v1::PodSandbox| pod.state() == v1::PodSandboxState::SandboxReady;
        let mut names = BTreeMap::new();
        for pod in listed {
            let times: &mut u32 = names.entry(name(pod)).or_default();
            *times += u32::from(ready(pod));
            let two = if *times > 1 {
                Err("is ready twice".to_owned())
            } else {
                Ok(())
            };
            self.actor.expect(&name(pod), two)?;
            let known = self.slots.iter().any(|slot| slot.name == name(pod));
            let left = known || self.abandoned.contains(&name(pod));
            if self.removed.contains(&pod.id) || !left {
                let error = format!("was removed and is listed: {pod:?}");
                return self.actor.expect(&name(pod), Err(error));
            }
        }
        for at in 0..self.slots.len() {
            let (lost, about) = (self.is_lost(at), self.slots[at].name.clone());
            let Some(made) = &mut self.slots[at].made else {
                continue;
            };
            let own = listed.iter().find(|pod| pod.id == made.id);
            let state = match own {
                None => PodState::Absent,
                Some(pod) if ready(pod) => PodState::Ready,
                Some(_) => PodState::NotReady,
            };
            let seen = made.pod.observe(state, lost);
            self.actor.expect(&about, seen)?;
        }
        Ok(())
    }

    fn verify_containers(&mut self, listed: &[v1::Container]) -> Run<()> {
        let mut known = BTreeSet::new();
        for at in 0..self.slots.len() {
            let lost = self.is_lost(at);
            for n in 0..self.slots[at].containers.len() {
                let about = format!(
                    "{}/{}",
                    self.slots[at].name, self.slots[at].containers[n].name
                );
                let held = &mut self.slots[at].containers[n];
                let by_name: Vec<_> = listed
                    .iter()
                    .filter(|container| container.labels.get(NAME) == Some(&held.name))
                    .collect();
                known.extend(by_name.iter().map(|container| container.id.clone()));
                let exited = v1::ContainerState::ContainerExited;
                let own = |one: &&&v1::Container| held.id.as_ref() == Some(&one.id);
                let others = by_name.iter().filter(|one| !own(one));
                // What was made and not acknowledged is not started, and is one.
                let alive: Vec<_> = others.clone().filter(|one| one.state() != exited).collect();
                let started =
                    |one: &&v1::Container| one.state() != v1::ContainerState::ContainerCreated;
                let expected = match (&held.id, &alive[..]) {
                    _ if !held.in_doubt => others.count() == 0,
                    (None, [one]) => !started(one),
                    (_, others) => others.is_empty(),
                };
                if !expected {
                    let error = format!("is there beside itself: {by_name:?}");
                    return self.actor.expect(&about, Err(error));
                }
                let seen = match (&held.id, by_name.iter().find(own)) {
                    (None, _) => Ok(()),
                    (Some(_), None) => held.model.observe(State::Absent, lost),
                    (Some(_), Some(one)) => match State::of(one.state()) {
                        Some(state) => held.model.observe(state, lost),
                        None => Err("is UNKNOWN".to_owned()),
                    },
                };
                self.actor.expect(&about, seen)?;
            }
        }
        let exited = v1::ContainerState::ContainerExited;
        for one in listed.iter().filter(|one| !known.contains(&one.id)) {
            let name = one.labels.get(NAME).cloned().unwrap_or_default();
            let left = self.doubtful.contains(&name) && one.state() == exited;
            if self.removed.contains(&one.id) || !left {
                let error = format!("was removed and is listed: {one:?}");
                return self.actor.expect(&name, Err(error));
            }
        }
        Ok(())
    }

    /// Looks at everything once more and then removes all of it, each by one of the ways there are.
    /// To be called when nothing is disturbed any more.
    pub async fn leave(&mut self) -> Run<()> {
        self.verify(true).await?;
        while !self.slots.is_empty() {
            if self.slots[0].made.is_some() {
                self.take_down().await?;
            } else {
                self.abandoned.insert(self.slots[0].name.clone());
            }
            self.slots.remove(0);
        }
        self.verify(false).await?;
        let who = self.actor.who.clone();
        let filter = v1::PodSandboxFilter {
            label_selector: [(OWNER.to_owned(), who)].into_iter().collect(),
            ..Default::default()
        };
        let call = async |c: &cri::Client| c.list_pods(Some(filter.clone())).await;
        for pod in self.actor.insist("ListPodSandbox", call).await? {
            let call = async |c: &cri::Client| c.remove_pod(&pod.id).await;
            self.actor
                .insist("RemovePodSandbox of what was given up", call)
                .await?;
        }
        self.abandoned.clear();
        self.verify(false).await?;
        let image = self.place.own_image.clone();
        let call = async |c: &cri::Client| c.remove_image(&image).await;
        self.actor.insist("RemoveImage", call).await?;
        self.image = Some(false);
        Ok(())
    }

    /// Removes the first pod with what is in it.
    async fn take_down(&mut self) -> Run<()> {
        if self.actor.rng.percent(50) {
            let mut n = 0;
            while n < self.slots[0].containers.len() {
                if self.held(0, n).id.is_none() {
                    n += 1;
                    continue;
                }
                while !self.stop(0, n, false).await? {
                    self.actor.pause(50..100).await;
                }
                self.container_status(0, n).await?;
                let before = self.slots[0].containers.len();
                while self.slots[0].containers.len() == before {
                    self.remove(0, n, false).await?;
                    self.actor.pause(20..50).await;
                }
            }
            self.stop_pod(0, false).await?;
        }
        while !self.remove_pod(0, false).await? {
            self.actor.pause(50..100).await;
        }
        Ok(())
    }
}

impl Held {
    /// What it was made with.
    fn config_shares(&self) -> i64 {
        let linux = self.config.linux.as_ref();
        linux
            .and_then(|linux| linux.resources.as_ref())
            .map_or(0, |resources| resources.cpu_shares)
    }
}
