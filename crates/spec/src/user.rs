//! Who a container's first process is: CRI's run-as fields over the image's USER, looked up in the
//! image's own passwd and group files.
//!
//! Image and files are hostile input. A user that is all digits is a number, never a name: a
//! number too large for a user id must not reach a crafted line of passwd, nor wrap to root
//! (CVE-2024-40635).

use gantry_cri_api::v1::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};

use crate::Error;

/// Largest /etc/passwd and /etc/group that are read. The reader stops here, and takes regular
/// files only.
pub const MAX_FILE_SIZE: usize = 10 << 20;

/// Ids are 0 to 2^31 - 1: what Kubernetes allows, and what no tool takes for negative.
pub const MAX_ID: u32 = i32::MAX as u32;

/// NGROUPS_MAX of the kernel (setgroups(2)).
const MAX_GROUPS: usize = 65536;

/// A resolved user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups; the primary one is among them, so that a process that drops it does
    /// not gain what a file denies to the group (CVE-2023-25173).
    pub additional_gids: Vec<u32>,
}

/// Contents of the image's /etc/passwd and /etc/group; empty when there is none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Files<'a> {
    pub passwd: &'a [u8],
    pub group: &'a [u8],
}

/// Resolves the user of a container. `image_user` is the image's `config.User`: empty, `uid`,
/// `uid:gid`, `name`, `name:group` or a mixture; empty means root.
///
/// # Errors
/// InvalidArgument for a group without a user, an id out of range, a name that the image does not
/// know, files beyond [`MAX_FILE_SIZE`], too many groups.
pub fn resolve(
    context: Option<&LinuxContainerSecurityContext>,
    image_user: &str,
    files: Files<'_>,
) -> Result<User, Error> {
    check_size("/etc/passwd", files.passwd)?;
    check_size("/etc/group", files.group)?;

    let asked = Asked::new(context, image_user)?;
    let account = asked.account(files)?;
    let gid = match asked.group {
        Some(group) => group.gid(files)?,
        None => account.gid,
    };

    let mut gids = vec![gid];
    if let (SupplementalGroupsPolicy::Merge, Some(name)) = (asked.policy, account.name) {
        gids.extend(groups_of(name, files.group));
    }
    for &id in asked.supplemental {
        gids.push(checked_id(
            "linux.security_context.supplemental_groups",
            id,
        )?);
    }
    Ok(User {
        uid: account.uid,
        gid,
        additional_gids: distinct(gids)?,
    })
}

/// A user or group as it is written: all digits is a number.
#[derive(Clone, Copy, Debug)]
enum Ident<'a> {
    Number(u32),
    Name { field: &'static str, name: &'a str },
}

impl<'a> Ident<'a> {
    fn parse(field: &'static str, text: &'a str) -> Result<Self, Error> {
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Ok(Self::Name { field, name: text });
        }
        match text.parse::<u32>() {
            Ok(id) if id <= MAX_ID => Ok(Self::Number(id)),
            _ => Err(out_of_range(field, text)),
        }
    }

    /// The group of this name or number; a number need not be in the file.
    fn gid(self, files: Files<'_>) -> Result<u32, Error> {
        match self {
            Self::Number(gid) => Ok(gid),
            Self::Name { field, name } => {
                let found = groups(files.group).find(|group| group.name == name.as_bytes());
                let group = found.ok_or_else(|| unknown(field, name, "/etc/group"))?;
                checked_id(field, i64::from(group.gid))
            }
        }
    }
}

/// What is asked for, once it is settled which of CRI and image speaks.
struct Asked<'a> {
    user: Ident<'a>,
    group: Option<Ident<'a>>,
    supplemental: &'a [i64],
    policy: SupplementalGroupsPolicy,
}

