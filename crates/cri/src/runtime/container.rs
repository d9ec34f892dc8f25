//! The calls on containers.

use std::collections::BTreeMap;
use std::time::Duration;

use gantry_cri_api::v1 as cri;
use gantry_supervisor::registry::ContainerView;
use gantry_types::ContainerState;
use serde_json::json;
use tonic::Status;

use super::Runtime;
use crate::convert;
use crate::inflight::about;
use crate::status::{invalid, status};

impl Runtime {
    pub(super) async fn create(
        &self,
        request: cri::CreateContainerRequest,
    ) -> Result<cri::CreateContainerResponse, Status> {
        let config = request
            .config
            .ok_or_else(|| invalid("config", "is missing"))?;
        match &config.metadata {
            None => return Err(invalid("config.metadata", "is missing")),
            Some(metadata) if metadata.name.is_empty() => {
                return Err(invalid("config.metadata.name", "is empty"));
            }
            Some(_) => {}
        }
        about(&request.pod_sandbox_id);
        let id = self
            .supervisor
            .create_container(&request.pod_sandbox_id, config)
            .await
            .map_err(status)?;
        Ok(cri::CreateContainerResponse {
            container_id: id.to_string(),
        })
    }

    pub(super) async fn start(&self, id: &str) -> Result<cri::StartContainerResponse, Status> {
        about(id);
        self.supervisor.start_container(id).await.map_err(status)?;
        Ok(cri::StartContainerResponse {})
    }

    pub(super) async fn stop(
        &self,
        request: &cri::StopContainerRequest,
    ) -> Result<cri::StopContainerResponse, Status> {
        about(&request.container_id);
        let grace = seconds("timeout", request.timeout)?;
        self.supervisor
            .stop_container(&request.container_id, grace)
            .await
            .map_err(status)?;
        Ok(cri::StopContainerResponse {})
    }

    pub(super) async fn remove(&self, id: &str) -> Result<cri::RemoveContainerResponse, Status> {
        about(id);
        self.supervisor.remove_container(id).await.map_err(status)?;
        Ok(cri::RemoveContainerResponse {})
    }

    pub(super) async fn update(
        &self,
        request: cri::UpdateContainerResourcesRequest,
    ) -> Result<cri::UpdateContainerResourcesResponse, Status> {
        about(&request.container_id);
        let resources = request
            .linux
            .ok_or_else(|| invalid("linux", "is missing"))?;
        self.supervisor
            .update_container(&request.container_id, resources)
            .await
            .map_err(status)?;
        Ok(cri::UpdateContainerResourcesResponse {})
    }

    pub(super) async fn reopen_log(
        &self,
        id: &str,
    ) -> Result<cri::ReopenContainerLogResponse, Status> {
        about(id);
        self.supervisor.reopen_log(id).await.map_err(status)?;
        Ok(cri::ReopenContainerLogResponse {})
    }

    pub(super) fn list(&self, filter: Option<cri::ContainerFilter>) -> Vec<cri::Container> {
        let filter = filter.unwrap_or_default();
        let images = self.supervisor.images();
        let pods = self.supervisor.registry().pods();
        pods.iter()
            .flat_map(|pod| &pod.containers)
            .filter(|view| convert::container_matches(&filter, view))
            .map(|view| convert::container(view, convert::image_of(view, images).as_deref()))
            .collect()
    }

    pub(super) fn status_of(
        &self,
        request: &cri::ContainerStatusRequest,
    ) -> Result<cri::ContainerStatusResponse, Status> {
        let (_, view) = self
            .supervisor
            .registry()
            .container(&request.container_id)
            .map_err(status)?;
        let mut info = BTreeMap::new();
        if request.verbose {
            info.insert("info".to_owned(), self.container_info(&view).to_string());
        }
        let image = convert::image_of(&view, self.supervisor.images());
        Ok(cri::ContainerStatusResponse {
            status: Some(convert::container_status(&view, image.as_deref())),
            info,
        })
    }

    /// What crictl and node agents read beside the status. The spec holds the environment: it is
    /// given to whoever asks for it, and never logged.
    fn container_info(&self, view: &ContainerView) -> serde_json::Value {
        let pid = match &view.state {
            ContainerState::Running { process, .. } => process.pid,
            ContainerState::Creating
            | ContainerState::Created
            | ContainerState::Exited { .. }
            | ContainerState::Unknown { .. } => 0,
        };
        let spec = self.supervisor.runtime_spec(view);
        json!({
            "sandboxID": view.facts.pod.as_str(),
            "pid": pid,
            "snapshotter": view.facts.record.snapshotter,
            "outlivesShim": view.in_custody,
            "config": crate::json::of("ContainerConfig", &view.facts.config),
            "runtimeSpec": spec.unwrap_or_default(),
        })
    }
}

/// CRI counts in seconds; a negative number is a mistake.
pub(super) fn seconds(field: &str, value: i64) -> Result<Duration, Status> {
    u64::try_from(value)
        .map(|value| Duration::from_secs(value.min(LONGEST)))
        .map_err(|_| invalid(field, format!("{value} is negative")))
}

/// A century: what is asked beyond it must not overflow an instant.
const LONGEST: u64 = 100 * 365 * 24 * 3600;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_bounded() {
        assert_eq!(seconds("timeout", 0).unwrap(), Duration::ZERO);
        assert_eq!(
            seconds("timeout", i64::MAX).unwrap(),
            Duration::from_secs(LONGEST)
        );
        assert_eq!(
            seconds("timeout", -1).unwrap_err().code(),
            tonic::Code::InvalidArgument
        );
    }
}
