//! The end of a life: everything is removed, by each of the ways there are.

use gantry_testkit::cri::{self, v1};

use super::{Client, OWNER};
use crate::history::Run;

impl Client {
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
    pub(super) async fn take_down(&mut self) -> Run<()> {
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
