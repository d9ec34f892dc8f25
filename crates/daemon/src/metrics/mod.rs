//! What Prometheus is told, in OpenMetrics text: docs/observability.md has the table.
//!
//! Calls are counted as they end ([`Rpcs`]); all else is read at a scrape from what the daemon knows
//! anyway ([`node`]), without a lock that is held across I/O. Nothing here runs between scrapes.
//! Labels have few values: methods that we serve, runtime handlers that are configured, steps that
//! have a name in the source. Ids of pods are no labels.

mod endpoint;
mod methods;
mod node;
mod process;
mod rpcs;

use std::sync::Arc;

use gantry_cri::{Calls, Gate};
use gantry_supervisor::Supervisor;
use prometheus_client::registry::Registry;

use crate::traces::Counts;

pub use endpoint::serve;
pub use rpcs::Rpcs;

/// Everything that is exposed.
#[derive(Debug)]
pub struct Metrics(Registry);

impl Metrics {
    pub fn new(
        supervisor: Supervisor,
        rpcs: &Rpcs,
        calls: Calls,
        gate: Gate,
        spans: Option<Arc<Counts>>,
    ) -> Arc<Self> {
        // Names that are the same for every program have no prefix.
        let mut all = Registry::default();
        all.register_collector(Box::new(process::Process));
        let registry = all.sub_registry_with_prefix("gantry");
        rpcs.register(registry);
        registry.register_collector(Box::new(node::Node::new(supervisor, calls, gate, spans)));
        Arc::new(Self(all))
    }

    /// The exposition. Reads memory and /proc.
    fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.0)?;
        Ok(text)
    }
}
