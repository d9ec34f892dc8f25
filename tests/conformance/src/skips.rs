//! The list of specs that may be skipped: tests/conformance/skips.
//!
//! A line is `WHEN | SPECS | REASON`. SPECS is a spec's full name, in which `*` stands for any
//! text. WHEN says on which machines the line holds: see [`When`].

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::runtime::Facts;

/// On which machines a line holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Everywhere: gantry does not serve it yet, and critest does not get to run it.
    NotYet,
    /// The kernel has no AppArmor, or it is off; critest finds out by itself.
    NoAppArmor,
    /// The OCI runtime does not say that it has id-mapped mounts.
    NoIdmap,
    /// The OCI runtime does not say that it has recursive read-only mounts.
    NoRro,
}

impl When {
    fn parse(word: &str) -> Option<Self> {
        match word {
            "not yet" => Some(When::NotYet),
            "no AppArmor" => Some(When::NoAppArmor),
            "no idmap" => Some(When::NoIdmap),
            "no rro" => Some(When::NoRro),
            _ => None,
        }
    }

    fn holds(self, facts: &Facts) -> bool {
        match self {
            When::NotYet => true,
            When::NoAppArmor => !facts.apparmor,
            When::NoIdmap => !facts.idmap,
            When::NoRro => !facts.rro,
        }
    }
}

/// A line of the list.
#[derive(Clone, Debug)]
pub struct Skip {
    pub when: When,
    pub specs: String,
    pub reason: String,
}

impl Skip {
    pub fn names(&self, spec: &str) -> bool {
        matches(&self.specs, spec)
    }
}

/// The lines that hold on this machine with this OCI runtime.
pub struct Skips(Vec<Skip>);

impl Skips {
    pub fn read(path: &Path, facts: &Facts) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Self::parse(&text, facts).with_context(|| path.display().to_string())
    }

    pub fn parse(text: &str, facts: &Facts) -> Result<Self> {
        let all = parse(text)?;
        Ok(Self(
            all.into_iter()
                .filter(|skip| skip.when.holds(facts))
                .collect(),
        ))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Skip> {
        self.0.iter()
    }

    /// The line that lets `spec` be skipped.
    pub fn of(&self, spec: &str) -> Option<&Skip> {
        self.0.iter().find(|skip| skip.names(spec))
    }

    /// Regular expressions (Go's) of the specs that critest is not to run.
    pub fn not_run(&self) -> impl Iterator<Item = String> {
        let not_yet = self.0.iter().filter(|skip| skip.when == When::NotYet);
        not_yet.map(|skip| {
            let parts: Vec<_> = skip.specs.split('*').map(quote).collect();
            // ginkgo puts the suite's name in front of a spec's.
            format!(" {}$", parts.join(".*"))
        })
    }
}

fn parse(text: &str) -> Result<Vec<Skip>> {
    let mut skips = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let fields: Vec<_> = line.splitn(3, " | ").map(str::trim).collect();
        let [when, specs, reason] = fields[..] else {
            bail!("line {number} is not WHEN | SPECS | REASON: {line}");
        };
        let when = When::parse(when).with_context(|| format!("line {number}: {when:?}"))?;
        ensure!(!reason.is_empty(), "line {number} gives no reason");
        skips.push(Skip {
            when,
            specs: specs.to_owned(),
            reason: reason.to_owned(),
        });
    }
    Ok(skips)
}

/// `text` as a regular expression that matches it alone.
fn quote(text: &str) -> String {
    let mut quoted = String::new();
    for letter in text.chars() {
        if letter.is_ascii_punctuation() {
            quoted.push('\\');
        }
        quoted.push(letter);
    }
    quoted
}

/// Whether `glob`, in which `*` stands for any text, is the whole of `text`.
fn matches(glob: &str, text: &str) -> bool {
    let mut parts = glob.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text() {
        for (glob, text) in [
            ("a", "a"),
            ("a*", "a"),
            ("a*", "abc"),
            ("*c", "abc"),
            ("a*c*e", "abcde"),
            ("[a] *", "[a] b"),
        ] {
            assert!(matches(glob, text), "{glob} {text}");
        }
        for (glob, text) in [
            ("a", "ab"),
            ("a*", "ba"),
            ("a*c", "ab"),
            ("a*b*a", "aba-"),
            ("ab*ba", "aba"),
        ] {
            assert!(!matches(glob, text), "{glob} {text}");
        }
    }

    #[test]
    fn lines_hold_where_they_say() {
        let text = "# words\n\nnot yet | [k] S (a|b) * | later\nno idmap | U * | old runtime\n";
        let skips = parse(text).unwrap();
        assert_eq!(skips.len(), 2);
        assert_eq!(skips[1].reason, "old runtime");
        let none = Facts::default();
        let all = Facts {
            apparmor: true,
            idmap: true,
            rro: true,
        };
        assert!(skips.iter().all(|skip| skip.when.holds(&none)));
        assert_eq!(skips.iter().filter(|skip| skip.when.holds(&all)).count(), 1);
        let skips = Skips(skips);
        assert_eq!(
            skips.not_run().collect::<Vec<_>>(),
            [r" \[k\] S \(a\|b\) .*$"]
        );
        assert_eq!(skips.of("U x").unwrap().when, When::NoIdmap);
        assert!(skips.of("V").is_none());
    }

    #[test]
    fn a_line_that_says_nothing_is_refused() {
        for line in ["not yet | x", "never | x | y", "not yet | x | ", "x"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
