//! Lists with their filters, their Stream twins, and what the verbose answers tell.

use gantry_cri_api::v1 as cri;
use gantry_cri_api::v1::image_service_client::ImageServiceClient;
use gantry_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use gantry_integration::{on_node, on_plain_node, sleeper};
use gantry_testkit::cri::v1::{
    self, ContainerFilter, ContainerState, ContainerStateValue, PodSandboxFilter, PodSandboxState,
    PodSandboxStateValue,
};
use gantry_testkit::daemon::Options;
use tonic::Code;

#[test]
fn filters_by_prefix_state_and_labels() {
    on_plain_node("filters_by_prefix_state_and_labels", async |node| {
        let image = node.busybox().await;
        let mut pods = Vec::new();
        for (name, tier) in [("a", "front"), ("b", "back"), ("c", "back")] {
            let mut config = node.pod_config(name);
            config.labels.insert("tier".to_owned(), tier.to_owned());
            config.labels.insert("name".to_owned(), name.to_owned());
            gantry_testkit::cri::pod_namespaces(&mut config).network =
                v1::NamespaceMode::Node.into();
            pods.push(node.run_pod(&config).await);
        }
        let mut containers = Vec::new();
        for (pod, name, tier) in [(0, "x", "front"), (1, "y", "back"), (1, "z", "back")] {
            let mut config = sleeper(name, &image);
            config.labels.insert("tier".to_owned(), tier.to_owned());
            containers.push(node.create(&pods[pod], &config).await);
        }
        node.client.start(&containers[0]).await.unwrap();
        node.client.start(&containers[1]).await.unwrap();
        node.client.stop(&containers[1], 0).await.unwrap();
        node.client.stop_pod(&pods[2].id).await.unwrap();

        let labels = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        let pod_names = async |filter: PodSandboxFilter| {
            let pods = node.client.list_pods(Some(filter)).await.unwrap();
            let mut names: Vec<_> = pods
                .into_iter()
                .map(|pod| pod.metadata.unwrap().name)
                .collect();
            names.sort();
            names.concat()
        };
        let by_state = |state: PodSandboxState| {
            Some(PodSandboxStateValue {
                state: state.into(),
            })
        };
        assert_eq!(pod_names(PodSandboxFilter::default()).await, "abc");
        let prefix = pods[0].id[..12].to_owned();
        assert_eq!(
            pod_names(PodSandboxFilter {
                id: prefix,
                ..Default::default()
            })
            .await,
            "a"
        );
        let state = by_state(PodSandboxState::SandboxNotready);
        assert_eq!(
            pod_names(PodSandboxFilter {
                state,
                ..Default::default()
            })
            .await,
            "c"
        );
        let state = by_state(PodSandboxState::SandboxReady);
        let label_selector = labels(&[("tier", "back")]);
        let both = PodSandboxFilter {
            state,
            label_selector,
            ..Default::default()
        };
        assert_eq!(pod_names(both).await, "b");
        let label_selector = labels(&[("tier", "back"), ("name", "a")]);
        let none = PodSandboxFilter {
            label_selector,
            ..Default::default()
        };
        assert_eq!(pod_names(none).await, "");
        let unknown = PodSandboxFilter {
            id: "0".repeat(64),
            ..Default::default()
        };
        assert_eq!(pod_names(unknown).await, "");

        let names = async |filter: ContainerFilter| {
            let containers = node.client.list(Some(filter)).await.unwrap();
            let mut names: Vec<_> = containers
                .into_iter()
                .map(|c| c.metadata.unwrap().name)
                .collect();
            names.sort();
            names.concat()
        };
        let by_state = |state: ContainerState| {
            Some(ContainerStateValue {
                state: state.into(),
            })
        };
        assert_eq!(names(ContainerFilter::default()).await, "xyz");
        let id = containers[2][..10].to_owned();
        assert_eq!(
            names(ContainerFilter {
                id,
                ..Default::default()
            })
            .await,
            "z"
        );
        let pod_sandbox_id = pods[1].id.clone();
        assert_eq!(
            names(ContainerFilter {
                pod_sandbox_id,
                ..Default::default()
            })
            .await,
            "yz"
        );
        for (state, expected) in [
            (ContainerState::ContainerRunning, "x"),
            (ContainerState::ContainerExited, "y"),
            (ContainerState::ContainerCreated, "z"),
            (ContainerState::ContainerUnknown, ""),
        ] {
            let filter = ContainerFilter {
                state: by_state(state),
                ..Default::default()
            };
            assert_eq!(names(filter).await, expected, "{state:?}");
        }
        let label_selector = labels(&[("tier", "back")]);
        assert_eq!(
            names(ContainerFilter {
                label_selector,
                ..Default::default()
            })
            .await,
            "yz"
        );
        // A prefix names an object wherever an id does.
        let status = node.client.status(&containers[0][..13]).await.unwrap();
        assert_eq!(status.id, containers[0]);
        assert_eq!(
            node.client.pod_status(&pods[0].id[..13]).await.unwrap().id,
            pods[0].id
        );

        // The twins say the same.
        let channel = gantry_testkit::cri::channel(node.daemon.socket()).unwrap();
        let mut client = RuntimeServiceClient::new(channel.clone());
        let filter = cri::ContainerFilter {
            pod_sandbox_id: pods[1].id.clone(),
            ..Default::default()
        };
        let request = cri::StreamContainersRequest {
            filter: Some(filter),
        };
        let mut stream = client
            .stream_containers(request)
            .await
            .unwrap()
            .into_inner();
        let mut streamed = Vec::new();
        while let Some(message) = stream.message().await.unwrap() {
            streamed.extend(message.containers.into_iter().map(|container| container.id));
        }
        streamed.sort();
        let mut expected = vec![containers[1].clone(), containers[2].clone()];
        expected.sort();
        assert_eq!(streamed, expected);
        let request = cri::StreamPodSandboxesRequest::default();
        let mut stream = client
            .stream_pod_sandboxes(request)
            .await
            .unwrap()
            .into_inner();
        let mut count = 0;
        while let Some(message) = stream.message().await.unwrap() {
            count += message.pod_sandboxes.len();
        }
        assert_eq!(count, 3);
        let mut images = ImageServiceClient::new(channel);
        let request = cri::StreamImagesRequest::default();
        let mut stream = images.stream_images(request).await.unwrap().into_inner();
        let message = stream.message().await.unwrap().unwrap();
        assert_eq!(message.images[0].repo_tags, [image]);
    });
}

