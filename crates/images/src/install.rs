//! From a manifest in the content store to unpacked layers: fetch, decompress, verify, stage,
//! commit.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gantry_ports::Snapshotter;
use gantry_ports::snapshotter::{Stage, Whiteouts};
use gantry_types::Digest;
use tokio::task::JoinSet;

use crate::decompress;
use crate::document::{self, Descriptor, Document};
use crate::hash::{self, HashingReader};
use crate::lease::Lease;
use crate::registry::Session;
use crate::service::{Inner, blocking};
use crate::unpack::{self, Unpacked};
use crate::{Error, Result};

/// One layer of the image.
#[derive(Clone)]
struct Layer {
    blob: Descriptor,
    diff: Digest,
    chain: Digest,
    parent: Option<Digest>,
}

/// A layer in its stage. Dropped uncommitted, the stage is thrown away.
struct Staged {
    snapshotter: Arc<dyn Snapshotter>,
    stage: Option<Stage>,
    unpacked: Unpacked,
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(stage) = self.stage.take()
            && let Err(error) = self.snapshotter.abort(stage)
        {
            tracing::warn!(%error, "a stage stays until the next start");
        }
    }
}

/// Brings configuration and layers of `manifest`, a blob of the content store, to this node.
/// Without a session only what is here already is used. Returns the lease, which now holds all
/// parts; blobs that were fetched are added to `fresh`, also on failure.
pub async fn install(
    inner: &Arc<Inner>,
    session: Option<Arc<Session>>,
    manifest: &Digest,
    mut lease: Lease,
    fresh: &mut Vec<Digest>,
) -> Result<Lease> {
    let (content, digest) = (inner.content.clone(), manifest.clone());
    let bytes = blocking("blob read", move || {
        content.read(&digest, document::DOCUMENT_MAX)
    });
    let bytes = bytes.await?.unwrap_or_default();
    let Document::Manifest(parsed) = document::parse(manifest.as_str(), "", &bytes)? else {
        return Err(Error::invalid(
            manifest,
            "an index where a manifest should be",
        ));
    };
    lease.hold([&parsed.config.digest]);
    if fetch(inner, session.as_deref(), &parsed.config).await? {
        fresh.push(parsed.config.digest.clone());
    }
    let (content, digest) = (inner.content.clone(), parsed.config.digest.clone());
    let bytes = blocking("blob read", move || {
        content.read(&digest, document::DOCUMENT_MAX)
    });
    let config = document::parse_config(&parsed.config.digest, &bytes.await?.unwrap_or_default())?;
    if config.diff_ids.len() != parsed.layers.len() {
        return Err(Error::invalid(
            format_args!("manifest {manifest}"),
            format_args!(
                "{} layers for {} diff ids",
                parsed.layers.len(),
                config.diff_ids.len()
            ),
        ));
    }
    let chains = hash::chain_ids(&config.diff_ids);
    // Held before they are looked for: what is found then stays.
    lease.hold(&chains);
    lease.hold(parsed.layers.iter().map(|layer| &layer.digest));
    let layers: Vec<Layer> = parsed
        .layers
        .into_iter()
        .zip(config.diff_ids)
        .enumerate()
        .map(|(n, (blob, diff))| Layer {
            blob,
            diff,
            chain: chains[n].clone(),
            parent: n.checked_sub(1).map(|below| chains[below].clone()),
        })
        .collect();
    let work = (inner.snapshotter.clone(), layers.clone());
    let missing = blocking("layer look-up", move || {
        Ok(work
            .1
            .into_iter()
            .filter(|layer| !work.0.has_layer(&layer.chain))
            .collect::<Vec<_>>())
    });
    let missing = missing.await?;
    let staged = fetch_and_stage(inner, session, missing, fresh).await?;
    let (work, chains) = (inner.clone(), chains);
    blocking("layer commit", move || commit(&work, &chains, staged)).await?;
    Ok(lease)
}

