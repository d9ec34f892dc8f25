//! What confines a container, seen from inside it.

use gantry_integration::{Node, Pod, on_plain_node, refused, sleeper};
use gantry_testkit::cri::security;
use gantry_testkit::cri::v1::security_profile::ProfileType;
use gantry_testkit::cri::v1::{Capability, ContainerConfig, Mount, SecurityProfile};
use tonic::Code;

fn profile(kind: ProfileType, reference: &str) -> Option<SecurityProfile> {
    Some(SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: reference.into(),
    })
}

/// A sleeper with the default filter. The host's files are at /host, for its perl: busybox has no
/// way to make a system call of one's choice.
fn filtered(name: &str, image: &str) -> ContainerConfig {
    let mut config = sleeper(name, image);
    security(&mut config).seccomp = profile(ProfileType::RuntimeDefault, "");
    config.mounts.push(Mount {
        container_path: "/host".into(),
        host_path: "/".into(),
        readonly: true,
        ..Default::default()
    });
    config
}

/// What perl prints for an expression.
async fn perl(node: &Node, id: &str, expression: &str) -> String {
    let script = format!("chroot /host /usr/bin/perl -e '$! = 0; {expression}'");
    node.sh(id, &script).await
}

#[cfg(target_arch = "x86_64")]
#[test]
fn the_default_filter_refuses_what_containers_have_no_use_for() {
    const NAME: &str = "the_default_filter_refuses_what_containers_have_no_use_for";
    if !std::path::Path::new("/usr/bin/perl").exists() {
        println!("SKIP {NAME}: no perl to make system calls with");
        return;
    }
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("filter").await;
        let id = node.run(&pod, &filtered("plain", &image)).await;
        let of_init = "grep -E '^Seccomp:|^CapInh|^CapAmb' /proc/1/status | tr '\\n\\t' '  '";
        assert_eq!(
            node.sh(&id, of_init).await,
            "CapInh: 0000000000000000 CapAmb: 0000000000000000 Seccomp: 2 "
        );
        let (eperm, enosys) = ("1", "38");
        // CVE-2026-31431: AF_ALG, also under another guise; AF_VSOCK.
        for family in ["38", "40", "4294967334"] {
            let call = format!("syscall(41, {family}, 5, 0); print $!+0");
            assert_eq!(perl(node, &id, &call).await, eperm, "socket {family}");
        }
        let call = "print syscall(41, 1, 1, 0) >= 0 ? \"made\" : $!+0";
        assert_eq!(perl(node, &id, call).await, "made");
        // unshare and clone with CLONE_NEWUSER, clone3, keyctl, personality(ADDR_NO_RANDOMIZE).
        for (call, answer) in [
            ("syscall(272, 0x10000000)", eperm),
            ("syscall(56, 0x10000011, 0, 0, 0, 0)", eperm),
            ("syscall(435, 0, 0)", enosys),
            ("syscall(250, 0, 0)", eperm),
            ("syscall(135, 0x40000)", eperm),
            ("syscall(135, 0xffffffff)", "0"),
        ] {
            let expression = format!("{call}; print $!+0");
            assert_eq!(perl(node, &id, &expression).await, answer, "{call}");
        }

        // The filter depends on capabilities: with SYS_ADMIN the kernel itself answers clone3.
        let mut config = filtered("admin", &image);
        security(&mut config).capabilities = Some(Capability {
            add_capabilities: vec!["sys_admin".into()],
            ..Default::default()
        });
        let id = node.run(&pod, &config).await;
        let einval = "22";
        let call = "syscall(435, 0, 0); print $!+0";
        assert_eq!(perl(node, &id, call).await, einval);
    });
}

async fn refuses(node: &Node, pod: &Pod, config: &ContainerConfig, code: Code, says: &str) {
    let answer = node.client.create(&pod.id, config, &pod.config).await;
    refused(answer, code, says);
}

#[test]
fn localhost_profiles_are_read_and_bad_ones_are_named() {
    on_plain_node(
        "localhost_profiles_are_read_and_bad_ones_are_named",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("localhost").await;
            let path = node.daemon.path("profile.json");
            let path = path.to_str().unwrap();
            let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]}"#;
            std::fs::write(path, text).unwrap();
            let with = |reference: &str| {
                let mut config = sleeper("c", &image);
                security(&mut config).seccomp = profile(ProfileType::Localhost, reference);
                config
            };
            let id = node.run(&pod, &with(path)).await;
            assert_eq!(
                node.sh(&id, "mkdir /x 2>&1 || true").await,
                "mkdir: can't create directory '/x': Permission denied"
            );
            node.client.remove(&id).await.unwrap();

            let field = "security_context.seccomp";
            let invalid = Code::InvalidArgument;
            refuses(node, &pod, &with(""), invalid, field).await;
            refuses(node, &pod, &with("profile.json"), invalid, "absolute path").await;
            refuses(node, &pod, &with("/nonexistent.json"), invalid, field).await;
            refuses(node, &pod, &with("/"), invalid, "regular file").await;
            std::fs::write(path, "{\"defaultAction\": 7").unwrap();
            refuses(node, &pod, &with(path), invalid, path).await;
            let file = std::fs::File::create(path).unwrap();
            file.set_len(64 << 20).unwrap();
            refuses(node, &pod, &with(path), invalid, "larger than").await;
        },
    );
}

#[test]
fn a_profile_of_a_module_that_the_kernel_lacks_is_refused() {
    const NAME: &str = "a_profile_of_a_module_that_the_kernel_lacks_is_refused";
    if std::path::Path::new("/sys/module/apparmor/parameters/enabled").exists() {
        println!("SKIP {NAME}: this kernel has AppArmor");
        return;
    }
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("modules").await;
        let mut config = sleeper("c", &image);
        security(&mut config).apparmor = profile(ProfileType::Localhost, "web");
        let state = Code::FailedPrecondition;
        refuses(node, &pod, &config, state, "no AppArmor").await;
        // Nothing to apply is nothing to refuse.
        security(&mut config).apparmor = profile(ProfileType::RuntimeDefault, "");
        let id = node.run(&pod, &config).await;
        node.client.remove(&id).await.unwrap();
        security(&mut config).apparmor = None;
        let options = security(&mut config)
            .selinux_options
            .get_or_insert_default();
        options.level = "s0:x".into();
        refuses(
            node,
            &pod,
            &config,
            Code::InvalidArgument,
            "selinux_options.level",
        )
        .await;
    });
}
