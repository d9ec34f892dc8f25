//! Containers: start, output, exit, signals, delete.

use std::path::Path;
use std::time::Duration;

use gantry_shim_api::v1::{self, event, message, request};
use gantry_sys::process::{Stat, alive};
use prost::Message;

use crate::common::{Daemon, eventually, memory_mount, pod, records, runtimes, skip};

const RUNC: &str = "/usr/sbin/runc";

#[test]
fn a_container_runs_writes_its_log_and_leaves_its_exit() {
    if skip("a_container_runs_writes_its_log_and_leaves_its_exit") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        let script = "echo out; hostname; printf tail; echo err >&2; read x; exit 7";
        let mut bundle = pod.bundle("c1", script);
        bundle.start.stdin = true;
        let process = pod.start(&bundle).unwrap();
        // crun leaves a helper in between, which ends a moment later.
        eventually("the shim is the parent", || {
            Stat::read(process.pid).unwrap().ppid == pod.shim.pid
        });
        let state = &pod.daemon.state().containers[0];
        assert_eq!((state.process, state.exit), (Some(process), None));
        // Held by the shim, so that `read` waits.
        eventually("output is logged", || records(&bundle.log).len() == 3);
        assert!(alive(process.into()));
        pod.signal("c1", 15, false).unwrap();
        pod.signal("c1", 9, false).unwrap();
        let exit = pod.daemon.exited("c1");
        assert_eq!((exit.code, exit.oom_killed), (137, false));
        assert!(exit.finished_at >= state.started_at);
        let mut lines = records(&bundle.log);
        lines.sort();
        assert_eq!(
            lines,
            [
                "stderr F err",
                "stdout F out",
                "stdout F pod-host",
                "stdout P tail"
            ]
        );
        let file = std::fs::read(Path::new(&bundle.start.bundle).join("exit")).unwrap();
        assert_eq!(v1::ExitRecord::decode(&file[..]).unwrap(), exit);
        assert_eq!(pod.daemon.state().containers[0].exit, Some(exit));
        let gone = pod.signal("c1", 15, false).unwrap_err();
        assert_eq!(gone.kind(), v1::ErrorKind::FailedPrecondition);
        pod.delete("c1");
        pod.delete("c1");
        assert!(pod.daemon.state().containers.is_empty());
        pod.shutdown();
        assert_eq!(
            pod.leftovers(),
            Vec::<String>::new(),
            "{}",
            runtime.display()
        );
    }
}

#[test]
fn an_exit_at_once_is_announced_after_the_start() {
    if skip("an_exit_at_once_is_announced_after_the_start") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        for n in 0..5 {
            let id = format!("c{n}");
            let bundle = pod.run(&id, &format!("echo quick; exit {n}"));
            assert_eq!(pod.daemon.exited(&id).code, n);
            assert_eq!(records(&bundle.log), ["stdout F quick"]);
            pod.delete(&id);
        }
        pod.shutdown();
        assert_eq!(
            pod.leftovers(),
            Vec::<String>::new(),
            "{}",
            runtime.display()
        );
    }
}

#[test]
fn a_command_that_does_not_exist_fails_the_start_with_the_runtimes_words() {
    if skip("a_command_that_does_not_exist_fails_the_start_with_the_runtimes_words") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        let fds = pod.fd_count();
        let mut bundle = pod.bundle("c1", "");
        bundle.config["process"]["args"] = serde_json::json!(["no-such-command"]);
        let error = pod.start(&bundle).unwrap_err();
        assert_eq!(error.kind(), v1::ErrorKind::Runtime);
        assert!(
            error.message.contains("no-such-command"),
            "{}",
            error.message
        );
        assert!(pod.daemon.state().containers.is_empty());
        assert_eq!(pod.fd_count(), fds);
        // The name is free again.
        bundle.config["process"]["args"] = serde_json::json!(["/bin/sh", "-c", "exit 3"]);
        pod.start(&bundle).unwrap();
        assert_eq!(pod.daemon.exited("c1").code, 3);
        pod.shutdown();
        assert_eq!(
            pod.leftovers(),
            Vec::<String>::new(),
            "{}",
            runtime.display()
        );
    }
}

