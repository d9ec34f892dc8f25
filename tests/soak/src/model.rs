//! What a client may expect of its pods and containers, by what was acknowledged. Pure.
//!
//! Of each thing the states are kept that it may be in. An acknowledgement leaves one of them; a
//! call that failed or was cut short adds those that it may have led to, now or later, since a
//! daemon may still be at it; what is observed afterwards takes away the others again.

use std::collections::BTreeSet;

use gantry_testkit::cri::v1;

/// The states that something may be in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Possible<S>(BTreeSet<S>);

impl<S: Ord + Copy + std::fmt::Debug> Possible<S> {
    pub fn only(state: S) -> Self {
        Self(BTreeSet::from([state]))
    }

    pub fn has(&self, state: S) -> bool {
        self.0.contains(&state)
    }

    /// It may have become this.
    pub fn add(&mut self, state: S) {
        self.0.insert(state);
    }

    /// It is this.
    fn see(&mut self, state: S) -> Result<(), String> {
        if !self.has(state) {
            return Err(format!("is {state:?}, expected {:?}", self.0));
        }
        *self = Self::only(state);
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PodState {
    Absent,
    Ready,
    NotReady,
}

/// What becomes of a pod that was made.
#[derive(Clone, Debug)]
pub struct Pod {
    may: Possible<PodState>,
    stopping: bool,
    removing: bool,
    /// Its address, once it was seen.
    ip: Option<String>,
}

impl Default for Pod {
    /// One whose making was acknowledged.
    fn default() -> Self {
        Self {
            may: Possible::only(PodState::Ready),
            stopping: false,
            removing: false,
            ip: None,
        }
    }
}

impl Pod {
    pub fn stop(&mut self, acknowledged: bool) {
        self.stopping = true;
        if acknowledged {
            self.may = Possible::only(PodState::NotReady);
        }
    }

    pub fn remove(&mut self, acknowledged: bool) {
        self.removing = true;
        if acknowledged {
            self.may = Possible::only(PodState::Absent);
        }
    }

    /// Whether anything was asked for that may end the pod.
    pub fn ends(&self) -> bool {
        self.stopping || self.removing
    }

    /// It is listed so; `lost` if its shim may be dead.
    pub fn observe(&mut self, state: PodState, lost: bool) -> Result<(), String> {
        if self.may.has(PodState::Ready) && (self.ends() || lost) {
            self.may.add(PodState::NotReady);
        }
        if self.removing && self.may != Possible::only(PodState::Absent) {
            self.may.add(PodState::NotReady);
            self.may.add(PodState::Absent);
        }
        self.may.see(state)
    }

    /// Its address, which stays for as long as the pod is ready.
    pub fn observe_ip(&mut self, ip: &str) -> Result<(), String> {
        match &self.ip {
            Some(before) if before != ip => Err(format!("has address {ip:?}, and had {before:?}")),
            Some(_) => Ok(()),
            None => {
                self.ip = Some(ip.to_owned());
                Ok(())
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    Absent,
    Created,
    Running,
    Exited,
}

impl State {
    /// That of CRI; `None` is one that no container may be listed in.
    pub fn of(state: v1::ContainerState) -> Option<Self> {
        match state {
            v1::ContainerState::ContainerCreated => Some(Self::Created),
            v1::ContainerState::ContainerRunning => Some(Self::Running),
            v1::ContainerState::ContainerExited => Some(Self::Exited),
            v1::ContainerState::ContainerUnknown => None,
        }
    }
}

/// What a container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Does {
    /// Ends by itself.
    Ends { after_ms: u64, code: i32 },
    /// Writes numbered lines until it is stopped.
    Counts,
    /// Nothing until it is stopped.
    Sleeps,
}

impl Does {
    /// In busybox's shell.
    pub fn script(self) -> String {
        match self {
            Self::Ends { after_ms, code } => {
                let (seconds, millis) = (after_ms / 1000, after_ms % 1000);
                format!("echo line 1; sleep {seconds}.{millis:03}; echo line 2; exit {code}")
            }
            Self::Counts => "trap 'exit 0' TERM; n=0; \
                             while :; do n=$((n+1)); echo line $n; sleep 0.3; done"
                .to_owned(),
            Self::Sleeps => "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done".to_owned(),
        }
    }
}

/// How a container ended. None of it changes again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    pub code: i32,
    pub reason: String,
    pub created_at: i64,
    pub started_at: i64,
    pub finished_at: i64,
}

/// SIGKILL and SIGTERM, as a shell tells them.
const KILLED: i32 = 137;
const TERMINATED: i32 = 143;

/// Code of a container whose end nobody saw that could ask for its code.
const UNKNOWN: i32 = 255;

/// Code of a container that could not be started.
const START_FAILED: i32 = 128;

/// What becomes of a container that was made.
#[derive(Clone, Debug)]
pub struct Container {
    pub does: Does,
    may: Possible<State>,
    /// A start was asked for and not acknowledged.
    starting: bool,
    /// An end was asked for, of it or of its pod.
    ending: bool,
    removing: bool,
    /// Not every start was acknowledged.
    start_in_doubt: bool,
    exit: Option<Exit>,
    shares: Possible<i64>,
    lines: u64,
}

impl Container {
    /// One whose making was acknowledged.
    pub fn new(does: Does, shares: i64) -> Self {
        Self {
            does,
            may: Possible::only(State::Created),
            starting: false,
            ending: false,
            removing: false,
            start_in_doubt: false,
            exit: None,
            shares: Possible::only(shares),
            lines: 0,
        }
    }

    pub fn is(&self, state: State) -> bool {
        self.may == Possible::only(state)
    }

    /// Whether it runs until somebody ends it, and nobody has tried.
    pub fn stays(&self) -> bool {
        self.is(State::Running) && !self.ending && !matches!(self.does, Does::Ends { .. })
    }

    /// Whether it may have been removed.
    pub fn may_be_absent(&self) -> bool {
        self.removing || self.may.has(State::Absent)
    }

    pub fn start(&mut self, acknowledged: bool) {
        self.starting = !acknowledged;
        self.start_in_doubt |= !acknowledged;
        if acknowledged {
            self.may = Possible::only(State::Running);
        }
    }

    pub fn stop(&mut self, acknowledged: bool) {
        self.ending = true;
        if acknowledged {
            self.starting = false;
            let created = self.may.has(State::Created);
            self.may = Possible::only(State::Exited);
            if created {
                self.may.add(State::Created);
            }
        }
    }

    pub fn remove(&mut self, acknowledged: bool) {
        self.ending = true;
        self.removing = true;
        if acknowledged {
            self.may = Possible::only(State::Absent);
        }
    }

    pub fn update(&mut self, shares: i64, acknowledged: bool) {
        if acknowledged {
            self.shares = Possible::only(shares);
        } else {
            self.shares.add(shares);
        }
    }

    /// It is listed so; `lost` if its pod's shim may be dead.
    pub fn observe(&mut self, state: State, lost: bool) -> Result<(), String> {
        if self.may.has(State::Created) && self.starting {
            self.may.add(State::Running);
            // Started, and failed.
            self.may.add(State::Exited);
        }
        let ends = self.ending || lost || matches!(self.does, Does::Ends { .. });
        if self.may.has(State::Running) && ends {
            self.may.add(State::Exited);
        }
        if self.may.has(State::Created) && (self.ending || lost) {
            self.may.add(State::Exited);
        }
        if self.removing && !self.is(State::Absent) {
            self.may.add(State::Exited);
            self.may.add(State::Absent);
        }
        self.may.see(state)
    }

    /// It has ended so.
    pub fn observe_exit(&mut self, exit: Exit, lost: bool) -> Result<(), String> {
        if let Some(before) = &self.exit {
            return if *before == exit {
                Ok(())
            } else {
                Err(format!("ended by {exit:?}, and before by {before:?}"))
            };
        }
        let mut codes = Vec::new();
        match self.does {
            Does::Ends { code, .. } => codes.push(code),
            Does::Counts | Does::Sleeps if self.ending => codes.push(0),
            Does::Counts | Does::Sleeps => {}
        }
        if self.ending {
            codes.extend([KILLED, TERMINATED]);
        }
        if lost || self.start_in_doubt {
            codes.push(KILLED);
        }
        if lost {
            codes.push(UNKNOWN);
        }
        if self.start_in_doubt {
            codes.push(START_FAILED);
        }
        if !codes.contains(&exit.code) {
            return Err(format!("ended by {exit:?}, expected one of {codes:?}"));
        }
        if exit.finished_at < exit.started_at || exit.finished_at < exit.created_at {
            return Err(format!("ended before its start: {exit:?}"));
        }
        self.exit = Some(exit);
        Ok(())
    }

    pub fn observe_shares(&mut self, shares: i64) -> Result<(), String> {
        // Stays in doubt: a call that was cut short may still be under way.
        if self.shares.has(shares) {
            Ok(())
        } else {
            Err(format!("has {shares} shares, expected {:?}", self.shares))
        }
    }

    /// Its whole log: no line is missing, none comes twice, none goes again, and all are there once
    /// the end is. Where the shim was killed, what it had just read may be missing.
    pub fn observe_log(&mut self, log: &str, lost: bool) -> Result<(), String> {
        let (mut count, mut last) = (0, 0);
        for line in log.lines() {
            count += 1;
            let number = line.strip_prefix("line ").and_then(|n| n.parse().ok());
            let number: u64 = number.ok_or_else(|| format!("its log has {line:?}"))?;
            if number != last + 1 && !(lost && number > last) {
                return Err(format!("its log has {line:?} after line {last}"));
            }
            last = number;
        }
        if count < self.lines {
            return Err(format!("its log has {count} lines, and had {}", self.lines));
        }
        self.lines = count;
        match (self.does, &self.exit) {
            (Does::Ends { code, .. }, Some(exit)) if exit.code == code && count != 2 && !lost => {
                Err(format!("its log has {count} lines, and it ended after two"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: i32) -> Exit {
        Exit {
            code,
            reason: String::new(),
            created_at: 1,
            started_at: 2,
            finished_at: 3,
        }
    }

    fn running(does: Does) -> Container {
        let mut container = Container::new(does, 2);
        container.start(true);
        container
    }

    const ENDS: Does = Does::Ends {
        after_ms: 1,
        code: 7,
    };

    #[test]
    fn what_was_acknowledged_is_expected() {
        let mut pod = Pod::default();
        assert!(pod.observe(PodState::NotReady, false).is_err());
        assert!(pod.observe(PodState::Absent, true).is_err());
        pod.observe(PodState::Ready, false).unwrap();
        pod.stop(true);
        assert!(pod.observe(PodState::Ready, false).is_err());
        pod.remove(true);
        assert!(pod.observe(PodState::NotReady, false).is_err());
        pod.observe(PodState::Absent, false).unwrap();

        let mut container = running(Does::Sleeps);
        assert!(container.observe(State::Exited, false).is_err());
        assert!(container.observe(State::Absent, true).is_err());
        container.stop(true);
        assert!(container.observe(State::Running, false).is_err());
        container.observe(State::Exited, false).unwrap();
    }

    #[test]
    fn what_was_not_may_be_either_and_is_then_what_it_was_seen_to_be() {
        let mut container = Container::new(Does::Counts, 2);
        container.start(false);
        container.observe(State::Created, false).unwrap();
        container.observe(State::Running, false).unwrap();
        assert!(container.observe(State::Created, false).is_err());
        container.remove(false);
        container.observe(State::Running, false).unwrap();
        container.observe(State::Absent, false).unwrap();
        assert!(container.observe(State::Exited, false).is_err());

        let mut pod = Pod::default();
        pod.stop(false);
        pod.observe(PodState::Ready, false).unwrap();
        pod.observe(PodState::NotReady, false).unwrap();
        assert!(pod.observe(PodState::Ready, false).is_err());
    }

    #[test]
    fn exit_codes_are_those_that_were_told_and_do_not_change() {
        let mut container = running(ENDS);
        container.observe(State::Exited, false).unwrap();
        assert!(container.observe_exit(exit(137), false).is_err());
        container.observe_exit(exit(7), false).unwrap();
        assert!(container.observe_exit(exit(137), true).is_err());
        container.observe_exit(exit(7), false).unwrap();
        let mut container = running(Does::Sleeps);
        assert!(container.observe_exit(exit(0), false).is_err());
        assert!(container.clone().observe_exit(exit(137), true).is_ok());
        container.stop(false);
        container.observe_exit(exit(0), false).unwrap();
    }

    #[test]
    fn a_log_has_every_line_once() {
        let mut container = running(Does::Counts);
        container.observe_log("line 1\nline 2\n", false).unwrap();
        assert!(container.observe_log("line 1\n", false).is_err(), "lost");
        assert!(
            container.observe_log("line 1\nline 3\n", false).is_err(),
            "gap"
        );
        assert!(
            container.observe_log("line 1\nline 1\n", false).is_err(),
            "twice"
        );
        container
            .observe_log("line 1\nline 2\nline 3\n", false)
            .unwrap();
        let mut adopted = running(Does::Counts);
        adopted.observe_log("line 1\nline 3\n", true).unwrap();
        assert!(
            adopted
                .observe_log("line 1\nline 3\nline 3\n", true)
                .is_err(),
            "twice"
        );
        let mut container = running(ENDS);
        container.observe_log("line 1\n", false).unwrap();
        container.observe_exit(exit(7), false).unwrap();
        assert!(
            container.observe_log("line 1\n", false).is_err(),
            "end without output"
        );
        container.observe_log("line 1\nline 2\n", false).unwrap();
    }

    #[test]
    fn an_address_stays() {
        let mut pod = Pod::default();
        pod.observe_ip("10.0.0.1").unwrap();
        pod.observe_ip("10.0.0.1").unwrap();
        assert!(pod.observe_ip("10.0.0.2").is_err());
    }
}
