//! The layer around every RPC: span, readiness, deadline, the list of those under way, observation,
//! one log line.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::{Instant, timeout_at};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument;

use crate::inflight::{CURRENT, Calls, Listed};

/// Closed until recovery has ended: RPCs answer Unavailable.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<AtomicBool>);

impl Gate {
    pub fn open(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub fn is_open(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What a closed gate answers.
pub fn recovering() -> Status {
    Status::unavailable("gantryd is recovering")
}

/// Told of every RPC when it ends; metrics hang here.
pub trait Observer: Send + Sync + 'static {
    /// A call has come; `span` is its own.
    fn begins(&self, _path: &str, _headers: &HeaderMap, _span: &tracing::Span) {}

    /// `path` is whatever the client has asked for, `/runtime.v1.RuntimeService/Version`; `code` what
    /// the answer ended with, also that of a stream, and Cancelled where the client went away before;
    /// `elapsed` is until that end. Called in the call's span.
    fn observe(&self, path: &str, code: Code, elapsed: Duration);
}

impl Observer for () {
    fn observe(&self, _path: &str, _code: Code, _elapsed: Duration) {}
}

/// Answered during recovery too.
const ALWAYS: [&str; 2] = [
    // It says how far that is.
    "/gantry.admin.v1.Node/State",
    // A kubelet asks once in its life, and has no metrics of pods if it is refused.
    "/runtime.v1.RuntimeService/ListMetricDescriptors",
];

#[derive(Clone)]
pub struct RpcLayer {
    gate: Gate,
    observer: Arc<dyn Observer>,
    calls: Calls,
    next_id: Arc<AtomicU64>,
}

impl RpcLayer {
    pub fn new(gate: Gate, observer: Arc<dyn Observer>, calls: Calls) -> Self {
        Self {
            gate,
            observer,
            calls,
            next_id: Arc::new(AtomicU64::new(1)),
        }
    }
}

impl<S> Layer<S> for RpcLayer {
    type Service = RpcService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        RpcService {
            inner,
            layer: self.clone(),
        }
    }
}

#[derive(Clone)]
pub struct RpcService<S> {
    inner: S,
    layer: RpcLayer,
}

type Answer<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

impl<S, In> Service<Request<In>> for RpcService<S>
where
    S: Service<Request<In>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    In: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<In>) -> Self::Future {
        // The clone takes the place of the service that was polled ready, which is used up.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let layer = self.layer.clone();
        let path = request.uri().path();
        let method = path.rsplit('/').next().unwrap_or_default();
        let id = layer.next_id.fetch_add(1, Ordering::Relaxed);
        let span = tracing::info_span!("rpc", id, method);
        layer.observer.begins(path, request.headers(), &span);
        let limit = request
            .headers()
            .get("grpc-timeout")
            .and_then(|value| timeout(value.as_bytes()));
        // Counted from here, not from the first poll: tonic has a timer of its own around us, which
        // answers CANCELLED, and of two timers that are due together the inner one is asked first.
        let began = Instant::now();
        let listed = layer
            .calls
            .begin(id, path.trim_start_matches('/'), began.into_std());
        let tag = listed.tag();
        let open = layer.gate.is_open() || ALWAYS.contains(&path);
        let end = End {
            observer: Arc::clone(&layer.observer),
            path: path.to_owned(),
            began,
            span: span.clone(),
            told: false,
            _listed: listed,
        };
        let answer = async move {
            let response = if !open {
                recovering().into_http()
            } else {
                match limit {
                    None => inner.call(request).await?,
                    Some(limit) => match timeout_at(began + limit, inner.call(request)).await {
                        Ok(response) => response?,
                        Err(_) => Status::deadline_exceeded("the caller's deadline has passed")
                            .into_http(),
                    },
                }
            };
            Ok(end.follow(response))
        };
        Box::pin(CURRENT.scope(tag, answer).instrument(span))
    }
}

/// What is told when a call has ended: an error before its answer begins travels in the headers of
/// an answer without body, all else in the trailers at the end of the body.
struct End {
    observer: Arc<dyn Observer>,
    path: String,
    began: Instant,
    span: tracing::Span,
    told: bool,
    _listed: Listed,
}

impl End {
    /// Tells at once of an answer that is complete, and otherwise when its body ends.
    fn follow(mut self, response: Response<Body>) -> Response<Body> {
        if response.headers().contains_key("grpc-status") || response.body().is_end_stream() {
            let success = match response.status().is_success() {
                true => Code::Ok,
                false => Code::Unknown,
            };
            self.tell(Some(response.headers()), success);
            return response;
        }
        response.map(|body| Body::new(Followed { body, end: self }))
    }

