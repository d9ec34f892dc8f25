//! Capability sets of a container's first process.

use gantry_cri_api::v1::Capability as Asked;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use crate::Error;
use crate::container::{Draft, Input};

/// By number (linux/capability.h).
const BY_NUMBER: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// All capabilities up to the kernel's last one (`/proc/sys/kernel/cap_last_cap`). A newer
/// kernel's that we do not know are left out.
pub fn up_to(last: u32) -> Capabilities {
    let count = usize::try_from(last)
        .unwrap_or(usize::MAX)
        .saturating_add(1);
    BY_NUMBER.into_iter().take(count).collect()
}

/// The capabilities of a mask as the kernel prints it (`CapBnd` of `/proc/self/status`). What we
/// do not hold ourselves we cannot give: the runtime would fail to start even a privileged
/// container.
pub fn from_mask(mask: u64) -> Capabilities {
    let numbered = BY_NUMBER.into_iter().enumerate();
    numbered
        .filter(|(number, _)| mask >> number & 1 == 1)
        .map(|(_, capability)| capability)
        .collect()
}

/// What a container gets that asks for nothing: the set that images have been built against ever
/// since Docker chose it.
pub fn default_set() -> Capabilities {
    Capabilities::from([
        Capability::AuditWrite,
        Capability::Chown,
        Capability::DacOverride,
        Capability::Fowner,
        Capability::Fsetid,
        Capability::Kill,
        Capability::Mknod,
        Capability::NetBindService,
        Capability::NetRaw,
        Capability::Setfcap,
        Capability::Setgid,
        Capability::Setpcap,
        Capability::Setuid,
        Capability::SysChroot,
    ])
}

/// Step: the five sets. Inheritable and ambient are empty unless CRI asks for ambient ones: an
/// inheritable set would let files with inheritable capabilities raise them (CVE-2022-24769).
pub(crate) fn capabilities(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let known = &input.resolved.capabilities;
    let asked = input.security.capabilities.clone().unwrap_or_default();
    let mut kept = if input.privileged() {
        known.all.clone()
    } else {
        granted(&asked, &known.default, &known.all)?
    };

    let mut ambient = Capabilities::new();
    for name in &asked.add_ambient_capabilities {
        if is_all(name) {
            ambient.extend(&known.all);
        } else {
            ambient.insert(parse("add_ambient_capabilities", name)?);
        }
    }
    // The kernel keeps an ambient capability only while it is permitted and inheritable.
    kept.extend(&ambient);

    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(kept.clone()))
        .set_effective(Some(kept.clone()))
        .set_permitted(Some(kept))
        .set_inheritable(Some(ambient.clone()))
        .set_ambient(Some(ambient));
    draft.process.set_capabilities(Some(sets));
    Ok(())
}

/// `ALL` first, in adds and then in drops, so that "drop ALL, add CHOWN" leaves CHOWN; then the
/// single ones, of which a drop wins.
fn granted(
    asked: &Asked,
    default: &Capabilities,
    all: &Capabilities,
) -> Result<Capabilities, Error> {
    let mut kept = default.clone();
    if asked.add_capabilities.iter().any(|name| is_all(name)) {
        kept = all.clone();
    }
    if asked.drop_capabilities.iter().any(|name| is_all(name)) {
        kept.clear();
    }
    for name in asked.add_capabilities.iter().filter(|name| !is_all(name)) {
        kept.insert(parse("add_capabilities", name)?);
    }
    for name in asked.drop_capabilities.iter().filter(|name| !is_all(name)) {
        kept.remove(&parse("drop_capabilities", name)?);
    }
    Ok(kept)
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL")
}

fn parse(list: &str, name: &str) -> Result<Capability, Error> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    bare.parse().map_err(|_| {
        Error::invalid(
            format!("linux.security_context.capabilities.{list}"),
            format!("{name:?} is not a capability"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(add: &[&str], drop: &[&str]) -> Result<Capabilities, Error> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let asked = Asked {
            add_capabilities: owned(add),
            drop_capabilities: owned(drop),
            add_ambient_capabilities: Vec::new(),
        };
        granted(&asked, &default_set(), &up_to(40))
    }

    #[test]
    fn adds_and_drops_in_any_spelling() {
        assert_eq!(asked(&[], &[]).unwrap(), default_set());
        let mut more = default_set();
        more.insert(Capability::SysTime);
        for name in ["SYS_TIME", "CAP_SYS_TIME", "cap_sys_time", "Sys_Time"] {
            assert_eq!(asked(&[name], &[]).unwrap(), more, "{name}");
            assert_eq!(asked(&[name], &[name]).unwrap(), default_set(), "{name}");
        }
    }

    #[test]
    fn all_in_any_case() {
        for all in ["ALL", "all", "All"] {
            assert_eq!(asked(&[all], &[]).unwrap().len(), 41);
            assert!(asked(&[], &[all]).unwrap().is_empty());
            assert_eq!(
                asked(&["CHOWN"], &[all]).unwrap(),
                [Capability::Chown].into()
            );
            assert_eq!(asked(&[all], &["CHOWN"]).unwrap().len(), 40);
            assert!(asked(&[all], &[all]).unwrap().is_empty());
        }
    }

    #[test]
    fn what_is_no_capability_is_refused() {
        for junk in ["", "CAP_", "SYS ADMIN", "CAP_CAP_CHOWN", "CAP_ALL", "ROOT"] {
            assert!(asked(&[junk], &[]).is_err(), "{junk:?}");
            assert!(asked(&[], &[junk]).is_err(), "{junk:?}");
        }
    }

    #[test]
    fn an_older_kernel_knows_fewer() {
        assert_eq!(up_to(37).len(), 38);
        assert!(!up_to(37).contains(&Capability::Bpf));
        assert_eq!(up_to(99).len(), 41);
        assert_eq!(up_to(40).len(), 41);
    }

    #[test]
    fn a_mask_names_its_capabilities() {
        assert_eq!(from_mask(0x1ff_ffff_ffff), up_to(40));
        assert_eq!(from_mask(u64::MAX), up_to(40));
        assert_eq!(from_mask(0xa804_25fb), default_set());
        assert!(!from_mask(0x1ff_feff_ffff).contains(&Capability::SysResource));
        assert!(from_mask(0).is_empty());
    }
}
