//! Exec, Attach and PortForward: URLs, and what happens at them.

mod attach;
mod churn;
mod clients;
mod exec;
mod forward;
mod refused;

use gantry_integration::streaming::{self, Socket};
use gantry_integration::{Node, Pod, sleeper};
use gantry_testkit::cri::v1;

const V5: &str = "v5.channel.k8s.io";

/// Which streams are asked for.
#[derive(Clone, Copy, Default)]
pub(crate) struct Stdio {
    stdin: bool,
    tty: bool,
}

pub(crate) const PIPES: Stdio = Stdio {
    stdin: true,
    tty: false,
};

pub(crate) const TTY: Stdio = Stdio {
    stdin: true,
    tty: true,
};

fn exec_request(id: &str, script: &str, stdio: Stdio) -> v1::ExecRequest {
    v1::ExecRequest {
        container_id: id.to_owned(),
        cmd: ["sh", "-c", script].map(str::to_owned).into(),
        tty: stdio.tty,
        stdin: stdio.stdin,
        stdout: true,
        stderr: !stdio.tty,
    }
}

fn attach_request(id: &str, stdio: Stdio) -> v1::AttachRequest {
    v1::AttachRequest {
        container_id: id.to_owned(),
        stdin: stdio.stdin,
        tty: stdio.tty,
        stdout: true,
        stderr: !stdio.tty,
    }
}

async fn exec(node: &Node, id: &str, script: &str, stdio: Stdio) -> Socket {
    let mut client = node.client.runtime.clone();
    let answer = client.exec(exec_request(id, script, stdio)).await;
    let url = answer.expect("Exec").into_inner().url;
    streaming::connect(node.daemon.netns(), &url, V5).expect("upgrade")
}

pub(crate) async fn attach(node: &Node, id: &str, stdio: Stdio) -> Socket {
    let mut client = node.client.runtime.clone();
    let answer = client.attach(attach_request(id, stdio)).await;
    let url = answer.expect("Attach").into_inner().url;
    streaming::connect(node.daemon.netns(), &url, V5).expect("upgrade")
}

/// A running container that does nothing.
async fn idle(node: &Node, name: &str) -> (Pod, String) {
    let image = node.busybox().await;
    let pod = node.host_pod(name).await;
    let id = node.run(&pod, &sleeper("c", &image)).await;
    (pod, id)
}

/// Processes of a container whose command line says `what`.
async fn processes(node: &Node, id: &str, what: &str) -> usize {
    let script = format!("grep -lz '^{what}$' /proc/[0-9]*/cmdline 2>/dev/null | wc -l");
    node.sh(id, &script).await.parse().unwrap()
}

async fn forward(node: &Node, pod: &str, port: i32) -> Socket {
    let mut client = node.client.runtime.clone();
    let request = v1::PortForwardRequest {
        pod_sandbox_id: pod.to_owned(),
        port: vec![port],
    };
    let answer = client.port_forward(request).await;
    let url = answer.expect("PortForward").into_inner().url;
    let netns = node.daemon.netns();
    streaming::connect(netns, &url, "v4.channel.k8s.io").expect("upgrade")
}
