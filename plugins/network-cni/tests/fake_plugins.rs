//! The port against plugins that are shell scripts: what they are told, and what becomes of their
//! answers, failures and silence.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use gantry_network_cni::{Cni, Options};
use gantry_ports::Network;
use gantry_ports::network::{Attachment, Dns, PortMapping, Protocol};
use gantry_types::{ErrorKind, Kind, PodId};
use serde_json::{Value, json};

/// Directories of one test, and the scripts in them. Each script appends to `calls` and keeps what
/// it was told in `TYPE.COMMAND.env` and `TYPE.COMMAND.stdin`.
struct Node {
    temp: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir(temp.path().join("bin")).unwrap();
        std::fs::create_dir(temp.path().join("net.d")).unwrap();
        Self { temp }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn options(&self) -> Options {
        Options {
            conf_dir: self.path("net.d"),
            bin_dirs: vec![self.path("no-such-dir"), self.path("bin")],
            timeout: Duration::from_secs(60),
            status_interval: Duration::from_millis(100),
            calls_dir: PathBuf::new(),
        }
    }

    /// A plugin; `body` is run with the name of the command in `$CNI_COMMAND`.
    fn plugin(&self, name: &str, body: &str) {
        let dir = self.temp.path().display();
        // A command may be asked again while a test reads what it was told before.
        let script = format!(
            "#!/bin/sh\ncd {dir}\necho \"{name} $CNI_COMMAND\" >> calls\n\
             env > {name}.$CNI_COMMAND.env\n\
             cat > $$.told && mv $$.told {name}.$CNI_COMMAND.stdin\n{body}\n"
        );
        let path = self.path("bin").join(name);
        // By a process of its own: one that another test forks meanwhile would inherit a descriptor
        // for writing, and executing the file would fail with ETXTBSY.
        let mut writer = std::process::Command::new("sh")
            .args(["-c", "cat >\"$0\" && chmod 755 \"$0\""])
            .arg(&path)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = writer.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, script.as_bytes()).unwrap();
        drop(input);
        assert!(writer.wait().unwrap().success());
    }

    /// A plugin whose ADD answers with `result`.
    fn adds(&self, name: &str, result: Value) {
        self.plugin(name, &format!("[ $CNI_COMMAND != ADD ] || echo '{result}'"));
    }

    fn network(&self, file: &str, value: Value) {
        // By rename, as careful installers do.
        let temporary = self.path("net.d").join("x.tmp");
        std::fs::write(&temporary, value.to_string()).unwrap();
        std::fs::rename(temporary, self.path("net.d").join(file)).unwrap();
    }

    /// A network of plugins without options.
    fn chain(&self, version: &str, types: &[&str]) {
        let plugins: Vec<Value> = types.iter().map(|name| json!({"type": name})).collect();
        let value = json!({"cniVersion": version, "name": "pods", "plugins": plugins});
        self.network("10-pods.conflist", value);
    }

    fn start(&self) -> Cni {
        Cni::start(self.options()).unwrap()
    }

    fn calls(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.path("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn stdin(&self, name: &str, command: &str) -> Value {
        let text = std::fs::read(self.path(&format!("{name}.{command}.stdin"))).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    fn env(&self, name: &str, command: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.path(&format!("{name}.{command}.env"))).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

fn result(addresses: &[&str]) -> Value {
    let ips: Vec<Value> = addresses
        .iter()
        .map(|it| json!({"address": it, "interface": 1}))
        .collect();
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
        "ips": ips,
    })
}

fn pod() -> Attachment {
    Attachment {
        pod: PodId::from_random([7; 32]),
        name: "web-0".into(),
        namespace: "shop".into(),
        uid: "u-1".into(),
        netns: Some("/run/netns/x".into()),
        port_mappings: Vec::new(),
        dns: None,
        annotations: Default::default(),
        cgroup_parent: String::new(),
    }
}

