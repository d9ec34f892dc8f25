//! What there is outside of the records, and whose it is (`gantryctl check`).
//!
//! Every thing that is made for a pod or container has a name with its id in it, so that its owner
//! can be told without it. What lies in our directories under another name is the host's, and is
//! left alone.
//!
//! Pods come and go meanwhile. An id is random and never given twice, and it is known
//! ([`known::Known`]) from before the first thing of its object is made until the last one has
//! gone. So a thing belongs to nobody if it is there, *then* nobody knows its id, and *then* it is
//! still there: had it an owner, that one would have been known in between. Nobody can come to own
//! it later, which is what makes its removal safe at any time.

mod attachments;
mod cgroups;
mod disk;
pub(crate) mod known;
mod mounts;
mod repair;
mod shims;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use gantry_types::{ContainerId, PodId, ProcessRef};

use crate::pod::blocking;
use crate::{Context, Error};
use known::Known;

/// What a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ThingKind {
    Process,
    Mount,
    Netns,
    /// An address that the network's plugins have given out.
    Attachment,
    Cgroup,
    /// What an OCI runtime keeps of a container.
    Runtime,
    /// A run directory.
    Directory,
    Snapshot,
    /// Records that would not open, set aside at a start.
    Store,
}

/// Something that there is, outside of the records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thing {
    pub kind: ThingKind,
    /// Its path, pid or address.
    pub name: String,
    /// `None`: it belongs to nobody.
    pub owner: Option<String>,
    /// For people; of a repair, why it is not removed.
    pub remark: String,
    /// A repair has removed it.
    pub removed: bool,
}

/// Who a thing's name says that it belongs to.
#[derive(Clone, Debug)]
enum Claim {
    Pod(PodId),
    /// A pod's if anybody knows it; else this owner's.
    PodOrOf(PodId, String),
    Container(ContainerId),
    /// A holder's cgroup is named as a container's.
    Either(ContainerId),
    /// The pod whose id begins so.
    Shim(String),
    /// Somebody else, who is known.
    Of(String),
    Nobody,
}

/// A thing itself: what it is told by from others, and removed by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Place {
    Process(ProcessRef),
    Mount(PathBuf),
    Netns(PodId),
    Attachment(PodId, String),
    /// Below the mount point of each hierarchy.
    Cgroup(PathBuf),
    Runtime(String, ContainerId),
    PodDir(PodId),
    ContainerDir(ContainerId),
    Snapshot(String, ContainerId),
    Store(PathBuf),
    /// In our directories, and not ours.
    Directory(PathBuf),
}

impl Place {
    fn kind(&self) -> ThingKind {
        match self {
            Place::Process(_) => ThingKind::Process,
            Place::Mount(_) => ThingKind::Mount,
            Place::Netns(_) => ThingKind::Netns,
            Place::Attachment(..) => ThingKind::Attachment,
            Place::Cgroup(_) => ThingKind::Cgroup,
            Place::Runtime(..) => ThingKind::Runtime,
            Place::PodDir(_) | Place::ContainerDir(_) | Place::Directory(_) => ThingKind::Directory,
            Place::Snapshot(..) => ThingKind::Snapshot,
            Place::Store(_) => ThingKind::Store,
        }
    }
}

#[derive(Clone, Debug)]
struct Found {
    place: Place,
    name: String,
    claim: Claim,
    remark: String,
}

impl Found {
    fn new(place: Place, name: impl ToString, claim: Claim) -> Self {
        let (name, remark) = (name.to_string(), String::new());
        Self {
            place,
            name,
            claim,
            remark,
        }
    }

    /// What lies in our directories without a name that we give.
    fn of_host(place: Place, name: impl ToString) -> Self {
        let claim = Claim::Of("the host".to_owned());
        let remark = "no name of gantryd's: left alone".to_owned();
        Self {
            remark,
            ..Self::new(place, name, claim)
        }
    }
}

/// A thing with its owner.
struct Seen {
    found: Found,
    owner: Option<String>,
}

impl Seen {
    fn thing(self) -> Thing {
        Thing {
            kind: self.found.place.kind(),
            name: self.found.name,
            owner: self.owner,
            remark: self.found.remark,
            removed: false,
        }
    }
}

/// Everything there is; with `repair` what belongs to nobody is removed, or told why not.
pub(crate) async fn check(ctx: &Arc<Context>, repair: bool) -> Result<Vec<Thing>, Error> {
    // Two repairs would take each other's work for theirs.
    let _alone = ctx.auditing.lock().await;
    let seen = look(ctx).await?;
    if !repair {
        return Ok(seen.into_iter().map(Seen::thing).collect());
    }
    let orphans: Vec<Place> = seen
        .iter()
        .filter(|seen| seen.owner.is_none())
        .map(|seen| seen.found.place.clone())
        .collect();
    let failures = repair::remove(ctx, &orphans).await;
    let left = look(ctx).await?;
    let left: HashSet<_> = left.iter().map(|seen| &seen.found.place).collect();
    let things = seen.into_iter().map(|seen| {
        let place = seen.found.place.clone();
        let mut thing = seen.thing();
        if thing.owner.is_none() {
            thing.removed = !left.contains(&place);
            if let (false, Some(failure)) = (thing.removed, failures.get(&place)) {
                thing.remark.clone_from(failure);
            }
        }
        thing
    });
    Ok(things.collect())
}

/// Lists twice, and in between asks who is known: see the top of the module.
async fn look(ctx: &Arc<Context>) -> Result<Vec<Seen>, Error> {
    let ctx = Arc::clone(ctx);
    blocking(move || {
        let found = list(&ctx)?;
        let known = Known::new(&ctx)?;
        let owners: Vec<_> = found
            .iter()
            .map(|found| owner(&known, &found.claim))
            .collect();
        let after: HashSet<_> = match owners.iter().all(Option::is_some) {
            true => HashSet::new(),
            false => list(&ctx)?.into_iter().map(|found| found.place).collect(),
        };
        let seen = found.into_iter().zip(owners);
        let seen = seen.filter(|(found, owner)| owner.is_some() || after.contains(&found.place));
        let mut seen: Vec<_> = seen.map(|(found, owner)| Seen { found, owner }).collect();
        seen.sort_by_key(|seen| (seen.found.place.kind(), seen.found.name.clone()));
        Ok(seen)
    })
    .await
}

fn owner(known: &Known, claim: &Claim) -> Option<String> {
    match claim {
        Claim::Pod(id) => known.pod(id),
        Claim::Container(id) => known.container(id),
        Claim::Either(id) => known.container(id).or_else(|| {
            let pod = id.as_str().parse().ok()?;
            known.pod(&pod)
        }),
        Claim::Shim(half) => known.pod_beginning(half),
        Claim::PodOrOf(id, owner) => known.pod(id).or_else(|| Some(owner.clone())),
        Claim::Of(owner) => Some(owner.clone()),
        Claim::Nobody => None,
    }
}

fn list(ctx: &Context) -> Result<Vec<Found>, Error> {
    let mut all = cgroups::list(ctx)?;
    all.extend(shims::list(ctx)?);
    all.extend(mounts::list(ctx)?);
    all.extend(attachments::list(ctx)?);
    all.extend(disk::list(ctx)?);
    let mut places = HashSet::new();
    all.retain(|found| places.insert(found.place.clone()));
    Ok(all)
}
