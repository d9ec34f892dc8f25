//! What gantryctl asks of the node itself: what it is at, and what there is outside of the records.

use gantry_admin_api::v1::node_server::Node as Service;
use gantry_admin_api::v1::{CheckRequest, CheckResponse, StateRequest, StateResponse, Thing};
use gantry_supervisor::ThingKind;
use tonic::{Request, Response, Status};

use crate::state::State;
use crate::status::status;

pub struct Node {
    state: State,
}

impl Node {
    pub fn new(state: State) -> Self {
        Self { state }
    }
}

#[tonic::async_trait]
impl Service for Node {
    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let checked = self
            .state
            .supervisor
            .check(request.into_inner().repair)
            .await;
        let things = checked.map_err(status)?.into_iter().map(thing).collect();
        Ok(Response::new(CheckResponse { things }))
    }

    async fn state(&self, _: Request<StateRequest>) -> Result<Response<StateResponse>, Status> {
        let json = self.state.read().to_string();
        Ok(Response::new(StateResponse { json }))
    }
}

fn thing(thing: gantry_supervisor::Thing) -> Thing {
    let kind = match thing.kind {
        ThingKind::Process => "process",
        ThingKind::Mount => "mount",
        ThingKind::Netns => "netns",
        ThingKind::Attachment => "attachment",
        ThingKind::Cgroup => "cgroup",
        ThingKind::Runtime => "runtime",
        ThingKind::Directory => "directory",
        ThingKind::Snapshot => "snapshot",
        ThingKind::Store => "store",
    };
    Thing {
        kind: kind.to_owned(),
        name: thing.name,
        owner: thing.owner.unwrap_or_default(),
        remark: thing.remark,
        removed: thing.removed,
    }
}