/// Waits for what will come to pass; fails after a time that no healthy machine needs.
async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(30), "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn add_runs_the_chain_and_del_runs_it_back() {
    let node = Node::new();
    node.adds("first", result(&["10.0.0.2/24"]));
    let mut last = result(&["10.0.0.2/24"]);
    last["dns"] = json!({"nameservers": ["10.0.0.1"]});
    node.adds("second", last.clone());
    node.chain("1.0.0", &["first", "second"]);
    let cni = node.start();
    cni.ready().unwrap();

    let intent = cni.intent().unwrap();
    let attached = cni.attach(&pod(), &intent).await.unwrap();
    assert_eq!(
        attached.ips,
        ["10.0.0.2".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(node.calls(), ["first ADD", "second ADD"]);
    assert_eq!(
        node.stdin("first", "ADD"),
        json!({"cniVersion": "1.0.0", "name": "pods", "type": "first"})
    );
    assert_eq!(
        node.stdin("second", "ADD")["prevResult"],
        result(&["10.0.0.2/24"])
    );

    let id = pod().pod;
    let env = node.env("first", "ADD");
    for expected in [
        format!("CNI_CONTAINERID={id}"),
        "CNI_IFNAME=eth0".into(),
        "CNI_NETNS=/run/netns/x".into(),
        format!(
            "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;\
             K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID=u-1"
        ),
        format!(
            "CNI_PATH={}:{}",
            node.path("no-such-dir").display(),
            node.path("bin").display()
        ),
    ] {
        assert!(env.contains(&expected), "{expected} is not in {env:?}");
    }
    let ours = ["CNI_", "PATH=", "PWD=", "OLDPWD=", "SHLVL=", "_="];
    let foreign: Vec<_> = env
        .iter()
        .filter(|it| !ours.iter().any(|prefix| it.starts_with(prefix)))
        .collect();
    assert!(foreign.is_empty(), "{foreign:?}");

    // The configuration goes, then the namespace: teardown needs neither.
    std::fs::remove_file(node.path("net.d").join("10-pods.conflist")).unwrap();
    let gone = Attachment {
        netns: None,
        ..pod()
    };
    cni.detach(&gone, &attached.raw).await.unwrap();
    cni.detach(&gone, &attached.raw).await.unwrap();
    assert_eq!(node.calls()[2..4], ["second DEL", "first DEL"]);
    assert!(node.env("first", "DEL").contains(&"CNI_NETNS=".to_owned()));
    assert_eq!(node.stdin("first", "DEL")["prevResult"], last);
    assert_eq!(node.stdin("second", "DEL")["prevResult"], last);
}

#[tokio::test]
async fn a_failed_add_says_the_plugins_words_and_is_undone() {
    let node = Node::new();
    node.adds("first", result(&["10.0.0.2/24"]));
    node.plugin(
        "second",
        r#"[ $CNI_COMMAND != ADD ] || { echo noise >&2
            echo '{"cniVersion":"1.0.0","code":11,"msg":"pool is dry","details":"10.0.0.0/24"}'
            exit 1; }"#,
    );
    node.plugin("third", "");
    node.chain("1.0.0", &["first", "second", "third"]);
    let cni = node.start();

    let intent = cni.intent().unwrap();
    let error = cni.attach(&pod(), &intent).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("second") && text.contains("pool is dry; 10.0.0.0/24"),
        "{text}"
    );
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(
        node.calls(),
        [
            "first ADD",
            "second ADD",
            "third DEL",
            "second DEL",
            "first DEL"
        ]
    );
    // The core detaches once more with what it has: the intent.
    cni.detach(&pod(), &intent).await.unwrap();
    assert_eq!(node.stdin("first", "DEL").get("prevResult"), None);
}

#[tokio::test]
async fn stderr_speaks_for_a_plugin_without_an_error_object() {
    let node = Node::new();
    node.plugin(
        "first",
        "[ $CNI_COMMAND != ADD ] || { echo 'no such bridge' >&2; exit 3; }",
    );
    node.chain("1.0.0", &["first"]);
    let cni = node.start();
    let error = cni
        .attach(&pod(), &cni.intent().unwrap())
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no such bridge") && error.contains("exit status: 3"),
        "{error}"
    );
}

#[tokio::test]
async fn a_failing_del_does_not_spare_the_others_and_can_be_repeated() {
    let node = Node::new();
    node.adds("first", result(&["10.0.0.2/24"]));
    node.plugin(
        "second",
        "[ -e mended ] || { echo '{\"msg\":\"stuck\"}'; exit 1; }",
    );
    node.chain("1.0.0", &["first", "second"]);
    let cni = node.start();
    let intent = cni.intent().unwrap();

    let error = cni.attach(&pod(), &intent).await.unwrap_err().to_string();
    assert!(
        error.contains("ADD failed: stuck") && error.contains("DEL failed: stuck"),
        "{error}"
    );
    let error = cni.detach(&pod(), &intent).await.unwrap_err().to_string();
    assert!(error.contains("stuck"), "{error}");
    assert_eq!(
        node.calls()
            .iter()
            .filter(|call| *call == "first DEL")
            .count(),
        2
    );
    std::fs::write(node.path("mended"), "").unwrap();
    cni.detach(&pod(), &intent).await.unwrap();
}

