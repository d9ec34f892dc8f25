//! Exec, Attach and PortForward: URLs, and what happens at them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use gantry_integration::crictl::{Crictl, Terminal};
use gantry_integration::streaming::{self, STDIN, Socket};
use gantry_integration::{
    Node, Pod, eventually, on_node, on_plain_node, refused, script_config, sleeper,
};
use gantry_testkit::cri::v1;
use gantry_testkit::daemon::Options;
use gantry_testkit::leakcheck::descriptors;
use tonic::Code;

const V5: &str = "v5.channel.k8s.io";

/// Which streams are asked for.
#[derive(Clone, Copy, Default)]
struct Stdio {
    stdin: bool,
    tty: bool,
}

const PIPES: Stdio = Stdio {
    stdin: true,
    tty: false,
};

const TTY: Stdio = Stdio {
    stdin: true,
    tty: true,
};

fn exec_request(id: &str, script: &str, stdio: Stdio) -> v1::ExecRequest {
    v1::ExecRequest {
        container_id: id.to_owned(),
        cmd: ["sh", "-c", script].map(str::to_owned).into(),
        tty: stdio.tty,
        stdin: stdio.stdin,
        stdout: true,
        stderr: !stdio.tty,
    }
}

fn attach_request(id: &str, stdio: Stdio) -> v1::AttachRequest {
    v1::AttachRequest {
        container_id: id.to_owned(),
        stdin: stdio.stdin,
        tty: stdio.tty,
        stdout: true,
        stderr: !stdio.tty,
    }
}

async fn exec(node: &Node, id: &str, script: &str, stdio: Stdio) -> Socket {
    let mut client = node.client.runtime.clone();
    let answer = client.exec(exec_request(id, script, stdio)).await;
    let url = answer.expect("Exec").into_inner().url;
    streaming::connect(node.daemon.netns(), &url, V5).expect("upgrade")
}

async fn attach(node: &Node, id: &str, stdio: Stdio) -> Socket {
    let mut client = node.client.runtime.clone();
    let answer = client.attach(attach_request(id, stdio)).await;
    let url = answer.expect("Attach").into_inner().url;
    streaming::connect(node.daemon.netns(), &url, V5).expect("upgrade")
}

/// A running container that does nothing.
async fn idle(node: &Node, name: &str) -> (Pod, String) {
    let image = node.busybox().await;
    let pod = node.host_pod(name).await;
    let id = node.run(&pod, &sleeper("c", &image)).await;
    (pod, id)
}

/// Processes of a container whose command line says `what`.
async fn processes(node: &Node, id: &str, what: &str) -> usize {
    let script = format!("grep -lz '^{what}$' /proc/[0-9]*/cmdline 2>/dev/null | wc -l");
    node.sh(id, &script).await.parse().unwrap()
}

#[test]
fn an_exec_has_streams_and_an_exit_code() {
    on_plain_node("an_exec_has_streams_and_an_exit_code", async |node| {
        let (_, id) = idle(node, "exec").await;
        let mut socket = exec(node, &id, "cat; echo bad >&2; exit 42", PIPES).await;
        socket.send(STDIN, b"one\n").unwrap();
        assert_eq!(socket.until("\n"), "one\n");
        socket.send(STDIN, b"two").unwrap();
        socket.finish(STDIN).unwrap();
        let rest = socket.rest();
        assert_eq!(
            (rest.stdout.as_str(), rest.stderr.as_str()),
            ("two", "bad\n")
        );
        assert_eq!(rest.exit_code(), Some(42), "{rest:?}");
        // Without stdin there is none, and a signal is told as shells do.
        let mut socket = exec(node, &id, "cat; echo end; kill -9 $$", Stdio::default()).await;
        let rest = socket.rest();
        assert_eq!(
            (rest.stdout.as_str(), rest.exit_code()),
            ("end\n", Some(137))
        );
        // Much output, all of it.
        let mut socket = exec(node, &id, "seq 1 300000", Stdio::default()).await;
        let rest = socket.rest();
        assert_eq!(rest.stdout.lines().count(), 300_000);
        assert_eq!(rest.exit_code(), Some(0));
        // It is run as ExecSync runs it.
        let script = "id; pwd; env | sort; grep -E '^(Cap|NoNewPrivs|Seccomp)' /proc/self/status";
        let mut socket = exec(node, &id, script, Stdio::default()).await;
        assert_eq!(socket.rest().stdout.trim(), node.sh(&id, script).await);
        // What cannot be run says so.
        let mut client = node.client.runtime.clone();
        let mut request = exec_request(&id, "", Stdio::default());
        request.cmd = vec!["no-such-command".to_owned()];
        let url = client.exec(request).await.unwrap().into_inner().url;
        let mut socket = streaming::connect(node.daemon.netns(), &url, V5).unwrap();
        let result = socket.rest().result.to_string();
        assert!(result.contains("no-such-command"), "{result}");
        // The URL was good once.
        let again = streaming::connect(node.daemon.netns(), &url, V5)
            .err()
            .unwrap();
        assert!(again.contains("404"), "{again}");
    });
}