/// Makes sure that a blob is here; whether it had to be fetched.
pub async fn fetch(inner: &Inner, session: Option<&Session>, blob: &Descriptor) -> Result<bool> {
    let lock = inner.blob_locks.of(&blob.digest);
    // Another pull may be fetching it.
    let _lock = match session {
        None => lock.lock().await,
        Some(session) => tokio::select! {
            held = lock.lock() => held,
            error = session.cancelled() => return Err(error),
        },
    };
    let (content, digest) = (inner.content.clone(), blob.digest.clone());
    let size = blocking("blob look-up", move || content.size(&digest)).await?;
    match (size, session) {
        (Some(size), _) if size == blob.size => Ok(false),
        (Some(size), _) => Err(Error::mismatch(
            &blob.digest,
            format_args!(
                "it has {size} bytes and not {} as the manifest says",
                blob.size
            ),
        )),
        (None, Some(session)) => {
            session
                .blob(&blob.digest, blob.size, &inner.content)
                .await?;
            Ok(true)
        }
        (None, None) => Err(Error::invalid(&blob.digest, "the blob is missing")),
    }
}

/// Fetches all layers and, where layers are staged alone, unpacks each as soon as it is here.
async fn fetch_and_stage(
    inner: &Arc<Inner>,
    session: Option<Arc<Session>>,
    missing: Vec<Layer>,
    fresh: &mut Vec<Digest>,
) -> Result<Vec<(Layer, Option<Staged>)>> {
    let stop = Arc::new(AtomicBool::new(false));
    let alone = inner.snapshotter.whiteouts() == Whiteouts::Overlay;
    let slots = Arc::new(tokio::sync::Semaphore::new(inner.downloads));
    let mut tasks = JoinSet::new();
    for (n, layer) in missing.into_iter().enumerate() {
        let (inner, session) = (inner.clone(), session.clone());
        let (slots, stop) = (slots.clone(), stop.clone());
        tasks.spawn(async move {
            let slot = slots.acquire_owned().await;
            let fetched = fetch(&inner, session.as_deref(), &layer.blob).await;
            drop(slot);
            let fetched = match fetched {
                Ok(fetched) => fetched.then(|| layer.blob.digest.clone()),
                Err(error) => return (n, None, Err(error)),
            };
            if !alone {
                return (n, fetched, Ok((layer, None)));
            }
            let permit = inner.unpacks.clone().acquire_owned().await;
            let done = blocking("layer unpack", move || {
                let staged = stage(&inner, &layer, &stop)?;
                drop(permit);
                Ok((layer, Some(staged)))
            });
            (n, fetched, done.await)
        });
    }
    let mut staged: Vec<(usize, (Layer, Option<Staged>))> = Vec::new();
    let mut failed = None;
    while let Some(done) = tasks.join_next().await {
        let (n, fetched, result) = match done {
            Ok(done) => done,
            Err(_) => (0, None, Err(Error::Worker { what: "layer task" })),
        };
        fresh.extend(fetched);
        match result {
            Ok(layer) => staged.push((n, layer)),
            Err(error) if failed.is_none() => {
                // Downloads end here; unpacking threads see the flag and are waited for, so that
                // a pull that has ended leaves nobody writing.
                failed = Some(error);
                stop.store(true, Ordering::Relaxed);
                if let Some(session) = &session {
                    session.cancel();
                }
            }
            Err(_) => {}
        }
    }
    match failed {
        Some(error) => {
            let _ = blocking("stage removal", move || {
                drop(staged);
                Ok(())
            })
            .await;
            Err(error)
        }
        None => {
            staged.sort_by_key(|(n, _)| *n);
            Ok(staged.into_iter().map(|(_, layer)| layer).collect())
        }
    }
}

