//! `gantryctl image`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use gantry_admin_api::v1::images_client::ImagesClient;
use gantry_admin_api::v1::{
    CollectRequest, ExportRequest, ImportRequest, InspectRequest, Item, MountRequest, PullRequest,
    TagRequest, UnmountRequest, VerifyRequest,
};
use gantry_cri_api::v1 as cri;
use gantry_cri_api::v1::image_service_client::ImageServiceClient;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::progress::Progress;
use crate::{BAD, MESSAGE_LIMIT, status};

#[derive(clap::Subcommand)]
pub enum Command {
    /// Import an OCI layout or `docker save` archive, a tar; `-` reads standard input
    Import {
        file: PathBuf,
        /// Name of the image, for an archive that names none
        #[arg(long)]
        name: Option<String>,
        /// Leave the unpacking to the first container that needs it
        #[arg(long)]
        no_unpack: bool,
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
    /// Pull an image with the node's own credentials
    Pull { name: String },
    /// Mount an image's root file system, read-only; its layers stay until it is unmounted
    Mount {
        /// Name or id
        name: String,
        /// A directory on which nothing is mounted
        target: PathBuf,
    },
    /// Unmount what `mount` has mounted
    Unmount { target: PathBuf },
    /// Give an image another name
    Tag {
        /// Name or id
        source: String,
        target: String,
    },
    /// Remove images under all their names
    Rm {
        /// Names or ids
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Print names, manifest, configuration and layers of images as JSON
    Inspect {
        /// Names or ids
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Compare blobs with their digests and unpacked layers with their archives; exits with 2 if
    /// anything is bad
    Verify {
        /// Names or ids; none: all images
        names: Vec<String>,
        /// Pull anew what is bad, with the node's own credentials
        #[arg(long)]
        repair: bool,
    },
    /// Delete what no image and no container needs
    Gc {
        /// Delete nothing; print what refers to what, and what would go
        #[arg(long)]
        dry_run: bool,
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

pub async fn run(command: Command, channel: Channel) -> Result<ExitCode> {
    match command {
        Command::Import {
            file,
            name,
            no_unpack,
        } => import(channel, &file, name, no_unpack).await?,
        Command::Export { names, output } => export(channel, names, &output).await?,
        Command::Pull { name } => pull(channel, name).await?,
        Command::Mount { name, target } => mount(channel, name, &target).await?,
        Command::Unmount { target } => unmount(channel, &target).await?,
        Command::Tag { source, target } => tag(channel, source, target).await?,
        Command::Rm { names } => remove(channel, names).await?,
        Command::Inspect { names } => inspect(channel, names).await?,
        Command::Verify { names, repair } => return verify(channel, names, repair).await,
        Command::Gc { dry_run } => collect(channel, dry_run).await?,
        Command::List { quiet } => list(channel, quiet).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn pull(channel: Channel, name: String) -> Result<()> {
    let answers = ImagesClient::new(channel).pull(PullRequest { name }).await;
    let mut answers = answers.map_err(status)?.into_inner();
    let mut progress = Progress::new("pull", None);
    let mut id = String::new();
    while let Some(stand) = answers.message().await.map_err(status)? {
        progress.set(stand.fetched, Some(stand.total));
        id = stand.id;
    }
    drop(progress);
    anyhow::ensure!(
        !id.is_empty(),
        "gantryd went away in the middle of the pull"
    );
    println!("{id}");
    Ok(())
}

async fn mount(channel: Channel, name: String, target: &Path) -> Result<()> {
    let target = absolute(target)?;
    let answer = ImagesClient::new(channel)
        .mount(MountRequest { name, target })
        .await;
    println!("{}", answer.map_err(status)?.into_inner().id);
    Ok(())
}

async fn unmount(channel: Channel, target: &Path) -> Result<()> {
    let target = absolute(target)?;
    let answer = ImagesClient::new(channel)
        .unmount(UnmountRequest { target })
        .await;
    answer.map_err(status)?;
    Ok(())
}

/// A path as the daemon, which runs elsewhere, is to take it.
fn absolute(path: &Path) -> Result<String> {
    let absolute = std::path::absolute(path);
    let absolute = absolute.with_context(|| format!("path {}", path.display()))?;
    let text = absolute.into_os_string().into_string();
    text.map_err(|_| anyhow::anyhow!("path {}: is not UTF-8", path.display()))
}

async fn tag(channel: Channel, source: String, target: String) -> Result<()> {
    let request = TagRequest { source, target };
    let answer = ImagesClient::new(channel).tag(request).await;
    println!("{}", answer.map_err(status)?.into_inner().name);
    Ok(())
}

async fn remove(channel: Channel, names: Vec<String>) -> Result<()> {
    let mut client = ImageServiceClient::new(channel);
    for name in names {
        let image = Some(cri::ImageSpec {
            image: name.clone(),
            ..Default::default()
        });
        let asked = cri::ImageStatusRequest {
            image: image.clone(),
            verbose: false,
        };
        let found = client.image_status(asked).await.map_err(status)?;
        // CRI calls the removal of nothing a success; for people it is a name misspelt.
        let Some(found) = found.into_inner().image else {
            anyhow::bail!("image {name:?} not found");
        };
        let removed = client.remove_image(cri::RemoveImageRequest { image });
        removed.await.map_err(status)?;
        println!("{}", found.id);
    }
    Ok(())
}

async fn inspect(channel: Channel, names: Vec<String>) -> Result<()> {
    let mut client = ImagesClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT);
    let mut all = Vec::with_capacity(names.len());
    for name in names {
        let answer = client.inspect(InspectRequest { name }).await;
        let json = answer.map_err(status)?.into_inner().json;
        all.push(serde_json::from_str::<serde_json::Value>(&json)?);
    }
    println!("{}", serde_json::to_string_pretty(&all)?);
    Ok(())
}

async fn verify(channel: Channel, names: Vec<String>, repair: bool) -> Result<ExitCode> {
    let request = VerifyRequest { names, repair };
    let answer = ImagesClient::new(channel).verify(request).await;
    let mut answers = answer.map_err(status)?.into_inner();
    let mut bad = false;
    while let Some(image) = answers.message().await.map_err(status)? {
        let verdict = match (image.faults.is_empty(), image.repaired.is_empty()) {
            (true, true) => "good",
            (true, false) => "repaired",
            (false, _) => "BAD",
        };
        let name = image.names.first().map_or("", String::as_str);
        println!(
            "{verdict}: {} {name}: {} blobs of {} bytes, {} unpacked layers",
            short(&image.id),
            image.blobs,
            image.bytes,
            image.layers
        );
        for (what, lines) in [
            ("bad", &image.faults),
            ("repaired", &image.repaired),
            ("note", &image.notes),
        ] {
            for line in lines {
                println!("  {what}: {line}");
            }
        }
        bad |= !image.faults.is_empty();
    }
    Ok(match bad {
        true => ExitCode::from(BAD),
        false => ExitCode::SUCCESS,
    })
}

async fn collect(channel: Channel, dry_run: bool) -> Result<()> {
    let answer = ImagesClient::new(channel)
        .max_decoding_message_size(MESSAGE_LIMIT)
        .collect(CollectRequest { dry_run })
        .await;
    let items = answer.map_err(status)?.into_inner().items;
    let goes = |item: &&Item| item.fate == "goes";
    let snapshotters: HashSet<_> = items.iter().map(|item| item.snapshotter.as_str()).collect();
    // Blobs have none, and one alone goes without saying.
    let several = snapshotters.iter().filter(|name| !name.is_empty()).count() > 1;
    for item in items.iter().filter(|item| dry_run || goes(item)) {
        let why = match (item.referrers.as_slice(), item.fate.as_str()) {
            ([], "young") => "nothing, but it came lately".to_owned(),
            ([], _) => "nothing".to_owned(),
            (referrers, _) => referrers.join(", "),
        };
        let of = match several && !item.snapshotter.is_empty() {
            true => format!(" of {}", item.snapshotter),
            false => String::new(),
        };
        println!(
            "{:<5} {:<5} {:>14} {}{of} <- {why}",
            item.fate, item.kind, item.bytes, item.digest
        );
    }
    let bytes: u64 = items.iter().filter(goes).map(|item| item.bytes).sum();
    let count = items.iter().filter(goes).count();
    let verb = if dry_run { "would go" } else { "are gone" };
    println!("{count} of {} with {bytes} bytes {verb}", items.len());
    Ok(())
}

async fn import(
    channel: Channel,
    file: &Path,
    name: Option<String>,
    no_unpack: bool,
) -> Result<()> {
    let mut size = None;
    let reader: Box<dyn AsyncRead + Send + Unpin> = if file == Path::new("-") {
        Box::new(tokio::io::stdin())
    } else {
        let opened = tokio::fs::File::open(file).await;
        let opened = opened.with_context(|| format!("open {}", file.display()))?;
        size = opened.metadata().await.ok().map(|metadata| metadata.len());
        Box::new(opened)
    };
    let progress = Progress::new("import", size);
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let reading = tokio::spawn(read(
        reader,
        name.unwrap_or_default(),
        no_unpack,
        progress,
        sender,
    ));
    let answer = ImagesClient::new(channel)
        .import(ReceiverStream::new(receiver))
        .await;
    // A daemon that has had enough answers before standard input ends.
    let read = match &answer {
        Err(_) if !reading.is_finished() => Ok(()),
        _ => reading.await?,
    };
    // A file that cannot be read ends the stream early, and that is the cause to tell.
    read.with_context(|| format!("read {}", file.display()))?;
    for name in answer.map_err(status)?.into_inner().names {
        println!("{name}");
    }
    Ok(())
}

/// Sends the archive; a daemon that takes no more is not this side's error.
async fn read(
    mut reader: impl AsyncRead + Unpin,
    mut name: String,
    no_unpack: bool,
    mut progress: Progress,
    sender: tokio::sync::mpsc::Sender<ImportRequest>,
) -> std::io::Result<()> {
    loop {
        let mut data = vec![0; CHUNK];
        let n = reader.read(&mut data).await?;
        data.truncate(n);
        progress.add(n);
        let message = ImportRequest {
            name: std::mem::take(&mut name),
            data,
            no_unpack,
            complete: n == 0,
        };
        if sender.send(message).await.is_err() || n == 0 {
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
    // Half an archive looks like a whole one: a file has its name when it is complete. What is no
    // file, a pipe or a device, is written as it is, and never removed.
    let is_file = |path: &Path| std::fs::metadata(path).map_or(true, |found| found.is_file());
    let whole = (output != Path::new("-") && is_file(output)).then(|| {
        let mut name = output.as_os_str().to_owned();
        name.push(".part");
        PathBuf::from(name)
    });
    let open = async |path: &Path| {
        let created = tokio::fs::File::create(path).await;
        created.with_context(|| format!("create {}", path.display()))
    };
    let mut writer: Box<dyn AsyncWrite + Unpin> = match &whole {
        Some(part) => Box::new(open(part).await?),
        None if output == Path::new("-") => Box::new(tokio::io::stdout()),
        None => Box::new(open(output).await?),
    };
    let mut progress = Progress::new("export", None);
    let write = async {
        while let Some(message) = messages.message().await.map_err(status)? {
            writer.write_all(&message.data).await?;
            progress.add(message.data.len());
        }
        writer.flush().await?;
        drop(writer);
        if let Some(part) = &whole {
            tokio::fs::rename(part, output).await?;
        }
        anyhow::Ok(())
    };
    let outcome = write
        .await
        .with_context(|| format!("write {}", output.display()));
    if let (Err(_), Some(part)) = (&outcome, &whole) {
        let _ = tokio::fs::remove_file(part).await;
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
        let row = |name: &str| println!("{name:<60} {:<20} {:>12}", short(&image.id), image.size);
        match (quiet, names.as_slice()) {
            (true, names) => names.iter().for_each(|name| println!("{name}")),
            // Its name has moved to another; it takes up its space all the same.
            (false, []) => row("<none>"),
            (false, names) => names.iter().for_each(|name| row(name)),
        }
    }
    Ok(())
}

/// `sha256:` and twelve digits.
fn short(id: &str) -> &str {
    id.get(..19).unwrap_or(id)
}
