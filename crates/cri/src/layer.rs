//! The layer around every RPC: span, readiness, deadline, observation, one log line.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument;

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
    fn observe(&self, method: &str, code: Code, elapsed: Duration);
}

impl Observer for () {
    fn observe(&self, _method: &str, _code: Code, _elapsed: Duration) {}
}

#[derive(Clone)]
pub struct RpcLayer {
    gate: Gate,
    observer: Arc<dyn Observer>,
    next_id: Arc<AtomicU64>,
}

impl RpcLayer {
    pub fn new(gate: Gate, observer: Arc<dyn Observer>) -> Self {
        Self {
            gate,
            observer,
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

type Answer<B, E> = Pin<Box<dyn Future<Output = Result<Response<B>, E>> + Send>>;

impl<S, In, Out> Service<Request<In>> for RpcService<S>
where
    S: Service<Request<In>, Response = Response<Out>> + Clone + Send + 'static,
    S::Future: Send,
    In: Send + 'static,
    Out: Default + Send + 'static,
{
    type Response = Response<Out>;
    type Error = S::Error;
    type Future = Answer<Out, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<In>) -> Self::Future {
        // The clone takes the place of the service that was polled ready, which is used up.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let layer = self.layer.clone();
        let method = request
            .uri()
            .path()
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        let id = layer.next_id.fetch_add(1, Ordering::Relaxed);
        let span = tracing::info_span!("rpc", id, method);
        let limit = request
            .headers()
            .get("grpc-timeout")
            .and_then(|value| timeout(value.as_bytes()));
        // Counted from here, not from the first poll: tonic has a timer of its own around us, which
        // answers CANCELLED, and of two timers that are due together the inner one is asked first.
        let began = Instant::now();
        let answer = async move {
            let response = if !layer.gate.is_open() {
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
            let code = code_of(&response);
            let elapsed = began.elapsed();
            layer.observer.observe(&method, code, elapsed);
            log(&response, code, elapsed);
            Ok(response)
        };
        Box::pin(answer.instrument(span))
    }
}

/// One line an RPC: failures for the operator, the rest at debug, because the kubelet asks a
/// dozen times a second.
fn log<B>(response: &Response<B>, code: Code, elapsed: Duration) {
    let ms = elapsed.as_secs_f64() * 1e3;
    if code == Code::Ok {
        tracing::debug!(?code, ms, "done");
        return;
    }
    let status = Status::from_header_map(response.headers());
    let message = status.as_ref().map(Status::message).unwrap_or_default();
    match code {
        Code::NotFound | Code::Unimplemented => tracing::debug!(?code, ms, message, "failed"),
        _ => tracing::warn!(?code, ms, message, "failed"),
    }
}

/// An error travels in the headers of an answer without body; a success ends in trailers.
fn code_of<B>(response: &Response<B>) -> Code {
    match response.headers().get("grpc-status") {
        Some(value) => Code::from_bytes(value.as_bytes()),
        None if response.status().is_success() => Code::Ok,
        None => Code::Unknown,
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
        fn observe(&self, method: &str, code: Code, _elapsed: Duration) {
            self.0.lock().unwrap().push((method.to_owned(), code));
        }
    }

    async fn call(gate: &Gate, seen: &Arc<Seen>, limit: Option<&str>, work: Duration) -> Code {
        let inner = tower::service_fn(move |_: Request<()>| async move {
            tokio::time::sleep(work).await;
            Ok::<_, std::convert::Infallible>(Response::new(String::new()))
        });
        let observer: Arc<dyn Observer> = Arc::<Seen>::clone(seen);
        let service = RpcLayer::new(gate.clone(), observer).layer(inner);
        let mut request = Request::builder().uri("/runtime.v1.RuntimeService/Version");
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
            std::future::pending::<Result<Response<String>, std::convert::Infallible>>()
        });
        let mut service = RpcLayer::new(gate, Arc::new(())).layer(never);
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
            .map(|(method, code)| (method.as_str(), *code))
            .collect();
        assert_eq!(
            codes,
            [
                ("Version", Code::Unavailable),
                ("Version", Code::Ok),
                ("Version", Code::DeadlineExceeded)
            ]
        );
    }
}
