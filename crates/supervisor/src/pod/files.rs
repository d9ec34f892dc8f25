//! The files that every container of a pod sees: resolv.conf, hosts, hostname, and /dev/shm.

use std::fs;
use std::io::Read;
use std::os::unix::fs::chown;
use std::path::Path;

use gantry_cri_api::v1 as cri;
use gantry_spec::userns::Mapping;

use crate::Error;
use crate::rundir::write_file;

/// Host files are copied into pods: more than this is no resolv.conf.
const MAX_HOST_FILE: u64 = 1 << 20;

/// Writes the pod's files into `dir`.
pub(super) fn write(
    dir: &Path,
    config: &cri::PodSandboxConfig,
    hostname: &str,
    user: Option<Mapping>,
) -> Result<(), Error> {
    let put = |name: &str, text: &[u8]| {
        let path = dir.join(name);
        write_file(&path, text, 0o644)
            // Root of the pod writes them, as it would without a user namespace.
            .and_then(|()| match user {
                Some(user) => chown(&path, Some(user.host_uid), Some(user.host_gid)),
                None => Ok(()),
            })
            .map_err(|error| Error::io("write pod file", &path, &error))
    };
    put("hostname", format!("{hostname}\n").as_bytes())?;
    put("hosts", &host_file(Path::new("/etc/hosts"))?)?;
    match &config.dns_config {
        Some(dns) => put("resolv.conf", resolv_conf(dns)?.as_bytes()),
        None => put("resolv.conf", &host_file(Path::new("/etc/resolv.conf"))?),
    }
}

/// A file of the host; empty when the host has none.
fn host_file(path: &Path) -> Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    match fs::File::open(path) {
        Ok(file) => {
            file.take(MAX_HOST_FILE)
                .read_to_end(&mut text)
                .map_err(|error| Error::io("read host file", path, &error))?;
            Ok(text)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(text),
        Err(error) => Err(Error::io("read host file", path, &error)),
    }
}

/// resolv.conf(5) of a DNSConfig. A line break in a value would add directives of its own.
fn resolv_conf(dns: &cri::DnsConfig) -> Result<String, Error> {
    let lists = [
        ("servers", &dns.servers),
        ("searches", &dns.searches),
        ("options", &dns.options),
    ];
    for (name, values) in lists {
        if let Some(value) = values
            .iter()
            .find(|value| value.contains(['\n', '\r', '\0']))
        {
            return Err(Error::Invalid {
                field: format!("dns_config.{name}"),
                reason: format!("{value:?} has a control character"),
            });
        }
    }
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_every_part_and_no_smuggled_line() {
        let dns = cri::DnsConfig {
            servers: vec!["10.0.0.10".into(), "fd00::a".into()],
            searches: vec!["a.local".into(), "b.local".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(&dns).unwrap(),
            "search a.local b.local\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n"
        );
        let smuggled = cri::DnsConfig {
            servers: vec!["1.1.1.1\nsearch x".into()],
            ..dns
        };
        let error = resolv_conf(&smuggled).unwrap_err();
        assert!(error.to_string().contains("dns_config.servers"), "{error}");
    }
}
