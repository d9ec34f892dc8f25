//! `gantryctl image`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use gantry_admin_api::v1::images_client::ImagesClient;
use gantry_admin_api::v1::{ExportRequest, ImportRequest};
use gantry_cri_api::v1 as cri;
use gantry_cri_api::v1::image_service_client::ImageServiceClient;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

#[derive(clap::Subcommand)]
pub enum Command {
    /// Import an OCI layout or `docker save` archive, a tar; `-` reads standard input
    Import {
        file: PathBuf,
        /// Name of the image, for an archive that names none
        #[arg(long)]
        name: Option<String>,
    },
    /// Export images as a tar that is an OCI layout and a docker archive at once
    Export {
        /// Names or ids
        #[arg(required = true)]
        names: Vec<String>,
        /// File to write; `-` writes standard output
        #[arg(long, short, default_value = "-")]
        output: PathBuf,
    },
    /// List images
    List {
        /// Names only
        #[arg(long, short)]
        quiet: bool,
    },
}

/// Bytes of an archive a message.
const CHUNK: usize = 256 << 10;

/// What a listing may take: thousands of images.
const MESSAGE_LIMIT: usize = 64 << 20;

pub async fn run(command: Command, channel: Channel) -> Result<()> {
    match command {
        Command::Import { file, name } => import(channel, &file, name).await,
        Command::Export { names, output } => export(channel, names, &output).await,
        Command::List { quiet } => list(channel, quiet).await,
    }
}

async fn import(channel: Channel, file: &Path, name: Option<String>) -> Result<()> {
    let reader: Box<dyn AsyncRead + Send + Unpin> = if file == Path::new("-") {
        Box::new(tokio::io::stdin())
    } else {
        let opened = tokio::fs::File::open(file).await;
        Box::new(opened.with_context(|| format!("open {}", file.display()))?)
    };
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let reading = tokio::spawn(read(reader, name.unwrap_or_default(), sender));
    let answer = ImagesClient::new(channel)
        .import(ReceiverStream::new(receiver))
        .await;
    // A file that cannot be read ends the stream early, and that is the cause to tell.
    reading
        .await?
        .with_context(|| format!("read {}", file.display()))?;
    for name in answer.map_err(status)?.into_inner().names {
        println!("{name}");
    }
    Ok(())
}

/// Sends the archive; a daemon that takes no more is not this side's error.
async fn read(
    mut reader: impl AsyncRead + Unpin,
    mut name: String,
    sender: tokio::sync::mpsc::Sender<ImportRequest>,
) -> std::io::Result<()> {
    loop {
        let mut data = vec![0; CHUNK];
        let n = reader.read(&mut data).await?;
        if n == 0 {
            return Ok(());
        }
        data.truncate(n);
        let message = ImportRequest {
            name: std::mem::take(&mut name),
            data,
        };
        if sender.send(message).await.is_err() {
            return Ok(());
        }
    }
}

async fn export(channel: Channel, names: Vec<String>, output: &Path) -> Result<()> {
    let mut messages = ImagesClient::new(channel)
        .export(ExportRequest { names })
        .await
        .map_err(status)?
        .into_inner();
    let mut writer: Box<dyn AsyncWrite + Unpin> = if output == Path::new("-") {
        Box::new(tokio::io::stdout())
    } else {
        let created = tokio::fs::File::create(output).await;
        Box::new(created.with_context(|| format!("create {}", output.display()))?)
    };
    let write = async {
        while let Some(message) = messages.message().await.map_err(status)? {
            writer.write_all(&message.data).await?;
        }
        writer.flush().await?;
        anyhow::Ok(())
    };
    let outcome = write
        .await
        .with_context(|| format!("write {}", output.display()));
    if outcome.is_err() && output != Path::new("-") {
        // Half an archive looks like a whole one.
        let _ = tokio::fs::remove_file(output).await;
    }
    outcome
}

async fn list(channel: Channel, quiet: bool) -> Result<()> {
    let images = ImageServiceClient::new(channel)
        .max_decoding_message_size(MESSAGE_LIMIT)
        .list_images(cri::ListImagesRequest::default())
        .await
        .map_err(status)?
        .into_inner()
        .images;
    if !quiet {
        println!("{:<60} {:<20} {:>12}", "NAME", "ID", "SIZE");
    }
    for image in images {
        let names = if image.repo_tags.is_empty() {
            &image.repo_digests
        } else {
            &image.repo_tags
        };
        for name in names {
            if quiet {
                println!("{name}");
            } else {
                println!("{name:<60} {:<20} {:>12}", short(&image.id), image.size);
            }
        }
    }
    Ok(())
}

/// `sha256:` and twelve digits.
fn short(id: &str) -> &str {
    id.get(..19).unwrap_or(id)
}

/// The daemon's message is the error; its code adds nothing for people.
fn status(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}
