//! The pull pipeline: resolve, pick the platform, fetch, unpack, record.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures::FutureExt;
use futures::future::BoxFuture;
use gantry_types::{Digest, ErrorKind, Kind};

use tracing::Instrument;

use crate::cancel::Cancel;
use crate::credentials::Credentials;
use crate::document::{self, Descriptor, Document};
use crate::install;
use crate::lease::Lease;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::registry::{Served, Session};
use crate::service::{Inner, LayersInUse, blocking};
use crate::{Error, Result, failpoint};

/// Deepest nesting of indexes, and most documents read for one image (GO-2026-6597: indexes that
/// list each other make a small tree of names into an endless walk).
const DEPTH_MAX: usize = 4;
const DOCUMENTS_MAX: usize = 32;

/// Locks of blobs under way.
#[derive(Default)]
pub struct BlobLocks(Mutex<HashMap<(Digest, String), Weak<BlobLock>>>);

type BlobLock = tokio::sync::Mutex<()>;

impl BlobLocks {
    /// For a look at a blob that is here and for what follows from it. Never held over anything that
    /// a registry may delay.
    pub fn of(&self, digest: &Digest) -> Arc<BlobLock> {
        self.transfer(digest, "")
    }

    /// For a blob's transfer, so that two pulls do not fetch it twice from one registry. Taken before
    /// [`BlobLocks::of`]. A registry that sends it slowly, or never, holds up no other's.
    pub fn transfer(&self, digest: &Digest, registry: &str) -> Arc<BlobLock> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (digest.clone(), registry.to_owned());
        if let Some(lock) = locks.get(&key).and_then(Weak::upgrade) {
            return lock;
        }
        locks.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::new(BlobLock::default());
        locks.insert(key, Arc::downgrade(&lock));
        lock
    }
}

