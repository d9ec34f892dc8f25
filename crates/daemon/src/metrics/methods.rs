//! The methods that have a label of their own. Whatever else a client asks for is "other": it must
//! not make as many series as it likes.

const SERVICES: [(&str, &[&str]); 4] = [
    (
        "runtime.v1.RuntimeService",
        &[
            "Attach",
            "CheckpointContainer",
            "ContainerStats",
            "ContainerStatus",
            "CreateContainer",
            "Exec",
            "ExecSync",
            "GetContainerEvents",
            "ListContainerStats",
            "ListContainers",
            "ListMetricDescriptors",
            "ListPodSandbox",
            "ListPodSandboxMetrics",
            "ListPodSandboxStats",
            "PodSandboxStats",
            "PodSandboxStatus",
            "PortForward",
            "RemoveContainer",
            "RemovePodSandbox",
            "ReopenContainerLog",
            "RunPodSandbox",
            "RuntimeConfig",
            "StartContainer",
            "Status",
            "StopContainer",
            "StopPodSandbox",
            "StreamContainerStats",
            "StreamContainers",
            "StreamPodSandboxMetrics",
            "StreamPodSandboxStats",
            "StreamPodSandboxes",
            "UpdateContainerResources",
            "UpdatePodSandboxResources",
            "UpdateRuntimeConfig",
            "Version",
        ],
    ),
    (
        "runtime.v1.ImageService",
        &[
            "ImageFsInfo",
            "ImageStatus",
            "ListImages",
            "PullImage",
            "RemoveImage",
            "StreamImages",
        ],
    ),
    (
        "gantry.admin.v1.Images",
        &[
            "Collect", "Export", "Import", "Inspect", "Mount", "Pull", "Tag", "Unmount", "Verify",
        ],
    ),
    ("gantry.admin.v1.Node", &["Check", "State"]),
];

pub const OTHER: &str = "other";

/// Service and method of a path (`/runtime.v1.RuntimeService/Version`) as labels.
pub fn labels(path: &str) -> (&'static str, &'static str) {
    let found = || {
        let (service, method) = path.strip_prefix('/')?.split_once('/')?;
        let (service, methods) = SERVICES.iter().find(|(name, _)| *name == service)?;
        let method = methods.iter().find(|name| **name == method)?;
        // RuntimeService: the package says nothing more.
        Some((service.rsplit('.').next()?, *method))
    };
    found().unwrap_or((OTHER, OTHER))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn every_method_of_our_protocols_has_a_label_and_nothing_else_has() {
        let protos = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
        let mut served = BTreeSet::new();
        for (package, file) in [
            ("runtime.v1", "runtime/v1/api.proto"),
            ("gantry.admin.v1", "admin/v1/admin.proto"),
        ] {
            let mut service = "";
            let text = std::fs::read_to_string(protos.join(file)).unwrap();
            for line in text.lines().map(str::trim_start) {
                let name = |rest: &'static str| line.strip_prefix(rest);
                if let Some(rest) = name("service ") {
                    service = rest.split([' ', '{']).next().unwrap();
                } else if let Some(rest) = name("rpc ") {
                    let method = rest.split(['(', ' ']).next().unwrap();
                    served.insert(format!("/{package}.{service}/{method}"));
                }
            }
        }
        let known: BTreeSet<_> = SERVICES
            .iter()
            .flat_map(|(service, methods)| {
                methods
                    .iter()
                    .map(move |method| format!("/{service}/{method}"))
            })
            .collect();
        assert_eq!(known, served);
        for unknown in ["", "/", "/x", "/runtime.v1.RuntimeService/Nope", "Version"] {
            assert_eq!(labels(unknown), (OTHER, OTHER), "{unknown:?}");
        }
        let path = "/runtime.v1.RuntimeService/Version";
        assert_eq!(labels(path), ("RuntimeService", "Version"));
    }
}
