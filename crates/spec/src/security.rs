//! Masked and read-only paths, AppArmor, SELinux.

use gantry_cri_api::v1::SecurityProfile;
use gantry_cri_api::v1::security_profile::ProfileType;

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
pub(crate) fn profile(
    field: &str,
    new: Option<&SecurityProfile>,
    old: &str,
) -> Result<Profile, Error> {
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

fn apparmor(input: &Input<'_>) -> Result<Option<String>, Error> {
    const FIELD: &str = "linux.security_context.apparmor";
    let asked = apparmor_profile(&input.security)?;
    let AppArmor::Enabled {
        runtime_default,
        loaded,
    } = &input.resolved.apparmor
    else {
        return match asked {
            Profile::Localhost(name) => Err(Error::precondition(
                FIELD,
                format!("profile {name} is asked for and the kernel has no AppArmor"),
            )),
            Profile::Unspecified | Profile::RuntimeDefault | Profile::Unconfined => Ok(None),
        };
    };
    let name = match asked {
        Profile::Unconfined => return Ok(None),
        Profile::Localhost(name) => name,
        // Privilege means unconfined unless a profile is asked for by name.
        Profile::RuntimeDefault | Profile::Unspecified if input.privileged() => return Ok(None),
        Profile::RuntimeDefault => runtime_default.clone(),
        // Nobody asked: a node whose administrator has not loaded the profile is left as it is.
        Profile::Unspecified if !loaded.contains(runtime_default) => return Ok(None),
        Profile::Unspecified => runtime_default.clone(),
    };
    // What was asked for and is not there would run unconfined, or fail in the runtime's words.
    if !loaded.contains(&name) {
        let reason = format!("profile {name} is not loaded");
        return Err(Error::precondition(FIELD, reason));
    }
    Ok(Some(name))
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
}
