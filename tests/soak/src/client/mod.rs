//! A client with pods of its own. Nobody else asks for anything about them, so what it was told is
//! what must be, in order.

mod containers;
mod leave;
mod logs;
mod pods;
mod verify;

use std::collections::BTreeSet;
use std::path::PathBuf;

use gantry_integration::script_config;
use gantry_testkit::cri::{self, v1};
use gantry_testkit::daemon::FAULTY;

use crate::actor::Actor;
use crate::history::Run;
use crate::model::{Container, Does, Pod, State};

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
        if made.pod.ends() || self.is_lost(at) && self.actor.rng.percent(40) {
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
}
