//! One pair a feature: a request built here, and the OCI spec that must come of it in
//! `golden/NAME.json`. `UPDATE_GOLDEN=1` rewrites the files; the diff is the review.
//!
//! All but `minimal` hold only what differs from `minimal`, as a JSON merge patch (RFC 7396).

use std::path::PathBuf;

use gantry_cri_api::v1::security_profile::ProfileType;
use gantry_cri_api::v1::*;
use gantry_spec::resolved::{
    self, AppArmor, Cgroup, CgroupNode, CgroupVersion, DeviceKind, HostMount, KnownCapabilities,
    Namespace, Namespaces, PodFiles, Seccomp, SelinuxLabels, Volume,
};
use gantry_spec::{Error, Resolved, User, capabilities, container, process};
use gantry_types::{ErrorKind, Kind};
use oci_spec::runtime::Spec;
use serde_json::{Map, Value};

/// A request with the facts that belong to it.
struct Case {
    config: ContainerConfig,
    sandbox: PodSandboxConfig,
    resolved: Resolved,
}

impl Case {
    /// What a kubelet asks for a plain container of a plain pod, less what it leaves to defaults.
    fn minimal() -> Self {
        let join = |name: &str| Namespace::Join(format!("/run/gantry/pod/ns/{name}").into());
        Self {
            config: ContainerConfig {
                metadata: Some(ContainerMetadata {
                    name: "web".into(),
                    attempt: 1,
                }),
                command: vec!["/bin/web".into()],
                linux: Some(LinuxContainerConfig {
                    resources: None,
                    security_context: Some(LinuxContainerSecurityContext::default()),
                }),
                ..Default::default()
            },
            sandbox: PodSandboxConfig {
                metadata: Some(PodSandboxMetadata {
                    name: "web-0".into(),
                    uid: "6a5e".into(),
                    namespace: "shop".into(),
                    attempt: 0,
                }),
                linux: Some(LinuxPodSandboxConfig {
                    security_context: Some(LinuxSandboxSecurityContext::default()),
                    ..Default::default()
                }),
                ..Default::default()
            },
            resolved: Resolved {
                pod: gantry_types::PodId::from_random([0xaa; 32]),
                container: gantry_types::ContainerId::from_random([0xbb; 32]),
                image: resolved::Image {
                    name: "docker.io/library/web:1".into(),
                    entrypoint: vec!["/entry".into()],
                    cmd: vec!["--serve".into()],
                    env: vec!["PATH=/bin".into(), "LANG=C".into()],
                    working_dir: String::new(),
                },
                user: User {
                    uid: 0,
                    gid: 0,
                    additional_gids: vec![0],
                },
                rootfs: "/run/gantry/c/rootfs".into(),
                cgroup: Cgroup {
                    path: "kubepods-pod6a5e.slice:gantry:bbbb".into(),
                    node: CgroupNode {
                        version: CgroupVersion::V2,
                        hugetlb: true,
                        swap: true,
                    },
                },
                namespaces: Namespaces {
                    network: join("net"),
                    ipc: join("ipc"),
                    uts: join("uts"),
                    pid: Namespace::New,
                    user: Namespace::Host,
                },
                hostname: "web-0".into(),
                files: PodFiles {
                    hosts: None,
                    hostname: Some("/run/gantry/pod/hostname".into()),
                    resolv_conf: Some("/run/gantry/pod/resolv.conf".into()),
                    shm: Some("/run/gantry/pod/shm".into()),
                },
                mounts: Vec::new(),
                volumes: Vec::new(),
                devices: Vec::new(),
                cdi: Vec::new(),
                init: "/usr/libexec/gantry-shim".into(),
                host_devices: Vec::new(),
                capabilities: KnownCapabilities {
                    default: capabilities::default_set(),
                    all: capabilities::up_to(40),
                },
                oom_score_adj_floor: -1000,
                rlimits: Vec::new(),
                seccomp: Seccomp {
                    architecture: "x86_64".into(),
                    kernel: resolved::KernelVersion::new(6, 1),
                    ..Default::default()
                },
                apparmor: AppArmor::Disabled,
                selinux: None,
                recursive_read_only: true,
                annotations: Vec::new(),
            },
        }
    }

    fn with(change: impl FnOnce(&mut Self)) -> Self {
        let mut case = Self::minimal();
        change(&mut case);
        case
    }

    fn security(&mut self) -> &mut LinuxContainerSecurityContext {
        self.config
            .linux
            .as_mut()
            .unwrap()
            .security_context
            .as_mut()
            .unwrap()
    }