/// What a pull brings anew though it is here.
#[derive(Default)]
pub struct Renew {
    /// Blobs that are to be here afterwards, also where their layer is unpacked.
    pub blobs: Vec<Digest>,
    /// Unpacked layers that are made anew, by snapshotter and chain id, once their blobs are here.
    pub chains: Vec<(&'static str, Digest)>,
    /// Who knows, at the moment of removal, which layers containers stand on; without it none does.
    pub in_use: Option<Arc<dyn LayersInUse>>,
}

/// Pulls an image as [`pull`] does, and makes some of it anew.
pub async fn renew(
    inner: &Arc<Inner>,
    reference: &Reference,
    credentials: &Credentials,
    cancel: &Cancel,
    renew: Renew,
) -> Result<String> {
    let also: Vec<_> = renew.chains.iter().map(|(name, _)| *name).collect();
    let watch = (cancel, &Progress::default());
    let fresh = &mut Vec::new();
    pull_image(inner, reference, credentials, watch, &also, fresh, renew)
        .await
        .map_err(|error| error.of_image(reference))
}

/// Pulls an image and returns its id. It is unpacked for the first snapshotter and for those that
/// `also` names. Told to end by `cancel`, it ends in order: what it has
/// fetched stays for the next try, half-unpacked layers do not.
pub async fn pull(
    inner: &Arc<Inner>,
    reference: &Reference,
    credentials: &Credentials,
    watch: (&Cancel, &Progress),
    also: &[&'static str],
) -> Result<String> {
    let mut fresh = Vec::new();
    let mut pull = async || {
        let none = Renew::default();
        let fresh = &mut fresh;
        pull_image(inner, reference, credentials, watch, also, fresh, none).await
    };
    let mut pulled = pull().await;
    if let Err(error @ Error::Gone { .. }) = &pulled {
        tracing::warn!(%error, %reference, "a pull begins anew");
        pulled = pull().await;
    }
    // What was fetched is for the next try: but a full disk is not the time to keep it, and an
    // image that is not sound will be none then.
    if let Err(error) = &pulled
        && matches!(
            error.kind(),
            ErrorKind::ResourceExhausted | ErrorKind::InvalidArgument
        )
        && let Err(error) = inner.drop_blobs(fresh).await
    {
        tracing::warn!(%error, "blobs of a failed pull stay until collection");
    }
    pulled.map_err(|error| error.of_image(reference))
}

/// For traces alone.
fn step(name: &'static str) -> tracing::Span {
    tracing::info_span!(target: "gantry::trace", "step", otel.name = name)
}

async fn pull_image(
    inner: &Arc<Inner>,
    reference: &Reference,
    credentials: &Credentials,
    (cancel, progress): (&Cancel, &Progress),
    also: &[&'static str],
    fresh: &mut Vec<Digest>,
    renew: Renew,
) -> Result<String> {
    let work = (inner.clone(), reference.clone(), credentials.clone());
    let ended = cancel.clone();
    let session = blocking("registry session", move || {
        let (inner, reference, credentials) = &work;
        inner
            .client
            .session(reference, credentials, &inner.budget, &ended)
    });
    let mut session = session.await?;
    session.progress = progress.clone();
    let session = Arc::new(session);
    let mut walk = Walk {
        inner,
        session: &session,
        lease: inner.leases.lease(),
        documents: 0,
        visited: Vec::new(),
        fresh,
    };
    let top = walk
        .top(reference)
        .instrument(step("pull: resolve"))
        .await?;
    failpoint::at("pull::after-resolve")?;
    let named = reference.with_digest(&top.digest);
    let manifest = walk.manifest(top).instrument(step("pull: manifest"));
    let manifest = manifest.await?;
    let Walk { mut lease, .. } = walk;
    if !renew.blobs.is_empty() || !renew.chains.is_empty() {
        make_anew(inner, &session, &manifest, &mut lease, renew, fresh).await?;
    }
    for (n, snapshotter) in inner.snapshotters.iter().enumerate() {
        if n == 0 || also.contains(&snapshotter.name()) {
            let session = Some(session.clone());
            let installed = install::install(inner, snapshotter, session, &manifest, lease, fresh);
            lease = installed.instrument(step("pull: layers")).await?;
        }
    }
    let tags = reference.tagged().into_iter().collect();
    failpoint::at("pull::before-record")?;
    let admitted = inner.admit(manifest, tags, vec![named], lease);
    let image = admitted.instrument(step("pull: record")).await?;
    inner.discard(&image).await;
    Ok(image.id.clone())
}

/// Fetches the blobs that are wanted, and then takes the unpacked layers away.
async fn make_anew(
    inner: &Arc<Inner>,
    session: &Session,
    manifest: &Digest,
    lease: &mut Lease,
    renew: Renew,
    fresh: &mut Vec<Digest>,
) -> Result<()> {
    let digest = manifest.clone();
    let work = inner.clone();
    let parsed = blocking("blob read", move || {
        let bytes = work.content.read(&digest, document::DOCUMENT_MAX)?;
        document::parse(digest.as_str(), "", &bytes.unwrap_or_default())
    });
    if let Document::Manifest(parsed) = parsed.await? {
        lease.hold([&parsed.config.digest]);
        remove_bad(inner, &renew, &parsed.config.digest).await?;
        install::fetch(inner, Some(session), &parsed.config, fresh).await?;
    }
    let (work, digest) = (inner.clone(), manifest.clone());
    let layers = blocking("blob read", move || install::layers_of(&work, &digest)).await?;
    for layer in layers {
        // A layer that is not compressed has its blob's digest for its chain id, and what is held
        // is not removed. The blob is the image's own: nobody collects it meanwhile.
        let digest = &layer.blob.digest;
        if !renew.chains.iter().any(|(_, chain)| chain == digest) {
            lease.hold([&layer.blob.digest]);
        }
        let anew = renew.chains.iter().any(|(_, chain)| *chain == layer.chain);
        if anew || renew.blobs.contains(&layer.blob.digest) {
            remove_bad(inner, &renew, &layer.blob.digest).await?;
            install::fetch(inner, Some(session), &layer.blob, fresh).await?;
        }
    }
    let work = inner.clone();
    blocking("layer removal", move || {
        for (name, chain) in &renew.chains {
            let Some(snapshotter) = work.snapshotters.named(name) else {
                continue;
            };
            let used = renew.in_use.as_ref().map(|in_use| in_use.chains(name));
            // A container that is being created holds it, and one that was made meanwhile has it.
            let removed = work.leases.unless_held(chain, || {
                let stays = match used {
                    Some(Some(used)) => used.contains(chain),
                    // Anybody may stand on it.
                    Some(None) => true,
                    None => false,
                };
                (!stays)
                    .then(|| snapshotter.remove_layer(chain))
                    .transpose()
            });
            if let Some(Some(())) = removed.transpose()? {
                work.usage().remove(&(*name, chain.clone()));
            }
        }
        Ok(())
    })
    .await
}

/// Takes a blob away that is to be brought anew, now that the registry is known to have the image.
async fn remove_bad(inner: &Arc<Inner>, renew: &Renew, digest: &Digest) -> Result<()> {
    if !renew.blobs.contains(digest) {
        return Ok(());
    }
    let lock = inner.blob_locks.of(digest);
    let _lock = lock.lock().await;
    let (work, digest) = (inner.clone(), digest.clone());
    blocking("blob removal", move || work.content.remove(&digest)).await
}

/// The way from what a reference names to the manifest for this node.
struct Walk<'a> {
    inner: &'a Arc<Inner>,
    session: &'a Session,
    lease: Lease,
    documents: usize,
    visited: Vec<Digest>,
    /// Blobs that were not here before.
    fresh: &'a mut Vec<Digest>,
}

impl Walk<'_> {
    /// What the reference names. The registry is always asked, so that credentials are checked
    /// and a tag that moved is seen; what is here already is not sent again.
    async fn top(&mut self, reference: &Reference) -> Result<Served> {
        let known = matches!(
            self.inner.catalog().find(&reference.to_string()),
            Ok(Some(_))
        );
        if known
            && let Some(digest) = self.session.head().await?
            && reference.digest().is_none_or(|wanted| *wanted == digest)
        {
            self.lease.hold([&digest]);
            if let Some(bytes) = self.local(&digest).await? {
                return Ok(Served {
                    bytes,
                    media_type: String::new(),
                    digest,
                });
            }
        }
        self.session.resolve().await
    }

    async fn local(&self, digest: &Digest) -> Result<Option<Vec<u8>>> {
        let (content, name) = (self.inner.content.clone(), digest.clone());
        let read = blocking("blob read", move || {
            content.read(&name, document::DOCUMENT_MAX)
        });
        match read.await {
            // Damaged on disk: as if it were not here, so that it is fetched anew. Unless somebody
            // has brought a good one meanwhile.
            Err(Error::Mismatch { .. } | Error::Limit { .. }) => {
                install::drop_unsound(self.inner, digest).await?;
                Ok(None)
            }
            read => read,
        }
    }

    /// Keeps a document in the content store and reads it.
    async fn keep(&mut self, served: &Served) -> Result<Document> {
        let parsed = document::parse(served.digest.as_str(), &served.media_type, &served.bytes)?;
        self.lease.hold([&served.digest]);
        let content = self.inner.content.clone();
        let (digest, bytes) = (served.digest.clone(), served.bytes.clone());
        // Two pulls may have it at once.
        let lock = self.inner.blob_locks.of(&served.digest);
        let _lock = lock.lock().await;
        let kept = blocking("blob write", move || {
            let new = content.size(&digest)?.is_none();
            Ok((new, content.keep(&digest, &bytes)))
        });
        let (new, kept) = kept.await?;
        if new {
            self.fresh.push(served.digest.clone());
        }
        kept.map(|()| parsed)
    }

    /// Digest of the manifest to use.
    async fn manifest(&mut self, top: Served) -> Result<Digest> {
        let what = top.digest.clone();
        let digest = match self.keep(&top).await? {
            Document::Manifest(manifest) => {
                self.runs(&manifest.config).await?.then_some(top.digest)
            }
            Document::Index(entries) => self.pick(entries, 1).await?,
        };
        digest.ok_or_else(|| Error::Invalid {
            what: format!("{what}"),
            reason: format!(
                "no image for platform {}",
                self.inner.options.platforms.name()
            ),
        })
    }

    /// The first entry that leads to an image that runs here.
    fn pick<'b>(
        &'b mut self,
        entries: Vec<Descriptor>,
        depth: usize,
    ) -> BoxFuture<'b, Result<Option<Digest>>> {
        async move {
            let too_deep = |what: &Digest, limit: usize, unit| Error::Limit {
                what: format!("index {what}"),
                limit: limit as u64,
                unit,
            };
            let platforms = self.inner.options.platforms.clone();
            for entry in platforms.candidates(&entries) {
                if self.visited.contains(&entry.digest) {
                    continue;
                }
                self.visited.push(entry.digest.clone());
                self.documents += 1;
                if self.documents > DOCUMENTS_MAX {
                    return Err(too_deep(&entry.digest, DOCUMENTS_MAX, "documents"));
                }
                let mut served = self.document(entry).await?;
                // What the index calls it counts, as if it had been served so.
                served.media_type = entry.media_type.clone();
                match self.keep(&served).await? {
                    Document::Manifest(manifest) => {
                        if entry.platform.is_some() || self.runs(&manifest.config).await? {
                            return Ok(Some(entry.digest.clone()));
                        }
                    }
                    Document::Index(entries) => {
                        if depth >= DEPTH_MAX {
                            return Err(too_deep(&entry.digest, DEPTH_MAX, "levels of indexes"));
                        }
                        if let Some(found) = self.pick(entries, depth + 1).await? {
                            return Ok(Some(found));
                        }
                    }
                }
            }
            Ok(None)
        }
        .boxed()
    }

    async fn document(&mut self, entry: &Descriptor) -> Result<Served> {
        if entry.size > document::DOCUMENT_MAX {
            let what = format!("manifest {}", entry.digest);
            return Err(Error::Limit {
                what,
                limit: document::DOCUMENT_MAX,
                unit: "bytes",
            });
        }
        self.lease.hold([&entry.digest]);
        let served = match self.local(&entry.digest).await? {
            Some(bytes) => Served {
                bytes,
                media_type: String::new(),
                digest: entry.digest.clone(),
            },
            None => self.session.manifest_by_digest(&entry.digest).await?,
        };
        if served.bytes.len() as u64 != entry.size {
            let reason = format!(
                "{} bytes came instead of {}",
                served.bytes.len(),
                entry.size
            );
            return Err(Error::mismatch(&entry.digest, reason));
        }
        Ok(served)
    }

    /// Whether the image of this configuration says it runs here.
    async fn runs(&mut self, config: &Descriptor) -> Result<bool> {
        self.lease.hold([&config.digest]);
        install::fetch(self.inner, Some(self.session), config, self.fresh).await?;
        let bytes = self.local(&config.digest).await?.unwrap_or_default();
        let parsed = document::parse_config(&config.digest, &bytes)?;
        Ok(self.inner.options.platforms.runs(&parsed.image.platform))
    }
}
