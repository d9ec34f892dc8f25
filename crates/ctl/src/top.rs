//! `gantryctl top`: what pods and containers use, again and again.
//!
//! Rates are made from two samples, by the clock of whoever took them. The first frame therefore
//! comes after one interval.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use gantry_cri_api::v1 as cri;
use gantry_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Channel;

use crate::table::table;
use crate::{MESSAGE_LIMIT, status};

#[derive(Args)]
pub struct Options {
    /// What comes first; pods among each other, and containers within their pod
    #[arg(long, value_enum, default_value_t = Sort::Cpu)]
    sort: Sort,
    /// Time between two looks
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 2,
        value_parser = clap::value_parser!(u64).range(1..=3600)
    )]
    interval: u64,
    /// Looks until it ends; without it one, or on a terminal until it is interrupted
    #[arg(short = 'n', value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// One line of JSON a look (docs/observability.md)
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Sort {
    Cpu,
    Memory,
    Name,
}

pub async fn run(options: Options, channel: Channel) -> Result<ExitCode> {
    let mut client = RuntimeServiceClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT);
    let terminal = io::stdout().is_terminal();
    let mut left = match (options.count, terminal) {
        (Some(count), _) => count,
        (None, true) => u64::MAX,
        (None, false) => 1,
    };
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    // A gantryd that hangs is waited for, but not against anybody's will.
    let mut before = tokio::select! {
        first = sample(&mut client) => first?,
        _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
    };
    while left > 0 {
        let frame = async {
            tokio::time::sleep(Duration::from_secs(options.interval)).await;
            sample(&mut client).await
        };
        let after = tokio::select! {
            after = frame => after?,
            _ = interrupt.recv() => break,
        };
        let mut pods = usage(&before, &after);
        sort(&mut pods, options.sort);
        let text = match options.json {
            true => {
                let pods: Vec<_> = pods.iter().map(Pod::json).collect();
                format!("{}\n", json!({ "pods": pods }))
            }
            false if terminal => on_screen(&render(&pods), screen()),
            false => render(&pods),
        };
        match show(&text) {
            // Whoever read it has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            shown => shown.context("write")?,
        }
        before = after;
        left -= 1;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Containers are in it with their pod.
async fn sample(client: &mut RuntimeServiceClient<Channel>) -> Result<Vec<cri::PodSandboxStats>> {
    let request = cri::ListPodSandboxStatsRequest { filter: None };
    let answer = client.list_pod_sandbox_stats(request).await;
    Ok(answer.map_err(status)?.into_inner().stats)
}

/// What is not known is `None`.
#[derive(Debug, Default)]
struct Pod {
    id: String,
    namespace: String,
    name: String,
    /// In cores.
    cpu: Option<f64>,
    /// Bytes of the working set.
    memory: Option<u64>,
    processes: Option<u64>,
    /// Bytes of all interfaces but the loopback, and how many a second.
    received: Option<u64>,
    sent: Option<u64>,
    receiving: Option<f64>,
    sending: Option<f64>,
    containers: Vec<Container>,
}

#[derive(Debug, Default)]
struct Container {
    id: String,
    name: String,
    cpu: Option<f64>,
    memory: Option<u64>,
    /// Bytes of the writable layer.
    written: Option<u64>,
}

impl Pod {
    fn json(&self) -> Value {
        let containers = self.containers.iter().map(|container| {
            json!({
                "id": container.id,
                "name": container.name,
                "cpu": container.cpu,
                "memoryBytes": container.memory,
                "writableLayerBytes": container.written,
            })
        });
        json!({
            "id": self.id,
            "namespace": self.namespace,
            "name": self.name,
            "cpu": self.cpu,
            "memoryBytes": self.memory,
            "processes": self.processes,
            "receivedBytes": self.received,
            "sentBytes": self.sent,
            "receivedBytesPerSecond": self.receiving,
            "sentBytesPerSecond": self.sending,
            "containers": containers.collect::<Vec<_>>(),
        })
    }
}

/// A counter at a time in nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Count {
    at: i64,
    value: u64,
}

/// How much a second; `None` if time stood still or the counter began anew.
fn rate(before: Option<Count>, after: Option<Count>) -> Option<f64> {
    let (before, after) = (before?, after?);
    let nanos = after.at.checked_sub(before.at).filter(|nanos| *nanos > 0)?;
    let grown = after.value.checked_sub(before.value)?;
    Some(grown as f64 / nanos as f64 * 1e9)
}