    /// A mount of the request, with its source.
    fn mount(&mut self, mount: Mount) {
        let source = mount.host_path.clone().into();
        self.resolved.mounts.push(HostMount {
            source,
            point: "/srv".into(),
            shared: true,
            slave: false,
        });
        self.config.mounts.push(mount);
    }

    fn privileged(&mut self) {
        self.security().privileged = true;
        let sandbox = self
            .sandbox
            .linux
            .as_mut()
            .unwrap()
            .security_context
            .as_mut()
            .unwrap();
        sandbox.privileged = true;
    }

    fn build(&self) -> Result<Spec, Error> {
        container(&self.config, &self.sandbox, &self.resolved)
    }

    /// The spec as JSON in one order: sets of capabilities have none of their own.
    fn json(&self) -> Value {
        let mut value = serde_json::to_value(self.build().unwrap()).unwrap();
        let sets = value["process"]["capabilities"].as_object_mut().unwrap();
        for set in sets.values_mut() {
            set.as_array_mut().unwrap().sort_by_key(ToString::to_string);
        }
        value
    }

    fn refused(&self) -> Error {
        self.build().unwrap_err()
    }
}

/// The merge patch from one value to the other.
fn difference(from: &Value, to: &Value) -> Value {
    let (Value::Object(old), Value::Object(new)) = (from, to) else {
        return to.clone();
    };
    let mut patch = Map::new();
    for key in old.keys().filter(|key| !new.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    for (key, value) in new
        .iter()
        .filter(|(key, value)| old.get(*key) != Some(value))
    {
        let value = old
            .get(key)
            .map_or_else(|| value.clone(), |old| difference(old, value));
        patch.insert(key.clone(), value);
    }
    Value::Object(patch)
}

fn golden(name: &str, case: &Case) {
    let built = match name {
        "minimal" => case.json(),
        _ => difference(&Case::minimal().json(), &case.json()),
    };
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.json"));
    let text = format!("{}\n", serde_json::to_string_pretty(&built).unwrap());
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        text, expected,
        "{name}: run with UPDATE_GOLDEN=1 and review the diff"
    );
}

