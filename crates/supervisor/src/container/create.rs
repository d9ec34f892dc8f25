//! CreateContainer: reserve, flush the intent, prepare root and bundle, flush the result.

use std::path::{Component, Path};
use std::sync::Arc;

use gantry_cri_api::v1 as cri;
use gantry_images::{Image, ImageInUse};
use gantry_spec::Resolved;
use gantry_store::record;
use gantry_types::{ContainerId, ContainerState, Decision, Exit};
use prost::Message;

use super::relabel::relabel;
use super::resolve::{self, Sources};
use super::{Container, mounts, root, stop};
use crate::activity::Of;
use crate::clock::now_ns;
use crate::pod::{Driver, Reply, answer};
use crate::records::set_container_state;
use crate::registry::{ContainerFacts, PodFacts};
use crate::rundir::{open_to_group, write_file};
use crate::{Context, Error, failpoint};

/// `reason` of a container that could not be made and not be taken back.
pub(super) const CREATE_ERROR: &str = "CreateError";

/// Why it was not made, and what could not be taken back.
struct Failed {
    error: Error,
    left: Option<String>,
}

impl Driver {
    pub(crate) fn create_container(
        &mut self,
        config: cri::ContainerConfig,
        config_hash: [u8; 32],
        reply: Reply<ContainerId>,
    ) {
        let name = config
            .metadata
            .as_ref()
            .map(|metadata| (metadata.name.clone(), metadata.attempt))
            .unwrap_or_default();
        if let Some(id) = self.container_names.get(&name).cloned() {
            self.repeated_create(&id, name.0, config_hash, reply);
            return;
        }
        let denied = |reason: &str| Error::State {
            what: "pod sandbox",
            id: self.id().to_string(),
            reason: reason.to_owned(),
        };
        if self.ending() {
            let _ = reply.send(Err(denied("it is being stopped")));
            return;
        }
        if let Decision::Deny(reason) = self.state.may_create_container() {
            let _ = reply.send(Err(denied(reason)));
            return;
        }
        let checked = check_namespaces(self.pod_config(), &config);
        let prepared = checked
            .and_then(|()| self.target_pid(&config))
            .and_then(|target| {
                let image = Arc::new(find_image(&self.ctx, &config)?);
                let mounted = mounts::find_images(&self.ctx, &config)?;
                let mut facts = facts(&self.ctx, &self.facts, config, config_hash, &image)?;
                facts.record.image_mounts = mounts::image_records(&mounted);
                Ok((target, image, mounted, facts))
            });
        let (target_pid, image, mounted, facts) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let facts = Arc::new(facts);
        let resources = facts
            .config
            .linux
            .as_ref()
            .and_then(|linux| linux.resources.as_ref());
        let status = record::ContainerStatus {
            resources: resources.map(Message::encode_to_vec).unwrap_or_default(),
            ..Default::default()
        };
        let mut container = Container::new(Arc::clone(&facts), status.clone());
        container.busy = Some("creating");
        container.creating.push(reply);
        self.add_container(Arc::clone(&facts), container);
        let (ctx, pod) = (Arc::clone(&self.ctx), Arc::clone(&self.facts));
        let id = facts.id.clone();
        // Its layers are held until the container is published with their names.
        let mounted = Arc::new(mounted);
        let leases = (Arc::clone(&image), Arc::clone(&mounted));
        let step = ctx
            .activity
            .begin("create container", Of::container(&pod, &id));
        self.effect(
            async move {
                let images = mounted.iter().map(|(_, mounted)| mounted);
                for used in images.chain([image.as_ref()]) {
                    // Imported to be unpacked when it is needed, which is now; or pulled without a
                    // word of the handler that needs it.
                    unpack(&ctx, &facts, used)
                        .await
                        .map_err(|error| Failed { error, left: None })?;
                }
                let made = tokio::task::spawn_blocking(move || {
                    make(&ctx, &pod, &facts, &image, status, target_pid)
                });
                let made = made.await.unwrap_or_else(|panic| {
                    Err(Failed {
                        error: Error::internal("create container", panic),
                        left: Some("the work was cut short".to_owned()),
                    })
                });
                step.end(made.is_ok());
                made
            },
            move |driver, outcome| {
                driver.finish_create(&id, outcome);
                drop(leases);
            },
        );
    }