impl<'a> Asked<'a> {
    fn new(
        context: Option<&'a LinuxContainerSecurityContext>,
        image_user: &'a str,
    ) -> Result<Self, Error> {
        let (run_as_user, run_as_group) = context
            .map(|context| (context.run_as_user.as_ref(), context.run_as_group.as_ref()))
            .unwrap_or_default();
        let username = context.map_or("", |context| context.run_as_username.as_str());

        let mut group = None;
        let user = if let Some(id) = run_as_user {
            Ident::Number(checked_id("linux.security_context.run_as_user", id.value)?)
        } else if !username.is_empty() {
            Ident::parse("linux.security_context.run_as_username", username)?
        } else if run_as_group.is_some() {
            return Err(Error::invalid(
                "linux.security_context.run_as_group",
                "needs run_as_user or run_as_username",
            ));
        } else {
            let (name, group_name) = match image_user.split_once(':') {
                Some((name, group)) => (name, Some(group)),
                None => (image_user, None),
            };
            if let Some(text) = group_name.filter(|text| !text.is_empty()) {
                group = Some(Ident::parse("image config User", text)?);
            }
            if name.is_empty() {
                Ident::Number(0)
            } else {
                Ident::parse("image config User", name)?
            }
        };
        if let Some(id) = run_as_group {
            let id = checked_id("linux.security_context.run_as_group", id.value)?;
            group = Some(Ident::Number(id));
        }
        let policy = match context {
            Some(context) => SupplementalGroupsPolicy::try_from(context.supplemental_groups_policy)
                .map_err(|unknown| {
                    Error::invalid(
                        "linux.security_context.supplemental_groups_policy",
                        unknown.to_string(),
                    )
                })?,
            None => SupplementalGroupsPolicy::Merge,
        };
        let supplemental = context.map_or(&[][..], |context| &context.supplemental_groups);
        Ok(Self {
            user,
            group,
            supplemental,
            policy,
        })
    }

    /// The user's line of passwd. A number without one is a user of group 0 without a name.
    fn account<'f>(&self, files: Files<'f>) -> Result<Account<'f>, Error> {
        match self.user {
            Ident::Number(uid) => {
                let found = accounts(files.passwd).find(|account| account.uid == uid);
                let account = found.unwrap_or(Account {
                    name: None,
                    uid,
                    gid: 0,
                });
                checked_id("/etc/passwd", i64::from(account.gid))?;
                Ok(account)
            }
            Ident::Name { field, name } => {
                let found =
                    accounts(files.passwd).find(|account| account.name == Some(name.as_bytes()));
                let account = found.ok_or_else(|| unknown(field, name, "/etc/passwd"))?;
                checked_id(field, i64::from(account.uid))?;
                checked_id(field, i64::from(account.gid))?;
                Ok(account)
            }
        }
    }
}

/// One line of passwd(5).
struct Account<'a> {
    name: Option<&'a [u8]>,
    uid: u32,
    gid: u32,
}

/// One line of group(5).
struct Group<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

/// Lines of passwd that are well formed; others are passed over, as getpwent(3) does.
fn accounts(passwd: &[u8]) -> impl Iterator<Item = Account<'_>> {
    lines(passwd).filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b':');
        let name = fields.next()?;
        let (uid, gid) = (number(fields.nth(1)?)?, number(fields.next()?)?);
        Some(Account {
            name: Some(name),
            uid,
            gid,
        })
    })
}

/// Lines of group that are well formed.
fn groups(group: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b':');
        let name = fields.next()?;
        let gid = number(fields.nth(1)?)?;
        Some(Group {
            name,
            gid,
            members: fields.next().unwrap_or_default(),
        })
    })
}

/// Groups whose member list names the user.
fn groups_of<'a>(user: &'a [u8], group: &'a [u8]) -> impl Iterator<Item = u32> + 'a {
    groups(group)
        .filter(move |group| {
            group
                .members
                .split(|&byte| byte == b',')
                .any(|name| name == user)
        })
        // A group that nobody could ask for by number is not given by name either.
        .filter(|group| group.gid <= MAX_ID)
        .map(|group| group.gid)
}

/// Lines without comments and blank ones; a line that starts with a colon has no name.
fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file.split(|&byte| byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .filter(|line| !line.is_empty() && !line.starts_with(b"#") && !line.starts_with(b":"))
}

