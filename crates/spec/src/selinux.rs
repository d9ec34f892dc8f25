//! SELinux labels of processes and files.
//!
//! A label is `user:role:type:level`. The level's categories (MCS) keep pods of one type apart:
//! a pod that names no level gets a pair of categories that follows from its id, so that nothing
//! has to be recorded and nothing rebuilt after a restart.

use gantry_cri_api::v1::SeLinuxOption;
use gantry_types::PodId;

use crate::Error;
use crate::resolved::SelinuxLabels;

/// Categories of the targeted policy: c0 to c1023.
const CATEGORIES: u32 = 1024;

/// The contexts that the policy has for containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    pub process: String,
    pub file: String,
}

/// Reads the policy's `lxc_contexts` (selinux_lxc_contexts_path(3)): lines of `name = "context"`.
/// `None` unless it has a context for processes and one for files, each with four parts.
pub fn defaults(text: &str) -> Option<Defaults> {
    let of = |name: &str| {
        text.lines().find_map(|line| {
            let (key, value) = line.split_once('=')?;
            let value = value.trim().trim_matches('"');
            (key.trim() == name && Label::parse(value).is_some()).then(|| value.to_owned())
        })
    };
    Some(Defaults {
        process: of("process")?,
        file: of("file")?,
    })
}

/// The two categories of a pod, ascending and different.
pub fn categories(pod: &PodId) -> (u32, u32) {
    // FNV-1a over the id, which is random already: this only folds it.
    let hash = pod
        .as_str()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3_u64)
        });
    // Below the number of categories, so it fits.
    let first = (hash % u64::from(CATEGORIES)) as u32;
    let offset = (hash / u64::from(CATEGORIES) % u64::from(CATEGORIES - 1)) as u32 + 1;
    let second = (first + offset) % CATEGORIES;
    (first.min(second), first.max(second))
}