/// The process is gone, or a zombie that only waits for its parent.
fn has_ended(pid: &str) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim().starts_with('Z')),
        Err(_) => true,
    }
}

const HANGS: &str = "[ $CNI_COMMAND != ADD ] || { sleep 1000 & echo $! > grandchild
    echo $$ > child; mv child child.pid; sleep 1000; }";

async fn pids(node: &Node) -> [String; 2] {
    let child = node.path("child.pid");
    eventually("the plugin runs", || child.exists()).await;
    [child, node.path("grandchild")]
        .map(|path| std::fs::read_to_string(path).unwrap().trim().to_owned())
}

#[tokio::test]
async fn a_hung_plugin_is_killed_with_its_group() {
    let node = Node::new();
    node.plugin("first", HANGS);
    node.chain("1.0.0", &["first"]);
    let options = Options {
        // Enough for it to get to where it hangs, and for the DEL.
        timeout: Duration::from_secs(10),
        ..node.options()
    };
    let cni = Cni::start(options).unwrap();
    let error = cni
        .attach(&pod(), &cni.intent().unwrap())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded, "{error}");
    assert!(node.calls().contains(&"first DEL".to_owned()));
    for pid in pids(&node).await {
        eventually("the group is dead", || has_ended(&pid)).await;
    }
}

#[tokio::test]
async fn a_plugin_dies_with_the_interest_in_it() {
    let node = Node::new();
    node.plugin("first", HANGS);
    node.chain("1.0.0", &["first"]);
    let cni = node.start();
    let intent = cni.intent().unwrap();
    let pids = {
        let pod = pod();
        let mut attach = cni.attach(&pod, &intent);
        tokio::select! {
            _ = &mut attach => panic!("it does not answer"),
            pids = pids(&node) => pids,
        }
    };
    for pid in pids {
        eventually("the group is dead", || has_ended(&pid)).await;
    }
}

#[tokio::test]
async fn a_child_that_keeps_the_pipes_does_not_hold_up_the_answer() {
    let node = Node::new();
    let answer = result(&["10.0.0.2/24"]);
    node.plugin(
        "first",
        &format!("sleep 1000 & echo $! > grandchild; echo '{answer}'"),
    );
    node.chain("1.0.0", &["first"]);
    let cni = node.start();
    cni.attach(&pod(), &cni.intent().unwrap()).await.unwrap();
    let pid = std::fs::read_to_string(node.path("grandchild")).unwrap();
    eventually("it is dead", || has_ended(pid.trim())).await;
}

#[tokio::test]
async fn answers_are_bounded_and_checked() {
    for (body, what) in [
        ("yes | head -c 3000000", "longer than"),
        ("echo '{'", "bad result"),
        ("true", "bad result"),
        ("echo '{\"cniVersion\":\"1.0.0\"}'", "no address"),
        ("echo '{\"ips\":[{\"address\":\"x\"}]}'", "no address"),
        ("yes err | head -c 3000000 >&2; exit 1", "err"),
        ("kill -9 $$", "signal: 9"),
    ] {
        let node = Node::new();
        node.plugin(
            "first",
            &format!("[ $CNI_COMMAND != ADD ] || {{ {body}; }}"),
        );
        node.chain("1.0.0", &["first"]);
        let cni = node.start();
        let error = cni
            .attach(&pod(), &cni.intent().unwrap())
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(what) && error.len() < 6000,
            "{body}: {error}"
        );
        assert_eq!(node.calls(), ["first ADD", "first DEL"], "{body}");
    }
}

#[tokio::test]
async fn a_plugin_that_is_not_installed_is_named() {
    let node = Node::new();
    node.chain("1.0.0", &["missing"]);
    let cni = node.start();
    let error = cni
        .attach(&pod(), &cni.intent().unwrap())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
}

