//! What `features` prints (OCI runtime-spec, features.md), as far as we use it.

use serde::Deserialize;

/// Capabilities of a runtime. Every field of the document is optional, and absent means unknown,
/// which we read as no.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Features {
    pub oci_version_min: String,
    pub oci_version_max: String,
    /// Mount options known; `rro` among them means recursive read-only mounts.
    pub mount_options: Vec<String>,
    pub linux: Linux,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    pub namespaces: Vec<String>,
    pub cgroup: Cgroup,
    pub seccomp: Enabled,
    pub apparmor: Enabled,
    pub selinux: Enabled,
    pub mount_extensions: MountExtensions,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Cgroup {
    pub v1: bool,
    pub v2: bool,
    pub systemd: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Enabled {
    pub enabled: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct MountExtensions {
    pub idmap: Enabled,
}

impl Features {
    pub fn parse(json: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(json)
    }

    /// CRI `recursive_read_only_mounts`.
    pub fn recursive_read_only_mounts(&self) -> bool {
        self.mount_options.iter().any(|option| option == "rro")
    }

    /// CRI `user_namespaces`: the namespace itself, and mounts that map ids into it.
    pub fn user_namespaces(&self) -> bool {
        self.linux.namespaces.iter().any(|name| name == "user")
            && self.linux.mount_extensions.idmap.enabled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_means_no() {
        let none = Features::parse("{}").unwrap();
        assert!(!none.recursive_read_only_mounts() && !none.user_namespaces());
        let all = Features::parse(
            r#"{"ociVersionMin":"1.0.0","mountOptions":["ro","rro"],"linux":{"namespaces":["user"],
                "cgroup":{"v1":true},"mountExtensions":{"idmap":{"enabled":true}},"x":1}}"#,
        )
        .unwrap();
        assert!(all.recursive_read_only_mounts() && all.user_namespaces());
        assert!(all.linux.cgroup.v1 && !all.linux.cgroup.v2);
        assert!(Features::parse("no json").is_err());
    }
}
