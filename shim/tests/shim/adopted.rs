//! A shim dies, and another takes over what it had.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use gantry_shim_api::v1::{self, message, request};
use gantry_sys::process::alive;

use crate::common::{Bundle, Daemon, Pod, boot, eventually, pod, records, script_runtime, skip};

const RUNC: &str = "/usr/sbin/runc";

/// A container and what a daemon keeps of it.
struct Kept {
    bundle: Bundle,
    process: v1::Process,
    has: v1::InCustody,
    fds: Vec<OwnedFd>,
    execs: Vec<v1::Process>,
}

fn keep(pod: &mut Pod, bundle: Bundle) -> Kept {
    let process = pod.start(&bundle).unwrap();
    let (has, fds) = pod.custody(&bundle.start.container_id).unwrap();
    Kept {
        bundle,
        process,
        has,
        fds,
        execs: Vec::new(),
    }
}

fn request_of(kept: &Kept) -> request::Body {
    request::Body::Adopt(v1::Adopt {
        start: Some(kept.bundle.start.clone()),
        process: Some(kept.process),
        started_at: 77,
        has: Some(kept.has),
        execs: kept.execs.clone(),
    })
}

fn adopt(daemon: &mut Daemon, kept: &Kept) -> Result<(), v1::Error> {
    let fds: Vec<_> = kept.fds.iter().map(AsFd::as_fd).collect();
    match daemon.ask_with(request_of(kept), &fds)?.0 {
        message::Body::Done(_) => Ok(()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn containers_go_on_under_the_next_shim() {
    if skip("containers_go_on_under_the_next_shim") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    pod.keep_holder();
    let line = "n=$((n+1)); echo line $n; sleep 0.01";
    let script = format!("n=0; until [ -e /tmp/end ]; do {line}; done; exit 7");
    let bundle = pod.bundle("count", &script);
    let counting = keep(&mut pod, bundle);
    let mut bundle = pod.bundle("read", "read x; echo got $x; read x; exit 3");
    bundle.start.stdin = true;
    let reading = keep(&mut pod, bundle);
    let mut bundle = pod.bundle("once", "cat; exit 5");
    (bundle.start.stdin, bundle.start.stdin_once) = (true, true);
    let once = keep(&mut pod, bundle);
    let mut bundle = pod.bundle("tty", "stty size; read x; stty size; exit 4");
    (bundle.start.tty, bundle.start.stdin) = (true, true);
    bundle.config["process"]["terminal"] = true.into();
    let tty = keep(&mut pod, bundle);
    let all = v1::InCustody {
        process: true,
        stdout: true,
        stderr: true,
        stdin: true,
    };
    assert_eq!(reading.has, all);
    let no_stdin = v1::InCustody {
        stdin: false,
        ..all
    };
    assert_eq!((counting.has, once.has), (no_stdin, no_stdin));
    let terminal = v1::InCustody {
        stderr: false,
        ..no_stdin
    };
    assert_eq!(tty.has, terminal);

    for round in 0..2 {
        let before = records(&counting.bundle.log).len();
        pod.kill_shim();
        pod.next_shim().unwrap();
        for kept in [&counting, &reading, &once, &tty] {
            if pod.daemon.state().containers.len() < 4 {
                adopt(&mut pod.daemon, kept).unwrap();
            }
        }
        if round == 0 {
            // Nobody holds its input any more: it has ended.
            assert_eq!(pod.daemon.exited("once").code, 5);
            eventually("lines", || {
                records(&counting.bundle.log).len() > before + 20
            });
            let exec = pod.exec("count", "e", "exit 9").unwrap();
            assert_eq!(pod.daemon.exec_exited("e"), 9);
            assert!(!alive(exec.process.into()));
        }
    }
    let state = pod.daemon.state();
    let seen = state.containers.iter().find(|seen| seen.id == "count");
    let seen = seen.unwrap();
    assert_eq!(
        (seen.process, seen.started_at),
        (Some(counting.process), 77)
    );
    // Its input has one writer more, and its terminal is the same.
    let mut writer = std::fs::File::from(reading.fds[3].try_clone().unwrap());
    writer.write_all(b"word\n").unwrap();
    eventually("it reads", || {
        records(&reading.bundle.log).contains(&"stdout F got word".to_owned())
    });
    writer.write_all(b"end\n").unwrap();
    assert_eq!(pod.daemon.exited("read").code, 3);
    let resize = v1::ResizePty {
        container_id: "tty".into(),
        exec_id: String::new(),
        width: 77,
        height: 33,
    };
    pod.daemon.ask(request::Body::ResizePty(resize)).unwrap();
    let mut writer = std::fs::File::from(tty.fds[1].try_clone().unwrap());
    writer.write_all(b"\n").unwrap();
    assert_eq!(pod.daemon.exited("tty").code, 4);
    let lines = records(&tty.bundle.log);
    assert!(lines.iter().any(|line| line.contains("33 77")), "{lines:?}");
    let end = Path::new(&counting.bundle.start.bundle).join("rootfs/tmp/end");
    std::fs::write(end, "").unwrap();
    // The count is whole but for what was read and not written, which is a line or none each time.
    assert_eq!(pod.daemon.exited("count").code, 7);
    let lines = records(&counting.bundle.log);
    let numbers: Vec<u32> = lines
        .iter()
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    let counted = *numbers.last().unwrap() as usize;
    assert!(numbers.len() + 2 >= counted, "{numbers:?}");
    // The daemon lets go.
    drop((counting, reading, once, tty));
    for id in ["count", "read", "once", "tty"] {
        pod.delete(id);
    }
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn duplicates_of_ended_streams_do_not_keep_the_shim_busy() {
    if skip("duplicates_of_ended_streams_do_not_keep_the_shim_busy") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let bundle = pod.bundle("c1", "read x; exec >&- 2>&-; sleep 1000");
    let mut bundle = bundle;
    bundle.start.stdin = true;
    let kept = keep(&mut pod, bundle);
    let mut writer = std::fs::File::from(kept.fds[3].try_clone().unwrap());
    writer.write_all(b"\n").unwrap();
    eventually("its streams end", || {
        let (has, _) = pod.custody("c1").unwrap();
        !has.stdout && !has.stderr
    });
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pod.shim.pid)).unwrap();
        let fields: Vec<u64> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split(' ')
            .filter_map(|field| field.parse().ok())
            .collect();
        // utime and stime: 14 and 15, of which the first two are before the parenthesis and the
        // third is a letter.
        fields[10] + fields[11]
    };
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let before = ticks();
    std::thread::sleep(std::time::Duration::from_millis(1000));
    assert!(ticks() - before <= 2, "it is awake");
    pod.signal("c1", 9, false).unwrap();
    pod.daemon.exited("c1");
    let error = pod.custody("c1").unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::FailedPrecondition);
    drop(kept);
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn an_end_in_the_gap_is_learnt_with_all_that_was_written() {
    if skip("an_end_in_the_gap_is_learnt_with_all_that_was_written") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    pod.keep_holder();
    let mut kept = Vec::new();
    for (id, end) in [
        ("zero", "exit 0"),
        ("seven", "exit 7"),
        ("signal", "kill -9 $$"),
    ] {
        let mut bundle = pod.bundle(id, &format!("read x; echo last words; {end}"));
        bundle.start.stdin = true;
        // Else the kernel shields it from its own signal.
        let namespaces = bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "pid");
        kept.push(keep(&mut pod, bundle));
    }
    pod.kill_shim();
    for kept in &kept {
        let mut writer = std::fs::File::from(kept.fds[3].try_clone().unwrap());
        writer.write_all(b"\n").unwrap();
    }
    eventually("they end", || {
        kept.iter().all(|kept| !alive(kept.process.into()))
    });
    pod.next_shim().unwrap();
    for kept in &kept {
        adopt(&mut pod.daemon, kept).unwrap();
    }
    let codes = ["zero", "seven", "signal"].map(|id| {
        let exit = loop {
            let state = pod.daemon.state();
            let seen = state.containers.iter().find(|seen| seen.id == id);
            if let Some(exit) = seen.unwrap().exit {
                break exit;
            }
        };
        (exit.code, exit.unknown)
    });
    if codes[0].1 {
        println!("SKIP codes of reaped processes: this kernel keeps none");
        assert_eq!(codes, [(255, true); 3]);
    } else {
        assert_eq!(codes, [(0, false), (7, false), (137, false)]);
    }
    for kept in &kept {
        assert_eq!(records(&kept.bundle.log), ["stdout F last words"]);
    }
    for id in ["zero", "seven", "signal"] {
        pod.delete(id);
    }
    drop(kept);
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn an_exit_that_was_written_and_not_told_is_told() {
    if skip("an_exit_that_was_written_and_not_told_is_told") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    pod.keep_holder();
    let mut bundle = pod.bundle("c1", "read x; exit 6");
    bundle.start.stdin = true;
    let kept = keep(&mut pod, bundle);
    let mut writer = std::fs::File::from(kept.fds[3].try_clone().unwrap());
    writer.write_all(b"\n").unwrap();
    let told = pod.daemon.exited("c1");
    pod.kill_shim();
    pod.next_shim().unwrap();
    adopt(&mut pod.daemon, &kept).unwrap();
    assert_eq!(pod.daemon.exited("c1"), told);
    pod.delete("c1");
    drop(kept);
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn execs_of_the_dead_shim_are_killed() {
    if skip("execs_of_the_dead_shim_are_killed") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    pod.keep_holder();
    let mut bundle = pod.bundle("c1", "sleep 1000");
    let cgroup = crate::common::memory_mount().join(&pod.name).join("c1");
    bundle.start.cgroup_dir = cgroup.to_str().unwrap().into();
    let mut kept = keep(&mut pod, bundle);
    let told = pod.exec("c1", "told", "sleep 1000 & sleep 1000").unwrap();
    let untold = pod.exec("c1", "untold", "sleep 1000").unwrap();
    kept.execs = vec![told.process];
    // As a shim leaves it that dies between the end of the runtime and its answer.
    let bundle = Path::new(&kept.bundle.start.bundle);
    let pid_file = bundle.join("exec-untold.pid");
    std::fs::write(&pid_file, untold.process.pid.to_string()).unwrap();
    // A number that is nobody's in the container: ours.
    let stranger = bundle.join("exec-stranger.pid");
    std::fs::write(&stranger, std::process::id().to_string()).unwrap();
    pod.kill_shim();
    pod.next_shim().unwrap();
    adopt(&mut pod.daemon, &kept).unwrap();
    for process in [told.process, untold.process] {
        eventually("it is killed", || !alive(process.into()));
    }
    assert!(alive(kept.process.into()));
    assert!(!pid_file.exists() && !stranger.exists());
    drop(kept);
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn what_cannot_be_adopted_is_refused() {
    if skip("what_cannot_be_adopted_is_refused") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    pod.keep_holder();
    let bundle = pod.bundle("c1", "sleep 1000");
    let mut kept = keep(&mut pod, bundle);
    // The shim that started it has it.
    let error = adopt(&mut pod.daemon, &kept).unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::AlreadyExists);
    pod.kill_shim();
    pod.next_shim().unwrap();
    let error = pod.daemon.ask(request_of(&kept)).unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::InvalidArgument);
    assert!(error.message.contains("3 descriptors, 0 came"), "{error:?}");
    for body in [
        v1::Adopt::default(),
        v1::Adopt {
            start: Some(kept.bundle.start.clone()),
            ..Default::default()
        },
        v1::Adopt {
            start: Some(kept.bundle.start.clone()),
            process: Some(kept.process),
            ..Default::default()
        },
        v1::Adopt {
            start: Some(v1::Start {
                bundle: "relative".into(),
                ..kept.bundle.start.clone()
            }),
            process: Some(kept.process),
            ..Default::default()
        },
    ] {
        let error = pod.daemon.ask(request::Body::Adopt(body)).unwrap_err();
        assert_eq!(error.kind(), v1::ErrorKind::InvalidArgument, "{error:?}");
    }
    assert!(pod.daemon.state().containers.is_empty());
    kept.bundle.start.log_path = "/proc/no/such/0.log".into();
    let error = adopt(&mut pod.daemon, &kept).unwrap_err();
    assert!(error.message.contains("/proc/no/such/0.log"), "{error:?}");
    kept.bundle.start.log_path = String::new();
    adopt(&mut pod.daemon, &kept).unwrap();
    drop(kept);
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn a_pod_whose_holder_has_died_is_not_adopted() {
    if skip("a_pod_whose_holder_has_died_is_not_adopted") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    pod.kill_shim();
    eventually("the holder dies", || !alive(pod.holder.into()));
    let error = pod.next_shim().unwrap_err();
    assert!(error.contains("holder"), "{error}");
    // An end that comes later is told.
    let mut pod = crate::common::pod(Path::new(RUNC));
    pod.keep_holder();
    pod.kill_shim();
    pod.next_shim().unwrap();
    let holder = gantry_sys::pidfd::PidFd::open_process(pod.holder.into()).unwrap();
    holder.signal(9).unwrap();
    assert!(matches!(
        pod.daemon.event(),
        v1::event::Body::HolderExited(_)
    ));
    assert_eq!(pod.daemon.state().holder, None);
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

/// Containers inherit the soft limit of open files that the daemon had, not the one that it needs.
#[test]
fn the_runtime_inherits_the_limit_of_open_files_that_is_told() {
    if skip("the_runtime_inherits_the_limit_of_open_files_that_is_told") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let body = "ulimit -n > \"$bundle/limit\"; exit 1";
    let runtime = script_runtime(dir.path(), "fake-runc", body);
    let mut pod = boot(&runtime, |bootstrap, _| bootstrap.open_files = 333).unwrap();
    let bundle = pod.bundle("c1", "");
    pod.start(&bundle).unwrap_err();
    let limit = Path::new(&bundle.start.bundle).join("limit");
    assert_eq!(std::fs::read_to_string(limit).unwrap(), "333\n");
    pod.shutdown();
}
