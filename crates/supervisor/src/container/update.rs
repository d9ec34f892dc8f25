//! UpdateContainerResources: in CREATED the stored spec is changed, in RUNNING the runtime too.

use std::sync::Arc;

use gantry_cri_api::v1 as cri;
use gantry_shim_api::v1::{self, request};
use gantry_types::{ContainerId, ContainerState, Decision};
use prost::Message;

use crate::Error;
use crate::pod::{Driver, Reply, blocking};
use crate::rundir::write_file;

pub(super) const UPDATING: &str = "updating";

impl Driver {
    pub(super) fn update(
        &mut self,
        id: &ContainerId,
        asked: cri::LinuxContainerResources,
        reply: Reply<()>,
    ) {
        let shim = self.shim.clone();
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if let Decision::Deny(reason) = container.state.may_update() {
            let _ = reply.send(Err(container.denied(reason)));
            return;
        }
        let running = matches!(container.state, ContainerState::Running { .. });
        if running && shim.is_none() {
            let _ = reply.send(Err(self.no_shim()));
            return;
        }
        let before = cri::LinuxContainerResources::decode(container.status.resources.as_slice())
            .unwrap_or_default();
        let node = self.ctx.settings.cgroup_node;
        let changed = gantry_spec::resources::update(&before, &asked, node);
        let (merged, resources) = match changed.map_err(Error::step("check resources")) {
            Ok(changed) => changed,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        container.busy = Some(UPDATING);
        let mut status = container.status.clone();
        status.resources = merged.encode_to_vec();
        let ctx = Arc::clone(&self.ctx);
        let key = id.clone();
        let id = id.clone();
        let copy = status.clone();
        self.effect(
            async move {
                let json = serde_json::to_vec(&resources)
                    .map_err(|error| Error::internal("encode resources", error))?;
                if let (true, Some(shim)) = (running, shim) {
                    let body = v1::Update {
                        container_id: key.to_string(),
                        resources_json: json,
                    };
                    let limit = ctx.settings.timeouts.runtime;
                    shim.done(request::Body::Update(body), limit).await?;
                }
                blocking(move || {
                    rewrite_spec(&ctx.records.dirs.container(&key), resources)?;
                    ctx.records.put_container_status(&key, &copy)
                })
                .await
            },
            move |driver, outcome| {
                if let Some(container) = driver.containers.get_mut(&id) {
                    container.busy = None;
                    if outcome.is_ok() {
                        // The state may have moved on meanwhile; the resources are what we wrote.
                        container.status.resources = status.resources;
                        driver.publish();
                    }
                }
                let _ = reply.send(outcome);
                let container = driver.containers.get_mut(&id);
                if let Some(exit) = container.and_then(|container| container.early_exit.take()) {
                    driver.exited(&id, exit);
                }
            },
        );
    }
}

/// Puts the resources into the bundle's config.json: the start, or whoever looks, finds them.
fn rewrite_spec(
    bundle: &std::path::Path,
    resources: oci_spec::runtime::LinuxResources,
) -> Result<(), Error> {
    const STEP: &str = "update spec";
    let path = bundle.join("config.json");
    let bytes = std::fs::read(&path).map_err(|error| Error::io(STEP, &path, &error))?;
    let mut spec: oci_spec::runtime::Spec =
        serde_json::from_slice(&bytes).map_err(|error| Error::internal(STEP, error))?;
    if let Some(linux) = spec.linux_mut() {
        let devices = linux
            .resources()
            .as_ref()
            .and_then(|old| old.devices().clone());
        let mut resources = resources;
        resources.set_devices(devices);
        linux.set_resources(Some(resources));
    }
    let bytes = serde_json::to_vec(&spec).map_err(|error| Error::internal(STEP, error))?;
    write_file(&path, &bytes, 0o600).map_err(|error| Error::io(STEP, &path, &error))
}
