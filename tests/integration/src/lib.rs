//! What the tests that drive a real gantryd have in common: a node, and words for what is done to
//! it. A test gets a daemon of its own, and when it has ended nothing may be left of its pods.

pub mod crictl;
pub mod echo;
pub mod gantryctl;
pub mod kubectl;
pub mod log;
pub mod metrics;
pub mod streaming;
pub mod terminal;
pub mod usage;
pub mod young;

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use gantry_testkit::cri::v1::{
    ContainerConfig, ContainerState, ContainerStatus, PodSandboxConfig, PodSandboxState,
};
use gantry_testkit::cri::{self, Client};
use gantry_testkit::daemon::{self, Daemon, Options};
use gantry_testkit::image::Image;
use gantry_testkit::image_busybox::busybox;
use gantry_testkit::leakcheck::Snapshot;
use gantry_testkit::netns::LocalRegistry;

pub use gantry_testkit::{daemon::FAULTY, faults::Fault};

/// How long anything may take that a test waits for.
const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon, a client, and a registry on its loopback.
pub struct Node {
    pub client: Client,
    pub registry: LocalRegistry,
    pub daemon: Daemon,
    /// What the test must leave behind: nothing more than this.
    before: Snapshot,
}

/// Runs a test on a node of its own, and then removes its pods and looks for what they left.
pub fn on_node(name: &str, options: Options, test: impl AsyncFnOnce(&mut Node)) {
    if let Some(reason) = daemon::unable() {
        println!("SKIP {name}: {reason}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("tokio");
    runtime.block_on(async {
        let mut node = Node::start(options).await;
        test(&mut node).await;
        node.finish().await;
    });
}

/// As [`on_node`], with a node like any other.
pub fn on_plain_node(name: &str, test: impl AsyncFnOnce(&mut Node)) {
    on_node(name, Options::default(), test);
}

/// As [`on_node`], with a daemon that fails where `failpoints` says (the `fail` crate's grammar).
pub fn on_failing_node(name: &str, failpoints: &str, test: impl AsyncFnOnce(&mut Node)) {
    match daemon::has_failpoints() {
        Ok(true) => on_node(name, Options::default().env("FAILPOINTS", failpoints), test),
        Ok(false) => println!("SKIP {name}: gantryd is built without its feature failpoints"),
        Err(error) => panic!("{error}"),
    }
}

/// The busybox image, built once for all tests of this process.
pub fn busybox_image() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| busybox().expect("busybox image"))
}

impl Node {
    async fn start(options: Options) -> Self {
        let mut daemon = Daemon::start(options).expect("start gantryd");
        daemon.ready().await.expect("gantryd");
        let registry = daemon.netns().registry().expect("registry");
        let client = Client::connect(daemon.socket()).expect("client");
        client.version().await.expect("Version");
        let before = daemon.snapshot();
        Self {
            client,
            registry,
            daemon,
            before,
        }
    }

    /// Takes what is there now as what may be there in the end.
    pub fn accept_now(&mut self) {
        self.before = self.daemon.snapshot();
    }

    async fn finish(mut self) {
        if self.daemon.running() {
            self.remove_pods().await;
            self.assert_clean();
            let status = self.daemon.terminate().expect("SIGTERM");
            assert!(status.success(), "gantryd: {status}");
        }
    }

    /// Removes every pod that is listed.
    pub async fn remove_pods(&self) {
        for pod in self.client.list_pods(None).await.expect("ListPodSandbox") {
            self.client.stop_pod(&pod.id).await.expect("StopPodSandbox");
            self.client
                .remove_pod(&pod.id)
                .await
                .expect("RemovePodSandbox");
        }
        let pods = self.client.list_pods(None).await.expect("ListPodSandbox");
        assert!(pods.is_empty(), "pods after removal: {pods:?}");
        let containers = self.client.list(None).await.expect("ListContainers");
        assert!(
            containers.is_empty(),
            "containers after removal: {containers:?}"
        );
    }

    /// Nothing is left but what was there at the start.
    pub fn assert_clean(&self) {
        let leaks = self.daemon.leaks(&self.before);
        assert!(leaks.is_empty(), "left behind:\n{}", leaks.join("\n"));
    }

    /// As [`Node::assert_clean`] with a daemon that was started anew, whose descriptors are others.
    pub fn assert_clean_but_daemon(&self) {
        let mut leaks = self.daemon.leaks(&self.before);
        leaks.retain(|leak| !leak.starts_with("descriptor"));
        assert!(leaks.is_empty(), "left behind:\n{}", leaks.join("\n"));
    }

    /// Starts a daemon again after it was killed or terminated.
    pub async fn start_again(&mut self, env: &[(&str, &str)]) {
        self.daemon.set_env(env);
        self.daemon.spawn().expect("start gantryd again");
        self.daemon
            .ready()
            .await
            .expect("gantryd after its restart");
        // The old connection has to be found broken and made again.
        while_unavailable(async || self.client.version().await)
            .await
            .expect("Version");
    }

