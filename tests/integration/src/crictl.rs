//! The real crictl, as people use it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gantry_testkit::daemon::Daemon;

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
        let output = self
            .command(&[], args)
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}", self.program.display()));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        (
            output.status.success(),
            text(&output.stdout),
            text(&output.stderr),
        )
    }

    /// Starts a command with its standard input and output as pipes.
    pub fn spawn(&self, args: &[&str]) -> Child {
        self.command(&[], args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", self.program.display()))
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

/// How long a terminal may take to show what is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// A crictl whose standard streams are a terminal, as when somebody sits before it.
pub struct Terminal {
    child: Child,
    master: File,
    output: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Terminal {
    pub fn start(crictl: &Crictl, args: &[&str]) -> Self {
        let (master, slave) = gantry_sys::pty::open().expect("terminal");
        let copy = || slave.try_clone().expect("terminal");
        let child = crictl
            .command(&["setsid", "--ctty", "--wait"], args)
            .stdin(copy())
            .stdout(copy())
            .stderr(copy())
            .spawn()
            .expect("nsenter");
        drop(slave);
        let output = Arc::new(Mutex::new(Vec::new()));
        let mut from = File::from(master.try_clone().expect("terminal"));
        let to = Arc::clone(&output);
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO when nobody has it open any more.
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                to.lock().expect("output").extend(&buffer[..count]);
            }
        });
        Self {
            child,
            master: master.into(),
            output,
            reader: Some(reader),
        }
    }

    pub fn resize(&self, width: u16, height: u16) {
        gantry_sys::pty::resize(&self.master, width, height).expect("resize");
    }

    pub fn write(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("terminal");
    }

    fn output(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().expect("output")).into_owned()
    }

    /// Types `question` now and then until `answer` is shown after it.
    #[track_caller]
    pub fn ask_until(&mut self, question: &str, answer: &str) {
        let (deadline, before) = (Instant::now() + PATIENCE, self.output().len());
        loop {
            self.write(question);
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(25));
                if self
                    .output()
                    .get(before..)
                    .is_some_and(|new| new.contains(answer))
                {
                    return;
                }
            }
            assert!(
                Instant::now() < deadline,
                "no {answer:?} in {:?}",
                self.output()
            );
        }
    }

    /// What is shown between two texts.
    #[track_caller]
    pub fn until(&self, before: &str, after: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = self.output();
            let rest = output.split_once(before).map(|(_, rest)| rest);
            if let Some((found, _)) = rest.and_then(|rest| rest.split_once(after)) {
                return found.to_owned();
            }
            assert!(Instant::now() < deadline, "no {before:?} in {output:?}");
            std::thread::sleep(Duration::from_millis(25));
        }
    }

    /// Waits for its end; whether it succeeded, and all that was shown.
    #[track_caller]
    pub fn finish(mut self) -> (bool, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                if let Some(reader) = self.reader.take() {
                    reader.join().expect("reader");
                }
                return (status.success(), self.output());
            }
            assert!(
                Instant::now() < deadline,
                "it does not end: {:?}",
                self.output()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Of a test that failed; otherwise it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
