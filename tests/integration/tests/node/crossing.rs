//! Every request crossed with every failpoint that it passes, in the daemon and in the pod's shim:
//! the process is killed there, or the step fails there.
//!
//! Which failpoints there are is nowhere written down. Each request is made once by a daemon that
//! notes those it passes, and then again for each of them. So a new failpoint is crossed without
//! being named. Beside every crossing a container runs that nothing may happen to.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use gantry_integration::{Node, Pod, busybox_image, eventually, on_node, script_config, sleeper};
use gantry_testkit::cri::{self, v1};
use gantry_testkit::daemon::{self, Options};
use tonic::Code;

/// A request and what there has to be before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    RunPod,
    Create,
    Start,
    ExecSync,
    Update,
    ReopenLog,
    StopContainer,
    RemoveContainer,
    StopPod,
    RemovePod,
    PullImage,
    RemoveImage,
}
use Request::*;

/// What to do at a failpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// kill -9 of the daemon.
    Kill,
    /// The step fails, once.
    Fail,
    /// kill -9 of the shim.
    KillShim,
    /// A step of the shim fails, once.
    FailInShim,
}

impl Trouble {
    /// What the daemon is told by which variables: where to note failpoints, and what to do there.
    fn variables(self) -> (&'static str, &'static str) {
        match self {
            Trouble::Kill | Trouble::Fail => ("FAILPOINT_TRACE", "FAILPOINTS"),
            Trouble::KillShim | Trouble::FailInShim => ("SHIM_FAILPOINT_TRACE", "SHIM_FAILPOINTS"),
        }
    }

    fn action(self) -> &'static str {
        match self {
            Trouble::Kill | Trouble::KillShim => "return(kill)",
            Trouble::Fail | Trouble::FailInShim => "1*return(trouble)->off",
        }
    }
}

/// What a request is about.
struct Scene {
    image: String,
    other_image: String,
    pod: Option<Pod>,
    container: String,
}

const OTHER: &str = "other";

impl Scene {
    fn pod(&self) -> &Pod {
        self.pod.as_ref().expect("a pod")
    }
}

impl Request {
    /// Makes what the request needs.
    async fn prepare(self, node: &Node, image: &str) -> Scene {
        let registry = &node.registry;
        registry.add(&format!("test/{OTHER}"), "1", busybox_image());
        let mut scene = Scene {
            image: image.to_owned(),
            other_image: format!("{}/test/{OTHER}:1", registry.host()),
            pod: None,
            container: String::new(),
        };
        match self {
            RunPod | PullImage => return scene,
            RemoveImage => {
                let pulled = node.client.pull(&scene.other_image).await;
                pulled.expect("PullImage");
                return scene;
            }
            _ => {}
        }
        let pod = node.pod("crossed").await;
        if self != Create {
            scene.container = node.create(&pod, &sleeper("c", image)).await;
        }
        if !matches!(self, Create | Start) {
            let started = node.client.start(&scene.container).await;
            started.expect("StartContainer");
        }
        if matches!(self, RemoveContainer | RemovePod) {
            let stopped = node.client.stop(&scene.container, 0).await;
            stopped.expect("StopContainer");
        }
        if self == RemovePod {
            node.client.stop_pod(&pod.id).await.expect("StopPodSandbox");
        }
        scene.pod = Some(pod);
        scene
    }

    async fn ask(self, node: &Node, scene: &Scene) -> cri::Result<()> {
        let (client, container) = (&node.client, scene.container.as_str());
        match self {
            RunPod => drop(client.run_pod(&node.pod_config("crossed")).await?),
            Create => {
                let pod = scene.pod();
                let config = sleeper("c", &scene.image);
                drop(client.create(&pod.id, &config, &pod.config).await?);
            }
            Start => client.start(container).await?,
            ExecSync => {
                let output = client.exec(container, &["echo", "x"], 20).await?;
                assert_eq!((output.exit_code, &*output.stdout), (0, &b"x\n"[..]));
            }
            Update => {
                let resources = v1::LinuxContainerResources {
                    cpu_shares: 333,
                    ..Default::default()
                };
                client.update(container, resources).await?;
            }
            ReopenLog => client.reopen_log(container).await?,
            StopContainer => client.stop(container, 1).await?,
            RemoveContainer => client.remove(container).await?,
            StopPod => client.stop_pod(&scene.pod().id).await?,
            RemovePod => client.remove_pod(&scene.pod().id).await?,
            PullImage => drop(client.pull(&scene.other_image).await?),
            RemoveImage => client.remove_image(&scene.other_image).await?,
        }
        Ok(())
    }