#[test]
fn a_name_in_use_is_refused() {
    if skip("a_name_in_use_is_refused") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let bundle = pod.run("c1", "sleep 600");
    let error = pod.start(&bundle).unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::AlreadyExists);
    // Delete is by force, and its answer comes when the exit is published.
    pod.delete("c1");
    assert_eq!(pod.daemon.exited("c1").code, 137);
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn a_terminal_is_logged_and_resized() {
    if skip("a_terminal_is_logged_and_resized") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        let script = "trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.05; done";
        let mut bundle = pod.bundle("c1", script);
        bundle.config["process"]["terminal"] = true.into();
        bundle.start.tty = true;
        pod.start(&bundle).unwrap();
        eventually("ready", || records(&bundle.log) == ["stdout F ready\r"]);
        let resize = |exec_id: &str, width| {
            request::Body::ResizePty(v1::ResizePty {
                container_id: "c1".into(),
                exec_id: exec_id.into(),
                width,
                height: 33,
            })
        };
        assert!(pod.daemon.ask(resize("e1", 77)).is_err());
        assert!(pod.daemon.ask(resize("", 1 << 20)).is_err());
        pod.daemon.ask(resize("", 77)).unwrap();
        assert_eq!(pod.daemon.exited("c1").code, 4);
        let lines = records(&bundle.log);
        assert_eq!(
            lines.last().map(String::as_str),
            Some("stdout F 33 77\r"),
            "{lines:?}"
        );
        pod.shutdown();
        assert_eq!(
            pod.leftovers(),
            Vec::<String>::new(),
            "{}",
            runtime.display()
        );
    }
}

#[test]
fn a_rotated_log_goes_on_in_a_new_file() {
    if skip("a_rotated_log_goes_on_in_a_new_file") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let script = "printf before; read x; echo after; read x";
    let mut bundle = pod.bundle("c1", script);
    bundle.config["process"]["terminal"] = true.into();
    bundle.start.tty = true;
    bundle.config["process"]["args"] = serde_json::json!([
        "/bin/sh",
        "-c",
        "echo one; trap 'echo two' USR1; while :; do sleep 0.05; done"
    ]);
    pod.start(&bundle).unwrap();
    eventually("first line", || !records(&bundle.log).is_empty());
    let rotated = bundle.log.with_extension("log.1");
    std::fs::rename(&bundle.log, &rotated).unwrap();
    let reopen = || {
        request::Body::ReopenLog(v1::ReopenLog {
            container_id: "c1".into(),
        })
    };
    pod.daemon.ask(reopen()).unwrap();
    assert!(bundle.log.exists(), "the file is made at once");
    pod.signal("c1", 10, false).unwrap();
    eventually("second line", || records(&bundle.log) == ["stdout F two\r"]);
    assert_eq!(records(&rotated), ["stdout F one\r"]);
    pod.signal("c1", 9, false).unwrap();
    pod.daemon.exited("c1");
    let error = pod.daemon.ask(reopen()).unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::FailedPrecondition);
    pod.shutdown();
}

#[test]
fn a_flood_is_logged_whole_and_memory_stays() {
    if skip("a_flood_is_logged_whole_and_memory_stays") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let bundle = pod.run("c1", "seq 1 300000; seq 1 1000 | tr '\\n' ' ' >&2");
    assert_eq!(pod.daemon.exited("c1").code, 0);
    let lines = records(&bundle.log);
    let out: Vec<_> = lines
        .iter()
        .filter_map(|line| line.strip_prefix("stdout F "))
        .collect();
    assert_eq!(out.len(), 300_000);
    assert!(
        out.iter()
            .enumerate()
            .all(|(at, line)| *line == (at + 1).to_string())
    );
    let tail: Vec<_> = lines
        .iter()
        .filter(|line| line.starts_with("stderr"))
        .collect();
    assert!(
        tail.len() == 1 && tail[0].starts_with("stderr P 1 2 3 ") && tail[0].ends_with("1000 ")
    );
    let peak = pod.anonymous_memory();
    assert!(peak < 1024, "{peak} KiB of anonymous memory");
    pod.shutdown();
}

