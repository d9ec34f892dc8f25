//! The calls on pod sandboxes.

use std::collections::BTreeMap;

use gantry_cri_api::v1 as cri;
use gantry_supervisor::registry::PodView;
use gantry_types::PodState;
use serde_json::json;
use tonic::Status;

use super::Runtime;
use crate::convert;
use crate::inflight::about;
use crate::status::{invalid, status};

impl Runtime {
    pub(super) async fn run_pod(
        &self,
        request: cri::RunPodSandboxRequest,
    ) -> Result<cri::RunPodSandboxResponse, Status> {
        let config = request
            .config
            .ok_or_else(|| invalid("config", "is missing"))?;
        if let Some(metadata) = &config.metadata {
            about(&format!("{}/{}", metadata.namespace, metadata.name));
        }
        let id = self
            .supervisor
            .run_pod(config, request.runtime_handler)
            .await
            .map_err(status)?;
        Ok(cri::RunPodSandboxResponse {
            pod_sandbox_id: id.to_string(),
        })
    }

    pub(super) async fn stop_pod(&self, id: &str) -> Result<cri::StopPodSandboxResponse, Status> {
        about(id);
        self.supervisor.stop_pod(id).await.map_err(status)?;
        Ok(cri::StopPodSandboxResponse {})
    }

    pub(super) async fn remove_pod(
        &self,
        id: &str,
    ) -> Result<cri::RemovePodSandboxResponse, Status> {
        about(id);
        self.supervisor.remove_pod(id).await.map_err(status)?;
        Ok(cri::RemovePodSandboxResponse {})
    }

    pub(super) fn pod_status(
        &self,
        request: &cri::PodSandboxStatusRequest,
    ) -> Result<cri::PodSandboxStatusResponse, Status> {
        // Before the look: a kubelet that relies on events takes what is newer by these times, and an
        // event of a change that this look did not see must not seem older than it.
        let timestamp = gantry_supervisor::now_ns();
        let view = self
            .supervisor
            .registry()
            .pod(&request.pod_sandbox_id)
            .map_err(status)?;
        let mut info = BTreeMap::new();
        if request.verbose {
            info.insert("info".to_owned(), self.pod_info(&view).to_string());
        }
        Ok(cri::PodSandboxStatusResponse {
            status: Some(convert::pod_status(&view)),
            info,
            containers_statuses: convert::container_statuses(&view, self.supervisor.images()),
            timestamp,
        })
    }

    pub(super) async fn update_pod(
        &self,
        request: cri::UpdatePodSandboxResourcesRequest,
    ) -> Result<cri::UpdatePodSandboxResourcesResponse, Status> {
        about(&request.pod_sandbox_id);
        let overhead = request.overhead.unwrap_or_default();
        let resources = request.resources.unwrap_or_default();
        self.supervisor
            .update_pod(&request.pod_sandbox_id, &overhead, &resources)
            .await
            .map_err(status)?;
        Ok(cri::UpdatePodSandboxResourcesResponse {})
    }

    /// What crictl and node agents read beside the status: `pid` above all.
    fn pod_info(&self, view: &PodView) -> serde_json::Value {
        let (pid, shim_pid, reason) = match &view.state {
            PodState::Ready { shim, holder } => (holder.pid, shim.pid, ""),
            PodState::NotReady { reason } => (0, 0, reason.as_str()),
            PodState::Creating => (0, 0, ""),
        };
        let network: serde_json::Value =
            serde_json::from_slice(&view.network_result).unwrap_or_default();
        let of = |resources| crate::json::of("LinuxContainerResources", resources);
        json!({
            "pid": pid,
            "shimPid": shim_pid,
            "notReadyReason": reason,
            "netns": view.facts.record.netns_path,
            "netNamespaceClosed": pid == 0,
            "runtimeHandler": view.facts.record.runtime_handler,
            "config": crate::json::of("PodSandboxConfig", &view.facts.config),
            "cniResult": network,
            "overhead": view.overhead.as_ref().map(of),
            "resources": view.resources.as_ref().map(of),
            "shimAdoptions": view.shim_adoptions,
            "outlivesShim": view.holder_kept,
        })
    }

    pub(super) fn list_pods(&self, filter: Option<cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
        let filter = filter.unwrap_or_default();
        let pods = self.supervisor.registry().pods();
        pods.iter()
            .filter(|view| convert::pod_matches(&filter, view))
            .map(|view| convert::pod(view))
            .collect()
    }
}
