//! What the node has and does, read at each scrape.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use gantry_cri::{Calls, Gate};
use gantry_supervisor::Supervisor;
use gantry_types::times::Reading;
use gantry_types::{ContainerState, PodState};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use crate::traces::Counts;

pub struct Node {
    supervisor: Supervisor,
    calls: Calls,
    gate: Gate,
    spans: Option<Arc<Counts>>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Node")
    }
}

type Outcome = Result<(), std::fmt::Error>;

/// Words for a metric of one shape.
struct Out<'a>(DescriptorEncoder<'a>);

impl Out<'_> {
    fn gauge(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: f64) -> Outcome {
        let gauge = MetricType::Gauge;
        let mut metric = self.0.encode_descriptor(name, help, unit, gauge)?;
        metric.encode_gauge(&value)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> Outcome {
        let counter = MetricType::Counter;
        let mut metric = self.0.encode_descriptor(name, help, None, counter)?;
        metric.encode_counter::<NoLabelSet, u64, f64>(&value, None)
    }

    /// A gauge with one label.
    fn gauges<'b>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'b str, f64)>,
    ) -> Outcome {
        let gauge = MetricType::Gauge;
        let mut metric = self.0.encode_descriptor(name, help, None, gauge)?;
        for (key, value) in values {
            metric
                .encode_family(&[(label, key)])?
                .encode_gauge(&value)?;
        }
        Ok(())
    }

    fn histogram(&mut self, name: &str, help: &str, reading: &Reading) -> Outcome {
        let (seconds, histogram) = (Some(&Unit::Seconds), MetricType::Histogram);
        let mut metric = self.0.encode_descriptor(name, help, seconds, histogram)?;
        let Reading {
            seconds,
            count,
            buckets,
            ..
        } = reading;
        metric.encode_histogram::<NoLabelSet>(*seconds, *count, buckets, None)
    }
}

impl Node {
    pub fn new(
        supervisor: Supervisor,
        calls: Calls,
        gate: Gate,
        spans: Option<Arc<Counts>>,
    ) -> Self {
        Self {
            supervisor,
            calls,
            gate,
            spans,
        }
    }

