//! The part of containerd's API that cAdvisor, and with it every kubelet, needs to tell whose a
//! cgroup is: without it pods are counted and have no names (kubernetes#122182).
//!
//! cAdvisor sees a cgroup whose name has 64 hexadecimal digits, asks for the container of that id,
//! and takes labels, image, OCI spec and time of creation from the answer; then it asks for the task
//! of that id, whose pid leads it to the network namespace. It counts the network of what has the
//! label `io.cri-containerd.kind=sandbox` alone. A pod's cgroup is its holder's, which is there while
//! the pod is still being made: it is answered for from then on, because who is not known at the
//! first look is taken for no container.
//!
//! Everything else of containerd's API is UNIMPLEMENTED.

use std::collections::HashMap;

use gantry_containerd_api::services::containers::v1 as containers;
use gantry_containerd_api::services::containers::v1::containers_server::Containers;
use gantry_containerd_api::services::tasks::v1 as tasks;
use gantry_containerd_api::services::tasks::v1::tasks_server::Tasks;
use gantry_containerd_api::services::version::v1::VersionResponse;
use gantry_containerd_api::services::version::v1::version_server::Version;
use gantry_containerd_api::v1::types;
use gantry_supervisor::Supervisor;
use gantry_supervisor::registry::{ContainerView, PodFacts};
use gantry_types::{ContainerState, PodId, PodState};
use prost_types::{Any, Timestamp};
use serde_json::json;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::convert;
use crate::layer::{Gate, recovering};
use crate::status::status;

/// The namespace of what kubelets make.
const NAMESPACE: &str = "k8s.io";

/// The type of a spec in an `Any`.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// The label by which cAdvisor tells pods from containers.
const KIND: &str = "io.cri-containerd.kind";

/// The three services, over what the supervisor has published.
#[derive(Clone)]
pub struct ContainerdFace {
    supervisor: Supervisor,
    gate: Gate,
}

impl ContainerdFace {
    /// `gate` opens when everything has been found again. Version answers before: cAdvisor asks for it
    /// once, at the kubelet's start, and never comes again after an error.
    pub fn new(supervisor: Supervisor, gate: Gate) -> Self {
        Self { supervisor, gate }
    }

    fn container(&self, view: &ContainerView) -> Result<containers::Container, Status> {
        let facts = &view.facts;
        let handler = self.supervisor.registry().pod_facts(&facts.pod);
        let handler = handler.map(|pod| pod.record.runtime_handler.clone());
        let spec = self.supervisor.runtime_spec(view).map_err(status)?;
        let image = convert::image_of(view, self.supervisor.images());
        Ok(containers::Container {
            id: facts.id.to_string(),
            labels: labels(&facts.config.labels, "container"),
            image: convert::image_spec(view, image.as_deref()).image,
            runtime: handler.map(runtime),
            spec: Some(any(&spec)),
            snapshotter: facts.record.snapshotter.clone(),
            snapshot_key: facts.id.to_string(),
            created_at: Some(timestamp(facts.record.created_at)),
            updated_at: None,
            extensions: HashMap::new(),
            sandbox: facts.pod.to_string(),
        })
    }

    fn process(&self, id: &str) -> Result<types::Process, Status> {
        let registry = self.supervisor.registry();
        let mut process = types::Process {
            container_id: id.to_owned(),
            id: id.to_owned(),
            ..Default::default()
        };
        if let Ok((_, view)) = registry.container(id) {
            match &view.state {
                // containerd has a task from the start on, and cAdvisor asks again until then.
                ContainerState::Creating | ContainerState::Created => return Err(no_task(id)),
                ContainerState::Running {
                    process: running, ..
                } => {
                    process.pid = running.pid.unsigned_abs();
                    process.set_status(types::Status::Running);
                }
                ContainerState::Exited { exit, .. } => {
                    process.set_status(types::Status::Stopped);
                    process.exit_status = u32::try_from(exit.code).unwrap_or(255);
                    process.exited_at = Some(timestamp(exit.finished_at));
                }
                ContainerState::Unknown { .. } => process.set_status(types::Status::Unknown),
            }
            process.terminal = view.facts.config.tty;
            return Ok(process);
        }
        match registry.pod(id).map_err(status)?.state {
            PodState::Ready { holder, .. } => {
                process.pid = holder.pid.unsigned_abs();
                process.set_status(types::Status::Running);
                Ok(process)
            }
            PodState::Creating | PodState::NotReady { .. } => Err(no_task(id)),
        }
    }
}

