//! Clients that watch a container's output and write to its input.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use gantry_shim_api::v1::{self, message, request};

use crate::common::{Bundle, Pod, eventually, pod, records, runtimes, skip};

const RUNC: &str = "/usr/sbin/runc";

/// Our ends of an attachment.
struct Client {
    pipe: File,
    stdout: File,
    stderr: File,
    stdin: Option<File>,
}

fn body(stdin: bool, container: &str) -> request::Body {
    request::Body::Attach(v1::Attach {
        container_id: container.into(),
        stdin,
        stdout: true,
        stderr: true,
    })
}

fn try_attach(pod: &mut Pod, stdin: bool) -> Result<Client, v1::Error> {
    let pipes = [(); 3].map(|()| gantry_sys::io::pipe(false).unwrap());
    let theirs = pipes.each_ref().map(|(_, theirs)| theirs.as_fd());
    let (answer, fds) = pod.daemon.ask_with(body(stdin, "c1"), &theirs)?;
    assert!(matches!(answer, message::Body::Attached(_)), "{answer:?}");
    let [pipe, stdout, stderr] = pipes.map(|(ours, _)| File::from(ours));
    let mut fds = fds.into_iter();
    let stdin = fds.next().map(File::from);
    assert!(fds.next().is_none());
    Ok(Client {
        pipe,
        stdout,
        stderr,
        stdin,
    })
}

fn attach(pod: &mut Pod, stdin: bool) -> Client {
    try_attach(pod, stdin).unwrap()
}

fn rest(mut from: File) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).unwrap();
    text
}

/// Reads one byte at a time, up to `end`.
fn until(from: &mut File, end: &str) -> String {
    let (mut seen, mut byte) = (Vec::new(), [0]);
    while !seen.ends_with(end.as_bytes()) {
        from.read_exact(&mut byte).unwrap();
        seen.extend(byte);
    }
    String::from_utf8(seen).unwrap()
}

/// A container with an input.
fn run_with_stdin(pod: &mut Pod, script: &str, change: impl FnOnce(&mut Bundle)) -> Bundle {
    let mut bundle = pod.bundle("c1", script);
    bundle.start.stdin = true;
    change(&mut bundle);
    pod.start(&bundle).unwrap();
    bundle
}

#[test]
fn clients_see_output_from_now_on_and_the_containers_end() {
    if skip("clients_see_output_from_now_on_and_the_containers_end") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        let script = "echo before; while read x; do echo out $x; echo err $x >&2; done; echo bye";
        let bundle = run_with_stdin(&mut pod, script, |_| ());
        eventually("the first line", || !records(&bundle.log).is_empty());
        let fds = pod.fd_count();
        let mut first = attach(&mut pod, true);
        first.stdin.as_ref().unwrap().write_all(b"1\n").unwrap();
        // Both: what the shim has yet to read is output from then on too.
        assert_eq!(until(&mut first.stdout, "\n"), "out 1\n");
        assert_eq!(until(&mut first.stderr, "\n"), "err 1\n");
        let mut second = attach(&mut pod, true);
        second.stdin.as_ref().unwrap().write_all(b"2\n").unwrap();
        for client in [&mut first, &mut second] {
            assert_eq!(until(&mut client.stdout, "\n"), "out 2\n");
        }
        // One that goes is no loss to the other, nor is its end of the input.
        drop(first);
        eventually("it is detached", || pod.fd_count() == fds + 3);
        second.stdin.as_ref().unwrap().write_all(b"3\n").unwrap();
        assert_eq!(until(&mut second.stdout, "\n"), "out 3\n");
        assert_eq!(until(&mut second.stderr, "err 3\n"), "err 2\nerr 3\n");
        pod.signal("c1", 9, false).unwrap();
        assert_eq!(rest(second.stderr), "");
        assert_eq!(rest(second.stdout), "");
        assert_eq!(rest(second.pipe), "", "no reason but the container's end");
        pod.daemon.exited("c1");
        pod.shutdown();
        assert_eq!(pod.leftovers(), Vec::<String>::new());
    }
}

#[test]
fn input_ends_with_the_first_client_only_if_it_is_to_be_there_once() {
    if skip("input_ends_with_the_first_client_only_if_it_is_to_be_there_once") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    run_with_stdin(&mut pod, "cat; echo end", |bundle| {
        bundle.start.stdin_once = true;
    });
    let mut first = attach(&mut pod, true);
    assert!(attach(&mut pod, true).stdin.is_none(), "it is given away");
    first.stdin.take().unwrap().write_all(b"all\n").unwrap();
    // Output goes on after it.
    assert_eq!(rest(first.stdout), "all\nend\n");
    assert_eq!(pod.daemon.exited("c1").code, 0);
    pod.delete("c1");

    let bundle = run_with_stdin(&mut pod, "cat; echo end", |_| ());
    for text in ["one\n", "two\n"] {
        let mut client = attach(&mut pod, true);
        client
            .stdin
            .take()
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
        assert_eq!(until(&mut client.stdout, "\n"), text);
    }
    let log = records(&bundle.log);
    assert!(
        log.ends_with(&["stdout F one".into(), "stdout F two".into()]),
        "{log:?}"
    );
    pod.shutdown();
}

#[test]
fn a_container_without_input_gives_none() {
    if skip("a_container_without_input_gives_none") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    for tty in [false, true] {
        let mut bundle = pod.bundle("c1", "sleep 600");
        bundle.start.tty = tty;
        bundle.config["process"]["terminal"] = tty.into();
        pod.start(&bundle).unwrap();
        assert!(attach(&mut pod, true).stdin.is_none());
        pod.delete("c1");
    }
    pod.shutdown();
}

