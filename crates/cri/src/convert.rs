//! Views of the supervisor as CRI messages, and the filters of the lists.

use std::collections::BTreeMap;
use std::sync::Arc;

use gantry_cri_api::v1 as cri;
use gantry_images::{Image, Images};
use gantry_supervisor::registry::{ContainerView, PodView};
use gantry_types::{ContainerState, PodState};

pub fn pod_state(state: &PodState) -> cri::PodSandboxState {
    match state {
        PodState::Ready { .. } => cri::PodSandboxState::SandboxReady,
        PodState::Creating | PodState::NotReady { .. } => cri::PodSandboxState::SandboxNotready,
    }
}

/// CRI's state of a container: one total function.
pub fn container_state(state: &ContainerState) -> cri::ContainerState {
    match state {
        ContainerState::Creating | ContainerState::Created => cri::ContainerState::ContainerCreated,
        ContainerState::Running { .. } => cri::ContainerState::ContainerRunning,
        ContainerState::Exited { .. } => cri::ContainerState::ContainerExited,
        ContainerState::Unknown { .. } => cri::ContainerState::ContainerUnknown,
    }
}

pub fn pod(view: &PodView) -> cri::PodSandbox {
    let facts = &view.facts;
    cri::PodSandbox {
        id: facts.id.to_string(),
        metadata: facts.config.metadata.clone(),
        state: pod_state(&view.state).into(),
        created_at: facts.record.created_at,
        labels: facts.config.labels.clone(),
        annotations: facts.config.annotations.clone(),
        runtime_handler: facts.record.runtime_handler.clone(),
    }
}

pub fn pod_status(view: &PodView) -> cri::PodSandboxStatus {
    let facts = &view.facts;
    let options = facts
        .config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|security| security.namespace_options.clone());
    let mut ips = view.ips.iter();
    cri::PodSandboxStatus {
        id: facts.id.to_string(),
        metadata: facts.config.metadata.clone(),
        state: pod_state(&view.state).into(),
        created_at: facts.record.created_at,
        network: Some(cri::PodSandboxNetworkStatus {
            ip: ips.next().cloned().unwrap_or_default(),
            additional_ips: ips.map(|ip| cri::PodIp { ip: ip.clone() }).collect(),
        }),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace { options }),
        }),
        labels: facts.config.labels.clone(),
        annotations: facts.config.annotations.clone(),
        runtime_handler: facts.record.runtime_handler.clone(),
    }
}

pub fn container(view: &ContainerView, image: Option<&Image>) -> cri::Container {
    let facts = &view.facts;
    cri::Container {
        id: facts.id.to_string(),
        pod_sandbox_id: facts.pod.to_string(),
        metadata: facts.config.metadata.clone(),
        image: Some(image_spec(view, image)),
        image_ref: facts.record.image_id.clone(),
        state: container_state(&view.state).into(),
        created_at: facts.record.created_at,
        labels: facts.config.labels.clone(),
        annotations: facts.config.annotations.clone(),
        image_id: facts.record.image_id.clone(),
    }
}

pub fn container_status(view: &ContainerView, image: Option<&Image>) -> cri::ContainerStatus {
    let facts = &view.facts;
    let mut status = cri::ContainerStatus {
        id: facts.id.to_string(),
        metadata: facts.config.metadata.clone(),
        state: container_state(&view.state).into(),
        created_at: facts.record.created_at,
        image: Some(image_spec(view, image)),
        image_ref: facts.record.image_id.clone(),
        labels: facts.config.labels.clone(),
        annotations: facts.config.annotations.clone(),
        mounts: mounts(view),
        log_path: facts.record.log_path.clone(),
        resources: view.resources.clone().map(|linux| cri::ContainerResources {
            linux: Some(linux),
            windows: None,
        }),
        image_id: facts.record.image_id.clone(),
        user: view.user.as_ref().map(|user| cri::ContainerUser {
            linux: Some(cri::LinuxContainerUser {
                uid: user.uid.into(),
                gid: user.gid.into(),
                supplemental_groups: user
                    .supplemental_groups
                    .iter()
                    .map(|group| i64::from(*group))
                    .collect(),
            }),
        }),
        stop_signal: gantry_spec::signal::from_number(facts.record.stop_signal).into(),
        ..Default::default()
    };
    match &view.state {
        ContainerState::Creating | ContainerState::Created => {}
        ContainerState::Running { started_at, .. } => status.started_at = *started_at,
        ContainerState::Exited { exit, started_at } => {
            status.started_at = *started_at;
            status.finished_at = exit.finished_at;
            status.exit_code = exit.code;
            status.reason = exit.cri_reason().to_owned();
            status.message.clone_from(&exit.message);
        }
        ContainerState::Unknown { why } => {
            status.reason = "Unknown".to_owned();
            status.message.clone_from(why);
        }
    }
    status
}