#[test]
fn an_exec_has_a_terminal_of_the_clients_size() {
    on_plain_node("an_exec_has_a_terminal_of_the_clients_size", async |node| {
        let (_, id) = idle(node, "tty").await;
        let script = "stty -echo; echo up; \
                      while read x; do [ \"$x\" = end ] && exit 3; stty size; done";
        let mut socket = exec(node, &id, script, TTY).await;
        socket.resize(100, 40).unwrap();
        socket.until("up\r\n");
        for (width, height) in [(100, 40), (80, 25)] {
            socket.resize(width, height).unwrap();
            let wanted = format!("{height} {width}");
            // The two messages take effect side by side.
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                socket.send(STDIN, b"\n").unwrap();
                let line = socket.until("\r\n");
                if line.contains(&wanted) {
                    break;
                }
                assert!(Instant::now() < deadline, "{line:?} is not {wanted:?}");
            }
        }
        socket.send(STDIN, b"end\n").unwrap();
        assert_eq!(socket.rest().exit_code(), Some(3));
    });
}

#[test]
fn an_exec_whose_client_goes_is_ended_with_its_tree() {
    const NAME: &str = "an_exec_whose_client_goes_is_ended_with_its_tree";
    let options = Options::default().config("[timeouts]\nexec_grace_seconds = 1\n");
    on_node(NAME, options, async |node| {
        let (_, id) = idle(node, "gone").await;
        // One that ends by itself when its input does is let to.
        let polite = "cat; sleep 0.3; echo said > /tmp/polite";
        let script = "sleep 4711 & setsid sleep 4711 & echo up; wait";
        let (mut polite, mut stubborn) = (
            exec(node, &id, &format!("echo up; {polite}"), PIPES).await,
            exec(node, &id, script, PIPES).await,
        );
        let mut terminal = exec(
            node,
            &id,
            "trap '' HUP; echo up; sleep 4712; sleep 4712",
            TTY,
        )
        .await;
        let mut shell = exec(node, &id, "echo up; sleep 4713", TTY).await;
        for socket in [&mut polite, &mut stubborn] {
            socket.until("up\n");
        }
        for socket in [&mut terminal, &mut shell] {
            socket.until("up\r\n");
        }
        assert_eq!(processes(node, &id, "4711").await, 2);
        let gone = Instant::now();
        drop((polite, stubborn, terminal, shell));
        // A terminal's hang-up is no matter of grace.
        eventually("the shell hangs up", async || {
            (processes(node, &id, "4713").await == 0).then_some(())
        })
        .await;
        for what in ["4711", "4712"] {
            eventually("the tree is gone", async || {
                (processes(node, &id, what).await == 0).then_some(())
            })
            .await;
        }
        assert!(
            gone.elapsed() > Duration::from_secs(1),
            "before the grace was over"
        );
        assert_eq!(node.sh(&id, "cat /tmp/polite").await, "said");
    });
}

#[test]
fn sigterm_ends_sessions_and_leaves_containers() {
    const NAME: &str = "sigterm_ends_sessions_and_leaves_containers";
    let options = Options::default().config("[timeouts]\nexec_grace_seconds = 1\n");
    on_node(NAME, options, async |node| {
        let (_, id) = idle(node, "sigterm").await;
        let mut command = exec(node, &id, "echo up; sleep 4711", PIPES).await;
        command.until("up\n");
        let mut attached = attach(node, &id, Stdio::default()).await;
        let status = node.daemon.terminate().unwrap();
        assert!(status.success(), "{status}");
        command.rest();
        attached.rest();
        node.start_again(&[]).await;
        assert!(node.is_running(&id).await);
        assert_eq!(processes(node, &id, "4711").await, 0);
        // What the first daemon had open.
        node.accept_now();
    });
}

