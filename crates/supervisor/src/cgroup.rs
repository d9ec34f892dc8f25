//! Where the cgroups of a pod lie, under both drivers and both versions.

use std::path::{Path, PathBuf};

use gantry_types::{ContainerId, PodId};

use crate::Error;

/// Who makes cgroups: we and the OCI runtime by mkdir, or systemd on the runtime's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    Cgroupfs,
    Systemd,
}

/// The cgroup hierarchies of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hierarchy {
    /// The one mount point of cgroup v2.
    V2(PathBuf),
    /// Mount points of the v1 controllers that we use.
    V1 {
        memory: PathBuf,
        pids: Option<PathBuf>,
        others: Vec<PathBuf>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroups {
    pub driver: Driver,
    pub hierarchy: Hierarchy,
    /// Every mount of a hierarchy: an OCI runtime makes a container's cgroup in all of them.
    pub mounts: Vec<HierarchyMount>,
    /// Parent of pods whose request names none.
    pub default_parent: String,
    /// Parent of the shims' cgroups: a path, or a slice with the systemd driver.
    pub shims: String,
}

/// Where one hierarchy is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HierarchyMount {
    pub dir: PathBuf,
    pub v2: bool,
    /// Mount options, among which v1 names the hierarchy's controllers.
    options: Vec<String>,
}

impl HierarchyMount {
    /// Whether it is the v1 hierarchy of this controller.
    pub fn has(&self, controller: &str) -> bool {
        !self.v2 && self.options.iter().any(|option| option == controller)
    }
}

/// What the name of a cgroup of ours says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnCgroup {
    /// Of a container, or of the holder of a pod.
    Object(ContainerId),
    /// Of the shim of the pod whose id begins so.
    Shim(String),
}

/// Where one container's cgroup is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// `linux.cgroupsPath` of the OCI spec.
    pub oci_path: String,
    /// Directory whose cgroup.procs names the container's processes.
    pub dir: PathBuf,
    /// File with the OOM kill counter.
    pub oom_file: PathBuf,
}

impl Cgroups {
    /// Reads the hierarchies from `/proc/self/mounts` text.
    pub fn detect_hierarchy(mounts: &str) -> Result<Hierarchy, Error> {
        let mut unified = None;
        let mut memory = None;
        let mut pids = None;
        let mut others = Vec::new();
        for mount in Self::mounts(mounts) {
            if mount.v2 {
                unified = unified.or(Some(mount.dir));
            } else if mount.has("memory") {
                memory = Some(mount.dir);
            } else if mount.has("pids") {
                pids = Some(mount.dir);
            } else if mount.has("cpu") || mount.has("cpuacct") {
                others.push(mount.dir);
            }
        }
        // Hybrid: controllers are on v1 and the v2 mount is empty-handed, so v1 decides.
        match (memory, unified) {
            (Some(memory), _) => Ok(Hierarchy::V1 {
                memory,
                pids,
                others,
            }),
            (None, Some(dir)) => Ok(Hierarchy::V2(dir)),
            (None, None) => Err(Error::internal(
                "find cgroups",
                "no cgroup file system is mounted",
            )),
        }
    }

