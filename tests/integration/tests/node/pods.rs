//! What containers of a pod share, and what reaches a pod from outside.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use gantry_integration::{eventually, on_plain_node, script_config, sleeper};
use gantry_testkit::cri::v1::{DnsConfig, NamespaceMode, PortMapping, Protocol};
use gantry_testkit::cri::{pod_namespaces, security};

/// Serves /tmp/index.html.
const SERVER: &str = "echo served > /tmp/index.html; exec httpd -f -p 8080 -h /tmp";

#[test]
fn containers_of_a_pod_meet_on_localhost_and_pods_by_address() {
    on_plain_node(
        "containers_of_a_pod_meet_on_localhost_and_pods_by_address",
        async |node| {
            let image = node.busybox().await;
            let server = node.pod("server").await;
            let other = node.pod("other").await;
            node.run_script(&server, "httpd", &image, SERVER).await;
            let neighbour = node.run(&server, &sleeper("neighbour", &image)).await;
            let distant = node.run(&other, &sleeper("distant", &image)).await;
            let ip = node.ip(&server).await;
            assert_ne!(ip, node.ip(&other).await);
            // busybox's wget looks a service up, which the static C library cannot.
            let fetch = |host: &str| {
                format!(
                    "printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {host} 8080 | tail -n 1 | grep ."
                )
            };
            eventually("the server listens", async || {
                let command = fetch("127.0.0.1");
                let output = node
                    .client
                    .exec(&neighbour, &["sh", "-c", &command], 10)
                    .await
                    .unwrap();
                (output.exit_code == 0).then_some(())
            })
            .await;
            assert_eq!(node.sh(&distant, &fetch(&ip)).await, "served");
            // Not on the localhost of another pod.
            let command = fetch("127.0.0.1");
            let output = node
                .client
                .exec(&distant, &["sh", "-c", &command], 10)
                .await
                .unwrap();
            assert_ne!(output.exit_code, 0);
            // The address is the one that the container sees.
            let addresses = node.sh(&neighbour, "ip -4 -o addr show eth0").await;
            assert!(addresses.contains(&ip), "{addresses}");
        },
    );
}

#[test]
fn a_host_port_leads_into_the_pod() {
    on_plain_node("a_host_port_leads_into_the_pod", async |node| {
        let image = node.busybox().await;
        let mut config = node.pod_config("ported");
        config.port_mappings = vec![
            PortMapping {
                protocol: Protocol::Tcp.into(),
                container_port: 8080,
                host_port: 18080,
                host_ip: String::new(),
            },
            // Without a host port it only documents.
            PortMapping {
                container_port: 9090,
                ..Default::default()
            },
        ];
        let pod = node.run_pod(&config).await;
        node.run_script(&pod, "httpd", &image, SERVER).await;
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(("127.0.0.1", 18080))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = eventually("the host port answers", async || {
            node.daemon
                .netns()
                .run(ask)
                .unwrap()
                .ok()
                .filter(|answer| answer.contains("200 OK"))
        })
        .await;
        assert!(answer.ends_with("served\n"), "{answer}");
        node.client.stop_pod(&pod.id).await.unwrap();
        assert!(
            node.daemon.netns().run(ask).unwrap().is_err(),
            "the mapping went with the pod"
        );
    });
}

#[test]
fn a_pod_in_the_hosts_network_has_the_hosts_interfaces_and_name() {
    on_plain_node(
        "a_pod_in_the_hosts_network_has_the_hosts_interfaces_and_name",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("host").await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            assert_eq!(
                node.ip(&pod).await,
                "",
                "the kubelet fills in the node's address"
            );
            let seen = node.sh(&id, "readlink /proc/self/ns/net").await;
            assert_eq!(seen, node.daemon.netns().link().unwrap());
            let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
            assert_eq!(node.sh(&id, "hostname").await, own.trim());
            assert_eq!(node.daemon.plugin_faults().count("ADD"), 0);
        },
    );
}

