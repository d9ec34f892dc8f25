//! Runtimes that hang, lie or are not there.

use std::path::Path;
use std::time::Instant;

use gantry_shim_api::v1::{self, message, request};
use gantry_sys::process::{alive, process_ref};

use crate::common::{PATIENCE, Pod, boot, eventually, pod, records, script_runtime, skip};

/// A pod whose runtime is a script; `timeout_ms` is the deadline of a call.
fn scripted(name: &str, timeout_ms: u32, body: &str) -> (tempfile::TempDir, Pod) {
    let dir = tempfile::tempdir().unwrap();
    let runtime = script_runtime(dir.path(), name, body);
    let pod = boot(&runtime, |bootstrap, _| {
        bootstrap.runtime.as_mut().unwrap().timeout_ms = timeout_ms;
    });
    (dir, pod.unwrap())
}

/// `run` and `exec` that start a shell in the background, as a runtime does.
const WORKING: &str = r#"
case $command in
run|create) setsid sh -c "$(cat "$bundle/script")" & echo -n $! > "$pid_file" ;;
exec) setsid sh -c "$(cat "$process")" & echo -n $! > "$pid_file" ;;
esac
"#;

fn script(pod: &Pod, id: &str, script: &str) -> crate::common::Bundle {
    let bundle = pod.bundle(id, "");
    std::fs::write(Path::new(&bundle.start.bundle).join("script"), script).unwrap();
    bundle
}

