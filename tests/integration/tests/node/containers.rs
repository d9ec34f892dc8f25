//! What a container sees of its configuration.

use std::os::unix::fs::MetadataExt;

use gantry_integration::{on_plain_node, script_config, sleeper};
use gantry_testkit::cri::security;
use gantry_testkit::cri::v1::{Capability, Device, Int64Value, KeyValue, Mount};
use gantry_testkit::image::{Compression, ImageBuilder};
use serde_json::json;

/// `name:value` of /proc/self/status.
fn proc_status(name: &str) -> String {
    format!("grep ^{name}: /proc/1/status | cut -f2-")
}

#[test]
fn command_arguments_environment_and_directory() {
    on_plain_node(
        "command_arguments_environment_and_directory",
        async |node| {
            node.busybox().await;
            let busybox = gantry_integration::busybox_image();
            let layer = busybox.layers[0].data.clone();
            let image = ImageBuilder::new()
                .tar(layer, Compression::Plain)
                .config("Entrypoint", json!(["/bin/echo", "entry"]))
                .config(
                    "Env",
                    json!(["PATH=/bin", "FROM_IMAGE=image", "BOTH=image"]),
                )
                .config("WorkingDir", json!("/var/www"))
                .cmd(["command"])
                .build();
            let image = node.pull("entry", &image).await;
            let pod = node.host_pod("words").await;
            let run = async |name: &str, command: &[&str], args: &[&str]| {
                let mut config = gantry_testkit::cri::container_config(name, &image, command);
                config.args = args.iter().map(|word| (*word).to_owned()).collect();
                let id = node.run(&pod, &config).await;
                let status = node.exited(&id).await;
                (status.exit_code, node.output(&pod, name))
            };
            // Kubernetes' table of command and args against ENTRYPOINT and CMD.
            assert_eq!(
                run("neither", &[], &[]).await,
                (0, "entry command\n".to_owned())
            );
            assert_eq!(
                run("args", &[], &["own"]).await,
                (0, "entry own\n".to_owned())
            );
            assert_eq!(
                run("command", &["echo", "c"], &[]).await,
                (0, "c\n".to_owned())
            );
            assert_eq!(
                run("both", &["echo", "c"], &["a"]).await,
                (0, "c a\n".to_owned())
            );
            assert_eq!(run("dir", &["pwd"], &[]).await.1, "/var/www\n");

            let mut config =
                script_config("env", &image, "pwd; echo $FROM_IMAGE $BOTH $OWN; exit 7");
            config.working_dir = "/new/dir".to_owned();
            config.envs = [("BOTH", "request"), ("OWN", "a b")]
                .map(|(key, value)| KeyValue {
                    key: key.to_owned(),
                    value: value.to_owned(),
                })
                .to_vec();
            let id = node.run(&pod, &config).await;
            let status = node.exited(&id).await;
            assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"));
            assert_eq!(node.output(&pod, "env"), "/new/dir\nimage request a b\n");
        },
    );
}

