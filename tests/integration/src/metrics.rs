//! What a scraper does: asks over HTTP, and reads OpenMetrics text by the letter.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// A request's answer: status and body.
pub fn ask(stream: &mut (impl Read + Write), request: &str) -> (u16, String) {
    stream.write_all(request.as_bytes()).expect("request");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("answer");
    let answer = String::from_utf8(answer).expect("UTF-8");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).expect("a status");
    (status.parse().expect("a number"), body.to_owned())
}

/// The head of a GET.
pub fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: gantryd\r\n\r\n")
}

/// Scrapes a unix socket.
pub fn scrape(socket: &Path) -> Samples {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut stream = loop {
        // It is bound beside everything else: a daemon may be ready for a moment without it.
        match std::os::unix::net::UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "metrics socket: {error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .expect("limit");
    let (status, text) = ask(&mut stream, &get("/metrics"));
    assert_eq!(status, 200, "{text}");
    Samples::parse(&text)
}

/// Samples by name and labels, as written.
#[derive(Debug)]
pub struct Samples(BTreeMap<String, f64>);

impl Samples {
    /// Panics at the first thing that OpenMetrics does not allow.
    pub fn parse(text: &str) -> Self {
        let body = text.strip_suffix("# EOF\n").expect("ends with # EOF");
        let mut families = BTreeSet::new();
        let mut family: Option<(&str, &str)> = None;
        let mut helped = "";
        let mut samples = BTreeMap::new();
        for line in body.lines() {
            assert!(!line.trim().is_empty(), "an empty line");
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let mut word = || words.next().unwrap_or_else(|| panic!("{line}"));
                let (kind, name, rest) = (word(), word(), word());
                match kind {
                    "HELP" => helped = name,
                    "TYPE" => {
                        assert_eq!(helped, name, "{line}");
                        assert!(families.insert(name), "twice: {line}");
                        let types = ["counter", "gauge", "histogram", "info"];
                        assert!(types.contains(&rest), "{line}");
                        family = Some((name, rest));
                    }
                    "UNIT" => assert!(name.ends_with(&format!("_{rest}")), "{line}"),
                    _ => panic!("{line}"),
                }
                continue;
            }
            let (series, value) = line.rsplit_once(' ').expect("a value");
            let (name, kind) = family.expect("a type before its samples");
            let (sample, labels) = match series.split_once('{') {
                Some((sample, labels)) => (sample, labels.strip_suffix('}').expect("a bracket")),
                None => (series, ""),
            };
            let suffix = sample.strip_prefix(name).expect("a sample of its family");
            let suffixes: &[&str] = match kind {
                "counter" => &["_total"],
                "gauge" => &[""],
                "info" => &["_info"],
                _ => &["_sum", "_count", "_bucket"],
            };
            assert!(suffixes.contains(&suffix), "{line}");
            let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            assert!(sample.chars().all(valid), "{line}");
            let mut names = BTreeSet::new();
            for label in labels.split("\",").filter(|label| !label.is_empty()) {
                let (key, _) = label.split_once("=\"").expect("a label");
                assert!(key.chars().all(valid) && names.insert(key), "{line}");
            }
            let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
            assert!(value >= 0.0 && value.is_finite(), "{line}");
            let before = samples.insert(series.to_owned(), value);
            assert!(before.is_none(), "twice: {line}");
        }
        let samples = Self(samples);
        samples.check_histograms();
        samples
    }

    /// Buckets never fall, and the last has all.
    fn check_histograms(&self) {
        let counts = self.0.iter().filter(|(name, _)| {
            name.split('{')
                .next()
                .is_some_and(|name| name.ends_with("_count"))
        });
        for (series, count) in counts {
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let name = name.strip_suffix("_count").expect("a count");
            let labels = labels.trim_end_matches('}');
            let mut buckets: Vec<_> = self
                .0
                .iter()
                .filter_map(|(series, value)| {
                    let rest = series.strip_prefix(&format!("{name}_bucket{{"))?;
                    let (bounds, others): (Vec<_>, Vec<_>) = rest
                        .strip_suffix("\"}")?
                        .split("\",")
                        .partition(|label| label.starts_with("le=\""));
                    let bound = bounds.first()?.strip_prefix("le=\"")?;
                    let bound = bound.replace("+Inf", "inf");
                    let bound: f64 = bound.parse().expect("a bound");
                    let others = others.join("\",");
                    (Some(others.as_str()) == labels.strip_suffix('"')
                        || (others.is_empty() && labels.is_empty()))
                    .then_some((bound, *value))
                })
                .collect();
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(buckets.is_sorted_by_key(|(_, value)| *value), "{series}");
            assert_eq!(buckets.last(), Some(&(f64::INFINITY, *count)), "{series}");
            assert!(self.0.contains_key(&series.replacen("_count", "_sum", 1)));
        }
    }

    /// Value of a series, as written without quotes: `gantry_pods{state=ready}`.
    pub fn get(&self, series: &str) -> Option<f64> {
        self.0
            .iter()
            .find(|(name, _)| name.replace('"', "") == series)
            .map(|(_, value)| *value)
    }

    /// As [`Samples::get`], of what must be there.
    #[track_caller]
    pub fn of(&self, series: &str) -> f64 {
        self.get(series)
            .unwrap_or_else(|| panic!("no {series} in {:#?}", self.0))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
