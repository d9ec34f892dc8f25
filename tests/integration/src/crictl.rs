//! The real crictl, as people use it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use gantry_testkit::daemon::Daemon;

use crate::terminal::{SESSION, Terminal};
use crate::{feed, run};

pub struct Crictl {
    program: PathBuf,
    endpoint: String,
    /// The daemon's network namespace, where its streaming server listens.
    netns: PathBuf,
    /// Where configuration files are written.
    dir: PathBuf,
}

impl Crictl {
    /// `CRICTL`; without it the test named `name` is skipped.
    pub fn find(name: &str) -> Option<PathBuf> {
        let path = std::env::var_os("CRICTL").map(PathBuf::from);
        if path.is_none() {
            println!("SKIP {name}: CRICTL does not name a crictl");
        }
        path
    }

    pub fn new(program: &Path, daemon: &Daemon) -> Self {
        Self {
            program: program.to_owned(),
            endpoint: format!("unix://{}", daemon.socket().display()),
            netns: daemon.netns().path().to_owned(),
            dir: daemon.path("."),
        }
    }

    /// Runs a command; returns whether it succeeded, its output and what it said.
    pub fn try_run(&self, args: &[&str]) -> (bool, String, String) {
        run(self.command(&[], args))
    }

    /// Starts a command with its standard input and output as pipes.
    pub fn spawn(&self, args: &[&str]) -> Child {
        self.command(&[], args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", self.program.display()))
    }

    /// Runs a command whose standard input is `input`, as much of it as it takes.
    pub fn feed(&self, args: &[&str], input: Vec<u8>) -> Output {
        feed(self.command(&[], args), input)
    }

    /// Starts a command in a terminal.
    pub fn terminal(&self, args: &[&str]) -> Terminal {
        Terminal::start(self.command(&SESSION, args))
    }

    /// A command in the daemon's network, run by the program that `wrapper` is.
    fn command(&self, wrapper: &[&str], args: &[&str]) -> Command {
        let config = self.dir.join("crictl.yaml");
        std::fs::write(&config, "timeout: 60\n").expect("crictl configuration");
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.netns.display()))
            .arg("--")
            .args(wrapper)
            .arg(&self.program)
            // Nobody's configuration, and no word about its absence.
            .arg("--config")
            .arg(&config)
            .args(["--timeout", "60s", "--runtime-endpoint", &self.endpoint])
            .args(["--image-endpoint", &self.endpoint])
            .args(args)
            .current_dir("/");
        command
    }

    /// Output of a command that must succeed.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> String {
        let (success, stdout, stderr) = self.try_run(args);
        assert!(success, "crictl {}: {stderr}\n{stdout}", args.join(" "));
        stdout
    }

    #[track_caller]
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let text = self.run(args);
        serde_json::from_str(&text)
            .unwrap_or_else(|e| panic!("crictl {}: {e}: {text}", args.join(" ")))
    }

    /// Writes a configuration and returns its path.
    pub fn file(&self, name: &str, content: &serde_json::Value) -> String {
        let path = self.dir.join(name);
        std::fs::write(&path, content.to_string()).expect("crictl configuration");
        path.display().to_string()
    }
}
