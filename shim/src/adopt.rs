//! What a shim gives away so that another can go on after its death, and how the other takes it.
//!
//! ```text
//! shim                daemon                              next shim
//!  |-- InCustody ----->  pidfd, output, input of each      |
//!  killed                container, kept as duplicates     |
//!                        |-- Bootstrap { adopt: holder } ->  takes over holder and socket
//!                        |-- Adopt, duplicates ----------->  reads output, waits for the end
//! ```
//!
//! While nobody reads, a container that writes more than a pipe holds waits: nothing is lost of what
//! it writes. What the dead shim had read and not written to the log is.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use gantry_shim_api::v1;
use gantry_shim_api::v1::message::Body;
use gantry_sys::failpoint;
use gantry_sys::pidfd::PidFd;
use gantry_sys::process::{Ended, process_ref};
use gantry_types::ProcessRef;

use crate::call::Asker;
use crate::container::{Container, Death, Phase, Process};
use crate::error::Error;
use crate::log::{Kind, LogFile};
use crate::output::Stream;
use crate::requests::{check_name, done, read_pid, remove};
use crate::shim::{EXIT_FILE, Shim};
use crate::{cgroup, clock, tree};

/// Exit code of a process whose own nobody knows.
const UNKNOWN: i32 = 255;

impl Shim {
    pub fn keep_holder(&mut self, asker: Asker) -> Result<(), Error> {
        self.holder.keep()?;
        self.answer_aside(asker, done(), Vec::new());
        Ok(())
    }

    pub fn custody(&mut self, asker: Asker, custody: &v1::Custody) -> Result<(), Error> {
        let container = self.find_running(&custody.container_id)?;
        let (has, fds) = duplicates(container).map_err(Error::call("duplicate descriptors"))?;
        self.answer_aside(asker, Body::InCustody(has), fds);
        Ok(())
    }

