//! The walking path: pull, pod, container, exec, log, stop, remove.

use gantry_integration::crictl::Crictl;
use gantry_integration::{Pod, busybox_image, eventually, on_node, on_plain_node, sleeper};
use gantry_testkit::daemon::Options;
use serde_json::json;

#[test]
fn a_pod_lives_and_is_gone_without_a_trace() {
    on_plain_node("a_pod_lives_and_is_gone_without_a_trace", async |node| {
        let image = node.busybox().await;
        let pod = node.pod("walk").await;
        assert!(node.pod_is_ready(&pod.id).await);
        let id = node.run(&pod, &sleeper("c", &image)).await;
        assert!(node.is_running(&id).await);
        assert_eq!(node.sh(&id, "echo hello").await, "hello");
        node.client.stop(&id, 10).await.unwrap();
        let status = node.exited(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
        node.client.remove(&id).await.unwrap();
        node.client.stop_pod(&pod.id).await.unwrap();
        assert!(!node.pod_is_ready(&pod.id).await);
        node.client.remove_pod(&pod.id).await.unwrap();
    });
}

/// The same by another OCI runtime.
#[test]
fn crun_runs_containers_too() {
    const NAME: &str = "crun_runs_containers_too";
    let crun = std::process::Command::new("crun").arg("--version").output();
    if !crun.is_ok_and(|output| output.status.success()) {
        println!("SKIP {NAME}: crun is not in PATH");
        return;
    }
    if std::path::Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists() {
        println!("SKIP {NAME}: crun does not run where cgroups v1 and v2 are both mounted");
        return;
    }
    let options = Options::default().config("[runtime.handlers.crun]\nbinary = \"crun\"\n");
    on_node(NAME, options, async |node| {
        let image = node.busybox().await;
        let config = node.pod_config("crun");
        let id = node.client.run_pod_by(&config, "crun").await.unwrap();
        assert_eq!(
            node.client.pod_status(&id).await.unwrap().runtime_handler,
            "crun"
        );
        let pod = Pod { id, config };
        let id = node.run(&pod, &sleeper("c", &image)).await;
        assert_eq!(node.sh(&id, "echo hello").await, "hello");
        let output = node
            .client
            .exec(&id, &["sh", "-c", "echo err >&2; exit 3"], 5)
            .await
            .unwrap();
        assert_eq!(
            (output.stderr.as_slice(), output.exit_code),
            (&b"err\n"[..], 3)
        );
        node.client.stop(&id, 10).await.unwrap();
        assert_eq!(node.status(&id).await.exit_code, 0);
        let absent = gantry_testkit::cri::container_config("absent", &image, &["/no/such"]);
        let id = node.create(&pod, &absent).await;
        let error = node.client.start(&id).await.unwrap_err();
        assert!(error.message().contains("/no/such"), "{error:?}");
        let status = node.status(&id).await;
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (128, "StartError")
        );
    });
}

/// A removal without a stop does all of it.
#[test]
fn removing_a_running_pod_stops_it() {
    on_plain_node("removing_a_running_pod_stops_it", async |node| {
        let image = node.busybox().await;
        let pod = node.pod("busy").await;
        let running = node.run(&pod, &sleeper("running", &image)).await;
        node.create(&pod, &sleeper("created", &image)).await;
        // One that does not mind SIGTERM is killed: nobody gave it a grace.
        node.run_script(
            &pod,
            "stubborn",
            &image,
            "trap '' TERM; while :; do sleep 1; done",
        )
        .await;
        node.client.remove(&running).await.unwrap();
        assert_eq!(node.client.list(None).await.unwrap().len(), 2);
        node.client.remove_pod(&pod.id).await.unwrap();
        assert!(node.client.list(None).await.unwrap().is_empty());
    });
}

/// A shim's descriptors, while the pod lives, come back to what they were.
#[test]
fn execs_and_containers_leave_no_descriptor_in_the_shim() {
    on_plain_node(
        "execs_and_containers_leave_no_descriptor_in_the_shim",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("steady").await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            let shim = node.pod_info(&pod.id).await["shimPid"].as_i64().unwrap();
            let count = || gantry_testkit::leakcheck::descriptors(i32::try_from(shim).unwrap());
            let before = count();
            assert!(!before.is_empty());
            for n in 0..5 {
                assert_eq!(node.sh(&id, "echo x").await, "x");
                let name = format!("short-{n}");
                let short = node
                    .run_script(&pod, &name, &image, "echo out; echo err >&2")
                    .await;
                node.exited(&short).await;
                node.client.remove(&short).await.unwrap();
            }
            eventually("the shim has the descriptors it had", async || {
                (count() == before).then_some(())
            })
            .await;
        },
    );
}

