//! Calls by method: how many ended with which code, and how long they took.

use std::time::Duration;

use gantry_cri::Observer;
use gantry_types::times::BOUNDS;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tonic::Code;

use super::methods;

type Method = [(&'static str, &'static str); 2];
type Ended = [(&'static str, &'static str); 3];

#[derive(Clone, Debug)]
struct Seconds;

impl MetricConstructor<Histogram> for Seconds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(BOUNDS)
    }
}

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Rpcs {
    ended: Family<Ended, Counter>,
    took: Family<Method, Histogram, Seconds>,
}

impl Default for Rpcs {
    fn default() -> Self {
        Self {
            ended: Family::default(),
            took: Family::new_with_constructor(Seconds),
        }
    }
}

impl Rpcs {
    pub(super) fn register(&self, registry: &mut Registry) {
        let (ended, took) = (self.ended.clone(), self.took.clone());
        registry.register("rpcs", "Calls that have ended", ended);
        let help = "From a call's arrival to the end of its answer";
        registry.register_with_unit("rpc_duration", help, Unit::Seconds, took);
    }
}

impl Observer for Rpcs {
    fn observe(&self, path: &str, code: Code, elapsed: Duration) {
        let (service, method) = methods::labels(path);
        let labels = [("service", service), ("method", method)];
        // How long a client listens for events is its own affair, and would be the sum's greatest part.
        if method != "GetContainerEvents" {
            let took = self.took.get_or_create(&labels);
            took.observe(elapsed.as_secs_f64());
        }
        let [service, method] = labels;
        let labels = [service, method, ("code", name(code))];
        self.ended.get_or_create(&labels).inc();
    }
}

/// As gRPC names it.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_for_events_is_counted_and_not_timed() {
        let rpcs = Rpcs::default();
        let mut registry = Registry::default();
        rpcs.register(&mut registry);
        for method in ["Version", "GetContainerEvents"] {
            let path = format!("/runtime.v1.RuntimeService/{method}");
            rpcs.observe(&path, Code::Cancelled, Duration::from_secs(86_400));
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let lines = |name: &str, method: &str| {
            let of = |line: &&str| line.starts_with(name) && line.contains(method);
            text.lines().filter(of).count()
        };
        assert_eq!(lines("rpcs_total", "GetContainerEvents"), 1, "{text}");
        assert_eq!(lines("rpc_duration_seconds_sum", "Version"), 1, "{text}");
        assert_eq!(lines("rpc_duration", "GetContainerEvents"), 0, "{text}");
    }
}
