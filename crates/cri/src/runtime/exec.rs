//! ExecSync.

use gantry_cri_api::v1 as cri;
use tonic::Status;

use super::Runtime;
use super::container::seconds;
use crate::inflight::about;
use crate::status::status;

impl Runtime {
    pub(super) async fn run_command(
        &self,
        request: cri::ExecSyncRequest,
    ) -> Result<cri::ExecSyncResponse, Status> {
        about(&request.container_id);
        let limit = seconds("timeout", request.timeout)?;
        let output = self
            .supervisor
            .exec_sync(&request.container_id, request.cmd, limit)
            .await
            .map_err(status)?;
        Ok(cri::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: output.code,
        })
    }
}
