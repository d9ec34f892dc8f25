//! From a manifest in the content store to unpacked layers: fetch, decompress, verify, stage,
//! commit.
//!
//! A layer is hashed, decompressed and unpacked while it is downloaded. What comes of it is in a
//! stage, which nobody sees, until the digest over all of the blob and the one over all of the
//! archive are right; then it is made durable, and only then it is a layer.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gantry_ports::Snapshotter;
use gantry_ports::snapshotter::{Stage, Whiteouts};
use gantry_types::Digest;
use rustix::io::Errno;
use tokio::task::JoinSet;

use crate::cancel::Cancel;
use crate::decompress;
use crate::document::{self, Config, Descriptor, Document, Manifest};
use crate::hash::{self, HashingReader};
use crate::lease::Lease;
use crate::partial::{Follow, Partial};
use crate::progress::Progress;
use crate::registry::{Followed, Session};
use crate::service::{Inner, blocking};
use crate::unpack::{self, Unpacked};
use crate::{Error, Result, failpoint, verify};

/// One layer of the image.
#[derive(Clone)]
pub struct Layer {
    pub blob: Descriptor,
    diff: Digest,
    pub chain: Digest,
    parent: Option<Digest>,
}

/// A layer in its stage. Dropped uncommitted, the stage is thrown away.
pub struct Staged {
    snapshotter: Arc<dyn Snapshotter>,
    stage: Option<Stage>,
    unpacked: Unpacked,
}

