//! The pod itself: holder, namespaces, pins, connections, shutdown.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::common::{Daemon, boot, eventually, pod, records, skip};
use gantry_shim_api::v1::{self, event, message, request};
use gantry_sys::process::alive;

const RUNC: &str = "/usr/sbin/runc";

fn ns(pid: i32, name: &str) -> u64 {
    std::fs::metadata(format!("/proc/{pid}/ns/{name}"))
        .unwrap()
        .ino()
}

#[test]
fn the_holder_is_confined_and_its_namespaces_are_pinned() {
    if skip("the_holder_is_confined_and_its_namespaces_are_pinned") {
        return;
    }
    let mut pod = boot(Path::new(RUNC), |bootstrap, _| {
        let holder = bootstrap.holder.as_mut().unwrap();
        holder.new_pid = true;
        holder.sysctls = [
            ("net.ipv4.ip_forward".into(), "1".into()),
            ("kernel.shm_rmid_forced".into(), "1".into()),
        ]
        .into();
    })
    .unwrap();
    let (holder, me) = (pod.holder.pid, std::process::id() as i32);
    for name in ["net", "ipc", "uts", "mnt"] {
        assert_ne!(ns(holder, name), ns(me, name), "{name}");
    }
    assert_eq!(pod.netns.metadata().unwrap().ino(), ns(holder, "net"));
    for name in ["ipc", "uts", "pid"] {
        let pin = pod.run_dir().join("ns").join(name);
        assert_eq!(pin.metadata().unwrap().ino(), ns(holder, name), "{name}");
    }
    let status = std::fs::read_to_string(format!("/proc/{holder}/status")).unwrap();
    let field = |name: &str| {
        let line = status
            .lines()
            .find(|line| line.starts_with(&format!("{name}:")))
            .unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0, "{set}");
    }
    assert_eq!(
        (field("NoNewPrivs").as_str(), field("Seccomp").as_str()),
        ("1", "2")
    );
    assert_eq!(field("NSpid").split_whitespace().last().unwrap(), "1");
    let comm = std::fs::read_to_string(format!("/proc/{holder}/comm")).unwrap();
    assert_eq!(comm.trim(), "gantry-holder");
    assert_eq!(
        std::fs::read_dir(format!("/proc/{holder}/root"))
            .unwrap()
            .count(),
        0
    );
    let mounts = std::fs::read_to_string(format!("/proc/{holder}/mounts")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" ro,"), "{mounts}");
    // The network's sysfs, which is mounted nowhere, and what ends it with its shim.
    let open = || -> Vec<_> {
        std::fs::read_dir(format!("/proc/{holder}/fd"))
            .unwrap()
            .filter_map(|entry| std::fs::metadata(entry.unwrap().path()).ok())
            .collect()
    };
    assert_eq!(open().len(), 2, "{:?}", open());
    assert!(open()[0].is_dir(), "{:?}", open());
    assert!(open()[1].file_type().is_socket(), "{:?}", open());
    // Also for one who may trace it, the host's devices are not to be written to.
    let held = format!("/proc/{holder}/fd/0/class/net/lo/tx_queue_len");
    let error = std::fs::write(&held, "7").unwrap_err();
    assert_eq!(
        error.kind(),
        std::io::ErrorKind::ReadOnlyFilesystem,
        "{held}"
    );
    let seen = gantry_sys::namespace::in_netns(&pod.netns, || {
        let flags = std::fs::read_to_string("/sys/class/net/lo/flags").unwrap_or_default();
        (
            std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap(),
            flags,
        )
    })
    .unwrap();
    assert_eq!(seen.0.trim(), "1");
    // Not dumpable: with the same uid alone nobody gets at the shim's binary through it.
    let bundle = {
        let mut bundle = pod.bundle("c1", "cat /proc/1/comm; head -c 1 /proc/1/exe >/dev/null");
        let pin = pod.run_dir().join("ns/pid");
        bundle.config["linux"]["namespaces"][0]["path"] = pin.to_str().unwrap().into();
        bundle
    };
    pod.start(&bundle).unwrap();
    assert_ne!(pod.daemon.exited("c1").code, 0);
    let lines = records(&bundle.log);
    assert_eq!(lines[0], "stdout F gantry-holder");
    assert!(lines[1].contains("Permission denied"), "{lines:?}");
    let cmdline = std::fs::read(format!("/proc/{}/cmdline", pod.shim.pid)).unwrap();
    assert_eq!(cmdline, format!("gantry-shim\0{}\0", pod.name).into_bytes());
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn a_pod_of_the_host_has_only_its_own_mounts() {
    if skip("a_pod_of_the_host_has_only_its_own_mounts") {
        return;
    }
    let mut pod = boot(Path::new(RUNC), |bootstrap, _| {
        bootstrap.holder = Some(v1::Holder::default());
    })
    .unwrap();
    let me = std::process::id() as i32;
    for name in ["net", "ipc", "uts", "pid"] {
        assert_eq!(ns(pod.holder.pid, name), ns(me, name), "{name}");
    }
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn a_user_namespace_is_mapped_and_owns_the_others() {
    if skip("a_user_namespace_is_mapped_and_owns_the_others") {
        return;
    }
    let mut pod = boot(Path::new(RUNC), |bootstrap, _| {
        let holder = bootstrap.holder.as_mut().unwrap();
        let map = v1::IdMapping {
            container_id: 0,
            host_id: 200_000,
            length: 65_536,
        };
        holder.uid_mappings = vec![map];
        holder.gid_mappings = vec![map];
        holder.sysctls = [("net.ipv4.ip_unprivileged_port_start".into(), "80".into())].into();
    })
    .unwrap();
    let map = std::fs::read_to_string(format!("/proc/{}/uid_map", pod.holder.pid)).unwrap();
    assert_eq!(
        map.split_whitespace().collect::<Vec<_>>(),
        ["0", "200000", "65536"]
    );
    let status = std::fs::read_to_string(format!("/proc/{}/status", pod.holder.pid)).unwrap();
    assert!(
        status.contains("Uid:\t200000\t200000\t200000\t200000"),
        "{status}"
    );
    let pin = pod.run_dir().join("ns/user");
    assert_eq!(pin.metadata().unwrap().ino(), ns(pod.holder.pid, "user"));
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn a_bad_sysctl_is_named_and_leaves_nothing() {
    if skip("a_bad_sysctl_is_named_and_leaves_nothing") {
        return;
    }
    for name in ["net.ipv4.no_such_knob", "net.ipv4.ip_forward"] {
        let mut path = None;
        let error = boot(Path::new(RUNC), |bootstrap, dir| {
            let holder = bootstrap.holder.as_mut().unwrap();
            holder.sysctls = [(name.into(), "not a number".into())].into();
            path = Some(dir.join("netns"));
        })
        .err()
        .unwrap();
        assert!(
            error.contains(name) && error.contains("os error"),
            "{error}"
        );
        assert!(!path.unwrap().exists());
    }
}

#[test]
fn a_pin_in_the_way_is_an_error_and_not_overwritten() {
    if skip("a_pin_in_the_way_is_an_error_and_not_overwritten") {
        return;
    }
    let mut netns = None;
    let error = boot(Path::new(RUNC), |bootstrap, dir| {
        let path = dir.join("netns");
        std::fs::write(&path, "mine").unwrap();
        assert_eq!(
            bootstrap.holder.as_ref().unwrap().netns_path,
            path.to_str().unwrap()
        );
        netns = Some(std::fs::File::open(path).unwrap());
    })
    .err()
    .unwrap();
    assert!(error.contains("netns"), "{error}");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut netns.unwrap(), &mut text).unwrap();
    assert_eq!(text, "mine");
}

#[test]
fn a_wrong_bootstrap_is_refused() {
    if skip("a_wrong_bootstrap_is_refused") {
        return;
    }
    let error = boot(Path::new("runc"), |_, _| ()).err().unwrap();
    assert!(error.contains("absolute"), "{error}");
    let error = boot(Path::new(RUNC), |bootstrap, _| bootstrap.holder = None)
        .err()
        .unwrap();
    assert!(error.contains("holder"), "{error}");
    let error = boot(Path::new(RUNC), |bootstrap, _| {
        bootstrap.run_dir = "/nonexistent/dir".into()
    })
    .err()
    .unwrap();
    assert!(error.contains("/nonexistent/dir"), "{error}");
}

#[test]
fn holder_and_shim_join_their_cgroups_and_the_holders_go_with_it() {
    if skip("holder_and_shim_join_their_cgroups_and_the_holders_go_with_it") {
        return;
    }
    let mut mounts: Vec<_> = ["memory", "pids", "cpuset", "unified"]
        .map(|name| Path::new("/sys/fs/cgroup").join(name))
        .into_iter()
        .filter(|path| path.exists())
        .collect();
    if mounts.is_empty() {
        mounts.push("/sys/fs/cgroup".into());
    }
    let mut dirs: Vec<PathBuf> = Vec::new();
    let mut own: Vec<PathBuf> = Vec::new();
    let text = |dirs: &[PathBuf]| -> Vec<String> {
        let text = |dir: &PathBuf| dir.to_str().unwrap().to_owned();
        dirs.iter().map(text).collect()
    };
    let mut pod = boot(Path::new(RUNC), |bootstrap, _| {
        let at = |below: &str| {
            let join = |mount: &&Path| mount.join(&bootstrap.pod_id).join(below);
            mounts.iter().map(|mount| join(&mount.as_path())).collect()
        };
        (dirs, own) = (at("deep/leaf"), at("shim"));
        bootstrap.cgroup_dirs = text(&own);
        bootstrap.holder.as_mut().unwrap().cgroup_dirs = text(&dirs);
    })
    .unwrap();
    // Both move after Hello, and before anything else is answered.
    pod.daemon.state();
    for (dirs, pid) in [(&dirs, pod.holder.pid), (&own, pod.shim.pid)] {
        for dir in dirs {
            let procs = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap();
            assert_eq!(procs.trim(), pid.to_string(), "{}", dir.display());
        }
    }
    pod.shutdown();
    for (dir, own) in dirs.iter().zip(&own) {
        assert!(!dir.exists(), "{}", dir.display());
        // Parents are the caller's, and so is the cgroup that a shim has ended in.
        std::fs::remove_dir(dir.parent().unwrap()).unwrap();
        std::fs::remove_dir(own).unwrap();
        std::fs::remove_dir(own.parent().unwrap()).unwrap();
    }
}

#[test]
fn a_shim_that_cannot_join_its_cgroup_gives_the_pod_up() {
    if skip("a_shim_that_cannot_join_its_cgroup_gives_the_pod_up") {
        return;
    }
    let pod = boot(Path::new(RUNC), |bootstrap, _| {
        bootstrap.cgroup_dirs = vec!["/proc/no/such/cgroup".to_owned()];
    })
    .unwrap();
    let holder = pod.holder.into();
    eventually("the holder dies", || !alive(holder));
    let error = boot(Path::new(RUNC), |bootstrap, _| {
        bootstrap.cgroup_dirs = vec!["relative".to_owned()];
    });
    assert!(error.err().unwrap().contains("relative"));
}

#[test]
fn a_dead_shim_takes_a_holder_along_that_is_not_on_record() {
    if skip("a_dead_shim_takes_a_holder_along_that_is_not_on_record") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let holder = pod.holder.into();
    assert!(alive(holder));
    pod.kill_shim();
    eventually("the holder dies", || !alive(holder));
}

#[test]
fn a_holder_that_is_on_record_outlives_its_shim_with_nothing_open() {
    if skip("a_holder_that_is_on_record_outlives_its_shim_with_nothing_open") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    // Repeated, as by a daemon that was started again.
    for _ in 0..2 {
        pod.keep_holder();
    }
    let holder = pod.holder.into();
    let fds = || std::fs::read_dir(format!("/proc/{}/fd", pod.holder.pid)).unwrap();
    // The sysfs.
    eventually("it has let go", || fds().count() == 1);
    pod.kill_shim();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(alive(holder));
    gantry_sys::pidfd::PidFd::open_process(holder)
        .unwrap()
        .signal(9)
        .unwrap();
    eventually("the holder dies", || !alive(holder));
}

#[test]
fn the_holders_death_is_told_and_no_container_starts_after_it() {
    if skip("the_holders_death_is_told_and_no_container_starts_after_it") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let process = gantry_sys::pidfd::PidFd::open_process(pod.holder.into()).unwrap();
    process.signal(9).unwrap();
    assert!(matches!(pod.daemon.event(), event::Body::HolderExited(_)));
    assert_eq!(pod.daemon.state().holder, None);
    let bundle = pod.bundle("c1", "exit 0");
    let error = pod.start(&bundle).unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::FailedPrecondition);
    pod.shutdown();
    assert_eq!(pod.leftovers(), Vec::<String>::new());
}