fn number(value: &Option<cri::UInt64Value>) -> Option<u64> {
    value.as_ref().map(|value| value.value)
}

fn cpu_count(cpu: &cri::CpuUsage) -> Option<Count> {
    let value = number(&cpu.usage_core_nano_seconds)?;
    Some(Count {
        at: cpu.timestamp,
        value,
    })
}

/// In cores. What was not there before has at most the rate that gantryd knows.
fn cores(before: Option<&cri::CpuUsage>, after: Option<&cri::CpuUsage>) -> Option<f64> {
    let after = after?;
    let known = || number(&after.usage_nano_cores).map(|cores| cores as f64);
    let nanos = rate(before.and_then(cpu_count), cpu_count(after)).or_else(known)?;
    Some(nanos / 1e9)
}

fn working_set(memory: Option<&cri::MemoryUsage>) -> Option<u64> {
    number(&memory?.working_set_bytes)
}

type Counter = fn(&cri::NetworkInterfaceUsage) -> &Option<cri::UInt64Value>;

fn received(interface: &cri::NetworkInterfaceUsage) -> &Option<cri::UInt64Value> {
    &interface.rx_bytes
}

fn sent(interface: &cri::NetworkInterfaceUsage) -> &Option<cri::UInt64Value> {
    &interface.tx_bytes
}

/// Of all interfaces: `interfaces` are those beside the default one.
fn traffic(network: Option<&cri::NetworkUsage>, counter: Counter) -> Option<Count> {
    let network = network?;
    let all = network.default_interface.iter().chain(&network.interfaces);
    let value = all.filter_map(|interface| number(counter(interface)));
    let value = value.fold(0, u64::saturating_add);
    Some(Count {
        at: network.timestamp,
        value,
    })
}

fn id_of(stats: &cri::ContainerStats) -> &str {
    stats.attributes.as_ref().map_or("", |of| of.id.as_str())
}

fn usage(before: &[cri::PodSandboxStats], after: &[cri::PodSandboxStats]) -> Vec<Pod> {
    let pod_id = |stats: &cri::PodSandboxStats| {
        let attributes = stats.attributes.as_ref();
        attributes.map(|of| of.id.clone()).unwrap_or_default()
    };
    let earlier: HashMap<_, _> = before
        .iter()
        .filter_map(|stats| Some((pod_id(stats), stats.linux.as_ref()?)))
        .collect();
    let containers: HashMap<_, _> = earlier
        .values()
        .flat_map(|linux| &linux.containers)
        .map(|stats| (id_of(stats), stats))
        .collect();
    let container = |stats: &cri::ContainerStats| {
        let before = containers.get(id_of(stats)).copied();
        let metadata = stats.attributes.as_ref().and_then(|of| of.metadata.clone());
        let layer = stats.writable_layer.as_ref();
        Container {
            id: id_of(stats).to_owned(),
            name: metadata.unwrap_or_default().name,
            cpu: cores(
                before.and_then(|stats| stats.cpu.as_ref()),
                stats.cpu.as_ref(),
            ),
            memory: working_set(stats.memory.as_ref()),
            written: layer.and_then(|layer| number(&layer.used_bytes)),
        }
    };
    let pod = |stats: &cri::PodSandboxStats| {
        let id = pod_id(stats);
        let metadata = stats.attributes.as_ref().and_then(|of| of.metadata.clone());
        let metadata = metadata.unwrap_or_default();
        let before = earlier.get(&id).copied();
        let now = stats.linux.as_ref();
        let network = |linux: Option<&cri::LinuxPodSandboxStats>, counter| {
            traffic(linux.and_then(|linux| linux.network.as_ref()), counter)
        };
        let [rx, tx] =
            [received as Counter, sent].map(|of| (network(before, of), network(now, of)));
        let processes = now.and_then(|linux| linux.process.as_ref());
        Pod {
            id,
            namespace: metadata.namespace,
            name: metadata.name,
            cpu: cores(
                before.and_then(|linux| linux.cpu.as_ref()),
                now.and_then(|linux| linux.cpu.as_ref()),
            ),
            memory: working_set(now.and_then(|linux| linux.memory.as_ref())),
            processes: processes.and_then(|processes| number(&processes.process_count)),
            received: rx.1.map(|count| count.value),
            sent: tx.1.map(|count| count.value),
            receiving: rate(rx.0, rx.1),
            sending: rate(tx.0, tx.1),
            containers: now.map_or_else(Vec::new, |linux| {
                linux.containers.iter().map(container).collect()
            }),
        }
    };
    after.iter().map(pod).collect()
}

