//! The clients that people use, crictl and kubectl, in a terminal where people have one.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use gantry_integration::crictl::Crictl;
use gantry_integration::echo::Echo;
use gantry_integration::kubectl::{Kubectl, Programs, Transport};
use gantry_integration::terminal::Terminal;
use gantry_integration::{Node, eventually, on_plain_node, script_config, sleeper};

use super::processes;

/// Connections through one forwarded port at once.
const CONNECTIONS: usize = 50;

/// A pod for clients, in whose network somebody listens: one container that answers lines and runs
/// what is wanted, and one whose terminal belongs to a shell.
struct Scene {
    pod: String,
    /// Where the pod answers, for clients: any local port to that one.
    port: String,
    _echo: Echo,
    lines: String,
    shell: String,
}

impl Scene {
    async fn new(node: &Node) -> Self {
        let image = node.busybox().await;
        let pod = node.pod("people").await;
        let info = node.pod_info(&pod.id).await;
        let echo = Echo::serve(Path::new(info["netns"].as_str().unwrap())).unwrap();
        let script = "while read x; do echo got $x; done";
        let mut config = script_config("lines", &image, script);
        config.stdin = true;
        let lines = node.run(&pod, &config).await;
        let mut config = script_config("shell", &image, "while :; do sh -i; done");
        (config.stdin, config.tty) = (true, true);
        // For whom a container's terminal is a field of the pod.
        config
            .annotations
            .insert("tty".to_owned(), "true".to_owned());
        let shell = node.run(&pod, &config).await;
        Self {
            pod: pod.id,
            port: format!(":{}", echo.port),
            _echo: echo,
            lines,
            shell,
        }
    }
}

/// How a client is told what to do.
trait Client {
    fn run(&self, args: &[&str]) -> (bool, String, String);
    fn feed(&self, args: &[&str], input: Vec<u8>) -> Output;

    /// Whether all that gantryd sends reaches a client that is still sending. The API server's
    /// translation from SPDY closes its side with input unread, and loses what is on its way.
    fn takes_the_end_while_it_sends(&self) -> bool {
        true
    }

    fn terminal(&self, args: &[&str]) -> Terminal;
    /// Options and names of exec, up to the command.
    fn exec<'a>(&'a self, flags: &'a str, scene: &'a Scene) -> Vec<&'a str>;
    fn attach_lines<'a>(&'a self, scene: &'a Scene) -> Vec<&'a str>;
    fn attach_shell<'a>(&'a self, scene: &'a Scene) -> Vec<&'a str>;
    fn forward<'a>(&'a self, scene: &'a Scene) -> Vec<&'a str>;
}

struct OfCrictl<'a>(&'a Crictl, &'static str);

impl Client for OfCrictl<'_> {
    fn run(&self, args: &[&str]) -> (bool, String, String) {
        self.0.try_run(args)
    }

    fn feed(&self, args: &[&str], input: Vec<u8>) -> Output {
        self.0.feed(args, input)
    }

    fn terminal(&self, args: &[&str]) -> Terminal {
        self.0.terminal(args)
    }

    fn exec<'a>(&'a self, flags: &'a str, scene: &'a Scene) -> Vec<&'a str> {
        let mut args = vec!["exec", "-r", self.1];
        args.extend((!flags.is_empty()).then_some(flags));
        args.push(&scene.lines);
        args
    }

    fn attach_lines<'a>(&'a self, scene: &'a Scene) -> Vec<&'a str> {
        vec!["attach", "-r", self.1, "-i", &scene.lines]
    }

    fn attach_shell<'a>(&'a self, scene: &'a Scene) -> Vec<&'a str> {
        vec!["attach", "-r", self.1, "-it", &scene.shell]
    }

    fn forward<'a>(&'a self, scene: &'a Scene) -> Vec<&'a str> {
        vec!["port-forward", "-r", self.1, &scene.pod, &scene.port]
    }
}

impl Client for Kubectl {
    fn run(&self, args: &[&str]) -> (bool, String, String) {
        self.try_run(args)
    }

    fn feed(&self, args: &[&str], input: Vec<u8>) -> Output {
        Kubectl::feed(self, args, input)
    }

    fn takes_the_end_while_it_sends(&self) -> bool {
        self.transport() != Transport::Translated
    }

    fn terminal(&self, args: &[&str]) -> Terminal {
        Kubectl::terminal(self, args)
    }

    fn exec<'a>(&'a self, flags: &'a str, _: &'a Scene) -> Vec<&'a str> {
        let mut args = vec!["exec", "people", "-c", "lines"];
        args.extend((!flags.is_empty()).then_some(flags));
        args.push("--");
        args
    }

    fn attach_lines<'a>(&'a self, _: &'a Scene) -> Vec<&'a str> {
        vec!["attach", "people", "-c", "lines", "-i"]
    }

    fn attach_shell<'a>(&'a self, _: &'a Scene) -> Vec<&'a str> {
        vec!["attach", "people", "-c", "shell", "-it"]
    }

    fn forward<'a>(&'a self, scene: &'a Scene) -> Vec<&'a str> {
        vec!["port-forward", "people", &scene.port]
    }
}

