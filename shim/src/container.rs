//! One container: what is known of it and where its output goes.
//!
//! ```text
//! Starting --runtime succeeded--> Running --reaped--> Draining --pipes at their end,--> Exited
//!    |                                                          or deadline; record
//!    +--runtime failed--> delete --force, answer, forgotten     written, event sent
//! ```
//!
//! An exit that comes while the start is not announced yet waits in `ended` (create and start are
//! two executions) or is parked by the reaper (the pid is not known yet).

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use gantry_shim_api::v1;
use gantry_sys::pidfd::PidFd;
use gantry_sys::process::Ended;
use gantry_types::ProcessRef;

use crate::attach::Attachment;
use crate::call::Asker;
use crate::console::Console;
use crate::log::{Kind, LogFile};
use crate::oom::Oom;
use crate::output::{Buffers, Pumped, Stream};

/// Ended execs that are remembered, so that what they left behind can still be killed.
const ENDED_EXECS: usize = 16;

/// Reads of each stream at a container's end before it is left to the loop: a grandchild may
/// write for ever.
const LAST_READS: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Starting,
    Running,
    Draining,
    Exited,
}

/// A process that ended, and when (nanoseconds since the epoch).
#[derive(Clone, Copy, Debug)]
pub struct Death {
    pub ended: Ended,
    pub at: i64,
    /// Nobody knows how.
    pub unknown: bool,
}

/// A process that we can signal.
#[derive(Debug)]
pub struct Process {
    pub process: ProcessRef,
    /// `None` if it had ended before we could open it.
    pub pidfd: Option<PidFd>,
    /// Started by a shim before us: not our child, its end comes by its descriptor.
    pub adopted: bool,
}

/// A process that the daemon has run in the container.
#[derive(Debug)]
pub struct Exec {
    pub id: String,
    pub process: ProcessRef,
    /// The connection that asked for it.
    pub conn: u32,
    /// How long it may go on when that connection is gone; `None`: for ever.
    pub grace: Option<Duration>,
    /// The connection is gone: when what is left of its tree is killed.
    pub end_by: Option<Instant>,
}

impl Exec {
    /// Its connection is gone.
    pub fn orphaned(&mut self) {
        self.end_by = self.grace.map(|grace| Instant::now() + grace);
    }
}

/// How far the runtime's delete is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deletion {
    None,
    UnderWay,
    Done,
}

pub struct Container {
    /// Never used again in the life of the shim; part of the loop's tokens.
    pub number: u32,
    pub start: v1::Start,
    pub phase: Phase,
    pub process: Option<Process>,
    pub started_at: i64,
    pub console: Option<Console>,
    pub log: Option<LogFile>,
    pub stdout: Option<Stream>,
    pub stderr: Option<Stream>,
    /// Held so that a container that reads its standard input waits instead of seeing the end.
    pub stdin: Option<OwnedFd>,
    pub attachments: Vec<Attachment>,
    pub oom: Oom,
    pub oom_told: bool,
    pub ended: Option<Death>,
    pub drain_until: Option<Instant>,
    pub record: Option<v1::ExitRecord>,
    pub deletion: Deletion,
    pub delete_askers: Vec<Asker>,
    pub execs: Vec<Exec>,
    /// Names of ended execs and what they were.
    pub ended_execs: VecDeque<(String, ProcessRef)>,
}

impl Container {
    pub fn new(number: u32, start: v1::Start, log: Option<LogFile>) -> Self {
        Self {
            number,
            start,
            phase: Phase::Starting,
            process: None,
            started_at: 0,
            console: None,
            log,
            stdout: None,
            stderr: None,
            stdin: None,
            attachments: Vec::new(),
            oom: Oom::default(),
            oom_told: false,
            ended: None,
            drain_until: None,
            record: None,
            deletion: Deletion::None,
            delete_askers: Vec::new(),
            execs: Vec::new(),
            ended_execs: VecDeque::new(),
        }
    }

    pub fn id(&self) -> &str {
        &self.start.container_id
    }

    pub fn bundle(&self) -> PathBuf {
        PathBuf::from(&self.start.bundle)
    }

    /// The cgroup with all processes of the container, if the daemon named one.
    pub fn cgroup(&self) -> Option<PathBuf> {
        (!self.start.cgroup_dir.is_empty()).then(|| PathBuf::from(&self.start.cgroup_dir))
    }

    fn stream(&mut self, kind: Kind) -> &mut Option<Stream> {
        match kind {
            Kind::Stdout => &mut self.stdout,
            Kind::Stderr => &mut self.stderr,
        }
    }

    /// One turn of a stream; at its end it is closed.
    pub fn pump(&mut self, kind: Kind, buffers: &mut Buffers) -> Pumped {
        let (slot, log) = match kind {
            Kind::Stdout => (&mut self.stdout, &mut self.log),
            Kind::Stderr => (&mut self.stderr, &mut self.log),
        };
        let Some(stream) = slot else {
            return Pumped::End;
        };
        let pumped = stream.pump(log.as_mut(), buffers);
        match pumped {
            // After the log, which nobody holds up.
            Pumped::Some(len) => {
                let bytes = &buffers.input[..len];
                self.attachments
                    .retain_mut(|client| client.show(kind, bytes));
            }
            Pumped::Empty => {}
            Pumped::End => self.close_stream(kind, buffers),
        }
        pumped
    }

    fn close_stream(&mut self, kind: Kind, buffers: &mut Buffers) {
        if let Some(mut stream) = self.stream(kind).take() {
            stream.finish(self.log.as_mut(), buffers);
        }
    }

    /// Takes what the pipes hold. True once both are at their end.
    pub fn drain(&mut self, buffers: &mut Buffers) -> bool {
        for kind in [Kind::Stdout, Kind::Stderr] {
            for _ in 0..LAST_READS {
                if !matches!(self.pump(kind, buffers), Pumped::Some(_)) {
                    break;
                }
            }
        }
        self.stdout.is_none() && self.stderr.is_none()
    }

    /// Closes the streams, whoever may still hold their other ends.
    pub fn close_streams(&mut self, buffers: &mut Buffers) {
        self.close_stream(Kind::Stdout, buffers);
        self.close_stream(Kind::Stderr, buffers);
        self.stdin = None;
        self.attachments = Vec::new();
    }

    /// A descriptor that writes to the container's input, if it was started with one. With
    /// `stdin_once` the first who asks gets the only one, so that the input ends when it is closed,
    /// whoever closes it and why; a terminal's input has no end of its own.
    pub fn input(&mut self) -> std::io::Result<Option<OwnedFd>> {
        if !self.start.stdin {
            return Ok(None);
        }
        if self.start.tty {
            let terminal = self.stdout.as_ref().map(|stream| stream.fd.try_clone());
            return terminal.transpose();
        }
        if self.start.stdin_once {
            return Ok(self.stdin.take());
        }
        self.stdin.as_ref().map(OwnedFd::try_clone).transpose()
    }

    pub fn exec_ended(&mut self, index: usize) -> Exec {
        let exec = self.execs.swap_remove(index);
        if self.ended_execs.len() == ENDED_EXECS {
            self.ended_execs.pop_front();
        }
        self.ended_execs.push_back((exec.id.clone(), exec.process));
        exec
    }

    pub fn state(&self) -> v1::ContainerState {
        v1::ContainerState {
            id: self.id().to_owned(),
            process: match self.phase {
                Phase::Starting => None,
                _ => self.process.as_ref().map(|process| process.process.into()),
            },
            started_at: self.started_at,
            exit: self.record,
            log_dropped: self.log.as_ref().map_or(0, |log| log.dropped),
        }
    }
}