/// CVE-2022-23471, CVE-2025-64329.
#[test]
fn sessions_opened_and_dropped_at_any_moment_leave_nothing() {
    const NAME: &str = "sessions_opened_and_dropped_at_any_moment_leave_nothing";
    const ROUNDS: u32 = 25;
    let options = Options::default().config("[timeouts]\nexec_grace_seconds = 0\n");
    on_node(NAME, options, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("drop").await;
        let mut config =
            script_config("c", &image, "trap 'exit 0' TERM; while :; do sleep 1; done");
        config.stdin = true;
        let id = node.run(&pod, &config).await;
        let shim =
            i32::try_from(node.pod_info(&pod.id).await["shimPid"].as_i64().unwrap()).unwrap();
        let daemon = node.daemon.pid().unwrap();
        let open = |pid: i32| descriptors(pid).len();
        let tasks = || {
            let tasks = std::fs::read_dir(format!("/proc/{daemon}/task"));
            tasks.unwrap().count()
        };
        // What the first ones make stays: threads, connections.
        assert_eq!(
            exec(node, &id, "true", TTY).await.rest().exit_code(),
            Some(0)
        );
        let (in_shim, in_daemon) = (open(shim), open(daemon));
        for round in 0..ROUNDS {
            let mut sockets = Vec::new();
            for kind in 0..8 {
                let pause = u64::from((round * 37 + kind * 11) % 60);
                let mut socket = match kind {
                    0 | 1 => exec(node, &id, "cat; sleep 4711", PIPES).await,
                    2 | 3 => exec(node, &id, "cat; sleep 4711", TTY).await,
                    4 => exec(node, &id, "yes", Stdio::default()).await,
                    5 => exec(node, &id, "exit 3", PIPES).await,
                    _ => attach(node, &id, PIPES).await,
                };
                // One that has ended already is no matter.
                let _ = socket.send(STDIN, b"text\n");
                let _ = socket.resize(80, 20);
                std::thread::sleep(Duration::from_millis(pause));
                sockets.push(socket);
                if kind % 3 == 0 {
                    drop(sockets.remove(0));
                }
            }
        }
        eventually("no descriptor is left in the shim", async || {
            (open(shim) <= in_shim).then_some(())
        })
        .await;
        eventually("no descriptor is left in the daemon", async || {
            (open(daemon) <= in_daemon).then_some(())
        })
        .await;
        eventually("no process is left", async || {
            let left = processes(node, &id, "4711").await + processes(node, &id, "cat").await;
            (left == 0).then_some(())
        })
        .await;
        // Blocking threads go when they are idle.
        eventually("no thread is left", async || (tasks() < 32).then_some(())).await;
        assert!(node.is_running(&id).await);
    });
}

#[test]
fn attached_clients_see_and_write_and_end_with_the_container() {
    const NAME: &str = "attached_clients_see_and_write_and_end_with_the_container";
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("attach").await;
        let script = "echo before; while read x; do echo out $x; echo err $x >&2; \
                      [ $x = end ] && exit 5; done";
        let mut config = script_config("c", &image, script);
        config.stdin = true;
        let id = node.run(&pod, &config).await;
        node.has_written(&pod, "c", "before").await;
        let mut first = attach(node, &id, PIPES).await;
        let mut second = attach(node, &id, Stdio::default()).await;
        // A client is served from when its output can come; this says that it is.
        eventually("both are attached", async || {
            first.send(STDIN, b"ping\n").unwrap();
            second.has_more(Duration::from_millis(100)).then_some(())
        })
        .await;
        first.send(STDIN, b"end\n").unwrap();
        for socket in [&mut first, &mut second] {
            let rest = socket.rest();
            assert!(rest.stdout.ends_with("out end\n"), "{rest:?}");
            assert!(!rest.stdout.contains("before"), "{rest:?}");
            assert!(rest.stderr.ends_with("err end\n"), "{rest:?}");
            assert_eq!(rest.result["status"], "Success", "{rest:?}");
        }
        assert_eq!(node.exited(&id).await.exit_code, 5);
        assert!(node.output(&pod, "c").ends_with("out end\n"));
        let mut client = node.client.runtime.clone();
        refused(
            client.attach(attach_request(&id, PIPES)).await,
            Code::FailedPrecondition,
            "not running",
        );
    });
}