#[test]
fn users_by_name_and_by_number() {
    on_plain_node("users_by_name_and_by_number", async |node| {
        let image = node.busybox().await;
        let busybox = gantry_integration::busybox_image();
        let daemon_image = ImageBuilder::new()
            .tar(busybox.layers[0].data.clone(), Compression::Plain)
            .user("www-data")
            .build();
        let daemon_image = node.pull("www", &daemon_image).await;
        let pod = node.host_pod("users").await;
        let id = node.run(&pod, &sleeper("root", &image)).await;
        assert_eq!(node.sh(&id, "id -u; id -g").await, "0\n0");
        let id = node.run(&pod, &sleeper("image", &daemon_image)).await;
        assert_eq!(
            node.sh(&id, "id -u; id -g; id -un").await,
            "33\n33\nwww-data"
        );

        let mut config = sleeper("name", &image);
        security(&mut config).run_as_username = "default-user".to_owned();
        let id = node.run(&pod, &config).await;
        assert_eq!(node.sh(&id, "id -u; id -g").await, "1000\n1000");
        let groups = node.sh(&id, "id -G").await;
        assert!(
            groups.split(' ').any(|group| group == "50000"),
            "of the image: {groups}"
        );
        let status = node.status(&id).await;
        let user = status.user.unwrap().linux.unwrap();
        assert_eq!((user.uid, user.gid), (1000, 1000));
        assert!(user.supplemental_groups.contains(&50000));

        let mut config = sleeper("number", &image);
        security(&mut config).run_as_user = Some(Int64Value { value: 4321 });
        security(&mut config).run_as_group = Some(Int64Value { value: 8765 });
        security(&mut config).supplemental_groups = vec![1111, 2222];
        let id = node.run(&pod, &config).await;
        assert_eq!(node.sh(&id, "id -u; id -g").await, "4321\n8765");
        let groups = node.sh(&id, "id -G").await;
        for group in ["1111", "2222"] {
            assert!(groups.split(' ').any(|other| other == group), "{groups}");
        }
        // What a pod shares is for every user; so is the container's own output.
        node.sh(
            &id,
            "cat /etc/hostname /etc/hosts /etc/resolv.conf && echo x > /dev/shm/x",
        )
        .await;
        let mut config = script_config(
            "says",
            &image,
            "echo out > /dev/stdout; echo err > /dev/stderr",
        );
        security(&mut config).run_as_user = Some(Int64Value { value: 4321 });
        let says = node.run(&pod, &config).await;
        assert_eq!(node.exited(&says).await.exit_code, 0);
        assert_eq!(node.output(&pod, "says"), "out\n");
        // Not the image's word but the request's.
        let mut config = sleeper("over", &daemon_image);
        security(&mut config).run_as_user = Some(Int64Value { value: 0 });
        let id = node.run(&pod, &config).await;
        assert_eq!(node.sh(&id, "id -u").await, "0");
    });
}

#[test]
fn capabilities_and_privileges() {
    on_plain_node("capabilities_and_privileges", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("caps").await;
        let effective = async |id: &str| {
            let mask = node.sh(id, &proc_status("CapEff")).await;
            u64::from_str_radix(mask.trim(), 16).unwrap()
        };
        let bit = |number: u64| 1 << number;
        let (chown, net_raw, sys_time, sys_admin) = (bit(0), bit(13), bit(25), bit(21));

        let plain = node.run(&pod, &sleeper("plain", &image)).await;
        let default = effective(&plain).await;
        assert_eq!(default & chown, chown);
        assert_eq!(default & (sys_admin | sys_time), 0);
        assert_eq!(
            node.sh(&plain, &proc_status("CapInh")).await.trim(),
            "0000000000000000"
        );

        let mut config = sleeper("changed", &image);
        security(&mut config).capabilities = Some(Capability {
            add_capabilities: vec!["SYS_TIME".to_owned()],
            drop_capabilities: vec!["NET_RAW".to_owned()],
            ..Default::default()
        });
        let changed = node.run(&pod, &config).await;
        assert_eq!(effective(&changed).await, default & !net_raw | sys_time);

        let mut config = sleeper("none", &image);
        security(&mut config).capabilities = Some(Capability {
            drop_capabilities: vec!["ALL".to_owned()],
            ..Default::default()
        });
        security(&mut config).no_new_privs = true;
        let none = node.run(&pod, &config).await;
        assert_eq!(effective(&none).await, 0);
        assert_eq!(node.sh(&none, &proc_status("NoNewPrivs")).await, "1");
        assert_eq!(node.sh(&plain, &proc_status("NoNewPrivs")).await, "0");

        let mut privileged_pod = node.pod_config("privileged");
        privileged_pod
            .linux
            .as_mut()
            .unwrap()
            .security_context
            .as_mut()
            .unwrap()
            .privileged = true;
        let privileged_pod = node.run_pod(&privileged_pod).await;
        // It comes second: all mounts of one network's sysfs share what the first has asked for.
        let beside = node.run(&privileged_pod, &sleeper("beside", &image)).await;
        let mut config = sleeper("all", &image);
        security(&mut config).privileged = true;
        let all = node.run(&privileged_pod, &config).await;
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("CapBnd:"))
            .unwrap();
        let own = u64::from_str_radix(own.trim(), 16).unwrap();
        assert_eq!(effective(&all).await, own, "all that this machine gives");
        // Its /sys is not read-only, its devices are the host's.
        assert_eq!(
            node.sh(&all, "grep -c ' /sys sysfs rw' /proc/mounts").await,
            "1"
        );
        let txqueuelen = "/sys/class/net/lo/tx_queue_len";
        let write = format!("echo 7 >{txqueuelen}; cat {txqueuelen}");
        assert_eq!(node.sh(&all, &write).await, "7");
        for ordinary in [&plain, &beside] {
            let mounted = "grep -c ' /sys sysfs ro' /proc/mounts";
            assert_eq!(node.sh(ordinary, mounted).await, "1");
            let refused = format!("echo 8 2>/dev/null >{txqueuelen} || cat {txqueuelen}");
            let stays = node.sh(ordinary, &refused).await;
            assert_ne!(stays, "8");
        }
        assert_eq!(
            node.sh(&all, "test -c /dev/kmsg && echo there").await,
            "there"
        );
        assert_eq!(
            node.sh(&plain, "test -e /dev/kmsg || echo absent").await,
            "absent"
        );
        // What tells of the host is masked as the kubelet asks.
        let mut config = sleeper("masked", &image);
        security(&mut config).masked_paths = vec!["/proc/timer_list".to_owned()];
        security(&mut config).readonly_paths = vec!["/proc/sys".to_owned()];
        let masked = node.run(&pod, &config).await;
        assert_eq!(node.sh(&masked, "wc -c < /proc/timer_list").await, "0");
        let script = "(echo 5 > /proc/sys/vm/swappiness) 2>&1 | grep -o 'Read-only file system'";
        assert_eq!(node.sh(&masked, script).await, "Read-only file system");
    });
}

