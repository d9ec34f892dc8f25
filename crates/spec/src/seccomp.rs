//! System call filters: the default profile, and which profile a container gets.
//!
//! The default profile is data, `seccomp/default.json`: an allow-list in the form that container
//! engines share, whose rules hold for an architecture, from a kernel version on, with or without
//! a capability. What is not on it fails with EPERM.

use std::collections::{BTreeMap, HashSet};
use std::sync::OnceLock;

use gantry_cri_api::v1::LinuxContainerSecurityContext;
use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg,
    LinuxSeccompArgBuilder, LinuxSeccompOperator, LinuxSyscall,
};
use serde::Deserialize;

use crate::Error;
use crate::container::{Draft, Input};
use crate::resolved::{KernelVersion, Seccomp};
use crate::security::{Profile, profile};

/// Largest profile file that is read.
pub const MAX_PROFILE: usize = 4 << 20;

const FIELD: &str = "linux.security_context.seccomp";

const DEFAULT: &str = include_str!("seccomp/default.json");

/// What a call outside the default profile answers.
const EPERM: u32 = 1;

/// The file `seccomp/default.json`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Allowed {
    #[serde(rename = "source")]
    _source: String,
    /// Names of libseccomp for an architecture (as Rust spells it) and for those whose programs
    /// its kernel runs too: a filter that leaves one out is passed by changing over to it.
    architectures: BTreeMap<String, Vec<Arch>>,
    rules: Vec<Rule>,
}

/// Some system calls, and when they are allowed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    #[serde(rename = "why")]
    _why: String,
    names: Vec<String>,
    /// Allowed only if one argument has one of these values.
    arg: Option<Arg>,
    /// Not allowed after all, but answered with this errno instead of EPERM.
    errno: Option<u32>,
    /// Only on these architectures.
    on: Option<Vec<String>>,
    /// On all architectures but these.
    #[serde(default)]
    not_on: Vec<String>,
    capability: Option<String>,
    without_capability: Option<String>,
    min_kernel: Option<KernelVersion>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Arg {
    index: usize,
    op: Op,
    values: Vec<u64>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Op {
    Lt,
    Eq,
    /// None of the bits is set.
    MaskedEq,
}

impl Rule {
    fn holds(&self, capabilities: &Capabilities, facts: &Seccomp) -> Result<bool, Error> {
        let has = |name: &String| capability(name).map(|it| capabilities.contains(&it));
        let arch = &facts.architecture;
        Ok(self.on.as_ref().is_none_or(|list| list.contains(arch))
            && !self.not_on.contains(arch)
            && self.min_kernel.is_none_or(|least| facts.kernel >= least)
            && self.capability.as_ref().map_or(Ok(true), has)?
            && !self.without_capability.as_ref().map_or(Ok(false), has)?)
    }

    /// One entry of the profile for each value of the argument: the conditions of one entry are
    /// ANDed.
    fn entries(&self, names: Vec<String>) -> Result<Vec<LinuxSyscall>, Error> {
        let entry = |arg: Option<LinuxSeccompArg>| {
            let mut entry = LinuxSyscall::default();
            entry.set_names(names.clone());
            entry.set_action(match self.errno {
                Some(_) => LinuxSeccompAction::ScmpActErrno,
                None => LinuxSeccompAction::ScmpActAllow,
            });
            entry.set_errno_ret(self.errno);
            entry.set_args(arg.map(|arg| vec![arg]));
            entry
        };
        let Some(arg) = &self.arg else {
            return Ok(vec![entry(None)]);
        };
        let one = |value: &u64| {
            let built = LinuxSeccompArgBuilder::default().index(arg.index);
            let built = match arg.op {
                Op::Lt => built.value(*value).op(LinuxSeccompOperator::ScmpCmpLt),
                Op::Eq => built.value(*value).op(LinuxSeccompOperator::ScmpCmpEq),
                // `value` is the mask, `valueTwo` what must be left of the argument under it.
                Op::MaskedEq => built
                    .value(*value)
                    .value_two(0_u64)
                    .op(LinuxSeccompOperator::ScmpCmpMaskedEq),
            };
            built.build().map(Some).map(entry).map_err(broken)
        };
        arg.values.iter().map(one).collect()
    }
}

fn capability(name: &str) -> Result<Capability, Error> {
    let bare = name.strip_prefix("CAP_").unwrap_or(name);
    bare.parse().map_err(broken)
}

fn broken(error: impl std::fmt::Display) -> Error {
    Error::Internal {
        field: "default seccomp profile".into(),
        reason: error.to_string(),
    }
}

fn allowed() -> Result<&'static Allowed, Error> {
    static PARSED: OnceLock<Result<Allowed, String>> = OnceLock::new();
    PARSED
        .get_or_init(|| serde_json::from_str(DEFAULT).map_err(|error| error.to_string()))
        .as_ref()
        .map_err(broken)
}

