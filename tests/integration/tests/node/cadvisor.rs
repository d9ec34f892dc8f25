//! The socket on which cAdvisor is answered as by a containerd. What is asked here is what cAdvisor
//! asks, beginning as it does with the name of a cgroup.

use std::collections::HashMap;
use std::path::Path;

use gantry_containerd_api::services::containers::v1::containers_client::ContainersClient;
use gantry_containerd_api::services::containers::v1::{Container, GetContainerRequest};
use gantry_containerd_api::services::tasks::v1::GetRequest;
use gantry_containerd_api::services::tasks::v1::tasks_client::TasksClient;
use gantry_containerd_api::services::version::v1::version_client::VersionClient;
use gantry_containerd_api::v1::types::{Process, Status as TaskStatus};
use gantry_integration::{Fault, Node, eventually, on_node, sleeper};
use gantry_testkit::cri::Client;
use gantry_testkit::daemon::Options;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::systemd::on_systemd_node;

struct Cadvisor(Channel);

fn asked<T>(message: T, namespace: Option<&str>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(namespace) = namespace {
        let value = namespace.parse().unwrap();
        request.metadata_mut().insert("containerd-namespace", value);
    }
    request
}

impl Cadvisor {
    fn new(socket: &Path) -> Self {
        Self(gantry_testkit::cri::channel(socket).unwrap())
    }

    async fn container_in(&self, namespace: Option<&str>, id: &str) -> Result<Container, Status> {
        let request = GetContainerRequest { id: id.to_owned() };
        let mut client = ContainersClient::new(self.0.clone());
        let answer = client.get(asked(request, namespace)).await?;
        Ok(answer.into_inner().container.expect("a container"))
    }

    async fn container(&self, id: &str) -> Result<Container, Status> {
        self.container_in(Some("k8s.io"), id).await
    }

    async fn task(&self, id: &str, exec_id: &str) -> Result<Process, Status> {
        let request = GetRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        let mut client = TasksClient::new(self.0.clone());
        let answer = client.get(asked(request, Some("k8s.io"))).await?;
        Ok(answer.into_inner().process.expect("a process"))
    }
}

/// The ids that cAdvisor finds in the names of the test's cgroups.
fn ids(node: &Node) -> Vec<String> {
    let cgroups = node.daemon.places().cgroups();
    let names = cgroups.iter().filter_map(|dir| dir.file_name()?.to_str());
    let runs = names.flat_map(|name| name.split(|c: char| !c.is_ascii_alphanumeric()));
    let mut ids: Vec<_> = runs
        .filter(|run| run.len() == 64)
        .map(str::to_owned)
        .collect();
    ids.sort();
    ids.dedup();
    ids
}

/// A test on a node with that socket.
fn on_cadvised_node(name: &str, systemd: bool, test: impl AsyncFnOnce(&mut Node, Cadvisor)) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("run/containerd.sock");
    let options = Options::default().config(&format!("[cadvisor]\nsocket = {socket:?}\n"));
    let run = async |node: &mut Node| {
        test(node, Cadvisor::new(&socket)).await;
        node.daemon.terminate().unwrap();
        assert!(!socket.exists(), "the socket goes with the daemon");
        node.start_again(&[]).await;
    };
    match systemd {
        true => on_systemd_node(name, options, run),
        false => on_node(name, options, run),
    }
}

async fn every_cgroup_has_a_name_and_pods_a_network(node: &mut Node, cadvisor: Cadvisor) {
    let version = VersionClient::new(cadvisor.0.clone()).version(()).await;
    assert!(!version.unwrap().into_inner().version.is_empty());
    let image = node.busybox().await;
    let mut config = node.pod_config("p");
    let label = |name: &str, value: &str| (format!("io.kubernetes.{name}"), value.to_owned());
    config.labels.extend([label("pod.name", "p")]);
    let pod = node.run_pod(&config).await;
    let mut config = sleeper("c", &image);
    config.labels.extend([label("container.name", "c")]);
    config.envs.push(gantry_testkit::cri::v1::KeyValue {
        key: "SHOWN".to_owned(),
        value: "1".to_owned(),
    });
    let id = node.create(&pod, &config).await;
    // Known before its cgroup is there; its task only after.
    assert_eq!(cadvisor.container(&id).await.unwrap().id, id);
    assert_eq!(
        cadvisor.task(&id, "").await.unwrap_err().code(),
        Code::NotFound
    );
    node.client.start(&id).await.unwrap();

    let mut expected = vec![pod.id.clone(), id.clone()];
    expected.sort();
    assert_eq!(ids(node), expected, "what cAdvisor sees");
    let (sandbox, container) = (
        cadvisor.container(&pod.id).await.unwrap(),
        cadvisor.container(&id).await.unwrap(),
    );
    let kind = |container: &Container| container.labels["io.cri-containerd.kind"].clone();
    assert_eq!(
        (kind(&sandbox).as_str(), kind(&container).as_str()),
        ("sandbox", "container")
    );
    assert_eq!(sandbox.labels["io.kubernetes.pod.name"], "p");
    assert_eq!(container.labels["io.kubernetes.container.name"], "c");
    assert_eq!(
        (container.image, container.sandbox),
        (image, pod.id.clone())
    );
    let created = node.status(&id).await.created_at;
    let told = container.created_at.unwrap();
    assert_eq!(
        told.seconds * 1_000_000_000 + i64::from(told.nanos),
        created
    );
    for spec in [sandbox.spec, container.spec.clone()] {
        let spec: serde_json::Value = serde_json::from_slice(&spec.unwrap().value).unwrap();
        assert!(spec["process"]["env"].is_array(), "{spec}");
    }
    let spec = String::from_utf8(container.spec.unwrap().value).unwrap();
    assert!(spec.contains("SHOWN=1"), "{spec}");

    let task = cadvisor.task(&id, "").await.unwrap();
    assert_eq!(task.status(), TaskStatus::Running);
    assert_eq!(
        i64::from(task.pid),
        node.container_info(&id).await["pid"].as_i64().unwrap()
    );
    let holder = cadvisor.task(&pod.id, "").await.unwrap();
    assert_eq!(holder.status(), TaskStatus::Running);
    let network = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_eq!(network(holder.pid), network(task.pid), "the pod's network");

    node.client.stop(&id, 0).await.unwrap();
    let task = cadvisor.task(&id, "").await.unwrap();
    assert_eq!(
        (task.status(), task.exit_status, task.pid),
        (TaskStatus::Stopped, 137, 0)
    );
    assert!(task.exited_at.is_some());
    node.client.stop_pod(&pod.id).await.unwrap();
    assert_eq!(
        cadvisor.task(&pod.id, "").await.unwrap_err().code(),
        Code::NotFound
    );
    node.client.remove_pod(&pod.id).await.unwrap();
    for gone in [&id, &pod.id] {
        let error = cadvisor.container(gone).await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{error}");
    }
}

