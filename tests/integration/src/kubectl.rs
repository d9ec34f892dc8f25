//! The real kubectl, before what lies between it and a node: tests/kubernetes/node.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use gantry_testkit::daemon::Daemon;

use crate::terminal::{SESSION, Terminal};
use crate::{feed, run};

/// Programs of tests/kubernetes.
pub struct Programs {
    kubectl: PathBuf,
    node: PathBuf,
}

impl Programs {
    /// `KUBECTL` and `KUBERNETES_NODE`; without them the test named `name` is skipped.
    pub fn find(name: &str) -> Option<Self> {
        let path = |variable| std::env::var_os(variable).map(PathBuf::from);
        let found = path("KUBECTL").zip(path("KUBERNETES_NODE"));
        if found.is_none() {
            println!("SKIP {name}: KUBECTL and KUBERNETES_NODE do not name programs");
        }
        found.map(|(kubectl, node)| Self { kubectl, node })
    }
}

/// Who speaks WebSocket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// kubectl of old: SPDY all the way.
    Spdy,
    /// Today's: WebSocket to the API server, and SPDY from there.
    Translated,
    /// Nobody translates.
    WebSocket,
}

/// kubectl and the servers that it reaches the node through, in the daemon's network.
pub struct Kubectl {
    program: PathBuf,
    netns: PathBuf,
    home: PathBuf,
    address: String,
    transport: Transport,
    node: Child,
}

fn in_netns(netns: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", netns.display()))
        .arg("--")
        .current_dir("/");
    command
}

impl Kubectl {
    pub fn start(programs: &Programs, daemon: &Daemon, transport: Transport) -> Self {
        let netns = daemon.netns().path().to_owned();
        let mut node = in_netns(&netns)
            .arg(&programs.node)
            .arg("-cri")
            .arg(daemon.socket())
            .args((transport == Transport::WebSocket).then_some("-pass-websocket"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", programs.node.display()));
        let mut address = String::new();
        let output = node.stdout.as_mut().expect("a pipe");
        BufReader::new(output)
            .read_line(&mut address)
            .expect("the node's address");
        Self {
            program: programs.kubectl.clone(),
            netns,
            home: daemon.path("."),
            address: address.trim_end().to_owned(),
            transport,
            node,
        }
    }

    fn command(&self, wrapper: &[&str], args: &[&str]) -> Command {
        let websockets = match self.transport {
            Transport::Spdy => "false",
            Transport::Translated | Transport::WebSocket => "true",
        };
        let mut command = in_netns(&self.netns);
        command
            .args(wrapper)
            .arg(&self.program)
            .args(["--kubeconfig", "/dev/null", "--namespace", "test"])
            .args(["--server", &self.address])
            .args(args)
            .env("HOME", &self.home)
            .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets)
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websockets);
        command
    }

    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// Runs a command; returns whether it succeeded, its output and what it said.
    pub fn try_run(&self, args: &[&str]) -> (bool, String, String) {
        run(self.command(&[], args))
    }

    /// Runs a command whose standard input is `input`, as much of it as it takes.
    pub fn feed(&self, args: &[&str], input: Vec<u8>) -> Output {
        feed(self.command(&[], args), input)
    }

    /// Starts a command in a terminal.
    pub fn terminal(&self, args: &[&str]) -> Terminal {
        Terminal::start(self.command(&SESSION, args))
    }
}

impl Drop for Kubectl {
    fn drop(&mut self) {
        // It ends with its standard input.
        drop(self.node.stdin.take());
        let _ = self.node.wait();
    }
}