/// Unpacks one layer into a stage of its own and verifies its diff id.
fn stage(inner: &Inner, layer: &Layer, stop: &Arc<AtomicBool>) -> Result<Staged> {
    let mut staged = Staged {
        snapshotter: inner.snapshotter.clone(),
        stage: Some(
            inner
                .snapshotter
                .stage(&layer.chain, layer.parent.as_ref())?,
        ),
        unpacked: Unpacked::default(),
    };
    let dir = staged
        .stage
        .as_ref()
        .map(|stage| stage.dir.clone())
        .unwrap_or_default();
    let file = inner.content.open_blob(&layer.blob.digest)?;
    let source = Stoppable {
        inner: file,
        stop: stop.clone(),
    };
    let what = |e: io::Error| Error::io(format_args!("layer {}", layer.blob.digest), e);
    let stream = decompress::open(source, inner.options.limits.expansion).map_err(what)?;
    let mut stream = HashingReader::new(stream, layer.diff.algorithm());
    staged.unpacked = unpack::apply(
        &mut stream,
        &dir,
        inner.snapshotter.whiteouts(),
        &inner.options.limits,
    )
    .map_err(|error| in_layer(error, &layer.blob.digest))?;
    // What follows the archive's end belongs to the diff id too.
    io::copy(&mut stream, &mut io::sink()).map_err(what)?;
    if !stream.hasher.is(&layer.diff) {
        return Err(Error::mismatch(
            format_args!("layer {}", layer.blob.digest),
            format_args!("unpacked it is not {} as the image config says", layer.diff),
        ));
    }
    Ok(staged)
}

/// Puts the layer's name to an error about one of its entries.
fn in_layer(error: Error, layer: &Digest) -> Error {
    match error {
        Error::Io { what, source } => Error::Io {
            what: format!("layer {layer}: {what}"),
            source,
        },
        Error::Invalid { what, reason } => Error::Invalid {
            what: format!("layer {layer}: {what}"),
            reason,
        },
        Error::Limit { what, limit, unit } => Error::Limit {
            what: format!("layer {layer}: {what}"),
            limit,
            unit,
        },
        other => other,
    }
}

/// Completes staged layers from base to top and makes them durable and visible.
fn commit(inner: &Inner, chains: &[Digest], staged: Vec<(Layer, Option<Staged>)>) -> Result<()> {
    let snapshotter = &inner.snapshotter;
    let mut ready: Vec<(Stage, gantry_ports::snapshotter::Usage)> = Vec::new();
    let mut waiting: Vec<Staged> = Vec::new();
    let never = Arc::new(AtomicBool::new(false));
    for (layer, staged) in staged {
        let mut staged = match staged {
            Some(staged) => staged,
            // The stage starts from its parent, which must be committed by now.
            None => {
                let mut staged = stage(inner, &layer, &never)?;
                let usage = staged.unpacked.usage;
                if let Some(stage) = staged.stage.take() {
                    let occupied = snapshotter.commit(vec![(stage, usage)])?;
                    inner.usage().extend(occupied);
                }
                continue;
            }
        };
        let position = chains
            .iter()
            .position(|chain| *chain == layer.chain)
            .unwrap_or(0);
        let tree = |chain: &Digest| -> Option<PathBuf> {
            let own = waiting.iter().filter_map(|staged| staged.stage.as_ref());
            own.into_iter()
                .find(|stage| stage.chain == *chain)
                .map(|stage| stage.dir.clone())
                .or_else(|| snapshotter.layer_dir(chain))
        };
        let below: Vec<PathBuf> = chains[..position].iter().rev().filter_map(tree).collect();
        if let Some(stage) = &staged.stage {
            unpack::settle(&stage.dir, &staged.unpacked, &below)?;
        }
        staged.unpacked.implicit.clear();
        waiting.push(staged);
    }
    for mut staged in waiting {
        let usage = staged.unpacked.usage;
        ready.extend(staged.stage.take().map(|stage| (stage, usage)));
    }
    let occupied = snapshotter.commit(ready)?;
    inner.usage().extend(occupied);
    Ok(())
}

/// Ends a read that nobody waits for any more.
struct Stoppable<R> {
    inner: R,
    stop: Arc<AtomicBool>,
}

impl<R: Read> Read for Stoppable<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("the pull has failed elsewhere"));
        }
        self.inner.read(buffer)
    }
}