    /// The same request joins the one in flight or learns the id that its reply lost.
    fn repeated_create(
        &mut self,
        id: &ContainerId,
        name: String,
        config_hash: [u8; 32],
        reply: Reply<ContainerId>,
    ) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if container.facts.record.config_hash != config_hash {
            let id = id.to_string();
            let _ = reply.send(Err(Error::NameInUse {
                what: "container",
                name,
                id,
            }));
        } else if container.remove.is_some() {
            let _ = reply.send(Err(container.denied("it is being removed")));
        } else if container.state == ContainerState::Creating {
            container.creating.push(reply);
        } else {
            let _ = reply.send(Ok(id.clone()));
        }
    }

    fn finish_create(
        &mut self,
        id: &ContainerId,
        outcome: Result<record::ContainerStatus, Failed>,
    ) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.busy = None;
        let waiters = std::mem::take(&mut container.creating);
        match outcome {
            Ok(status) => {
                container.set_status(status);
                self.publish();
                answer(waiters, &Ok(id.clone()));
            }
            Err(Failed { error, left: None }) => {
                let removers = container.remove.take().unwrap_or_default();
                let stoppers = container
                    .stop
                    .take()
                    .map(|wish| wish.waiters)
                    .unwrap_or_default();
                self.drop_container(id);
                answer(waiters, &Err(error));
                answer(removers, &Ok(()));
                answer(stoppers, &Ok(()));
            }
            Err(Failed {
                error,
                left: Some(left),
            }) => {
                tracing::error!(container = %id, %error, left, "a failed container is left to be removed");
                let state = half_made(format!("{error}; {left}"));
                set_container_state(&mut container.status, &state);
                container.state = state;
                // Its name must not block the retry; by its id it can be removed.
                self.container_names.retain(|_, holder| holder != id);
                self.publish();
                answer(waiters, &Err(error));
            }
        }
    }

    fn target_pid(&self, config: &cri::ContainerConfig) -> Result<Option<i32>, Error> {
        let Some(target) = resolve::target_id(config) else {
            return Ok(None);
        };
        let invalid = |reason: &str| Error::Invalid {
            field: "linux.security_context.namespace_options.target_id".to_owned(),
            reason: format!("{target:?} {reason}"),
        };
        let container = self
            .containers
            .get(target)
            .ok_or_else(|| invalid("is no container of this pod"))?;
        match container.state {
            ContainerState::Running { process, .. } => Ok(Some(process.pid)),
            ContainerState::Creating
            | ContainerState::Created
            | ContainerState::Exited { .. }
            | ContainerState::Unknown { .. } => Err(invalid("is not running")),
        }
    }
}

pub(crate) fn half_made(message: String) -> ContainerState {
    ContainerState::Exited {
        exit: Exit {
            code: 128,
            finished_at: now_ns(),
            oom_killed: false,
            reason: CREATE_ERROR.to_owned(),
            message,
        },
        started_at: 0,
    }
}

/// The container's namespaces are those of its pod, as far as both have a say.
fn check_namespaces(
    pod: &cri::PodSandboxConfig,
    container: &cri::ContainerConfig,
) -> Result<(), Error> {
    let security = pod
        .linux
        .as_ref()
        .and_then(|it| it.security_context.as_ref());
    let of_pod = security.and_then(|it| it.namespace_options.clone());
    let security = container
        .linux
        .as_ref()
        .and_then(|it| it.security_context.as_ref());
    let own = security.and_then(|it| it.namespace_options.clone());
    gantry_spec::userns::check_container(&of_pod.unwrap_or_default(), &own.unwrap_or_default())
        .map_err(Error::step("check request"))
}

