//! What is listed, held against the model.

use std::collections::{BTreeMap, BTreeSet};

use gantry_testkit::cri::{self, v1};

use super::{Client, NAME, OWNER};
use crate::history::Run;
use crate::model::{PodState, State};

impl Client {
    /// Holds everything that is listed as this client's against what it knows.
    pub(super) async fn verify(&mut self, whole: bool) -> Run<()> {
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

    pub(super) fn verify_pods(&mut self, listed: &[v1::PodSandbox]) -> Run<()> {
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

    pub(super) fn verify_containers(&mut self, listed: &[v1::Container]) -> Run<()> {
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
                    (id, [one]) if id.is_none() || held.model.may_be_absent() => !started(one),
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
}