    fn daemon(&self, out: &mut Out<'_>) -> Outcome {
        let (help, info) = ("Version of the daemon", MetricType::Info);
        let mut metric = out.0.encode_descriptor("build", help, None, info)?;
        metric.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])?;
        let ready = if self.gate.is_open() { 1.0 } else { 0.0 };
        out.gauge("ready", "1 once recovery has ended", None, ready)?;
        let (done, found) = self.supervisor.activity().recovery();
        let left = found.saturating_sub(done) as f64;
        out.gauge(
            "recovery_pods_left",
            "Pods that recovery is not done with",
            None,
            left,
        )?;
        let tokio = tokio::runtime::Handle::current().metrics();
        let tasks = tokio.num_alive_tasks() as f64;
        out.gauge("runtime_tasks", "Tasks of the async runtime", None, tasks)?;
        let queued = tokio.global_queue_depth() as f64;
        out.gauge(
            "runtime_queued_tasks",
            "Tasks that no worker has taken up",
            None,
            queued,
        )
    }

    fn objects(&self, out: &mut Out<'_>) -> Outcome {
        let pods = self.supervisor.registry().pods();
        let mut by_state = BTreeMap::from([("ready", 0.0), ("notready", 0.0)]);
        for pod in &pods {
            let state = match pod.state {
                PodState::Ready { .. } => "ready",
                PodState::NotReady { .. } | PodState::Creating => "notready",
            };
            *by_state.entry(state).or_default() += 1.0;
        }
        out.gauges("pods", "Pod sandboxes", "state", by_state)?;
        let states = ["created", "running", "exited", "unknown"];
        let mut by_state: BTreeMap<_, _> = states.map(|state| (state, 0.0)).into();
        for container in pods.iter().flat_map(|pod| &pod.containers) {
            let state = match container.state {
                ContainerState::Creating | ContainerState::Created => "created",
                ContainerState::Running { .. } => "running",
                ContainerState::Exited { .. } => "exited",
                ContainerState::Unknown { .. } => "unknown",
            };
            *by_state.entry(state).or_default() += 1.0;
        }
        out.gauges("containers", "Containers", "state", by_state)?;
        let images = self.supervisor.images().list().len() as f64;
        out.gauge("images", "Images", None, images)
    }

    fn steps(&self, out: &mut Out<'_>) -> Outcome {
        let activity = self.supervisor.activity();
        let times = activity.times();
        let help = "How long operations and their steps take";
        let (seconds, histogram) = (Some(&Unit::Seconds), MetricType::Histogram);
        let mut metric = out
            .0
            .encode_descriptor("step_duration", help, seconds, histogram)?;
        for timed in &times {
            let labels = [
                ("step", timed.what),
                ("handler", timed.handler.as_deref().unwrap_or_default()),
            ];
            let reading = &timed.reading;
            let mut family = metric.encode_family(&labels)?;
            let (seconds, count) = (reading.seconds, reading.count);
            family.encode_histogram::<NoLabelSet>(seconds, count, &reading.buckets, None)?;
        }
        let help = "Steps that failed or were cut short";
        let counter = MetricType::Counter;
        let mut metric = out
            .0
            .encode_descriptor("step_failures", help, None, counter)?;
        for timed in &times {
            let labels = [
                ("step", timed.what),
                ("handler", timed.handler.as_deref().unwrap_or_default()),
            ];
            let mut family = metric.encode_family(&labels)?;
            family.encode_counter::<NoLabelSet, u64, f64>(&timed.reading.failed, None)?;
        }
        let steps = activity.under_way();
        let mut under_way = BTreeMap::<_, f64>::new();
        for step in &steps {
            *under_way.entry(step.what).or_default() += 1.0;
        }
        out.gauges("steps_in_flight", "Steps under way", "step", under_way)?;
        let oldest = steps.first().map_or(0.0, |step| step.age.as_secs_f64());
        let help = "Age of the oldest step under way";
        out.gauge("oldest_step", help, Some(&Unit::Seconds), oldest)?;
        let calls = self.calls.under_way();
        out.gauge(
            "rpcs_in_flight",
            "Calls under way",
            None,
            calls.len() as f64,
        )
    }

    fn drivers(&self, out: &mut Out<'_>) -> Outcome {
        let drivers = self.supervisor.registry().drivers();
        let waiting = drivers.iter().map(|driver| driver.waiting);
        let help = "Messages that wait in mailboxes of pod drivers";
        let all = waiting.clone().sum::<usize>() as f64;
        out.gauge("mailbox_messages", help, None, all)?;
        let most = waiting.max().unwrap_or_default() as f64;
        let help = "Messages that wait in the fullest mailbox of a pod driver";
        out.gauge("mailbox_messages_max", help, None, most)?;
        let shims = &self.supervisor.activity().shims;
        for (name, help, count) in [
            (
                "shim_adoptions",
                "Pods that a new shim took over from one that had died",
                &shims.adopted,
            ),
            (
                "shims_lost",
                "Shims whose death ended their pod",
                &shims.lost,
            ),
            (
                "shim_missed_deadlines",
                "Calls that a shim did not answer in time",
                &shims.missed,
            ),
            (
                "shims_killed",
                "Shims killed for not answering again and again",
                &shims.killed,
            ),
        ] {
            out.counter(name, help, count.load(Ordering::Relaxed))?;
        }
        Ok(())
    }

    fn images(&self, out: &mut Out<'_>) -> Outcome {
        let images = self.supervisor.images();
        let times = images.pull_times();
        let help = "Pulls, one that many waited for counted once";
        out.histogram("pull_duration", help, &times)?;
        out.counter("pull_failures", "Pulls that failed", times.failed)?;
        let pulls = images.pulls().len() as f64;
        out.gauge("pulls_in_flight", "Pulls under way", None, pulls)?;
        let (moving, waiting) = images.transfers();
        let help = "Transfers of blobs by whether they have a place among those of the node";
        let states = [("moving", moving as f64), ("waiting", waiting as f64)];
        out.gauges("transfers", help, "state", states)
    }

    fn spans(&self, out: &mut Out<'_>) -> Outcome {
        let Some(counts) = &self.spans else {
            return Ok(());
        };
        for (name, help, count) in [
            (
                "spans_exported",
                "Spans that the collector took",
                &counts.exported,
            ),
            (
                "spans_dropped",
                "Spans for which the queue had no room",
                &counts.dropped,
            ),
            (
                "spans_failed",
                "Spans that the collector did not take",
                &counts.failed,
            ),
        ] {
            out.counter(name, help, count.load(Ordering::Relaxed))?;
        }
        Ok(())
    }

    fn store(&self, out: &mut Out<'_>) -> Outcome {
        let store = self.supervisor.store_now();
        let help = "Flushes of the store";
        out.histogram("store_flush_duration", help, &store.flushes)?;
        let help = "Flushes of the store that failed";
        out.counter("store_flush_failures", help, store.flushes.failed)?;
        let help = "Age of the flush under way, 0 without one";
        let seconds = Some(&Unit::Seconds);
        let age = store.flushing.map_or(0.0, |age| age.as_secs_f64());
        out.gauge("store_flush_age", help, seconds, age)?;
        let help = "Writers that wait for a flush of others";
        out.gauge("store_flush_waiters", help, None, store.waiting as f64)
    }
}

impl Collector for Node {
    fn encode(&self, encoder: DescriptorEncoder) -> Outcome {
        let mut out = Out(encoder);
        self.daemon(&mut out)?;
        self.objects(&mut out)?;
        self.steps(&mut out)?;
        self.drivers(&mut out)?;
        self.images(&mut out)?;
        self.store(&mut out)?;
        self.spans(&mut out)
    }
}