#[test]
fn signals_to_the_shim_do_not_end_it() {
    if skip("signals_to_the_shim_do_not_end_it") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let process = gantry_sys::pidfd::PidFd::open_process(pod.shim.into()).unwrap();
    for signal in [1, 2, 3, 10, 12, 13, 14, 15] {
        process.signal(signal).unwrap();
    }
    pod.daemon.state();
    let session = gantry_sys::process::Stat::read(pod.shim.pid)
        .unwrap()
        .session;
    assert_eq!(session, pod.shim.pid);
    pod.shutdown();
}

#[test]
fn the_newest_connection_gets_the_events_and_the_older_is_shut() {
    if skip("the_newest_connection_gets_the_events_and_the_older_is_shut") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let mut newer = Daemon::connect(&pod.socket());
    let refused = newer.ask(request::Body::State(v1::State {})).unwrap_err();
    assert_eq!(refused.kind(), v1::ErrorKind::FailedPrecondition);
    pod.daemon.state();
    let hello = newer.greet();
    assert_eq!(hello.holder, Some(pod.holder));
    assert!(
        pod.daemon.try_receive().is_none(),
        "the older connection lives"
    );
    let process = gantry_sys::pidfd::PidFd::open_process(pod.holder.into()).unwrap();
    process.signal(9).unwrap();
    assert!(matches!(newer.event(), event::Body::HolderExited(_)));
    pod.daemon = newer;
    pod.shutdown();
}