/// A pod as a container: it has no OCI spec, but what reads one finds its parts.
fn pod(facts: &PodFacts) -> containers::Container {
    let spec = json!({
        "ociVersion": "1.2.0",
        "process": { "user": { "uid": 0, "gid": 0 }, "args": [], "env": [], "cwd": "/" },
        "hostname": facts.config.hostname,
        "annotations": facts.config.annotations,
    });
    containers::Container {
        id: facts.id.to_string(),
        labels: labels(&facts.config.labels, "sandbox"),
        image: String::new(),
        runtime: Some(runtime(facts.record.runtime_handler.clone())),
        spec: Some(any(&spec)),
        created_at: Some(timestamp(facts.record.created_at)),
        sandbox: facts.id.to_string(),
        ..Default::default()
    }
}

fn labels<'a>(
    given: impl IntoIterator<Item = (&'a String, &'a String)>,
    kind: &str,
) -> HashMap<String, String> {
    let given = given.into_iter();
    let mut labels: HashMap<_, _> = given.map(|(k, v)| (k.clone(), v.clone())).collect();
    labels.insert(KIND.to_owned(), kind.to_owned());
    labels
}

fn runtime(handler: String) -> containers::container::Runtime {
    containers::container::Runtime {
        name: handler,
        options: None,
    }
}

fn any(spec: &serde_json::Value) -> Any {
    Any {
        type_url: SPEC.to_owned(),
        value: spec.to_string().into_bytes(),
    }
}

/// From nanoseconds since the epoch.
fn timestamp(at: i64) -> Timestamp {
    Timestamp {
        seconds: at.div_euclid(1_000_000_000),
        nanos: i32::try_from(at.rem_euclid(1_000_000_000)).unwrap_or_default(),
    }
}

fn no_task(id: &str) -> Status {
    Status::not_found(format!("no running task found: task {id}: not found"))
}

/// Everything that we have is in one namespace. Ids count whole here.
fn checked<'a>(gate: &Gate, metadata: &MetadataMap, id: &'a str) -> Result<&'a str, Status> {
    if !gate.is_open() {
        return Err(recovering());
    }
    match metadata
        .get("containerd-namespace")
        .map(|name| name.to_str())
    {
        None => Err(Status::failed_precondition(
            "containerd-namespace: is missing",
        )),
        Some(Ok(NAMESPACE)) if id.parse::<PodId>().is_ok() => Ok(id),
        Some(_) => Err(Status::not_found(format!("container {id:.80}: not found"))),
    }
}

#[tonic::async_trait]
impl Containers for ContainerdFace {
    async fn get(
        &self,
        request: Request<containers::GetContainerRequest>,
    ) -> Result<Response<containers::GetContainerResponse>, Status> {
        let id = checked(&self.gate, request.metadata(), &request.get_ref().id)?;
        let container = match self.supervisor.registry().container(id) {
            Ok((_, view)) => {
                let face = self.clone();
                // A spec is a file.
                let container = tokio::task::spawn_blocking(move || face.container(&view));
                let ended = |error| status(gantry_supervisor::Error::internal("read spec", error));
                container.await.map_err(ended)??
            }
            Err(error) => {
                let making = id.parse().ok();
                let making = making.and_then(|id| self.supervisor.registry().pod_facts(&id));
                pod(&*making.ok_or_else(|| status(error))?)
            }
        };
        let container = Some(container);
        Ok(Response::new(containers::GetContainerResponse {
            container,
        }))
    }
}

#[tonic::async_trait]
impl Tasks for ContainerdFace {
    async fn get(
        &self,
        request: Request<tasks::GetRequest>,
    ) -> Result<Response<tasks::GetResponse>, Status> {
        let asked = request.get_ref();
        let id = checked(&self.gate, request.metadata(), &asked.container_id)?;
        if !asked.exec_id.is_empty() {
            return Err(Status::not_found(format!(
                "process {:.80} of task {id}: not found",
                asked.exec_id
            )));
        }
        let process = Some(self.process(id)?);
        Ok(Response::new(tasks::GetResponse { process }))
    }
}

#[tonic::async_trait]
impl Version for ContainerdFace {
    async fn version(&self, _: Request<()>) -> Result<Response<VersionResponse>, Status> {
        Ok(Response::new(VersionResponse {
            version: format!("gantry-{}", env!("CARGO_PKG_VERSION")),
            revision: String::new(),
        }))
    }
}
