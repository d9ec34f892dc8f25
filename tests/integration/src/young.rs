//! What CRI 1.36 has and k8s-cri, at 1.33, has not: calls with the server's own types.

use gantry_cri_api::v1 as cri;
use gantry_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use prost::Message;
use tonic::Status;
use tonic::transport::Channel;

use crate::{Node, Pod};

/// The same message in the other encoding of the same fields.
pub fn same<T: Message + Default>(message: &impl Message) -> T {
    T::decode(message.encode_to_vec().as_slice()).expect("one wire format")
}

impl Node {
    pub fn young(&self) -> RuntimeServiceClient<Channel> {
        let channel = gantry_testkit::cri::channel(self.daemon.socket()).expect("channel");
        RuntimeServiceClient::new(channel)
    }

    pub async fn create_young(
        &self,
        pod: &Pod,
        config: &cri::ContainerConfig,
    ) -> Result<String, Status> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config.clone()),
            sandbox_config: Some(same(&pod.config)),
        };
        let answer = self.young().create_container(request).await?;
        Ok(answer.into_inner().container_id)
    }

    pub async fn status_young(&self, id: &str) -> cri::ContainerStatus {
        let request = cri::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let answer = self.young().container_status(request).await;
        answer
            .expect("ContainerStatus")
            .into_inner()
            .status
            .unwrap_or_default()
    }
}