#[test]
fn requests_from_the_future_and_garbage_are_answered_or_cut_off() {
    if skip("requests_from_the_future_and_garbage_are_answered_or_cut_off") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let id = pod.daemon.send(None, &[]);
    let error = pod.daemon.wait_for(id).unwrap_err();
    assert_eq!(error.kind(), v1::ErrorKind::Unimplemented);
    let mut stranger = Daemon::connect(&pod.socket());
    std::io::Write::write_all(&mut stranger.stream, b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(stranger.try_receive().is_none());
    for bad in ["", "../x", "a/b", "-x", &"x".repeat(200)] {
        let start = v1::Start {
            container_id: bad.into(),
            bundle: "/x".into(),
            ..Default::default()
        };
        let error = pod.daemon.ask(request::Body::Start(start)).unwrap_err();
        assert_eq!(error.kind(), v1::ErrorKind::InvalidArgument, "{bad}");
    }
    let delete = v1::Delete {
        container_id: "unknown".into(),
    };
    let done = pod.daemon.ask(request::Body::Delete(delete));
    assert!(matches!(done, Ok(message::Body::Done(_))));
    for body in [
        request::Body::Signal(v1::Signal {
            container_id: "x".into(),
            signal: 9,
            all: false,
        }),
        request::Body::ReopenLog(v1::ReopenLog {
            container_id: "x".into(),
        }),
        request::Body::Ack(v1::Ack {
            container_id: "x".into(),
        }),
    ] {
        assert_eq!(
            pod.daemon.ask(body).unwrap_err().kind(),
            v1::ErrorKind::NotFound
        );
    }
    pod.shutdown();
}