#[test]
fn status_and_version_tell_of_the_node() {
    on_plain_node("status_and_version_tell_of_the_node", async |node| {
        let version = node.client.version().await.unwrap();
        assert_eq!(
            (
                version.runtime_name.as_str(),
                version.runtime_api_version.as_str()
            ),
            ("gantry", "v1")
        );
        let status = node.client.node_status(true).await.unwrap();
        let conditions = status.status.unwrap().conditions;
        for kind in ["RuntimeReady", "NetworkReady"] {
            let condition = conditions.iter().find(|c| c.r#type == kind).unwrap();
            assert!(condition.status, "{condition:?}");
        }
        let handlers: Vec<_> = status
            .runtime_handlers
            .iter()
            .map(|h| h.name.as_str())
            .collect();
        for name in ["", "runc", gantry_integration::FAULTY] {
            assert!(handlers.contains(&name), "{handlers:?}");
        }
        for key in ["config", "cniconfig"] {
            let value: serde_json::Value = serde_json::from_str(&status.info[key]).unwrap();
            assert!(!value.is_null(), "{key}");
        }
        assert!(status.info["cniconfig"].contains("gantry-test"));
        assert!(
            node.client
                .node_status(false)
                .await
                .unwrap()
                .info
                .is_empty()
        );
        let request = v1::RuntimeConfigRequest {};
        let config = node
            .client
            .runtime
            .clone()
            .runtime_config(request)
            .await
            .unwrap()
            .into_inner();
        assert_eq!(
            config.linux.unwrap().cgroup_driver(),
            v1::CgroupDriver::Cgroupfs
        );
    });
}

#[test]
fn without_a_network_configuration_pods_of_the_hosts_network_run() {
    let options = Options {
        network: false,
        ..Options::default()
    };
    on_node(
        "without_a_network_configuration_pods_of_the_hosts_network_run",
        options,
        async |node| {
            let network = async || {
                let status = node
                    .client
                    .node_status(false)
                    .await
                    .unwrap()
                    .status
                    .unwrap();
                status
                    .conditions
                    .into_iter()
                    .find(|c| c.r#type == "NetworkReady")
                    .unwrap()
            };
            let condition = network().await;
            assert!(!condition.status);
            assert!(
                !condition.reason.is_empty() && !condition.message.is_empty(),
                "{condition:?}"
            );
            let image = node.busybox().await;
            let pod = node.host_pod("host").await;
            node.run(&pod, &sleeper("c", &image)).await;
            let error = node
                .client
                .run_pod(&node.pod_config("cni"))
                .await
                .unwrap_err();
            assert_eq!(error.code(), Code::Unavailable, "{error:?}");
            assert_eq!(node.client.list_pods(None).await.unwrap().len(), 1);
            // The directory is watched.
            node.daemon.write_network().unwrap();
            gantry_integration::eventually("the network is ready", async || {
                network().await.status.then_some(())
            })
            .await;
            let pod = node.pod("cni").await;
            assert!(!node.ip(&pod).await.is_empty());
        },
    );
}

#[test]
fn verbose_container_status_has_what_tools_read() {
    on_plain_node(
        "verbose_container_status_has_what_tools_read",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("verbose").await;
            let mut config = sleeper("c", &image);
            config
                .annotations
                .insert("note".to_owned(), "kept".to_owned());
            let id = node.create(&pod, &config).await;
            assert_eq!(node.container_info(&id).await["pid"], 0);
            node.client.start(&id).await.unwrap();
            let info = node.container_info(&id).await;
            assert_eq!(info["sandboxID"], pod.id);
            let pid = info["pid"].as_i64().unwrap();
            let root = std::fs::read_link(format!("/proc/{pid}/root")).unwrap();
            assert_eq!(root, std::path::Path::new("/"));
            assert_eq!(info["config"]["metadata"]["name"], "c");
            let arguments = &info["runtimeSpec"]["process"]["args"];
            assert_eq!(arguments[0], "sh");
            let status = node.status(&id).await;
            assert_eq!(status.annotations["note"], "kept");
            assert_eq!(status.image_id, gantry_integration::busybox_image().id());
            assert_eq!(status.image.unwrap().image, image);
        },
    );
}

/// Every call of CRI is routed; one that is refused says why, whoever asks.
#[test]
fn calls_that_are_refused_are_unimplemented() {
    on_plain_node("calls_that_are_refused_are_unimplemented", async |node| {
        let mut client = node.client.runtime.clone();
        let codes = [client
            .checkpoint_container(v1::CheckpointContainerRequest::default())
            .await
            .map(drop)];
        for answer in codes {
            let error = answer.unwrap_err();
            assert_eq!(error.code(), Code::Unimplemented, "{error:?}");
            assert!(error.message().contains("is refused: "), "{error:?}");
        }
        // And one that nobody knows.
        let channel = gantry_testkit::cri::channel(node.daemon.socket()).unwrap();
        let mut grpc = tonic::client::Grpc::new(channel);
        grpc.ready().await.unwrap();
        let path = "/runtime.v1.RuntimeService/NoSuchCall".parse().unwrap();
        let codec = tonic_prost::ProstCodec::<v1::VersionRequest, v1::VersionResponse>::default();
        let request = tonic::Request::new(v1::VersionRequest::default());
        let error = grpc.unary(request, path, codec).await.unwrap_err();
        assert_eq!(error.code(), Code::Unimplemented, "{error:?}");
    });
}