#[test]
fn a_terminal_is_written_to_and_resized() {
    if skip("a_terminal_is_written_to_and_resized") {
        return;
    }
    for runtime in runtimes() {
        let mut pod = pod(&runtime);
        let script = "stty -echo; echo up; while read x; do stty size; done";
        let fds = pod.fd_count();
        run_with_stdin(&mut pod, script, |bundle| {
            bundle.start.tty = true;
            bundle.start.stdin_once = true;
            bundle.config["process"]["terminal"] = true.into();
        });
        let bundle = pod.dir.path().join("logs/c1/0.log");
        eventually("it is up", || !records(&bundle).is_empty());
        for width in [100, 90] {
            let mut client = attach(&mut pod, true);
            let resize = v1::ResizePty {
                container_id: "c1".into(),
                exec_id: String::new(),
                width,
                height: 40,
            };
            pod.daemon.ask(request::Body::ResizePty(resize)).unwrap();
            // A terminal has no end of input that comes with a client's.
            let mut stdin = client.stdin.take().unwrap();
            assert!(gantry_sys::pty::is_terminal(&stdin));
            stdin.write_all(b"x\n").unwrap();
            assert_eq!(until(&mut client.stdout, "\n"), format!("40 {width}\r\n"));
        }
        pod.delete("c1");
        eventually("nothing is left open", || pod.fd_count() == fds);
        pod.shutdown();
    }
}

#[test]
fn a_client_that_does_not_read_is_cut_and_holds_up_nobody() {
    if skip("a_client_that_does_not_read_is_cut_and_holds_up_nobody") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let script = "read x; seq 1 40000; echo done; read x; echo more; sleep 600";
    let bundle = run_with_stdin(&mut pod, script, |_| ());
    let fds = pod.fd_count();
    let frozen = attach(&mut pod, true);
    let mut reader = attach(&mut pod, false);
    // Larger than all output: it falls behind and is none the worse.
    let size = gantry_sys::io::set_pipe_size(&reader.stdout, 1 << 20).unwrap();
    assert!(size >= 1 << 20);
    let mut stdin = frozen.stdin.as_ref().unwrap();
    stdin.write_all(b"go\n").unwrap();
    eventually("the log is complete", || {
        records(&bundle.log)
            .last()
            .is_some_and(|line| line == "stdout F done")
    });
    assert_eq!(records(&bundle.log).len(), 40_001);
    assert!(until(&mut reader.stdout, "done\n").ends_with("39999\n40000\ndone\n"));
    let told = rest(frozen.pipe);
    assert!(told.contains("slowly"), "{told:?}");
    eventually("it is detached", || pod.fd_count() == fds + 3);
    stdin.write_all(b"go\n").unwrap();
    assert_eq!(until(&mut reader.stdout, "\n"), "more\n");
    pod.shutdown();
}

#[test]
fn a_stream_that_is_no_longer_wanted_is_not_the_whole_attachment() {
    if skip("a_stream_that_is_no_longer_wanted_is_not_the_whole_attachment") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    let script = "while read x; do echo out; echo err >&2; done";
    run_with_stdin(&mut pod, script, |_| ());
    let mut client = attach(&mut pod, true);
    drop(std::mem::replace(
        &mut client.stdout,
        File::open("/dev/null").unwrap(),
    ));
    for _ in 0..3 {
        client.stdin.as_ref().unwrap().write_all(b"x\n").unwrap();
        assert_eq!(until(&mut client.stderr, "\n"), "err\n");
    }
    pod.shutdown();
}

#[test]
fn clients_that_come_and_go_leave_nothing_open() {
    if skip("clients_that_come_and_go_leave_nothing_open") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    run_with_stdin(&mut pod, "cat", |_| ());
    let fds = pod.fd_count();
    for _ in 0..10 {
        let clients: Vec<Client> = (0..64).map(|_| attach(&mut pod, true)).collect();
        let error = try_attach(&mut pod, false).err().unwrap();
        assert_eq!(error.kind(), v1::ErrorKind::ResourceExhausted);
        // The container is silent, so no write tells that they go.
        drop(clients);
        eventually("all are detached", || pod.fd_count() == fds);
    }
    pod.shutdown();
}

#[test]
fn what_cannot_be_attached_to_says_why() {
    if skip("what_cannot_be_attached_to_says_why") {
        return;
    }
    let mut pod = pod(Path::new(RUNC));
    pod.run("c1", "sleep 600");
    let fds = pod.fd_count();
    let kind = |pod: &mut Pod, container: &str, fds: &[&OwnedFd]| {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let error = pod
            .daemon
            .ask_with(body(true, container), &fds)
            .unwrap_err();
        error.kind()
    };
    let (mut ours, theirs) = {
        let (ours, theirs) = gantry_sys::io::pipe(true).unwrap();
        (File::from(ours), theirs)
    };
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let three = [&theirs, &theirs, &theirs];
    assert_eq!(
        kind(&mut pod, "c1", &three[..2]),
        v1::ErrorKind::InvalidArgument
    );
    let mixed = [&theirs, &null, &theirs];
    assert_eq!(kind(&mut pod, "c1", &mixed), v1::ErrorKind::InvalidArgument);
    assert_eq!(kind(&mut pod, "c2", &three), v1::ErrorKind::NotFound);
    pod.signal("c1", 9, false).unwrap();
    pod.daemon.exited("c1");
    assert_eq!(
        kind(&mut pod, "c1", &three),
        v1::ErrorKind::FailedPrecondition
    );
    eventually("less the container's process and streams", || {
        pod.fd_count() == fds - 3
    });
    assert_eq!(
        ours.read(&mut [0]).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    pod.shutdown();
}