fn find_image(ctx: &Context, config: &cri::ContainerConfig) -> Result<ImageInUse, Error> {
    let name = config
        .image
        .as_ref()
        .map(|image| image.image.as_str())
        .unwrap_or_default();
    if name.is_empty() {
        return Err(Error::Invalid {
            field: "config.image.image".to_owned(),
            reason: "is empty".to_owned(),
        });
    }
    ctx.images
        .use_image(name)
        .map_err(Error::step("find image"))?
        .ok_or_else(|| Error::NotFound {
            what: "image",
            id: name.to_owned(),
        })
}

/// What is known before anything is made.
fn facts(
    ctx: &Context,
    pod: &PodFacts,
    config: cri::ContainerConfig,
    config_hash: [u8; 32],
    image: &Image,
) -> Result<ContainerFacts, Error> {
    let id = ContainerId::from_random(crate::random());
    let parent = pod
        .config
        .linux
        .as_ref()
        .map(|linux| linux.cgroup_parent.as_str());
    let parent = ctx.settings.cgroups.parent(parent.unwrap_or_default())?;
    let place = ctx.settings.cgroups.container(parent, &id)?;
    let image_signal = &image.config.stop_signal;
    if !image_signal.is_empty() && gantry_spec::signal::parse(image_signal).is_none() {
        tracing::warn!(
            image = image.id,
            image_signal,
            "StopSignal names no signal: passed over"
        );
    }
    let stop_signal =
        gantry_spec::signal::stop_signal(config.stop_signal(), &image.config.stop_signal);
    let record = record::ContainerConfig {
        id: id.to_string(),
        pod_id: pod.id.to_string(),
        cri_config: config.encode_to_vec(),
        created_at: now_ns(),
        config_hash: config_hash.to_vec(),
        boot_id: ctx.settings.boot_id.clone(),
        image_id: image.id.clone(),
        layers: image.layers.iter().map(ToString::to_string).collect(),
        log_path: log_path(&pod.config.log_directory, &config.log_path)?,
        stop_signal,
        cgroup_dir: place.dir.to_string_lossy().into_owned(),
        oom_file: place.oom_file.to_string_lossy().into_owned(),
        image_mounts: Vec::new(),
        snapshotter: ctx
            .snapshotter_of(&pod.record.runtime_handler)
            .name()
            .to_owned(),
    };
    Ok(ContainerFacts {
        id,
        pod: pod.id.clone(),
        config,
        record,
    })
}

/// `log_path` below the pod's log directory; empty when either is (CVE-2025-0750: it is joined,
/// not trusted).
fn log_path(directory: &str, path: &str) -> Result<String, Error> {
    if directory.is_empty() || path.is_empty() {
        return Ok(String::new());
    }
    let invalid = |field: &str, value: &str, reason: &str| Error::Invalid {
        field: field.to_owned(),
        reason: format!("{value:?} {reason}"),
    };
    let plain = |part: Component| matches!(part, Component::Normal(_) | Component::CurDir);
    if !Path::new(path).components().all(plain) {
        return Err(invalid(
            "config.log_path",
            path,
            "does not stay in the log directory",
        ));
    }
    if !Path::new(directory).is_absolute() {
        return Err(invalid("log_directory", directory, "is not absolute"));
    }
    Ok(Path::new(directory)
        .join(path)
        .to_string_lossy()
        .into_owned())
}

/// Makes sure that the container's snapshotter has the image.
async fn unpack(ctx: &Context, facts: &ContainerFacts, image: &ImageInUse) -> Result<(), Error> {
    let snapshotter = ctx.snapshotter(&facts.record)?;
    let unpacked = ctx.images.unpack(image, snapshotter).await;
    unpacked.map_err(Error::step("unpack image"))
}