    /// The machine loses power and comes up again.
    pub async fn reboot(&mut self) {
        self.daemon.power_cut().expect("power cut");
        self.start_again(&[]).await;
    }

    /// kill -9 and a new start.
    pub async fn kill_and_start_again(&mut self) {
        self.daemon.kill().expect("kill gantryd");
        self.start_again(&[]).await;
    }

    /// kill -9 and a new start, with none of the trouble that was asked for.
    pub async fn kill_without_failpoints(&mut self) {
        self.daemon.kill().expect("kill gantryd");
        self.start_again(&[]).await;
    }

    /// Serves an image as `test/NAME:1` and pulls it; returns its full name.
    pub async fn pull(&self, name: &str, image: &Image) -> String {
        let repository = format!("test/{name}");
        self.registry.add(&repository, "1", image);
        let full = format!("{}/{repository}:1", self.registry.host());
        let id = self.client.pull(&full).await.expect("PullImage");
        assert_eq!(id, image.id(), "the image id is the config's digest");
        full
    }

    pub async fn busybox(&self) -> String {
        self.pull("busybox", busybox_image()).await
    }

    /// Log directory of the pod of that name, made.
    pub fn log_dir(&self, pod: &str) -> PathBuf {
        let dir = self.daemon.path("logs").join(pod);
        std::fs::create_dir_all(&dir).expect("log directory");
        dir
    }

    /// A pod's configuration.
    pub fn pod_config(&self, name: &str) -> PodSandboxConfig {
        cri::pod_config(name, &self.log_dir(name))
    }

    pub async fn run_pod(&self, config: &PodSandboxConfig) -> Pod {
        let id = self.client.run_pod(config).await.expect("RunPodSandbox");
        Pod {
            id,
            config: config.clone(),
        }
    }

    /// A running pod with nothing special to it.
    pub async fn pod(&self, name: &str) -> Pod {
        self.run_pod(&self.pod_config(name)).await
    }

    /// A pod in the host's network, which costs no CNI call.
    pub async fn host_pod(&self, name: &str) -> Pod {
        let mut config = self.pod_config(name);
        cri::pod_namespaces(&mut config).network = cri::v1::NamespaceMode::Node.into();
        self.run_pod(&config).await
    }

    pub async fn create(&self, pod: &Pod, config: &ContainerConfig) -> String {
        self.client
            .create(&pod.id, config, &pod.config)
            .await
            .expect("CreateContainer")
    }

    /// Creates and starts.
    pub async fn run(&self, pod: &Pod, config: &ContainerConfig) -> String {
        let id = self.create(pod, config).await;
        self.client.start(&id).await.expect("StartContainer");
        id
    }

    /// A container that runs `script` in busybox's shell.
    pub async fn run_script(&self, pod: &Pod, name: &str, image: &str, script: &str) -> String {
        self.run(pod, &script_config(name, image, script)).await
    }

