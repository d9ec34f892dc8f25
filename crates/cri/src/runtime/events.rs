//! GetContainerEvents (KEP-3386): everything that happens to pods and containers, as it happens.

use std::pin::Pin;

use gantry_cri_api::v1 as cri;
use gantry_supervisor::Supervisor;
use gantry_supervisor::events::{Event, EventKind};
use tokio_stream::Stream;
use tonic::Status;

use super::Runtime;
use crate::convert;
use crate::status::status;

pub type Events = Pin<Box<dyn Stream<Item = Result<cri::ContainerEventResponse, Status>> + Send>>;

impl Runtime {
    pub(super) fn container_events(&self) -> Result<Events, Status> {
        let subscription = self.supervisor.registry().subscribe().map_err(status)?;
        let supervisor = self.supervisor.clone();
        let events = futures::stream::unfold(Some(subscription), move |subscription| {
            let supervisor = supervisor.clone();
            async move {
                // Whoever was told of the end is told nothing more.
                let mut subscription = subscription?;
                Some(match subscription.next().await {
                    Ok(event) => (Ok(response(&event, &supervisor)), Some(subscription)),
                    Err(ended) => (Err(status(ended)), None),
                })
            }
        });
        Ok(Box::pin(events))
    }
}

/// The kubelet takes the statuses of the pod and all of its containers from an event, and passes over
/// one without the pod's. A sandbox that another has followed is told of without: it would hide the
/// one that runs, and its removal would be taken for that of the pod.
fn response(event: &Event, supervisor: &Supervisor) -> cri::ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => cri::ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => cri::ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => cri::ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => cri::ContainerEventType::ContainerDeletedEvent,
    };
    cri::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind.into(),
        created_at: event.at,
        pod_sandbox_status: (!supervisor.registry().is_superseded(&event.pod))
            .then(|| convert::pod_status(&event.pod)),
        containers_statuses: convert::container_statuses(&event.pod, supervisor.images()),
    }
}