impl Staged {
    /// Root of what was unpacked.
    pub fn dir(&self) -> Option<&Path> {
        self.stage.as_ref().map(|stage| stage.dir.as_path())
    }
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

/// Brings configuration and layers of `manifest`, a blob of the content store, to this node, the
/// layers unpacked for `snapshotter`. Without a session only what is here already is used. Returns
/// the lease, which now holds all parts; blobs that are fetched are added to `fresh`, also on failure.
pub async fn install(
    inner: &Arc<Inner>,
    snapshotter: &Arc<dyn Snapshotter>,
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
    fetch(inner, session.as_deref(), &parsed.config, fresh).await?;
    let (content, digest) = (inner.content.clone(), parsed.config.digest.clone());
    let bytes = blocking("blob read", move || {
        content.read(&digest, document::DOCUMENT_MAX)
    });
    let config = document::parse_config(&parsed.config.digest, &bytes.await?.unwrap_or_default())?;
    let layers = layers(manifest, parsed, config)?;
    let chains: Vec<Digest> = layers.iter().map(|layer| layer.chain.clone()).collect();
    // Held before they are looked for: what is found then stays.
    lease.hold(&chains);
    lease.hold(layers.iter().map(|layer| &layer.blob.digest));
    // Of what is unpacked here another snapshotter may have nothing: it will ask for the blob.
    let others_ask = session.is_some() && inner.snapshotters.are_several();
    let work = (inner.clone(), snapshotter.clone(), layers.clone());
    let sorted = blocking("layer look-up", move || {
        let (inner, snapshotter, layers) = work;
        let (found, missing): (Vec<_>, Vec<_>) = layers
            .into_iter()
            .partition(|layer| snapshotter.has_layer(&layer.chain));
        let mut unkept = Vec::new();
        for layer in found.into_iter().filter(|_| others_ask) {
            if inner.content.size(&layer.blob.digest)?.is_none() {
                unkept.push(layer);
            }
        }
        Ok((unkept, missing))
    });
    let (unkept, missing) = sorted.await?;
    for layer in &unkept {
        fetch(inner, session.as_deref(), &layer.blob, fresh).await?;
    }
    fresh.extend(missing.iter().map(|layer| layer.blob.digest.clone()));
    let cancel = session
        .as_ref()
        .map(|session| session.cancel.clone())
        .unwrap_or_default();
    let progress = session
        .as_ref()
        .map(|session| session.progress.clone())
        .unwrap_or_default();
    progress.to_unpack(missing.len());
    let staged = fetch_and_stage(inner, snapshotter, session, missing, &progress).await?;
    let (work, snapshotter) = (inner.clone(), snapshotter.clone());
    blocking("layer commit", move || {
        cancel.check()?;
        commit(&work, &snapshotter, &chains, staged, &cancel, &progress)
    })
    .await?;
    Ok(lease)
}

fn layers(manifest: &Digest, parsed: Manifest, config: Config) -> Result<Vec<Layer>> {
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
    let layers = parsed.layers.into_iter().zip(config.diff_ids).enumerate();
    Ok(layers
        .map(|(n, (blob, diff))| Layer {
            blob,
            diff,
            chain: chains[n].clone(),
            parent: n.checked_sub(1).map(|below| chains[below].clone()),
        })
        .collect())
}

/// The layers of an image whose manifest and configuration are here, from base to top. Blocks.
pub fn layers_of(inner: &Inner, manifest: &Digest) -> Result<Vec<Layer>> {
    let read = |digest: &Digest| {
        let bytes = inner.content.read(digest, document::DOCUMENT_MAX)?;
        bytes.ok_or_else(|| Error::invalid(digest, "the blob is missing"))
    };
    let Document::Manifest(parsed) = document::parse(manifest.as_str(), "", &read(manifest)?)?
    else {
        return Err(Error::invalid(
            manifest,
            "an index where a manifest should be",
        ));
    };
    let config = document::parse_config(&parsed.config.digest, &read(&parsed.config.digest)?)?;
    layers(manifest, parsed, config)
}

/// Unpacks a layer that is here already once more, complete but for the commit. Blocks.
pub fn stage_again(
    inner: &Inner,
    snapshotter: &Arc<dyn Snapshotter>,
    below: &[Layer],
    layer: &Layer,
) -> Result<Staged> {
    let _turn = inner.budget.turns.take();
    let staged = stage_here(inner, snapshotter, layer, &Cancel::default())?;
    if snapshotter.whiteouts() == Whiteouts::Overlay
        && let Some(dir) = staged.dir()
    {
        let below: Vec<PathBuf> = below
            .iter()
            .rev()
            .filter_map(|layer| snapshotter.layer_dir(&layer.chain))
            .collect();
        unpack::settle(dir, &staged.unpacked, &below)?;
    }
    Ok(staged)
}

/// Takes the lock of the blob's transfer: another pull may be fetching it.
async fn lock(
    inner: &Inner,
    session: Option<&Session>,
    blob: &Descriptor,
) -> Result<tokio::sync::OwnedMutexGuard<()>> {
    let registry = session.map(Session::registry).unwrap_or_default();
    let lock = inner.blob_locks.transfer(&blob.digest, registry);
    let lock = lock.lock_owned();
    match session {
        None => Ok(lock.await),
        Some(session) => tokio::select! {
            held = lock => Ok(held),
            error = session.cancel.cancelled() => Err(error),
        },
    }
}

/// Whether a blob is here. Without a session it must be.
async fn is_here(inner: &Arc<Inner>, session: Option<&Session>, blob: &Descriptor) -> Result<bool> {
    let (content, digest) = (inner.content.clone(), blob.digest.clone());
    match blocking("blob look-up", move || content.size(&digest)).await? {
        Some(size) if size == blob.size => Ok(true),
        // Cut short by a power loss, say, or by somebody's hand.
        Some(_) if session.is_some() && drop_unsound(inner, &blob.digest).await? => Ok(false),
        Some(size) => Err(Error::mismatch(
            &blob.digest,
            format_args!(
                "it has {size} bytes and not {} as the manifest says",
                blob.size
            ),
        )),
        None if session.is_some() => Ok(false),
        None => Err(Error::invalid(&blob.digest, "the blob is missing")),
    }
}

/// Removes a blob that has not the digest that it is named by, so that it is fetched anew; whether
/// it was so.
pub async fn drop_unsound(inner: &Arc<Inner>, digest: &Digest) -> Result<bool> {
    let lock = inner.blob_locks.of(digest);
    let _lock = lock.lock().await;
    let (work, digest) = (inner.clone(), digest.clone());
    blocking("blob verification", move || {
        let sound = verify::is_sound(&work, &digest)?;
        if !sound {
            tracing::warn!(%digest, "a blob has another digest than its name: it is fetched anew");
            work.content.remove(&digest)?;
            work.content.purge()?;
        }
        Ok(!sound)
    })
    .await
}

/// Makes sure that a blob is here; it is added to `fresh` if it has to be fetched.
pub async fn fetch(
    inner: &Arc<Inner>,
    session: Option<&Session>,
    blob: &Descriptor,
    fresh: &mut Vec<Digest>,
) -> Result<()> {
    let _lock = lock(inner, session, blob).await?;
    let here = match is_here(inner, session, blob).await? {
        // A document is small, and all else stands on it.
        true if session.is_some() && blob.size <= document::DOCUMENT_MAX => {
            !drop_unsound(inner, &blob.digest).await?
        }
        here => here,
    };
    match session {
        Some(session) if !here => {
            fresh.push(blob.digest.clone());
            session.blob(blob, &inner.content, hash_only(session)).await
        }
        _ => Ok(()),
    }
}

fn hash_only(session: &Session) -> impl Fn(&Partial) -> Followed<()> + Send + Sync + 'static {
    let cancel = session.cancel.clone();
    move |partial| {
        let follow = Follow::new(partial, &cancel, None);
        follow_up(partial, follow, Ok(()), &cancel)
    }
}