    /// Output of a script in a container, without the last line break; it must succeed.
    pub async fn sh(&self, id: &str, script: &str) -> String {
        let output = self
            .client
            .exec(id, &["sh", "-c", script], 20)
            .await
            .expect("ExecSync");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.exit_code, 0, "{script}: {stderr}");
        String::from_utf8_lossy(&output.stdout)
            .trim_end_matches('\n')
            .to_owned()
    }

    pub async fn status(&self, id: &str) -> ContainerStatus {
        self.client.status(id).await.expect("ContainerStatus")
    }

    /// Status of a container once it has exited.
    pub async fn exited(&self, id: &str) -> ContainerStatus {
        eventually("the container exits", async || {
            let status = self.status(id).await;
            (status.state() == ContainerState::ContainerExited).then_some(status)
        })
        .await
    }

    pub async fn is_running(&self, id: &str) -> bool {
        self.status(id).await.state() == ContainerState::ContainerRunning
    }

    pub async fn pod_is_ready(&self, id: &str) -> bool {
        let status = self.client.pod_status(id).await.expect("PodSandboxStatus");
        status.state() == PodSandboxState::SandboxReady
    }

    /// `info` of a verbose ContainerStatus.
    pub async fn container_info(&self, id: &str) -> serde_json::Value {
        let status = self
            .client
            .status_of(id, true)
            .await
            .expect("ContainerStatus");
        serde_json::from_str(&status.info["info"]).expect("JSON")
    }

    /// `info` of a verbose PodSandboxStatus.
    pub async fn pod_info(&self, id: &str) -> serde_json::Value {
        let status = self
            .client
            .pod_status_of(id, true)
            .await
            .expect("PodSandboxStatus");
        serde_json::from_str(&status.info["info"]).expect("JSON")
    }

    /// Pid of the pod's shim.
    pub async fn shim_pid(&self, pod: &Pod) -> i32 {
        let pid = self.pod_info(&pod.id).await["shimPid"].as_i64().unwrap();
        assert!(pid > 1);
        i32::try_from(pid).unwrap()
    }

    /// Waits until the pod's shim can die without it, and without these containers.
    pub async fn outlives_shim(&self, pod: &Pod, containers: &[&str]) {
        eventually("the holder is kept", async || {
            let info = self.pod_info(&pod.id).await;
            let kept = info["outlivesShim"].as_bool().unwrap();
            // It gives its memory back then, and its arguments are in there.
            let cmdline = std::fs::read(format!("/proc/{}/cmdline", info["pid"]));
            let small = cmdline.is_ok_and(|text| text.iter().all(|&byte| byte == 0));
            (kept && small).then_some(())
        })
        .await;
        for id in containers {
            eventually("the container is in custody", async || {
                let info = self.container_info(id).await;
                info["outlivesShim"].as_bool().unwrap().then_some(())
            })
            .await;
        }
    }

    /// kill -9 of the pod's shim.
    pub async fn kill_shim(&self, pod: &Pod) {
        let shim = nix::unistd::Pid::from_raw(self.shim_pid(pod).await);
        nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL).expect("kill");
    }

    /// Kills the pod's holder, and the shim when that has ended: the pod cannot go on.
    pub async fn kill_holder_and_shim(&self, pod: &Pod) {
        let info = self.pod_info(&pod.id).await;
        let pid = |key: &str| i32::try_from(info[key].as_i64().unwrap()).unwrap();
        let kill = |pid: i32| {
            let pid = nix::unistd::Pid::from_raw(pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kill");
        };
        let (holder, shim) = (pid("pid"), pid("shimPid"));
        kill(holder);
        eventually("the holder ends", async || {
            (!std::path::Path::new(&format!("/proc/{holder}")).exists()).then_some(())
        })
        .await;
        kill(shim);
    }

    /// Waits until the pod's shim was replaced so many times; returns how long that took.
    pub async fn adopted(&self, pod: &Pod, times: u64) -> Duration {
        let began = Instant::now();
        loop {
            let info = self.pod_info(&pod.id).await;
            if info["shimAdoptions"].as_u64() == Some(times) {
                return began.elapsed();
            }
            assert_eq!(info["notReadyReason"], "", "the pod is lost");
            assert!(began.elapsed() < PATIENCE, "nobody took over: {info}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// The pod's first address.
    pub async fn ip(&self, pod: &Pod) -> String {
        let status = self
            .client
            .pod_status(&pod.id)
            .await
            .expect("PodSandboxStatus");
        status.network.unwrap_or_default().ip
    }

    /// Lines of a container's log.
    pub fn log(&self, pod: &Pod, container: &str) -> Vec<log::Line> {
        let path = self.log_dir(&pod.name()).join(format!("{container}.log"));
        log::read(&path)
    }

    /// Standard output in a container's log.
    pub fn output(&self, pod: &Pod, container: &str) -> String {
        log::text(&self.log(pod, container), "stdout")
    }

    /// Waits until a container has written `text`.
    pub async fn has_written(&self, pod: &Pod, container: &str, text: &str) {
        eventually(&format!("{container} writes {text:?}"), async || {
            self.output(pod, container).contains(text).then_some(())
        })
        .await;
    }
}

/// A pod with the configuration that it was made from.
#[derive(Clone, Debug)]
pub struct Pod {
    pub id: String,
    pub config: PodSandboxConfig,
}

impl Pod {
    pub fn name(&self) -> String {
        self.config.metadata.clone().unwrap_or_default().name
    }
}

/// A container that runs `script` in busybox's shell.
pub fn script_config(name: &str, image: &str, script: &str) -> ContainerConfig {
    cri::container_config(name, image, &["sh", "-c", script])
}

/// A container that does nothing until it is told to end.
pub fn sleeper(name: &str, image: &str) -> ContainerConfig {
    script_config(
        name,
        image,
        "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done",
    )
}

/// Runs a program; returns whether it succeeded, its output and what it said.
fn run(mut command: Command) -> (bool, String, String) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    (
        output.status.success(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// Runs a program and writes to its standard input for as long as it takes any.
fn feed(mut command: Command, input: Vec<u8>) -> Output {
    let command = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("a program");
    let mut stdin = child.stdin.take().expect("a pipe");
    let writer = std::thread::spawn(move || {
        // It may end before it has read all.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("output");
    writer.join().expect("writer");
    output
}

/// Asks until there is an answer.
pub async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Repeats a call while the daemon is not there.
pub async fn while_unavailable<T>(mut call: impl AsyncFnMut() -> cri::Result<T>) -> cri::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match call().await {
            Err(status)
                if matches!(
                    status.code(),
                    tonic::Code::Unavailable | tonic::Code::Unknown
                ) && Instant::now() < deadline =>
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            answer => return answer,
        }
    }
}

/// The error that a call must have ended with.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(answer: cri::Result<T>, code: tonic::Code, says: &str) {
    let status = answer.expect_err("the call must fail");
    assert_eq!(status.code(), code, "{status:?}");
    assert!(
        status.message().contains(says),
        "{:?} does not say {says:?}",
        status.message()
    );
    assert!(
        !status.message().contains('\n'),
        "one line: {:?}",
        status.message()
    );
}
