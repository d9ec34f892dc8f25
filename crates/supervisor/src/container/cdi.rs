//! Reading CDI specs, and the device nodes that they name.
//!
//! The directories are read at each request that names a CDI device and never before: what a
//! vendor's plugin has just written is found, and nothing is watched meanwhile.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use gantry_cri_api::v1 as cri;
use gantry_spec::cdi::{self, DeviceNode, Edits, Spec};
use gantry_spec::resolved::{Device, DeviceKind};

use crate::Error;

const STEP: &str = "resolve CDI devices";

/// A spec is some kilobytes.
const MAX_FILE: u64 = 4 << 20;

/// What the request's CDI devices change. A file that cannot be read or used is logged, and said
/// to whoever asks for a device that might have been in it.
pub(super) fn find(dirs: &[PathBuf], config: &cri::ContainerConfig) -> Result<Vec<Edits>, Error> {
    let names = cdi::asked(config).map_err(Error::step(STEP))?;
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    let mut bad = Vec::new();
    for (priority, dir) in dirs.iter().enumerate() {
        for path in list(dir).map_err(|error| Error::io(STEP, dir, &error))? {
            match read(&path) {
                Ok(spec) => files.push(cdi::File {
                    path,
                    priority,
                    spec,
                }),
                Err(reason) => {
                    tracing::warn!(path = %path.display(), reason, "CDI spec cannot be used");
                    bad.push(format!("{}: {reason}", path.display()));
                }
            }
        }
    }
    match cdi::find(&files, &names) {
        Ok(edits) => Ok(edits.into_iter().cloned().collect()),
        Err(error) if bad.is_empty() => Err(Error::step(STEP)(error)),
        Err(error) => Err(Error::Failed {
            step: STEP,
            kind: gantry_types::Kind::kind(&error),
            message: format!("{error}; not usable: {}", bad.join("; ")),
        }),
    }
}

/// The specs of a directory by name; a directory that is absent has none.
fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if matches!(ending, Some("json" | "yaml" | "yml")) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<Spec, String> {
    let read = || -> io::Result<String> {
        let mut text = String::new();
        File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|error| error.to_string())?;
    let one_line = |error: String| error.lines().next().unwrap_or_default().to_owned();
    let spec: Spec = if path.extension().is_some_and(|ending| ending == "json") {
        serde_json::from_str(&text).map_err(|error| one_line(error.to_string()))?
    } else {
        serde_saphyr::from_str(&text).map_err(|error| one_line(error.to_string()))?
    };
    spec.check()?;
    Ok(spec)
}

/// The device nodes of the edits, with what their files on the host tell.
pub(super) fn devices(edits: &[Edits]) -> Result<Vec<Device>, Error> {
    let nodes = edits.iter().flat_map(|edits| &edits.device_nodes);
    nodes.map(node).collect()
}

fn node(node: &DeviceNode) -> Result<Device, Error> {
    let host = match node.host_path.as_os_str().is_empty() {
        true => &node.path,
        false => &node.host_path,
    };
    let access = match node.permissions.as_str() {
        "" => "rwm",
        given => given,
    };
    let kind = match node.r#type.as_str() {
        "b" => Some(DeviceKind::Block),
        "c" | "u" => Some(DeviceKind::Character),
        _ => None,
    };
    let mut device = match (kind, node.major, node.minor) {
        (Some(kind), Some(major), Some(minor)) => Device {
            path: node.path.clone(),
            kind,
            major,
            minor,
            // As runtimes make nodes whose mode nobody gives.
            mode: 0o666,
            uid: 0,
            gid: 0,
            access: access.to_owned(),
        },
        _ => super::devices::device(host, &node.path, access)
            .map_err(|error| Error::io(STEP, host, &error))?
            .ok_or_else(|| Error::State {
                what: "CDI device node",
                id: host.display().to_string(),
                reason: "is not a device".to_owned(),
            })?,
    };
    device.mode = node.file_mode.unwrap_or(device.mode);
    device.uid = node.uid.unwrap_or(device.uid);
    device.gid = node.gid.unwrap_or(device.gid);
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    const YAML: &str = "
cdiVersion: 0.5.0
kind: vendor.com/gpu
devices:
- name: \"0\"
  containerEdits:
    env: [GPU=0]
    deviceNodes:
    - path: /dev/gpu0
      hostPath: /dev/null
      permissions: rw
      fileMode: 432
    - {path: /dev/made, type: b, major: 7, minor: 9, uid: 5}
containerEdits:
  env:
  - VENDOR=yes
";

    fn config(name: &str) -> cri::ContainerConfig {
        cri::ContainerConfig {
            cdi_devices: vec![cri::CdiDevice { name: name.into() }],
            ..Default::default()
        }
    }

    #[test]
    fn specs_are_found_as_they_are_now_and_bad_ones_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = [dir.path().join("absent"), dir.path().to_owned()];
        let find = |name: &str| super::find(&dirs, &config(name));
        assert!(
            super::find(&dirs, &cri::ContainerConfig::default())
                .unwrap()
                .is_empty()
        );
        let missing = find("vendor.com/gpu=0").unwrap_err().to_string();
        assert!(
            missing.contains("vendor.com/gpu=0") && !missing.contains("usable"),
            "{missing}"
        );

        fs::write(dir.path().join("gpu.yaml"), YAML).unwrap();
        fs::write(dir.path().join("ignored.txt"), "x").unwrap();
        let edits = find("vendor.com/gpu=0").unwrap();
        assert_eq!(edits.len(), 2);
        let nodes = devices(&edits).unwrap();
        assert_eq!(
            (nodes[0].major, nodes[0].minor, nodes[0].mode),
            (1, 3, 0o660)
        );
        assert_eq!(nodes[0].path, Path::new("/dev/gpu0"));
        assert_eq!(
            (nodes[1].kind, nodes[1].minor, nodes[1].uid),
            (DeviceKind::Block, 9, 5)
        );

        fs::write(dir.path().join("broken.json"), "{").unwrap();
        fs::write(dir.path().join("broken.yml"), "kind: [").unwrap();
        find("vendor.com/gpu=0").expect("a broken file is in nobody's way");
        let error = find("vendor.com/gpu=1").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("broken.json") && text.contains("broken.yml"),
            "{text}"
        );
        assert!(!text.contains('\n'), "{text}");
        assert_eq!(
            gantry_types::Kind::kind(&error),
            gantry_types::ErrorKind::FailedPrecondition
        );
    }
}
