//! What was asked of gantryd and what it has acknowledged, in the order of the disk's log.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::disk::{Entry, Log};

/// A change that was asked for. Images go by full name, the rest by id, and what has none yet by
/// the name that it is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// By a pull or an import.
    AddImage(String),
    RemoveImage(String),
    RunPod(String),
    StopPod(String),
    RemovePod(String),
    CreateContainer {
        pod: String,
        name: String,
    },
    StartContainer(String),
    StopContainer(String),
    RemoveContainer(String),
}

/// What an acknowledgement says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    /// The id of what was made.
    Made(String),
    /// The code that a stopped container has ended with.
    Ended(i32),
}

#[derive(Clone, Debug)]
enum Event {
    Asked(Operation),
    /// The answer to the event of that number.
    Answered(usize, Answer),
}

/// Events, each with a mark in the disk's log.
#[derive(Debug)]
pub struct History {
    log: Log,
    events: Mutex<Vec<Event>>,
}

impl History {
    pub fn new(log: &Log) -> Self {
        Self {
            log: log.clone(),
            events: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, event: Event) -> usize {
        let mut events = self.lock();
        self.log.mark(events.len());
        events.push(event);
        events.len() - 1
    }

    /// To be called before the request is sent.
    pub fn asked(&self, operation: Operation) -> usize {
        self.push(Event::Asked(operation))
    }

    /// To be called after the answer has come; `asked` is what [`History::asked`] gave.
    pub fn answered(&self, asked: usize, answer: Answer) {
        self.push(Event::Answered(asked, answer));
    }

    /// What a cut before entry `cut` of the log may leave.
    pub fn expected(&self, cut: usize) -> Expected {
        let entries = self.log.entries();
        let seen = entries[..cut]
            .iter()
            .filter(|entry| matches!(entry, Entry::Mark(_)))
            .count();
        Expected::after(&self.lock()[..seen])
    }

    /// Acknowledged changes between whose request and answer the disk was not flushed: whatever a
    /// cut may have spared of them by luck, they were not durable.
    pub fn unflushed(&self) -> Vec<Operation> {
        let mut flushes = Vec::new();
        let mut count = 0;
        for entry in self.log.entries() {
            match entry {
                Entry::Write { .. } => {}
                Entry::Flush => count += 1,
                Entry::Mark(_) => flushes.push(count),
            }
        }
        let events = self.lock();
        let mut unflushed = Vec::new();
        for (number, event) in events.iter().enumerate() {
            if let Event::Answered(asked, _) = event
                && flushes[number] == flushes[*asked]
                && let Event::Asked(operation) = &events[*asked]
                && !was_there(&events[..*asked], operation)
            {
                unflushed.push(operation.clone());
            }
        }
        unflushed
    }
}

/// Whether an image is added that is there: nothing changes by it.
fn was_there(before: &[Event], operation: &Operation) -> bool {
    let Operation::AddImage(name) = operation else {
        return false;
    };
    Expected::after(before).images.get(name) == Some(&Presence::Present)
}

/// Whether something must be there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Presence {
    #[default]
    Absent,
    Present,
    /// A change of it was asked for and not acknowledged.
    Either,
}

/// How far a container has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    pub pod: String,
    pub presence: Presence,
    /// The code that it was seen to have ended with.
    pub ended: Option<i32>,
}

/// What must be there after a cut.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// By full name.
    pub images: BTreeMap<String, Presence>,
    /// By id.
    pub pods: BTreeMap<String, Presence>,
    pub containers: BTreeMap<String, Container>,
    /// Names of pods and containers that were asked for and may have an id by now.
    pub half_made: Vec<String>,
    /// Changes that were acknowledged.
    pub acknowledged: usize,
}

impl Expected {
    fn after(events: &[Event]) -> Self {
        let mut answers = vec![None; events.len()];
        for event in events {
            if let Event::Answered(asked, answer) = event {
                answers[*asked] = Some(answer);
            }
        }
        let mut expected = Self::default();
        // Each object has one driver, so its changes do not overlap and their order is that in
        // which they were asked for.
        for (event, answer) in events.iter().zip(&answers) {
            if let Event::Asked(operation) = event {
                expected.acknowledged += usize::from(answer.is_some());
                expected.apply(operation, *answer);
            }
        }
        expected
    }

    fn apply(&mut self, operation: &Operation, answer: Option<&Answer>) {
        let sure = |presence| match answer {
            Some(_) => presence,
            None => Presence::Either,
        };
        match operation {
            Operation::AddImage(name) => {
                // One that is there stays there while it is pulled again.
                let presence = self.images.entry(name.clone()).or_default();
                if *presence != Presence::Present {
                    *presence = sure(Presence::Present);
                }
            }
            Operation::RemoveImage(name) => {
                self.images.insert(name.clone(), sure(Presence::Absent));
            }
            Operation::RunPod(name) => match answer {
                Some(Answer::Made(id)) => {
                    self.pods.insert(id.clone(), Presence::Present);
                }
                _ => self.half_made.push(name.clone()),
            },
            Operation::RemovePod(id) => {
                self.pods.insert(id.clone(), sure(Presence::Absent));
                // What is in a pod goes with it.
                for container in self.containers.values_mut() {
                    if container.pod == *id && container.presence != Presence::Absent {
                        container.presence = sure(Presence::Absent);
                    }
                }
            }
            Operation::CreateContainer { pod, name } => match answer {
                Some(Answer::Made(id)) => {
                    let container = self.container(id);
                    container.pod.clone_from(pod);
                    container.presence = Presence::Present;
                }
                _ => self.half_made.push(name.clone()),
            },
            Operation::StopContainer(id) => {
                if let Some(Answer::Ended(code)) = answer {
                    self.container(id).ended = Some(*code);
                }
            }
            Operation::RemoveContainer(id) => {
                self.container(id).presence = sure(Presence::Absent);
            }
            Operation::StartContainer(_) | Operation::StopPod(_) => {}
        }
    }

    fn container(&mut self, id: &str) -> &mut Container {
        self.containers.entry(id.to_owned()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(events: &[(Operation, Option<Answer>)]) -> Expected {
        let mut all = Vec::new();
        for (operation, answer) in events {
            let asked = all.len();
            all.push(Event::Asked(operation.clone()));
            all.extend(answer.clone().map(|answer| Event::Answered(asked, answer)));
        }
        Expected::after(&all)
    }

    #[test]
    fn what_was_acknowledged_is_expected_and_what_was_not_may_be() {
        use Operation::*;
        let made = |id: &str| Some(Answer::Made(id.to_owned()));
        let name = || "image".to_owned();
        let expected = events(&[
            (AddImage(name()), Some(Answer::Done)),
            (AddImage(name()), None),
            (RunPod("a".into()), made("1")),
            (RunPod("b".into()), None),
            (RemovePod("1".into()), Some(Answer::Done)),
            (StopContainer("c".into()), Some(Answer::Ended(7))),
            (RemoveContainer("c".into()), None),
        ]);
        assert_eq!(expected.images["image"], Presence::Present);
        assert_eq!(expected.pods["1"], Presence::Absent);
        assert_eq!(expected.half_made, ["b"]);
        assert_eq!(expected.containers["c"].presence, Presence::Either);
        assert_eq!(expected.containers["c"].ended, Some(7));
        assert_eq!(expected.acknowledged, 4);
        let expected = events(&[
            (AddImage(name()), Some(Answer::Done)),
            (RemoveImage(name()), None),
            (AddImage(name()), None),
        ]);
        assert_eq!(expected.images["image"], Presence::Either);
    }
}