#[test]
fn pid_namespaces_are_shared_as_asked() {
    on_plain_node("pid_namespaces_are_shared_as_asked", async |node| {
        let image = node.busybox().await;
        // Each its own.
        let pod = node.host_pod("apart").await;
        let first = node.run(&pod, &sleeper("first", &image)).await;
        assert_eq!(
            node.sh(&first, "tr '\\0' ' ' < /proc/1/cmdline | cut -c1-2")
                .await,
            "sh"
        );
        // One that looks into another.
        let mut config = sleeper("debugger", &image);
        let options = security(&mut config)
            .namespace_options
            .get_or_insert_default();
        options.pid = NamespaceMode::Target.into();
        options.target_id = first.clone();
        let debugger = node.run(&pod, &config).await;
        let link = "readlink /proc/self/ns/pid";
        assert_eq!(node.sh(&debugger, link).await, node.sh(&first, link).await);
        // The host's.
        let mut config = sleeper("node", &image);
        let options = security(&mut config)
            .namespace_options
            .get_or_insert_default();
        options.pid = NamespaceMode::Node.into();
        let on_host = node.run(&pod, &config).await;
        let own = std::fs::read_link("/proc/self/ns/pid").unwrap();
        assert_eq!(node.sh(&on_host, link).await, own.to_string_lossy());

        // One for the pod: the holder is its first process, and orphans are its children.
        let mut config = node.pod_config("together");
        pod_namespaces(&mut config).pid = NamespaceMode::Pod.into();
        pod_namespaces(&mut config).network = NamespaceMode::Node.into();
        let pod = node.run_pod(&config).await;
        let mut ids = Vec::new();
        for name in ["a", "b"] {
            let mut config = sleeper(name, &image);
            security(&mut config)
                .namespace_options
                .get_or_insert_default()
                .pid = NamespaceMode::Pod.into();
            ids.push(node.run(&pod, &config).await);
        }
        assert_eq!(node.sh(&ids[0], link).await, node.sh(&ids[1], link).await);
        let inits = node.sh(&ids[0], "ps -o pid,args | grep -c '[t]rap'").await;
        assert_eq!(inits, "2", "each sees the other's process");
        // What a container leaves behind in the shared namespace goes with it.
        let config = {
            let mut config = script_config("parent", &image, "sleep 987 & exit 0");
            security(&mut config)
                .namespace_options
                .get_or_insert_default()
                .pid = NamespaceMode::Pod.into();
            config
        };
        let parent = node.run(&pod, &config).await;
        node.exited(&parent).await;
        eventually("the orphan is gone", async || {
            let left = node
                .sh(&ids[0], "ps -o args | grep -c '[s]leep 987' || true")
                .await;
            (left == "0").then_some(())
        })
        .await;
    });
}

#[test]
fn containers_of_a_pod_share_name_files_memory_and_ipc() {
    on_plain_node(
        "containers_of_a_pod_share_name_files_memory_and_ipc",
        async |node| {
            let image = node.busybox().await;
            let mut config = node.pod_config("shared");
            config.hostname = "own-name".to_owned();
            config.dns_config = Some(DnsConfig {
                servers: vec!["10.0.0.10".to_owned()],
                searches: vec!["a.local".to_owned(), "b.local".to_owned()],
                options: vec!["ndots:5".to_owned()],
            });
            let linux = config.linux.get_or_insert_default();
            for (name, value) in [
                ("kernel.shm_rmid_forced", "1"),
                ("net.core.somaxconn", "1234"),
            ] {
                linux.sysctls.insert(name.to_owned(), value.to_owned());
            }
            let pod = node.run_pod(&config).await;
            let a = node.run(&pod, &sleeper("a", &image)).await;
            let b = node.run(&pod, &sleeper("b", &image)).await;
            for id in [&a, &b] {
                assert_eq!(node.sh(id, "hostname").await, "own-name");
                assert_eq!(node.sh(id, "cat /etc/hostname").await, "own-name");
                assert_eq!(
                    node.sh(id, "cat /etc/resolv.conf").await,
                    "search a.local b.local\nnameserver 10.0.0.10\noptions ndots:5"
                );
                assert_eq!(
                    node.sh(id, "cat /proc/sys/kernel/shm_rmid_forced").await,
                    "1"
                );
                assert_eq!(
                    node.sh(id, "cat /proc/sys/net/core/somaxconn").await,
                    "1234"
                );
            }
            for kind in ["net", "ipc", "uts"] {
                let link = format!("readlink /proc/self/ns/{kind}");
                assert_eq!(node.sh(&a, &link).await, node.sh(&b, &link).await, "{kind}");
                let own = std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
                assert_ne!(node.sh(&a, &link).await, own.to_string_lossy(), "{kind}");
            }
            for kind in ["pid", "mnt"] {
                let link = format!("readlink /proc/self/ns/{kind}");
                assert_ne!(node.sh(&a, &link).await, node.sh(&b, &link).await, "{kind}");
            }
            node.sh(&a, "echo seen > /dev/shm/note").await;
            assert_eq!(node.sh(&b, "cat /dev/shm/note").await, "seen");
            assert_eq!(
                node.sh(&b, "stat -f -c %T /dev/shm; stat -c %a /dev/shm")
                    .await,
                "tmpfs\n1777"
            );
            // The node is untouched.
            assert!(!std::path::Path::new("/dev/shm/note").exists());
        },
    );
}

