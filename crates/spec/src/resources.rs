//! CRI resources to `linux.resources` of the runtime spec.
//!
//! The OCI runtime converts what cgroup v2 spells otherwise (shares to weight, memory plus swap to
//! swap), so that both versions get the same words. Pids stay unlimited: that limit belongs to the
//! pod and thereby to the kubelet.

use gantry_cri_api::v1::LinuxContainerResources;
use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};

use crate::Error;
use crate::resolved::{CgroupNode, CgroupVersion};

/// Resources for a new container; what is zero or empty is not set.
///
/// # Errors
/// InvalidArgument for values that no cgroup takes, FailedPrecondition for limits whose controller
/// the node lacks.
pub fn create(asked: &LinuxContainerResources, node: CgroupNode) -> Result<LinuxResources, Error> {
    let mut resources = LinuxResources::default();
    resources
        .set_cpu(cpu(asked)?)
        .set_memory(memory(asked, node)?)
        .set_hugepage_limits(hugepages(asked, node)?);
    if !asked.unified.is_empty() {
        check_unified(asked, node)?;
        resources.set_unified(Some(asked.unified.clone().into_iter().collect()));
    }
    Ok(resources)
}

/// Resources of a container that exists: what is in force after the change, and what to hand to
/// the OCI runtime. All of it is handed over, not only the change, because runtimes differ in
/// what they make of an absent value.
///
/// # Errors
/// As [`create`].
pub fn update(
    current: &LinuxContainerResources,
    change: &LinuxContainerResources,
    node: CgroupNode,
) -> Result<(LinuxContainerResources, LinuxResources), Error> {
    let merged = merge(current, change);
    let resources = create(&merged, node)?;
    Ok((merged, resources))
}

/// `current` with what `change` sets; zero and empty keep.
fn merge(
    current: &LinuxContainerResources,
    change: &LinuxContainerResources,
) -> LinuxContainerResources {
    let number = |new: i64, old: i64| if new == 0 { old } else { new };
    let text = |new: &String, old: &String| {
        if new.is_empty() {
            old.clone()
        } else {
            new.clone()
        }
    };
    let mut merged = LinuxContainerResources {
        cpu_period: number(change.cpu_period, current.cpu_period),
        cpu_quota: number(change.cpu_quota, current.cpu_quota),
        cpu_shares: number(change.cpu_shares, current.cpu_shares),
        memory_limit_in_bytes: number(change.memory_limit_in_bytes, current.memory_limit_in_bytes),
        // Fixed at start: lowering it again would need privilege inside the container.
        oom_score_adj: current.oom_score_adj,
        cpuset_cpus: text(&change.cpuset_cpus, &current.cpuset_cpus),
        cpuset_mems: text(&change.cpuset_mems, &current.cpuset_mems),
        hugepage_limits: current.hugepage_limits.clone(),
        unified: current.unified.clone(),
        memory_swap_limit_in_bytes: number(
            change.memory_swap_limit_in_bytes,
            current.memory_swap_limit_in_bytes,
        ),
    };
    for limit in &change.hugepage_limits {
        match merged
            .hugepage_limits
            .iter_mut()
            .find(|old| old.page_size == limit.page_size)
        {
            Some(old) => old.limit = limit.limit,
            None => merged.hugepage_limits.push(limit.clone()),
        }
    }
    merged.unified.extend(change.unified.clone());
    // Memory plus swap cannot be below memory: a raised memory limit takes it along.
    let (limit, total) = (
        merged.memory_limit_in_bytes,
        merged.memory_swap_limit_in_bytes,
    );
    if change.memory_swap_limit_in_bytes == 0 && total > 0 && limit > total {
        merged.memory_swap_limit_in_bytes = limit;
    }
    merged
}

fn cpu(asked: &LinuxContainerResources) -> Result<Option<LinuxCpu>, Error> {
    let unsigned = |name: &str, value: i64| {
        u64::try_from(value).map_err(|_| {
            Error::invalid(
                format!("linux.resources.{name}"),
                format!("{value} is negative"),
            )
        })
    };
    let period = unsigned("cpu_period", asked.cpu_period)?;
    let shares = unsigned("cpu_shares", asked.cpu_shares)?;

    let mut cpu = LinuxCpu::default();
    cpu.set_period((period != 0).then_some(period))
        .set_quota((asked.cpu_quota != 0).then_some(asked.cpu_quota))
        .set_shares((shares != 0).then_some(shares))
        .set_cpus((!asked.cpuset_cpus.is_empty()).then(|| asked.cpuset_cpus.clone()))
        .set_mems((!asked.cpuset_mems.is_empty()).then(|| asked.cpuset_mems.clone()));
    Ok((cpu != LinuxCpu::default()).then_some(cpu))
}

