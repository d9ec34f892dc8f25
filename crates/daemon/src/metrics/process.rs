//! What is told of any process, under the names that Prometheus' own clients use.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

#[derive(Debug)]
pub struct Process;

/// What /proc says of us (proc_pid_stat(5)).
struct Stat {
    cpu_seconds: f64,
    threads: u64,
    /// Seconds since the epoch.
    started: f64,
    resident_bytes: u64,
    virtual_bytes: u64,
}

fn stat() -> Option<Stat> {
    let text = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name may have spaces and brackets of its own; from here on field 3 comes first.
    let fields: Vec<_> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let hertz = rustix::param::clock_ticks_per_second() as f64;
    let kernel = std::fs::read_to_string("/proc/stat").ok()?;
    let boot = kernel
        .lines()
        .find_map(|line| line.strip_prefix("btime "))?;
    Some(Stat {
        cpu_seconds: (field(14)? + field(15)?) as f64 / hertz,
        threads: field(20)?,
        started: boot.trim().parse::<f64>().ok()? + field(22)? as f64 / hertz,
        virtual_bytes: field(23)?,
        resident_bytes: field(24)? * rustix::param::page_size() as u64,
    })
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let mut gauge = |name, help, unit: Option<&Unit>, value: f64| {
            let gauge = MetricType::Gauge;
            let mut metric = encoder.encode_descriptor(name, help, unit, gauge)?;
            metric.encode_gauge(&value)
        };
        // A kernel that does not tell is no reason to tell nothing else.
        if let Some(stat) = stat() {
            let bytes = Some(&Unit::Bytes);
            let resident = stat.resident_bytes as f64;
            gauge(
                "process_resident_memory",
                "Resident memory",
                bytes,
                resident,
            )?;
            let size = stat.virtual_bytes as f64;
            gauge("process_virtual_memory", "Address space", bytes, size)?;
            let since = Some(&Unit::Seconds);
            let help = "Start of the process since the epoch";
            gauge("process_start_time", help, since, stat.started)?;
            gauge("process_threads", "Threads", None, stat.threads as f64)?;
            let help = "User and system time";
            let counter = MetricType::Counter;
            let mut metric =
                encoder.encode_descriptor("process_cpu", help, Some(&Unit::Seconds), counter)?;
            metric.encode_counter::<prometheus_client::encoding::NoLabelSet, f64, f64>(
                &stat.cpu_seconds,
                None,
            )?;
        }
        if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
            // One of them is that of this look.
            let open = entries.count().saturating_sub(1) as f64;
            let gauge = MetricType::Gauge;
            let help = "Open descriptors";
            encoder
                .encode_descriptor("process_open_fds", help, None, gauge)?
                .encode_gauge(&open)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn our_own_figures_are_plausible() {
        let stat = super::stat().unwrap();
        assert!(stat.resident_bytes > 100_000 && stat.resident_bytes < stat.virtual_bytes);
        assert!(stat.threads >= 1 && stat.cpu_seconds >= 0.0);
        let now = std::time::SystemTime::now();
        let now = now.duration_since(std::time::UNIX_EPOCH).unwrap();
        let age = now.as_secs_f64() - stat.started;
        // The boot's time has a second's grain, and moves with the clock.
        assert!((-5.0..86_400.0).contains(&age), "{age}");
    }
}