/// Most first, what is not known last; equals by name.
fn sort(pods: &mut [Pod], by: Sort) {
    fn most<T: PartialOrd>(a: Option<T>, b: Option<T>) -> Ordering {
        b.partial_cmp(&a).unwrap_or(Ordering::Equal)
    }
    pods.sort_by(|a, b| {
        let names = || (&a.namespace, &a.name, &a.id).cmp(&(&b.namespace, &b.name, &b.id));
        let first = match by {
            Sort::Cpu => most(a.cpu, b.cpu),
            Sort::Memory => most(a.memory, b.memory),
            Sort::Name => Ordering::Equal,
        };
        first.then_with(names)
    });
    for pod in pods {
        pod.containers.sort_by(|a, b| {
            let first = match by {
                Sort::Cpu => most(a.cpu, b.cpu),
                Sort::Memory => most(a.memory, b.memory),
                Sort::Name => Ordering::Equal,
            };
            first.then_with(|| (&a.name, &a.id).cmp(&(&b.name, &b.id)))
        });
    }
}

fn or_dash<T>(value: Option<T>, shown: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), shown)
}

fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A row for each pod, and below it one for each of its containers.
fn render(pods: &[Pod]) -> String {
    let per_second = |rate: f64| format!("{}/s", bytes(rate as u64));
    let cpu = |cores: f64| format!("{cores:.2}");
    let none = String::new;
    let mut rows = Vec::new();
    for pod in pods {
        rows.push([
            format!("{}/{}", pod.namespace, pod.name),
            none(),
            or_dash(pod.cpu, cpu),
            or_dash(pod.memory, bytes),
            or_dash(pod.processes, |count| count.to_string()),
            none(),
            or_dash(pod.receiving, per_second),
            or_dash(pod.sending, per_second),
        ]);
        rows.extend(pod.containers.iter().map(|container| {
            [
                none(),
                container.name.clone(),
                or_dash(container.cpu, cpu),
                or_dash(container.memory, bytes),
                none(),
                or_dash(container.written, bytes),
                none(),
                none(),
            ]
        }));
    }
    let heads = [
        "POD",
        "CONTAINER",
        "CPU",
        "MEMORY",
        "PROCESSES",
        "WRITTEN",
        "RECEIVED",
        "SENT",
    ];
    table(heads, &rows)
}

/// Columns and rows of the terminal.
fn screen() -> (usize, usize) {
    match rustix::termios::tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 1 => (size.ws_col.into(), size.ws_row.into()),
        // One that does not say.
        _ => (80, 24),
    }
}