#[test]
fn root_mounts_and_devices() {
    on_plain_node("root_mounts_and_devices", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("disk").await;
        let volumes = node.daemon.path("volumes");
        for dir in ["rw", "ro", "nested"] {
            std::fs::create_dir_all(volumes.join(dir)).unwrap();
        }
        std::fs::write(volumes.join("file"), "from the host\n").unwrap();
        std::fs::write(volumes.join("ro/old"), "old").unwrap();
        let mount = |host: &str, container: &str, readonly: bool| Mount {
            container_path: container.to_owned(),
            host_path: volumes.join(host).display().to_string(),
            readonly,
            ..Default::default()
        };
        let mut config = sleeper("c", &image);
        config.mounts = vec![
            mount("rw", "/data/rw", false),
            mount("ro", "/data/ro", true),
            mount("file", "/etc/one-file", true),
            mount("made/for/us", "/made", false),
            mount("nested", "/data/rw/nested", false),
        ];
        config.devices = vec![Device {
            container_path: "/dev/my-null".to_owned(),
            host_path: "/dev/null".to_owned(),
            permissions: "rw".to_owned(),
        }];
        security(&mut config).readonly_rootfs = true;
        let id = node.run(&pod, &config).await;
        node.sh(
            &id,
            "echo new > /data/rw/new; echo n > /data/rw/nested/n; echo m > /made/m",
        )
        .await;
        let host = |path: &str| std::fs::read_to_string(volumes.join(path)).unwrap();
        assert_eq!(
            (host("rw/new"), host("nested/n"), host("made/for/us/m")),
            ("new\n".to_owned(), "n\n".to_owned(), "m\n".to_owned())
        );
        assert_eq!(
            node.sh(&id, "cat /etc/one-file /data/ro/old").await,
            "from the host\nold"
        );
        for path in ["/data/ro/x", "/etc/one-file", "/in-root", "/etc/passwd"] {
            let script = format!(
                "if (echo x > {path}) 2>/dev/null; then echo written; else echo refused; fi"
            );
            assert_eq!(node.sh(&id, &script).await, "refused", "{path}");
        }
        node.sh(&id, "echo x > /dev/my-null").await;
        let number = node.sh(&id, "stat -c %t:%T /dev/my-null").await;
        assert_eq!(number, "1:3");
        assert_eq!(std::fs::metadata("/dev/null").unwrap().rdev(), 0x103);
        let status = node.status(&id).await;
        assert_eq!(status.mounts, config.mounts, "echoed exactly");

        // A writable root is the container's own.
        let first = node.run(&pod, &sleeper("first", &image)).await;
        let second = node.run(&pod, &sleeper("second", &image)).await;
        node.sh(&first, "echo mine > /etc/motd; rm /etc/nsswitch.conf")
            .await;
        assert_eq!(
            node.sh(&second, "test ! -e /etc/motd && cat /etc/nsswitch.conf")
                .await,
            "hosts: files dns"
        );
        // Nothing of the host's can be had but what was asked for. runc links /dev/core where the
        // kernel has /proc/kcore.
        let devices = node
            .sh(&second, "ls /dev | grep -vx core | sort | tr '\\n' ' '")
            .await;
        assert_eq!(
            devices.trim(),
            "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
        );
    });
}

