//! The init that a container may ask for.

use gantry_integration::{Node, Pod, eventually, on_plain_node, refused, script_config};
use gantry_testkit::cri::security;
use gantry_testkit::cri::v1::{ContainerConfig, Int64Value};
use gantry_testkit::daemon;
use tonic::Code;

/// Only a static shim runs in an image without its libraries.
fn shim_is_static() -> bool {
    let program = std::fs::read(daemon::gantry_shim().unwrap()).unwrap();
    // elf(5), 64 bits: offset, size and number of program headers; PT_INTERP is type 3.
    let number = |at: usize, size: usize| {
        let bytes = program[at..at + size].iter().rev();
        bytes.fold(0_usize, |value, byte| value << 8 | usize::from(*byte))
    };
    let (start, size, count) = (number(0x20, 8), number(0x36, 2), number(0x38, 2));
    (0..count).all(|n| number(start + n * size, 4) != 3)
}

fn with_init(name: &str, image: &str, script: &str) -> ContainerConfig {
    let mut config = script_config(name, image, script);
    let annotation = ("gantry.io/init".to_owned(), "true".to_owned());
    config.annotations.extend([annotation]);
    config
}

fn on_node_with_init(name: &'static str, test: impl AsyncFnOnce(&mut Node, Pod, String)) {
    on_plain_node(name, async |node| {
        if !shim_is_static() {
            println!("SKIP {name}: gantry-shim is not static (deploy/build-shim)");
            return;
        }
        let image = node.busybox().await;
        let pod = node.host_pod("init").await;
        test(node, pod, image).await;
    });
}

#[test]
fn init_reaps_what_others_leave() {
    on_node_with_init("init_reaps_what_others_leave", async |node, pod, image| {
        // Each inner shell leaves a child to the first process, which by its end reaps nobody any
        // more by itself.
        let script = "for i in 1 2 3 4 5; do sh -c 'sleep 0.7 & exit 0'; done; \
                      echo ready; exec sleep 1000";
        let sleepers = "pidof sleep | wc -w";
        let zombies = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l";
        let id = node.run(&pod, &with_init("with", &image, script)).await;
        node.has_written(&pod, "with", "ready").await;
        let first = node.sh(&id, "tr '\\0' ' ' < /proc/1/cmdline").await;
        assert!(first.starts_with("/dev/gantry-init sh"), "{first}");
        eventually("only the command is left", async || {
            (node.sh(&id, sleepers).await == "1").then_some(())
        })
        .await;
        assert_eq!(node.sh(&id, zombies).await, "0");
        // Without it they stay: the test sees what it looks for.
        let id = node.run_script(&pod, "without", &image, script).await;
        eventually("the orphans end", async || {
            (node.sh(&id, zombies).await == "5").then_some(())
        })
        .await;
        assert_eq!(node.sh(&id, sleepers).await, "6");
    });
}

#[test]
fn init_hands_signals_on_and_ends_as_its_command() {
    on_node_with_init(
        "init_hands_signals_on_and_ends_as_its_command",
        async |node, pod, image| {
            let trap = "trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.05; done";
            let id = node.run(&pod, &with_init("trap", &image, trap)).await;
            node.has_written(&pod, "trap", "ready").await;
            node.client.stop(&id, 20).await.unwrap();
            assert_eq!(node.exited(&id).await.exit_code, 7);
            assert!(node.output(&pod, "trap").contains("asked"));
            // As PID 1 the kernel would spare it; below an init TERM has its effect.
            let id = node
                .run(
                    &pod,
                    &with_init("plain", &image, "echo ready; exec sleep 1000"),
                )
                .await;
            node.has_written(&pod, "plain", "ready").await;
            let before = std::time::Instant::now();
            node.client.stop(&id, 20).await.unwrap();
            assert!(before.elapsed().as_secs() < 15, "by TERM, not by KILL");
            assert_eq!(node.exited(&id).await.exit_code, 143);
            for (name, script, code) in [
                ("zero", "exit 0", 0),
                ("code", "exit 42", 42),
                ("signal", "kill -9 $$", 137),
                ("orphans", "sleep 1000 & exit 3", 3),
            ] {
                let id = node.run(&pod, &with_init(name, &image, script)).await;
                assert_eq!(node.exited(&id).await.exit_code, code, "{name}");
            }
            let mut missing = with_init("missing", &image, "");
            missing.command = vec!["/no/such/command".to_owned()];
            let id = node.run(&pod, &missing).await;
            assert_eq!(node.exited(&id).await.exit_code, 127);
            let says = node.log(&pod, "missing");
            assert!(
                says.iter()
                    .any(|line| line.text.contains("/no/such/command")),
                "{says:?}"
            );
        },
    );
}

#[test]
fn init_serves_any_user_root_and_terminal() {
    on_node_with_init(
        "init_serves_any_user_root_and_terminal",
        async |node, pod, image| {
            let mut config = with_init(
                "user",
                &image,
                "id -u; ls -A / > /tmp/x 2>&1 || echo read-only; exec sleep 1000",
            );
            let context = security(&mut config);
            context.run_as_user = Some(Int64Value { value: 1000 });
            context.readonly_rootfs = true;
            context.no_new_privs = true;
            let id = node.run(&pod, &config).await;
            node.has_written(&pod, "user", "read-only").await;
            assert!(node.output(&pod, "user").starts_with("1000\n"));
            assert_eq!(node.sh(&id, "ls -l /dev/gantry-init | cut -c1").await, "-");
            assert_eq!(
                node.sh(
                    &id,
                    "(echo x > /dev/gantry-init) 2>/dev/null || echo refused"
                )
                .await,
                "refused"
            );
            // Its descriptors are its own, not the command's.
            assert_eq!(
                node.sh(&id, "ls /proc/$(pidof sleep)/fd | tr '\\n' ' '")
                    .await,
                "0 1 2 "
            );

            let mut config = with_init("tty", &image, "test -t 0 && test -t 1 && echo terminal");
            config.tty = true;
            let id = node.run(&pod, &config).await;
            assert_eq!(node.exited(&id).await.exit_code, 0);
            assert_eq!(node.output(&pod, "tty").trim_end(), "terminal");

            let mut bad = with_init("bad", &image, "");
            bad.annotations
                .insert("gantry.io/init".to_owned(), "maybe".to_owned());
            let answer = node.client.create(&pod.id, &bad, &pod.config).await;
            refused(answer, Code::InvalidArgument, "gantry.io/init");
        },
    );
}