/// Whether the blob that a reader made `value` of is whole.
fn follow_up<T>(
    partial: &Partial,
    follow: Follow<'_>,
    value: Result<T>,
    cancel: &Cancel,
) -> Followed<T> {
    match value {
        // A full disk, say: more of the blob would not help.
        Err(error) if is_local(&error) => {
            partial.refuse();
            Followed::Ended(error)
        }
        // Nobody asks any more what the rest of it is.
        Err(_) if cancel.is_cancelled() => Followed::Ended(Error::Cancelled),
        // What is wrong with the content is the host's fault or the image's: the digest tells.
        value => match follow.verify() {
            Ok(true) => Followed::Whole(value.map_err(Error::of_content)),
            Ok(false) => Followed::Other,
            Err(_) if cancel.is_cancelled() => Followed::Ended(Error::Cancelled),
            Err(source) => {
                Followed::Ended(Error::io(format_args!("blob {}", partial.digest), source))
            }
        },
    }
}

fn cancel_is(error: &Error) -> bool {
    matches!(error, Error::Cancelled)
}

/// Whether it is the node that fails, and neither a blob nor who serves it.
pub fn is_local(error: &Error) -> bool {
    match error {
        // A layer that expands too far is told by the same kind as a quota (EDQUOT), without number.
        Error::Io { source, .. } => {
            source.kind() == io::ErrorKind::StorageFull
                || source.raw_os_error() == Some(Errno::DQUOT.raw_os_error())
        }
        Error::Snapshotter(_) => true,
        _ => false,
    }
}

/// Fetches a layer and, where layers are staged alone, unpacks it while it comes.
async fn bring(
    inner: &Arc<Inner>,
    snapshotter: &Arc<dyn Snapshotter>,
    session: Option<&Session>,
    layer: &Layer,
    cancel: &Cancel,
) -> Result<Option<Staged>> {
    let alone = snapshotter.whiteouts() == Whiteouts::Overlay;
    let lock = lock(inner, session, &layer.blob).await?;
    let mut here = is_here(inner, session, &layer.blob).await?;
    if here && session.is_some() {
        // It may be here since long ago: what cannot be unpacked is fetched anew if that is its own
        // fault. Where the unpacking is later, it is looked at before.
        if alone {
            let (work, layer_too, cancel) = (inner.clone(), layer.clone(), cancel.clone());
            let snapshotter = snapshotter.clone();
            let staged = blocking("layer unpack", move || {
                let _turn = work.budget.turns.take();
                stage_here(&work, &snapshotter, &layer_too, &cancel).map(Some)
            });
            match staged.await {
                Err(error) if is_local(&error) || cancel_is(&error) => return Err(error),
                Err(error) if !drop_unsound(inner, &layer.blob.digest).await? => return Err(error),
                Err(_) => here = false,
                staged => return staged,
            }
        } else {
            here = !drop_unsound(inner, &layer.blob.digest).await?;
        }
    }
    match session {
        Some(session) if !here && alone => {
            let (work, layer_too, cancel) = (inner.clone(), layer.clone(), cancel.clone());
            let snapshotter = snapshotter.clone();
            let follow = move |partial: &Partial| {
                let mut follow = Follow::new(partial, &cancel, Some(&work.budget.turns));
                let staged = stage(&work, &snapshotter, &layer_too, &mut follow, &cancel);
                follow_up(partial, follow, staged, &cancel)
            };
            session
                .blob(&layer.blob, &inner.content, follow)
                .await
                .map(Some)
        }
        Some(session) if !here => {
            session
                .blob(&layer.blob, &inner.content, hash_only(session))
                .await?;
            Ok(None)
        }
        _ if alone => {
            // Nobody needs to wait for the unpacking.
            drop(lock);
            let (inner, layer, cancel) = (inner.clone(), layer.clone(), cancel.clone());
            let snapshotter = snapshotter.clone();
            blocking("layer unpack", move || {
                let _turn = inner.budget.turns.take();
                stage_here(&inner, &snapshotter, &layer, &cancel).map(Some)
            })
            .await
        }
        _ => Ok(None),
    }
}

