//! What gantryctl asks of the node itself: what there is outside of the records, and whose it is.

use gantry_admin_api::v1::node_server::Node as Service;
use gantry_admin_api::v1::{CheckRequest, CheckResponse, Thing};
use gantry_supervisor::{Supervisor, ThingKind};
use tonic::{Request, Response, Status};

use crate::status::status;

pub struct Node {
    supervisor: Supervisor,
}

impl Node {
    pub fn new(supervisor: Supervisor) -> Self {
        Self { supervisor }
    }
}

#[tonic::async_trait]
impl Service for Node {
    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let checked = self.supervisor.check(request.into_inner().repair).await;
        let things = checked.map_err(status)?.into_iter().map(thing).collect();
        Ok(Response::new(CheckResponse { things }))
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
