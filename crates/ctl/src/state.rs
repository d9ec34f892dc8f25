//! `gantryctl state`: what gantryd is at.

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::{Context, Result};
use gantry_admin_api::v1::StateRequest;
use gantry_admin_api::v1::node_client::NodeClient;
use serde_json::Value;
use tonic::transport::Channel;

use crate::table::{printable, table};
use crate::{BAD, MESSAGE_LIMIT, promptly, status};

/// Entries of a list that people are shown; the rest is counted.
const SHOWN: usize = 50;

pub async fn run(channel: Channel, json: bool) -> Result<ExitCode> {
    let mut client = NodeClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT);
    let answer = promptly(client.state(StateRequest {})).await?;
    let text = answer.map_err(status)?.into_inner().json;
    let state: Value = serde_json::from_str(&text).context("gantryd's answer")?;
    if json {
        println!("{state:#}");
    } else {
        print!("{}", render(&state));
    }
    Ok(match entries(&state, "stuck").next() {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::from(BAD),
    })
}

fn entries<'a>(state: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    state[key].as_array().into_iter().flatten()
}

fn word(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// `3 ready, 1 notready`.
fn counts(value: &Value) -> String {
    let counts = value.as_object().into_iter().flatten();
    let counts: Vec<_> = counts
        .map(|(key, n)| format!("{} {key}", word(n)))
        .collect();
    match counts.is_empty() {
        true => "0".to_owned(),
        false => counts.join(", "),
    }
}

/// Seconds as people say them.
fn age(value: &Value) -> String {
    let seconds = value.as_f64().unwrap_or_default();
    match seconds as u64 {
        0..10 => format!("{seconds:.1}s"),
        whole @ 10..120 => format!("{whole}s"),
        whole @ 120..7200 => format!("{}m{:02}s", whole / 60, whole % 60),
        whole @ 7200..172_800 => format!("{}h{:02}m", whole / 3600, whole / 60 % 60),
        whole => format!("{}d{:02}h", whole / 86_400, whole / 3600 % 24),
    }
}

fn short(value: &Value) -> String {
    word(value).chars().take(13).collect()
}

fn render(state: &Value) -> String {
    let mut out = String::new();
    let mut line = |key: &str, value: String| {
        // Formatting into memory cannot fail.
        let _ = writeln!(out, "{key:<12}{}", printable(&value));
    };
    let ready = match state["ready"].as_bool() {
        Some(true) => "ready".to_owned(),
        _ => {
            let recovery = &state["recovery"];
            format!(
                "recovering, {} of {} pods",
                recovery["done"], recovery["pods"]
            )
        }
    };
    let (version, pid) = (word(&state["version"]), &state["pid"]);
    let up = age(&state["uptime"]);
    line("gantryd", format!("{version}, pid {pid}, up {up}, {ready}"));
    let files: Vec<_> = entries(state, "config").map(word).collect();
    line(
        "config",
        match files.is_empty() {
            true => "defaults".to_owned(),
            false => files.join(", "),
        },
    );
    let made = match state["podsBeingMade"].as_u64() {
        Some(0) | None => String::new(),
        Some(n) => format!(", {n} being made"),
    };
    line("pods", counts(&state["pods"]) + &made);
    line("containers", counts(&state["containers"]));
    line("images", word(&state["images"]));
    let shims = &state["shims"];
    line(
        "shims",
        format!(
            "{} adoptions, {} lost, {} missed deadlines, {} killed",
            shims["adoptions"], shims["lost"], shims["missedDeadlines"], shims["killed"]
        ),
    );
    let store = &state["store"];
    let flushing = match &store["flushAge"] {
        Value::Null => String::new(),
        since => format!(", one under way for {}", age(since)),
    };
    line(
        "store",
        format!(
            "{} flushes, {} failed, {} writers wait{flushing}",
            store["flushes"], store["failedFlushes"], store["waitingWriters"]
        ),
    );
    let calls: Vec<_> = entries(state, "calls")
        .map(|call| {
            [
                age(&call["age"]),
                word(&call["method"]),
                word(&call["about"]),
            ]
        })
        .collect();
    section(
        &mut out,
        "calls under way",
        ["AGE", "METHOD", "ABOUT"],
        &calls,
    );
    let steps: Vec<_> = entries(state, "steps")
        .map(|step| {
            let [pod, container] = ["pod", "container"].map(|key| short(&step[key]));
            [age(&step["age"]), word(&step["step"]), pod, container]
        })
        .collect();
    let heads = ["AGE", "STEP", "POD", "CONTAINER"];
    section(&mut out, "steps under way", heads, &steps);
    let busy: Vec<_> = entries(state, "drivers")
        .filter(|driver| {
            entries(driver, "busy").next().is_some()
                || driver["waitingMessages"].as_u64() != Some(0)
                || !driver["handling"].is_null()
        })
        .map(|driver| {
            let doing: Vec<_> = entries(driver, "busy")
                .map(|busy| {
                    let of = short(&busy["container"]);
                    let of = if of.is_empty() { of } else { format!(" {of}") };
                    format!("{}{of} for {}", word(&busy["with"]), age(&busy["age"]))
                })
                .collect();
            let name = format!("{}/{}", word(&driver["namespace"]), word(&driver["name"]));
            [
                short(&driver["pod"]),
                if name == "/" { String::new() } else { name },
                word(&driver["state"]),
                word(&driver["waitingMessages"]),
                doing.join(", "),
            ]
        })
        .collect();
    let heads = ["POD", "NAME", "STATE", "QUEUED", "BUSY"];
    section(&mut out, "busy drivers", heads, &busy);
    let pulls: Vec<_> = entries(state, "pulls")
        .map(|pull| {
            [
                age(&pull["age"]),
                word(&pull["reference"]),
                format!("{}/{} bytes", pull["fetchedBytes"], pull["totalBytes"]),
                format!("{}/{} layers", pull["unpackedLayers"], pull["layers"]),
            ]
        })
        .collect();
    let heads = ["AGE", "REFERENCE", "FETCHED", "UNPACKED"];
    section(&mut out, "pulls under way", heads, &pulls);
    let stuck: Vec<_> = entries(state, "stuck").map(|stuck| [word(stuck)]).collect();
    section(&mut out, "stuck", ["WHAT"], &stuck);
    out
}

fn section<const N: usize>(out: &mut String, title: &str, heads: [&str; N], rows: &[[String; N]]) {
    if rows.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{title}: {}", rows.len());
    out.push_str(&table(heads, &rows[..rows.len().min(SHOWN)]));
    if rows.len() > SHOWN {
        let _ = writeln!(out, "and {} more: --json has them", rows.len() - SHOWN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn people_are_shown_what_is_under_way_and_no_control_characters() {
        let calls = vec![
            json!({ "age": 125.0, "method": "runtime.v1.RuntimeService/StopContainer", "about": "c\x1b[2J" });
            SHOWN + 1
        ];
        let state = json!({
            "version": "1.0", "pid": 7, "uptime": 180_000, "ready": true, "config": [],
            "pods": { "ready": 2 }, "podsBeingMade": 1, "containers": {}, "images": 3,
            "shims": { "adoptions": 1, "lost": 0, "missedDeadlines": 0, "killed": 0 },
            "store": { "flushes": 5, "failedFlushes": 0, "waitingWriters": 0, "flushAge": 1.25 },
            "calls": calls, "stuck": ["network ADD: pod p: for 11 s"],
        });
        let text = render(&state);
        for line in [
            "gantryd     1.0, pid 7, up 2d02h, ready",
            "config      defaults",
            "pods        2 ready, 1 being made",
            "containers  0",
            "store       5 flushes, 0 failed, 0 writers wait, one under way for 1.2s",
            "calls under way: 51",
            "2m05s  runtime.v1.RuntimeService/StopContainer  c\u{fffd}[2J",
            "and 1 more: --json has them",
            "network ADD: pod p: for 11 s",
        ] {
            assert!(
                text.lines().any(|shown| shown == line),
                "{line}\n---\n{text}"
            );
        }
        // What a newer gantryd leaves out is no panic.
        assert!(render(&json!({})).starts_with("gantryd"));
    }
}
