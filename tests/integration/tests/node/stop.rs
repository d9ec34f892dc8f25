//! How containers end, and what is said of it.

use gantry_cri_api::v1::Signal;
use gantry_integration::young;
use std::time::{Duration, Instant};

use gantry_integration::{eventually, on_node, on_plain_node, refused, script_config, sleeper};
use gantry_testkit::cri::v1::{self, ContainerState, NamespaceMode};
use gantry_testkit::cri::{resources, security};
use gantry_testkit::daemon::Options;
use gantry_testkit::image::{Compression, ImageBuilder};
use serde_json::json;
use tonic::Code;

/// Says when it has its traps, and then minds nothing but what `trap` does.
fn trapping(name: &str, image: &str, trap: &str) -> v1::ContainerConfig {
    script_config(
        name,
        image,
        &format!("{trap}; echo set; while :; do sleep 0.1; done"),
    )
}

#[test]
fn exit_codes_times_and_reasons() {
    on_plain_node("exit_codes_times_and_reasons", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("codes").await;
        for (name, script, code, reason) in [
            ("good", "exit 0", 0, "Completed"),
            ("bad", "exit 3", 3, "Error"),
            ("signal", "kill -TERM $$; sleep 60", 143, "Error"),
        ] {
            let mut config = script_config(name, &image, script);
            // The first process of a PID namespace gets no signal from itself.
            security(&mut config)
                .namespace_options
                .get_or_insert_default()
                .pid = NamespaceMode::Node.into();
            let id = node.run(&pod, &config).await;
            let status = node.exited(&id).await;
            assert_eq!(
                (status.exit_code, status.reason.as_str()),
                (code, reason),
                "{name}"
            );
            assert!(status.created_at > 0 && status.created_at <= status.started_at);
            assert!(status.started_at <= status.finished_at, "{status:?}");
        }
    });
}

#[test]
fn out_of_memory_is_told() {
    on_plain_node("out_of_memory_is_told", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("oom").await;
        let mut config = script_config("eater", &image, "tail /dev/zero");
        resources(&mut config).memory_limit_in_bytes = 16 << 20;
        let id = node.run(&pod, &config).await;
        let status = node.exited(&id).await;
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (137, "OOMKilled"),
            "{status:?}"
        );
        // A plain kill is none.
        let id = node.run(&pod, &sleeper("killed", &image)).await;
        node.client.stop(&id, 0).await.unwrap();
        let status = node.exited(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    });
}

/// The stop signal that the status tells.
async fn told(node: &gantry_integration::Node, id: &str) -> Signal {
    node.status_young(id).await.stop_signal()
}

#[test]
fn the_stop_signal_comes_first_and_sigkill_after_the_grace() {
    on_plain_node(
        "the_stop_signal_comes_first_and_sigkill_after_the_grace",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("grace").await;
            let polite = node
                .run(&pod, &trapping("polite", &image, "trap 'exit 9' TERM"))
                .await;
            node.has_written(&pod, "polite", "set").await;
            node.client.stop(&polite, 30).await.unwrap();
            assert_eq!(node.status(&polite).await.exit_code, 9);

            let deaf = node
                .run(&pod, &trapping("deaf", &image, "trap '' TERM"))
                .await;
            node.has_written(&pod, "deaf", "set").await;
            let began = Instant::now();
            node.client.stop(&deaf, 1).await.unwrap();
            assert!(began.elapsed() >= Duration::from_secs(1));
            let status = node.status(&deaf).await;
            assert_eq!(
                status.state(),
                ContainerState::ContainerExited,
                "the answer comes after the end"
            );
            assert_eq!(status.exit_code, 137);

            // The image chooses the signal.
            let busybox = gantry_integration::busybox_image();
            let custom = ImageBuilder::new()
                .tar(busybox.layers[0].data.clone(), Compression::Plain)
                .config("StopSignal", json!("SIGUSR1"))
                .build();
            let custom = node.pull("usr1", &custom).await;
            let id = node
                .run(
                    &pod,
                    &trapping("custom", &custom, "trap 'exit 5' USR1; trap '' TERM"),
                )
                .await;
            node.has_written(&pod, "custom", "set").await;
            assert_eq!(told(node, &id).await, Signal::Sigusr1);
            node.client.stop(&id, 30).await.unwrap();
            assert_eq!(node.status(&id).await.exit_code, 5);
            // A word that is no signal would make it immortal: it is passed over, and said.
            let junk = ImageBuilder::new()
                .tar(busybox.layers[0].data.clone(), Compression::Plain)
                .config("StopSignal", json!("SIGNONSENSE"))
                .build();
            let junk = node.pull("junk", &junk).await;
            let trap = trapping("junk", &junk, "trap 'exit 6' TERM");
            let id = node.run(&pod, &trap).await;
            node.has_written(&pod, "junk", "set").await;
            assert_eq!(told(node, &id).await, Signal::Sigterm);
            node.client.stop(&id, 30).await.unwrap();
            assert_eq!(node.status(&id).await.exit_code, 6);
            assert!(node.daemon.log().contains("SIGNONSENSE"));
            // The request's word goes over the image's; a real-time signal by number.
            let mut config: gantry_cri_api::v1::ContainerConfig =
                young::same(&trapping("own", &custom, "trap 'exit 7' 37; trap '' USR1"));
            config.stop_signal = Signal::Sigrtminplus3.into();
            let id = node.create_young(&pod, &config).await.unwrap();
            node.client.start(&id).await.unwrap();
            node.has_written(&pod, "own", "set").await;
            assert_eq!(told(node, &id).await, Signal::Sigrtminplus3);
            node.client.stop(&id, 30).await.unwrap();
            assert_eq!(node.status(&id).await.exit_code, 7);
        },
    );
}

