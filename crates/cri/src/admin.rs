//! What gantryctl asks beyond CRI: images in and out.

use std::collections::VecDeque;
use std::io::{Read, Write};

use gantry_admin_api::v1::images_server::Images as Service;
use gantry_admin_api::v1::{ExportRequest, ExportResponse, ImportRequest, ImportResponse};
use gantry_images::Images;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::status::{invalid, status};

/// Bytes of an archive a message.
const CHUNK: usize = 256 << 10;

pub struct Admin {
    images: Images,
}

impl Admin {
    pub fn new(images: Images) -> Self {
        Self { images }
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
            at_end: false,
        };
        tokio::spawn(async move {
            loop {
                let next = match messages.message().await {
                    Ok(Some(message)) => Ok(Some(message.data)),
                    Ok(None) => Ok(None),
                    Err(error) => Err(std::io::Error::other(error.message().to_owned())),
                };
                let more = matches!(next, Ok(Some(_)));
                // Closed when the import has failed: its caller has the reason.
                if sender.send(next).await.is_err() || !more {
                    return;
                }
            }
        });
        let names = self.images.import(reader, name).await.map_err(status)?;
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
}

/// Reads what arrives as messages; a client that goes away in the middle is an error, not an end.
struct ChunkReader {
    receiver: tokio::sync::mpsc::Receiver<std::io::Result<Option<Vec<u8>>>>,
    chunk: VecDeque<u8>,
    at_end: bool,
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.chunk.is_empty() && !self.at_end {
            match self.receiver.blocking_recv() {
                Some(Ok(Some(chunk))) => self.chunk = chunk.into(),
                Some(Ok(None)) => self.at_end = true,
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
