//! One runtime under measurement: its socket and the calls that the modes need.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ImageSpec, ImageStatusRequest,
    LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, ListPodSandboxRequest, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest, VersionRequest,
};
use tonic::transport::{Channel, Endpoint};

use crate::Common;

/// Longest time that any one call may take before the measurement is given up.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    Cni,
    Host,
}

impl Network {
    pub fn name(self) -> &'static str {
        match self {
            Network::Cni => "cni",
            Network::Host => "host",
        }
    }

    /// The namespace modes that a kubelet asks for by default.
    fn namespaces(self) -> NamespaceOption {
        let network = match self {
            Network::Cni => NamespaceMode::Pod,
            Network::Host => NamespaceMode::Node,
        };
        NamespaceOption {
            network: network.into(),
            pid: NamespaceMode::Container.into(),
            ..Default::default()
        }
    }
}

pub struct Node {
    pub name: String,
    /// Runtime name and version as the runtime gives them.
    pub version: String,
    pub socket: String,
    pub runtime: RuntimeServiceClient<Channel>,
    pub images: ImageServiceClient<Channel>,
    image: String,
    handler: String,
    log_dir: PathBuf,
    made: u32,
}

pub struct Pod {
    pub id: String,
    pub log_dir: PathBuf,
    config: PodSandboxConfig,
    network: Network,
}

impl Node {
    pub async fn connect(name: &str, socket: &str, common: &Common) -> Result<Self> {
        let channel = Endpoint::from_shared(format!("unix:{socket}"))
            .with_context(|| format!("socket {socket:?}"))?
            .timeout(CALL_TIMEOUT)
            .connect()
            .await
            .with_context(|| format!("connect to {socket}"))?;
        // The kubelet takes messages of 16 MiB.
        let mut runtime =
            RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(16 << 20);
        let mut images = ImageServiceClient::new(channel);
        let version = runtime
            .version(VersionRequest::default())
            .await?
            .into_inner();
        let image = ImageSpec {
            image: common.image.clone(),
            ..Default::default()
        };
        images
            .image_status(ImageStatusRequest {
                image: Some(image),
                verbose: false,
            })
            .await?
            .into_inner()
            .image
            .with_context(|| format!("{name} has no image {}", common.image))?;
        Ok(Self {
            name: name.to_owned(),
            socket: socket.to_owned(),
            version: format!("{} {}", version.runtime_name, version.runtime_version),
            runtime,
            images,
            image: common.image.clone(),
            handler: common.handler.clone(),
            log_dir: common.log_dir.join(name),
            made: 0,
        })
    }

    /// A new pod's configuration, so that only the call itself is timed.
    pub fn pod_config(&mut self, network: Network) -> Result<Pod> {
        self.made += 1;
        let name = format!("bench-{}", self.made);
        let log_dir = self.log_dir.join(&name);
        std::fs::create_dir_all(&log_dir)
            .with_context(|| format!("create {}", log_dir.display()))?;
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                uid: format!("{}-{}-{name}", self.name, std::process::id()),
                name,
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            log_directory: log_dir.display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(network.namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        Ok(Pod {
            id: String::new(),
            log_dir,
            config,
            network,
        })
    }

    pub async fn run_pod(&mut self, pod: &mut Pod) -> Result<()> {
        let request = RunPodSandboxRequest {
            config: Some(pod.config.clone()),
            runtime_handler: self.handler.clone(),
        };
        pod.id = self
            .runtime
            .run_pod_sandbox(request)
            .await?
            .into_inner()
            .pod_sandbox_id;
        Ok(())
    }

    /// Creates a container that logs to `c.log` in the pod's log directory; returns its id.
    pub async fn create(&mut self, pod: &Pod, command: &[&str]) -> Result<String> {
        self.create_named(pod, "c", command).await
    }

    /// As `create`, with another name for the container and its log.
    pub async fn create_named(
        &mut self,
        pod: &Pod,
        name: &str,
        command: &[&str],
    ) -> Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: self.image.clone(),
                user_specified_image: self.image.clone(),
                ..Default::default()
            }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(pod.network.namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        Ok(self
            .runtime
            .create_container(request)
            .await?
            .into_inner()
            .container_id)
    }

    pub async fn start(&mut self, container: &str) -> Result<()> {
        let request = StartContainerRequest {
            container_id: container.to_owned(),
        };
        self.runtime.start_container(request).await?;
        Ok(())
    }

    pub async fn stop(&mut self, container: &str) -> Result<()> {
        let request = StopContainerRequest {
            container_id: container.to_owned(),
            timeout: 0,
        };
        self.runtime.stop_container(request).await?;
        Ok(())
    }

    pub async fn stop_pod(&mut self, pod: &Pod) -> Result<()> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        self.runtime.stop_pod_sandbox(request).await?;
        Ok(())
    }

    pub async fn remove_pod(&mut self, pod: &Pod) -> Result<()> {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        self.runtime.remove_pod_sandbox(request).await?;
        Ok(())
    }

    /// Stops and removes a pod with whatever is in it.
    pub async fn end_pod(&mut self, id: &str) -> Result<()> {
        let pod_sandbox_id = id.to_owned();
        self.runtime
            .stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id })
            .await?;
        let pod_sandbox_id = id.to_owned();
        self.runtime
            .remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id })
            .await?;
        Ok(())
    }

    /// As `end_pod`, for all that are listed.
    pub async fn end_all(&mut self) -> Result<()> {
        let pods = self
            .runtime
            .list_pod_sandbox(ListPodSandboxRequest::default());
        for pod in pods.await?.into_inner().items {
            self.end_pod(&pod.id).await?;
        }
        Ok(())
    }

    /// A pod with one running container.
    pub async fn up(&mut self, network: Network, command: &[&str]) -> Result<(Pod, String)> {
        let mut pod = self.pod_config(network)?;
        self.run_pod(&mut pod).await?;
        let container = self.create(&pod, command).await?;
        self.start(&container).await?;
        Ok((pod, container))
    }

    /// Stops and removes everything that `up` made.
    pub async fn down(&mut self, pod: &Pod, container: &str) -> Result<()> {
        self.stop(container).await?;
        self.stop_pod(pod).await?;
        self.remove_pod(pod).await
    }
}

/// Stops a container without grace, and then its pod.
pub async fn stop_both(
    runtime: &mut RuntimeServiceClient<Channel>,
    pod_sandbox_id: String,
    container_id: String,
) -> Result<()> {
    let timeout = 0;
    runtime
        .stop_container(StopContainerRequest {
            container_id,
            timeout,
        })
        .await?;
    runtime
        .stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id })
        .await?;
    Ok(())
}