#[tokio::test]
async fn capabilities_carry_what_the_pod_says() {
    let node = Node::new();
    node.adds("all", result(&["10.0.0.2/24"]));
    node.adds("none", result(&["10.0.0.2/24"]));
    let capabilities = json!({
        "portMappings": true, "bandwidth": true, "dns": true, "cgroupPath": true,
        "io.kubernetes.cri.pod-annotations": true, "mac": true, "ips": false,
    });
    node.network(
        "10-pods.conflist",
        json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
            {"type": "all", "capabilities": capabilities},
            {"type": "none", "capabilities": {"portMappings": false}},
        ]}),
    );
    let mapping = |host_port, protocol| PortMapping {
        protocol,
        container_port: 80,
        host_port,
        host_ip: "127.0.0.1".into(),
    };
    let pod = Attachment {
        port_mappings: vec![mapping(8080, Protocol::Udp), mapping(0, Protocol::Tcp)],
        dns: Some(Dns {
            servers: vec!["10.0.0.1".into()],
            ..Default::default()
        }),
        annotations: [
            (
                "kubernetes.io/ingress-bandwidth".to_owned(),
                "10M".to_owned(),
            ),
            (
                "kubernetes.io/egress-bandwidth".to_owned(),
                "1.5k".to_owned(),
            ),
        ]
        .into(),
        cgroup_parent: "/kubepods/podx".into(),
        ..pod()
    };
    let cni = node.start();
    let attached = cni.attach(&pod, &cni.intent().unwrap()).await.unwrap();
    let expected = json!({
        "portMappings": [{
            "hostPort": 8080, "containerPort": 80, "protocol": "udp", "hostIP": "127.0.0.1",
        }],
        "bandwidth": {
            "ingressRate": 10_000_000, "ingressBurst": u32::MAX,
            "egressRate": 1500, "egressBurst": u32::MAX,
        },
        "dns": {"servers": ["10.0.0.1"], "searches": [], "options": []},
        "cgroupPath": "/kubepods/podx",
        "io.kubernetes.cri.pod-annotations": pod.annotations,
    });
    assert_eq!(node.stdin("all", "ADD")["runtimeConfig"], expected);
    assert_eq!(node.stdin("all", "ADD").get("capabilities"), None);
    assert_eq!(node.stdin("none", "ADD").get("runtimeConfig"), None);
    cni.detach(&pod, &attached.raw).await.unwrap();
    assert_eq!(node.stdin("all", "DEL")["runtimeConfig"], expected);
}

#[tokio::test]
async fn what_add_refuses_needs_no_del() {
    let node = Node::new();
    node.adds("first", result(&["10.0.0.2/24"]));
    node.network(
        "10-pods.conflist",
        json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
            {"type": "first", "capabilities": {"bandwidth": true}},
        ]}),
    );
    let cni = node.start();
    let intent = cni.intent().unwrap();
    let annotation = (
        "kubernetes.io/ingress-bandwidth".to_owned(),
        "much".to_owned(),
    );
    for bad in [
        Attachment {
            annotations: [annotation].into(),
            ..pod()
        },
        Attachment {
            name: "x;K8S_POD_NAMESPACE=kube-system".into(),
            ..pod()
        },
        Attachment {
            netns: Some("relative".into()),
            ..pod()
        },
        Attachment {
            netns: None,
            ..pod()
        },
    ] {
        let error = cni.attach(&bad, &intent).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert_eq!(node.calls(), [""; 0], "{error}");
        cni.detach(&bad, &intent).await.unwrap();
        let _ = std::fs::remove_file(node.path("calls"));
    }
}

#[tokio::test]
async fn records_that_are_not_ours_are_refused() {
    let node = Node::new();
    let cni = node.start();
    // Nothing recorded, nothing owed.
    cni.detach(&pod(), b"").await.unwrap();
    let evil = json!({
        "config": {"name": "n", "cniVersion": "1.0.0", "plugins": [{"type": "../../bin/sh"}]},
        "ifname": "eth0",
    })
    .to_string();
    for bad in ["{}", "junk", &evil] {
        assert!(cni.detach(&pod(), bad.as_bytes()).await.is_err(), "{bad}");
        assert!(cni.attach(&pod(), bad.as_bytes()).await.is_err(), "{bad}");
    }
}

#[tokio::test]
async fn dual_stack_keeps_the_order_of_the_plugin() {
    for order in [["fd00::2/64", "10.0.0.2/24"], ["10.0.0.2/24", "fd00::2/64"]] {
        let node = Node::new();
        node.adds("first", result(&order));
        node.chain("0.4.0", &["first"]);
        let cni = node.start();
        let attached = cni.attach(&pod(), &cni.intent().unwrap()).await.unwrap();
        let ips: Vec<_> = attached.ips.iter().map(|ip| ip.to_string()).collect();
        assert_eq!(
            ips,
            order.map(|cidr| cidr.split('/').next().unwrap().to_owned())
        );
    }
}

