//! Calls about pods, and what they leave in the model.

use gantry_testkit::cri::{self, v1};

use super::{Client, Made};
use crate::history::Run;
use crate::model::{Pod, PodState};

impl Client {
    /// Makes the pod, or asks for the one that is there again.
    pub(super) async fn run_pod(&mut self, at: usize) -> Run<()> {
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

    pub(super) fn made(&mut self, at: usize) -> &mut Made {
        self.slots[at].made.as_mut().expect("a pod that was made")
    }

    pub(super) async fn stop_pod(&mut self, at: usize, may_cut: bool) -> Run<()> {
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
    pub(super) async fn remove_pod(&mut self, at: usize, may_cut: bool) -> Run<bool> {
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

    pub(super) async fn pod_status(&mut self, at: usize) -> Run<()> {
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
}