#[test]
fn grandchildren_with_the_pipes_do_not_hold_the_exit() {
    if skip("grandchildren_with_the_pipes_do_not_hold_the_exit") {
        return;
    }
    for (kill, id) in [(false, "left"), (true, "killed")] {
        let mut pod = crate::common::boot(Path::new(RUNC), |bootstrap, _| {
            bootstrap.holder.as_mut().unwrap().new_pid = true;
        })
        .unwrap();
        let mut bundle = pod.bundle(id, "setsid sleep 600 & sleep 0.1; exit 5");
        let pin = pod.run_dir().join("ns/pid");
        bundle.config["linux"]["namespaces"][0]["path"] = pin.to_str().unwrap().into();
        let cgroup = memory_mount().join(&pod.name).join(id);
        bundle.start.cgroup_dir = cgroup.to_str().unwrap().into();
        bundle.start.kill_cgroup_on_exit = kill;
        pod.start(&bundle).unwrap();
        assert_eq!(pod.daemon.exited(id).code, 5);
        let procs = || std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        if kill {
            eventually("the rest is killed and deleted", || !cgroup.exists());
        } else {
            assert_eq!(procs().lines().count(), 1, "{}", procs());
        }
        pod.delete(id);
        // The holder is PID 1 there: it must not leave zombies.
        let zombies = |pid: i32| {
            let all = std::fs::read_dir("/proc").unwrap().flatten();
            all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
                .filter_map(|other| Stat::read(other).ok())
                .filter(|stat| stat.ppid == pid)
                .count()
        };
        eventually("orphans are reaped", || zombies(pod.holder.pid) == 0);
        pod.shutdown();
        assert_eq!(pod.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn memory_exhaustion_is_reported_with_the_kill_alone() {
    if skip("memory_exhaustion_is_reported_with_the_kill_alone") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        // The first process is struck; a child is struck and the first process ends by itself;
        // nobody is struck and the first process is killed.
        for (id, script, code, oom) in [
            ("first", "x=a; while :; do x=$x$x; done", 137, true),
            (
                "child",
                "sh -c 'x=a; while :; do x=$x$x; done'; exit 3",
                3,
                false,
            ),
            ("none", "kill -9 $$; sleep 600", 137, false),
        ] {
            let mut bundle = pod.bundle(id, script);
            if id == "none" {
                // As PID 1 it could not kill itself.
                let pin = format!("/proc/{}/ns/pid", pod.shim.pid);
                bundle.config["linux"]["namespaces"][0]["path"] = pin.into();
            }
            bundle.config["linux"]["resources"]["memory"] =
                serde_json::json!({"limit": 32 << 20, "swap": 32 << 20});
            let cgroup = memory_mount().join(&pod.name).join(id);
            let file = ["memory.oom_control", "memory.events"]
                .into_iter()
                .find(|name| {
                    memory_mount().join("memory.oom_control").exists()
                        == (*name == "memory.oom_control")
                })
                .unwrap();
            bundle.start.oom_file = cgroup.join(file).to_str().unwrap().into();
            pod.start(&bundle).unwrap();
            let exit = pod.daemon.exited(id);
            assert_eq!(
                (exit.code, exit.oom_killed),
                (code, oom),
                "{id} {}",
                runtime.display()
            );
            pod.delete(id);
        }
        pod.shutdown();
        assert_eq!(pod.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn containers_go_on_without_a_daemon() {
    if skip("containers_go_on_without_a_daemon") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let bundle = pod.run("c1", "sleep 0.3; echo alone; exit 6");
    pod.daemon
        .stream
        .shutdown(std::net::Shutdown::Both)
        .unwrap();
    let exit = Path::new(&bundle.start.bundle).join("exit");
    eventually("the exit is on disk", || exit.exists());
    assert_eq!(records(&bundle.log), ["stdout F alone"]);
    pod.daemon = Daemon::connect(&pod.socket());
    pod.daemon.greet();
    let state = pod.daemon.state();
    assert_eq!(state.containers[0].exit.unwrap().code, 6);
    let ack = v1::Ack {
        container_id: "c1".into(),
    };
    assert!(matches!(
        pod.daemon.ask(request::Body::Ack(ack)),
        Ok(message::Body::Done(_))
    ));
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn a_signal_to_all_reaches_the_cgroup() {
    if skip("a_signal_to_all_reaches_the_cgroup") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let script = "trap 'echo parent' USR1; sh -c \"trap 'echo child' USR1; echo up; \
                  while :; do sleep 0.05; done\" & while :; do sleep 0.05; done";
    let mut bundle = pod.bundle("c1", script);
    let cgroup = memory_mount().join(&pod.name).join("c1");
    bundle.start.cgroup_dir = cgroup.to_str().unwrap().into();
    pod.start(&bundle).unwrap();
    eventually("both are up", || !records(&bundle.log).is_empty());
    pod.signal("c1", 10, true).unwrap();
    eventually("both got it", || {
        let lines = records(&bundle.log);
        lines.iter().any(|l| l.ends_with("parent")) && lines.iter().any(|l| l.ends_with("child"))
    });
    let error = pod.signal("c1", 99, false).unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::InvalidArgument);
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn resources_are_updated() {
    if skip("resources_are_updated") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        let mut bundle = pod.bundle("c1", "sleep 600");
        bundle.config["linux"]["resources"]["memory"] = serde_json::json!({"limit": 64 << 20});
        pod.start(&bundle).unwrap();
        let update = |json: &str| {
            request::Body::Update(v1::Update {
                container_id: "c1".into(),
                resources_json: json.as_bytes().to_vec(),
            })
        };
        let body = update(r#"{"memory":{"limit":134217728}}"#);
        assert!(matches!(pod.daemon.ask(body), Ok(message::Body::Done(_))));
        let cgroup = memory_mount().join(&pod.name).join("c1");
        let limit = ["memory.limit_in_bytes", "memory.max"]
            .iter()
            .find_map(|name| std::fs::read_to_string(cgroup.join(name)).ok())
            .unwrap();
        assert_eq!(limit.trim(), "134217728", "{}", runtime.display());
        let error = pod.daemon.ask(update("nonsense")).unwrap_err();
        assert_eq!(error.kind(), v1::ErrorKind::Runtime);
        assert!(!error.message.is_empty());
        pod.shutdown();
        assert_eq!(
            pod.leftovers(),
            Vec::<String>::new(),
            "{}",
            runtime.display()
        );
    }
}

#[test]
fn shutdown_takes_running_containers_along() {
    if skip("shutdown_takes_running_containers_along") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        let mut processes = Vec::new();
        for n in 0..3 {
            let bundle = pod.bundle(&format!("c{n}"), "trap '' TERM; sleep 600");
            processes.push(pod.start(&bundle).unwrap());
        }
        pod.shutdown();
        assert!(processes.iter().all(|&process| !alive(process.into())));
        assert_eq!(
            pod.leftovers(),
            Vec::<String>::new(),
            "{}",
            runtime.display()
        );
    }
}

#[test]
fn what_a_container_inherits_is_clean() {
    if skip("what_a_container_inherits_is_clean") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        let script = "ls=$(echo /proc/self/fd/*); echo $ls; cat /proc/self/status; exit 0";
        let bundle = pod.run("c1", script);
        pod.daemon.exited("c1");
        let lines = records(&bundle.log);
        // 3 is the directory itself.
        let fds = &lines[0];
        assert!(!fds.contains("/fd/4"), "{fds}");
        let field = |name: &str| {
            let prefix = format!("stdout F {name}:\t");
            let line = lines.iter().find_map(|line| line.strip_prefix(&prefix));
            line.unwrap_or_else(|| panic!("{name}: {lines:?}"))
                .to_owned()
        };
        // Signals above 31 are the C library's own, and whoever runs the tests may ignore some.
        for mask in ["SigBlk", "SigIgn"] {
            let mask = u64::from_str_radix(&field(mask), 16).unwrap();
            assert_eq!(mask & 0x7fff_ffff, 0, "{mask:x}");
        }
        assert_eq!(field("THP_enabled"), "1");
        pod.shutdown();
    }
}

#[test]
fn events_of_containers_side_by_side_are_all_told() {
    if skip("events_of_containers_side_by_side_are_all_told") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let mut asked = Vec::new();
    for n in 0..8 {
        let bundle = pod.bundle(&format!("c{n}"), &format!("echo {n}; exit {n}"));
        let path = Path::new(&bundle.start.bundle).join("config.json");
        std::fs::write(path, bundle.config.to_string()).unwrap();
        asked.push(
            pod.daemon
                .send(Some(request::Body::Start(bundle.start.clone())), &[]),
        );
    }
    let mut codes = Vec::new();
    let mut started = 0;
    while codes.len() < 8 || started < 8 {
        let (message, _) = pod.daemon.try_receive().unwrap();
        match message.body.unwrap() {
            message::Body::Started(_) => started += 1,
            message::Body::Event(v1::Event {
                body: Some(event::Body::Exited(exited)),
            }) => {
                codes.push(exited.exit.unwrap().code);
            }
            other => panic!("{other:?}"),
        }
    }
    codes.sort_unstable();
    assert_eq!(codes, (0..8).collect::<Vec<_>>());
    std::thread::sleep(Duration::from_millis(1));
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn a_container_joins_the_pods_user_namespace() {
    use std::os::unix::fs::{PermissionsExt, chown};
    if skip("a_container_joins_the_pods_user_namespace") {
        return;
    }
    const BASE: u32 = 200_000;
    for runtime in runtimes() {
        let mut pod = crate::common::boot(&runtime, |bootstrap, dir| {
            // The mapped root must be able to walk to its root file system.
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711)).unwrap();
            let holder = bootstrap.holder.as_mut().unwrap();
            let map = v1::IdMapping {
                container_id: 0,
                host_id: BASE,
                length: 65_536,
            };
            holder.uid_mappings = vec![map];
            holder.gid_mappings = vec![map];
        })
        .unwrap();
        let script = "cat /proc/self/uid_map; hostname; exit 8";
        let mut bundle = pod.bundle("c1", script);
        let rootfs = Path::new(&bundle.start.bundle).join("rootfs");
        for sub in ["", "proc", "dev", "sys", "tmp"] {
            chown(rootfs.join(sub), Some(BASE), Some(BASE)).unwrap();
        }
        let map = serde_json::json!([{"containerID": 0, "hostID": BASE, "size": 65_536}]);
        let linux = &mut bundle.config["linux"];
        linux["uidMappings"] = map.clone();
        linux["gidMappings"] = map;
        let user = serde_json::json!({"type": "user", "path": pod.run_dir().join("ns/user")});
        linux["namespaces"].as_array_mut().unwrap().push(user);
        linux["resources"] = serde_json::json!({});
        pod.start(&bundle).unwrap();
        assert_eq!(pod.daemon.exited("c1").code, 8);
        let lines = records(&bundle.log);
        let words: Vec<_> = lines[0].split_whitespace().skip(2).collect();
        assert_eq!(words, ["0", "200000", "65536"]);
        assert_eq!(lines[1], "stdout F pod-host");
        pod.shutdown();
        assert_eq!(pod.leftovers(), Vec::<String>::new());
    }
}