    /// State of the container that it is about.
    async fn state(self, node: &Node, scene: &Scene) -> Option<v1::ContainerState> {
        let containers = node.client.list(None).await.expect("ListContainers");
        let mut own = containers
            .iter()
            .filter(|container| container.id == scene.container);
        own.next().map(v1::Container::state)
    }

    /// Repeats the request, which has to succeed.
    async fn repeat(self, node: &Node, scene: &mut Scene, at: &str) {
        match (self, self.state(node, scene).await) {
            // What a kubelet does not start again.
            (Start, Some(v1::ContainerState::ContainerRunning)) => {}
            // Nor this: a container starts once, and the next has a place.
            (Start, Some(v1::ContainerState::ContainerExited)) => {
                node.client.remove(&scene.container).await.unwrap();
                scene.container = node.run(scene.pod(), &sleeper("c", &scene.image)).await;
            }
            _ => {
                let answer = self.ask(node, scene).await;
                answer.unwrap_or_else(|error| panic!("{at}: {self:?} again: {error}"));
            }
        }
    }

    /// Looks at what the request was to do.
    async fn is_done(self, node: &Node, scene: &Scene, at: &str) {
        let pods = node.client.list_pods(None).await.unwrap();
        let crossed: Vec<_> = pods
            .iter()
            .filter(|pod| pod.metadata.as_ref().unwrap().name == "crossed")
            .collect();
        let containers = node.client.list(None).await.unwrap();
        let own: Vec<_> = containers
            .iter()
            .filter(|container| container.metadata.as_ref().unwrap().name == "c")
            .collect();
        let at = format!("{at}: after {self:?}: {crossed:?} {own:?}");
        match self {
            RunPod => {
                assert_eq!(crossed.len(), 1, "{at}");
                assert!(node.pod_is_ready(&crossed[0].id).await, "{at}");
            }
            Create => {
                assert_eq!(own.len(), 1, "{at}");
                assert_eq!(own[0].state(), v1::ContainerState::ContainerCreated, "{at}");
            }
            Start | ExecSync | ReopenLog => {
                assert_eq!(node.sh(&scene.container, "echo x").await, "x", "{at}");
            }
            Update => {
                let status = node.status(&scene.container).await;
                let linux = status.resources.and_then(|resources| resources.linux);
                assert_eq!(linux.unwrap_or_default().cpu_shares, 333, "{at}");
            }
            StopContainer => {
                let status = node.exited(&scene.container).await;
                assert!(status.finished_at > 0, "{at}");
            }
            RemoveContainer => assert!(own.is_empty(), "{at}"),
            StopPod => {
                assert!(!node.pod_is_ready(&scene.pod().id).await, "{at}");
                node.exited(&scene.container).await;
            }
            RemovePod => assert!(crossed.is_empty() && own.is_empty(), "{at}"),
            PullImage | RemoveImage => {
                let image = node.client.image(&scene.other_image).await.unwrap();
                assert_eq!(image.is_some(), self == PullImage, "{at}");
            }
        }
    }

    /// What the request has made can be used.
    async fn use_it(self, node: &Node, scene: &Scene, at: &str) {
        let id = match self {
            RunPod => {
                let pod = node.pod("crossed").await;
                node.run(&pod, &sleeper("c", &scene.image)).await
            }
            Create => {
                let containers = node.client.list(None).await.unwrap();
                let own = containers
                    .iter()
                    .find(|container| container.metadata.as_ref().unwrap().name == "c");
                let id = own.expect("a container").id.clone();
                node.client.start(&id).await.unwrap();
                id
            }
            PullImage => {
                let pod = node.pod("pulled").await;
                node.run(&pod, &sleeper("p", &scene.other_image)).await
            }
            _ => return,
        };
        assert_eq!(node.sh(&id, "echo x").await, "x", "{at}");
    }
}

/// How often each failpoint has been passed, by a trace.
pub(crate) fn passed(trace: &Path) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for name in std::fs::read_to_string(trace).unwrap_or_default().lines() {
        *counts.entry(name.to_owned()).or_default() += 1;
    }
    counts
}

