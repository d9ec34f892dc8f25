//! Attach: output from now on, input, terminals, clients that lag.

use std::time::{Duration, Instant};

use gantry_integration::streaming::STDIN;
use gantry_integration::{on_plain_node, refused, script_config};
use tonic::Code;

use super::{PIPES, Stdio, TTY, attach, attach_request};

#[test]
fn attached_clients_see_and_write_and_end_with_the_container() {
    const NAME: &str = "attached_clients_see_and_write_and_end_with_the_container";
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("attach").await;
        // Something comes all the time, so that who is attached sees that it is.
        let script = "echo before; while :; do echo tick; sleep 0.1; done & \
                      read x; kill $!; wait; echo out $x; echo err $x >&2; exit 5";
        let mut config = script_config("c", &image, script);
        config.stdin = true;
        let id = node.run(&pod, &config).await;
        node.has_written(&pod, "c", "before").await;
        let mut first = attach(node, &id, PIPES).await;
        let mut second = attach(node, &id, Stdio::default()).await;
        for socket in [&mut first, &mut second] {
            socket.until("tick\n");
        }
        first.send(STDIN, b"end\n").unwrap();
        for socket in [&mut first, &mut second] {
            let rest = socket.rest();
            assert!(rest.stdout.ends_with("out end\n"), "{rest:?}");
            assert!(!rest.stdout.contains("before"), "{rest:?}");
            assert!(rest.stderr.ends_with("err end\n"), "{rest:?}");
            assert_eq!(rest.result["status"], "Success", "{rest:?}");
        }
        assert_eq!(node.exited(&id).await.exit_code, 5);
        assert!(node.output(&pod, "c").ends_with("out end\n"));
        let mut client = node.client.runtime.clone();
        refused(
            client.attach(attach_request(&id, PIPES)).await,
            Code::FailedPrecondition,
            "not running",
        );
    });
}

#[test]
fn input_that_is_there_once_ends_with_its_client() {
    on_plain_node(
        "input_that_is_there_once_ends_with_its_client",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("once").await;
            for half_close in [true, false] {
                let name = format!("c{half_close}");
                let mut config = script_config(&name, &image, "cat; echo the end; exit 4");
                (config.stdin, config.stdin_once) = (true, true);
                let id = node.run(&pod, &config).await;
                let mut socket = attach(node, &id, PIPES).await;
                socket.send(STDIN, b"text\n").unwrap();
                assert_eq!(socket.until("\n"), "text\n");
                if half_close {
                    socket.finish(STDIN).unwrap();
                    assert_eq!(socket.rest().stdout, "the end\n");
                }
                drop(socket);
                assert_eq!(node.exited(&id).await.exit_code, 4);
            }
            // Otherwise the next one may go on.
            let mut config = script_config("many", &image, "cat; echo the end");
            config.stdin = true;
            let id = node.run(&pod, &config).await;
            for _ in 0..2 {
                let mut socket = attach(node, &id, PIPES).await;
                socket.send(STDIN, b"text\n").unwrap();
                assert_eq!(socket.until("\n"), "text\n");
                socket.finish(STDIN).unwrap();
                assert_eq!(socket.rest().result["status"], "Success");
            }
            assert!(node.is_running(&id).await);
        },
    );
}

#[test]
fn a_containers_terminal_is_attached_to_and_resized() {
    on_plain_node(
        "a_containers_terminal_is_attached_to_and_resized",
        async |node| {
            let image = node.busybox().await;
            let pod = node.host_pod("terminal").await;
            let script = "stty -echo; while read x; do stty size; done";
            let mut config = script_config("c", &image, script);
            (config.stdin, config.tty) = (true, true);
            let id = node.run(&pod, &config).await;
            for (width, height) in [(100, 40), (80, 25)] {
                let mut socket = attach(node, &id, TTY).await;
                socket.resize(width, height).unwrap();
                let wanted = format!("{height} {width}\r\n");
                let deadline = Instant::now() + Duration::from_secs(10);
                loop {
                    socket.send(STDIN, b"x\n").unwrap();
                    if socket.until("\r\n").contains(&wanted) {
                        break;
                    }
                    assert!(Instant::now() < deadline, "never {wanted:?}");
                }
            }
            // A client that does not know of the terminal gets what comes from it all the same.
            let mut socket = attach(node, &id, PIPES).await;
            socket.send(STDIN, b"x\n").unwrap();
            assert_eq!(socket.until("\r\n"), "25 80\r\n");
        },
    );
}

#[test]
fn a_frozen_client_holds_up_neither_the_container_nor_its_log() {
    const NAME: &str = "a_frozen_client_holds_up_neither_the_container_nor_its_log";
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        let pod = node.host_pod("frozen").await;
        let script = "read x; yes 0123456789012345678901234567890123456789 | head -n 500000; \
                      echo done; sleep 1000";
        let mut config = script_config("c", &image, script);
        config.stdin = true;
        let id = node.run(&pod, &config).await;
        let mut frozen = attach(node, &id, PIPES).await;
        frozen.send(STDIN, b"go\n").unwrap();
        // It does not read while twenty megabytes are written.
        node.has_written(&pod, "c", "done").await;
        let result = frozen.rest().result.to_string();
        assert!(result.contains("slowly"), "{result}");
        assert!(node.is_running(&id).await);
    });
}