    pub fn adopt(
        &mut self,
        asker: Asker,
        adopt: v1::Adopt,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Error> {
        failpoint::at("adopt::begins").map_err(Error::call("adopt a container"))?;
        let missing = |what: &str| Error::InvalidArgument(format!("Adopt has no {what}"));
        let start = adopt.start.ok_or_else(|| missing("start"))?;
        let process: ProcessRef = adopt.process.ok_or_else(|| missing("process"))?.into();
        check_name("container id", &start.container_id)?;
        if !Path::new(&start.bundle).is_absolute() {
            let message = format!("bundle {:?} is not an absolute path", start.bundle);
            return Err(Error::InvalidArgument(message));
        }
        if self.find(&start.container_id).is_ok() {
            return Err(Error::AlreadyExists {
                what: "container",
                id: start.container_id,
            });
        }
        let has = adopt.has.unwrap_or_default();
        let flags = [has.process, has.stdout, has.stderr, has.stdin];
        let expected = flags.into_iter().filter(|has| *has).count();
        if fds.len() != expected {
            let message = format!("Adopt names {expected} descriptors, {} came", fds.len());
            return Err(Error::InvalidArgument(message));
        }
        let mut fds = fds.into_iter();
        let [pidfd, stdout, stderr, stdin] = flags.map(|has| if has { fds.next() } else { None });
        let pidfd = PidFd::from(pidfd.ok_or_else(|| missing("descriptor of the process"))?);
        let log = match start.log_path.as_str() {
            "" => None,
            path => Some(LogFile::take_over(Path::new(path))?),
        };
        let number = self.number();
        let mut container = Container::new(number, start, log);
        if self.runtime.systemd_cgroup {
            container.oom.watch_pod(&container.start.oom_file);
        }
        for (fd, kind) in [(stdout, Kind::Stdout), (stderr, Kind::Stderr)] {
            let Some(fd) = fd else { continue };
            gantry_sys::io::set_nonblocking(&fd).map_err(Error::call("prepare output"))?;
            let stream = Some(Stream::new(fd, kind));
            match kind {
                Kind::Stdout => container.stdout = stream,
                Kind::Stderr => container.stderr = stream,
            }
        }
        container.stdin = stdin;
        container.phase = Phase::Running;
        container.started_at = adopt.started_at;
        let written = exit_record(&container.bundle().join(EXIT_FILE))?;
        let leftovers = leftovers(&container);
        let execs = adopt.execs.into_iter().map(ProcessRef::from);
        let within = container.cgroup();
        for exec in execs.chain(leftovers) {
            tree::kill(exec, within.as_deref());
        }
        if written.is_none() {
            self.watch_adopted(number, &pidfd)
                .map_err(Error::call("watch the container's process"))?;
        }
        container.process = Some(Process {
            process,
            pidfd: Some(pidfd),
            adopted: true,
        });
        container.oom.open(&container.start.oom_file);
        self.containers.insert(number, container);
        self.watch_oom(number);
        if let Err(e) = self.watch(number) {
            self.containers.remove(&number);
            return Err(Error::call("watch output")(e));
        }
        failpoint::pass("adopt::taken");
        self.answer(asker, done());
        if let Some(record) = written {
            self.adopt_ended(number, record);
        }
        Ok(())
    }

    /// The shim before us had seen its end to the last: nobody was told.
    fn adopt_ended(&mut self, number: u32, record: v1::ExitRecord) {
        if let Some(container) = self.containers.get_mut(&number) {
            container.ended = Some(Death {
                ended: Ended {
                    pid: 0,
                    code: record.code,
                    signal: None,
                },
                at: record.finished_at,
                unknown: record.unknown,
            });
            container.close_streams(&mut self.buffers);
            container.oom.close();
            if let Some(process) = &mut container.process {
                process.pidfd = None;
            }
        }
        self.tell_exit(number, record);
    }

    /// The first process of a container has ended that is not our child.
    pub fn adopted_ended(&mut self, number: u32) {
        let Some(container) = self.containers.get(&number) else {
            return;
        };
        if container.ended.is_some() {
            return;
        }
        let Some(process) = &container.process else {
            return;
        };
        let at = clock::now();
        let exit = process
            .pidfd
            .as_ref()
            .and_then(|pidfd| pidfd.exit_of(process.process));
        let death = match exit {
            Some(ended) => Death {
                ended,
                at,
                unknown: false,
            },
            None => Death {
                ended: Ended {
                    pid: process.process.pid,
                    code: UNKNOWN,
                    signal: None,
                },
                at,
                unknown: true,
            },
        };
        self.container_ended(number, death);
    }
}

/// Duplicates of what a container needs to go on, and which there are.
fn duplicates(container: &Container) -> std::io::Result<(v1::InCustody, Vec<OwnedFd>)> {
    let process = container.process.as_ref();
    let pidfd = process.and_then(|process| process.pidfd.as_ref());
    let stdin = container
        .stdin
        .as_ref()
        .filter(|_| !container.start.stdin_once);
    let found = [
        pidfd.map(AsFd::as_fd),
        container.stdout.as_ref().map(|stream| stream.fd.as_fd()),
        container.stderr.as_ref().map(|stream| stream.fd.as_fd()),
        stdin.map(AsFd::as_fd),
    ];
    let [process, stdout, stderr, stdin] = found.map(|fd| fd.is_some());
    let fds = found.into_iter().flatten();
    let fds = fds.map(|fd| fd.try_clone_to_owned());
    let has = v1::InCustody {
        process,
        stdout,
        stderr,
        stdin,
    };
    Ok((has, fds.collect::<Result<_, _>>()?))
}

/// What a shim has written of a container's end, if it came to that.
fn exit_record(path: &Path) -> Result<Option<v1::ExitRecord>, Error> {
    let bytes = match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        bytes => bytes.map_err(Error::io("read", path))?,
    };
    let record = prost::Message::decode(bytes.as_slice());
    record.map(Some).map_err(|e| {
        let message = format!("exit record {}: {e}", path.display());
        Error::InvalidArgument(message)
    })
}

/// Removes what calls of the runtime were cut off from, and returns the processes that they had
/// begun in the container: nobody was told of those.
fn leftovers(container: &Container) -> Vec<ProcessRef> {
    let bundle = container.bundle();
    let members = container.cgroup().map(|dir| cgroup::processes(&dir));
    let mut begun = Vec::new();
    for entry in std::fs::read_dir(&bundle).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let exec = name.starts_with("exec-");
        if exec
            && name.ends_with(".pid")
            && let Ok(pid) = read_pid(&entry.path())
            // Else the pid may be somebody else's by now.
            && members.as_ref().is_some_and(|members| members.contains(&pid))
            && let Ok(process) = process_ref(pid)
        {
            begun.push(process);
        }
        let log = name.starts_with("runtime-") && name.ends_with(".log");
        if (exec || log)
            && let Err(e) = remove(&entry.path())
        {
            crate::report!("remove {}: {e}", entry.path().display());
        }
    }
    begun
}