fn number(field: &[u8]) -> Option<u32> {
    if field.is_empty() || !field.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn distinct(gids: Vec<u32>) -> Result<Vec<u32>, Error> {
    let mut seen = std::collections::HashSet::new();
    let kept: Vec<u32> = gids.into_iter().filter(|gid| seen.insert(*gid)).collect();
    if kept.len() > MAX_GROUPS {
        return Err(Error::invalid(
            "linux.security_context.supplemental_groups",
            format!(
                "{} groups, of which the kernel takes {MAX_GROUPS}",
                kept.len()
            ),
        ));
    }
    Ok(kept)
}

fn check_size(path: &str, content: &[u8]) -> Result<(), Error> {
    if content.len() > MAX_FILE_SIZE {
        return Err(Error::invalid(
            path,
            format!("larger than {MAX_FILE_SIZE} bytes"),
        ));
    }
    Ok(())
}

fn checked_id(field: &str, id: i64) -> Result<u32, Error> {
    u32::try_from(id)
        .ok()
        .filter(|id| *id <= MAX_ID)
        .ok_or_else(|| out_of_range(field, &id.to_string()))
}

fn out_of_range(field: &str, id: &str) -> Error {
    let shown: String = id.chars().take(80).collect();
    Error::invalid(field, format!("id {shown} is not within 0 to {MAX_ID}"))
}

fn unknown(field: &str, name: &str, file: &str) -> Error {
    let shown: String = name.chars().take(80).collect();
    Error::invalid(field, format!("{shown:?} is not in the image's {file}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_cri_api::v1::Int64Value;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        # comment:x:7:7::/:\n\
        broken:x:notanumber:5::/:\n\
        +nis::::::\n\
        web:x:101:102:,,,:/srv:/bin/false\r\n\
        caf\xff:x:103:103::/:\n\
        99999999999:x:0:0:trap:/:\n\
        2147483648:x:0:0:trap:/:\n\
        huge:x:4294967295:0::/:\n\
        nobody:x:65534:65534::/:";
    const GROUP: &[u8] = b"root:x:0:root\n\
        www:x:102:\n\
        disk:x:6:web,root\n\
        video:x:44:other,web\n\
        webby:x:45:webster\n\
        big:x:4294967295:web\n";
    const FILES: Files<'static> = Files {
        passwd: PASSWD,
        group: GROUP,
    };

    fn context() -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext::default()
    }

    fn id(value: i64) -> Option<Int64Value> {
        Some(Int64Value { value })
    }

    fn of_image(user: &str) -> Result<(u32, u32, Vec<u32>), Error> {
        resolve(None, user, FILES).map(|user| (user.uid, user.gid, user.additional_gids))
    }

    #[test]
    fn forms_of_an_image_user() {
        assert_eq!(of_image("").unwrap(), (0, 0, vec![0, 6]));
        assert_eq!(of_image("0").unwrap(), (0, 0, vec![0, 6]));
        assert_eq!(of_image("web").unwrap(), (101, 102, vec![102, 6, 44]));
        assert_eq!(of_image("101").unwrap(), (101, 102, vec![102, 6, 44]));
        assert_eq!(of_image("5000").unwrap(), (5000, 0, vec![0]));
        assert_eq!(of_image("5000:6000").unwrap(), (5000, 6000, vec![6000]));
        assert_eq!(of_image("web:www").unwrap(), (101, 102, vec![102, 6, 44]));
        assert_eq!(of_image("web:7").unwrap(), (101, 7, vec![7, 6, 44]));
        assert_eq!(of_image("web:").unwrap(), (101, 102, vec![102, 6, 44]));
        assert_eq!(of_image(":www").unwrap(), (0, 102, vec![102, 0, 6]));
        assert_eq!(of_image("2147483647:2147483647").unwrap().0, 2147483647);
    }

    #[test]
    fn a_number_is_never_looked_up_as_a_name() {
        for user in [
            "2147483648",
            "4294967296",
            "99999999999",
            "18446744073709551616",
            "0:4294967296",
        ] {
            let error = of_image(user).unwrap_err().to_string();
            assert!(
                error.contains("is not within 0 to 2147483647"),
                "{user}: {error}"
            );
        }
    }

    #[test]
    fn names_that_the_image_does_not_know_are_refused() {
        for user in [
            "ghost",
            "-1",
            "+0",
            "1000x",
            "broken",
            "# comment",
            "0x0",
            " 0",
            "web:ghosts",
        ] {
            assert!(of_image(user).is_err(), "{user}");
        }
        assert!(
            of_image("huge")
                .unwrap_err()
                .to_string()
                .contains("4294967295")
        );
        assert!(of_image("web:big").is_err());
    }

    #[test]
    fn cri_goes_before_the_image() {
        let by_id = LinuxContainerSecurityContext {
            run_as_user: id(101),
            ..context()
        };
        let user = resolve(Some(&by_id), "nobody", FILES).unwrap();
        assert_eq!((user.uid, user.gid), (101, 102));

        let by_name = LinuxContainerSecurityContext {
            run_as_username: "web".into(),
            run_as_group: id(7),
            ..context()
        };
        let user = resolve(Some(&by_name), "nobody", FILES).unwrap();
        assert_eq!(
            (user.uid, user.gid, user.additional_gids),
            (101, 7, vec![7, 6, 44])
        );

        // The group of the image's USER belongs to the image's user.
        let other = LinuxContainerSecurityContext {
            run_as_user: id(5000),
            ..context()
        };
        assert_eq!(resolve(Some(&other), "web:www", FILES).unwrap().gid, 0);
    }

    #[test]
    fn a_group_alone_is_an_error() {
        let group = LinuxContainerSecurityContext {
            run_as_group: id(7),
            ..context()
        };
        let error = resolve(Some(&group), "web", FILES).unwrap_err().to_string();
        assert!(
            error.starts_with("linux.security_context.run_as_group:"),
            "{error}"
        );
    }

    #[test]
    fn ids_of_cri_are_bounded_too() {
        for bad in [-1, 1 << 31, 1 << 32, i64::MAX, i64::MIN] {
            for context in [
                LinuxContainerSecurityContext {
                    run_as_user: id(bad),
                    ..context()
                },
                LinuxContainerSecurityContext {
                    run_as_user: id(1),
                    run_as_group: id(bad),
                    ..context()
                },
                LinuxContainerSecurityContext {
                    supplemental_groups: vec![bad],
                    ..context()
                },
            ] {
                assert!(resolve(Some(&context), "", FILES).is_err(), "{bad}");
            }
        }
    }

    #[test]
    fn strict_leaves_the_groups_of_the_image_out_and_keeps_the_primary_one() {
        let strict = LinuxContainerSecurityContext {
            run_as_username: "web".into(),
            supplemental_groups: vec![9, 9, 102],
            supplemental_groups_policy: SupplementalGroupsPolicy::Strict.into(),
            ..context()
        };
        assert_eq!(
            resolve(Some(&strict), "", FILES).unwrap().additional_gids,
            vec![102, 9]
        );
        let merge = LinuxContainerSecurityContext {
            supplemental_groups_policy: 0,
            ..strict
        };
        assert_eq!(
            resolve(Some(&merge), "", FILES).unwrap().additional_gids,
            vec![102, 6, 44, 9]
        );
        let junk = LinuxContainerSecurityContext {
            supplemental_groups_policy: 9,
            ..merge
        };
        assert!(resolve(Some(&junk), "", FILES).is_err());
    }

    #[test]
    fn an_image_without_the_files_still_has_numbers() {
        let user = resolve(None, "12:13", Files::default()).unwrap();
        assert_eq!((user.uid, user.gid), (12, 13));
        assert!(resolve(None, "web", Files::default()).is_err());
    }

    #[test]
    fn files_and_groups_are_bounded() {
        let huge = vec![b'x'; MAX_FILE_SIZE + 1];
        assert!(
            resolve(
                None,
                "",
                Files {
                    passwd: &huge,
                    group: b""
                }
            )
            .is_err()
        );
        assert!(
            resolve(
                None,
                "",
                Files {
                    passwd: b"",
                    group: &huge
                }
            )
            .is_err()
        );
        let many = LinuxContainerSecurityContext {
            supplemental_groups: (1..=70_000).collect(),
            ..context()
        };
        assert!(resolve(Some(&many), "", FILES).is_err());
    }
}