#[test]
fn input_that_is_there_once_ends_with_its_client() {
    on_plain_node(
        "input_that_is_there_once_ends_with_its_client",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("once").await;
            for half_close in [true, false] {
                let name = format!("c{half_close}");
                let mut config = script_config(&name, &image, "cat; echo the end; exit 4");
                (config.stdin, config.stdin_once) = (true, true);
                let id = node.run(&pod, &config).await;
                let mut socket = attach(node, &id, PIPES).await;
                socket.send(STDIN, b"text\n").unwrap();
                assert_eq!(socket.until("\n"), "text\n");
                if half_close {
                    socket.finish(STDIN).unwrap();
                    assert_eq!(socket.rest().stdout, "the end\n");
                }
                drop(socket);
                assert_eq!(node.exited(&id).await.exit_code, 4);
            }
            // Otherwise the next one may go on.
            let mut config = script_config("many", &image, "cat; echo the end");
            config.stdin = true;
            let id = node.run(&pod, &config).await;
            for _ in 0..2 {
                let mut socket = attach(node, &id, PIPES).await;
                socket.send(STDIN, b"text\n").unwrap();
                assert_eq!(socket.until("\n"), "text\n");
                socket.finish(STDIN).unwrap();
                assert_eq!(socket.rest().result["status"], "Success");
            }
            assert!(node.is_running(&id).await);
        },
    );
}

#[test]
fn a_containers_terminal_is_attached_to_and_resized() {
    on_plain_node(
        "a_containers_terminal_is_attached_to_and_resized",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("terminal").await;
            let script = "stty -echo; while read x; do stty size; done";
            let mut config = script_config("c", &image, script);
            (config.stdin, config.tty) = (true, true);
            let id = node.run(&pod, &config).await;
            for (width, height) in [(100, 40), (80, 25)] {
                let mut socket = attach(node, &id, TTY).await;
                socket.resize(width, height).unwrap();
                let wanted = format!("{height} {width}\r\n");
                let deadline = Instant::now() + Duration::from_secs(10);
                loop {
                    socket.send(STDIN, b"x\n").unwrap();
                    if socket.until("\r\n").contains(&wanted) {
                        break;
                    }
                    assert!(Instant::now() < deadline, "never {wanted:?}");
                }
            }
            let mut client = node.client.runtime.clone();
            let mut request = attach_request(&id, TTY);
            request.tty = false;
            refused(client.attach(request).await, Code::InvalidArgument, "tty");
        },
    );
}

#[test]
fn a_frozen_client_holds_up_neither_the_container_nor_its_log() {
    const NAME: &str = "a_frozen_client_holds_up_neither_the_container_nor_its_log";
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("frozen").await;
        let script = "read x; yes 0123456789012345678901234567890123456789 | head -n 500000; \
                      echo done; sleep 1000";
        let mut config = script_config("c", &image, script);
        config.stdin = true;
        let id = node.run(&pod, &config).await;
        let mut frozen = attach(node, &id, PIPES).await;
        frozen.send(STDIN, b"go\n").unwrap();
        // It does not read while twenty megabytes are written.
        node.has_written(&pod, "c", "done").await;
        let result = frozen.rest().result.to_string();
        assert!(result.contains("slowly"), "{result}");
        assert!(node.is_running(&id).await);
    });
}

async fn forward(node: &Node, pod: &str, port: i32) -> Socket {
    let mut client = node.client.runtime.clone();
    let request = v1::PortForwardRequest {
        pod_sandbox_id: pod.to_owned(),
        port: vec![port],
    };
    let answer = client.port_forward(request).await;
    let url = answer.expect("PortForward").into_inner().url;
    let netns = node.daemon.netns();
    streaming::connect(netns, &url, "v4.channel.k8s.io").expect("upgrade")
}

