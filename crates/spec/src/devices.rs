//! Device nodes and what the device cgroup allows.

use std::collections::BTreeMap;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use crate::Error;
use crate::container::{Draft, Input};
use crate::resolved::{Device, DeviceKind};

/// Step: nodes, and the rules that make them usable. The runtime adds /dev/null and its like by
/// itself.
pub(crate) fn devices(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let resolved = input.resolved;
    let mut rules = vec![rule(None, input.privileged(), "rwm")];
    // By path: the request's devices replace those that come with privilege.
    let mut nodes = BTreeMap::new();
    if input.privileged() {
        nodes.extend(
            resolved
                .host_devices
                .iter()
                .map(|device| (&device.path, device)),
        );
    }
    for device in &resolved.devices {
        check(device)?;
        nodes.insert(&device.path, device);
        if !input.privileged() {
            rules.push(rule(Some(device), true, &device.access));
        }
    }

    draft
        .linux
        .set_devices(Some(nodes.into_values().map(node).collect()));
    let resources = draft
        .linux
        .resources_mut()
        .get_or_insert_with(LinuxResources::default);
    resources.set_devices(Some(rules));
    Ok(())
}

fn check(device: &Device) -> Result<(), Error> {
    let field = || format!("devices[{}]", device.path.display());
    if !device.path.is_absolute() {
        return Err(Error::invalid(field(), "container_path is not absolute"));
    }
    if device.access.is_empty() || !device.access.bytes().all(|byte| b"rwm".contains(&byte)) {
        return Err(Error::invalid(
            field(),
            format!("permissions {:?} are not of r, w and m", device.access),
        ));
    }
    Ok(())
}

fn kind(device: &Device) -> LinuxDeviceType {
    match device.kind {
        DeviceKind::Block => LinuxDeviceType::B,
        DeviceKind::Character => LinuxDeviceType::C,
    }
}

fn node(device: &Device) -> LinuxDevice {
    let mut node = LinuxDevice::default();
    node.set_path(device.path.clone())
        .set_typ(kind(device))
        .set_major(device.major.into())
        .set_minor(device.minor.into())
        .set_file_mode(Some(device.mode & 0o7777))
        .set_uid(Some(device.uid))
        .set_gid(Some(device.gid));
    node
}

/// `None` stands for every device.
fn rule(device: Option<&Device>, allow: bool, access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow)
        .set_typ(device.map(kind))
        .set_major(device.map(|device| device.major.into()))
        .set_minor(device.map(|device| device.minor.into()))
        .set_access(Some(access.to_owned()));
    rule
}
