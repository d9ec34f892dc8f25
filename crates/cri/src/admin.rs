//! What gantryctl asks beyond CRI: images in and out, what they are, and whether they still are.

use std::collections::{HashSet, VecDeque};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use gantry_admin_api::v1::images_server::Images as Service;
use gantry_admin_api::v1::{
    CollectRequest, CollectResponse, ExportRequest, ExportResponse, ImportRequest, ImportResponse,
    InspectRequest, InspectResponse, Item, MountRequest, MountResponse, PullRequest, PullResponse,
    TagRequest, TagResponse, UnmountRequest, UnmountResponse, VerifyRequest, VerifyResponse,
};
use gantry_images::{Fate, Images, ItemKind};
use gantry_supervisor::Supervisor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::status::{invalid, status};

/// Bytes of an archive a message.
const CHUNK: usize = 256 << 10;

pub struct Admin {
    supervisor: Supervisor,
    images: Images,
}

impl Admin {
    pub fn new(supervisor: Supervisor) -> Self {
        let images = supervisor.images().clone();
        Self { supervisor, images }
    }
}

/// Verifies one image and, if asked, repairs it and looks again.
async fn verify(
    supervisor: &Supervisor,
    name: &str,
    repair: bool,
) -> gantry_images::Result<VerifyResponse> {
    let images = supervisor.images();
    let mut verified = images.verify(name).await?;
    let mut repaired = Vec::new();
    if repair && !verified.faults.is_empty() {
        let in_use = supervisor.layers_in_use();
        let remains = images.repair(&verified, in_use).await?;
        let before = std::mem::take(&mut verified.faults);
        let id = verified.id.clone();
        verified = images.verify(&id).await?;
        verified.notes.extend(remains);
        let gone = before
            .into_iter()
            .filter(|old| !verified.faults.contains(old));
        repaired.extend(gone.map(|fault| fault.reason));
    }
    Ok(VerifyResponse {
        id: verified.id,
        names: verified.names,
        blobs: verified.blobs,
        bytes: verified.bytes,
        layers: verified.layers,
        faults: verified
            .faults
            .into_iter()
            .map(|fault| fault.reason)
            .collect(),
        notes: verified.notes,
        repaired,
    })
}

/// Pulls, and tells how far it is from time to time; the last word is the answer.
async fn watched_pull(
    images: &Images,
    reference: String,
    sender: &tokio::sync::mpsc::Sender<Result<PullResponse, Status>>,
) -> gantry_images::Result<PullResponse> {
    const PAUSE: Duration = Duration::from_millis(100);
    let request = gantry_images::PullRequest {
        reference,
        ..Default::default()
    };
    let progress = Mutex::new(gantry_images::Progress::default());
    let counters = || progress.lock().unwrap_or_else(PoisonError::into_inner);
    let response = |id| {
        let stand = counters().stand();
        PullResponse {
            total: stand.total,
            fetched: stand.fetched,
            layers: stand.layers,
            unpacked: stand.unpacked,
            id,
        }
    };
    let telling = async {
        loop {
            tokio::time::sleep(PAUSE).await;
            // A client that reads slowly is told less often.
            if sender.send(Ok(response(String::new()))).await.is_err() {
                return std::future::pending().await;
            }
        }
    };
    tokio::select! {
        id = images.pull_watched(request, |watched| *counters() = watched) => Ok(response(id?)),
        never = telling => never,
    }
}