#[test]
fn a_second_stop_may_shorten_the_first() {
    on_plain_node("a_second_stop_may_shorten_the_first", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("shorter").await;
        let id = node
            .run(&pod, &trapping("deaf", &image, "trap '' TERM"))
            .await;
        node.has_written(&pod, "deaf", "set").await;
        let (client, key) = (node.client.clone(), id.clone());
        let began = Instant::now();
        let first = tokio::spawn(async move { client.stop(&key, 600).await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(node.is_running(&id).await);
        node.client.stop(&id, 0).await.unwrap();
        first.await.unwrap().unwrap();
        assert!(began.elapsed() < Duration::from_secs(60));
        assert_eq!(node.status(&id).await.exit_code, 137);
    });
}

/// Whoever gives a stop up has sent the signal, and does not get the container killed.
#[test]
fn a_stop_that_is_given_up_does_not_kill() {
    on_plain_node("a_stop_that_is_given_up_does_not_kill", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("given-up").await;
        let id = node
            .run(&pod, &trapping("deaf", &image, "trap 'echo asked' TERM"))
            .await;
        node.has_written(&pod, "deaf", "set").await;
        let (client, key) = (node.client.clone(), id.clone());
        let caller = tokio::spawn(async move { client.stop(&key, 12).await });
        node.has_written(&pod, "deaf", "asked").await;
        caller.abort();
        tokio::time::sleep(Duration::from_secs(13)).await;
        assert!(node.is_running(&id).await);
        // The next one works as if there had been none.
        node.client.stop(&id, 0).await.unwrap();
        assert_eq!(node.status(&id).await.exit_code, 137);
    });
}