    /// All hierarchies that are mounted, from `/proc/self/mounts` text.
    pub fn mounts(mounts: &str) -> Vec<HierarchyMount> {
        let lines = mounts.lines().filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let dir = crate::mountinfo::unescape(fields.next()?);
            let kind = fields.next()?;
            if !matches!(kind, "cgroup" | "cgroup2") {
                return None;
            }
            let options = fields.next()?.split(',').map(str::to_owned);
            Some(HierarchyMount {
                dir: dir.into(),
                v2: kind == "cgroup2",
                options: options.collect(),
            })
        });
        lines.collect()
    }

    /// Where a cgroup's files of a controller are, from where it lies in the hierarchy that
    /// [`Place::dir`] is of. `None` if the controller is in no hierarchy, or `dir` in none.
    pub fn controller(&self, name: &str, dir: &Path) -> Option<PathBuf> {
        match &self.hierarchy {
            Hierarchy::V2(_) => Some(dir.to_owned()),
            Hierarchy::V1 { memory, .. } => {
                let relative = dir.strip_prefix(memory).ok()?;
                let mount = self.mounts.iter().find(|mount| mount.has(name))?;
                Some(mount.dir.join(relative))
            }
        }
    }

    /// What a cgroup is called in its hierarchy, as /proc/PID/cgroup has it; empty for a directory
    /// in none.
    pub fn name(&self, dir: &Path) -> String {
        let (Hierarchy::V2(base) | Hierarchy::V1 { memory: base, .. }) = &self.hierarchy;
        let relative = dir.strip_prefix(base);
        relative.map_or_else(|_| String::new(), |path| format!("/{}", path.display()))
    }

    /// A checked parent's own cgroup, in the hierarchy that [`Place::dir`] is of.
    pub fn parent_dir(&self, parent: &str) -> Result<PathBuf, Error> {
        let relative = match self.driver {
            Driver::Cgroupfs => PathBuf::from(parent.trim_matches('/')),
            Driver::Systemd => slice_path(last(parent))?,
        };
        let (Hierarchy::V2(base) | Hierarchy::V1 { memory: base, .. }) = &self.hierarchy;
        Ok(base.join(relative))
    }

    /// Whether a checked parent is the cgroup of one pod alone, by the name that the kubelet gives
    /// it (`pod<uid>`, `...-pod<uid with _ for ->.slice`). Any other may be shared: what it counts
    /// is then not the pod's.
    pub fn is_pods_own(&self, parent: &str, uid: &str) -> bool {
        if uid.is_empty() {
            return false;
        }
        let name = last(parent);
        match self.driver {
            Driver::Cgroupfs => name.strip_prefix("pod") == Some(uid),
            Driver::Systemd => {
                let own = format!("pod{}.slice", uid.replace('-', "_"));
                name == own || name.ends_with(&format!("-{own}"))
            }
        }
    }

    /// A container's cgroup in every hierarchy, from its [`Place::dir`].
    pub fn everywhere(&self, dir: &Path) -> Vec<PathBuf> {
        let (Hierarchy::V2(base) | Hierarchy::V1 { memory: base, .. }) = &self.hierarchy;
        match dir.strip_prefix(base) {
            // Nothing is below a mount itself but what is everybody's.
            Ok(relative) if relative.components().next().is_some() => {
                let dirs = self.mounts.iter().map(|mount| mount.dir.join(relative));
                dirs.collect()
            }
            Ok(_) | Err(_) => Vec::new(),
        }
    }

    /// The parent of pods that name none, and that of shims, below the mount point of a hierarchy.
    pub fn own_parents(&self) -> Result<[PathBuf; 2], Error> {
        let path = |parent: &str| match self.driver {
            Driver::Cgroupfs => Ok(PathBuf::from(parent.trim_matches('/'))),
            Driver::Systemd => slice_path(last(parent)),
        };
        Ok([path(&self.default_parent)?, path(&self.shims)?])
    }

    /// What a cgroup's name says; `None` for one that is not of ours.
    pub fn own(&self, name: &str) -> Option<OwnCgroup> {
        let name = match self.driver {
            Driver::Cgroupfs => name,
            Driver::Systemd => {
                let name = name.strip_prefix(SCOPE_PREFIX)?.strip_prefix('-')?;
                let name = name.strip_suffix(".scope")?;
                name.strip_prefix("shim-").unwrap_or(name)
            }
        };
        // What is half an id is one when it is there twice.
        match (name.parse(), name.repeat(2).parse::<PodId>()) {
            (Ok(id), _) => Some(OwnCgroup::Object(id)),
            (Err(_), Ok(_)) => Some(OwnCgroup::Shim(name.to_owned())),
            (Err(_), Err(_)) => None,
        }
    }

    pub fn is_v2(&self) -> bool {
        matches!(self.hierarchy, Hierarchy::V2(_))
    }

    /// The parent as asked for, or the default; checked, because it becomes a path.
    pub fn parent<'a>(&'a self, asked: &'a str) -> Result<&'a str, Error> {
        let parent = if asked.is_empty() {
            &self.default_parent
        } else {
            asked
        };
        let invalid = |reason: &str| Error::Invalid {
            field: "linux.cgroup_parent".to_owned(),
            reason: format!("{parent:?} {reason}"),
        };
        if parent.split('/').any(|part| part == ".." || part == ".") || parent.contains('\0') {
            return Err(invalid("has a component . or .."));
        }
        match self.driver {
            Driver::Cgroupfs if parent.trim_matches('/').is_empty() => {
                Err(invalid("is the root cgroup"))
            }
            Driver::Systemd if !last(parent).ends_with(".slice") => Err(invalid(
                "does not end with a slice, as the systemd driver needs",
            )),
            Driver::Cgroupfs | Driver::Systemd => Ok(parent),
        }
    }

    /// The cgroup of a container below a checked parent.
    pub fn container(&self, parent: &str, id: &ContainerId) -> Result<Place, Error> {
        let (oci_path, relative) = match self.driver {
            Driver::Cgroupfs => {
                let path = Path::new(parent.trim_matches('/')).join(id.as_str());
                (format!("/{}", path.display()), path)
            }
            Driver::Systemd => {
                let slice = last(parent);
                let path = slice_path(slice)?.join(scope(id.as_str()));
                (format!("{slice}:{SCOPE_PREFIX}:{id}"), path)
            }
        };
        Ok(match &self.hierarchy {
            Hierarchy::V2(mount) => {
                let dir = mount.join(&relative);
                Place {
                    oci_path,
                    oom_file: dir.join("memory.events"),
                    dir,
                }
            }
            Hierarchy::V1 { memory, .. } => {
                let dir = memory.join(&relative);
                Place {
                    oci_path,
                    oom_file: dir.join("memory.oom_control"),
                    dir,
                }
            }
        })
    }

    /// The holder's leaf cgroup below a checked parent, one directory per hierarchy. cAdvisor and
    /// node agents find the pod's network through it.
    pub fn holder(&self, parent: &str, id: &PodId) -> Result<Vec<PathBuf>, Error> {
        let relative = match self.driver {
            Driver::Cgroupfs => Path::new(parent.trim_matches('/')).join(id.as_str()),
            Driver::Systemd => slice_path(last(parent))?.join(scope(id.as_str())),
        };
        Ok(match &self.hierarchy {
            Hierarchy::V2(mount) => vec![mount.join(relative)],
            Hierarchy::V1 {
                memory,
                pids,
                others,
            } => std::iter::once(memory)
                .chain(pids)
                .chain(others)
                .map(|mount| mount.join(&relative))
                .collect(),
        })
    }

    /// The cgroup of a pod's shim, one directory per hierarchy: outside the pod's, whose limits
    /// and end must not reach it. On v1 in the hierarchies where a limit on the daemon would.
    pub fn shim(&self, id: &PodId) -> Result<Vec<PathBuf>, Error> {
        let relative = match self.driver {
            Driver::Cgroupfs => Path::new(self.shims.trim_matches('/')).join(shim_name(id)),
            Driver::Systemd => slice_path(&self.shims)?.join(shim_scope(id)),
        };
        Ok(match &self.hierarchy {
            Hierarchy::V2(mount) => vec![mount.join(relative)],
            Hierarchy::V1 { memory, pids, .. } => std::iter::once(memory)
                .chain(pids)
                .map(|mount| mount.join(&relative))
                .collect(),
        })
    }

    /// The scopes of a pod's holder and of its shim under the systemd driver.
    pub fn scopes(&self, id: &PodId) -> [String; 2] {
        [scope(id.as_str()), shim_scope(id)]
    }

    /// The slice that a checked parent names.
    pub fn slice<'a>(&self, parent: &'a str) -> &'a str {
        last(parent)
    }
}