/// Brings all layers, a few at once; those that cannot be staged alone are only fetched.
async fn fetch_and_stage(
    inner: &Arc<Inner>,
    snapshotter: &Arc<dyn Snapshotter>,
    session: Option<Arc<Session>>,
    missing: Vec<Layer>,
    progress: &Progress,
) -> Result<Vec<(Layer, Option<Staged>)>> {
    let cancel = session
        .as_ref()
        .map(|session| session.cancel.clone())
        .unwrap_or_default();
    // A place is kept until the layer is unpacked: what a pull holds in memory does not grow with
    // the number of its layers.
    let places = Arc::new(tokio::sync::Semaphore::new(inner.layers_at_once));
    let mut tasks = JoinSet::new();
    for (n, layer) in missing.into_iter().enumerate() {
        let (inner, session) = (inner.clone(), session.clone());
        let snapshotter = snapshotter.clone();
        let (places, cancel) = (places.clone(), cancel.clone());
        tasks.spawn(async move {
            let _place = places.acquire_owned().await;
            let brought = match cancel.check() {
                Ok(()) => bring(&inner, &snapshotter, session.as_deref(), &layer, &cancel).await,
                Err(error) => Err(error),
            };
            (n, brought.map(|staged| (layer, staged)))
        });
    }
    let mut staged: Vec<(usize, (Layer, Option<Staged>))> = Vec::new();
    let mut failed = None;
    while let Some(done) = tasks.join_next().await {
        let (n, result) = match done {
            Ok(done) => done,
            Err(_) => (0, Err(Error::Worker { what: "layer task" })),
        };
        match result {
            Ok(layer) => {
                if layer.1.is_some() {
                    progress.unpacked();
                }
                staged.push((n, layer));
            }
            Err(error) if failed.is_none() => {
                // Downloads and unpacking threads are told, and waited for, so that a pull that
                // has ended leaves nobody writing.
                failed = Some(error);
                cancel.cancel();
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

/// Unpacks a layer whose blob is here.
fn stage_here(
    inner: &Inner,
    snapshotter: &Arc<dyn Snapshotter>,
    layer: &Layer,
    cancel: &Cancel,
) -> Result<Staged> {
    let blob = inner.content.open_blob(&layer.blob.digest)?;
    match stage(inner, snapshotter, layer, blob, cancel) {
        // A read that was ended so says nothing of the blob.
        Err(error) if cancel.is_cancelled() && !is_local(&error) => Err(Error::Cancelled),
        staged => staged,
    }
}

/// Unpacks one layer into a stage of its own and verifies its diff id.
fn stage(
    inner: &Inner,
    snapshotter: &Arc<dyn Snapshotter>,
    layer: &Layer,
    blob: impl Read,
    cancel: &Cancel,
) -> Result<Staged> {
    let stage = snapshotter.stage(&layer.chain, layer.parent.as_ref())?;
    let dir = stage.dir.clone();
    let mut staged = Staged {
        snapshotter: snapshotter.clone(),
        stage: Some(stage),
        unpacked: Unpacked::default(),
    };
    let source = Stoppable {
        inner: blob,
        cancel: cancel.clone(),
        begun: false,
        tripped: false,
    };
    let what = |e: io::Error| Error::io(format_args!("layer {}", layer.blob.digest), e);
    let stream = decompress::open(source, inner.options.limits.expansion).map_err(what)?;
    let mut stream = HashingReader::new(stream, layer.diff.algorithm());
    staged.unpacked = unpack::apply(
        &mut stream,
        &dir,
        snapshotter.whiteouts(),
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
fn commit(
    inner: &Inner,
    snapshotter: &Arc<dyn Snapshotter>,
    chains: &[Digest],
    staged: Vec<(Layer, Option<Staged>)>,
    cancel: &Cancel,
    progress: &Progress,
) -> Result<()> {
    let mut ready: Vec<(Stage, gantry_ports::snapshotter::Usage)> = Vec::new();
    let mut waiting: Vec<Staged> = Vec::new();
    for (layer, staged) in staged {
        let mut staged = match staged {
            Some(staged) => staged,
            // The stage starts from its parent, which must be committed by now.
            None => {
                let _turn = inner.budget.turns.take();
                let mut staged = stage_here(inner, snapshotter, &layer, cancel)?;
                let usage = staged.unpacked.usage;
                if let Some(stage) = staged.stage.take() {
                    let occupied = snapshotter.commit(vec![(stage, usage)])?;
                    inner.count(snapshotter, occupied);
                }
                progress.unpacked();
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
    failpoint::at("pull::before-sync")?;
    for mut staged in waiting {
        let usage = staged.unpacked.usage;
        ready.extend(staged.stage.take().map(|stage| (stage, usage)));
    }
    let occupied = snapshotter.commit(ready)?;
    inner.count(snapshotter, occupied);
    failpoint::at("pull::after-layers")
}

/// Ends a read that nobody waits for any more.
struct Stoppable<R> {
    inner: R,
    cancel: Cancel,
    begun: bool,
    tripped: bool,
}

impl<R: Read> Read for Stoppable<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::other(Error::Cancelled.to_string()));
        }
        if !std::mem::replace(&mut self.begun, true) {
            return self.inner.read(buffer);
        }
        // Of a layer that is read at once, at its end.
        if !std::mem::replace(&mut self.tripped, true) {
            gantry_sys::failpoint::at("pull::mid-unpack")?;
        }
        self.inner.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(source: io::Error) -> Error {
        Error::io("x", source)
    }

    #[test]
    fn a_full_disk_and_a_quota_are_the_nodes_own() {
        for code in [Errno::NOSPC, Errno::DQUOT] {
            let error = of(io::Error::from_raw_os_error(code.raw_os_error()));
            assert!(is_local(&error), "{error}");
            assert_eq!(
                gantry_types::Kind::kind(&error),
                gantry_types::ErrorKind::ResourceExhausted
            );
        }
        // What a layer expands to is the layer's.
        let bomb = io::Error::new(io::ErrorKind::QuotaExceeded, "expands");
        assert!(!is_local(&of(bomb)) && !is_local(&Error::Cancelled));
    }

    #[test]
    fn a_cancelled_reader_hashes_no_rest() {
        let dir = tempfile::tempdir().unwrap();
        let digest = hash::sha256(b"hello");
        let partial = Partial::open(dir.path().join("x"), &digest, 5).unwrap();
        partial.write_at(0, &["hello".into()]).unwrap();
        let cancel = Cancel::default();
        let end = |value: Result<()>| {
            let follow = Follow::new(&partial, &cancel, None);
            follow_up(&partial, follow, value, &cancel)
        };
        let ended = || of(io::Error::other("the pull was given up"));
        assert!(matches!(end(Err(ended())), Followed::Whole(Err(_))));
        cancel.cancel();
        for value in [Err(ended()), Ok(())] {
            assert!(matches!(end(value), Followed::Ended(Error::Cancelled)));
        }
    }
}