#[test]
fn a_scripted_runtime_works() {
    if skip("a_scripted_runtime_works") {
        return;
    }
    // A flavour with one execution, and one with create and start.
    for name in ["fake-runc", "fake-other"] {
        let (_dir, mut pod) = scripted(name, 60_000, WORKING);
        let bundle = script(&pod, "c1", "echo hi; exit 3");
        pod.start(&bundle).unwrap();
        assert_eq!(pod.daemon.exited("c1").code, 3);
        assert_eq!(records(&bundle.log), ["stdout F hi"]);
        pod.delete("c1");
        pod.shutdown();
        assert_eq!(pod.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn a_hung_start_is_killed_with_its_helpers_and_undone() {
    if skip("a_hung_start_is_killed_with_its_helpers_and_undone") {
        return;
    }
    let body = r#"
case $command in
run) setsid sleep 600 & echo $! > "$bundle/helper"; sleep 600 ;;
delete) echo "$id" >> "$bundle/../deleted" ;;
esac
"#;
    // Enough for it to get to where it hangs.
    let (_dir, mut pod) = scripted("fake-runc", 5000, body);
    let bundle = script(&pod, "c1", "");
    let error = pod.start(&bundle).unwrap_err();
    assert_eq!(
        error.kind(),
        v1::ErrorKind::DeadlineExceeded,
        "{}",
        error.message
    );
    assert!(pod.daemon.state().containers.is_empty());
    let helper = std::fs::read_to_string(pod.dir.path().join("c1/helper")).unwrap();
    let helper: i32 = helper.trim().parse().unwrap();
    eventually("the helper is killed", || {
        process_ref(helper).map_or(true, |process| !alive(process))
    });
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn a_hung_runtime_delays_nobody_else() {
    if skip("a_hung_runtime_delays_nobody_else") {
        return;
    }
    let body = format!("case $id in hung) exec sleep 600 ;; esac\n{WORKING}");
    let (_dir, mut pod) = scripted("fake-runc", 3_600_000, &body);
    let hung = script(&pod, "hung", "");
    pod.daemon
        .send(Some(request::Body::Start(hung.start.clone())), &[]);
    let fine = script(&pod, "fine", "echo fine; sleep 600");
    let process = pod.start(&fine).unwrap();
    assert_eq!(pod.daemon.state().containers.len(), 2);
    let delete = v1::Delete {
        container_id: "hung".into(),
    };
    let error = pod.daemon.ask(request::Body::Delete(delete)).unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::FailedPrecondition);
    pod.signal("fine", 9, false).unwrap();
    assert_eq!(pod.daemon.exited("fine").code, 137);
    assert!(!alive(process.into()));
    // Its delete hangs for ever, and a shutdown cuts everything short.
    let started = Instant::now();
    let shutdown = pod
        .daemon
        .send(Some(request::Body::Shutdown(v1::Shutdown {})), &[]);
    loop {
        let (message, _) = pod.daemon.try_receive().unwrap();
        match (message.id, message.body) {
            (id, Some(message::Body::Done(_))) if id == shutdown => break,
            (0, _) | (_, Some(message::Body::Error(_))) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(started.elapsed() < PATIENCE);
    eventually("all is gone", || pod.leftovers().is_empty());
}

#[test]
fn a_runtime_that_lies_or_is_missing_fails_the_start() {
    if skip("a_runtime_that_lies_or_is_missing_fails_the_start") {
        return;
    }
    for (body, expected) in [
        ("exit 0", "pid"),
        ("[ $command = run ] && echo garbage > $pid_file", "garbage"),
        ("[ $command = run ] && echo 1 > $pid_file", "\"1\\n\""),
        ("echo nonsense > $log; exit 5", "code 5"),
        ("kill -9 $$", "signal 9"),
        (
            "echo '{\"level\":\"error\",\"msg\":\"my words\"}' > $log; exit 1",
            "my words",
        ),
    ] {
        let (_dir, mut pod) = scripted("fake-runc", 60_000, body);
        let fds = pod.fd_count();
        let bundle = script(&pod, "c1", "");
        let error = pod.start(&bundle).unwrap_err();
        assert!(
            error.message.contains(expected),
            "{body}: {}",
            error.message
        );
        assert_eq!(pod.fd_count(), fds);
        pod.shutdown();
    }
    let mut pod = pod(Path::new("/nonexistent/runc"));
    let bundle = pod.bundle("c1", "");
    let error = pod.start(&bundle).unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::Runtime);
    assert!(
        error.message.contains("/nonexistent/runc"),
        "{}",
        error.message
    );
    assert!(pod.daemon.state().containers.is_empty());
    pod.shutdown();
}

#[test]
fn a_log_that_cannot_be_opened_fails_the_start() {
    if skip("a_log_that_cannot_be_opened_fails_the_start") {
        return;
    }
    let (_dir, mut pod) = scripted("fake-runc", 60_000, WORKING);
    let mut bundle = script(&pod, "c1", "");
    bundle.start.log_path = "/proc/no/such/0.log".into();
    let error = pod.start(&bundle).unwrap_err();
    assert!(
        error.message.contains("/proc/no/such/0.log"),
        "{}",
        error.message
    );
    bundle.start.log_path = String::new();
    std::fs::write(
        pod.dir.path().join("c1/script"),
        "echo nobody hears; exit 2",
    )
    .unwrap();
    pod.start(&bundle).unwrap();
    assert_eq!(pod.daemon.exited("c1").code, 2);
    pod.shutdown();
}

#[test]
fn an_exec_whose_runtime_hangs_can_be_killed() {
    if skip("an_exec_whose_runtime_hangs_can_be_killed") {
        return;
    }
    let body = format!("case $command in exec) exec sleep 600 ;; esac\n{WORKING}");
    let (_dir, mut pod) = scripted("fake-runc", 3_600_000, &body);
    let bundle = script(&pod, "c1", "sleep 600");
    pod.start(&bundle).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let fd = std::os::fd::AsFd::as_fd(&null);
    let body = pod.exec_body("c1", "e1", "", false);
    let exec = pod.daemon.send(Some(body), &[fd, fd, fd]);
    let kill = v1::KillExec {
        container_id: "c1".into(),
        exec_id: "e1".into(),
    };
    pod.daemon.ask(request::Body::KillExec(kill)).unwrap();
    let error = pod.daemon.wait_for(exec).unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::DeadlineExceeded);
    pod.shutdown();
}

#[test]
fn a_process_of_an_exec_that_was_given_up_is_killed_however_late() {
    if skip("a_process_of_an_exec_that_was_given_up_is_killed_however_late") {
        return;
    }
    // Its process has left it and runs when the runtime is killed.
    let exec =
        "exec) sh -c 'setsid sleep 617 & echo $! >\"$1\"' sh \"$pid_file\"; exec sleep 600 ;;";
    let body = format!("case $command in {exec} esac\n{WORKING}");
    let (_dir, mut pod) = scripted("fake-runc", 3_600_000, &body);
    let bundle = script(&pod, "c1", "sleep 600");
    pod.start(&bundle).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let fd = std::os::fd::AsFd::as_fd(&null);
    let body = pod.exec_body("c1", "e1", "", false);
    let exec = pod.daemon.send(Some(body), &[fd, fd, fd]);
    let pid_file = Path::new(&bundle.start.bundle).join("exec-e1.pid");
    let mut pid = None;
    eventually("it runs", || {
        let text = std::fs::read_to_string(&pid_file).unwrap_or_default();
        pid = text.trim().parse().ok();
        pid.is_some()
    });
    let process = gantry_sys::process::process_ref(pid.unwrap()).unwrap();
    let kill = v1::KillExec {
        container_id: "c1".into(),
        exec_id: "e1".into(),
    };
    pod.daemon.ask(request::Body::KillExec(kill)).unwrap();
    let error = pod.daemon.wait_for(exec).unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::DeadlineExceeded);
    eventually("it is killed", || !gantry_sys::process::alive(process));
    pod.shutdown();
}