fn memory(asked: &LinuxContainerResources, node: CgroupNode) -> Result<Option<LinuxMemory>, Error> {
    let limit = asked.memory_limit_in_bytes;
    let total = asked.memory_swap_limit_in_bytes;
    if limit < -1 {
        return Err(Error::invalid(
            "linux.resources.memory_limit_in_bytes",
            format!("{limit} is negative"),
        ));
    }
    if total > 0 && limit > total {
        return Err(Error::invalid(
            "linux.resources.memory_swap_limit_in_bytes",
            format!("{total} is memory plus swap and below the memory limit {limit}"),
        ));
    }

    let mut memory = LinuxMemory::default();
    memory.set_limit((limit != 0).then_some(limit));
    if node.swap {
        // Without a word about swap a limited container gets none: it would otherwise swap where
        // it ought to be killed.
        let swap = if total != 0 { total.max(-1) } else { limit };
        memory.set_swap((swap != 0).then_some(swap));
    }
    Ok((memory != LinuxMemory::default()).then_some(memory))
}

/// A node without the controller cannot hold a limit; kubelets name every page size with limit
/// zero, though, and those are passed over.
fn hugepages(
    asked: &LinuxContainerResources,
    node: CgroupNode,
) -> Result<Option<Vec<LinuxHugepageLimit>>, Error> {
    if !node.hugetlb {
        return match asked.hugepage_limits.iter().find(|limit| limit.limit != 0) {
            Some(limit) => Err(Error::precondition(
                format!("linux.resources.hugepage_limits[{}]", limit.page_size),
                "the node has no hugetlb controller",
            )),
            None => Ok(None),
        };
    }
    let convert = |limit: &gantry_cri_api::v1::HugepageLimit| {
        let mut converted = LinuxHugepageLimit::default();
        converted
            .set_page_size(limit.page_size.clone())
            // What exceeds the type is no limit for any machine.
            .set_limit(i64::try_from(limit.limit).unwrap_or(i64::MAX));
        converted
    };
    let limits: Vec<_> = asked.hugepage_limits.iter().map(convert).collect();
    Ok((!limits.is_empty()).then_some(limits))
}