/// Removes what a crossing has made, and all that is left then is what was there before.
async fn clean_up(node: &Node, bystander: &str, scene: &Scene) {
    for pod in node.client.list_pods(None).await.unwrap() {
        if pod.id != bystander {
            node.client.stop_pod(&pod.id).await.unwrap();
            node.client.remove_pod(&pod.id).await.unwrap();
        }
    }
    node.client.remove_image(&scene.other_image).await.unwrap();
}

async fn cross(node: &mut Node, request: Request, trouble: Trouble) {
    // Another image than the one that is pulled and removed.
    let mut config = gantry_testkit::image::ImageBuilder::on(busybox_image());
    config = config.layer(
        gantry_testkit::image::Layer::new().file("bystander", b"x"),
        gantry_testkit::image::Compression::Gzip,
    );
    let image = node.pull("bystander", &config.build()).await;
    let bystander = node.pod("bystander").await;
    let script = "exec sleep 1000000";
    let beside = node
        .run(&bystander, &script_config("b", &image, script))
        .await;
    eventually("it has become what it stays", async || {
        let comm = node
            .client
            .exec(&beside, &["cat", "/proc/1/comm"], 20)
            .await;
        (comm.unwrap().stdout == b"sleep\n").then_some(())
    })
    .await;
    let since = node.status(&beside).await.started_at;
    node.accept_now();

    let trace = node.daemon.path("trace");
    node.daemon.kill().unwrap();
    let path = trace.display().to_string();
    let (trace_to, armed_by) = trouble.variables();
    node.start_again(&[(trace_to, &path)]).await;
    let scene = request.prepare(node, &image).await;
    let before = passed(&trace);
    request.ask(node, &scene).await.expect("without trouble");
    let after = passed(&trace);
    request.is_done(node, &scene, "no trouble").await;
    clean_up(node, &bystander.id, &scene).await;

    let (mut crossed, mut missed) = (0, 0);
    for (name, &count) in &after {
        for turn in before.get(name).copied().unwrap_or_default()..count {
            let at = format!("{name}, time {}", turn + 1);
            let action = trouble.action();
            let failpoints = match turn {
                0 => format!("{name}={action}"),
                turn => format!("{name}={turn}*off->{action}"),
            };
            node.daemon.kill().unwrap();
            node.start_again(&[(armed_by, &failpoints)]).await;
            let mut scene = request.prepare(node, &image).await;
            let answer = request.ask(node, &scene).await;
            match trouble {
                Trouble::Kill => {
                    // What goes on beside a request does not always go on in the same number.
                    if answer.is_ok() && !dies(node).await {
                        missed += 1;
                        // It is still armed.
                        node.daemon.kill().unwrap();
                    } else {
                        let ended = node.daemon.wait_ended().await;
                        ended.unwrap_or_else(|error| panic!("{at}: {error}: {answer:?}"));
                    }
                    node.start_again(&[]).await;
                }
                Trouble::KillShim => {
                    missed += usize::from(!loss_is_over(node, &answer).await);
                    // Another shim has the pod, or it is no more: either can be removed, and what
                    // comes after it must be.
                    clean_up(node, &bystander.id, &scene).await;
                    node.assert_clean_but_daemon();
                    node.daemon.kill().unwrap();
                    node.start_again(&[]).await;
                    scene = request.prepare(node, &image).await;
                }
                Trouble::Fail | Trouble::FailInShim => {
                    if let Err(error) = &answer {
                        assert_ne!(error.code(), Code::Unavailable, "{at}: {error}");
                        assert!(node.daemon.running(), "{at}: {error}");
                    }
                }
            }
            for container in node.client.list(None).await.unwrap() {
                assert_ne!(
                    container.state(),
                    v1::ContainerState::ContainerUnknown,
                    "{at}"
                );
            }
            if (request, trouble) == (RunPod, Trouble::FailInShim) {
                // Each new shim would fail once.
                node.kill_and_start_again().await;
            }
            request.repeat(node, &mut scene, &at).await;
            request.is_done(node, &scene, &at).await;
            // What was acknowledged now is there for good.
            node.kill_and_start_again().await;
            request.is_done(node, &scene, &at).await;
            request.use_it(node, &scene, &at).await;
            clean_up(node, &bystander.id, &scene).await;
            node.assert_clean_but_daemon();
            let status = node.status(&beside).await;
            assert_eq!(
                (status.state(), status.started_at),
                (v1::ContainerState::ContainerRunning, since),
                "{at}"
            );
            crossed += 1;
        }
    }
    println!("CROSSED {request:?} {trouble:?}: {crossed}, of them not met: {missed}");
    assert!(crossed > 0, "{request:?} passes no failpoint");
    assert!(missed * 4 <= crossed, "{missed} of {crossed} not met");
}