    /// `without`: what the call ended with if no headers say it.
    fn tell(&mut self, headers: Option<&HeaderMap>, without: Code) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        let status = headers.and_then(Status::from_header_map);
        let code = status.as_ref().map_or(without, Status::code);
        let message = status.as_ref().map(Status::message).unwrap_or_default();
        let elapsed = self.began.elapsed();
        self.span.in_scope(|| {
            self.observer.observe(&self.path, code, elapsed);
            log(code, message, elapsed);
        });
    }
}

impl Drop for End {
    /// The client has gone, or reset its stream.
    fn drop(&mut self) {
        self.tell(None, Code::Cancelled);
    }
}

/// A body whose end is told.
struct Followed {
    body: Body,
    end: End,
}

impl http_body::Body for Followed {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.get_mut();
        let frame = std::task::ready!(Pin::new(&mut this.body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    this.end.tell(Some(trailers), Code::Unknown);
                }
            }
            Some(Err(_)) | None => this.end.tell(None, Code::Unknown),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// One line an RPC: failures for the operator, the rest at debug, because the kubelet asks a
/// dozen times a second.
fn log(code: Code, message: &str, elapsed: Duration) {
    let ms = elapsed.as_secs_f64() * 1e3;
    match code {
        Code::Ok => tracing::debug!(?code, ms, "done"),
        Code::NotFound | Code::Unimplemented | Code::Cancelled => {
            tracing::debug!(?code, ms, message, "failed");
        }
        _ => tracing::warn!(?code, ms, message, "failed"),
    }
}

/// `grpc-timeout`: at most eight digits and a unit (gRPC over HTTP2, Requests).
fn timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(number * 3600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tower::ServiceExt;

    #[test]
    fn grpc_timeouts() {
        assert_eq!(timeout(b"2S"), Some(Duration::from_secs(2)));
        assert_eq!(timeout(b"150m"), Some(Duration::from_millis(150)));
        assert_eq!(timeout(b"1H"), Some(Duration::from_secs(3600)));
        for bad in [&b""[..], b"S", b"1x", b"123456789S", b"-1S"] {
            assert_eq!(timeout(bad), None, "{bad:?}");
        }
    }

    #[derive(Default)]
    struct Seen(Mutex<Vec<(String, Code)>>);

    impl Observer for Seen {
        fn observe(&self, path: &str, code: Code, _elapsed: Duration) {
            self.0.lock().unwrap().push((path.to_owned(), code));
        }
    }

    /// What an answer says without its trailers.
    fn code_of(response: &Response<Body>) -> Code {
        Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code())
    }

    /// A body of one message that ends with `code`, or never.
    struct Stream(Vec<Frame<bytes::Bytes>>, bool);

    impl http_body::Body for Stream {
        type Data = bytes::Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<bytes::Bytes>, Status>>> {
            match self.0.pop() {
                Some(frame) => Poll::Ready(Some(Ok(frame))),
                None if self.1 => Poll::Pending,
                None => Poll::Ready(None),
            }
        }
    }

    async fn streamed(ends: Option<Code>) -> (Calls, Arc<Seen>, Response<Body>) {
        let (calls, seen, gate) = (Calls::default(), Arc::new(Seen::default()), Gate::default());
        gate.open();
        let inner = tower::service_fn(move |_: Request<()>| async move {
            let mut frames = vec![Frame::data(bytes::Bytes::from_static(b"message"))];
            if let Some(code) = ends {
                let mut trailers = HeaderMap::new();
                Status::new(code, "").add_header(&mut trailers).unwrap();
                frames.insert(0, Frame::trailers(trailers));
            }
            let body = Body::new(Stream(frames, ends.is_none()));
            Ok::<_, std::convert::Infallible>(Response::new(body))
        });
        let observer: Arc<dyn Observer> = Arc::<Seen>::clone(&seen);
        let service = RpcLayer::new(gate, observer, calls.clone()).layer(inner);
        let request = Request::builder().uri("/a.B/Watch").body(()).unwrap();
        let response = service.oneshot(request).await.unwrap();
        (calls, seen, response)
    }