#[tokio::test]
async fn the_directory_is_watched() {
    let node = Node::new();
    let dir = node.path("net.d");
    std::fs::remove_dir(&dir).unwrap();
    let cni = node.start();
    let not_ready = cni.ready().unwrap_err();
    assert_eq!(not_ready.reason, "NetworkPluginNotReady");
    assert!(
        not_ready.message.contains(dir.to_str().unwrap()),
        "{}",
        not_ready.message
    );
    assert_eq!(cni.intent().unwrap_err().kind(), ErrorKind::Unavailable);

    eventually("the directory is made", || dir.is_dir()).await;
    std::fs::write(dir.join("20-pods.conflist"), "{").unwrap();
    eventually("the broken file is named", || {
        cni.ready()
            .is_err_and(|it| it.message.contains("20-pods.conflist"))
    })
    .await;
    node.chain("1.0.0", &["first"]);
    eventually("ready", || cni.ready().is_ok()).await;
    assert_eq!(cni.describe()["Networks"][0]["Config"]["Name"], "pods");

    // An earlier name takes over; pods keep what they were made with.
    let before = cni.intent().unwrap();
    let other = json!({"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "second"}]});
    node.network("05-other.conflist", other);
    eventually("the other network", || cni.intent().unwrap() != before).await;
    node.plugin("first", "");
    cni.detach(&pod(), &before).await.unwrap();
    assert_eq!(node.calls(), ["first DEL"]);

    std::fs::remove_dir_all(&dir).unwrap();
    eventually("not ready", || cni.ready().is_err()).await;
    eventually("the directory is made again", || dir.is_dir()).await;
    node.chain("1.0.0", &["first"]);
    eventually("ready again", || cni.ready().is_ok()).await;
}

#[tokio::test]
async fn plugins_of_cni_1_1_are_asked_for_their_status() {
    let node = Node::new();
    let body = r#"[ $CNI_COMMAND != STATUS ] || [ -e up ] ||
        { echo '{"code":50,"msg":"daemon is down"}'; exit 1; }"#;
    node.plugin("first", body);
    node.chain("1.1.0", &["first"]);
    let cni = node.start();
    assert!(cni.ready().is_err());
    eventually("down", || {
        cni.ready()
            .is_err_and(|it| it.message.contains("daemon is down"))
    })
    .await;
    std::fs::write(node.path("up"), "").unwrap();
    eventually("up", || cni.ready().is_ok()).await;
    std::fs::remove_file(node.path("up")).unwrap();
    eventually("down again", || cni.ready().is_err()).await;
    assert_eq!(node.stdin("first", "STATUS")["cniVersion"], "1.1.0");

    // Older networks cannot be asked and are not.
    node.chain("1.0.0", &["first"]);
    eventually("ready by version", || cni.ready().is_ok()).await;
}

#[tokio::test]
async fn ready_does_not_wait_for_a_hung_status() {
    let node = Node::new();
    node.plugin("first", "sleep 1000");
    node.chain("1.1.0", &["first"]);
    let cni = node.start();
    eventually("it is asked", || !node.calls().is_empty()).await;
    assert!(cni.ready().unwrap_err().message.contains("not been asked"));
}

#[tokio::test]
async fn garbage_is_collected_where_plugins_can() {
    let node = Node::new();
    node.plugin("first", "");
    node.chain("1.1.0", &["first"]);
    let cni = node.start();
    let pods = [PodId::from_random([1; 32]), PodId::from_random([2; 32])];
    cni.gc(&pods).await.unwrap();
    assert_eq!(
        node.stdin("first", "GC")["cni.dev/valid-attachments"],
        json!([
            {"containerID": pods[0].as_str(), "ifname": "eth0"},
            {"containerID": pods[1].as_str(), "ifname": "eth0"},
        ])
    );

    node.chain("1.0.0", &["first"]);
    eventually("the older network", || {
        cni.describe()["Networks"][0]["Config"]["CNIVersion"] == "1.0.0"
    })
    .await;
    std::fs::remove_file(node.path("first.GC.stdin")).unwrap();
    cni.gc(&pods).await.unwrap();
    assert!(!Path::new(&node.path("first.GC.stdin")).exists());
}

#[tokio::test]
async fn the_pod_cidr_is_shown() {
    let node = Node::new();
    let cni = node.start();
    cni.update_pod_cidr("10.1.0.0/24,fd00::/64").await.unwrap();
    assert_eq!(cni.describe()["PodCIDR"], "10.1.0.0/24,fd00::/64");
}