#[tonic::async_trait]
impl Service for Admin {
    async fn import(
        &self,
        request: Request<Streaming<ImportRequest>>,
    ) -> Result<Response<ImportResponse>, Status> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.unwrap_or_default();
        let name = (!first.name.is_empty()).then_some(first.name);
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let reader = ChunkReader {
            receiver,
            chunk: first.data.into(),
            at_end: first.complete,
        };
        tokio::spawn(async move {
            loop {
                let next = match messages.message().await {
                    Ok(Some(message)) => Ok((message.data, message.complete)),
                    Ok(None) => Err(std::io::ErrorKind::UnexpectedEof.into()),
                    Err(error) => Err(std::io::Error::other(error.message().to_owned())),
                };
                let more = matches!(next, Ok((_, false)));
                // Closed when the import has failed: its caller has the reason.
                if sender.send(next).await.is_err() || !more {
                    return;
                }
            }
        });
        let names = if first.no_unpack {
            self.images.import_fetched(reader, name).await
        } else {
            self.images.import(reader, name).await
        };
        let names = names.map_err(status)?;
        Ok(Response::new(ImportResponse { names }))
    }

    type ExportStream = ReceiverStream<Result<ExportResponse, Status>>;

    async fn export(
        &self,
        request: Request<ExportRequest>,
    ) -> Result<Response<Self::ExportStream>, Status> {
        let names = request.into_inner().names;
        if names.is_empty() {
            return Err(invalid("names", "is empty"));
        }
        // Asked before the stream begins, so that a wrong name is an error and not a torn archive.
        for name in &names {
            if self.images.status(name).map_err(status)?.is_none() {
                return Err(Status::not_found(format!("image {name:?} not found")));
            }
        }
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let images = self.images.clone();
        tokio::task::spawn_blocking(move || {
            let mut writer = std::io::BufWriter::with_capacity(CHUNK, ChunkWriter(sender.clone()));
            let outcome = images
                .export(&names, &mut writer)
                .map_err(status)
                .and_then(|()| {
                    writer
                        .flush()
                        .map_err(|error| Status::cancelled(error.to_string()))
                });
            if let Err(error) = outcome {
                let _ = sender.blocking_send(Err(error));
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type PullStream = ReceiverStream<Result<PullResponse, Status>>;

    async fn pull(
        &self,
        request: Request<PullRequest>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let name = request.into_inner().name;
        if name.is_empty() {
            return Err(invalid("name", "is empty"));
        }
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let images = self.images.clone();
        tokio::spawn(async move {
            let outcome = tokio::select! {
                outcome = watched_pull(&images, name, &sender) => outcome,
                // Whoever else waits for this pull keeps it.
                () = sender.closed() => return,
            };
            // Gone at the last moment.
            let _ = sender.send(outcome.map_err(status)).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn mount(
        &self,
        request: Request<MountRequest>,
    ) -> Result<Response<MountResponse>, Status> {
        let MountRequest { name, target } = request.into_inner();
        let mounted = self.supervisor.mount_image(&name, Path::new(&target));
        let id = mounted.await.map_err(status)?.image_id;
        Ok(Response::new(MountResponse { id }))
    }

    async fn unmount(
        &self,
        request: Request<UnmountRequest>,
    ) -> Result<Response<UnmountResponse>, Status> {
        let target = request.into_inner().target;
        let unmounted = self.supervisor.unmount_image(Path::new(&target));
        unmounted.await.map_err(status)?;
        Ok(Response::new(UnmountResponse {}))
    }

    async fn tag(&self, request: Request<TagRequest>) -> Result<Response<TagResponse>, Status> {
        let TagRequest { source, target } = request.into_inner();
        let (id, name) = self.images.tag(&source, &target).await.map_err(status)?;
        Ok(Response::new(TagResponse { id, name }))
    }

    async fn inspect(
        &self,
        request: Request<InspectRequest>,
    ) -> Result<Response<InspectResponse>, Status> {
        let name = request.into_inner().name;
        let mut facts = self.images.inspect(&name).await.map_err(status)?;
        let users = facts["id"]
            .as_str()
            .map(|id| self.supervisor.image_users(id));
        facts["usedBy"] = users.unwrap_or_default().into();
        let json = facts.to_string();
        Ok(Response::new(InspectResponse { json }))
    }

    type VerifyStream = ReceiverStream<Result<VerifyResponse, Status>>;

    async fn verify(
        &self,
        request: Request<VerifyRequest>,
    ) -> Result<Response<Self::VerifyStream>, Status> {
        let VerifyRequest { mut names, repair } = request.into_inner();
        let all = names.is_empty();
        if all {
            names.extend(self.images.list().iter().map(|image| image.id.clone()));
        }
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let supervisor = self.supervisor.clone();
        tokio::spawn(async move {
            for name in names {
                let answer = match verify(&supervisor, &name, repair).await {
                    // Removed since it was listed.
                    Err(gantry_images::Error::NoSuchImage { .. }) if all => continue,
                    answer => answer.map_err(status),
                };
                let failed = answer.is_err();
                // A client that has gone waits for no other image.
                if sender.send(answer).await.is_err() || failed {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn collect(
        &self,
        request: Request<CollectRequest>,
    ) -> Result<Response<CollectResponse>, Status> {
        let holders = self.supervisor.layer_holders();
        let mut items = self.images.audit(holders).await.map_err(status)?;
        if !request.into_inner().dry_run {
            let in_use = self.supervisor.layers_in_use();
            self.images.collect(in_use).await.map_err(status)?;
            // What work that began meanwhile needs has stayed.
            let holders = self.supervisor.layer_holders();
            let left = self.images.audit(holders).await.map_err(status)?;
            let key =
                |item: &gantry_images::Item| (item.kind, item.digest.clone(), item.snapshotter);
            let left: HashSet<_> = left.iter().map(key).collect();
            for item in &mut items {
                if item.fate == Fate::Goes && left.contains(&key(item)) {
                    item.fate = Fate::Kept;
                }
            }
        }
        let items = items.into_iter().map(item).collect();
        Ok(Response::new(CollectResponse { items }))
    }
}

fn item(item: gantry_images::Item) -> Item {
    let kind = match item.kind {
        ItemKind::Blob => "blob",
        ItemKind::Part => "part",
        ItemKind::Layer => "layer",
    };
    let fate = match item.fate {
        Fate::Kept => "kept",
        Fate::Young => "young",
        Fate::Goes => "goes",
    };
    Item {
        kind: kind.to_owned(),
        snapshotter: item.snapshotter.unwrap_or_default().to_owned(),
        digest: item.digest.to_string(),
        bytes: item.bytes,
        fate: fate.to_owned(),
        referrers: item.referrers,
    }
}

/// Reads what arrives as messages; a client that goes away in the middle is an error, not an end.
struct ChunkReader {
    /// Bytes, and whether they are the last.
    receiver: tokio::sync::mpsc::Receiver<std::io::Result<(Vec<u8>, bool)>>,
    chunk: VecDeque<u8>,
    at_end: bool,
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.chunk.is_empty() && !self.at_end {
            match self.receiver.blocking_recv() {
                Some(Ok((chunk, at_end))) => {
                    self.chunk = chunk.into();
                    self.at_end = at_end;
                }
                Some(Err(error)) => return Err(error),
                None => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            }
        }
        self.chunk.read(buffer)
    }
}

/// Sends what is written as messages; fails once the client has gone.
struct ChunkWriter(tokio::sync::mpsc::Sender<Result<ExportResponse, Status>>);

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        self.0
            .blocking_send(Ok(ExportResponse {
                data: chunk.to_vec(),
            }))
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::BrokenPipe))?;
        Ok(chunk.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
