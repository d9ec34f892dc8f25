//! Exec, Attach and PortForward: check what is asked for and hand out a URL.

use gantry_cri_api::v1 as cri;
use gantry_streaming::{AttachRequest, ExecRequest, PortForwardRequest, Stdio};
use tonic::Status;

use super::Runtime;
use crate::inflight::about;
use crate::status::{invalid, status};

/// The streams that a request of CRI names: those of Exec and Attach have the same fields.
macro_rules! stdio {
    ($request:expr) => {
        Stdio {
            stdin: $request.stdin,
            stdout: $request.stdout,
            stderr: $request.stderr,
            tty: $request.tty,
        }
    };
}

impl Runtime {
    pub(super) async fn exec_url(
        &self,
        request: cri::ExecRequest,
    ) -> Result<cri::ExecResponse, Status> {
        let id = &request.container_id;
        about(id);
        let view = self
            .supervisor
            .running_container(id)
            .await
            .map_err(status)?;
        let request = ExecRequest {
            container: view.facts.id.clone(),
            command: request.cmd,
            stdio: stdio!(request),
        };
        let url = self.streaming.exec(request).map_err(status)?;
        Ok(cri::ExecResponse { url })
    }

    /// A `tty` that is not the container's own is the client's affair: it opens the streams for it,
    /// and gets what the container has. The kubelet always sends the container's own, and containerd
    /// does not look at it.
    pub(super) async fn attach_url(
        &self,
        request: cri::AttachRequest,
    ) -> Result<cri::AttachResponse, Status> {
        let id = &request.container_id;
        about(id);
        let view = self
            .supervisor
            .running_container(id)
            .await
            .map_err(status)?;
        let request = AttachRequest {
            container: view.facts.id.clone(),
            stdio: stdio!(request),
        };
        let url = self.streaming.attach(request).map_err(status)?;
        Ok(cri::AttachResponse { url })
    }

    pub(super) fn port_forward_url(
        &self,
        request: &cri::PortForwardRequest,
    ) -> Result<cri::PortForwardResponse, Status> {
        let id = &request.pod_sandbox_id;
        let pod = self.supervisor.ready_pod(id).map_err(status)?;
        let ports = request.port.iter().map(|port| {
            u16::try_from(*port).map_err(|_| invalid("port", format!("{port} is not a port")))
        });
        let request = PortForwardRequest {
            pod: pod.facts.id.clone(),
            ports: ports.collect::<Result<_, _>>()?,
        };
        let url = self.streaming.port_forward(request).map_err(status)?;
        Ok(cri::PortForwardResponse { url })
    }
}