/// Waits until another shim has taken over the pod whose shim has died, or it is known to have ended,
/// and all that was in it. Whether it did: the request may not have got so far.
async fn loss_is_over(node: &Node, answer: &cri::Result<()>) -> bool {
    for _ in 0..300 {
        let pods = node.client.list_pods(None).await.unwrap();
        let crossed = pods
            .iter()
            .find(|pod| pod.metadata.as_ref().unwrap().name == "crossed");
        let Some(pod) = crossed else { return true };
        let containers = node.client.list(None).await.unwrap();
        let lives = containers.iter().any(|container| {
            container.pod_sandbox_id == pod.id
                && container.state() == v1::ContainerState::ContainerRunning
        });
        let adopted = node.pod_info(&pod.id).await["shimAdoptions"] != 0;
        if adopted || pod.state() == v1::PodSandboxState::SandboxNotready && !lives {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(answer.is_ok(), "it failed, and the pod goes on: {answer:?}");
    false
}

/// Whether the daemon ends soon, after it has answered.
pub(crate) async fn dies(node: &mut Node) -> bool {
    for _ in 0..500 {
        if !node.daemon.running() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    false
}

macro_rules! crossings {
    ($trouble:ident: $($name:ident: $request:ident;)*) => {
        $(
            #[test]
            fn $name() {
                run(stringify!($name), Request::$request, Trouble::$trouble);
            }
        )*
    };
}

fn run(name: &str, request: Request, trouble: Trouble) {
    if !daemon::has_failpoints().unwrap() {
        println!("SKIP {name}: gantryd is built without its feature failpoints");
        return;
    }
    let mut options = Options::default();
    if matches!(trouble, Trouble::KillShim | Trouble::FailInShim) {
        let Some(shim) = std::env::var_os("GANTRY_FAILING_SHIM") else {
            println!("SKIP {name}: GANTRY_FAILING_SHIM names no gantry-shim with failpoints");
            return;
        };
        options = options.config(&format!("shim = {shim:?}\n"));
    }
    on_node(name, options, async |node| {
        cross(node, request, trouble).await
    });
}

crossings! {
    Kill:
    killed_in_run_pod_sandbox: RunPod;
    killed_in_create_container: Create;
    killed_in_start_container: Start;
    killed_in_exec_sync: ExecSync;
    killed_in_update_container_resources: Update;
    killed_in_reopen_container_log: ReopenLog;
    killed_in_stop_container: StopContainer;
    killed_in_remove_container: RemoveContainer;
    killed_in_stop_pod_sandbox: StopPod;
    killed_in_remove_pod_sandbox: RemovePod;
    killed_in_pull_image: PullImage;
    killed_in_remove_image: RemoveImage;
}

crossings! {
    Fail:
    failed_in_run_pod_sandbox: RunPod;
    failed_in_create_container: Create;
    failed_in_start_container: Start;
    failed_in_exec_sync: ExecSync;
    failed_in_update_container_resources: Update;
    failed_in_reopen_container_log: ReopenLog;
    failed_in_stop_container: StopContainer;
    failed_in_remove_container: RemoveContainer;
    failed_in_stop_pod_sandbox: StopPod;
    failed_in_remove_pod_sandbox: RemovePod;
    failed_in_pull_image: PullImage;
    failed_in_remove_image: RemoveImage;
}

crossings! {
    KillShim:
    shim_killed_in_run_pod_sandbox: RunPod;
    shim_killed_in_start_container: Start;
    shim_killed_in_exec_sync: ExecSync;
    shim_killed_in_update_container_resources: Update;
    shim_killed_in_reopen_container_log: ReopenLog;
    shim_killed_in_stop_container: StopContainer;
    shim_killed_in_remove_container: RemoveContainer;
    shim_killed_in_stop_pod_sandbox: StopPod;
}

crossings! {
    FailInShim:
    shim_failed_in_run_pod_sandbox: RunPod;
    shim_failed_in_start_container: Start;
    shim_failed_in_exec_sync: ExecSync;
    shim_failed_in_update_container_resources: Update;
    shim_failed_in_reopen_container_log: ReopenLog;
    shim_failed_in_stop_container: StopContainer;
    shim_failed_in_remove_container: RemoveContainer;
    shim_failed_in_stop_pod_sandbox: StopPod;
}