#[test]
fn every_cgroup_has_a_name_for_cadvisor_and_pods_a_network() {
    let name = "every_cgroup_has_a_name_for_cadvisor_and_pods_a_network";
    on_cadvised_node(name, false, every_cgroup_has_a_name_and_pods_a_network);
}

#[test]
fn every_scope_has_a_name_for_cadvisor() {
    let name = "every_scope_has_a_name_for_cadvisor";
    on_cadvised_node(name, true, every_cgroup_has_a_name_and_pods_a_network);
}

/// cAdvisor looks once, when the cgroup appears.
#[test]
fn a_pod_that_is_being_made_has_a_name_for_cadvisor() {
    let name = "a_pod_that_is_being_made_has_a_name_for_cadvisor";
    on_cadvised_node(name, false, async |node, cadvisor| {
        node.daemon.plugin_faults().set("ADD", Fault::Hang);
        let client = Client::connect(node.daemon.socket()).unwrap();
        let mut config = node.pod_config("p");
        config
            .labels
            .extend([("tier".to_owned(), "front".to_owned())]);
        let call = tokio::spawn(async move { client.run_pod(&config).await });
        let id = eventually("the pod has a cgroup", async || ids(node).pop()).await;
        let pod = cadvisor.container(&id).await.unwrap();
        assert_eq!(pod.labels["tier"], "front");
        assert_eq!(pod.labels["io.cri-containerd.kind"], "sandbox");
        let error = cadvisor.task(&id, "").await.unwrap_err();
        assert_eq!(
            error.code(),
            Code::NotFound,
            "asked again until it is there"
        );
        assert!(node.client.list_pods(None).await.unwrap().is_empty());
        node.daemon.kill().unwrap();
        assert!(call.await.unwrap().is_err());
        node.daemon.plugin_faults().clear("ADD");
        node.start_again(&[]).await;
    });
}

#[test]
fn what_is_no_question_of_cadvisors_is_refused() {
    let name = "what_is_no_question_of_cadvisors_is_refused";
    on_cadvised_node(name, false, async |node, cadvisor| {
        let pod = node.host_pod("p").await;
        let code = async |namespace: Option<&str>, id: &str| {
            cadvisor
                .container_in(namespace, id)
                .await
                .unwrap_err()
                .code()
        };
        assert_eq!(code(None, &pod.id).await, Code::FailedPrecondition);
        assert_eq!(code(Some("moby"), &pod.id).await, Code::NotFound);
        let long = "0".repeat(100_000);
        for id in ["", &pod.id[..12], "../../etc", &"0".repeat(64), &long] {
            assert_eq!(code(Some("k8s.io"), id).await, Code::NotFound, "{id:.80}");
            let error = cadvisor.task(id, "").await.unwrap_err();
            assert_eq!(error.code(), Code::NotFound);
            assert!(error.message().len() < 300, "{error}");
        }
        let error = cadvisor.task(&pod.id, "exec").await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound);
        // The rest of containerd, and CRI, are not there.
        let mut grpc = tonic::client::Grpc::new(cadvisor.0.clone());
        for path in [
            "/containerd.services.containers.v1.Containers/List",
            "/containerd.services.tasks.v1.Tasks/Kill",
            "/runtime.v1.RuntimeService/Version",
        ] {
            grpc.ready().await.unwrap();
            let codec = tonic_prost::ProstCodec::<GetRequest, GetRequest>::default();
            let request = Request::new(GetRequest::default());
            let error = grpc
                .unary(request, path.parse().unwrap(), codec)
                .await
                .unwrap_err();
            assert_eq!(error.code(), Code::Unimplemented, "{path}: {error}");
        }
        let labels: HashMap<String, String> = cadvisor.container(&pod.id).await.unwrap().labels;
        assert_eq!(labels.len(), 1 + pod.config.labels.len());
    });
}
