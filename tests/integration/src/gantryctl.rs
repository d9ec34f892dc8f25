//! gantryctl, as people use it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use gantry_testkit::daemon::Daemon;

use crate::feed;
use crate::terminal::{SESSION, Terminal};

pub struct Gantryctl {
    program: PathBuf,
    socket: PathBuf,
}

impl Gantryctl {
    /// The program; without it the test named `name` is skipped.
    pub fn find(name: &str) -> Option<PathBuf> {
        let found = gantry_testkit::daemon::gantryctl().ok();
        if found.is_none() {
            println!("SKIP {name}: GANTRYCTL does not name a gantryctl, and none was built");
        }
        found
    }

    pub fn new(program: &Path, daemon: &Daemon) -> Self {
        Self {
            program: program.to_owned(),
            socket: daemon.socket().to_owned(),
        }
    }

    /// `gantryctl image` with these arguments: exit code, standard output and standard error.
    pub fn image(&self, args: &[&str]) -> (i32, String, String) {
        let args = [&["image"], args].concat();
        let output = self.feed(&args, Vec::new());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().expect("an exit code");
        (code, text(&output.stdout), text(&output.stderr))
    }

    /// Runs a command whose standard input is `input`, as much of it as it takes.
    pub fn feed(&self, args: &[&str], input: Vec<u8>) -> Output {
        feed(self.command(&[], args), input)
    }

    /// Starts a command in a terminal.
    pub fn terminal(&self, args: &[&str]) -> Terminal {
        Terminal::start(self.command(&SESSION, args))
    }

    /// A command, run by the program that `wrapper` is.
    fn command(&self, wrapper: &[&str], args: &[&str]) -> Command {
        let program = self.program.as_os_str();
        let mut line = wrapper.iter().map(std::ffi::OsStr::new).chain([program]);
        let mut command = Command::new(line.next().unwrap_or(program));
        command
            .args(line)
            .arg("--socket")
            .arg(&self.socket)
            .args(args);
        command
    }
}
