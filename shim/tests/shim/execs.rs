//! Processes run in a running container.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use gantry_shim_api::v1::{self, message, request};
use gantry_sys::process::{alive, process_ref};

use crate::common::{Daemon, Exec, Pod, eventually, memory_mount, pod, runtimes, skip};

const RUNC: &str = "/usr/sbin/runc";

fn kill_exec(pod: &mut Pod, exec: &str) {
    let body = v1::KillExec {
        container_id: "c1".into(),
        exec_id: exec.into(),
    };
    let answer = pod.daemon.ask(request::Body::KillExec(body));
    assert!(matches!(answer, Ok(message::Body::Done(_))), "{answer:?}");
}

fn text(mut from: std::fs::File) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn an_exec_talks_through_the_callers_descriptors() {
    if skip("an_exec_talks_through_the_callers_descriptors") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        pod.run("c1", "sleep 600");
        let fds = pod.fd_count();
        let mut exec = pod
            .exec("c1", "e1", "read x; echo got $x; echo bad >&2; exit 9")
            .unwrap();
        assert!(alive(exec.process.into()));
        let again = pod.exec("c1", "e1", "true").err().unwrap();
        assert_eq!(again.kind(), v1::ErrorKind::AlreadyExists);
        exec.stdin.write_all(b"hello\n").unwrap();
        assert_eq!(text(exec.stdout), "got hello\n");
        assert_eq!(text(exec.stderr), "bad\n");
        assert_eq!(pod.daemon.exec_exited("e1"), 9);
        eventually("nothing is left open", || pod.fd_count() == fds);
        let bundle = pod.dir.path().join("c1");
        let left: Vec<_> = std::fs::read_dir(bundle)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !["rootfs", "config.json", "pid"].contains(&name.as_str()))
            .collect();
        assert_eq!(left, Vec::<String>::new());
        pod.shutdown();
        assert_eq!(pod.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn an_exec_that_cannot_start_says_why() {
    if skip("an_exec_that_cannot_start_says_why") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        pod.run("c1", "sleep 600");
        let body = match pod.exec_body("c1", "e1", "", false) {
            request::Body::Exec(mut exec) => {
                exec.process_json = String::from_utf8(exec.process_json)
                    .unwrap()
                    .replace("/bin/sh", "/bin/no-such-command")
                    .into_bytes();
                request::Body::Exec(exec)
            }
            other => other,
        };
        let null = std::fs::File::open("/dev/null").unwrap();
        let fd = std::os::fd::AsFd::as_fd(&null);
        let error = pod
            .daemon
            .ask_with(body.clone(), &[fd, fd, fd])
            .unwrap_err();
        assert_eq!(error.kind(), v1::ErrorKind::Runtime);
        assert!(
            error.message.contains("no-such-command"),
            "{}",
            error.message
        );
        let error = pod.daemon.ask(body).unwrap_err();
        assert_eq!(
            error.kind(),
            v1::ErrorKind::InvalidArgument,
            "without descriptors"
        );
        let error = pod.exec("c2", "e1", "true").err().unwrap();
        assert_eq!(error.kind(), v1::ErrorKind::NotFound);
        pod.signal("c1", 9, false).unwrap();
        pod.daemon.exited("c1");
        let error = pod.exec("c1", "e1", "true").err().unwrap();
        assert_eq!(error.kind(), v1::ErrorKind::FailedPrecondition);
        pod.shutdown();
    }
}

