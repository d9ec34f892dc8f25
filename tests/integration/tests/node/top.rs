//! `gantryctl top`: what pods and containers use, as people and programs read it.

use std::path::Path;
use std::process::Output;

use gantry_integration::gantryctl::Gantryctl;
use gantry_integration::{Node, on_plain_node, script_config, sleeper};
use serde_json::Value;

fn top(program: &Path, node: &Node, args: &[&str]) -> Output {
    let args = [&["top"], args].concat();
    Gantryctl::new(program, &node.daemon).feed(&args, Vec::new())
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn top_shows_who_uses_most_first() {
    const NAME: &str = "top_shows_who_uses_most_first";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let image = node.busybox().await;
        // By name the idle ones come first.
        let idle = node.pod("a-idle").await;
        node.run(&idle, &sleeper("c", &image)).await;
        let pod = node.pod("b-busy").await;
        node.run(&pod, &sleeper("a-sleeps", &image)).await;
        let script = "trap 'exit 0' TERM; while :; do :; done";
        let busy = node
            .run(&pod, &script_config("b-works", &image, script))
            .await;

        // No terminal: one table, with rates.
        let shown = text(&top(&program, node, &["--interval", "1"]));
        let find = |what: &str| {
            let mut lines = shown.lines();
            lines.position(|line| line.contains(what)).expect(what)
        };
        assert!(
            find("CONTAINER") == 0 && shown.lines().count() == 6,
            "{shown}"
        );
        assert!(find("/b-busy") < find("b-works"), "{shown}");
        assert!(find("b-works") < find("a-sleeps"), "{shown}");
        assert!(find("a-sleeps") < find("/a-idle"), "{shown}");
        let works = shown.lines().nth(find("b-works")).unwrap();
        let cores: f64 = works.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!((0.05..64.0).contains(&cores), "{shown}");
        assert!(!shown.contains('\x1b'), "{shown}");

        let shown = text(&top(&program, node, &["--interval", "1", "--sort", "name"]));
        let find = |what: &str| shown.find(what).expect(what);
        assert!(find("/a-idle") < find("/b-busy") && find("a-sleeps") < find("b-works"));

        // As many lines of JSON as looks.
        let shown = text(&top(
            &program,
            node,
            &["--interval", "1", "-n", "2", "--json"],
        ));
        let frames: Vec<Value> = shown
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(frames.len(), 2);
        for frame in &frames {
            let first = &frame["pods"][0];
            assert_eq!(first["id"], pod.id.as_str(), "{frame:#}");
            assert_eq!(first["name"], "b-busy");
            let container = &first["containers"][0];
            assert_eq!(container["id"], busy.as_str());
            assert!(container["memoryBytes"].as_u64().unwrap() > 0);
            assert!(first["processes"].as_u64().unwrap() >= 3, "{frame:#}");
            assert!(first["receivedBytesPerSecond"].is_f64(), "{frame:#}");
        }

        // What cannot be meant is told, and by name.
        for bad in [
            &["--interval", "0"][..],
            &["--interval", "3601"],
            &["--interval", "-1"],
            &["-n", "0"],
            &["--sort", "size"],
            &["pod"],
        ] {
            let output = top(&program, node, bad);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{bad:?} {said}");
            assert!(said.contains(bad[bad.len() - 1]), "{bad:?} {said}");
        }
    });
}

#[test]
fn top_ends_with_its_terminal_its_reader_and_its_daemon() {
    const NAME: &str = "top_ends_with_its_terminal_its_reader_and_its_daemon";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let pod = node.pod("p").await;
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        let mut terminal = gantryctl.terminal(&["top", "--interval", "1"]);
        terminal.resize(40, 10);
        // Frame after frame, in the place of the one before.
        let first = terminal.until("\x1b[H", "\x1b[J");
        assert!(first.contains("/p"), "{first:?}");
        for line in first.replace("\x1b[K", "").lines() {
            assert!(line.chars().count() <= 40, "{line:?}");
        }
        terminal.until("\x1b[J", "\x1b[J");
        terminal.write("\x03");
        let (ended_well, shown) = terminal.finish();
        assert!(ended_well, "{shown:?}");

        // A reader who has seen enough.
        let output = std::process::Command::new("timeout")
            .args(["60", "sh", "-c"])
            .arg("\"$0\" --socket \"$1\" top --interval 1 -n 1000 | head -n 1")
            .args([program.as_path(), node.daemon.socket()])
            .output()
            .unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        assert!(output.stdout.starts_with(b"POD"), "{output:?}");

        // A daemon that is not there.
        node.daemon.kill().unwrap();
        let output = top(&program, node, &[]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let socket = node.daemon.socket().to_str().unwrap();
        assert!(
            said.contains("connect to") && said.contains(socket),
            "{said}"
        );
        node.start_again(&[]).await;
        assert!(node.pod_is_ready(&pod.id).await);
    });
}