/// The default profile for a process that may hold `capabilities`.
///
/// # Errors
/// FailedPrecondition for an architecture that the profile does not know.
pub fn default_profile(
    capabilities: &Capabilities,
    facts: &Seccomp,
) -> Result<LinuxSeccomp, Error> {
    let allowed = allowed()?;
    let architectures = allowed
        .architectures
        .get(&facts.architecture)
        .ok_or_else(|| {
            let reason = format!("no default profile for {}", facts.architecture);
            Error::precondition(FIELD, reason)
        })?;
    // libseccomp refuses a second rule for a call that is allowed without condition.
    let mut unconditional = HashSet::new();
    let mut syscalls = Vec::new();
    for rule in &allowed.rules {
        if !rule.holds(capabilities, facts)? {
            continue;
        }
        let mut names = rule.names.clone();
        names.retain(|name| !unconditional.contains(name));
        if rule.arg.is_none() && rule.errno.is_none() {
            unconditional.extend(names.iter().cloned());
        }
        if !names.is_empty() {
            syscalls.extend(rule.entries(names)?);
        }
    }
    let mut profile = LinuxSeccomp::default();
    profile.set_default_action(LinuxSeccompAction::ScmpActErrno);
    profile.set_default_errno_ret(Some(EPERM));
    profile.set_architectures(Some(architectures.clone()));
    profile.set_syscalls(Some(syscalls));
    Ok(profile)
}

/// The seccomp profile that a container asks for; the resolver reads the file that `Localhost`
/// names.
///
/// # Errors
/// InvalidArgument for a profile that is not one of the kinds, Localhost without a path or with a
/// relative one.
pub fn asked(context: &LinuxContainerSecurityContext) -> Result<Profile, Error> {
    #[allow(deprecated)] // An old kubelet may send nothing else.
    let old = &context.seccomp_profile_path;
    let profile = profile(FIELD, context.seccomp.as_ref(), old)?;
    match &profile {
        Profile::Localhost(path) if !path.starts_with('/') => Err(Error::invalid(
            FIELD,
            format!("localhost_ref {path:?} is not an absolute path"),
        )),
        _ => Ok(profile),
    }
}

/// Step.
pub(crate) fn seccomp(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    // Checked also where privilege overrides it, so that a bad request does not pass unseen.
    let profile = asked(&input.security)?;
    if input.privileged() || matches!(profile, Profile::Unspecified | Profile::Unconfined) {
        draft.linux.set_seccomp(None);
        return Ok(());
    }
    let facts = &input.resolved.seccomp;
    // A filter that was asked for and is not there would be a hole that nobody sees.
    if let Some(reason) = &facts.unsupported {
        return Err(Error::precondition(FIELD, reason));
    }
    let filter = match profile {
        Profile::Localhost(path) => localhost(&path, facts)?,
        _ => {
            let sets = draft.process.capabilities().as_ref();
            let bounding = sets.and_then(|sets| sets.bounding().clone());
            default_profile(&bounding.unwrap_or_default(), facts)?
        }
    };
    draft.linux.set_seccomp(Some(filter));
    Ok(())
}