fn bind(container_path: &str, host_path: &str) -> Mount {
    Mount {
        container_path: container_path.into(),
        host_path: host_path.into(),
        ..Default::default()
    }
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

#[test]
fn minimal() {
    golden("minimal", &Case::minimal());
}

#[test]
fn privileged() {
    let case = Case::with(|case| {
        case.privileged();
        let security = case.security();
        security.masked_paths = strings(&["/proc/kcore"]);
        security.readonly_paths = strings(&["/proc/sys"]);
        security.seccomp = Some(SecurityProfile::default());
        case.resolved.apparmor = apparmor(&["gantry-default"]);
        case.resolved.host_devices = vec![device("/dev/fuse", 10, 229)];
    });
    golden("privileged", &case);
}

#[test]
fn a_privileged_container_needs_a_privileged_sandbox() {
    let mut case = Case::minimal();
    case.security().privileged = true;
    let error = case.refused();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(
        error
            .to_string()
            .starts_with("linux.security_context.privileged:"),
        "{error}"
    );
}

fn device(path: &str, major: u32, minor: u32) -> resolved::Device {
    resolved::Device {
        path: path.into(),
        kind: DeviceKind::Character,
        major,
        minor,
        mode: 0o20660,
        uid: 0,
        gid: 44,
        access: "rw".into(),
    }
}

#[test]
fn devices() {
    let case = Case::with(|case| {
        let mut disk = device("/dev/xvda", 202, 0);
        disk.kind = DeviceKind::Block;
        disk.access = "r".into();
        case.resolved.devices = vec![device("/dev/dri/card0", 226, 0), disk];
        // Not for those without privilege.
        case.resolved.host_devices = vec![device("/dev/fuse", 10, 229)];
    });
    golden("devices", &case);
    for access in ["", "x", "rwx"] {
        let mut bad = Case::minimal();
        let mut device = device("/dev/x", 1, 1);
        device.access = access.into();
        bad.resolved.devices = vec![device];
        assert!(bad.refused().to_string().contains("devices[/dev/x]"));
    }
}

#[test]
fn cdi_devices() {
    let edits = r#"{"env": ["LANG=vendor", "GPU=0"],
        "mounts": [{"hostPath": "/usr/lib/vendor.so", "containerPath": "/usr/lib/vendor.so", "options": ["ro", "bind"]}],
        "hooks": [{"hookName": "createContainer", "path": "/usr/bin/hook", "args": ["hook", "ldcache"], "env": ["A=1"]}],
        "additionalGids": [0, 44], "intelRdt": {"closID": "gold"}}"#;
    let case = Case::with(|case| {
        case.resolved.cdi = vec![
            serde_json::from_str(edits).unwrap(),
            serde_json::from_str(r#"{"env": ["GPU=0,1"]}"#).unwrap(),
        ];
        case.resolved.devices = vec![device("/dev/gpu0", 195, 0)];
    });
    golden("cdi_devices", &case);
}

#[test]
fn init() {
    let annotated = |pod: &str, container: &str| {
        Case::with(|case| {
            let annotations = |value: &str| {
                let value = (!value.is_empty()).then(|| value.to_owned());
                value.map(|value| (gantry_spec::init::ANNOTATION.to_owned(), value))
            };
            case.sandbox.annotations = annotations(pod).into_iter().collect();
            case.config.annotations = annotations(container).into_iter().collect();
        })
    };
    golden("init", &annotated("", "true"));
    let minimal = Case::minimal().json();
    assert_eq!(annotated("true", "").json(), annotated("", "true").json());
    assert_eq!(annotated("true", "false").json(), minimal);
    for bad in ["yes", "1", "TRUE"] {
        let error = annotated("true", bad).refused();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(
            error.to_string().starts_with("annotations[gantry.io/init]"),
            "{error}"
        );
    }
    let mut host_dev = annotated("true", "");
    host_dev.mount(bind("/dev", "/dev"));
    assert!(host_dev.refused().to_string().contains("/dev"));
}

#[test]
fn host_namespaces() {
    let case = Case::with(|case| case.resolved.namespaces = Namespaces::default());
    golden("host_namespaces", &case);
}

#[test]
fn target_pid_namespace() {
    let case = Case::with(|case| {
        case.resolved.namespaces.pid = Namespace::Join("/proc/77/ns/pid".into());
    });
    golden("target_pid_namespace", &case);
}

#[test]
fn user_namespace() {
    let case = Case::with(|case| {
        case.resolved.namespaces.user = Namespace::Join("/run/gantry/pod/ns/user".into());
        let mapping = IdMapping {
            host_id: 65536,
            container_id: 0,
            length: 65536,
        };
        case.mount(Mount {
            uid_mappings: vec![mapping],
            gid_mappings: vec![mapping],
            ..bind("/data", "/srv/data")
        });
        case.resolved.oom_score_adj_floor = 100;
    });
    golden("user_namespace", &case);
}

#[test]
fn user_namespace_on_the_host_network() {
    let case = Case::with(|case| {
        case.resolved.namespaces.user = Namespace::Join("/run/gantry/pod/ns/user".into());
        case.resolved.namespaces.network = Namespace::Host;
    });
    golden("user_namespace_host_network", &case);
}

#[test]
fn cgroup_v1() {
    let case = Case::with(|case| {
        case.resolved.cgroup.path = "/kubepods/pod6a5e/bbbb".into();
        case.resolved.cgroup.node.version = CgroupVersion::V1;
    });
    golden("cgroup_v1", &case);
}

#[test]
fn resources() {
    let case = Case::with(|case| {
        case.config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 1 << 30,
            oom_score_adj: 985,
            cpuset_cpus: "0-2".into(),
            cpuset_mems: "0".into(),
            hugepage_limits: vec![HugepageLimit {
                page_size: "2MB".into(),
                limit: 0,
            }],
            unified: [("memory.high".to_owned(), "900000000".to_owned())].into(),
            memory_swap_limit_in_bytes: 0,
        });
    });
    golden("resources", &case);
}

#[test]
fn oom_score_adj_is_checked_and_bounded_below() {
    let score = |asked, floor| {
        let mut case = Case::minimal();
        case.config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
            oom_score_adj: asked,
            ..Default::default()
        });
        case.resolved.oom_score_adj_floor = floor;
        case.build()
            .map(|spec| spec.process().as_ref().unwrap().oom_score_adj())
    };
    assert_eq!(score(-998, -1000).unwrap(), Some(-998));
    assert_eq!(score(-998, -500).unwrap(), Some(-500));
    assert_eq!(score(7, -500).unwrap(), Some(7));
    assert!(score(1001, 0).is_err() && score(i64::MIN, 0).is_err());
}

