//! Calls about containers, and what they leave in the model.

use gantry_testkit::cri::{self, v1};

use super::{Client, Held};
use crate::actor::Answer;
use crate::history::Run;
use crate::model::{Container, Exit, State};

impl Client {
    /// Makes the container, or asks for the one that is there again.
    pub(super) async fn create(&mut self, at: usize, n: usize) -> Run<()> {
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
            Some(before) if *before != id && !held.model.may_be_absent() => {
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

    pub(super) async fn start(&mut self, at: usize, n: usize) -> Run<()> {
        let (id, what) = self.about(at, n, "StartContainer");
        let (cut, excuse) = (self.actor.cut(), self.excuse(at));
        let call = async |c: &cri::Client| c.start(&id).await;
        let answer = self.actor.call(&what, cut, excuse, call).await?;
        self.held(at, n).model.start(answer.is_done());
        Ok(())
    }

    /// Returns whether it was acknowledged.
    pub(super) async fn stop(&mut self, at: usize, n: usize, may_cut: bool) -> Run<bool> {
        let (id, what) = self.about(at, n, "StopContainer");
        let cut = if may_cut { self.actor.cut() } else { None };
        let grace = self.actor.rng.number(0..3) as i64;
        let call = async |c: &cri::Client| c.stop(&id, grace).await;
        let answer = self.actor.call(&what, cut, |_| false, call).await?;
        self.held(at, n).model.stop(answer.is_done());
        Ok(answer.is_done())
    }

    pub(super) async fn remove(&mut self, at: usize, n: usize, may_cut: bool) -> Run<()> {
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

    pub(super) async fn update(&mut self, at: usize, n: usize) -> Run<()> {
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

    pub(super) async fn reopen(&mut self, at: usize, n: usize) -> Run<()> {
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

    pub(super) async fn exec(&mut self, at: usize, n: usize) -> Run<()> {
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

    pub(super) async fn container_status(&mut self, at: usize, n: usize) -> Run<()> {
        let (id, what) = self.about(at, n, "ContainerStatus");
        // Only one that may be removed already may be unknown.
        let gone = self.held(at, n).model.may_be_absent();
        let call = async |c: &cri::Client| c.status(&id).await;
        let answer = self.actor.call(&what, None, |_| gone, call).await?;
        match answer.done() {
            Some(status) => self.see_status(at, n, &status),
            None => Ok(()),
        }
    }

    pub(super) fn see_status(
        &mut self,
        at: usize,
        n: usize,
        status: &v1::ContainerStatus,
    ) -> Run<()> {
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

    pub(super) fn held(&mut self, at: usize, n: usize) -> &mut Held {
        &mut self.slots[at].containers[n]
    }

    pub(super) fn stays(&self, at: usize, n: usize) -> bool {
        self.slots[at].containers[n].model.stays()
    }

    /// Id of a container that was made, and words for a call about it.
    pub(super) fn about(&self, at: usize, n: usize, call: &str) -> (String, String) {
        let held = &self.slots[at].containers[n];
        let id = held.id.clone().unwrap_or_default();
        (id, format!("{call} {}/{}", self.slots[at].name, held.name))
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
