//! What cannot be done: a clear error with the right code, and nothing left behind.

use gantry_integration::{
    FAULTY, Fault, Node, busybox_image, on_node, on_plain_node, refused, script_config, sleeper,
};
use gantry_testkit::cri::v1::{ContainerState, PodSandboxState, PortMapping};
use gantry_testkit::cri::{container_config, security};
use gantry_testkit::daemon::Options;
use gantry_testkit::image::{Compression, ImageBuilder, Layer, OCI_MANIFEST};
use tonic::Code;

#[test]
fn unknown_images_and_broken_ones() {
    on_plain_node("unknown_images_and_broken_ones", async |node| {
        let pod = node.host_pod("images").await;
        let unknown = format!("{}/test/none:1", node.registry.host());
        refused(
            node.client
                .create(&pod.id, &sleeper("c", &unknown), &pod.config)
                .await,
            Code::NotFound,
            &unknown,
        );
        refused(
            node.client
                .create(&pod.id, &sleeper("c", ""), &pod.config)
                .await,
            Code::InvalidArgument,
            "image",
        );
        refused(
            node.client.pull(&unknown).await,
            Code::NotFound,
            "test/none",
        );
        refused(node.client.pull("").await, Code::InvalidArgument, "image");
        refused(
            node.client.pull("UPPER/case::x").await,
            Code::InvalidArgument,
            "UPPER",
        );
        assert!(node.client.image(&unknown).await.unwrap().is_none());
        node.client.remove_image(&unknown).await.unwrap();
        // Nobody listens there.
        let error = node
            .client
            .pull("127.0.0.1:1/test/none:1")
            .await
            .unwrap_err();
        // The kubelet reads the message's first word.
        assert_eq!(error.code(), Code::Unknown, "{error:?}");
        assert!(
            error.message().starts_with("RegistryUnavailable"),
            "{error:?}"
        );

        let name = |repository: &str| format!("{}/test/{repository}:1", node.registry.host());
        for (repository, manifest) in [
            ("no-json", "{"),
            ("empty", "{}"),
            ("no-config", r#"{"schemaVersion":2,"layers":[]}"#),
            (
                "wrong-type",
                r#"{"schemaVersion":2,"config":7,"layers":"x"}"#,
            ),
        ] {
            let blob = gantry_testkit::image::Blob::new(OCI_MANIFEST, manifest.as_bytes().to_vec());
            node.registry
                .add_manifest(&format!("test/{repository}"), "1", &blob);
            let error = node.client.pull(&name(repository)).await.unwrap_err();
            assert!(
                matches!(
                    error.code(),
                    Code::InvalidArgument | Code::FailedPrecondition | Code::Internal
                ),
                "{repository}: {error:?}"
            );
            assert!(
                !error.message().is_empty() && !error.message().contains('\n'),
                "{error:?}"
            );
        }
        // A layer that is not what its digest says.
        node.registry
            .behave(|behaviour| behaviour.wrong_bytes = true);
        node.registry.add("test/changed", "1", busybox_image());
        let error = node.client.pull(&name("changed")).await.unwrap_err();
        assert!(error.message().contains("sha256:"), "{error:?}");
        node.registry
            .behave(|behaviour| behaviour.wrong_bytes = false);
        // A layer that would write outside.
        let evil = Layer::new().file("../../../../../../gantry-test-escaped", b"x");
        let evil = ImageBuilder::new()
            .layer(evil, Compression::Gzip)
            .cmd(["/x"])
            .build();
        node.registry.add("test/evil", "1", &evil);
        assert!(node.client.pull(&name("evil")).await.is_err());
        assert!(!std::path::Path::new("/gantry-test-escaped").exists());
        assert!(node.client.list_images().await.unwrap().is_empty());
        // After all that a good one still works.
        node.client.pull(&name("changed")).await.unwrap();
        node.run(&pod, &sleeper("c", &name("changed"))).await;
    });
}

#[test]
fn commands_and_users_that_are_not_there() {
    on_plain_node("commands_and_users_that_are_not_there", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("wrong").await;
        for (name, command, says) in [
            ("absent", "/no/such/command", "no such file"),
            ("in-path", "no-such-command", "not found"),
            ("no-program", "/etc/passwd", "permission denied"),
        ] {
            let id = node
                .create(&pod, &container_config(name, &image, &[command]))
                .await;
            let error = node.client.start(&id).await.unwrap_err();
            assert!(error.message().contains(command), "{error:?}");
            let status = node.status(&id).await;
            assert_eq!(status.state(), ContainerState::ContainerExited);
            assert_eq!(
                (status.exit_code, status.reason.as_str()),
                (128, "StartError"),
                "{status:?}"
            );
            assert!(
                status.message.contains(says),
                "the runtime's message: {}",
                status.message
            );
            assert!(status.finished_at > 0);
            node.client.remove(&id).await.unwrap();
        }
        let mut config = sleeper("user", &image);
        security(&mut config).run_as_username = "nobody-knows-me".to_owned();
        let answer = node.client.create(&pod.id, &config, &pod.config).await;
        refused(answer, Code::InvalidArgument, "nobody-knows-me");
        let mut config = sleeper("device", &image);
        config.devices = vec![gantry_testkit::cri::v1::Device {
            container_path: "/dev/x".to_owned(),
            host_path: "/dev/no-such-device".to_owned(),
            permissions: "rw".to_owned(),
        }];
        let answer = node.client.create(&pod.id, &config, &pod.config).await;
        refused(answer, Code::InvalidArgument, "no-such-device");
        let mut config = sleeper("capability", &image);
        security(&mut config).capabilities = Some(gantry_testkit::cri::v1::Capability {
            add_capabilities: vec!["FLY".to_owned()],
            ..Default::default()
        });
        let answer = node.client.create(&pod.id, &config, &pod.config).await;
        refused(answer, Code::InvalidArgument, "FLY");
        for bad in ["../outside.log", "/etc/passwd", "a/../../b.log"] {
            let mut config = sleeper("log", &image);
            config.log_path = bad.to_owned();
            let answer = node.client.create(&pod.id, &config, &pod.config).await;
            refused(answer, Code::InvalidArgument, "log_path");
        }
        // None of them is in the way of a good one under its name.
        assert!(node.client.list(None).await.unwrap().is_empty());
        let id = node.run(&pod, &sleeper("user", &image)).await;
        assert!(node.is_running(&id).await);
    });
}