/// Everything that people do with streams.
async fn use_streams(node: &Node, scene: &Scene, client: &impl Client, what: &str) {
    let exec = |script| {
        let mut args = client.exec("", scene);
        args.extend(["sh", "-c", script]);
        client.run(&args)
    };
    let (success, stdout, stderr) = exec("echo out; echo err >&2");
    assert!(
        success && stdout == "out" && stderr == "err",
        "{what}: {stdout} {stderr}"
    );
    let (success, _, stderr) = exec("exit 42");
    assert!(!success && stderr.contains("42"), "{what}: {stderr}");

    if client.takes_the_end_while_it_sends() {
        for _ in 0..5 {
            ends_before_its_input(scene, client, what);
        }
    }
    in_a_terminal(node, scene, client, what).await;
    attached(node, scene, client, what).await;
    forwarded(node, scene, client, what);
}

/// The client still sends when the command has written its output and ended.
fn ends_before_its_input(scene: &Scene, client: &impl Client, what: &str) {
    let mut args = client.exec("-i", scene);
    let script = "head -c 100000 >/dev/null; head -c 300000 /dev/zero; exit 3";
    args.extend(["sh", "-c", script]);
    let output = client.feed(&args, vec![b'x'; 64 << 20]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.stdout.len(), 300_000, "{what}: {said}");
    assert!(
        !output.status.success() && said.contains("exit code 3"),
        "{what}: {said}"
    );
}

async fn in_a_terminal(node: &Node, scene: &Scene, client: &impl Client, what: &str) {
    let mut args = client.exec("-it", scene);
    args.push("sh");
    let mut terminal = client.terminal(&args);
    terminal.resize(100, 40);
    terminal.ask_until("stty size\r", "40 100");
    terminal.resize(80, 25);
    terminal.ask_until("stty size\r", "25 80");
    terminal.write("sleep 4711\r");
    eventually("it sleeps", async || {
        (processes(node, &scene.lines, "4711").await == 1).then_some(())
    })
    .await;
    terminal.write("\x03");
    terminal.ask_until("echo back$((1 + 1))\r", "back2");
    assert_eq!(processes(node, &scene.lines, "4711").await, 0);
    terminal.write("exit 7\r");
    let (success, output) = terminal.finish();
    assert!(
        !success && output.contains("exit code 7"),
        "{what}: {output}"
    );
}

async fn attached(node: &Node, scene: &Scene, client: &impl Client, what: &str) {
    let mut terminal = client.terminal(&client.attach_lines(scene));
    terminal.ask_until("hello\r", "got hello");
    // The end of what is typed.
    terminal.write("\x04");
    let (success, output) = terminal.finish();
    assert!(success, "{what}: {output}");

    // Who leaves in the midst of something leaves it to the next.
    let mut first = client.terminal(&client.attach_shell(scene));
    first.resize(90, 30);
    first.ask_until("stty size\r", "30 90");
    first.write("sleep 4712\r");
    eventually("it sleeps", async || {
        (processes(node, &scene.shell, "4712").await == 1).then_some(())
    })
    .await;
    drop(first);
    let mut second = client.terminal(&client.attach_shell(scene));
    // Before, it would end the client.
    second.is_raw();
    second.write("\x03");
    eventually("it is interrupted", async || {
        (processes(node, &scene.shell, "4712").await == 0).then_some(())
    })
    .await;
    second.ask_until("echo back$((1 + 1))\r", "back2");
    assert!(node.is_running(&scene.shell).await, "{what}");
}

fn forwarded(node: &Node, scene: &Scene, client: &impl Client, what: &str) {
    let mut terminal = client.terminal(&client.forward(scene));
    let port = terminal.until("Forwarding from 127.0.0.1:", " ->");
    let address = format!("127.0.0.1:{port}");
    let pieces = pattern();
    std::thread::scope(|scope| {
        for number in 0..CONNECTIONS {
            let (address, mut text) = (&address, pieces.clone());
            text.rotate_left(number);
            scope.spawn(move || {
                let stream = node.daemon.netns().run(|| TcpStream::connect(address));
                let mut stream = stream.unwrap().unwrap();
                stream
                    .set_read_timeout(Some(Duration::from_secs(60)))
                    .unwrap();
                let mut writer = stream.try_clone().unwrap();
                let sent = text.clone();
                let writing = std::thread::spawn(move || {
                    writer.write_all(&sent).unwrap();
                    // The pod answers after our end.
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                let mut received = Vec::new();
                let end = stream.read_to_end(&mut received);
                assert!(
                    end.is_ok() && received == text,
                    "{what}: {end:?} after {} bytes of connection {number}",
                    received.len()
                );
                writing.join().unwrap();
            });
        }
    });
    terminal.write("\x03");
    terminal.finish();
}

#[test]
fn crictl_has_streams() {
    const NAME: &str = "crictl_has_streams";
    let Some(program) = Crictl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let scene = Scene::new(node).await;
        let crictl = Crictl::new(&program, &node.daemon);
        for transport in ["spdy", "websocket"] {
            use_streams(node, &scene, &OfCrictl(&crictl, transport), transport).await;
        }
        assert!(node.is_running(&scene.lines).await);
    });
}

#[test]
fn kubectl_has_streams() {
    const NAME: &str = "kubectl_has_streams";
    let Some(programs) = Programs::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let scene = Scene::new(node).await;
        for transport in [Transport::Spdy, Transport::Translated, Transport::WebSocket] {
            let kubectl = Kubectl::start(&programs, &node.daemon, transport);
            use_streams(node, &scene, &kubectl, &format!("{transport:?}")).await;
        }
        assert!(node.is_running(&scene.lines).await);
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