#[test]
fn what_is_so_already_is_success_and_what_is_unknown_is_not_found() {
    on_plain_node(
        "what_is_so_already_is_success_and_what_is_unknown_is_not_found",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("again").await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            node.client.start(&id).await.unwrap();
            // Nothing has run that could be stopped.
            let created = node.create(&pod, &sleeper("created", &image)).await;
            node.client.stop(&created, 5).await.unwrap();
            for _ in 0..2 {
                node.client.stop(&id, 0).await.unwrap();
            }
            refused(
                node.client.start(&id).await,
                Code::FailedPrecondition,
                "exited",
            );
            for _ in 0..2 {
                node.client.remove(&id).await.unwrap();
            }
            for _ in 0..2 {
                node.client.stop_pod(&pod.id).await.unwrap();
            }
            refused(
                node.client
                    .create(&pod.id, &sleeper("late", &image), &pod.config)
                    .await,
                Code::FailedPrecondition,
                "not ready",
            );
            refused(
                node.client.start(&created).await,
                Code::FailedPrecondition,
                "not ready",
            );
            for _ in 0..2 {
                node.client.remove_pod(&pod.id).await.unwrap();
            }
            let unknown = "f00dfeed".repeat(8);
            node.client.stop(&unknown, 0).await.unwrap();
            node.client.remove(&unknown).await.unwrap();
            node.client.stop_pod(&unknown).await.unwrap();
            node.client.remove_pod(&unknown).await.unwrap();
            refused(node.client.status(&unknown).await, Code::NotFound, &unknown);
            refused(
                node.client.pod_status(&unknown).await,
                Code::NotFound,
                &unknown,
            );
            refused(node.client.start(&unknown).await, Code::NotFound, &unknown);
            refused(
                node.client
                    .create(&unknown, &sleeper("c", &image), &pod.config)
                    .await,
                Code::NotFound,
                &unknown,
            );
            refused(
                node.client.update(&unknown, Default::default()).await,
                Code::NotFound,
                &unknown,
            );
            refused(
                node.client.reopen_log(&unknown).await,
                Code::NotFound,
                &unknown,
            );
        },
    );
}

/// Two clients that remove, and one that stops, at once: all succeed.
#[test]
fn removals_at_the_same_time_all_succeed() {
    on_plain_node("removals_at_the_same_time_all_succeed", async |node| {
        let image = node.busybox().await;
        let pod = node.pod("crowd").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let mut calls = tokio::task::JoinSet::new();
        for n in 0..8 {
            let (client, id, pod) = (node.client.clone(), id.clone(), pod.id.clone());
            calls.spawn(async move {
                match n % 4 {
                    0 => client.stop(&id, 0).await,
                    1 => client.remove(&id).await,
                    2 => client.stop_pod(&pod).await,
                    _ => client.remove_pod(&pod).await,
                }
            });
        }
        while let Some(answer) = calls.join_next().await {
            answer.unwrap().unwrap();
        }
        eventually("nothing is listed", async || {
            node.client
                .list_pods(None)
                .await
                .unwrap()
                .is_empty()
                .then_some(())
        })
        .await;
    });
}

/// runc binds its own binary into its state directory for a moment of each call. One that is killed
/// in that moment leaves the mount, and `runc delete` then leaves the directory.
#[test]
fn what_a_killed_runtime_left_mounted_goes_with_its_container() {
    on_plain_node(
        "what_a_killed_runtime_left_mounted_goes_with_its_container",
        async |node| {
            let image = node.busybox().await;
            for with_shim in [true, false] {
                let pod = node.pod("torn").await;
                let id = node.run(&pod, &sleeper("c", &image)).await;
                let runtimes = node.daemon.places().state.join("runtime");
                let mut states = std::fs::read_dir(&runtimes)
                    .unwrap()
                    .map(|runtime| runtime.unwrap().path().join(&id));
                let state = states.find(|state| state.exists()).unwrap();
                let torn = state.join("runc.torn");
                std::fs::write(&torn, "").unwrap();
                let bind = nix::mount::MsFlags::MS_BIND;
                nix::mount::mount(Some(&torn), &torn, None::<&str>, bind, None::<&str>).unwrap();
                if !with_shim {
                    node.kill_holder_and_shim(&pod).await;
                    node.exited(&id).await;
                }
                node.client.stop(&id, 0).await.unwrap();
                node.client.remove(&id).await.unwrap();
                assert!(!state.exists(), "{state:?}");
                node.client.stop_pod(&pod.id).await.unwrap();
                node.client.remove_pod(&pod.id).await.unwrap();
            }
        },
    );
}