#[test]
fn pods_that_cannot_be() {
    on_plain_node("pods_that_cannot_be", async |node| {
        let config = node.pod_config("impossible");
        let answer = node.client.run_pod_by(&config, "no-such-handler").await;
        refused(answer, Code::InvalidArgument, "no-such-handler");
        for (name, value) in [
            ("kernel.panic", "1"),
            ("net.ipv4.ip_forward", "not\na number"),
            ("../../etc/passwd", "x"),
            ("no.such.sysctl", "1"),
        ] {
            let mut config = config.clone();
            config
                .linux
                .as_mut()
                .unwrap()
                .sysctls
                .insert(name.to_owned(), value.to_owned());
            let error = node.client.run_pod(&config).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{name}: {error:?}");
        }
        let mut long = config.clone();
        long.hostname = "x".repeat(65);
        refused(
            node.client.run_pod(&long).await,
            Code::InvalidArgument,
            "hostname",
        );
        let mut nameless = config.clone();
        nameless.metadata.as_mut().unwrap().name.clear();
        refused(
            node.client.run_pod(&nameless).await,
            Code::InvalidArgument,
            "metadata",
        );
        nameless.metadata = None;
        refused(
            node.client.run_pod(&nameless).await,
            Code::InvalidArgument,
            "metadata",
        );
        let mut port = config.clone();
        port.port_mappings = vec![PortMapping {
            host_port: 70_000,
            container_port: 80,
            ..Default::default()
        }];
        refused(
            node.client.run_pod(&port).await,
            Code::InvalidArgument,
            "host_port",
        );
        let mut dns = config.clone();
        dns.dns_config = Some(gantry_testkit::cri::v1::DnsConfig {
            servers: vec!["1.1.1.1\noptions debug".to_owned()],
            ..Default::default()
        });
        refused(
            node.client.run_pod(&dns).await,
            Code::InvalidArgument,
            "dns_config",
        );
        assert!(node.client.list_pods(None).await.unwrap().is_empty());
        node.assert_clean();
        node.run_pod(&config).await;
    });
}