#[test]
fn a_killed_exec_takes_its_tree_along_and_nobody_else() {
    if skip("a_killed_exec_takes_its_tree_along_and_nobody_else") {
        return;
    }
    for with_cgroup in [true, false] {
        let mut pod = pod(Path::new(RUNC));
        let mut bundle = pod.bundle("c1", "sleep 600");
        let cgroup = memory_mount().join(&pod.name).join("c1");
        if with_cgroup {
            bundle.start.cgroup_dir = cgroup.to_str().unwrap().into();
        }
        let first = pod.start(&bundle).unwrap();
        // Children: plain, in a session of its own, and one whose parent has ended.
        let script = "sleep 601 & setsid sleep 602 & (sleep 603 &); echo up; wait";
        let mut exec = pod.exec("c1", "e1", script).unwrap();
        let bystander = pod.exec("c1", "e2", "sleep 604").unwrap();
        let mut up = [0; 3];
        exec.stdout.read_exact(&mut up).unwrap();
        let others = || {
            let text = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
            let all = text
                .lines()
                .filter_map(|pid| process_ref(pid.parse().ok()?).ok());
            all.filter(|p| ![first.pid, bystander.process.pid].contains(&p.pid))
                .count()
        };
        assert_eq!(others(), 4);
        kill_exec(&mut pod, "e1");
        assert_eq!(pod.daemon.exec_exited("e1"), 137);
        // Its output ends, as nobody holds it any more.
        assert_eq!(text(exec.stdout), "");
        eventually("the tree is gone", || others() == 0);
        assert!(alive(first.into()) && alive(bystander.process.into()));
        kill_exec(&mut pod, "e1");
        kill_exec(&mut pod, "unknown");
        pod.shutdown();
        assert_eq!(pod.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn what_an_ended_exec_left_behind_can_still_be_killed() {
    if skip("what_an_ended_exec_left_behind_can_still_be_killed") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    pod.run("c1", "sleep 600");
    let exec = pod.exec("c1", "e1", "sleep 601 & exit 2").unwrap();
    assert_eq!(pod.daemon.exec_exited("e1"), 2);
    kill_exec(&mut pod, "e1");
    assert_eq!(text(exec.stdout), "");
    pod.shutdown();
}

/// The request for an exec that is bound to its connection.
fn bound(pod: &Pod, exec: &str, script: &str, grace_ms: u32) -> request::Body {
    match pod.exec_body("c1", exec, script, false) {
        request::Body::Exec(exec) => request::Body::Exec(v1::Exec {
            grace_ms: Some(grace_ms),
            ..exec
        }),
        other => other,
    }
}

#[test]
fn an_exec_whose_daemon_is_gone_is_ended_with_its_tree() {
    if skip("an_exec_whose_daemon_is_gone_is_ended_with_its_tree") {
        return;
    }
    const GRACE: Duration = Duration::from_millis(1500);
    let mut pod = pod(Path::new(RUNC));
    pod.run("c1", "sleep 600");
    let up = |exec: &mut Exec| exec.stdout.read_exact(&mut [0; 3]).unwrap();
    let script = "sleep 601 & setsid sleep 602 & echo up; wait";
    let body = bound(&pod, "stubborn", script, GRACE.as_millis() as u32);
    let mut stubborn = pod.exec_as(body).unwrap();
    up(&mut stubborn);
    // It ends by itself, and leaves one behind.
    let body = bound(&pod, "polite", "sleep 603 & echo up; read x", 600_000);
    let mut polite = pod.exec_as(body).unwrap();
    up(&mut polite);
    // As older daemons ask.
    let free = pod.exec("c1", "free", "sleep 604").unwrap();
    // One that does not run yet when its daemon goes.
    let (mut output, theirs) = std::io::pipe().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let fds = [null.as_fd(), theirs.as_fd(), theirs.as_fd()];
    let body = bound(&pod, "late", "sleep 605 & echo up; wait", 0);
    pod.daemon.send(Some(body), &fds);
    drop(theirs);

    let gone = Instant::now();
    pod.daemon = Daemon::connect(&pod.socket());
    pod.daemon.greet();
    drop(polite.stdin);
    assert_eq!(text(polite.stdout), "", "what it left holds its output");
    // Whoever holds it has ended.
    output.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(text(stubborn.stdout), "");
    assert!(gone.elapsed() >= GRACE, "{:?}", gone.elapsed());
    assert!(alive(free.process.into()));
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn an_exec_ends_with_its_container_and_is_told() {
    if skip("an_exec_ends_with_its_container_and_is_told") {
        return;
    }
    for own_pid_namespace in [true, false] {
        let mut pod = pod(Path::new(RUNC));
        let mut bundle = pod.bundle("c1", "sleep 600");
        if !own_pid_namespace {
            let namespaces = bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "pid");
            bundle.start.kill_cgroup_on_exit = true;
            let cgroup = memory_mount().join(&pod.name).join("c1");
            bundle.start.cgroup_dir = cgroup.to_str().unwrap().into();
        }
        pod.start(&bundle).unwrap();
        for n in 0..5 {
            pod.exec("c1", &format!("e{n}"), "sleep 601").unwrap();
        }
        pod.delete("c1");
        let mut ended = std::collections::BTreeMap::new();
        while ended.len() < 5 {
            if let v1::event::Body::ExecExited(exited) = pod.daemon.event() {
                ended.insert(exited.exec_id, exited.code);
            }
        }
        assert!(ended.values().all(|code| *code == 137), "{ended:?}");
        pod.shutdown();
        assert_eq!(pod.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn an_execs_terminal_goes_to_the_daemon() {
    if skip("an_execs_terminal_goes_to_the_daemon") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        pod.run("c1", "sleep 600");
        let fds = pod.fd_count();
        for n in 0..3 {
            let exec_id = format!("e{n}");
            let body = pod.exec_body("c1", &exec_id, "stty size; read x; echo got $x", true);
            let (started, fds) = pod.daemon.ask_with(body, &[]).unwrap();
            assert!(matches!(started, message::Body::Started(_)));
            let [master] = <[_; 1]>::try_from(fds).unwrap();
            assert!(gantry_sys::pty::is_terminal(&master));
            let mut master = std::fs::File::from(master);
            master.write_all(b"hello\n").unwrap();
            let mut seen = Vec::new();
            // EIO at the end.
            let _ = master.read_to_end(&mut seen);
            let seen = String::from_utf8(seen).unwrap();
            assert!(seen.contains("got hello"), "{seen}");
            assert_eq!(pod.daemon.exec_exited(&exec_id), 0);
        }
        eventually("nothing is left open", || pod.fd_count() == fds);
        assert_eq!(
            std::fs::read_dir(pod.run_dir()).unwrap().count(),
            2,
            "shim.sock and ns"
        );
        pod.shutdown();
    }
}

#[test]
fn a_hundred_execs_leave_no_descriptor_and_no_memory() {
    if skip("a_hundred_execs_leave_no_descriptor_and_no_memory") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    pod.run("c1", "sleep 600");
    let round = |pod: &mut Pod, from: u32, count: u32| {
        for n in from..from + count {
            let exec_id = format!("e{n}");
            let exec = pod.exec("c1", &exec_id, "echo x").unwrap();
            assert_eq!(text(exec.stdout), "x\n");
            assert_eq!(pod.daemon.exec_exited(&exec_id), 0);
        }
    };
    round(&mut pod, 0, 20);
    let (fds, before) = (pod.fd_count(), pod.anonymous_memory());
    round(&mut pod, 20, 80);
    eventually("nothing is left open", || pod.fd_count() == fds);
    let after = pod.anonymous_memory();
    assert!(after <= before + 64, "{before} KiB, then {after} KiB");
    pod.shutdown();
}
