//! Masked and read-only paths, seccomp, AppArmor, SELinux.

use gantry_cri_api::v1::SecurityProfile;
use gantry_cri_api::v1::security_profile::ProfileType;
use oci_spec::runtime::LinuxSeccomp;

use crate::Error;
use crate::container::{Draft, Input};
use crate::resolved::AppArmor;

/// Power readings fine enough to tell secrets by (GHSA-7ww5-4wqc-m92c). Older kubelets do not
/// name it among the paths to mask.
const POWERCAP: &str = "/sys/devices/virtual/powercap";

/// Step: paths under /proc and /sys. An empty list hides nothing; the defaults are the kubelet's.
pub(crate) fn paths(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    if input.privileged() {
        return Ok(());
    }
    let mut masked = input.security.masked_paths.clone();
    if !masked.is_empty() && !masked.iter().any(|path| path == POWERCAP) {
        masked.push(POWERCAP.into());
    }
    let readonly = input.security.readonly_paths.clone();
    draft
        .linux
        .set_masked_paths((!masked.is_empty()).then_some(masked))
        .set_readonly_paths((!readonly.is_empty()).then_some(readonly));
    Ok(())
}

/// Step: profiles and labels.
pub(crate) fn profiles(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    draft
        .process
        .set_no_new_privileges(Some(input.security.no_new_privs));
    draft.linux.set_seccomp(seccomp(input)?);
    draft.process.set_apparmor_profile(apparmor(input)?);
    if let Some(labels) = &input.resolved.selinux {
        let some = |label: &String| (!label.is_empty()).then(|| label.clone());
        draft.process.set_selinux_label(some(&labels.process));
        draft.linux.set_mount_label(some(&labels.mount));
    }
    Ok(())
}

/// A profile as asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Profile {
    Unspecified,
    RuntimeDefault,
    Unconfined,
    /// Absolute path of a seccomp profile, name of an AppArmor profile.
    Localhost(String),
}

/// The seccomp profile of a container; the resolver reads the file that `Localhost` names.
///
/// # Errors
/// InvalidArgument for a profile that is not one of the kinds, Localhost without a path or with a
/// relative one.
pub fn seccomp_profile(
    context: &gantry_cri_api::v1::LinuxContainerSecurityContext,
) -> Result<Profile, Error> {
    let field = "linux.security_context.seccomp";
    #[allow(deprecated)] // An old kubelet may send nothing else.
    let old = &context.seccomp_profile_path;
    let profile = profile(field, context.seccomp.as_ref(), old)?;
    match &profile {
        Profile::Localhost(path) if !path.starts_with('/') => Err(Error::invalid(
            field,
            format!("localhost_ref {path:?} is not an absolute path"),
        )),
        _ => Ok(profile),
    }
}

/// The AppArmor profile of a container; the resolver checks that one named is loaded.
///
/// # Errors
/// InvalidArgument for a profile that is not one of the kinds, Localhost without a name.
pub fn apparmor_profile(
    context: &gantry_cri_api::v1::LinuxContainerSecurityContext,
) -> Result<Profile, Error> {
    #[allow(deprecated)] // An old kubelet may send nothing else.
    let old = &context.apparmor_profile;
    profile(
        "linux.security_context.apparmor",
        context.apparmor.as_ref(),
        old,
    )
}

/// The message, or the text that older kubelets sent in its place.
fn profile(field: &str, new: Option<&SecurityProfile>, old: &str) -> Result<Profile, Error> {
    let profile = match new {
        Some(profile) => {
            let kind = ProfileType::try_from(profile.profile_type)
                .map_err(|unknown| Error::invalid(field, unknown.to_string()))?;
            let reference = profile.localhost_ref.clone();
            if kind != ProfileType::Localhost && !reference.is_empty() {
                return Err(Error::invalid(field, "localhost_ref is only for Localhost"));
            }
            match kind {
                ProfileType::RuntimeDefault => Profile::RuntimeDefault,
                ProfileType::Unconfined => Profile::Unconfined,
                ProfileType::Localhost => Profile::Localhost(reference),
            }
        }
        None => match old {
            "" => Profile::Unspecified,
            "unconfined" => Profile::Unconfined,
            "runtime/default" | "docker/default" => Profile::RuntimeDefault,
            other => match other.strip_prefix("localhost/") {
                Some(reference) => Profile::Localhost(reference.into()),
                None => return Err(Error::invalid(field, format!("{other:?} is no profile"))),
            },
        },
    };
    // An empty name once meant "unconfined" (CVE-2023-2431).
    if profile == Profile::Localhost(String::new()) {
        return Err(Error::invalid(field, "Localhost needs localhost_ref"));
    }
    Ok(profile)
}