#[test]
fn ids_that_are_paths() {
    on_plain_node("ids_that_are_paths", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("paths").await;
        node.run(&pod, &sleeper("c", &image)).await;
        for bad in ["../..", "..", "/", "/etc", "a/b", ".", "*", "\u{0}"] {
            let status = node.client.status(bad).await.unwrap_err();
            assert!(
                matches!(status.code(), Code::NotFound | Code::InvalidArgument),
                "{bad:?}: {status:?}"
            );
            let status = node.client.pod_status(bad).await.unwrap_err();
            assert!(
                matches!(status.code(), Code::NotFound | Code::InvalidArgument),
                "{bad:?}: {status:?}"
            );
            // What is not there is removed.
            node.client.remove(bad).await.unwrap();
            node.client.remove_pod(bad).await.unwrap();
        }
        // The empty id is the prefix of all, and names none.
        for answer in [
            node.client.remove("").await,
            node.client.stop("", 0).await,
            node.client.remove_pod("").await,
            node.client.stop_pod("").await,
            node.client.status("").await.map(drop),
            node.client.pod_status("").await.map(drop),
        ] {
            if let Err(error) = answer {
                assert!(
                    matches!(error.code(), Code::NotFound | Code::InvalidArgument),
                    "{error:?}"
                );
            }
        }
        assert_eq!(node.client.list(None).await.unwrap().len(), 1);
        assert_eq!(node.client.list_pods(None).await.unwrap().len(), 1);
        assert!(node.pod_is_ready(&pod.id).await);
    });
}

/// Addresses that host-local has given out.
fn addresses(node: &Node) -> Vec<String> {
    let names = gantry_testkit::leakcheck::names(&node.daemon.path("ipam/gantry-test"));
    names
        .into_iter()
        .filter(|name| name.parse::<std::net::IpAddr>().is_ok())
        .collect()
}

#[test]
fn a_plugin_that_fails_at_add() {
    on_plain_node("a_plugin_that_fails_at_add", async |node| {
        let faults = node.daemon.plugin_faults().clone();
        let config = node.pod_config("add");
        for fault in [Fault::Fail, Fault::FailAfter, Fault::Die] {
            faults.set("ADD", fault);
            let error = node.client.run_pod(&config).await.unwrap_err();
            assert!(
                !matches!(error.code(), Code::Ok | Code::InvalidArgument),
                "{error:?}"
            );
            if fault != Fault::Die {
                assert!(error.message().contains("fails on request"), "{error:?}");
            }
            assert!(
                faults.count("DEL") > 0,
                "DEL is owed also for an ADD that failed"
            );
            faults.clear("ADD");
            assert!(
                node.client.list_pods(None).await.unwrap().is_empty(),
                "{fault:?}"
            );
            node.assert_clean();
        }
        let pod = node.run_pod(&config).await;
        assert!(!node.ip(&pod).await.is_empty());
    });
}

#[test]
fn a_half_made_pod_is_taken_back_by_the_next_attempt() {
    on_plain_node(
        "a_half_made_pod_is_taken_back_by_the_next_attempt",
        async |node| {
            let faults = node.daemon.plugin_faults().clone();
            let config = node.pod_config("half-made");
            // Each attempt owes the plugin a DEL of its own, so each stays listed while that fails.
            faults.set("ADD", Fault::FailAfter);
            faults.set("DEL", Fault::Fail);
            for attempts in 1..=2 {
                node.client.run_pod(&config).await.unwrap_err();
                let left = node.client.list_pods(None).await.unwrap();
                assert_eq!(left.len(), attempts);
                assert!(
                    left.iter()
                        .all(|pod| pod.state() == PodSandboxState::SandboxNotready)
                );
            }
            // Also what an earlier daemon left.
            node.kill_and_start_again().await;
            assert_eq!(node.client.list_pods(None).await.unwrap().len(), 2);
            // DEL fails still: that does not block the attempt which works.
            faults.clear("ADD");
            let pod = node.run_pod(&config).await;
            assert_eq!(node.client.list_pods(None).await.unwrap().len(), 3);
            faults.clear("DEL");
            node.client.remove_pod(&pod.id).await.unwrap();
            let again = node.run_pod(&config).await;
            let listed = node.client.list_pods(None).await.unwrap();
            assert_eq!(listed.len(), 1, "{listed:?}");
            assert_eq!(listed[0].id, again.id);
            assert_eq!(addresses(node), [node.ip(&again).await]);
        },
    );
}