/// Labels of a container: its own options over the pod's over the policy's; a privileged process
/// has none and runs as what started it.
///
/// # Errors
/// InvalidArgument for an option that would be more than one part of a label, or a level that is
/// none.
pub fn labels(
    defaults: &Defaults,
    sandbox: Option<&SeLinuxOption>,
    container: Option<&SeLinuxOption>,
    pod: &PodId,
    privileged: bool,
) -> Result<SelinuxLabels, Error> {
    let broken = || Error::Internal {
        field: "resolved.selinux".into(),
        reason: "the policy's contexts are no labels".into(),
    };
    let mut process = Label::parse(&defaults.process).ok_or_else(broken)?;
    let mut file = Label::parse(&defaults.file).ok_or_else(broken)?;
    let (first, second) = categories(pod);
    let level = format!("s0:c{first},c{second}");
    process.level.clone_from(&level);
    file.level = level;

    for options in [sandbox, container].into_iter().flatten() {
        check(options)?;
        let set = |part: &mut String, value: &String| {
            if !value.is_empty() {
                part.clone_from(value);
            }
        };
        set(&mut process.user, &options.user);
        set(&mut process.role, &options.role);
        set(&mut process.kind, &options.r#type);
        set(&mut process.level, &options.level);
        // Files have a role and a type of their own.
        set(&mut file.user, &options.user);
        set(&mut file.level, &options.level);
    }
    Ok(SelinuxLabels {
        process: if privileged {
            String::new()
        } else {
            process.text()
        },
        mount: file.text(),
    })
}

/// Checks options whether SELinux is on or not, so that a bad request fails everywhere.
///
/// # Errors
/// As [`labels`].
pub fn check(options: &SeLinuxOption) -> Result<(), Error> {
    let field = |name: &str| format!("linux.security_context.selinux_options.{name}");
    for (name, value) in [
        ("user", &options.user),
        ("role", &options.role),
        ("type", &options.r#type),
    ] {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        if !value.bytes().all(plain) {
            return Err(Error::invalid(
                field(name),
                format!("{value:?} is no part of a label"),
            ));
        }
    }
    if !options.level.is_empty() && !is_level(&options.level) {
        return Err(Error::invalid(
            field("level"),
            format!("{:?} is no level", options.level),
        ));
    }
    Ok(())
}

/// `s0`, `s0:c1,c2`, `s0-s0:c0.c1023`.
fn is_level(text: &str) -> bool {
    let number = |text: &str, prefix: char, digits: usize| {
        text.strip_prefix(prefix).is_some_and(|rest| {
            (1..=digits).contains(&rest.len()) && rest.bytes().all(|byte| byte.is_ascii_digit())
        })
    };
    let (sensitivity, categories) = match text.split_once(':') {
        Some((sensitivity, categories)) => (sensitivity, Some(categories)),
        None => (text, None),
    };
    let category = |one: &str| one.splitn(2, '.').all(|end| number(end, 'c', 4));
    sensitivity.splitn(2, '-').all(|end| number(end, 's', 2))
        && categories.is_none_or(|list| list.split(',').all(category))
}

struct Label {
    user: String,
    role: String,
    kind: String,
    level: String,
}

impl Label {
    /// A level has colons of its own.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(4, ':').map(str::to_owned);
        let label = Self {
            user: parts.next()?,
            role: parts.next()?,
            kind: parts.next()?,
            level: parts.next()?,
        };
        is_level(&label.level).then_some(label)
    }

    fn text(&self) -> String {
        format!("{}:{}:{}:{}", self.user, self.role, self.kind, self.level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXTS: &str = "process = \"system_u:system_r:container_t:s0\"\n\
        content = \"system_u:object_r:virt_var_lib_t:s0\"\n\
        file = \"system_u:object_r:container_file_t:s0\"\n";

    fn pod() -> PodId {
        PodId::from_random([7; 32])
    }

    fn level(text: &str) -> SeLinuxOption {
        SeLinuxOption {
            level: text.into(),
            ..Default::default()
        }
    }

    #[test]
    fn options_of_the_container_go_over_those_of_the_pod() {
        let defaults = defaults(CONTEXTS).unwrap();
        let (first, second) = categories(&pod());
        assert!(first < second && second < CATEGORIES);
        let plain = labels(&defaults, None, None, &pod(), false).unwrap();
        let own = format!("s0:c{first},c{second}");
        assert_eq!(
            plain.process,
            format!("system_u:system_r:container_t:{own}")
        );
        assert_eq!(
            plain.mount,
            format!("system_u:object_r:container_file_t:{own}")
        );

        let sandbox = level("s0:c1,c2");
        let container = SeLinuxOption {
            r#type: "spc_t".into(),
            ..Default::default()
        };
        let both = labels(&defaults, Some(&sandbox), Some(&container), &pod(), false).unwrap();
        assert_eq!(both.process, "system_u:system_r:spc_t:s0:c1,c2");
        assert_eq!(both.mount, "system_u:object_r:container_file_t:s0:c1,c2");
        let privileged = labels(&defaults, Some(&sandbox), None, &pod(), true).unwrap();
        assert_eq!(privileged.process, "");
        assert_eq!(privileged.mount, both.mount);
    }

    #[test]
    fn categories_follow_from_the_id_and_are_spread() {
        let mut seen = std::collections::HashSet::new();
        for n in 0..=255_u8 {
            let id = PodId::from_random([n; 32]);
            assert_eq!(categories(&id), categories(&id));
            seen.insert(categories(&id));
        }
        assert!(seen.len() > 240, "{}", seen.len());
    }

    #[test]
    fn what_is_no_part_of_a_label_is_refused() {
        for good in ["s0", "s0:c1,c2", "s0-s15:c0.c1023", "s1:c0"] {
            assert!(check(&level(good)).is_ok(), "{good}");
        }
        for bad in [
            "c1",
            "s0:",
            "s0:c1:c2",
            "s0:c12345",
            "s0,c1",
            "s0:x1",
            "s",
            "s0 ",
        ] {
            assert!(check(&level(bad)).is_err(), "{bad}");
        }
        let bad = SeLinuxOption {
            r#type: "container_t:s0".into(),
            ..Default::default()
        };
        let error = check(&bad).unwrap_err().to_string();
        assert!(error.contains("selinux_options.type"), "{error}");
        assert!(defaults("process = \"a:b\"\n").is_none());
    }
}
