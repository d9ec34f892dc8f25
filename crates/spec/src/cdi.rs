//! CDI, the Container Device Interface: vendors describe in files what a device needs besides its
//! node, and a request names the device (`vendor.com/class=name`). Follows SPEC.md of
//! cncf-tags/container-device-interface, up to version 1.0.
//!
//! Pure: the reader of the files and of device nodes is the caller.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use gantry_cri_api::v1::ContainerConfig;
use oci_spec::runtime::{Hook, Hooks, LinuxIntelRdt, Mount};
use serde::Deserialize;

use crate::Error;
use crate::container::{Draft, Input};

/// Container annotations whose values are lists of devices: how device plugins asked before CRI
/// had a field for it.
const ANNOTATION: &str = "cdi.k8s.io/";

/// Newest version of the format that we know. What a newer one adds would be an unknown field.
const NEWEST: (u32, u32) = (1, 0);

/// One file. An unknown field is an error: half a device may be worse than none.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    pub cdi_version: String,
    /// `vendor.com/class`.
    pub kind: String,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    pub devices: Vec<Device>,
    /// For whoever gets any of the devices.
    #[serde(default)]
    pub container_edits: Edits,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    pub name: String,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    pub container_edits: Edits,
}

/// What changes in a container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Edits {
    /// `NAME=value`.
    pub env: Vec<String>,
    pub device_nodes: Vec<DeviceNode>,
    pub mounts: Vec<EditMount>,
    pub hooks: Vec<EditHook>,
    pub additional_gids: Vec<u32>,
    pub intel_rdt: Option<LinuxIntelRdt>,
}

/// A node whose numbers the host's file tells where they are not given.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DeviceNode {
    /// In the container.
    pub path: PathBuf,
    /// Empty: the same.
    pub host_path: PathBuf,
    /// `b`, `c`, `u` or `p`; empty: as the host's file is.
    pub r#type: String,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    pub file_mode: Option<u32>,
    /// Of `r`, `w` and `m`; empty means all.
    pub permissions: String,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EditMount {
    pub host_path: PathBuf,
    pub container_path: PathBuf,
    #[serde(default)]
    pub options: Vec<String>,
    #[serde(default)]
    pub r#type: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EditHook {
    /// As the runtime spec calls it: `createContainer`.
    pub hook_name: String,
    pub path: PathBuf,
    #[serde(default)]
    pub args: Vec<String>,
    #[serde(default)]
    pub env: Vec<String>,
    #[serde(default)]
    pub timeout: Option<i64>,
}

impl Spec {
    /// Refuses what the format does not allow.
    ///
    /// # Errors
    /// What is wrong, for whoever wrote the file.
    pub fn check(&self) -> Result<(), String> {
        let version: Vec<u32> = self
            .cdi_version
            .split('.')
            .map_while(|part| part.parse().ok())
            .collect();
        match version[..] {
            [major, minor, _] if (major, minor) <= NEWEST => {}
            _ => return Err(format!("cdiVersion {:?} is not known", self.cdi_version)),
        }
        let class = self.kind.split_once('/');
        if !class.is_some_and(|(vendor, class)| is_name(vendor, "_-.") && is_name(class, "_-")) {
            return Err(format!("kind {:?} is not vendor/class", self.kind));
        }
        let mut names = HashSet::new();
        for device in &self.devices {
            if !is_name(&device.name, "_-.:") || !names.insert(&device.name) {
                return Err(format!(
                    "device name {:?} is malformed or double",
                    device.name
                ));
            }
        }
        let devices = self.devices.iter().map(|device| &device.container_edits);
        devices
            .chain([&self.container_edits])
            .try_for_each(Edits::check)
    }
}

/// Letters, digits and `others`; the ends are letters or digits.
fn is_name(text: &str, others: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric();
    text.starts_with(plain)
        && text.ends_with(plain)
        && text.chars().all(|c| plain(c) || others.contains(c))
}