#[test]
fn a_plugin_that_fails_at_del() {
    on_plain_node("a_plugin_that_fails_at_del", async |node| {
        let image = node.busybox().await;
        let faults = node.daemon.plugin_faults().clone();
        let pod = node.pod("del").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        assert_eq!(addresses(node), [node.ip(&pod).await]);
        faults.set("DEL", Fault::Fail);
        let error = node.client.stop_pod(&pod.id).await.unwrap_err();
        assert!(error.message().contains("fails on request"), "{error:?}");
        // Its containers are stopped all the same, and it is no longer ready.
        assert_eq!(
            node.exited(&id).await.state(),
            ContainerState::ContainerExited
        );
        assert!(!node.pod_is_ready(&pod.id).await);
        assert!(node.client.remove_pod(&pod.id).await.is_err());
        assert_eq!(
            node.client.list_pods(None).await.unwrap().len(),
            1,
            "still there to be retried"
        );
        assert_eq!(addresses(node).len(), 1);
        // Another can be made under its name meanwhile.
        let again = node.run_pod(&pod.config).await;
        assert_ne!(again.id, pod.id);
        // A restart forgets nothing of it.
        node.kill_and_start_again().await;
        assert!(node.client.stop_pod(&pod.id).await.is_err());
        faults.clear("DEL");
        node.client.stop_pod(&pod.id).await.unwrap();
        node.client.remove_pod(&pod.id).await.unwrap();
        assert_eq!(addresses(node), [node.ip(&again).await]);
        node.client.remove_pod(&again.id).await.unwrap();
        assert!(addresses(node).is_empty());
    });
}

#[test]
fn a_runtime_that_fails_hangs_or_dies() {
    let options = Options::default().config("[timeouts]\nruntime_seconds = 10\n");
    on_node(
        "a_runtime_that_fails_hangs_or_dies",
        options,
        async |node| {
            let image = node.busybox().await;
            let faults = node.daemon.runtime_faults().clone();
            let mut config = node.pod_config("runtime");
            gantry_testkit::cri::pod_namespaces(&mut config).network =
                gantry_testkit::cri::v1::NamespaceMode::Node.into();
            let id = node.client.run_pod_by(&config, FAULTY).await.unwrap();
            let pod = gantry_integration::Pod { id, config };
            let mut attempt = 0;
            for command in ["create", "start"] {
                for fault in [Fault::Fail, Fault::FailAfter, Fault::Hang, Fault::Die] {
                    attempt += 1;
                    let mut config = sleeper("c", &image);
                    config.metadata.as_mut().unwrap().attempt = attempt;
                    let id = node.create(&pod, &config).await;
                    faults.set(command, fault);
                    let answer = node.client.start(&id).await;
                    faults.clear(command);
                    let error = answer.expect_err("the runtime did not do its work");
                    if matches!(fault, Fault::Fail | Fault::FailAfter) {
                        assert!(error.message().contains("fails on request"), "{error:?}");
                    }
                    let status = node.status(&id).await;
                    assert_eq!(
                        status.state(),
                        ContainerState::ContainerExited,
                        "{command} {fault:?}"
                    );
                    assert_eq!(status.exit_code, 128, "{command} {fault:?}: {status:?}");
                    node.client.remove(&id).await.unwrap();
                }
            }
            // A good one runs in the same pod; its end fails at first.
            let id = node
                .run(&pod, &script_config("good", &image, "sleep 1000"))
                .await;
            faults.set("delete", Fault::Fail);
            let first = node.client.remove(&id).await;
            faults.clear("delete");
            if first.is_err() {
                assert_eq!(
                    node.client.list(None).await.unwrap().len(),
                    1,
                    "still there to be retried"
                );
            }
            node.client.remove(&id).await.unwrap();
        },
    );
}

#[test]
fn a_full_disk_while_unpacking() {
    let options = Options {
        root_bytes: Some(48 << 20),
        ..Options::default()
    };
    on_node("a_full_disk_while_unpacking", options, async |node| {
        let small = node.busybox().await;
        // Compresses to nothing and unpacks to more than there is.
        let zeros = vec![0; 4 << 20];
        let mut layer = Layer::new();
        for n in 0..16 {
            layer = layer.file(&format!("zeros-{n}"), &zeros);
        }
        let big = ImageBuilder::new()
            .layer(layer, Compression::Gzip)
            .cmd(["/x"])
            .build();
        node.registry.add("test/big", "1", &big);
        node.accept_now();
        let free = || {
            nix::sys::statvfs::statvfs(&node.daemon.places().root)
                .unwrap()
                .blocks_free()
        };
        let before = free();
        let name = format!("{}/test/big:1", node.registry.host());
        let error = node.client.pull(&name).await.unwrap_err();
        assert_eq!(error.code(), Code::ResourceExhausted, "{error:?}");
        assert!(
            error.message().to_lowercase().contains("no space"),
            "{error:?}"
        );
        assert_eq!(node.client.list_images().await.unwrap().len(), 1);
        // Its blob may wait for the next attempt; what was unpacked is gone.
        gantry_integration::eventually("the space is given back", async || {
            (free() + 1024 > before).then_some(())
        })
        .await;
        let pod = node.pod("after").await;
        let id = node.run(&pod, &sleeper("c", &small)).await;
        assert_eq!(node.sh(&id, "echo x").await, "x");
    });
}