#[test]
fn ports_lead_to_the_loopback_of_the_pod() {
    on_plain_node("ports_lead_to_the_loopback_of_the_pod", async |node| {
        let image = node.busybox().await;
        let own = node.pod("own").await;
        let hosts = node.host_pod("hosts").await;
        for (pod, address, port) in [
            (&own, "127.0.0.1", 8080),
            (&own, "[::1]", 8081),
            (&hosts, "127.0.0.1", 8082),
        ] {
            let script = format!(
                "echo of {port} > /tmp/index.html; exec httpd -f -p {address}:{port} -h /tmp"
            );
            let name = format!("httpd{port}");
            node.run_script(pod, &name, &image, &script).await;
            let ask = b"GET /index.html HTTP/1.0\r\n\r\n";
            eventually("it is served", async || {
                let mut socket = forward(node, &pod.id, port).await;
                socket.send(0, ask).ok()?;
                let text = socket.channel(0, &format!("of {port}\n"));
                // What comes first on each channel is its port.
                assert!(text.starts_with(&port.to_le_bytes()[..2]));
                String::from_utf8_lossy(&text)
                    .contains(&format!("of {port}\n"))
                    .then_some(())
            })
            .await;
        }
        // Nobody listens: both addresses are named.
        let mut socket = forward(node, &own.id, 9).await;
        let error = socket.channel(1, "111)");
        let error = String::from_utf8_lossy(&error[2..]).into_owned();
        assert!(
            error.contains("127.0.0.1:9") && error.contains("[::1]:9"),
            "{error}"
        );
        let mut client = node.client.runtime.clone();
        node.client.stop_pod(&own.id).await.unwrap();
        for (pod, port, code, says) in [
            (own.id.as_str(), 80, Code::FailedPrecondition, "not ready"),
            ("0123456789ab", 80, Code::NotFound, "0123456789ab"),
            (hosts.id.as_str(), 0, Code::InvalidArgument, "port"),
            (hosts.id.as_str(), 70_000, Code::InvalidArgument, "70000"),
            (hosts.id.as_str(), -1, Code::InvalidArgument, "-1"),
        ] {
            let request = v1::PortForwardRequest {
                pod_sandbox_id: pod.to_owned(),
                port: vec![port],
            };
            refused(client.port_forward(request).await, code, says);
        }
    });
}

#[test]
fn what_cannot_be_streamed_is_refused() {
    on_plain_node("what_cannot_be_streamed_is_refused", async |node| {
        let (pod, id) = idle(node, "refused").await;
        let mut client = node.client.runtime.clone();
        let good = exec_request(&id, "true", Stdio::default());
        let with = |change: fn(&mut v1::ExecRequest)| {
            let mut request = good.clone();
            change(&mut request);
            request
        };
        for (request, says) in [
            (with(|r| r.cmd.clear()), "cmd"),
            (with(|r| r.tty = true), "stderr"),
            (with(|r| (r.stdout, r.stderr) = (false, false)), "stdin"),
        ] {
            refused(client.exec(request).await, Code::InvalidArgument, says);
        }
        let mut none = attach_request(&id, Stdio::default());
        (none.stdout, none.stderr) = (false, false);
        refused(client.attach(none).await, Code::InvalidArgument, "stdin");
        let unknown = with(|r| r.container_id = "0123456789ab".to_owned());
        refused(client.exec(unknown).await, Code::NotFound, "0123456789ab");
        // Between URL and client the container may end.
        let url = client.exec(good.clone()).await.unwrap().into_inner().url;
        assert!(url.starts_with("http://127.0.0.1:"), "{url}");
        node.client.stop(&id, 0).await.unwrap();
        let mut socket = streaming::connect(node.daemon.netns(), &url, V5).unwrap();
        let result = socket.rest().result.to_string();
        assert!(result.contains("not running"), "{result}");
        refused(
            client.exec(good).await,
            Code::FailedPrecondition,
            "not running",
        );
        // One that was never started.
        let image = node.busybox().await;
        let created = node.create(&pod, &sleeper("created", &image)).await;
        let request = exec_request(&created, "true", Stdio::default());
        refused(
            client.exec(request).await,
            Code::FailedPrecondition,
            "not running",
        );
    });
}

