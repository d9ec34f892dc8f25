//! The real crictl, as people use it.

use std::path::{Path, PathBuf};
use std::process::Command;

use gantry_testkit::daemon::Daemon;

pub struct Crictl {
    program: PathBuf,
    endpoint: String,
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
            dir: daemon.path("."),
        }
    }

    /// Runs a command; returns whether it succeeded, its output and what it said.
    pub fn try_run(&self, args: &[&str]) -> (bool, String, String) {
        let config = self.dir.join("crictl.yaml");
        std::fs::write(&config, "timeout: 60\n").expect("crictl configuration");
        let config = config.display().to_string();
        let output = Command::new(&self.program)
            // Nobody's configuration, and no word about its absence.
            .args(["--config", &config])
            .args(["--timeout", "60s", "--runtime-endpoint", &self.endpoint])
            .args(["--image-endpoint", &self.endpoint])
            .args(args)
            .current_dir("/")
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}", self.program.display()));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        (
            output.status.success(),
            text(&output.stdout),
            text(&output.stderr),
        )
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