impl Edits {
    fn check(&self) -> Result<(), String> {
        if let Some(env) = self
            .env
            .iter()
            .find(|env| env.find('=').is_none_or(|at| at == 0))
        {
            return Err(format!("env {env:?} is not NAME=value"));
        }
        if let Some(node) = self.device_nodes.iter().find(|node| {
            !node.path.is_absolute() || !["", "b", "c", "u", "p"].contains(&&*node.r#type)
        }) {
            let path = node.path.display();
            return Err(format!(
                "device node {path}: no absolute path, or no known type"
            ));
        }
        if let Some(mount) = self
            .mounts
            .iter()
            .find(|mount| !mount.container_path.is_absolute())
        {
            let path = mount.container_path.display();
            return Err(format!("mount {path}: containerPath is not absolute"));
        }
        for hook in &self.hooks {
            if !hook.path.is_absolute() {
                return Err(format!(
                    "hook {}: path is not absolute",
                    hook.path.display()
                ));
            }
        }
        hooks(&self.hooks).map(drop)
    }
}

/// Of the runtime spec, config.md, POSIX-platform Hooks.
const HOOKS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// By way of JSON, since the names in the files are those of the runtime spec.
fn hooks(hooks: &[EditHook]) -> Result<Hooks, String> {
    let mut by_name: BTreeMap<&str, Vec<Hook>> = BTreeMap::new();
    for edit in hooks {
        if !HOOKS.contains(&&*edit.hook_name) {
            return Err(format!("hook {:?} is not known", edit.hook_name));
        }
        let mut hook = Hook::default();
        hook.set_path(edit.path.clone())
            .set_args((!edit.args.is_empty()).then(|| edit.args.clone()))
            .set_env((!edit.env.is_empty()).then(|| edit.env.clone()))
            .set_timeout(edit.timeout);
        by_name.entry(&edit.hook_name).or_default().push(hook);
    }
    serde_json::to_value(by_name)
        .and_then(serde_json::from_value)
        .map_err(|error| error.to_string())
}

/// The devices that a request names: in its field first, then in annotations by their names; each
/// once.
///
/// # Errors
/// InvalidArgument for what is not a device's full name.
pub fn asked(config: &ContainerConfig) -> Result<Vec<String>, Error> {
    let fields = config
        .cdi_devices
        .iter()
        .map(|device| ("CDI_devices".to_owned(), device.name.as_str()));
    let annotations = config.annotations.iter();
    let annotations = annotations
        .filter(|(name, _)| name.starts_with(ANNOTATION))
        .flat_map(|(name, list)| {
            let field = format!("annotations[{name}]");
            list.split(',')
                .map(move |device| (field.clone(), device.trim()))
        });
    let mut seen = HashSet::new();
    let mut devices = Vec::new();
    for (field, name) in fields.chain(annotations) {
        if split(name).is_none() {
            let reason = format!("{name:?} is not vendor/class=device");
            return Err(Error::invalid(field, reason));
        }
        if seen.insert(name) {
            devices.push(name.to_owned());
        }
    }
    Ok(devices)
}

/// `vendor/class` and device of a full name.
fn split(name: &str) -> Option<(&str, &str)> {
    let (kind, device) = name.split_once('=')?;
    let (vendor, class) = kind.split_once('/')?;
    let fine = is_name(vendor, "_-.") && is_name(class, "_-") && is_name(device, "_-.:");
    fine.then_some((kind, device))
}

/// A file that was read.
#[derive(Clone, Debug)]
pub struct File {
    pub path: PathBuf,
    /// Place of its directory in the list of them: a later one's devices go before an earlier's.
    pub priority: usize,
    pub spec: Spec,
}

/// The edits for these devices, in order. What a file has for all of its devices comes once,
/// before the first of them.
///
/// # Errors
/// FailedPrecondition for a device that no file has, and for one that two files of one directory
/// have.
pub fn find<'a>(files: &'a [File], names: &[String]) -> Result<Vec<&'a Edits>, Error> {
    let mut used = HashSet::new();
    let mut edits = Vec::new();
    for name in names {
        let field = || format!("CDI_devices[{name}]");
        let (kind, wanted) = split(name).unwrap_or_default();
        let found = files.iter().filter(|file| file.spec.kind == kind);
        let found = found.filter_map(|file| {
            let mut devices = file.spec.devices.iter();
            let device = devices.find(|device| device.name == wanted)?;
            Some((file, device))
        });
        let found: Vec<_> = found.collect();
        let top = found.iter().map(|(file, _)| file.priority).max();
        let mut best = found.iter().filter(|(file, _)| Some(file.priority) == top);
        let Some((file, device)) = best.next() else {
            return Err(Error::precondition(field(), "no CDI spec has this device"));
        };
        if let Some((other, _)) = best.next() {
            let (one, other) = (file.path.display(), other.path.display());
            let reason = format!("{one} and {other} both have this device");
            return Err(Error::precondition(field(), reason));
        }
        if used.insert(&file.path) {
            edits.push(&file.spec.container_edits);
        }
        edits.push(&device.container_edits);
    }
    Ok(edits)
}