#[test]
fn crictl_has_streams() {
    const NAME: &str = "crictl_has_streams";
    let Some(program) = Crictl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.pod("crictl").await;
        let mut config = script_config(
            "c",
            &image,
            "echo served > /tmp/index.html; httpd -p 8080 -h /tmp; while read x; do echo got $x; done",
        );
        config.stdin = true;
        let id = node.run(&pod, &config).await;
        let crictl = Crictl::new(&program, &node.daemon);
        for transport in ["spdy", "websocket"] {
            let exec = |script| crictl.try_run(&["exec", "-r", transport, &id, "sh", "-c", script]);
            let (success, stdout, stderr) = exec("echo out; echo err >&2");
            assert!(
                success && stdout == "out" && stderr == "err",
                "{transport}: {stderr}"
            );
            let (success, _, stderr) = exec("exit 42");
            assert!(!success && stderr.contains("42"), "{transport}: {stderr}");

            let mut terminal =
                Terminal::start(&crictl, &["exec", "-it", "-r", transport, &id, "sh"]);
            terminal.resize(100, 40);
            terminal.ask_until("stty size\r", "40 100");
            terminal.resize(80, 25);
            terminal.ask_until("stty size\r", "25 80");
            terminal.write("sleep 4711\r");
            eventually("it sleeps", async || {
                (processes(node, &id, "4711").await == 1).then_some(())
            })
            .await;
            terminal.write("\x03");
            terminal.ask_until("echo back$((1 + 1))\r", "back2");
            assert_eq!(processes(node, &id, "4711").await, 0);
            terminal.write("exit 7\r");
            let (success, output) = terminal.finish();
            assert!(
                !success && output.contains("exit code 7"),
                "{transport}: {output}"
            );

            let mut attached = Terminal::start(&crictl, &["attach", "-i", "-r", transport, &id]);
            attached.ask_until("hello\r", "got hello");
            // The end of what is typed.
            attached.write("\x04");
            let (success, output) = attached.finish();
            assert!(success, "{transport}: {output}");

            let forward = &["port-forward", "-r", transport, &pod.id, ":8080"];
            let mut forwarded = Terminal::start(&crictl, forward);
            let port = forwarded.until("Forwarding from 127.0.0.1:", " ->");
            for _ in 0..3 {
                let address = format!("127.0.0.1:{port}");
                let stream = node.daemon.netns().run(|| TcpStream::connect(&address));
                let mut stream = stream.unwrap().unwrap();
                stream
                    .set_read_timeout(Some(Duration::from_secs(20)))
                    .unwrap();
                stream
                    .write_all(b"GET /index.html HTTP/1.0\r\n\r\n")
                    .unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                assert!(text.ends_with("served\n"), "{transport}: {text}");
            }
            forwarded.write("\x03");
            forwarded.finish();
        }
        assert!(node.is_running(&id).await);
    });
}

/// Bytes that repeat after no round number, so that a piece that is lost, doubled or moved shows.
fn pattern() -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(&mut next).take(1_000_003).collect()
}

#[test]
fn a_gibibyte_goes_through_an_exec_both_ways() {
    const NAME: &str = "a_gibibyte_goes_through_an_exec_both_ways";
    const PIECES: usize = (1 << 30) / 1_000_003 + 1;
    let Some(program) = Crictl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("stream").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let crictl = Crictl::new(&program, &node.daemon);
        for transport in ["spdy", "websocket"] {
            let mut child = crictl.spawn(&["exec", "-i", "-r", transport, &id, "cat"]);
            let (mut stdin, mut stdout) =
                (child.stdin.take().unwrap(), child.stdout.take().unwrap());
            let pieces = pattern();
            let sent = pieces.clone();
            let writer = std::thread::spawn(move || {
                for _ in 0..PIECES {
                    stdin.write_all(&sent).unwrap();
                }
            });
            let mut received = vec![0; pieces.len()];
            for n in 0..PIECES {
                stdout.read_exact(&mut received).unwrap();
                assert!(received == pieces, "{transport}: piece {n} is another");
            }
            assert_eq!(
                stdout.read(&mut received).unwrap(),
                0,
                "{transport}: more than was sent"
            );
            writer.join().unwrap();
            assert!(child.wait().unwrap().success(), "{transport}");
        }
    });
}