/// Half of the pod's id: 128 bits still tell pods apart, and node agents, who look for all of its
/// 64 digits, do not take the shim's cgroup for the pod's.
fn shim_name(id: &PodId) -> &str {
    let id = id.as_str();
    &id[..id.len() / 2]
}

const SCOPE_PREFIX: &str = "gantry";

fn scope(id: &str) -> String {
    format!("{SCOPE_PREFIX}-{id}.scope")
}

fn shim_scope(id: &PodId) -> String {
    format!("{SCOPE_PREFIX}-shim-{}.scope", shim_name(id))
}

fn last(path: &str) -> &str {
    path.trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or(path)
}

/// `a-b-c.slice` lies at `a.slice/a-b.slice/a-b-c.slice` (systemd.slice(5)).
fn slice_path(slice: &str) -> Result<PathBuf, Error> {
    let invalid = |reason: &str| Error::Invalid {
        field: "linux.cgroup_parent".to_owned(),
        reason: format!("{slice:?} {reason}"),
    };
    let Some(name) = slice.strip_suffix(".slice") else {
        return Err(invalid("is not a slice"));
    };
    if name == "-" {
        return Ok(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return Err(invalid("has an empty component"));
        }
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0
cgroup /sys/fs/cgroup/freezer cgroup rw,relatime,freezer 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
";
    const UNIFIED: &str = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";

    fn cgroups(driver: Driver, mounts: &str) -> Cgroups {
        Cgroups {
            driver,
            hierarchy: Cgroups::detect_hierarchy(mounts).unwrap(),
            mounts: Cgroups::mounts(mounts),
            default_parent: "/gantry".into(),
            shims: match driver {
                Driver::Cgroupfs => "/gantry-shims".into(),
                Driver::Systemd => "gantry-shims.slice".into(),
            },
        }
    }

    #[test]
    fn hybrid_counts_as_v1() {
        assert!(!cgroups(Driver::Cgroupfs, HYBRID).is_v2());
        assert!(cgroups(Driver::Cgroupfs, UNIFIED).is_v2());
        assert!(Cgroups::detect_hierarchy("proc /proc proc rw 0 0\n").is_err());
    }

    #[test]
    fn a_mount_point_with_spaces_is_decoded() {
        let mounts = "cgroup2 /sys/fs/my\\040cgroup cgroup2 rw 0 0\n";
        let dir = PathBuf::from("/sys/fs/my cgroup");
        assert_eq!(Cgroups::mounts(mounts)[0].dir, dir);
        assert_eq!(
            Cgroups::detect_hierarchy(mounts).unwrap(),
            Hierarchy::V2(dir)
        );
    }

    #[test]
    fn controllers_files_are_found_in_their_hierarchy() {
        let v1 = cgroups(Driver::Cgroupfs, HYBRID);
        let dir = Path::new("/sys/fs/cgroup/memory/gantry/c");
        let at = |name| v1.controller(name, dir);
        for (controller, mount) in [
            ("memory", "memory"),
            ("cpu", "cpu,cpuacct"),
            ("cpuacct", "cpu,cpuacct"),
            ("pids", "pids"),
        ] {
            let expected = Path::new("/sys/fs/cgroup").join(mount).join("gantry/c");
            assert_eq!(at(controller), Some(expected));
        }
        assert_eq!(at("blkio"), None);
        assert_eq!(v1.controller("cpu", Path::new("/elsewhere/c")), None);
        assert_eq!(v1.name(dir), "/gantry/c");
        assert_eq!(v1.name(Path::new("/elsewhere/c")), "");
        let v2 = cgroups(Driver::Cgroupfs, UNIFIED);
        let dir = Path::new("/sys/fs/cgroup/gantry/c");
        assert_eq!(v2.controller("io", dir), Some(dir.to_owned()));
    }

    #[test]
    fn a_pods_own_cgroup_is_known_by_the_kubelets_name() {
        let uid = "0a-1b";
        let v1 = cgroups(Driver::Cgroupfs, HYBRID);
        let v2 = cgroups(Driver::Systemd, UNIFIED);
        assert!(v1.is_pods_own("/kubepods/burstable/pod0a-1b", uid));
        assert!(v1.is_pods_own("/kubepods/pod0a-1b/", uid));
        for other in [
            "/gantry",
            "/kubepods/pod0a-1",
            "/kubepods/xpod0a-1b",
            "/pod",
        ] {
            assert!(!v1.is_pods_own(other, uid), "{other}");
        }
        assert!(!v1.is_pods_own("/kubepods/pod", ""));
        let slice = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod0a_1b.slice";
        assert!(v2.is_pods_own(slice, uid));
        assert!(v2.is_pods_own("pod0a_1b.slice", uid));
        for other in [
            "gantry.slice",
            "kubepods-pod0a_1.slice",
            "kubepods-xpod0a_1b.slice",
        ] {
            assert!(!v2.is_pods_own(other, uid), "{other}");
        }
        assert_eq!(
            v2.parent_dir(slice).unwrap(),
            Path::new("/sys/fs/cgroup").join(slice.trim_start_matches('/'))
        );
        assert_eq!(
            v1.parent_dir("/kubepods/pod0a-1b").unwrap(),
            Path::new("/sys/fs/cgroup/memory/kubepods/pod0a-1b")
        );
    }

    #[test]
    fn a_container_is_in_every_hierarchy() {
        let v1 = cgroups(Driver::Cgroupfs, HYBRID);
        let mut dirs = v1.everywhere(Path::new("/sys/fs/cgroup/memory/gantry/c"));
        dirs.sort();
        let expected = ["cpu,cpuacct", "freezer", "memory", "pids", "unified"]
            .map(|mount| Path::new("/sys/fs/cgroup").join(mount).join("gantry/c"));
        assert_eq!(dirs, expected);
        let v2 = cgroups(Driver::Cgroupfs, UNIFIED);
        let dir = Path::new("/sys/fs/cgroup/gantry/c");
        assert_eq!(v2.everywhere(dir), [dir]);
        // What is not below the mount, as of a record of another machine, is nothing to touch.
        for dir in ["", "/sys/fs/cgroup", "/sys/fs/cgroup/", "/elsewhere/c"] {
            assert!(v2.everywhere(Path::new(dir)).is_empty(), "{dir}");
        }
    }

    #[test]
    fn cgroupfs_places() {
        let id = ContainerId::from_random([1; 32]);
        let v1 = cgroups(Driver::Cgroupfs, HYBRID);
        let place = v1.container("/kubepods/pod1", &id).unwrap();
        assert_eq!(place.oci_path, format!("/kubepods/pod1/{id}"));
        assert_eq!(
            place.dir,
            Path::new("/sys/fs/cgroup/memory/kubepods/pod1").join(id.as_str())
        );
        assert!(place.oom_file.ends_with("memory.oom_control"));
        let pod = PodId::from_random([2; 32]);
        assert_eq!(v1.holder("/kubepods/pod1", &pod).unwrap().len(), 3);
    }

    #[test]
    fn systemd_places() {
        let id = ContainerId::from_random([1; 32]);
        let v2 = cgroups(Driver::Systemd, UNIFIED);
        let parent = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx_y.slice";
        assert_eq!(v2.parent(parent).unwrap(), parent);
        let place = v2.container(parent, &id).unwrap();
        assert_eq!(
            place.oci_path,
            format!("kubepods-burstable-podx_y.slice:gantry:{id}")
        );
        assert_eq!(
            place.dir,
            Path::new("/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice")
                .join("kubepods-burstable-podx_y.slice")
                .join(format!("gantry-{id}.scope"))
        );
    }

    #[test]
    fn shims_lie_outside_pods_and_are_not_named_like_them() {
        let pod = PodId::from_random([2; 32]);
        let half = "02".repeat(16);
        let v1 = cgroups(Driver::Cgroupfs, HYBRID);
        let expected = ["memory", "pids"]
            .map(|name| PathBuf::from(format!("/sys/fs/cgroup/{name}/gantry-shims/{half}")));
        assert_eq!(v1.shim(&pod).unwrap(), expected);
        let v2 = cgroups(Driver::Systemd, UNIFIED);
        let scope = format!("gantry-shim-{half}.scope");
        let slice = Path::new("/sys/fs/cgroup/gantry.slice/gantry-shims.slice");
        assert_eq!(v2.shim(&pod).unwrap(), [slice.join(&scope)]);
        assert_eq!(v2.scopes(&pod), [format!("gantry-{pod}.scope"), scope]);
        assert_eq!(
            v2.slice("/kubepods.slice/kubepods-podx.slice"),
            "kubepods-podx.slice"
        );
    }

    #[test]
    fn names_of_our_cgroups_are_told_from_others() {
        let (pod, id) = (
            PodId::from_random([2; 32]),
            ContainerId::from_random([1; 32]),
        );
        let half = Some(OwnCgroup::Shim(shim_name(&pod).to_owned()));
        let object = Some(OwnCgroup::Object(id.clone()));
        let v1 = cgroups(Driver::Cgroupfs, HYBRID);
        assert_eq!(
            (v1.own(id.as_str()), v1.own(shim_name(&pod))),
            (object.clone(), half.clone())
        );
        let v2 = cgroups(Driver::Systemd, UNIFIED);
        assert_eq!(
            (v2.own(&scope(id.as_str())), v2.own(&shim_scope(&pod))),
            (object, half)
        );
        for other in ["", "pod1", "system.slice", "gantry-shims.slice", "0123"] {
            assert_eq!((v1.own(other), v2.own(other)), (None, None), "{other}");
        }
        assert_eq!(v2.own(id.as_str()), None);
        assert_eq!(
            v1.own_parents().unwrap(),
            ["gantry", "gantry-shims"].map(PathBuf::from)
        );
        let slices = ["gantry.slice", "gantry.slice/gantry-shims.slice"].map(PathBuf::from);
        let v2 = Cgroups {
            default_parent: "gantry.slice".into(),
            ..v2
        };
        assert_eq!(v2.own_parents().unwrap(), slices);
    }

    #[test]
    fn a_parent_that_would_escape_or_is_the_root_is_refused() {
        let v1 = cgroups(Driver::Cgroupfs, HYBRID);
        for bad in ["/", "/../x", "a/./b", "//"] {
            assert!(v1.parent(bad).is_err(), "{bad}");
        }
        assert_eq!(v1.parent("").unwrap(), "/gantry");
        assert!(
            cgroups(Driver::Systemd, UNIFIED)
                .parent("/kubepods")
                .is_err()
        );
    }
}
