//! Kernel parameters that a pod may set: only those that belong to its own namespaces.

use std::path::PathBuf;

use crate::Error;

/// Longest value that is accepted, in bytes; the kernel takes a page.
const MAX_VALUE: usize = 4096;

/// Checks one kernel parameter and returns its path below /proc/sys.
///
/// Names are written with dots or with slashes; the first of either in the name says which
/// (sysctl(8)), so that interface names with dots can be given: `net/ipv4/conf/eth0.1/forwarding`.
///
/// # Errors
/// InvalidArgument for a name that is not in a namespace of the pod, one whose namespace is the
/// host's (CVE-2022-0532), or a value that carries more than one setting (CVE-2022-0811).
pub fn validate(
    name: &str,
    value: &str,
    host_network: bool,
    host_ipc: bool,
) -> Result<PathBuf, Error> {
    let field = || {
        format!(
            "linux.sysctls[{}]",
            name.chars().take(120).collect::<String>()
        )
    };
    let invalid = |reason: &str| Error::invalid(field(), reason);

    let path = canonical(name).ok_or_else(|| invalid("is not the name of a kernel parameter"))?;
    match namespace(&path) {
        Some(Scope::Network) if host_network => {
            return Err(invalid("belongs to the host's network namespace"));
        }
        Some(Scope::Ipc) if host_ipc => {
            return Err(invalid("belongs to the host's ipc namespace"));
        }
        Some(Scope::Network | Scope::Ipc) => {}
        None => return Err(invalid("is not namespaced: it would change the whole node")),
    }
    if value.len() > MAX_VALUE {
        return Err(invalid("has a value longer than a page"));
    }
    // Lists and ranges are written with blanks, tabs, commas, colons and hyphens; the rest of
    // punctuation has no use in a value, and `+` or `=` once led to a second setting.
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b" \t._,:/-".contains(&byte);
    if !value.bytes().all(plain) {
        return Err(invalid(
            "has a value with characters that no kernel parameter needs",
        ));
    }
    Ok(PathBuf::from(path))
}

enum Scope {
    Network,
    Ipc,
}

/// The namespace that a parameter belongs to, by the kernel's documentation
/// (Documentation/admin-guide/sysctl) and namespaces(7).
fn namespace(path: &str) -> Option<Scope> {
    let ipc = ["kernel/shm", "kernel/msg"].iter().any(|prefix| {
        // kernel/shmmax and its like, no deeper.
        path.strip_prefix(prefix)
            .is_some_and(|rest| !rest.contains('/'))
    });
    if ipc || path == "kernel/sem" || path.starts_with("fs/mqueue/") {
        Some(Scope::Ipc)
    } else if path.starts_with("net/") {
        Some(Scope::Network)
    } else {
        None
    }
}

/// The path below /proc/sys, each part of it checked.
fn canonical(name: &str) -> Option<String> {
    let swap = |c: char| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let path: String = match name.find(['.', '/']) {
        Some(at) if name[at..].starts_with('.') => name.chars().map(swap).collect(),
        _ => name.to_owned(),
    };
    let good = |part: &str| {
        let byte = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
        !part.is_empty() && part.bytes().all(byte) && part != "." && part != ".."
    };
    (path.len() < 256 && path.split('/').all(good)).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> Result<String, Error> {
        validate(name, "1", false, false).map(|path| path.to_str().unwrap().to_owned())
    }

    #[test]
    fn namespaced_names_are_allowed() {
        for (name, expected) in [
            ("kernel.shm_rmid_forced", "kernel/shm_rmid_forced"),
            ("kernel.msgmax", "kernel/msgmax"),
            ("kernel.sem", "kernel/sem"),
            ("fs.mqueue.msg_max", "fs/mqueue/msg_max"),
            ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
            ("net/ipv4/ip_forward", "net/ipv4/ip_forward"),
            (
                "net/ipv4/conf/eth0.1/forwarding",
                "net/ipv4/conf/eth0.1/forwarding",
            ),
            (
                "net.ipv4.conf.eth0/1.forwarding",
                "net/ipv4/conf/eth0.1/forwarding",
            ),
        ] {
            assert_eq!(path(name).unwrap(), expected);
        }
    }

    #[test]
    fn others_are_refused() {
        for name in [
            "",
            "kernel.core_pattern",
            "vm.swappiness",
            "fs.file-max",
            "kernel.semx",
            "network.x",
            "kernel.shm/../core_pattern",
            "net.",
            "net",
            ".net.ipv4",
            "net..ipv4",
            "net/../kernel/x",
            "net/./x",
            "net.ipv4\0",
            "net.ipv4 x",
            "/net/ipv4/ip_forward",
            "kernel.shm.x.y",
            "net.ipv4.x\n",
        ] {
            assert!(path(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_value_is_one_setting() {
        for value in [
            "1+kernel.core_pattern=|/bin/evil",
            "1\nx",
            "1=2",
            "a;b",
            "$(x)",
            "1\0",
            "é",
        ] {
            assert!(
                validate("kernel.shm_rmid_forced", value, false, false).is_err(),
                "{value:?}"
            );
        }
        for value in [
            "",
            "0",
            "4096 87380\t6291456",
            "32768-60999",
            "0,1:2",
            "fq_codel",
            "-1",
        ] {
            assert!(
                validate("net.ipv4.tcp_rmem", value, false, false).is_ok(),
                "{value:?}"
            );
        }
        assert!(validate("net.x", &"1".repeat(5000), false, false).is_err());
    }

    #[test]
    fn parameters_of_host_namespaces_are_refused() {
        assert!(validate("net.ipv4.ip_forward", "1", true, false).is_err());
        assert!(validate("net.ipv4.ip_forward", "1", false, true).is_ok());
        for ipc in ["kernel.msgmax", "kernel.sem", "fs.mqueue.msg_max"] {
            assert!(validate(ipc, "1", false, true).is_err(), "{ipc}");
            assert!(validate(ipc, "1", true, false).is_ok(), "{ipc}");
        }
    }
}
