//! OpenTelemetry: spans below those of the kubelet, and a collector that may be what it likes.

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gantry_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use gantry_cri_api::v1::{RunPodSandboxRequest, VersionRequest};
use gantry_integration::metrics::scrape;
use gantry_integration::{Node, eventually, on_node};
use gantry_testkit::cri::Client;
use gantry_testkit::daemon::Options;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

/// In the daemon's own network namespace.
const COLLECTOR: &str = "127.0.0.1:4317";

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.into_inner().resource_spans.into_iter();
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        let spans = scopes.flat_map(|scope| scope.spans);
        self.0.lock().unwrap().extend(spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    fn start(node: &Node) -> Self {
        let bound = node.daemon.netns().run(|| TcpListener::bind(COLLECTOR));
        let listener = bound.unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let collector = Self::default();
        let service = TraceServiceServer::new(collector.clone());
        let incoming = futures::stream::unfold(listener, async |listener| {
            let accepted = listener.accept().await.map(|(stream, _)| stream);
            Some((accepted, listener))
        });
        let incoming = Box::pin(incoming);
        tokio::spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming),
        );
        collector
    }

    fn find(&self, name: &str) -> Option<Span> {
        let spans = self.0.lock().unwrap();
        spans.iter().find(|span| span.name == name).cloned()
    }

    async fn has(&self, name: &str) -> Span {
        eventually(name, async || self.find(name)).await
    }
}

fn options(rate: u32) -> Options {
    Options::default().config(&format!(
        "[tracing]\nendpoint = \"http://{COLLECTOR}\"\nsampling_rate_per_million = {rate}\n"
    ))
}

async fn runtime(node: &Node) -> RuntimeServiceClient<Channel> {
    let path = node.daemon.socket().to_owned();
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(path).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        }))
        .await
        .unwrap();
    RuntimeServiceClient::new(channel)
}

fn traced<T>(message: T, traceparent: &str) -> Request<T> {
    let mut request = Request::new(message);
    let value = traceparent.parse().unwrap();
    request.metadata_mut().insert("traceparent", value);
    request
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attribute(span: &Span, key: &str) -> String {
    let found = span
        .attributes
        .iter()
        .find(|attribute| attribute.key == key);
    format!("{:?}", found.and_then(|attribute| attribute.value.clone()))
}

#[test]
fn traces_go_on_from_those_of_the_kubelet_down_to_the_steps() {
    const NAME: &str = "traces_go_on_from_those_of_the_kubelet_down_to_the_steps";
    on_node(NAME, options(0), async |node| {
        // The collector comes when the daemon is there, and not before.
        let collector = Collector::start(node);
        let mut client = runtime(node).await;
        // Who names no trace has none at this rate, and who names one badly names none.
        client.version(VersionRequest::default()).await.unwrap();
        for bad in [
            "nonsense",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473x-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            let request = traced(VersionRequest::default(), bad);
            client.version(request).await.unwrap();
        }
        let config = node.pod_config("p").encode_to_vec();
        let request = RunPodSandboxRequest {
            config: Some(Message::decode(config.as_slice()).unwrap()),
            ..Default::default()
        };
        let request = traced(request, &format!("00-{TRACE}-{PARENT}-01"));
        client.run_pod_sandbox(request).await.unwrap();

        let call = collector
            .has("runtime.v1.RuntimeService/RunPodSandbox")
            .await;
        assert_eq!(hex(&call.trace_id), TRACE);
        assert_eq!(hex(&call.parent_span_id), PARENT);
        assert_eq!(call.kind, 2, "a server's");
        assert!(attribute(&call, "rpc.method").contains("RunPodSandbox"));
        assert!(attribute(&call, "rpc.grpc.status_code").contains("IntValue(0)"));
        let making = collector.has("run pod").await;
        assert_eq!(making.parent_span_id, call.span_id);
        for name in ["flush intent", "start shim", "network ADD", "flush result"] {
            let step = collector.has(name).await;
            assert_eq!(hex(&step.trace_id), TRACE, "{name}");
            assert_eq!(step.parent_span_id, making.span_id, "{name}");
            assert!(step.start_time_unix_nano >= making.start_time_unix_nano);
            assert!(step.end_time_unix_nano <= making.end_time_unix_nano);
        }
        let spans = collector.0.lock().unwrap();
        let others: Vec<_> = spans
            .iter()
            .filter(|span| hex(&span.trace_id) != TRACE)
            .map(|span| &span.name)
            .collect();
        assert!(others.is_empty(), "{others:?}");
    });
}

async fn versions(client: &Client, calls: u32) {
    for _ in 0..calls {
        client.version().await.unwrap();
    }
}

#[test]
fn a_collector_that_hangs_delays_no_call_and_what_it_misses_is_counted() {
    const NAME: &str = "a_collector_that_hangs_delays_no_call_and_what_it_misses_is_counted";
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("metrics.sock");
    let mut options = options(1_000_000);
    options.config += &format!("[metrics]\naddress = {socket:?}\n");
    on_node(NAME, options, async |node| {
        // Nobody accepts: connections are made by the kernel, and nothing is ever answered.
        let bound = node.daemon.netns().run(|| TcpListener::bind(COLLECTOR));
        let _silent = bound.unwrap().unwrap();
        // More than the queue and a batch hold, if none of it went away.
        let dropped = || scrape(&socket).of("gantry_spans_dropped_total");
        let deadline = Instant::now() + Duration::from_secs(600);
        while dropped() == 0.0 {
            assert!(Instant::now() < deadline, "the queue has no end");
            // Side by side: faster than batches time out, also where all else is slow.
            futures::future::join_all((0..50).map(|_| versions(&node.client, 100))).await;
        }
        assert_eq!(scrape(&socket).of("gantry_spans_exported_total"), 0.0);
        // All else goes on.
        let pod = node.pod("p").await;
        assert!(node.pod_is_ready(&pod.id).await);
    });
}