#[test]
fn crictl_walks_the_whole_path() {
    const NAME: &str = "crictl_walks_the_whole_path";
    let Some(program) = Crictl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let crictl = Crictl::new(&program, &node.daemon);
        let image = busybox_image();
        node.registry.add("test/busybox", "1", image);
        let repository = format!("{}/test/busybox", node.registry.host());
        let by_digest = format!("{repository}@{}", image.manifest.digest);
        for name in [
            format!("{repository}:1"),
            by_digest.clone(),
            format!("{repository}:1@{}", image.manifest.digest),
        ] {
            let said = crictl.run(&["pull", &name]);
            assert!(said.contains(&image.id()), "{said}");
        }
        let images = crictl.json(&["images", "-o", "json"]);
        assert_eq!(images["images"].as_array().unwrap().len(), 1, "{images}");
        let listed = &images["images"][0];
        assert_eq!(listed["id"], image.id());
        assert_eq!(listed["repoTags"], json!([format!("{repository}:1")]));
        assert_eq!(listed["repoDigests"], json!([by_digest]));

        let logs = node.log_dir("crictl");
        let pod_file = crictl.file(
            "pod.json",
            &json!({
                "metadata": {"name": "crictl", "namespace": "test", "uid": "u", "attempt": 1},
                "hostname": "crictl",
                "log_directory": logs,
                "labels": {"app": "walk"},
                "linux": {},
            }),
        );
        let container_file = crictl.file(
            "container.json",
            &json!({
                "metadata": {"name": "c"},
                "image": {"image": format!("{repository}:1")},
                "command": ["sh", "-c", "echo one; echo two >&2; trap 'exit 3' TERM; while :; do sleep 1; done"],
                "log_path": "c.log",
                "linux": {},
            }),
        );
        let pod = crictl.run(&["runp", &pod_file]);
        let id = crictl.run(&["create", &pod, &container_file, &pod_file]);
        crictl.run(&["start", &id]);
        assert_eq!(crictl.run(&["exec", "-s", &id, "hostname"]), "crictl");
        assert_eq!(crictl.run(&["ps", "-q"]), id);
        assert_eq!(crictl.run(&["pods", "-q", "--label", "app=walk"]), pod);
        let log = eventually("both lines are logged", async || {
            let (_, stdout, stderr) = crictl.try_run(&["logs", &id]);
            let log = [stdout, stderr].join("\n");
            (log.contains("one") && log.contains("two")).then_some(log)
        })
        .await;
        assert_eq!(log.trim().lines().count(), 2, "{log}");

        let inspected = crictl.json(&["inspect", &id]);
        assert_eq!(inspected["status"]["state"], "CONTAINER_RUNNING");
        assert_eq!(
            inspected["status"]["logPath"],
            logs.join("c.log").to_str().unwrap()
        );
        assert_eq!(inspected["info"]["sandboxID"], pod);
        let pid = inspected["info"]["pid"].as_i64().unwrap();
        assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
        assert!(inspected["info"]["runtimeSpec"]["process"]["args"].is_array());
        let inspected = crictl.json(&["inspectp", &pod]);
        assert_eq!(inspected["status"]["state"], "SANDBOX_READY");
        assert!(inspected["info"]["pid"].as_i64().unwrap() > 1);
        let ip = inspected["status"]["network"]["ip"].as_str().unwrap();
        assert!(ip.starts_with("10."), "{ip}");

        crictl.run(&["stop", "--timeout", "20", &id]);
        assert_eq!(crictl.json(&["inspect", &id])["status"]["exitCode"], 3);
        crictl.run(&["rm", &id]);
        crictl.run(&["stopp", &pod]);
        crictl.run(&["rmp", &pod]);
        assert_eq!(crictl.run(&["pods", "-q"]), "");
        assert_eq!(crictl.run(&["ps", "-aq"]), "");
        crictl.run(&["rmi", &format!("{repository}:1")]);
        assert_eq!(crictl.run(&["images", "-q"]), "");
    });
}