/// Statuses of all of a pod's containers.
pub fn container_statuses(pod: &PodView, images: &Images) -> Vec<cri::ContainerStatus> {
    let containers = pod.containers.iter();
    containers
        .map(|view| container_status(view, image_of(view, images).as_deref()))
        .collect()
}

/// The image that a container was made from, if it is still there.
pub fn image_of(view: &ContainerView, images: &Images) -> Option<Arc<Image>> {
    images.status(&view.facts.record.image_id).ok().flatten()
}

/// Echoed exactly, as the kubelet finds the termination message through them; an image among them
/// has its id added.
fn mounts(view: &ContainerView) -> Vec<cri::Mount> {
    let mut mounts = view.facts.config.mounts.clone();
    for known in &view.facts.record.image_mounts {
        let mount = usize::try_from(known.mount).ok();
        let mount = mount.and_then(|n| mounts.get_mut(n));
        if let Some(image) = mount.and_then(|mount| mount.image.as_mut()) {
            image.image_ref.clone_from(&known.image_id);
        }
    }
    mounts
}

/// The image as asked for, under a name that people know.
pub fn image_spec(view: &ContainerView, image: Option<&Image>) -> cri::ImageSpec {
    let mut spec = view.facts.config.image.clone().unwrap_or_default();
    let known = image.and_then(|image| image.tags.first().or(image.digests.first()));
    if let Some(name) = known {
        spec.image.clone_from(name);
    }
    spec
}

/// All pairs of the selector are among the labels.
fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

pub fn pod_matches(filter: &cri::PodSandboxFilter, view: &PodView) -> bool {
    view.facts.id.as_str().starts_with(&filter.id)
        && filter
            .state
            .as_ref()
            .is_none_or(|state| state.state() == pod_state(&view.state))
        && selects(&filter.label_selector, &view.facts.config.labels)
}

pub fn container_matches(filter: &cri::ContainerFilter, view: &ContainerView) -> bool {
    view.facts.id.as_str().starts_with(&filter.id)
        && view.facts.pod.as_str().starts_with(&filter.pod_sandbox_id)
        && filter
            .state
            .as_ref()
            .is_none_or(|state| state.state() == container_state(&view.state))
        && selects(&filter.label_selector, &view.facts.config.labels)
}

pub fn image(image: &Image) -> cri::Image {
    let (uid, username) = image.uid_or_name();
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.tags.clone(),
        repo_digests: image.digests.clone(),
        // The kubelet takes a size of zero for a broken answer.
        size: image.size.max(1),
        uid: uid.map(|value| cri::Int64Value { value }),
        username: username.to_owned(),
        spec: None,
        pinned: image.pinned,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_anded() {
        let map = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        let labels = map(&[("a", "1"), ("b", "2")]);
        assert!(selects(&map(&[]), &labels));
        assert!(selects(&map(&[("a", "1"), ("b", "2")]), &labels));
        assert!(!selects(&map(&[("a", "1"), ("b", "3")]), &labels));
        assert!(!selects(&map(&[("c", "1")]), &labels));
    }
}