/// Makes the container on disk. On failure all is taken back, or what is left is named.
fn make(
    ctx: &Context,
    pod: &PodFacts,
    facts: &ContainerFacts,
    image: &Image,
    status: record::ContainerStatus,
    target_pid: Option<i32>,
) -> Result<record::ContainerStatus, Failed> {
    steps(ctx, pod, facts, image, status, target_pid).map_err(|error| {
        let left = stop::remove_files(ctx, &facts.id)
            .err()
            .map(|error| error.to_string());
        if let Some(left) = &left {
            let mut status = record::ContainerStatus::default();
            set_container_state(&mut status, &half_made(format!("{error}; {left}")));
            if let Err(error) = ctx.records.put_container_status(&facts.id, &status) {
                tracing::error!(container = %facts.id, %error, "failed container not recorded");
            }
        }
        Failed { error, left }
    })
}

fn steps(
    ctx: &Context,
    pod: &PodFacts,
    facts: &ContainerFacts,
    image: &Image,
    mut status: record::ContainerStatus,
    target_pid: Option<i32>,
) -> Result<record::ContainerStatus, Error> {
    ctx.records
        .begin_container(&facts.id, &facts.record, &status)?;
    failpoint::at("container::after-intent")?;
    let owners = root::Owners::of(ctx, pod, facts)?;
    if let Some(user) = &owners.user {
        let bundle = ctx.records.dirs.container(&facts.id);
        open_to_group(&bundle, user.gid)
            .map_err(|error| Error::io("open bundle", &bundle, &error))?;
    }
    root::make(ctx, facts, image, &owners)?;
    failpoint::at("container::after-root")?;
    let volumes = root::volumes(ctx, facts, image, owners.user.as_ref())?;

    let parent = pod
        .config
        .linux
        .as_ref()
        .map(|linux| linux.cgroup_parent.as_str());
    let parent = ctx.settings.cgroups.parent(parent.unwrap_or_default())?;
    let place = ctx.settings.cgroups.container(parent, &facts.id)?;
    let sources = Sources {
        ctx,
        pod,
        container: facts,
        image,
        place: &place,
        owners: &owners,
        target_pid,
    };
    let resolved = Resolved {
        volumes,
        ..sources.resolve()?
    };
    label_files(&facts.config, &resolved)?;
    status.user = Some(record::User {
        uid: resolved.user.uid,
        gid: resolved.user.gid,
        supplemental_groups: resolved.user.additional_gids.clone(),
    });
    let spec = gantry_spec::container(&facts.config, &pod.config, &resolved)
        .map_err(Error::step("build spec"))?;
    let json = serde_json::to_vec(&spec).map_err(|error| Error::internal("encode spec", error))?;
    let path = ctx.records.dirs.container(&facts.id).join("config.json");
    write_file(&path, &json, 0o600).map_err(|error| Error::io("write spec", &path, &error))?;

    set_container_state(&mut status, &ContainerState::Created);
    ctx.records.put_container_status(&facts.id, &status)?;
    failpoint::at("container::after-result")?;
    Ok(status)
}

/// Labels what the container is given of the host: the pod's files, and mounts that ask for it.
fn label_files(config: &cri::ContainerConfig, resolved: &Resolved) -> Result<(), Error> {
    let Some(labels) = &resolved.selinux else {
        return Ok(());
    };
    let files = &resolved.files;
    let own = [&files.hosts, &files.hostname, &files.resolv_conf];
    for file in own.into_iter().flatten() {
        relabel(file, &labels.mount)?;
    }
    for volume in &resolved.volumes {
        relabel(&volume.source, &labels.mount)?;
    }
    for (asked, host) in config.mounts.iter().zip(&resolved.mounts) {
        // The layers of an image are shared with others, and read-only.
        if asked.selinux_relabel && asked.image.is_none() {
            relabel(&host.source, &labels.mount)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_stays_in_its_directory() {
        assert_eq!(
            log_path("/var/log/pods/p", "c/0.log").unwrap(),
            "/var/log/pods/p/c/0.log"
        );
        assert_eq!(log_path("", "c/0.log").unwrap(), "");
        assert_eq!(log_path("/var/log", "").unwrap(), "");
        for bad in ["../x", "a/../../x", "/etc/passwd"] {
            assert!(log_path("/var/log", bad).is_err(), "{bad}");
        }
        assert!(log_path("var/log", "x").is_err());
    }
}