    async fn next(body: &mut Body) -> Option<Frame<bytes::Bytes>> {
        let frame = std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context));
        frame.await.map(Result::unwrap)
    }

    #[tokio::test]
    async fn a_stream_is_under_way_until_its_trailers_say_how_it_ended() {
        let (calls, seen, response) = streamed(Some(Code::ResourceExhausted)).await;
        let mut body = response.into_body();
        assert!(next(&mut body).await.unwrap().is_data());
        assert_eq!(calls.under_way()[0].method, "a.B/Watch");
        assert!(seen.0.lock().unwrap().is_empty());
        assert!(next(&mut body).await.unwrap().is_trailers());
        let expected = [("/a.B/Watch".to_owned(), Code::ResourceExhausted)];
        assert_eq!(*seen.0.lock().unwrap(), expected);
        drop(body);
        assert_eq!(calls.count(), 0);
        assert_eq!(seen.0.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_stream_that_its_client_leaves_was_cancelled() {
        let (calls, seen, response) = streamed(None).await;
        assert_eq!(calls.count(), 1);
        drop(response);
        assert_eq!(calls.count(), 0);
        let expected = [("/a.B/Watch".to_owned(), Code::Cancelled)];
        assert_eq!(*seen.0.lock().unwrap(), expected);
    }

    async fn call(gate: &Gate, seen: &Arc<Seen>, limit: Option<&str>, work: Duration) -> Code {
        let path = "/runtime.v1.RuntimeService/Version";
        call_to(path, gate, seen, limit, work).await
    }

    async fn call_to(
        path: &str,
        gate: &Gate,
        seen: &Arc<Seen>,
        limit: Option<&str>,
        work: Duration,
    ) -> Code {
        let inner = tower::service_fn(move |_: Request<()>| async move {
            tokio::time::sleep(work).await;
            Ok::<_, std::convert::Infallible>(Response::new(Body::default()))
        });
        let observer: Arc<dyn Observer> = Arc::<Seen>::clone(seen);
        let service = RpcLayer::new(gate.clone(), observer, Calls::default()).layer(inner);
        let mut request = Request::builder().uri(path);
        if let Some(limit) = limit {
            request = request.header("grpc-timeout", limit);
        }
        let response = service.oneshot(request.body(()).unwrap()).await.unwrap();
        code_of(&response)
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_counts_from_the_call() {
        let gate = Gate::default();
        gate.open();
        let never = tower::service_fn(|_: Request<()>| {
            std::future::pending::<Result<Response<Body>, std::convert::Infallible>>()
        });
        let mut service = RpcLayer::new(gate, Arc::new(()), Calls::default()).layer(never);
        let request = Request::builder().header("grpc-timeout", "5m").body(());
        let answer = service.call(request.unwrap());
        tokio::time::advance(Duration::from_millis(5)).await;
        let began = Instant::now();
        let response = answer.await.unwrap();
        assert_eq!(code_of(&response), Code::DeadlineExceeded);
        // The clock stands until a timer moves it, by a millisecond at most where one is rounded.
        assert!(began.elapsed() <= Duration::from_millis(1));
    }

    #[tokio::test]
    async fn what_a_kubelet_asks_once_is_answered_during_recovery() {
        let (gate, seen) = (Gate::default(), Arc::new(Seen::default()));
        for (method, code) in [
            ("ListMetricDescriptors", Code::Ok),
            ("ListPodSandboxMetrics", Code::Unavailable),
        ] {
            let path = format!("/runtime.v1.RuntimeService/{method}");
            let answer = call_to(&path, &gate, &seen, None, Duration::ZERO).await;
            assert_eq!(answer, code, "{method}");
        }
    }

    #[tokio::test]
    async fn gate_deadline_and_observer() {
        let (gate, seen) = (Gate::default(), Arc::new(Seen::default()));
        assert_eq!(
            call(&gate, &seen, None, Duration::ZERO).await,
            Code::Unavailable
        );
        gate.open();
        assert_eq!(call(&gate, &seen, None, Duration::ZERO).await, Code::Ok);
        let late = call(&gate, &seen, Some("5m"), Duration::from_secs(60)).await;
        assert_eq!(late, Code::DeadlineExceeded);
        let seen = seen.0.lock().unwrap();
        let codes: Vec<_> = seen
            .iter()
            .map(|(path, code)| (path.as_str(), *code))
            .collect();
        assert_eq!(
            codes,
            [
                ("/runtime.v1.RuntimeService/Version", Code::Unavailable),
                ("/runtime.v1.RuntimeService/Version", Code::Ok),
                ("/runtime.v1.RuntimeService/Version", Code::DeadlineExceeded)
            ]
        );
    }
}
