//! What must hold of a node that has come up after a cut.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use gantry_integration::gantryctl::Gantryctl;
use gantry_integration::{Node, sleeper};
use gantry_testkit::cri::{
    self,
    v1::{ContainerState, PodSandboxState},
};
use gantry_testkit::image::digest;
use gantry_testkit::leakcheck::Snapshot;

use crate::history::{Expected, Presence};
use crate::workload::Images;

/// What was looked at, and what was wrong.
#[derive(Debug, Default)]
pub struct Report {
    /// Acknowledged changes of which the outcome was looked at.
    pub acknowledged: usize,
    /// Lines for people; none: all is well.
    pub faults: Vec<String>,
    /// The store would not open, and was begun anew.
    pub set_aside: bool,
    /// From the start of gantryd to its first answer.
    pub start: Duration,
}

impl Report {
    fn fault(&mut self, line: impl Into<String>) {
        self.faults.push(line.into());
    }

    /// Takes an error as a fault.
    fn expect<T, E: std::fmt::Display>(&mut self, what: &str, got: Result<T, E>) -> Option<T> {
        got.map_err(|error| self.fault(format!("{what}: {error}")))
            .ok()
    }
}

/// Starts a gantryd on what a cut left and looks at everything. `empty` is what a node has that
/// has never had a pod.
pub async fn after(
    node: &mut Node,
    images: &Images,
    expected: &Expected,
    empty: &Snapshot,
    random: &mut fastrand::Rng,
) -> Report {
    let mut report = Report {
        acknowledged: expected.acknowledged,
        ..Report::default()
    };
    let logged = node.daemon.log().len();
    let started = Instant::now();
    let up = async {
        node.daemon.spawn()?;
        node.daemon.ready().await
    };
    if report.expect("start", up.await).is_none() {
        return report;
    }
    report.start = started.elapsed();
    report.set_aside = node.daemon.log()[logged..].contains("set aside");
    // The old connection is found broken and made anew.
    let version = gantry_integration::while_unavailable(async || node.client.version().await).await;
    report.expect("Version", version);
    blobs_are_whole(node, &mut report);
    images_are_right(node, images, expected, &mut report).await;
    pods_are_right(node, expected, &mut report).await;
    images_are_usable(node, images, random, &mut report).await;
    everything_goes(node, empty, &mut report).await;
    if report.faults.is_empty() {
        let status = node.daemon.terminate();
        if let Some(status) = report.expect("SIGTERM", status)
            && !status.success()
        {
            report.fault(format!("gantryd ends with {status}"));
        }
    }
    report
}

/// Compares what is listed, as names by id, with what must be.
fn presence(
    kind: &str,
    expected: &BTreeMap<String, Presence>,
    half_made: &[String],
    listed: &BTreeMap<String, String>,
    report: &mut Report,
) {
    for (id, presence) in expected {
        match (presence, listed.contains_key(id)) {
            (Presence::Present, false) => report.fault(format!("{kind} {id} is lost")),
            (Presence::Absent, true) => report.fault(format!("{kind} {id} is back")),
            _ => {}
        }
    }
    for (id, name) in listed {
        if !expected.contains_key(id) && !half_made.contains(name) {
            report.fault(format!("{kind} {id} ({name}) comes from nowhere"));
        }
    }
}

/// What has the name of a blob is believed to be that blob, also by a later pull: whether an image
/// needs it or not.
fn blobs_are_whole(node: &Node, report: &mut Report) {
    let dir = node.daemon.places().root.join("content/blobs/sha256");
    for name in gantry_testkit::leakcheck::names(&dir) {
        let read = std::fs::read(dir.join(&name));
        if let Some(bytes) = report.expect("read of a blob", read)
            && digest(&bytes).hex() != name
        {
            report.fault(format!("blob {name} is another: {} bytes", bytes.len()));
        }
    }
}

async fn images_are_right(node: &Node, images: &Images, expected: &Expected, report: &mut Report) {
    let Some(listed) = report.expect("ListImages", node.client.list_images().await) else {
        return;
    };
    let mut names = BTreeMap::new();
    for image in listed {
        if image.repo_tags.is_empty() && image.repo_digests.is_empty() {
            report.fault(format!("image {} has no name", image.id));
        }
        for tag in image.repo_tags {
            if let Some(made) = images.images.get(&tag)
                && made.id() != image.id
            {
                report.fault(format!("image {tag} is {} and not {}", image.id, made.id()));
            }
            names.insert(tag, image.id.clone());
        }
    }
    presence("image", &expected.images, &[], &names, report);
    // Every blob against its digest, every unpacked layer against its archive.
    image_command(node, &["verify"], report).await;
}

/// A `gantryctl image` that must succeed.
async fn image_command(node: &Node, args: &'static [&'static str], report: &mut Report) {
    let program = match gantry_testkit::daemon::gantryctl() {
        Ok(program) => program,
        Err(error) => return report.fault(error.to_string()),
    };
    let gantryctl = Gantryctl::new(&program, &node.daemon);
    let ended = tokio::task::spawn_blocking(move || gantryctl.image(args)).await;
    match report.expect("gantryctl", ended) {
        Some((0, _, _)) | None => {}
        Some((code, out, said)) => {
            report.fault(format!("gantryctl image {args:?}: {code}: {out}{said}"));
        }
    }
}