/// Step: what CDI devices change beyond their nodes, which are among the other devices.
pub(crate) fn edits(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    for edits in &input.resolved.cdi {
        let env = draft.process.env_mut().get_or_insert_default();
        for variable in &edits.env {
            let name = variable.split('=').next().unwrap_or_default();
            env.retain(|old| old.split('=').next() != Some(name));
            env.push(variable.clone());
        }
        for edit in &edits.mounts {
            let kind = if edit.r#type.is_empty() {
                "bind"
            } else {
                &edit.r#type
            };
            let mut mount = Mount::default();
            mount
                .set_destination(edit.container_path.clone())
                .set_source(Some(edit.host_path.clone()))
                .set_typ(Some(kind.to_owned()))
                .set_options(Some(edit.options.clone()));
            draft.mounts.push(mount);
        }
        let mut user = draft.process.user().clone();
        let mut gids = user.additional_gids().clone().unwrap_or_default();
        for gid in &edits.additional_gids {
            // Group 0 is no device's: the format says to pass it over.
            if *gid != 0 && !gids.contains(gid) {
                gids.push(*gid);
            }
        }
        user.set_additional_gids(Some(gids));
        draft.process.set_user(user);
        if let Some(rdt) = &edits.intel_rdt {
            draft.linux.set_intel_rdt(Some(rdt.clone()));
        }
    }
    let all: Vec<EditHook> = input
        .resolved
        .cdi
        .iter()
        .flat_map(|e| e.hooks.clone())
        .collect();
    if !all.is_empty() {
        let hooks = hooks(&all).map_err(|reason| Error::invalid("CDI_devices", reason))?;
        draft.hooks = Some(hooks);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_cri_api::v1::CdiDevice;

    fn file(path: &str, priority: usize, json: &str) -> File {
        File {
            path: path.into(),
            priority,
            spec: serde_json::from_str(json).unwrap(),
        }
    }

    fn gpu(marker: &str) -> String {
        format!(
            r#"{{"cdiVersion": "0.6.0", "kind": "vendor.com/gpu",
                "containerEdits": {{"env": ["ALL={marker}"]}},
                "devices": [{{"name": "0", "containerEdits": {{"env": ["GPU=0"]}}}},
                            {{"name": "1", "containerEdits": {{"env": ["GPU=1"]}}}}]}}"#
        )
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn fields_come_before_annotations_and_each_device_once() {
        let mut config = ContainerConfig::default();
        assert!(asked(&config).unwrap().is_empty());
        config.cdi_devices = vec![CdiDevice {
            name: "vendor.com/gpu=1".into(),
        }];
        let mut note = |name: &str, value: &str| {
            config.annotations.insert(name.to_owned(), value.to_owned());
        };
        note("cdi.k8s.io/a", "vendor.com/gpu=0, vendor.com/gpu=1");
        note("other/cdi.k8s.io", "nonsense");
        let all = asked(&config).unwrap();
        assert_eq!(all, ["vendor.com/gpu=1", "vendor.com/gpu=0"]);
        for bad in [
            "",
            "gpu",
            "vendor.com/gpu",
            "vendor.com=0",
            "v/c=",
            "v/c=../x",
            "/c=0",
        ] {
            config.annotations.insert("cdi.k8s.io/a".into(), bad.into());
            let error = asked(&config).unwrap_err().to_string();
            assert!(error.starts_with("annotations[cdi.k8s.io/a]"), "{error}");
        }
    }

    #[test]
    fn a_later_directory_goes_before_an_earlier_and_two_alike_are_an_error() {
        let low = file("/etc/cdi/a.json", 0, &gpu("low"));
        let high = file("/run/cdi/a.json", 1, &gpu("high"));
        let env = |files: &[File], wanted: &[&str]| {
            find(files, &names(wanted)).map(|edits| {
                edits
                    .iter()
                    .flat_map(|edits| edits.env.clone())
                    .collect::<Vec<_>>()
            })
        };
        let both = [low.clone(), high.clone()];
        let wanted = ["vendor.com/gpu=1", "vendor.com/gpu=0"];
        assert_eq!(env(&both, &wanted).unwrap(), ["ALL=high", "GPU=1", "GPU=0"]);
        let twice = [low.clone(), file("/etc/cdi/b.json", 0, &gpu("b"))];
        let error = env(&twice, &wanted).unwrap_err().to_string();
        assert!(
            error.contains("/etc/cdi/a.json and /etc/cdi/b.json"),
            "{error}"
        );
        let error = env(&both, &["vendor.com/gpu=7"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "CDI_devices[vendor.com/gpu=7]: no CDI spec has this device"
        );
        assert!(env(&[], &wanted).is_err());
    }

    #[test]
    fn files_that_break_the_format_are_refused() {
        let good: Spec = serde_json::from_str(&gpu("x")).unwrap();
        good.check().unwrap();
        let edit = |edits: &str| {
            let json = format!(
                r#"{{"cdiVersion": "0.6.0", "kind": "v.com/c", "devices": [], "containerEdits": {edits}}}"#
            );
            let spec: Result<Spec, _> = serde_json::from_str(&json);
            spec.map_err(|error| error.to_string())
                .and_then(|spec| spec.check())
        };
        edit(r#"{"hooks": [{"hookName": "createContainer", "path": "/x"}]}"#).unwrap();
        for bad in [
            r#"{"env": ["X"]}"#,
            r#"{"env": ["=x"]}"#,
            r#"{"deviceNodes": [{"path": "dev/x"}]}"#,
            r#"{"deviceNodes": [{"path": "/dev/x", "type": "z"}]}"#,
            r#"{"mounts": [{"hostPath": "/x", "containerPath": "x"}]}"#,
            r#"{"hooks": [{"hookName": "later", "path": "/x"}]}"#,
            r#"{"hooks": [{"hookName": "poststop", "path": "x"}]}"#,
            r#"{"unknown": 1}"#,
        ] {
            assert!(edit(bad).is_err(), "{bad}");
        }
        for (version, kind) in [
            ("9.0.0", "v/c"),
            ("1", "v/c"),
            ("x", "v/c"),
            ("0.6.0", "c"),
            ("0.6.0", "../x"),
        ] {
            let spec = Spec {
                cdi_version: version.into(),
                kind: kind.into(),
                ..good.clone()
            };
            assert!(spec.check().is_err(), "{version} {kind}");
        }
    }
}
