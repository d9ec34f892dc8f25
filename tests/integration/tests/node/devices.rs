//! Device nodes, of the host and by CDI.

use std::os::unix::fs::symlink;
use std::path::Path;

use gantry_integration::{Node, on_node, on_plain_node, refused, sleeper};
use gantry_testkit::cri::security;
use gantry_testkit::cri::v1::{CdiDevice, ContainerConfig, Device, Int64Value};
use gantry_testkit::daemon::Options;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tonic::Code;

fn device(host: &Path, container: &str, permissions: &str) -> Device {
    Device {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        permissions: permissions.to_owned(),
    }
}

/// A character device as /dev/null or /dev/zero.
fn node_at(path: &Path, minor: u64) {
    let mode = Mode::from_bits_truncate(0o640);
    mknod(path, SFlag::S_IFCHR, mode, makedev(1, minor)).unwrap();
}

async fn numbers(node: &Node, id: &str, path: &str) -> String {
    node.sh(id, &format!("stat -c %t:%T:%u:%g:%a {path}")).await
}

#[test]
fn directories_links_and_permissions_of_devices() {
    on_plain_node(
        "directories_links_and_permissions_of_devices",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("devices").await;
            let dir = node.daemon.path("devices");
            std::fs::create_dir_all(dir.join("bus/deeper")).unwrap();
            node_at(&dir.join("bus/null"), 3);
            node_at(&dir.join("bus/deeper/zero"), 5);
            std::fs::write(dir.join("bus/no-device"), "").unwrap();
            symlink("bus/null", dir.join("link")).unwrap();
            let mut config = sleeper("c", &image);
            config.devices = vec![
                device(&dir.join("bus"), "/dev/bus", "rw"),
                device(&dir.join("link"), "/dev/from-link", "r"),
            ];
            // Nodes without a rule of their own could not be opened, as root or not.
            let id = node.run(&pod, &config).await;
            assert_eq!(numbers(node, &id, "/dev/bus/null").await, "1:3:0:0:640");
            assert_eq!(
                numbers(node, &id, "/dev/bus/deeper/zero").await,
                "1:5:0:0:640"
            );
            assert_eq!(numbers(node, &id, "/dev/from-link").await, "1:3:0:0:640");
            assert_eq!(
                node.sh(&id, "head -c 2 /dev/bus/deeper/zero | wc -c").await,
                "2"
            );
            node.sh(&id, "test ! -e /dev/bus/no-device").await;

            for (host, permissions, says) in [
                (dir.join("link"), "rwx", "permissions"),
                (dir.join("link"), "", "permissions"),
                (dir.join("bus/no-device"), "rw", "not a device"),
                (dir.join("absent"), "rw", "absent"),
            ] {
                let mut config = sleeper("bad", &image);
                config.devices = vec![device(&host, "/dev/x", permissions)];
                let answer = node.client.create(&pod.id, &config, &pod.config).await;
                refused(answer, Code::InvalidArgument, says);
            }
        },
    );
}

#[test]
fn devices_belong_to_the_user_where_configured() {
    let options =
        Options::default().config("[runtime]\ndevice_ownership_from_security_context = true\n");
    on_node(
        "devices_belong_to_the_user_where_configured",
        options,
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("owner").await;
            let path = node.daemon.path("zero");
            node_at(&path, 5);
            let mut config = sleeper("c", &image);
            config.devices = vec![device(&path, "/dev/mine", "rw")];
            let context = security(&mut config);
            context.run_as_user = Some(Int64Value { value: 1000 });
            context.run_as_group = Some(Int64Value { value: 50 });
            let id = node.run(&pod, &config).await;
            assert_eq!(numbers(node, &id, "/dev/mine").await, "1:5:1000:50:640");
            assert_eq!(node.sh(&id, "head -c 2 /dev/mine | wc -c").await, "2");
        },
    );
}

fn cdi(name: &str, image: &str, devices: &[&str]) -> ContainerConfig {
    let mut config = sleeper(name, image);
    config.cdi_devices = devices
        .iter()
        .map(|name| CdiDevice {
            name: (*name).to_owned(),
        })
        .collect();
    config
}

#[test]
fn cdi_devices_bring_what_their_vendor_says() {
    let dirs = tempfile::tempdir_in("/var/tmp").unwrap();
    let (low, high) = (dirs.path().join("low"), dirs.path().join("high"));
    let options =
        Options::default().config(&format!("[runtime]\ncdi_dirs = [{low:?}, {high:?}]\n"));
    on_node(
        "cdi_devices_bring_what_their_vendor_says",
        options,
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("cdi").await;
            let create = async |config: &ContainerConfig| {
                node.client.create(&pod.id, config, &pod.config).await
            };
            let unknown = create(&cdi("c", &image, &["vendor.com/gpu=0"])).await;
            refused(unknown, Code::FailedPrecondition, "vendor.com/gpu=0");

            // Written while the daemon runs, as device plugins do.
            std::fs::create_dir(&low).unwrap();
            std::fs::create_dir(&high).unwrap();
            let zero = node.daemon.path("zero");
            node_at(&zero, 5);
            let library = node.daemon.path("library");
            std::fs::write(&library, "vendor's").unwrap();
            let hooked = node.daemon.path("hooked");
            let spec = format!(
                "cdiVersion: 0.6.0\nkind: vendor.com/gpu\ndevices:\n- name: \"0\"\n  containerEdits:\n\
            \x20   env: [GPU=0]\n    deviceNodes:\n    - {{path: /dev/gpu0, hostPath: {zero}, permissions: rw}}\n\
            containerEdits:\n  env: [VENDOR=yes]\n  additionalGids: [4242]\n  mounts:\n\
            \x20 - {{hostPath: {library}, containerPath: /lib/vendor, options: [ro, bind]}}\n\
            \x20 hooks:\n  - {{hookName: createRuntime, path: /bin/touch, args: [touch, {hooked}]}}\n",
                zero = zero.display(),
                library = library.display(),
                hooked = hooked.display(),
            );
            std::fs::write(low.join("gpu.yaml"), &spec).unwrap();
            let id = node
                .run(&pod, &cdi("c", &image, &["vendor.com/gpu=0"]))
                .await;
            let found = node
                .sh(&id, "echo $GPU $VENDOR; cat /lib/vendor; id -G")
                .await;
            assert!(
                found.starts_with("0 yes\nvendor's") && found.contains("4242"),
                "{found}"
            );
            assert_eq!(node.sh(&id, "head -c 2 /dev/gpu0 | wc -c").await, "2");
            assert!(hooked.exists());

            // The annotation of before CRI had a field, and a spec of the later directory.
            std::fs::write(high.join("gpu.yaml"), spec.replace("GPU=0", "GPU=high")).unwrap();
            let mut config = sleeper("old", &image);
            config.annotations.insert(
                "cdi.k8s.io/plugin".to_owned(),
                "vendor.com/gpu=0".to_owned(),
            );
            let id = node.run(&pod, &config).await;
            assert_eq!(node.sh(&id, "echo $GPU").await, "high");
            // One's mistakes are in nobody else's way, and are told to who may need them.
            std::fs::write(high.join("broken.json"), "{").unwrap();
            node.run(&pod, &cdi("more", &image, &["vendor.com/gpu=0"]))
                .await;
            let answer = create(&cdi("bad", &image, &["other.com/nic=1"])).await;
            refused(answer, Code::FailedPrecondition, "broken.json");
            let answer = create(&cdi("bad", &image, &["nonsense"])).await;
            refused(answer, Code::InvalidArgument, "nonsense");
        },
    );
}