async fn pods_are_right(node: &Node, expected: &Expected, report: &mut Report) {
    if let Some(pods) = report.expect("ListPodSandbox", node.client.list_pods(None).await) {
        for pod in &pods {
            if pod.state() != PodSandboxState::SandboxNotready {
                report.fault(format!("pod {} is ready after a boot", pod.id));
            }
        }
        let listed = pods
            .into_iter()
            .map(|pod| (pod.id, pod.metadata.unwrap_or_default().name));
        presence(
            "pod",
            &expected.pods,
            &expected.half_made,
            &listed.collect(),
            report,
        );
    }
    let Some(containers) = report.expect("ListContainers", node.client.list(None).await) else {
        return;
    };
    for container in &containers {
        let state = container.state();
        if matches!(
            state,
            ContainerState::ContainerRunning | ContainerState::ContainerUnknown
        ) {
            report.fault(format!(
                "container {} is {state:?} after a boot",
                container.id
            ));
        }
        let ended = expected
            .containers
            .get(&container.id)
            .and_then(|known| known.ended);
        let status = node.client.status(&container.id).await;
        if let (Some(code), Some(status)) = (ended, report.expect("ContainerStatus", status))
            && (state != ContainerState::ContainerExited || status.exit_code != code)
        {
            report.fault(format!(
                "container {} ended with {code}: {status:?}",
                container.id
            ));
        }
    }
    let known = expected.containers.iter();
    let known = known
        .map(|(id, container)| (id.clone(), container.presence))
        .collect();
    let listed = containers
        .into_iter()
        .map(|container| (container.id, container.metadata.unwrap_or_default().name))
        .collect();
    presence("container", &known, &expected.half_made, &listed, report);
}

/// Pulls every image, which heals what a cut took, and runs a container of one.
async fn images_are_usable(
    node: &Node,
    images: &Images,
    random: &mut fastrand::Rng,
    report: &mut Report,
) {
    let listed = node.client.list_images().await.unwrap_or_default();
    let listed: Vec<String> = listed
        .into_iter()
        .flat_map(|image| image.repo_tags)
        .collect();
    // First one that is there, as it is.
    if !listed.is_empty() {
        let name = &listed[random.usize(..listed.len())];
        runs(node, "as-it-is", name, report).await;
    }
    for (name, image) in &images.images {
        if let Some(id) = report.expect(&format!("pull of {name}"), node.client.pull(name).await)
            && id != image.id()
        {
            report.fault(format!("pull of {name} gives {id}"));
        }
    }
    // Now with the layers that the cut had left to nobody. It takes as long as all the rest.
    if random.u8(..3) == 0 {
        image_command(node, &["verify"], report).await;
    }
    let names: Vec<&String> = images.images.keys().collect();
    runs(node, "pulled", names[random.usize(..names.len())], report).await;
}

/// Runs a container that reads all of its root file system.
async fn runs(node: &Node, pod: &str, image: &str, report: &mut Report) {
    let config = node.pod_config(pod);
    let client = &node.client;
    let run = async {
        let pod = client.run_pod(&config).await?;
        let container = client.create(&pod, &sleeper("c", image), &config).await?;
        client.start(&container).await?;
        let read = "cat /bin/busybox /layer-*/* >/dev/null 2>&1; ls -lR /bin /etc >/dev/null";
        let output = client.exec(&container, &["sh", "-c", read], 20).await?;
        cri::Result::Ok(output)
    };
    if let Some(output) = report.expect(&format!("a container of {image}"), run.await)
        && output.exit_code != 0
    {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        report.fault(format!("in a container of {image}: {said}"));
    }
}

/// Addresses that host-local holds, with what their files say.
fn addresses_left(node: &Node, report: &mut Report) {
    let dir = &node.daemon.places().ipam_dir;
    for network in gantry_testkit::leakcheck::names(dir) {
        let dir = dir.join(network);
        for name in gantry_testkit::leakcheck::names(&dir) {
            if name.parse::<std::net::IpAddr>().is_ok() {
                let said = std::fs::read_to_string(dir.join(&name)).unwrap_or_default();
                report.fault(format!("left behind: address {name} of {said:?}"));
            }
        }
    }
}

/// Removes all pods and images; nothing may be left of them.
async fn everything_goes(node: &Node, empty: &Snapshot, report: &mut Report) {
    let pods = node.client.list_pods(None).await.unwrap_or_default();
    for pod in pods {
        let name = pod.metadata.unwrap_or_default().name;
        let stopped = node.client.stop_pod(&pod.id).await;
        report.expect(&format!("stop of pod {name}"), stopped);
        let removed = node.client.remove_pod(&pod.id).await;
        report.expect(&format!("removal of pod {name}"), removed);
    }
    let images = node.client.list_images().await.unwrap_or_default();
    for image in images {
        let removed = node.client.remove_image(&image.id).await;
        report.expect(&format!("removal of image {}", image.id), removed);
    }
    // As the hourly one does it.
    image_command(node, &["gc"], report).await;
    let left = node.daemon.leaks(empty);
    // Those of another gantryd, and processes that are this one under another pid.
    report.faults.extend(
        left.into_iter()
            .filter(|leak| !leak.starts_with("descriptor") && !leak.starts_with("address"))
            .map(|leak| format!("left behind: {leak}")),
    );
    let root = &node.daemon.places().root;
    addresses_left(node, report);
    // Blobs may stay for an hour, in case that a pull comes again.
    for name in gantry_testkit::leakcheck::names(&root.join("overlayfs/layers")) {
        report.fault(format!("left behind: layer {name}"));
    }
    if let Some(pid) = node.daemon.pid() {
        let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        let own = points.filter(|point| {
            let below = |dir: &std::path::Path| std::path::Path::new(point).starts_with(dir);
            below(&node.daemon.places().state.join("pods")) || below(root)
        });
        for point in own {
            report.fault(format!("left behind: mount {point}"));
        }
    }
}