#[test]
fn command_and_args() {
    let args = |command: &[&str], args: &[&str], entrypoint: &[&str], cmd: &[&str]| {
        let case = Case::with(|case| {
            case.config.command = strings(command);
            case.config.args = strings(args);
            case.resolved.image.entrypoint = strings(entrypoint);
            case.resolved.image.cmd = strings(cmd);
        });
        case.build()
            .map(|spec| spec.process().as_ref().unwrap().args().clone().unwrap())
    };
    let (entry, cmd) = (&["/entry"][..], &["cmd"][..]);
    assert_eq!(args(&[], &[], entry, cmd).unwrap(), ["/entry", "cmd"]);
    assert_eq!(args(&[], &["a"], entry, cmd).unwrap(), ["/entry", "a"]);
    assert_eq!(args(&["c"], &[], entry, cmd).unwrap(), ["c"]);
    assert_eq!(args(&["c"], &["a"], entry, cmd).unwrap(), ["c", "a"]);
    assert_eq!(args(&[], &[], &[], cmd).unwrap(), ["cmd"]);
    assert_eq!(args(&[], &["a"], &[], cmd).unwrap(), ["a"]);
    assert_eq!(args(&[], &[], &[""], cmd).unwrap(), ["cmd"]);
    assert!(args(&[], &[], &[], &[]).is_err());
    assert!(args(&["a\0b"], &[], &[], &[]).is_err());
}

#[test]
fn env_and_terminal() {
    let case = Case::with(|case| {
        case.resolved.image.env = strings(&["LANG=C", "A=image", "HOSTNAME=image", "JUNK", "=x"]);
        case.config.tty = true;
        case.config.working_dir = "/srv/./app/../www".into();
        let variable = |key: &str, value: &[u8]| KeyValue {
            key: key.into(),
            value: value.into(),
        };
        case.config.envs = vec![
            variable("A", b"first"),
            variable("EMPTY", b""),
            variable("TERM", b"vt100"),
            variable("A", "l\u{e4}st=x".as_bytes()),
        ];
    });
    golden("env_and_terminal", &case);
}

