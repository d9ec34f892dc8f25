//! A CRI client whose encoding is not ours: k8s-cri, which stands at CRI 1.33.

use std::io;
use std::path::Path;
use std::time::Duration;

use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

pub use k8s_cri::v1;

/// The kubelet takes and gives messages of this size.
const MESSAGE_LIMIT: usize = 16 << 20;

pub type Result<T> = std::result::Result<T, Status>;

/// A connection that is made when it is first used, and again after the daemon was restarted.
pub fn channel(socket: &Path) -> io::Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()))
        .map_err(io::Error::other)?
        // Nothing that a test asks for may take longer.
        .timeout(Duration::from_secs(120));
    Ok(endpoint.connect_lazy())
}

/// Both services over one connection.
#[derive(Clone, Debug)]
pub struct Client {
    pub runtime: RuntimeServiceClient<Channel>,
    pub images: ImageServiceClient<Channel>,
}

impl Client {
    /// Must be called inside a tokio runtime.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let channel = channel(socket)?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                // Two streams of 16 MiB, and what is around them.
                .max_decoding_message_size(3 * MESSAGE_LIMIT),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT),
        })
    }

    pub async fn version(&self) -> Result<v1::VersionResponse> {
        let request = v1::VersionRequest::default();
        Ok(self.runtime.clone().version(request).await?.into_inner())
    }

    pub async fn node_status(&self, verbose: bool) -> Result<v1::StatusResponse> {
        Ok(self
            .runtime
            .clone()
            .status(v1::StatusRequest { verbose })
            .await?
            .into_inner())
    }

    pub async fn pull(&self, image: &str) -> Result<String> {
        let request = v1::PullImageRequest {
            image: Some(image_spec(image)),
            ..Default::default()
        };
        Ok(self
            .images
            .clone()
            .pull_image(request)
            .await?
            .into_inner()
            .image_ref)
    }

    pub async fn image(&self, image: &str) -> Result<Option<v1::Image>> {
        let request = v1::ImageStatusRequest {
            image: Some(image_spec(image)),
            verbose: false,
        };
        Ok(self
            .images
            .clone()
            .image_status(request)
            .await?
            .into_inner()
            .image)
    }

    pub async fn list_images(&self) -> Result<Vec<v1::Image>> {
        let request = v1::ListImagesRequest::default();
        Ok(self
            .images
            .clone()
            .list_images(request)
            .await?
            .into_inner()
            .images)
    }

    pub async fn remove_image(&self, image: &str) -> Result<()> {
        let request = v1::RemoveImageRequest {
            image: Some(image_spec(image)),
        };
        self.images.clone().remove_image(request).await.map(drop)
    }

    pub async fn run_pod(&self, config: &v1::PodSandboxConfig) -> Result<String> {
        self.run_pod_by(config, "").await
    }

    pub async fn run_pod_by(&self, config: &v1::PodSandboxConfig, handler: &str) -> Result<String> {
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        Ok(self
            .runtime
            .clone()
            .run_pod_sandbox(request)
            .await?
            .into_inner()
            .pod_sandbox_id)
    }

    pub async fn stop_pod(&self, id: &str) -> Result<()> {
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.runtime
            .clone()
            .stop_pod_sandbox(request)
            .await
            .map(drop)
    }

    pub async fn remove_pod(&self, id: &str) -> Result<()> {
        let request = v1::RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.runtime
            .clone()
            .remove_pod_sandbox(request)
            .await
            .map(drop)
    }

    pub async fn pod_status_of(
        &self,
        id: &str,
        verbose: bool,
    ) -> Result<v1::PodSandboxStatusResponse> {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose,
        };
        Ok(self
            .runtime
            .clone()
            .pod_sandbox_status(request)
            .await?
            .into_inner())
    }

    pub async fn pod_status(&self, id: &str) -> Result<v1::PodSandboxStatus> {
        let status = self.pod_status_of(id, false).await?.status;
        status.ok_or_else(|| Status::internal("PodSandboxStatus without a status"))
    }

    pub async fn list_pods(
        &self,
        filter: Option<v1::PodSandboxFilter>,
    ) -> Result<Vec<v1::PodSandbox>> {
        let request = v1::ListPodSandboxRequest { filter };
        Ok(self
            .runtime
            .clone()
            .list_pod_sandbox(request)
            .await?
            .into_inner()
            .items)
    }

    pub async fn create(
        &self,
        pod: &str,
        config: &v1::ContainerConfig,
        pod_config: &v1::PodSandboxConfig,
    ) -> Result<String> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(pod_config.clone()),
        };
        Ok(self
            .runtime
            .clone()
            .create_container(request)
            .await?
            .into_inner()
            .container_id)
    }

    pub async fn start(&self, id: &str) -> Result<()> {
        let request = v1::StartContainerRequest {
            container_id: id.to_owned(),
        };
        self.runtime
            .clone()
            .start_container(request)
            .await
            .map(drop)
    }

    /// `grace` in seconds.
    pub async fn stop(&self, id: &str, grace: i64) -> Result<()> {
        let request = v1::StopContainerRequest {
            container_id: id.to_owned(),
            timeout: grace,
        };
        self.runtime.clone().stop_container(request).await.map(drop)
    }

    pub async fn remove(&self, id: &str) -> Result<()> {
        let request = v1::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.runtime
            .clone()
            .remove_container(request)
            .await
            .map(drop)
    }

    pub async fn status_of(&self, id: &str, verbose: bool) -> Result<v1::ContainerStatusResponse> {
        let request = v1::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose,
        };
        Ok(self
            .runtime
            .clone()
            .container_status(request)
            .await?
            .into_inner())
    }

    pub async fn status(&self, id: &str) -> Result<v1::ContainerStatus> {
        let status = self.status_of(id, false).await?.status;
        status.ok_or_else(|| Status::internal("ContainerStatus without a status"))
    }

    pub async fn list(&self, filter: Option<v1::ContainerFilter>) -> Result<Vec<v1::Container>> {
        let request = v1::ListContainersRequest { filter };
        Ok(self
            .runtime
            .clone()
            .list_containers(request)
            .await?
            .into_inner()
            .containers)
    }

    pub async fn update(&self, id: &str, resources: v1::LinuxContainerResources) -> Result<()> {
        let request = v1::UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
            ..Default::default()
        };
        self.runtime
            .clone()
            .update_container_resources(request)
            .await
            .map(drop)
    }

    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let request = v1::ReopenContainerLogRequest {
            container_id: id.to_owned(),
        };
        self.runtime
            .clone()
            .reopen_container_log(request)
            .await
            .map(drop)
    }

    /// `timeout` in seconds; 0 is none.
    pub async fn exec(
        &self,
        id: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<v1::ExecSyncResponse> {
        let request = v1::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout,
        };
        Ok(self.runtime.clone().exec_sync(request).await?.into_inner())
    }
}

fn image_spec(image: &str) -> v1::ImageSpec {
    v1::ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    }
}

/// A pod as a kubelet asks for it: its own network and IPC, a PID namespace per container.
pub fn pod_config(name: &str, log_directory: &Path) -> v1::PodSandboxConfig {
    let namespaces = v1::NamespaceOption {
        pid: v1::NamespaceMode::Container.into(),
        ..Default::default()
    };
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "test".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: log_directory.display().to_string(),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container that logs to `NAME.log` in its pod's log directory.
pub fn container_config(name: &str, image: &str, command: &[&str]) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(image_spec(image)),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The namespaces that a pod asks for, to be changed.
pub fn pod_namespaces(config: &mut v1::PodSandboxConfig) -> &mut v1::NamespaceOption {
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    security.namespace_options.get_or_insert_default()
}

/// The security context that a container asks for, to be changed.
pub fn security(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

/// The resources that a container asks for, to be changed.
pub fn resources(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerResources {
    config
        .linux
        .get_or_insert_default()
        .resources
        .get_or_insert_default()
}