fn seccomp(input: &Input<'_>) -> Result<Option<LinuxSeccomp>, Error> {
    // Checked also where privilege overrides it, so that a bad request does not pass unseen.
    let profile = seccomp_profile(&input.security)?;
    if input.privileged() {
        return Ok(None);
    }
    let facts = &input.resolved.seccomp;
    match profile {
        Profile::Unspecified | Profile::Unconfined => Ok(None),
        Profile::RuntimeDefault => Ok(facts.runtime_default.clone()),
        Profile::Localhost(path) => {
            let text = facts.localhost.as_ref().ok_or_else(|| Error::Internal {
                field: "resolved.seccomp.localhost".into(),
                reason: format!("the content of {path} was not read"),
            })?;
            serde_json::from_str(text).map(Some).map_err(|error| {
                Error::invalid("linux.security_context.seccomp", format!("{path}: {error}"))
            })
        }
    }
}

fn apparmor(input: &Input<'_>) -> Result<Option<String>, Error> {
    let profile = apparmor_profile(&input.security)?;
    match (&input.resolved.apparmor, profile) {
        (_, Profile::Unconfined) => Ok(None),
        (AppArmor::Disabled, Profile::Localhost(name)) => Err(Error::precondition(
            "linux.security_context.apparmor",
            format!("profile {name} is asked for and the kernel has no AppArmor"),
        )),
        (AppArmor::Enabled { .. }, Profile::Localhost(name)) => Ok(Some(name)),
        (AppArmor::Disabled, Profile::RuntimeDefault | Profile::Unspecified) => Ok(None),
        (AppArmor::Enabled { runtime_default }, Profile::RuntimeDefault | Profile::Unspecified) => {
            // Privilege means unconfined unless a profile is asked for by name.
            Ok(if input.privileged() {
                None
            } else {
                runtime_default.clone()
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: ProfileType, reference: &str) -> SecurityProfile {
        SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: reference.into(),
        }
    }

    #[test]
    fn old_text_counts_only_without_the_message() {
        let of = |new: Option<&SecurityProfile>, old| profile("x", new, old);
        assert_eq!(of(None, "").unwrap(), Profile::Unspecified);
        assert_eq!(
            of(None, "runtime/default").unwrap(),
            Profile::RuntimeDefault
        );
        assert_eq!(
            of(None, "localhost/p").unwrap(),
            Profile::Localhost("p".into())
        );
        assert!(of(None, "docker").is_err());
        let unconfined = message(ProfileType::Unconfined, "");
        assert_eq!(
            of(Some(&unconfined), "localhost/p").unwrap(),
            Profile::Unconfined
        );
    }

    #[test]
    fn a_localhost_profile_has_a_name_and_no_other_has() {
        for bad in [
            message(ProfileType::Localhost, ""),
            message(ProfileType::RuntimeDefault, "/p"),
            message(ProfileType::Unconfined, "/p"),
            SecurityProfile {
                profile_type: 9,
                localhost_ref: String::new(),
            },
        ] {
            assert!(profile("x", Some(&bad), "").is_err(), "{bad:?}");
        }
        assert!(profile("x", None, "localhost/").is_err());
    }

    #[test]
    fn a_seccomp_path_is_absolute() {
        let context = gantry_cri_api::v1::LinuxContainerSecurityContext {
            seccomp: Some(message(ProfileType::Localhost, "profiles/a.json")),
            ..Default::default()
        };
        assert!(seccomp_profile(&context).is_err());
    }
}