#[test]
fn bad_variables_are_named() {
    for (key, value) in [
        ("", &b"x"[..]),
        ("A=B", b"x"),
        ("A\0", b"x"),
        ("A", b"\0"),
        ("A", b"\xff\xfe"),
    ] {
        let case = Case::with(|case| {
            case.config.envs = vec![KeyValue {
                key: key.into(),
                value: value.into(),
            }];
        });
        assert!(case.refused().to_string().starts_with("envs["), "{key:?}");
    }
    let image = Case::with(|case| case.resolved.image.env = strings(&["A=\0"]));
    assert!(image.refused().to_string().starts_with("image config Env"));
    let huge =
        Case::with(|case| case.resolved.image.env = vec![format!("A={}", "x".repeat(7 << 20))]);
    assert_eq!(huge.refused().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn a_million_variables_take_no_time_to_speak_of() {
    // Quadratic in the number of variables, this would not end.
    let case = Case::with(|case| {
        case.resolved.image.env = (0..400_000).map(|number| format!("A{number}=1")).collect();
    });
    assert!(case.build().is_ok());
}

#[test]
fn working_directories() {
    let cwd = |image: &str, cri: &str| {
        let case = Case::with(|case| {
            case.resolved.image.working_dir = image.into();
            case.config.working_dir = cri.into();
        });
        case.build().map(|spec| {
            spec.process()
                .as_ref()
                .unwrap()
                .cwd()
                .to_str()
                .unwrap()
                .to_owned()
        })
    };
    assert_eq!(cwd("", "").unwrap(), "/");
    assert_eq!(cwd("/image", "").unwrap(), "/image");
    assert_eq!(cwd("/image", "/cri").unwrap(), "/cri");
    assert_eq!(cwd("app", "").unwrap(), "/app");
    assert_eq!(cwd("../../etc", "").unwrap(), "/etc");
    for fd in [
        "/proc/self/fd/7",
        "/proc/self/fd/../fd/7",
        "proc/1/fd",
        "/dev/fd/8",
    ] {
        assert!(
            cwd(fd, "")
                .unwrap_err()
                .to_string()
                .starts_with("image config"),
            "{fd}"
        );
        assert!(
            cwd("", fd)
                .unwrap_err()
                .to_string()
                .starts_with("working_dir"),
            "{fd}"
        );
    }
}

#[test]
fn user_and_capabilities() {
    let case = Case::with(|case| {
        case.resolved.user = User {
            uid: 1000,
            gid: 100,
            additional_gids: vec![100, 44],
        };
        let security = case.security();
        security.no_new_privs = true;
        security.capabilities = Some(Capability {
            add_capabilities: strings(&["NET_ADMIN", "cap_sys_time"]),
            drop_capabilities: strings(&["all"]),
            add_ambient_capabilities: strings(&["NET_BIND_SERVICE"]),
        });
    });
    golden("user_and_capabilities", &case);
}

#[test]
fn mounts() {
    let case = Case::with(|case| {
        case.mount(bind("/data/deep/er", "/srv/c"));
        case.mount(Mount {
            readonly: true,
            ..bind("/data", "/srv/a")
        });
        case.mount(Mount {
            propagation: MountPropagation::PropagationHostToContainer.into(),
            ..bind("/data/deep/../deep", "/srv/b")
        });
        case.mount(Mount {
            readonly: true,
            recursive_read_only: true,
            ..bind("/rro", "/srv/r")
        });
        case.mount(bind("/etc/hosts", "/var/lib/kubelet/pods/x/etc-hosts"));
        case.resolved.files.hosts = Some("/run/gantry/pod/hosts".into());
    });
    golden("mounts", &case);
}

#[test]
fn image_volumes() {
    let case = Case::with(|case| {
        case.security().readonly_rootfs = true;
        let volume = |destination: &str, source: &str| Volume {
            destination: destination.into(),
            source: source.into(),
        };
        case.resolved.volumes = vec![
            volume("/var/cache", "/var/lib/gantry/v/1"),
            // The pod's hostname lies in it and has to be seen.
            volume("/etc", "/var/lib/gantry/v/2"),
        ];
        case.mount(bind("/var/cache/deeper", "/srv/c"));
    });
    golden("image_volumes", &case);
}

#[test]
fn a_mount_at_an_image_volumes_place_wins() {
    let volumes = |asked: &[&str], image: &[&str]| {
        let mut case = Case::minimal();
        for place in asked {
            case.mount(bind(place, "/srv"));
        }
        let places = gantry_spec::mounts::volumes(&case.config, &strings(image));
        places.map(|places| {
            Vec::from_iter(places.into_iter().map(|place| place.display().to_string()))
        })
    };
    assert_eq!(
        volumes(&[], &["/b", "/a/", "//a", "rel/x"]).unwrap(),
        ["/a", "/b", "/rel/x"]
    );
    assert_eq!(
        volumes(&["/data/../data/"], &["/data", "/data/sub"]).unwrap(),
        ["/data/sub"]
    );
    // CVE-2022-23648: by its text alone nothing leads out of the root.
    assert_eq!(volumes(&[], &["/../../etc"]).unwrap(), ["/etc"]);
    for bad in ["/", "/..", "", "/a\0b"] {
        let error = volumes(&[], &[bad]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{bad:?}");
        assert!(
            error.to_string().starts_with("image config Volumes"),
            "{error}"
        );
    }
}

#[test]
fn image_mounts() {
    let case = Case::with(|case| {
        case.mount(Mount {
            image: Some(ImageSpec {
                image: "sha256:5f70".into(),
                ..Default::default()
            }),
            image_sub_path: "models/small".into(),
            readonly: true,
            ..bind("/models", "")
        });
        case.resolved.mounts[0].source = "/run/gantry/c/images/0/models/small".into();
    });
    golden("image_mounts", &case);
}

#[test]
fn mounts_at_one_place() {
    let case = Case::with(|case| {
        case.mount(bind("/data", "/srv/first"));
        case.mount(bind("/data/../data", "/srv/second"));
    });
    golden("mounts_at_one_place", &case);
}

#[test]
fn mounts_over_defaults() {
    let case = Case::with(|case| {
        case.mount(bind("/dev", "/dev"));
        case.mount(bind("/sys/fs/cgroup/", "/sys/fs/cgroup"));
        case.mount(bind("/dev/shm", "/srv/shm"));
    });
    golden("mounts_over_defaults", &case);
}

#[test]
fn bidirectional_mounts() {
    let case = Case::with(|case| {
        case.mount(Mount {
            propagation: MountPropagation::PropagationBidirectional.into(),
            ..bind("/var/lib/csi", "/var/lib/csi")
        });
        case.mount(Mount {
            propagation: MountPropagation::PropagationHostToContainer.into(),
            ..bind("/mnt", "/mnt")
        });
    });
    golden("bidirectional_mounts", &case);
}

#[test]
fn mounts_that_cannot_be_made_are_named() {
    let refused = |mount: Mount, change: fn(&mut Case)| {
        let case = Case::with(|case| {
            case.mount(mount);
            change(case);
        });
        let error = case.refused();
        assert!(error.to_string().contains("mounts["), "{error}");
        error.kind()
    };
    let none: fn(&mut Case) = |_| {};
    for place in ["", "relative", "/", "/..", "/a\0b"] {
        assert_eq!(
            refused(bind(place, "/srv"), none),
            ErrorKind::InvalidArgument,
            "{place:?}"
        );
    }
    let to = |propagation: i32| Mount {
        propagation,
        ..bind("/a", "/srv")
    };
    assert_eq!(refused(to(9), none), ErrorKind::InvalidArgument);
    let private: fn(&mut Case) = |case| case.resolved.mounts[0].shared = false;
    assert_eq!(refused(to(1), private), ErrorKind::FailedPrecondition);
    assert_eq!(refused(to(2), private), ErrorKind::FailedPrecondition);
    let unshared = Case::with(|case| {
        case.mount(to(2));
        case.resolved.mounts[0].shared = false;
    });
    assert_eq!(
        unshared.refused().to_string(),
        "mounts[/a]: /srv is on the mount at /srv, which is not shared"
    );
    let slave: fn(&mut Case) = |case| {
        case.resolved.mounts[0].shared = false;
        case.resolved.mounts[0].slave = true;
    };
    assert_eq!(refused(to(2), slave), ErrorKind::FailedPrecondition);

    let rro = Mount {
        recursive_read_only: true,
        ..bind("/a", "/srv")
    };
    assert_eq!(refused(rro.clone(), none), ErrorKind::InvalidArgument);
    let rro = Mount {
        readonly: true,
        ..rro
    };
    let shared = Mount {
        propagation: 1,
        ..rro.clone()
    };
    assert_eq!(refused(shared, none), ErrorKind::InvalidArgument);
    assert_eq!(
        refused(rro, |case| case.resolved.recursive_read_only = false),
        ErrorKind::Unknown
    );

    let image = |name: &str, host: &str, readonly| Mount {
        image: Some(ImageSpec {
            image: name.into(),
            ..Default::default()
        }),
        readonly,
        ..bind("/a", host)
    };
    let sub_path = |mount: Mount, path: &str| Mount {
        image_sub_path: path.into(),
        ..mount
    };
    for bad in [
        image("", "", true),
        image("web", "/srv", true),
        image("web", "", false),
        sub_path(image("web", "", true), "a\0b"),
        sub_path(bind("/a", "/srv"), "sub"),
        bind("/a", ""),
        bind("/a", "relative"),
        bind("/a", "/a\0b"),
    ] {
        assert_eq!(refused(bad, none), ErrorKind::InvalidArgument);
    }
    let half = Mount {
        uid_mappings: vec![IdMapping::default()],
        ..bind("/a", "/srv")
    };
    assert_eq!(refused(half, none), ErrorKind::InvalidArgument);
}

#[test]
fn the_prefix_that_kubelets_parse_comes_first() {
    let case = Case::with(|case| {
        case.resolved.recursive_read_only = false;
        case.mount(Mount {
            readonly: true,
            recursive_read_only: true,
            ..bind("/a", "/srv")
        });
    });
    assert!(case.refused().to_string().starts_with("RROUnsupported: "));
}

#[test]
fn facts_must_belong_to_the_request() {
    let case = Case::with(|case| case.config.mounts.push(bind("/a", "/srv")));
    assert_eq!(case.refused().kind(), ErrorKind::Internal);
    let nameless = Case::with(|case| case.config.metadata = None);
    assert!(nameless.refused().to_string().starts_with("metadata:"));
}

#[test]
fn readonly_root() {
    let case = Case::with(|case| case.security().readonly_rootfs = true);
    golden("readonly_root", &case);
}

#[test]
fn security_profiles() {
    let profile = r#"{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"}]}"#;
    let case = Case::with(|case| {
        let security = case.security();
        security.masked_paths = strings(&["/proc/kcore", "/proc/keys"]);
        security.readonly_paths = strings(&["/proc/sys"]);
        security.seccomp = Some(SecurityProfile {
            profile_type: ProfileType::Localhost.into(),
            localhost_ref: "/var/lib/kubelet/seccomp/web.json".into(),
        });
        security.apparmor = Some(SecurityProfile {
            profile_type: ProfileType::Localhost.into(),
            localhost_ref: "web".into(),
        });
        case.resolved.seccomp.localhost = Some(profile.into());
        case.resolved.apparmor = apparmor(&["gantry-default", "web"]);
        case.resolved.selinux = Some(SelinuxLabels {
            process: "system_u:system_r:container_t:s0:c1,c2".into(),
            mount: "system_u:object_r:container_file_t:s0:c1,c2".into(),
        });
    });
    golden("security_profiles", &case);

    let mut junk = case;
    junk.resolved.seccomp.localhost = Some("{".into());
    assert!(
        junk.refused()
            .to_string()
            .contains("/var/lib/kubelet/seccomp/web.json")
    );
    junk.resolved.seccomp.localhost = None;
    assert_eq!(junk.refused().kind(), ErrorKind::Internal);
    junk.resolved.seccomp.localhost = Some(profile.into());
    junk.resolved.apparmor = AppArmor::Disabled;
    assert_eq!(junk.refused().kind(), ErrorKind::FailedPrecondition);
}

/// GHSA-7ww5-4wqc-m92c: power readings tell secrets. Older kubelets do not name them.
#[test]
fn ghsa_7ww5_4wqc_m92c_power_readings_are_masked_and_an_empty_list_hides_nothing() {
    let masked = |paths: &[&str], privileged| {
        let mut case = Case::minimal();
        if privileged {
            case.privileged();
        }
        case.security().masked_paths = strings(paths);
        let spec = case.build().unwrap();
        spec.linux().as_ref().unwrap().masked_paths().clone()
    };
    const POWERCAP: &str = "/sys/devices/virtual/powercap";
    let both = Some(strings(&["/proc/kcore", POWERCAP]));
    assert_eq!(masked(&["/proc/kcore"], false), both);
    assert_eq!(masked(&["/proc/kcore", POWERCAP], false), both);
    assert_eq!(masked(&[], false), None, "ProcMount Unmasked");
    assert_eq!(masked(&["/proc/kcore"], true), None);
}

#[test]
fn runtime_default_seccomp() {
    let runtime_default =
        || Case::with(|case| case.security().seccomp = Some(SecurityProfile::default()));
    golden("seccomp_runtime_default", &runtime_default());
    let mut admin = runtime_default();
    admin.security().capabilities = Some(Capability {
        add_capabilities: strings(&["SYS_ADMIN"]),
        ..Default::default()
    });
    golden("seccomp_runtime_default_sys_admin", &admin);

    let mut without = runtime_default();
    without.resolved.seccomp.unsupported = Some("the kernel is built without seccomp".into());
    let error = without.refused();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(
        error.to_string().contains("built without seccomp"),
        "{error}"
    );
    // Nobody asked for a filter.
    without.security().seccomp = None;
    without.build().unwrap();
    without.security().seccomp = Some(SecurityProfile {
        profile_type: ProfileType::Unconfined.into(),
        ..Default::default()
    });
    let spec = without.build().unwrap();
    assert!(spec.linux().as_ref().unwrap().seccomp().is_none());
}

/// CVE-2023-2431: an empty name once meant "unconfined".
#[test]
fn cve_2023_2431_a_localhost_profile_without_a_name_is_refused() {
    let nameless = || {
        Some(SecurityProfile {
            profile_type: ProfileType::Localhost.into(),
            ..Default::default()
        })
    };
    let seccomp = Case::with(|case| case.security().seccomp = nameless());
    let apparmor = Case::with(|case| case.security().apparmor = nameless());
    for (case, field) in [(seccomp, "seccomp"), (apparmor, "apparmor")] {
        let error = case.refused();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        let field = format!("linux.security_context.{field}: Localhost needs localhost_ref");
        assert_eq!(error.to_string(), field);
    }
}

fn apparmor(loaded: &[&str]) -> AppArmor {
    AppArmor::Enabled {
        runtime_default: "gantry-default".into(),
        loaded: strings(loaded),
    }
}

/// The profile in the spec for what is asked in the message, or in the text of old kubelets.
fn apparmor_of(
    host: &AppArmor,
    new: Option<(ProfileType, &str)>,
    old: &str,
) -> Result<Option<String>, ErrorKind> {
    let case = Case::with(|case| {
        case.resolved.apparmor = host.clone();
        #[allow(deprecated)] // Old kubelets send nothing else.
        {
            case.security().apparmor_profile = old.into();
        }
        case.security().apparmor = new.map(|(kind, name)| SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: name.into(),
        });
    });
    let spec = case.build().map_err(|error| error.kind())?;
    Ok(spec.process().as_ref().unwrap().apparmor_profile().clone())
}

#[test]
fn an_apparmor_profile_that_is_not_loaded_is_an_error() {
    use ProfileType::{Localhost, RuntimeDefault, Unconfined};
    let (both, none) = (apparmor(&["gantry-default", "web"]), apparmor(&[]));
    let default = Some("gantry-default".to_owned());
    let web = Some("web".to_owned());
    let refused = Err(ErrorKind::FailedPrecondition);
    for (host, new, old, expected) in [
        (&both, None, "", Ok(default.clone())),
        (&both, Some((RuntimeDefault, "")), "", Ok(default.clone())),
        (&both, Some((Localhost, "web")), "", Ok(web.clone())),
        (&both, Some((Unconfined, "")), "", Ok(None)),
        (&both, None, "localhost/web", Ok(web)),
        (&both, None, "runtime/default", Ok(default)),
        (&both, None, "unconfined", Ok(None)),
        // The message goes before the text.
        (&both, Some((Unconfined, "")), "localhost/web", Ok(None)),
        (&none, None, "", Ok(None)),
        (&none, Some((RuntimeDefault, "")), "", refused.clone()),
        (&none, Some((Localhost, "web")), "", refused.clone()),
        (&none, None, "localhost/web", refused.clone()),
        (&AppArmor::Disabled, None, "", Ok(None)),
        (
            &AppArmor::Disabled,
            Some((RuntimeDefault, "")),
            "",
            Ok(None),
        ),
        (&AppArmor::Disabled, Some((Localhost, "web")), "", refused),
    ] {
        assert_eq!(
            apparmor_of(host, new, old),
            expected,
            "{host:?} {new:?} {old:?}"
        );
    }
}

#[test]
fn annotations() {
    let case = Case::with(|case| {
        let pairs = |list: &[(&str, &str)]| {
            list.iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect()
        };
        case.sandbox.annotations = pairs(&[
            ("io.katacontainers.a", "pod"),
            ("io.katacontainers.b", "pod"),
            ("org.systemd.property.ExecStartPost", "'/bin/evil'"),
            ("io.kubernetes.cri.sandbox-id", "forged"),
            ("run.oci.handler", "krun"),
        ]);
        case.config.annotations = pairs(&[("io.katacontainers.b", "container")]);
        case.resolved.annotations = strings(&[
            "io.katacontainers.*",
            "org.systemd.*",
            "io.kubernetes.cri.*",
        ]);
    });
    golden("annotations", &case);
}

#[test]
fn an_exec_is_the_container_with_another_command() {
    let case = Case::with(|case| {
        let security = case.security();
        security.no_new_privs = true;
        security.capabilities = Some(Capability {
            add_ambient_capabilities: strings(&["NET_BIND_SERVICE"]),
            ..Default::default()
        });
        case.resolved.user = User {
            uid: 7,
            gid: 8,
            additional_gids: vec![8],
        };
        case.config.tty = true;
    });
    let spec = case.build().unwrap();
    let own = spec.process().as_ref().unwrap();
    let exec = process::exec(own, &strings(&["ls", "-l"]), false).unwrap();
    assert_eq!(exec.args().as_ref().unwrap(), &["ls", "-l"]);
    assert_eq!(exec.terminal(), Some(false));
    assert_eq!(
        (exec.user(), exec.env(), exec.cwd()),
        (own.user(), own.env(), own.cwd())
    );
    assert_eq!(exec.no_new_privileges(), Some(true));
    assert_eq!(exec.oom_score_adj(), own.oom_score_adj());
    let (had, has) = (
        own.capabilities().as_ref().unwrap(),
        exec.capabilities().as_ref().unwrap(),
    );
    assert_eq!(has.bounding(), had.bounding());
    assert_eq!(had.ambient().as_ref().unwrap().len(), 1);
    assert!(has.ambient().as_ref().unwrap().is_empty());
    assert!(has.inheritable().as_ref().unwrap().is_empty());

    assert!(process::exec(own, &[], false).is_err());
    assert!(process::exec(own, &strings(&["a\0"]), false).is_err());
    let terminal = process::exec(
        Case::minimal().build().unwrap().process().as_ref().unwrap(),
        &strings(&["sh"]),
        true,
    )
    .unwrap();
    assert!(
        terminal
            .env()
            .as_ref()
            .unwrap()
            .contains(&"TERM=xterm".to_owned())
    );
}