/// An OCI runtime that is killed before it has written its state leaves the cgroup that it made, and
/// knows of none when it is told to delete.
#[test]
fn a_cgroup_that_a_killed_runtime_left_goes_with_its_container() {
    on_plain_node(
        "a_cgroup_that_a_killed_runtime_left_goes_with_its_container",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("left").await;
            let id = node.run(&pod, &sleeper("c", &image)).await;
            let places = node.daemon.places().clone();
            let of_container = || {
                let mut dirs = places.cgroups();
                dirs.retain(|dir| dir.ends_with(&id));
                dirs
            };
            let made = of_container();
            assert!(!made.is_empty());
            node.client.stop(&id, 0).await.unwrap();
            // The runtime is told to delete it when it has ended, and removes its state last.
            eventually("the runtime has deleted it", async || {
                let mut runtimes = std::fs::read_dir(places.state.join("runtime")).unwrap();
                let knows = runtimes.any(|runtime| runtime.unwrap().path().join(&id).exists());
                (!knows).then_some(())
            })
            .await;
            for dir in &made {
                std::fs::create_dir_all(dir.join("below")).unwrap();
            }
            let mut left = std::process::Command::new("sleep")
                .arg("1000")
                .spawn()
                .unwrap();
            std::fs::write(made[0].join("cgroup.procs"), left.id().to_string()).unwrap();
            node.client.remove(&id).await.unwrap();
            assert_eq!(of_container(), [""; 0].map(std::path::PathBuf::from));
            left.wait().unwrap();
        },
    );
}

/// Processes that fork and end faster than anybody lists them, in a container whose end the kernel
/// does not make theirs.
#[test]
fn what_forks_without_end_is_killed_to_the_last() {
    on_plain_node(
        "what_forks_without_end_is_killed_to_the_last",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("fork").await;
            let script = "echo 'sh /tmp/fork & ' >/tmp/fork; for n in 1 2 3 4 5 6 7 8; do sh /tmp/fork; \
                      done; sleep 1000";
            let mut config = script_config("c", &image, script);
            let options = security(&mut config)
                .namespace_options
                .get_or_insert_default();
            options.pid = NamespaceMode::Node.into();
            let forks = || {
                let processes = std::fs::read_dir("/proc").unwrap().flatten();
                let lines =
                    processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
                lines.filter(|line| line == b"sh\0/tmp/fork\0").count()
            };
            for (grace, code) in [(0, 137), (60, 143)] {
                config.metadata.as_mut().unwrap().attempt += 1;
                let id = node.run(&pod, &config).await;
                eventually("it forks", async || (forks() > 0).then_some(())).await;
                let began = std::time::Instant::now();
                node.client.stop(&id, grace).await.unwrap();
                println!("stopped within {:?}", began.elapsed());
                assert_eq!(node.exited(&id).await.exit_code, code);
                eventually("all of them have ended", async || {
                    (forks() == 0).then_some(())
                })
                .await;
                node.client.remove(&id).await.unwrap();
            }
        },
    );
}

/// What cannot be killed yet, as in a read from a disk that hangs: the stop ends with an error within
/// bounds, nobody else waits, and once it can be killed the same calls succeed.
#[test]
fn a_container_that_cannot_die_is_told_and_can_be_removed_later() {
    const NAME: &str = "a_container_that_cannot_die_is_told_and_can_be_removed_later";
    let options = Options::default().config("[timeouts]\nruntime_seconds = 10\n");
    on_node(NAME, options, async |node| {
        let image = node.busybox().await;
        let (pod, other) = (node.host_pod("stuck").await, node.host_pod("other").await);
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let pid = node.container_info(&id).await["pid"].as_i64().unwrap();
        let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let freezer = cgroups
            .lines()
            .find_map(|line| line.split_once(":freezer:"));
        let Some((_, freezer)) = freezer else {
            // A frozen process of v2 can be killed.
            println!("SKIP {NAME}: no freezer of cgroup v1");
            return;
        };
        let state = format!("/sys/fs/cgroup/freezer{freezer}/freezer.state");
        std::fs::write(&state, "FROZEN").unwrap();
        let began = std::time::Instant::now();
        let stopped = node.client.stop(&id, 1).await;
        println!("{stopped:?} after {:?}", began.elapsed());
        assert!(began.elapsed() < std::time::Duration::from_secs(120));
        let beside = node.run(&other, &sleeper("c2", &image)).await;
        assert_eq!(node.sh(&beside, "echo on").await, "on");
        if stopped.is_err() {
            assert!(node.is_running(&id).await, "it has not ended");
        }
        // It may have been thawed with its end.
        let _ = std::fs::write(&state, "THAWED");
        node.client.stop(&id, 1).await.unwrap();
        node.client.remove(&id).await.unwrap();
    });
}