/// In the place of the frame before it. What the screen has no room for is cut off, since it would
/// scroll away the heads.
fn on_screen(text: &str, (columns, rows): (usize, usize)) -> String {
    // Home, and each line clears what was behind it (console_codes(4)).
    let mut out = String::from("\x1b[H");
    for line in text.lines().take(rows.saturating_sub(1)) {
        out.extend(line.chars().take(columns));
        out.push_str("\x1b[K\n");
    }
    out.push_str("\x1b[J");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(value: u64) -> Option<cri::UInt64Value> {
        Some(cri::UInt64Value { value })
    }

    fn cpu(at: i64, nanos: u64, rate: Option<u64>) -> Option<cri::CpuUsage> {
        Some(cri::CpuUsage {
            timestamp: at * 1_000_000_000,
            usage_core_nano_seconds: value(nanos),
            usage_nano_cores: rate.and_then(value),
            ..Default::default()
        })
    }

    fn container(name: &str, cpu: Option<cri::CpuUsage>, memory: u64) -> cri::ContainerStats {
        cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes {
                id: format!("id-{name}"),
                metadata: Some(cri::ContainerMetadata {
                    name: name.to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            cpu,
            memory: Some(cri::MemoryUsage {
                working_set_bytes: value(memory),
                ..Default::default()
            }),
            writable_layer: Some(cri::FilesystemUsage {
                used_bytes: value(5 << 20),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn pod(
        name: &str,
        at: i64,
        nanos: u64,
        containers: Vec<cri::ContainerStats>,
    ) -> cri::PodSandboxStats {
        let interface = |name: &str, bytes: u64| cri::NetworkInterfaceUsage {
            name: name.to_owned(),
            rx_bytes: value(bytes),
            tx_bytes: value(2 * bytes),
            ..Default::default()
        };
        let traffic = 1024 * u64::try_from(at).unwrap();
        cri::PodSandboxStats {
            attributes: Some(cri::PodSandboxAttributes {
                id: format!("id-{name}"),
                metadata: Some(cri::PodSandboxMetadata {
                    name: name.to_owned(),
                    namespace: "ns".to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            linux: Some(cri::LinuxPodSandboxStats {
                cpu: cpu(at, nanos, None),
                network: Some(cri::NetworkUsage {
                    timestamp: at * 1_000_000_000,
                    default_interface: Some(interface("eth0", traffic)),
                    interfaces: vec![interface("net1", traffic)],
                }),
                process: Some(cri::ProcessUsage {
                    timestamp: at,
                    process_count: value(3),
                }),
                containers,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn rates_are_made_of_two_samples_and_sorted() {
        let before = [
            pod("idle", 10, 7, vec![]),
            pod(
                "busy",
                10,
                0,
                vec![
                    container("a", cpu(10, 0, None), 1),
                    container("b", cpu(10, 0, Some(9_000_000_000)), 9),
                ],
            ),
        ];
        let after = [
            pod("idle", 12, 7, vec![]),
            pod(
                "busy",
                12,
                1_000_000_000,
                vec![
                    container("a", cpu(12, 500_000_000, None), 1 << 20),
                    container("b", cpu(12, 1_000_000_000, Some(9_000_000_000)), 1536),
                    // It was not there before, and gantryd has looked twice.
                    container("new\x1b[2J", cpu(12, 4, Some(100_000_000)), 0),
                    container("newer", cpu(12, 4, None), 0),
                ],
            ),
        ];
        let mut pods = usage(&before, &after);
        sort(&mut pods, Sort::Cpu);
        let expected = "\
POD      CONTAINER  CPU   MEMORY   PROCESSES  WRITTEN  RECEIVED   SENT
ns/busy             0.50  -        3                   2.0 KiB/s  4.0 KiB/s
         b          0.50  1.5 KiB             5.0 MiB
         a          0.25  1.0 MiB             5.0 MiB
         new\u{fffd}[2J    0.10  0 B                 5.0 MiB
         newer      -     0 B                 5.0 MiB
ns/idle             0.00  -        3                   2.0 KiB/s  4.0 KiB/s
";
        assert_eq!(render(&pods), expected);
        assert_eq!(pods[0].json()["containers"][1]["cpu"], 0.25);
        assert_eq!(pods[0].json()["receivedBytes"], 2 * 12 * 1024);
        sort(&mut pods, Sort::Memory);
        let names = |pod: &Pod| {
            pod.containers
                .iter()
                .map(|c| c.name.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&pods[0])[..2], ["a", "b"]);
        sort(&mut pods, Sort::Name);
        assert_eq!(names(&pods[0])[..2], ["a", "b"]);
        // Both samples at one time, or a counter that began anew, are no rate.
        assert_eq!(usage(&after, &after)[0].cpu, None);
        assert_eq!(usage(&after, &before)[1].cpu, None);
        // What a gantryd leaves out is no panic.
        let empty = [cri::PodSandboxStats::default()];
        assert!(render(&usage(&empty, &empty)).contains("\n/ "));
    }

    #[test]
    fn bytes_have_units_that_fit() {
        for (count, shown) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "16384.0 PiB"),
        ] {
            assert_eq!(bytes(count), shown);
        }
    }

    #[test]
    fn a_frame_is_no_larger_than_the_screen() {
        let frame = on_screen("head\nlong line\nthird\n", (4, 3));
        assert_eq!(frame, "\x1b[Hhead\x1b[K\nlong\x1b[K\n\x1b[J");
    }
}