fn localhost(path: &str, facts: &Seccomp) -> Result<LinuxSeccomp, Error> {
    let text = facts.localhost.as_ref().ok_or_else(|| Error::Internal {
        field: "resolved.seccomp.localhost".into(),
        reason: format!("the content of {path} was not read"),
    })?;
    serde_json::from_str(text)
        .map_err(|error| Error::invalid(FIELD, format!("localhost_ref {path}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capabilities::{default_set, up_to};

    fn facts(architecture: &str, kernel: (u32, u32)) -> Seccomp {
        Seccomp {
            unsupported: None,
            architecture: architecture.into(),
            kernel: KernelVersion::new(kernel.0, kernel.1),
            localhost: None,
        }
    }

    fn entries(capabilities: &Capabilities, facts: &Seccomp, name: &str) -> Vec<LinuxSyscall> {
        let profile = default_profile(capabilities, facts).unwrap();
        let all = profile.syscalls().clone().unwrap();
        all.into_iter()
            .filter(|entry| entry.names().iter().any(|it| it == name))
            .collect()
    }

    /// Allowed whatever its arguments are.
    fn open(capabilities: &Capabilities, facts: &Seccomp, name: &str) -> bool {
        let list = entries(capabilities, facts, name);
        list.iter().any(|entry| {
            entry.action() == LinuxSeccompAction::ScmpActAllow && entry.args().is_none()
        })
    }

    /// What the filter answers to a call whose first argument is `arg`, as the kernel computes it.
    fn passes(capabilities: &Capabilities, facts: &Seccomp, name: &str, arg: u64) -> bool {
        let list = entries(capabilities, facts, name);
        list.iter().any(|entry| {
            entry.action() == LinuxSeccompAction::ScmpActAllow
                && entry.args().iter().flatten().all(|it| {
                    assert_eq!(it.index(), 0, "{name}");
                    match it.op() {
                        LinuxSeccompOperator::ScmpCmpLt => arg < it.value(),
                        LinuxSeccompOperator::ScmpCmpEq => arg == it.value(),
                        LinuxSeccompOperator::ScmpCmpMaskedEq => {
                            arg & it.value() == it.value_two().unwrap()
                        }
                        other => panic!("{other:?}"),
                    }
                })
        })
    }

    #[test]
    fn a_capability_opens_the_calls_that_it_permits() {
        let facts = facts("x86_64", (6, 1));
        let plain = default_set();
        for (name, capability) in [
            ("mount", Capability::SysAdmin),
            ("unshare", Capability::SysAdmin),
            ("setns", Capability::SysAdmin),
            ("bpf", Capability::Bpf),
            ("perf_event_open", Capability::Perfmon),
            ("init_module", Capability::SysModule),
            ("clock_settime", Capability::SysTime),
            ("iopl", Capability::SysRawio),
            ("open_by_handle_at", Capability::DacReadSearch),
            ("mbind", Capability::SysNice),
        ] {
            assert!(!open(&plain, &facts, name), "{name}");
            let mut more = plain.clone();
            more.insert(capability);
            assert!(open(&more, &facts, name), "{name}");
        }
        // A default one, dropped.
        assert!(open(&plain, &facts, "chroot"));
        assert!(!open(&Capabilities::new(), &facts, "chroot"));
        // Nobody's: what the kernel does not namespace, or was a hole.
        for name in [
            "kexec_load",
            "keyctl",
            "io_uring_setup",
            "userfaultfd",
            "swapon",
        ] {
            assert!(entries(&up_to(40), &facts, name).is_empty(), "{name}");
        }
    }

    #[test]
    fn cve_2026_31431_crypto_sockets_are_refused_and_vm_sockets_too() {
        let facts = facts("x86_64", (6, 1));
        let socket = |family| passes(&up_to(40), &facts, "socket", family);
        for refused in [38, 40, 46, 1000, (1 << 32) + 38, (1 << 63) + 40] {
            assert!(!socket(refused), "{refused}");
        }
        for allowed in [1, 2, 10, 16, 17, 37, 39, 44] {
            assert!(socket(allowed), "{allowed}");
        }
    }

    #[test]
    fn new_namespaces_need_sys_admin() {
        let facts = facts("x86_64", (6, 1));
        let plain = default_set();
        const SIGCHLD: u64 = 17;
        assert!(passes(&plain, &facts, "clone", SIGCHLD));
        for flag in [
            0x0002_0000, // CLONE_NEWNS
            0x0200_0000, // CLONE_NEWCGROUP
            0x0400_0000, // CLONE_NEWUTS
            0x0800_0000, // CLONE_NEWIPC
            0x1000_0000, // CLONE_NEWUSER
            0x2000_0000, // CLONE_NEWPID
            0x4000_0000, // CLONE_NEWNET
        ] {
            assert!(!passes(&plain, &facts, "clone", flag | SIGCHLD), "{flag:x}");
            assert!(passes(&up_to(40), &facts, "clone", flag | SIGCHLD));
        }
        // Its flags cannot be seen: the C library is sent back to clone.
        let clone3 = entries(&plain, &facts, "clone3");
        assert_eq!(clone3.len(), 1);
        assert_eq!(clone3[0].action(), LinuxSeccompAction::ScmpActErrno);
        assert_eq!(clone3[0].errno_ret(), Some(38));
        assert!(open(&up_to(40), &facts, "clone3"));
    }

    #[test]
    fn personality_has_a_few_values() {
        let facts = facts("x86_64", (6, 1));
        let of = |value| passes(&default_set(), &facts, "personality", value);
        assert!(of(0) && of(8) && of(0x20000) && of(0x20008) && of(0xffff_ffff));
        assert!(!of(0x0004_0000) && !of(0x0008_0000) && !of(1));
    }

    #[test]
    fn tracing_came_with_a_kernel() {
        assert!(!open(&default_set(), &facts("x86_64", (4, 7)), "ptrace"));
        assert!(open(&default_set(), &facts("x86_64", (4, 8)), "ptrace"));
        let with = Capabilities::from([Capability::SysPtrace]);
        assert!(open(&with, &facts("x86_64", (4, 7)), "ptrace"));
        assert_eq!(entries(&with, &facts("x86_64", (4, 8)), "ptrace").len(), 1);
    }

    #[test]
    fn architectures_come_with_those_that_run_beside_them() {
        let of = |name: &str| {
            let profile = default_profile(&default_set(), &facts(name, (6, 1))).unwrap();
            profile.architectures().clone().unwrap()
        };
        let x86 = [Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32];
        assert_eq!(of("x86_64"), x86);
        assert_eq!(of("aarch64"), [Arch::ScmpArchAarch64, Arch::ScmpArchArm]);
        assert!(open(&default_set(), &facts("x86_64", (6, 1)), "arch_prctl"));
        assert!(!open(
            &default_set(),
            &facts("aarch64", (6, 1)),
            "arch_prctl"
        ));
        // Their clone has its flags elsewhere.
        let s390 = entries(&default_set(), &facts("s390x", (6, 1)), "clone");
        assert_eq!(s390.len(), 1);
        assert_eq!(s390[0].args().as_ref().unwrap()[0].index(), 1);
        assert!(default_profile(&default_set(), &facts("vax", (6, 1))).is_err());
    }

    #[test]
    fn a_localhost_path_is_absolute() {
        let context = LinuxContainerSecurityContext {
            seccomp: Some(gantry_cri_api::v1::SecurityProfile {
                profile_type: gantry_cri_api::v1::security_profile::ProfileType::Localhost.into(),
                localhost_ref: "profiles/a.json".into(),
            }),
            ..Default::default()
        };
        assert!(asked(&context).is_err());
    }
}
