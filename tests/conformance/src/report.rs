//! What critest did, from ginkgo's JSON report, held against the list of skips.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::skips::{Skips, When};

/// What ended well, as ginkgo spells it.
const PASSED: &str = "passed";
/// What was not selected, or skipped itself.
const SKIPPED: &str = "skipped";
/// Marked as pending in critest's source.
const PENDING: &str = "pending";

/// Nodes that are specs; all others are the suite's own.
const SPEC: &str = "It";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    #[serde(default)]
    spec_reports: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    /// `null` for the suite's own nodes.
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    #[serde(default)]
    leaf_node_text: String,
    state: String,
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

/// How one run of critest ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub passed: usize,
    /// Specs with what they said.
    pub failed: Vec<(String, String)>,
    /// Skips that the list allows: how many specs by the line's specs, and its reason.
    pub skipped: BTreeMap<(String, String), usize>,
    /// Specs that the caller did not select.
    pub not_selected: usize,
}

impl Outcome {
    /// Reads a report. `all` is false if the caller chose among the specs.
    pub fn read(report: &Path, skips: &Skips, all: bool) -> Result<Self> {
        let about = || format!("report {}", report.display());
        let text = std::fs::read(report).with_context(about)?;
        let suites: Vec<Suite> = serde_json::from_slice(&text).with_context(about)?;
        Ok(Self::of(&suites, skips, all))
    }

    fn of(suites: &[Suite], skips: &Skips, all: bool) -> Self {
        let mut outcome = Self::default();
        let entries = suites.iter().flat_map(|suite| &suite.spec_reports);
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.name();
            if entry.leaf_node_type != SPEC {
                if entry.state != PASSED {
                    outcome
                        .failed
                        .push((entry.leaf_node_type.clone(), entry.message()));
                }
                continue;
            }
            outcome.judge(&name, entry, skips, all);
            names.push(name);
        }
        for skip in skips.iter() {
            if !names.iter().any(|name| skip.names(name)) {
                let message = "is in the list of skips, and critest has no such spec".to_owned();
                outcome.failed.push((skip.specs.clone(), message));
            }
        }
        outcome
    }

    fn judge(&mut self, name: &str, entry: &Entry, skips: &Skips, all: bool) {
        let fail = |message: String| (name.to_owned(), message);
        // A spec that skipped itself says why; one that was not selected says nothing.
        let by_itself = entry.failure.is_some();
        match (entry.state.as_str(), skips.of(name)) {
            (SKIPPED, Some(skip)) if !by_itself && !all && skip.when != When::NotYet => {
                self.not_selected += 1;
            }
            (SKIPPED | PENDING, Some(skip)) => {
                let key = (skip.specs.clone(), skip.reason.clone());
                *self.skipped.entry(key).or_default() += 1;
            }
            (SKIPPED, None) if !by_itself && (!all || name.contains("benchmark")) => {
                self.not_selected += 1;
            }
            (SKIPPED | PENDING, None) => self.failed.push(fail(format!(
                "skipped, and the list of skips does not name it: {}",
                entry.message()
            ))),
            (PASSED, None) => self.passed += 1,
            (PASSED, Some(_)) => self.failed.push(fail(
                "passed, but the list of skips says that it is skipped here".to_owned(),
            )),
            (_, _) => self.failed.push(fail(entry.message())),
        }
    }
}

impl Entry {
    /// The full name: the texts from the outermost container to the spec.
    fn name(&self) -> String {
        let containers = self.container_hierarchy_texts.iter().flatten();
        let texts: Vec<_> = containers
            .chain([&self.leaf_node_text])
            .map(|text| text.trim())
            .collect();
        texts.join(" ")
    }

    fn message(&self) -> String {
        match &self.failure {
            Some(failure) => failure.message.clone(),
            None => self.state.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Facts;
    use serde_json::{Value, json};

    fn spec(text: &str, state: &str, message: Option<&str>) -> Value {
        let mut spec = json!({
            "ContainerHierarchyTexts": ["[k] Pod"],
            "LeafNodeType": "It",
            "LeafNodeText": text,
            "State": state,
        });
        if let Some(message) = message {
            spec["Failure"] = json!({ "Message": message });
        }
        spec
    }

    fn judge(specs: &[Value], skips: &str, all: bool) -> Outcome {
        let report = json!([{ "SpecReports": specs }]);
        let suites: Vec<Suite> = serde_json::from_value(report).unwrap();
        let skips = Skips::parse(skips, &Facts::default()).unwrap();
        Outcome::of(&suites, &skips, all)
    }

    fn failed(outcome: &Outcome) -> Vec<&str> {
        outcome.failed.iter().map(|(spec, _)| &**spec).collect()
    }

    #[test]
    fn the_list_of_skips_is_exact() {
        let specs = [
            spec("runs", "passed", None),
            spec("lacks", "skipped", Some("no AppArmor here")),
            spec("later", "skipped", None),
        ];
        let list = "no AppArmor | [k] Pod lacks | kernel\nnot yet | [k] Pod later | soon\n";
        let outcome = judge(&specs, list, true);
        assert!(outcome.failed.is_empty(), "{outcome:?}");
        assert_eq!((outcome.passed, outcome.skipped.len()), (1, 2));

        // Not listed; listed and run; listed and absent.
        assert_eq!(
            failed(&judge(&specs, "", true)),
            ["[k] Pod lacks", "[k] Pod later"]
        );
        let more = format!("{list}not yet | [k] Pod runs | x\nno rro | [k] Other * | x\n");
        assert_eq!(
            failed(&judge(&specs, &more, true)),
            ["[k] Pod runs", "[k] Other *"]
        );
    }

    #[test]
    fn what_the_caller_did_not_select_is_neither() {
        let specs = [
            spec("runs", "passed", None),
            spec("other", "skipped", None),
            spec("lacks", "skipped", Some("no AppArmor here")),
        ];
        let outcome = judge(&specs, "", false);
        assert_eq!((outcome.passed, outcome.not_selected), (1, 1));
        assert_eq!(failed(&outcome), ["[k] Pod lacks"]);
        let list = "no rro | [k] Pod other | x\nno rro | [k] Pod lacks | x\n";
        let outcome = judge(&specs, list, false);
        assert_eq!((outcome.not_selected, outcome.skipped.len()), (1, 1));
        // critest leaves its benchmarks out by itself.
        let benchmark = [spec("benchmark about", "skipped", None)];
        assert!(judge(&benchmark, "", true).failed.is_empty());
    }

    #[test]
    fn every_other_end_is_a_failure() {
        let states = [
            "failed",
            "panicked",
            "timedout",
            "interrupted",
            "aborted",
            "pending",
            "?",
        ];
        for state in states {
            let outcome = judge(&[spec("x", state, None)], "", true);
            assert_eq!(failed(&outcome), ["[k] Pod x"], "{state}");
        }
        let listed = "not yet | [k] Pod x | soon\n";
        assert_eq!(
            judge(&[spec("x", "failed", Some("bad"))], listed, true).failed[0].1,
            "bad"
        );
        let suite = json!({
            "ContainerHierarchyTexts": null,
            "LeafNodeType": "SynchronizedBeforeSuite",
            "State": "failed",
            "Failure": {"Message": "no runtime"},
        });
        assert_eq!(
            failed(&judge(&[suite], "", true)),
            ["SynchronizedBeforeSuite"]
        );
    }
}
