//! OpenTelemetry traces: a span for each call, below that which its client names in `traceparent`, and
//! below it the steps that it took. Spans are made of those of `tracing`; without `tracing.endpoint`
//! there is no layer for them and those of steps are never made.
//!
//! What has ended goes into a queue of bounded length and from there to the collector, in batches. No
//! call waits for that: a queue that is full, as of a collector that is absent, slow or hung, drops
//! what comes, and counts it. Why it is the daemon alone that makes them: docs/decisions/0013.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use gantry_cri::Observer;
pub use gantry_supervisor::activity::TRACE;
use http::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanKind, Status, TraceContextExt, TracerProvider};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_otlp::{SpanExporter as Otlp, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    Sampler, SdkTracerProvider, Span, SpanData, SpanExporter, SpanProcessor,
};
use tokio::sync::mpsc;
use tonic::Code;
use tracing::Subscriber;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::registry::LookupSpan;

use crate::config;

/// Spans that wait for the collector. Each has about a kilobyte.
const QUEUE: usize = 2048;

/// Spans sent at once, and how long the first of them waits for others.
const BATCH: usize = 512;
const GATHER: Duration = Duration::from_secs(1);

/// For the collector's answer.
const LIMIT: Duration = Duration::from_secs(10);

/// Where the layer of calls is, whose spans are those of the calls.
const CALLS: &str = "gantry_cri::layer";

/// Attribute with the time at which a call was answered: its span lives on in what it left running.
const ANSWERED: &str = "gantry.answered";

/// What became of spans.
#[derive(Debug, Default)]
pub struct Counts {
    pub exported: AtomicU64,
    /// There was no room in the queue.
    pub dropped: AtomicU64,
    /// The collector did not take them.
    pub failed: AtomicU64,
}

/// What is to be done once the async runtime is there.
pub struct Traces {
    ended: mpsc::Receiver<SpanData>,
    endpoint: String,
    counts: Arc<Counts>,
}

/// The layer that makes traces, if there are to be any.
pub fn layer<S>(config: &config::Tracing) -> Option<(impl Layer<S> + use<S>, Traces)>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    if config.endpoint.is_empty() {
        return None;
    }
    let (sender, ended) = mpsc::channel(QUEUE);
    let counts = Arc::<Counts>::default();
    let ratio = f64::from(config.sampling_rate_per_million) / 1e6;
    let root = Sampler::TraceIdRatioBased(ratio);
    let queue = Queue {
        sender,
        counts: Arc::clone(&counts),
    };
    let provider = SdkTracerProvider::builder()
        .with_sampler(Sampler::ParentBased(Box::new(root)))
        .with_resource(resource())
        .with_span_processor(queue)
        .build();
    let wanted = Targets::new()
        .with_target(TRACE, LevelFilter::INFO)
        .with_target(CALLS, LevelFilter::INFO);
    let spans = tracing_subscriber::filter::FilterFn::new(|metadata| metadata.is_span());
    let layer = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("gantryd"))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_target(false)
        .with_level(false)
        .with_filter(tracing_subscriber::filter::FilterExt::and(wanted, spans));
    let endpoint = config.endpoint.clone();
    Some((
        layer,
        Traces {
            ended,
            endpoint,
            counts,
        },
    ))
}

fn resource() -> Resource {
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let mut resource = Resource::builder_empty().with_service_name("gantryd");
    if let Ok(name) = nix::unistd::gethostname() {
        let name = name.to_string_lossy().into_owned();
        resource = resource.with_attribute(KeyValue::new("host.name", name));
    }
    resource.with_attribute(version).build()
}

/// Takes what has ended, and never waits.
#[derive(Debug)]
struct Queue {
    sender: mpsc::Sender<SpanData>,
    counts: Arc<Counts>,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        if self.sender.try_send(finished(span)).is_err() {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// A call's span as OpenTelemetry has those of RPC servers.
fn finished(mut span: SpanData) -> SpanData {
    let of = |span: &SpanData, key: &str| {
        let mut attributes = span.attributes.iter();
        let found = attributes.find(|attribute| attribute.key.as_str() == key);
        found.map(|attribute| attribute.value.clone())
    };
    let names = (of(&span, "rpc.service"), of(&span, "rpc.method"));
    if let (Some(service), Some(method)) = names {
        span.name = format!("{service}/{method}").into();
        span.span_kind = SpanKind::Server;
    }
    if let Some(Value::I64(nanos)) = of(&span, ANSWERED) {
        let nanos = u64::try_from(nanos).unwrap_or_default();
        span.end_time = UNIX_EPOCH + Duration::from_nanos(nanos);
    }
    span.attributes
        .retain(|attribute| !["method", ANSWERED].contains(&attribute.key.as_str()));
    span
}

impl Traces {
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    /// Sends spans for as long as there is a daemon. Nothing runs while nothing ends.
    pub async fn send(mut self) {
        let built = Otlp::builder()
            .with_tonic()
            .with_endpoint(&self.endpoint)
            .with_timeout(LIMIT)
            .build();
        let mut exporter = match built {
            Ok(exporter) => exporter,
            Err(error) => {
                tracing::error!(%error, endpoint = self.endpoint, "traces cannot be sent");
                return;
            }
        };
        exporter.set_resource(&resource());
        let mut failing = false;
        let mut batch = Vec::new();
        while self.ended.recv_many(&mut batch, BATCH).await > 0 {
            tokio::time::sleep(GATHER).await;
            while batch.len() < BATCH {
                match self.ended.try_recv() {
                    Ok(span) => batch.push(span),
                    Err(_) => break,
                }
            }
            let spans = batch.len() as u64;
            let sent = exporter.export(std::mem::take(&mut batch));
            let outcome = match tokio::time::timeout(LIMIT, sent).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {LIMIT:?}")),
            };
            let count = match outcome {
                Ok(()) => &self.counts.exported,
                Err(_) => &self.counts.failed,
            };
            count.fetch_add(spans, Ordering::Relaxed);
            match outcome {
                Ok(()) => failing = false,
                // Once for each time that it begins.
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(error, "the collector does not take our traces");
                    }
                }
            }
        }
    }
}

/// Gives calls' spans their parents, names and codes.
#[derive(Debug, Default)]
pub struct OfCalls(TraceContextPropagator);

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

impl Observer for OfCalls {
    fn begins(&self, path: &str, headers: &HeaderMap, span: &tracing::Span) {
        // Of what is malformed it makes a context that is none.
        let parent = self
            .0
            .extract_with_context(&Context::new(), &Headers(headers));
        if parent.span().span_context().is_valid()
            && let Err(error) = span.set_parent(parent)
        {
            tracing::debug!(%error, "a span without its parent");
        }
        let (service, method) = path
            .trim_start_matches('/')
            .split_once('/')
            .unwrap_or_default();
        let bounded = |text: &str| text.chars().take(100).collect::<String>();
        span.set_attribute("rpc.system", "grpc");
        span.set_attribute("rpc.service", bounded(service));
        span.set_attribute("rpc.method", bounded(method));
    }

    fn observe(&self, _: &str, code: Code, _: Duration) {
        let span = tracing::Span::current();
        span.set_attribute("rpc.grpc.status_code", i64::from(i32::from(code)));
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = i64::try_from(now.unwrap_or_default().as_nanos()).unwrap_or(i64::MAX);
        span.set_attribute(ANSWERED, now);
        if code != Code::Ok {
            span.set_status(Status::error(code.description()));
        }
    }
}