#[test]
fn logs_keep_streams_and_long_lines_and_are_reopened() {
    on_plain_node(
        "logs_keep_streams_and_long_lines_and_are_reopened",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("logs").await;
            let script =
                "echo out; echo err >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; printf tail";
            let id = node.run_script(&pod, "long", &image, script).await;
            node.exited(&id).await;
            let lines = node.log(&pod, "long");
            assert_eq!(gantry_integration::log::text(&lines, "stderr"), "err\n");
            let long: Vec<_> = lines
                .iter()
                .filter(|line| line.text.starts_with('x'))
                .collect();
            assert_eq!(
                long.iter().map(|line| line.text.len()).sum::<usize>(),
                40000
            );
            assert!(long.len() > 1 && long[..long.len() - 1].iter().all(|line| line.partial));
            assert!(!long[long.len() - 1].partial);
            assert!(
                node.output(&pod, "long").contains("tail"),
                "what has no line break is kept"
            );

            let script = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done";
            let id = node.run_script(&pod, "rotated", &image, script).await;
            let path = node.log_dir("logs").join("rotated.log");
            node.has_written(&pod, "rotated", "3\n").await;
            let old = path.with_extension("old");
            std::fs::rename(&path, &old).unwrap();
            node.client.reopen_log(&id).await.unwrap();
            node.has_written(&pod, "rotated", "\n").await;
            node.client.stop(&id, 0).await.unwrap();
            let before =
                gantry_integration::log::text(&gantry_integration::log::read(&old), "stdout");
            let all = before + &node.output(&pod, "rotated");
            let numbers: Vec<usize> = all.lines().map(|line| line.parse().unwrap()).collect();
            assert_eq!(
                numbers,
                (1..=numbers.len()).collect::<Vec<_>>(),
                "no line twice, none lost"
            );
            let error = node.client.reopen_log(&id).await.unwrap_err();
            assert_eq!(error.code(), tonic::Code::FailedPrecondition);
        },
    );
}

#[test]
fn terminals_and_standard_input() {
    on_plain_node("terminals_and_standard_input", async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("terminal").await;
        let mut config = script_config("tty", &image, "test -t 0 && test -t 1 && echo terminal");
        config.tty = true;
        let id = node.run(&pod, &config).await;
        assert_eq!(node.exited(&id).await.exit_code, 0);
        assert_eq!(node.output(&pod, "tty").trim_end(), "terminal");
        // Without stdin there is nothing to wait for.
        let id = node
            .run_script(&pod, "closed", &image, "cat; echo end")
            .await;
        assert_eq!(node.exited(&id).await.exit_code, 0);
        assert_eq!(node.output(&pod, "closed"), "end\n");
        // With it somebody may yet attach.
        let mut config = script_config("open", &image, "echo begin; cat; echo end");
        config.stdin = true;
        let id = node.run(&pod, &config).await;
        node.has_written(&pod, "open", "begin").await;
        assert_eq!(node.sh(&id, "echo x").await, "x");
        assert!(node.is_running(&id).await);
        assert!(!node.output(&pod, "open").contains("end"));
    });
}
