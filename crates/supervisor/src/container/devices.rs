//! Device nodes of the host.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use gantry_cri_api::v1 as cri;
use gantry_spec::resolved::{Device, DeviceKind};

use crate::Error;

/// Directories below /dev whose nodes belong to something other than the machine.
const NOT_DEVICES: [&str; 6] = ["pts", "shm", "fd", "mqueue", "hugepages", "console"];

/// The request's devices; a directory stands for the nodes below it. With `own` they belong to
/// the user that the request runs as.
pub(super) fn asked(config: &cri::ContainerConfig, own: bool) -> Result<Vec<Device>, Error> {
    let mut devices = Vec::new();
    for (n, asked) in config.devices.iter().enumerate() {
        let field = || format!("devices[{n}].host_path");
        let host = Path::new(&asked.host_path);
        let real = fs::canonicalize(host).map_err(|error| Error::Invalid {
            field: field(),
            reason: format!("{}: {error}", host.display()),
        })?;
        let target = if asked.container_path.is_empty() {
            host
        } else {
            asked.container_path.as_ref()
        };
        if real.is_dir() {
            for mut device in of_host(&real)? {
                let below = device
                    .path
                    .strip_prefix(&real)
                    .unwrap_or(&device.path)
                    .to_owned();
                device.path = target.join(below);
                device.access.clone_from(&asked.permissions);
                devices.push(device);
            }
            continue;
        }
        let device = device(&real, target, &asked.permissions)
            .map_err(|error| Error::io("resolve device", &real, &error))?
            .ok_or_else(|| Error::Invalid {
                field: field(),
                reason: format!("{} is not a device", real.display()),
            })?;
        devices.push(device);
    }
    if own {
        give(&mut devices, config);
    }
    Ok(devices)
}

/// Gives the nodes to the user and group that the request runs as: otherwise somebody else than
/// root needs a group of the host for them.
fn give(devices: &mut [Device], config: &cri::ContainerConfig) {
    let linux = config.linux.as_ref();
    let Some(security) = linux.and_then(|linux| linux.security_context.as_ref()) else {
        return;
    };
    // Out of range is an error of the user's resolution.
    let id = |asked: &Option<cri::Int64Value>| u32::try_from(asked.as_ref()?.value).ok();
    for device in devices {
        device.uid = id(&security.run_as_user).unwrap_or(device.uid);
        device.gid = id(&security.run_as_group).unwrap_or(device.gid);
    }
}

/// The node at `path` as it appears at `target`; `None` when it is no device.
pub(super) fn device(path: &Path, target: &Path, access: &str) -> io::Result<Option<Device>> {
    let metadata = fs::metadata(path)?;
    let kind = if metadata.file_type().is_block_device() {
        DeviceKind::Block
    } else if metadata.file_type().is_char_device() {
        DeviceKind::Character
    } else {
        return Ok(None);
    };
    let number = metadata.rdev();
    Ok(Some(Device {
        path: target.to_owned(),
        kind,
        major: major(number),
        minor: minor(number),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        access: access.to_owned(),
    }))
}

/// makedev(3): Linux splits both numbers.
fn major(number: u64) -> u32 {
    (((number >> 8) & 0xfff) | ((number >> 32) & 0xffff_f000)) as u32
}

fn minor(number: u64) -> u32 {
    ((number & 0xff) | ((number >> 12) & 0xffff_ff00)) as u32
}

/// Every device node below `dir`, at its own path. Symbolic links are not followed: they lead to
/// nodes that are found anyway.
pub(super) fn of_host(dir: &Path) -> Result<Vec<Device>, Error> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        let entries = fs::read_dir(&dir).map_err(|e| Error::io("list devices", &dir, &e))?;
        for entry in entries {
            let entry = entry.map_err(|error| Error::io("list devices", &dir, &error))?;
            let name = entry.file_name();
            if NOT_DEVICES.iter().any(|other| name == **other) {
                continue;
            }
            let path = entry.path();
            // A node may vanish while we look: hot-plugged devices are not worth an error.
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            if kind.is_dir() {
                dirs.push(path);
            } else if (kind.is_char_device() || kind.is_block_device())
                && let Ok(Some(device)) = device(&path, &path, "rwm")
            {
                found.push(device);
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_split_as_the_kernel_does() {
        let null = device(Path::new("/dev/null"), Path::new("/dev/x"), "rw")
            .unwrap()
            .unwrap();
        assert_eq!(
            (null.major, null.minor, null.kind),
            (1, 3, DeviceKind::Character)
        );
        assert_eq!(device(Path::new("/"), Path::new("/x"), "rw").unwrap(), None);
    }

    #[test]
    fn nodes_belong_to_the_user_where_that_is_configured() {
        let mut config = cri::ContainerConfig {
            devices: vec![cri::Device {
                host_path: "/dev/null".into(),
                permissions: "rw".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let owner = |config: &cri::ContainerConfig, own| {
            let devices = asked(config, own).unwrap();
            (devices[0].uid, devices[0].gid)
        };
        let before = owner(&config, false);
        assert_eq!(owner(&config, true), before);
        config
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default()
            .run_as_user = Some(cri::Int64Value { value: 1000 });
        assert_eq!(owner(&config, false), before);
        assert_eq!(owner(&config, true), (1000, before.1));
    }
}