/// Keys are file names that the runtime joins to the cgroup's path.
fn check_unified(asked: &LinuxContainerResources, node: CgroupNode) -> Result<(), Error> {
    if node.version == CgroupVersion::V1 {
        return Err(Error::precondition(
            "linux.resources.unified",
            "the node has cgroup v1",
        ));
    }
    for key in asked.unified.keys() {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !key.contains('.') || key.starts_with('.') || !key.bytes().all(plain) {
            return Err(Error::invalid(
                "linux.resources.unified",
                format!("{key:?} is not the name of a cgroup file"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_cri_api::v1::HugepageLimit;

    const V2: CgroupNode = CgroupNode {
        version: CgroupVersion::V2,
        hugetlb: true,
        swap: true,
    };
    const BARE: CgroupNode = CgroupNode {
        version: CgroupVersion::V1,
        hugetlb: false,
        swap: false,
    };

    fn resources() -> LinuxContainerResources {
        LinuxContainerResources::default()
    }

    #[test]
    fn nothing_asked_is_nothing_set() {
        assert_eq!(create(&resources(), V2).unwrap(), LinuxResources::default());
    }

    #[test]
    fn a_memory_limit_alone_forbids_swap() {
        let asked = LinuxContainerResources {
            memory_limit_in_bytes: 100,
            ..resources()
        };
        let memory = create(&asked, V2).unwrap().memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(100), Some(100)));
        let memory = create(&asked, BARE).unwrap().memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(100), None));

        let swap = LinuxContainerResources {
            memory_swap_limit_in_bytes: 150,
            ..asked.clone()
        };
        assert_eq!(
            create(&swap, V2).unwrap().memory().unwrap().swap(),
            Some(150)
        );
        let endless = LinuxContainerResources {
            memory_swap_limit_in_bytes: -1,
            ..asked.clone()
        };
        assert_eq!(
            create(&endless, V2).unwrap().memory().unwrap().swap(),
            Some(-1)
        );
        let below = LinuxContainerResources {
            memory_swap_limit_in_bytes: 50,
            ..asked
        };
        assert!(create(&below, V2).is_err());
    }

    #[test]
    fn zero_keeps_on_update() {
        let current = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 100,
            oom_score_adj: 7,
            cpuset_cpus: "0-1".into(),
            hugepage_limits: vec![HugepageLimit {
                page_size: "2MB".into(),
                limit: 2,
            }],
            unified: [("memory.high".to_owned(), "50".to_owned())].into(),
            ..resources()
        };
        let (kept, _) = update(&current, &resources(), V2).unwrap();
        assert_eq!(kept, current);

        let change = LinuxContainerResources {
            cpu_quota: -1,
            memory_limit_in_bytes: 300,
            oom_score_adj: 900,
            hugepage_limits: vec![
                HugepageLimit {
                    page_size: "1GB".into(),
                    limit: 1,
                },
                HugepageLimit {
                    page_size: "2MB".into(),
                    limit: 0,
                },
            ],
            unified: [("memory.low".to_owned(), "5".to_owned())].into(),
            ..resources()
        };
        let (merged, oci) = update(&current, &change, V2).unwrap();
        assert_eq!(merged.cpu_quota, -1);
        assert_eq!(merged.cpu_shares, 512);
        assert_eq!(merged.oom_score_adj, 7);
        assert_eq!(merged.hugepage_limits.len(), 2);
        assert_eq!(merged.hugepage_limits[0].limit, 0);
        assert_eq!(merged.unified.len(), 2);
        assert_eq!(oci.memory().unwrap().limit(), Some(300));
        assert_eq!(oci.memory().unwrap().swap(), Some(300));
        assert_eq!(oci.cpu().as_ref().unwrap().shares(), Some(512));
    }

    #[test]
    fn a_raised_memory_limit_takes_swap_along() {
        let current = LinuxContainerResources {
            memory_limit_in_bytes: 100,
            memory_swap_limit_in_bytes: 150,
            ..resources()
        };
        let change = LinuxContainerResources {
            memory_limit_in_bytes: 120,
            ..resources()
        };
        assert_eq!(
            update(&current, &change, V2)
                .unwrap()
                .0
                .memory_swap_limit_in_bytes,
            150
        );
        let change = LinuxContainerResources {
            memory_limit_in_bytes: 200,
            ..resources()
        };
        assert_eq!(
            update(&current, &change, V2)
                .unwrap()
                .0
                .memory_swap_limit_in_bytes,
            200
        );
    }

    #[test]
    fn limits_without_a_controller() {
        let limit = |limit| LinuxContainerResources {
            hugepage_limits: vec![HugepageLimit {
                page_size: "2MB".into(),
                limit,
            }],
            ..resources()
        };
        assert_eq!(create(&limit(0), BARE).unwrap(), LinuxResources::default());
        let error = create(&limit(1), BARE).unwrap_err().to_string();
        assert!(error.contains("hugepage_limits[2MB]"), "{error}");
        let huge = create(&limit(u64::MAX), V2).unwrap();
        assert_eq!(
            huge.hugepage_limits().as_ref().unwrap()[0].limit(),
            i64::MAX
        );
    }

    #[test]
    fn unified_keys_are_file_names_of_v2() {
        let unified = |key: &str| LinuxContainerResources {
            unified: [(key.to_owned(), "1".to_owned())].into(),
            ..resources()
        };
        assert!(create(&unified("memory.high"), V2).is_ok());
        assert!(create(&unified("hugetlb.2MB.max"), V2).is_ok());
        assert!(create(&unified("memory.high"), BARE).is_err());
        for bad in [
            "",
            "memory",
            "../memory.high",
            "a/b.c",
            ".x",
            "memory.high\n",
            "a b.c",
        ] {
            assert!(create(&unified(bad), V2).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn negative_values_are_refused() {
        for bad in [
            LinuxContainerResources {
                cpu_period: -1,
                ..resources()
            },
            LinuxContainerResources {
                cpu_shares: -2,
                ..resources()
            },
            LinuxContainerResources {
                memory_limit_in_bytes: -2,
                ..resources()
            },
        ] {
            assert!(create(&bad, V2).is_err(), "{bad:?}");
        }
    }
}