#[test]
fn a_pods_status_tells_what_it_was_made_of() {
    on_plain_node("a_pods_status_tells_what_it_was_made_of", async |node| {
        let mut config = node.pod_config("told");
        config.labels.insert("l".to_owned(), "1".to_owned());
        config.annotations.insert("a".to_owned(), "2".to_owned());
        let pod = node.run_pod(&config).await;
        let response = node.client.pod_status_of(&pod.id, true).await.unwrap();
        let status = response.status.unwrap();
        assert_eq!(status.metadata, config.metadata);
        assert_eq!(
            (&status.labels, &status.annotations),
            (&config.labels, &config.annotations)
        );
        assert!(
            status.created_at > 1_600_000_000_000_000_000,
            "{}",
            status.created_at
        );
        let options = status.linux.unwrap().namespaces.unwrap().options.unwrap();
        assert_eq!(options.pid(), NamespaceMode::Container);
        let info: serde_json::Value = serde_json::from_str(&response.info["info"]).unwrap();
        let pid = info["pid"].as_i64().unwrap();
        assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
        assert_eq!(info["config"]["metadata"]["name"], "told");
        // The holder's network is the pod's: cAdvisor looks through it.
        let link = std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        let path = std::path::PathBuf::from(info["netns"].as_str().unwrap());
        let pinned = gantry_testkit::leakcheck::names(&node.daemon.path("netns"));
        assert_eq!(pinned, [path.file_name().unwrap().to_string_lossy()]);
        assert!(link.to_string_lossy().starts_with("net:["));
        let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(
            cgroup.contains(&pod.id),
            "a leaf named for the pod: {cgroup}"
        );
    });
}

#[test]
fn twenty_pods_at_once_have_twenty_addresses() {
    on_plain_node("twenty_pods_at_once_have_twenty_addresses", async |node| {
        let mut calls = tokio::task::JoinSet::new();
        for n in 0..20 {
            let (client, config) = (node.client.clone(), node.pod_config(&format!("p{n}")));
            calls.spawn(async move { client.run_pod(&config).await.unwrap() });
        }
        let mut addresses = std::collections::BTreeSet::new();
        for id in calls.join_all().await {
            let status = node.client.pod_status(&id).await.unwrap();
            addresses.insert(status.network.unwrap().ip);
        }
        assert_eq!(addresses.len(), 20, "{addresses:?}");
        let mut calls = tokio::task::JoinSet::new();
        for pod in node.client.list_pods(None).await.unwrap() {
            let client = node.client.clone();
            calls.spawn(async move { client.remove_pod(&pod.id).await.unwrap() });
        }
        calls.join_all().await;
    });
}

#[test]
fn the_hosts_ipc_is_shared_as_asked() {
    on_plain_node("the_hosts_ipc_is_shared_as_asked", async |node| {
        let image = node.busybox().await;
        let mut config = node.pod_config("ipc");
        pod_namespaces(&mut config).ipc = NamespaceMode::Node.into();
        let pod = node.run_pod(&config).await;
        let mut config = sleeper("c", &image);
        security(&mut config)
            .namespace_options
            .get_or_insert_default()
            .ipc = NamespaceMode::Node.into();
        let id = node.run(&pod, &config).await;
        let own = std::fs::read_link("/proc/self/ns/ipc").unwrap();
        assert_eq!(
            node.sh(&id, "readlink /proc/self/ns/ipc").await,
            own.to_string_lossy()
        );
    });
}
