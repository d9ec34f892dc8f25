//! Command lines.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Flavour;

/// What a runtime and the helpers that it executes see as environment: nothing of the daemon's,
/// whose variables may hold proxies and credentials.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An OCI runtime as one RuntimeClass handler configures it.
#[derive(Clone, Debug)]
pub struct Runtime {
    pub binary: PathBuf,
    /// `--root`: where it keeps its state; `None` keeps its default.
    pub root: Option<PathBuf>,
    /// `--systemd-cgroup`.
    pub systemd_cgroup: bool,
    pub flavour: Flavour,
}

/// One execution of the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    pub program: PathBuf,
    pub args: Vec<OsString>,
}

impl Invocation {
    /// The command with a clean environment; standard streams and process group are up to the
    /// caller.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).env_clear().env("PATH", PATH);
        command
    }

    fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    fn option(self, name: &str, value: Option<&Path>) -> Self {
        match value {
            Some(value) => self.arg(name).arg(value),
            None => self,
        }
    }
}

/// Arguments of making and starting a container.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    pub id: &'a str,
    pub bundle: &'a Path,
    /// Receives the pid of the container's first process.
    pub pid_file: &'a Path,
    /// Unix socket that receives the terminal's master; needed when `process.terminal` is set.
    pub console_socket: Option<&'a Path>,
    /// Receives the runtime's JSON log.
    pub log: &'a Path,
}

/// Arguments of running a process in a container.
#[derive(Clone, Copy, Debug)]
pub struct Exec<'a> {
    pub id: &'a str,
    /// File with the OCI `process` object.
    pub process: &'a Path,
    pub pid_file: &'a Path,
    pub console_socket: Option<&'a Path>,
    pub log: &'a Path,
}

impl Runtime {
    /// A runtime whose flavour is guessed from the binary's name.
    pub fn new(binary: impl Into<PathBuf>) -> Self {
        let binary = binary.into();
        let flavour = Flavour::of_binary(&binary);
        Self {
            binary,
            root: None,
            systemd_cgroup: false,
            flavour,
        }
    }

    fn invoke(&self, log: Option<&Path>, command: &str) -> Invocation {
        let mut call = Invocation {
            program: self.binary.clone(),
            args: Vec::with_capacity(16),
        }
        .option("--root", self.root.as_deref());
        if let Some(log) = log {
            call = call.arg("--log").arg(log).arg("--log-format").arg("json");
        }
        if self.systemd_cgroup {
            call = call.arg("--systemd-cgroup");
        }
        call.arg(command)
    }

    /// The executions that make and start a container, to be run one after the other: a single
    /// `run --detach` where the flavour has it, which saves a start of the runtime.
    pub fn run(&self, run: &Run<'_>) -> Vec<Invocation> {
        let create = |command: &str| {
            self.invoke(Some(run.log), command)
                .arg("--bundle")
                .arg(run.bundle)
                .option("--pid-file", Some(run.pid_file))
                .option("--console-socket", run.console_socket)
        };
        if self.flavour.has_detached_run() {
            vec![create("run").arg("--detach").arg(run.id)]
        } else {
            vec![
                create("create").arg(run.id),
                self.invoke(Some(run.log), "start").arg(run.id),
            ]
        }
    }

    /// `exec --detach`: returns once the process runs.
    pub fn exec(&self, exec: &Exec<'_>) -> Invocation {
        self.invoke(Some(exec.log), "exec")
            .arg("--detach")
            .option("--process", Some(exec.process))
            .option("--pid-file", Some(exec.pid_file))
            .option("--console-socket", exec.console_socket)
            .arg(exec.id)
    }

    /// `delete`; with `force` also of a running container.
    pub fn delete(&self, id: &str, force: bool, log: &Path) -> Invocation {
        let call = self.invoke(Some(log), "delete");
        if force {
            call.arg("--force").arg(id)
        } else {
            call.arg(id)
        }
    }

    /// `update` with an OCI `linux.resources` object on standard input. Named as a file because
    /// not every flavour knows `-`.
    pub fn update(&self, id: &str, log: &Path) -> Invocation {
        self.invoke(Some(log), "update")
            .arg("--resources")
            .arg("/dev/stdin")
            .arg(id)
    }

    pub(crate) fn probe(&self, command: &str, arg: Option<&str>) -> Invocation {
        let call = self.invoke(None, command);
        match arg {
            Some(arg) => call.arg(arg),
            None => call,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(call: &Invocation) -> String {
        let words: Vec<_> = call.args.iter().map(|arg| arg.to_string_lossy()).collect();
        words.join(" ")
    }

    fn run<'a>(console: Option<&'a Path>) -> Run<'a> {
        Run {
            id: "c1",
            bundle: Path::new("/b"),
            pid_file: Path::new("/b/pid"),
            console_socket: console,
            log: Path::new("/b/log"),
        }
    }

    #[test]
    fn runc_runs_in_one_execution() {
        let mut runtime = Runtime::new("/usr/sbin/runc");
        runtime.root = Some("/run/r".into());
        runtime.systemd_cgroup = true;
        let calls = runtime.run(&run(Some(Path::new("/b/c.sock"))));
        assert_eq!(calls.len(), 1);
        assert_eq!(
            line(&calls[0]),
            "--root /run/r --log /b/log --log-format json --systemd-cgroup run --bundle /b \
             --pid-file /b/pid --console-socket /b/c.sock --detach c1"
        );
    }

    #[test]
    fn others_create_and_start() {
        let calls = Runtime::new("/usr/bin/youki").run(&run(None));
        let lines: Vec<_> = calls.iter().map(line).collect();
        assert_eq!(
            lines,
            [
                "--log /b/log --log-format json create --bundle /b --pid-file /b/pid c1",
                "--log /b/log --log-format json start c1",
            ]
        );
    }

    #[test]
    fn exec_delete_and_update() {
        let runtime = Runtime::new("/usr/bin/crun");
        let exec = Exec {
            id: "c1",
            process: Path::new("/b/p.json"),
            pid_file: Path::new("/b/pid"),
            console_socket: None,
            log: Path::new("/b/log"),
        };
        assert_eq!(
            line(&runtime.exec(&exec)),
            "--log /b/log --log-format json exec --detach --process /b/p.json --pid-file /b/pid c1"
        );
        let log = Path::new("/l");
        assert_eq!(
            line(&runtime.delete("c1", true, log)),
            "--log /l --log-format json delete --force c1"
        );
        assert_eq!(
            line(&runtime.update("c1", log)),
            "--log /l --log-format json update --resources /dev/stdin c1"
        );
    }

    #[test]
    fn nothing_of_our_environment_reaches_the_runtime() {
        let call = Invocation {
            program: "/usr/bin/env".into(),
            args: Vec::new(),
        };
        let output = call.command().output().unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            format!("PATH={PATH}\n")
        );
    }
}
