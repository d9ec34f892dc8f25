//! Wiring: configuration in, a serving daemon out, ended by a signal.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use gantry_admin_api::v1::images_server::ImagesServer;
use gantry_admin_api::v1::node_server::NodeServer;
use gantry_containerd_api::services::containers::v1::containers_server::ContainersServer;
use gantry_containerd_api::services::tasks::v1::tasks_server::TasksServer;
use gantry_containerd_api::services::version::v1::version_server::VersionServer;
use gantry_cri::{Calls, Conditions, ContainerdFace, Gate, Observer, RpcLayer, State};
use gantry_cri_api::v1::image_service_server::ImageServiceServer;
use gantry_cri_api::v1::runtime_service_server::RuntimeServiceServer;
use gantry_images::Images;
use gantry_network_cni::Cni;
use gantry_ports::{Network, Scopes, Snapshotters};
use gantry_scopes_systemd::{SystemBus, Systemd};
use gantry_spec::resolved::{CgroupNode, CgroupVersion};
use gantry_store::Store;
use gantry_streaming::Certificate;
use gantry_supervisor::host::APPARMOR_DEFAULT;
use gantry_supervisor::{CgroupDriver, Cgroups, Hierarchy, Host, Settings, Supervisor, Timeouts};
use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Code;
use tonic::transport::Server;

use crate::config::{self, Config, SnapshotterName, StreamingTls};
use crate::dump::Dump;
use crate::metrics::{self, Metrics, Rpcs};
use crate::streaming::Node;
use crate::traces::{Counts, OfCalls, Traces};
use crate::{handlers, snapshotter, socket, watchdog};

/// What the kubelet receives at most; what we accept is a config with its annotations.
const MESSAGE_LIMIT: usize = 16 << 20;

/// ExecSync answers up to 16 MiB of each stream, in one message.
const ANSWER_LIMIT: usize = 2 * MESSAGE_LIMIT + 1024;

/// How long systemd may take to make or end one scope.
const SYSTEMD_LIMIT: Duration = Duration::from_secs(10);

/// How long calls under way may take to end after SIGTERM. Pods are not touched.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

/// Between two looks for what nothing refers to. A failed pull's blobs are kept for as long.
const COLLECTION_INTERVAL: Duration = Duration::from_secs(3600);

/// Runs until SIGTERM or SIGINT. Pods stay as they are.
pub async fn run(config: Config, traces: Option<Traces>) -> Result<()> {
    let began = Instant::now();
    gantry_sys::fs::umask(0o077);
    let dump = Dump::listen(config.state.join("dumps")).context("listen for SIGUSR1")?;
    private_dir(&config.root, 0o700)?;
    private_dir(config.image_root(), 0o700)?;
    // Others may pass through to the CRI socket; everything else in there is 0700.
    private_dir(&config.state, 0o711)?;

    // Before the store: a second daemon must be told so by the socket's owner, and a kubelet that
    // comes early is told to wait.
    let listener = socket::listen(&config.socket)
        .await
        .with_context(|| format!("listen on {}", config.socket.display()))?;
    let cadvisor = match config.cadvisor.socket() {
        Some(path) => Some(
            socket::listen(path)
                .await
                .with_context(|| format!("cadvisor.socket: listen on {}", path.display()))?,
        ),
        None => None,
    };
    let gate = Gate::default();

    let store_dir = config.root.join("store");
    let opened = {
        let dir = store_dir.clone();
        tokio::task::spawn_blocking(move || Store::open(&dir)).await??
    };
    let snapshotters = tokio::task::spawn_blocking({
        let config = config.clone();
        move || snapshotter::open(&config)
    })
    .await??;
    let images = open_images(&config, &opened.store, &snapshotters).await?;
    let network: Arc<dyn Network> = Arc::new(Cni::start(network_options(&config))?);

    let settings = tokio::task::spawn_blocking({
        let config = config.clone();
        move || settings(&config)
    })
    .await??;
    let no_handlers = settings.handlers.is_empty();
    let scopes = scopes(&settings).await;
    let supervisor = Supervisor::new(
        settings,
        Arc::clone(&opened.store),
        images,
        snapshotters,
        network,
        scopes,
    )?;

    let streaming = streaming(&config, supervisor.clone()).await?;
    tracing::info!(address = %streaming.address(), "streaming");

    let calls = Calls::default();
    let sent = traces.as_ref().map(Traces::counts);
    let (rpcs, endpoint) = metrics(&config, &supervisor, &calls, &gate, sent)?.unzip();
    let of_calls = traces.map(|traces| {
        tokio::spawn(traces.send());
        OfCalls::default()
    });
    let observer = Arc::new(Observers(rpcs, of_calls));
    let state = State {
        supervisor: supervisor.clone(),
        calls: calls.clone(),
        gate: gate.clone(),
        began,
        config: config.sources.clone(),
    };
    dump.look_at(state.clone());
    let conditions = Conditions {
        config: serde_json::to_value(&config)?,
        not_ready: Arc::new(move || {
            no_handlers.then(|| "no OCI runtime (runc, crun, youki) was found".to_owned())
        }),
    };
    let server = Server::builder()
        .layer(RpcLayer::new(gate.clone(), observer, calls))
        .add_service(
            RuntimeServiceServer::new(gantry_cri::Runtime::new(
                supervisor.clone(),
                Arc::clone(&streaming),
                conditions,
            ))
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(ANSWER_LIMIT),
        )
        .add_service(
            ImageServiceServer::new(gantry_cri::Images::new(supervisor.clone()))
                .max_decoding_message_size(MESSAGE_LIMIT)
                .max_encoding_message_size(MESSAGE_LIMIT),
        )
        .add_service(ImagesServer::new(gantry_cri::Admin::new(
            supervisor.clone(),
        )))
        .add_service(NodeServer::new(gantry_cri::Node::new(state)));

    let (stop, stopped) = watch::channel(());
    let serving = tokio::spawn(
        server
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), told(stopped.clone())),
    );
    if let Some(listener) = cadvisor {
        let face = ContainerdFace::new(supervisor.clone(), gate.clone());
        tokio::spawn(serve_cadvisor(listener, face, told(stopped)));
    }

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let summary = tokio::select! {
        summary = supervisor.recover() => summary.context("recovery")?,
        _ = terminate.recv() => bail!("stopped during recovery"),
        never = watchdog::while_recovering(&supervisor) => match never {},
    };
    tracing::info!(
        pods = summary.pods,
        containers = summary.containers,
        unreadable = summary.unreadable,
        orphans = summary.orphans,
        "recovered"
    );
    gate.open();
    let collector = supervisor.clone();
    // What a killed daemon left of removals and pulls. Nobody waits for it.
    tokio::spawn(async move {
        loop {
            collector.collect_layers().await;
            tokio::time::sleep(COLLECTION_INTERVAL).await;
        }
    });
    tracing::info!(socket = %config.socket.display(), version = env!("CARGO_PKG_VERSION"), "ready");
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status("ready")]) {
        tracing::warn!(%error, "systemd was not told that we are ready");
    }
    watchdog::start(&config.socket, supervisor.clone());

    let mut serving = serving;
    tokio::select! {
        ended = &mut serving => {
            ended?.context("serve")?;
            bail!("the server ended by itself");
        }
        _ = terminate.recv() => tracing::info!("SIGTERM: pods are left as they are"),
        _ = interrupt.recv() => tracing::info!("SIGINT: pods are left as they are"),
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    drop(stop);
    // They would never end by themselves.
    supervisor.registry().close_events();
    if tokio::time::timeout(SHUTDOWN_LIMIT, serving).await.is_err() {
        tracing::warn!("calls under way were cut off");
    }
    // A command that may take longer is ended by its pod's shim, whose grace begins with our end.
    let grace = Duration::from_secs(config.timeouts.exec_grace_seconds);
    let kill = Duration::from_secs(1);
    streaming.shutdown(grace.min(SHUTDOWN_LIMIT) + kill).await;
    // The next daemon need not tell a stale socket from a live one.
    if let Some(endpoint) = endpoint {
        endpoint.abort();
        // It ends when its socket has been removed.
        let _ = endpoint.await;
    }
    for socket in std::iter::once(&config.socket).chain(config.cadvisor.socket()) {
        if let Err(error) = std::fs::remove_file(socket) {
            tracing::warn!(path = %socket.display(), %error, "socket not removed");
        }
    }
    Ok(())
}

/// Its calls are few and of the kubelet's own process: they have no layer around them.
async fn serve_cadvisor(
    listener: UnixListener,
    face: ContainerdFace,
    stopped: impl Future<Output = ()>,
) {
    let server = Server::builder()
        .add_service(ContainersServer::new(face.clone()))
        .add_service(TasksServer::new(face.clone()))
        .add_service(VersionServer::new(face));
    let incoming = UnixListenerStream::new(listener);
    if let Err(error) = server.serve_with_incoming_shutdown(incoming, stopped).await {
        tracing::error!(%error, "cadvisor.socket is served no more");
    }
}

/// Ends when the other end is dropped.
async fn told(mut stopped: watch::Receiver<()>) {
    while stopped.changed().await.is_ok() {}
}

/// Begins to serve metrics, if that is configured, and returns who counts calls for them and who
/// serves.
fn metrics(
    config: &Config,
    supervisor: &Supervisor,
    calls: &Calls,
    gate: &Gate,
    spans: Option<Arc<Counts>>,
) -> Result<Option<(Rpcs, JoinHandle<()>)>> {
    let Some(address) = config.metrics.address()? else {
        return Ok(None);
    };
    let rpcs = Rpcs::default();
    let metrics = Metrics::new(
        supervisor.clone(),
        &rpcs,
        calls.clone(),
        gate.clone(),
        spans,
    );
    let endpoint = tokio::spawn(metrics::serve(address, metrics));
    Ok(Some((rpcs, endpoint)))
}

/// Who is told of calls, as configured.
struct Observers(Option<Rpcs>, Option<OfCalls>);

impl Observer for Observers {
    fn begins(&self, path: &str, headers: &http::HeaderMap, span: &tracing::Span) {
        if let Some(traces) = &self.1 {
            traces.begins(path, headers, span);
        }
    }

    fn observe(&self, path: &str, code: Code, elapsed: Duration) {
        if let Some(rpcs) = &self.0 {
            rpcs.observe(path, code, elapsed);
        }
        if let Some(traces) = &self.1 {
            traces.observe(path, code, elapsed);
        }
    }
}

fn private_dir(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let make = || {
        std::fs::create_dir_all(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
    };
    make().with_context(|| format!("make {}", path.display()))
}

async fn open_images(
    config: &Config,
    store: &Arc<Store>,
    snapshotters: &Snapshotters,
) -> Result<Images> {
    let options = image_options(&config.images);
    let (root, store, snapshotters) = (
        config.image_root().to_owned(),
        Arc::clone(store),
        snapshotters.clone(),
    );
    let images = tokio::task::spawn_blocking(move || {
        for snapshotter in snapshotters.iter() {
            snapshotter.clean()?;
        }
        anyhow::Ok(Images::open(&root, store, snapshotters, options)?)
    })
    .await?;
    images.context("open image store")
}

fn image_options(config: &crate::config::Images) -> gantry_images::Options {
    let path = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
    let hosts = config.credentials.iter().map(|(host, given)| {
        let credentials = gantry_images::HostCredentials {
            username: given.username.clone(),
            password_file: path(&given.password_file),
            identity_token_file: path(&given.identity_token_file),
            registry_token_file: path(&given.registry_token_file),
            helper: (!given.helper.is_empty()).then(|| given.helper.clone()),
        };
        (host.clone(), credentials)
    });
    let mut options = gantry_images::Options {
        registry: gantry_images::registry::Settings {
            certs_d: Some(config.registry_config.clone()),
            keychain: gantry_images::Keychain {
                hosts: hosts.collect(),
                docker_config: path(&config.docker_config),
                helper_dir: path(&config.credential_helper_dir),
            },
            progress_timeout: Duration::from_secs(config.progress_timeout_seconds),
            ..Default::default()
        },
        pinned: config.pinned.clone(),
        layers_at_once: config.layers_at_once,
        parallel_downloads: config.parallel_downloads,
        bandwidth: NonZeroU64::new(config.bandwidth_bytes_per_second),
        discard_unpacked_layers: config.discard_unpacked_layers,
        ..Default::default()
    };
    if config.parallel_unpacks > 0 {
        options.parallel_unpacks = config.parallel_unpacks;
    }
    options
}

/// Under the systemd driver: who is asked for scopes.
async fn scopes(settings: &Settings) -> Option<Arc<dyn Scopes>> {
    if settings.cgroups.driver != CgroupDriver::Systemd {
        return None;
    }
    let systemd = Systemd::new(SystemBus, SYSTEMD_LIMIT);
    // Pods that run need no systemd, and each new one asks again.
    if let Err(error) = systemd.connect().await {
        tracing::error!(%error, "pods cannot be made until systemd answers");
    }
    Some(Arc::new(systemd))
}

/// The streaming server, listening.
async fn streaming(
    config: &Config,
    supervisor: Supervisor,
) -> Result<Arc<gantry_streaming::Server>> {
    let settings = &config.streaming;
    let tls = match settings.tls {
        StreamingTls::Off => None,
        StreamingTls::SelfSigned => Some(Certificate::SelfSigned),
        StreamingTls::Files => Some(Certificate::Files {
            certificate: settings.certificate.clone(),
            key: settings.key.clone(),
        }),
    };
    let options = gantry_streaming::Config {
        address: settings.address,
        tls,
        idle_timeout: Duration::from_secs(settings.idle_timeout_seconds),
        creation_timeout: Duration::from_secs(settings.creation_timeout_seconds),
        drain_timeout: Duration::from_secs(settings.drain_timeout_seconds),
        ..Default::default()
    };
    let node = Arc::new(Node::new(supervisor, options.drain_timeout));
    let server = gantry_streaming::Server::bind(options, node).await;
    Ok(Arc::new(server.context("streaming")?))
}

fn network_options(config: &Config) -> gantry_network_cni::Options {
    let bin_dirs = if config.network.bin_dirs.is_empty() {
        vec![PathBuf::from("/opt/cni/bin"), PathBuf::from("/usr/lib/cni")]
    } else {
        config.network.bin_dirs.clone()
    };
    gantry_network_cni::Options {
        conf_dir: config.network.conf_dir.clone(),
        bin_dirs,
        timeout: Duration::from_secs(config.timeouts.network_seconds),
        calls_dir: config.state.join("cni"),
        ..Default::default()
    }
}

/// Looks at the kernel. Blocks.
fn host() -> Result<Host> {
    let host = Host::look(Path::new("/")).context("look at the kernel")?;
    match host.apparmor() {
        Err(error) => tracing::warn!(%error, "loaded AppArmor profiles cannot be listed"),
        Ok(apparmor) if !apparmor.has_default() => tracing::warn!(
            profile = APPARMOR_DEFAULT,
            "AppArmor profile is not loaded: pods that ask for the default one are refused, \
             those that ask for none run without"
        ),
        Ok(_) => {}
    }
    Ok(host)
}

/// Looks at the machine: runtimes, cgroups, the shim. Blocks.
fn settings(config: &Config) -> Result<Settings> {
    let (mut handlers, default_handler) =
        handlers::find(&config.runtime, &config.images, &config.state)?;
    let cgroups = cgroups(config)?;
    let cgroup_node = cgroup_node(&cgroups);
    let host = host()?;
    for (name, handler) in &mut handlers {
        // Copies are given the owners that they need.
        let idmapped = handler.snapshotter == SnapshotterName::Overlayfs.as_str();
        if let Some(reason) = host.no_user_namespaces(idmapped.then(|| config.image_root())) {
            tracing::info!(handler = name, reason, "pods cannot have user namespaces");
            handler.features.no_user_namespaces = Some(reason);
        }
    }
    Ok(Settings {
        host,
        root: config.root.clone(),
        image_root: config.image_root().to_owned(),
        state: config.state.clone(),
        netns_dir: config.network.netns_dir.clone(),
        shim: shim(config)?,
        handlers,
        default_handler,
        cgroup_node,
        cgroups,
        cdi_dirs: config.runtime.cdi_dirs.clone(),
        device_ownership: config.runtime.device_ownership_from_security_context,
        rlimits: rlimits(&config.runtime.default_ulimits)?,
        shim_oom_score_adj: config.runtime.shim_oom_score_adj,
        open_files: gantry_sys::process::raise_open_files()
            .context("raise the limit of open files")?,
        unprivileged_ports: config.runtime.unprivileged_ports,
        unprivileged_icmp: config.runtime.unprivileged_icmp,
        timeouts: Timeouts {
            runtime: Duration::from_secs(config.timeouts.runtime_seconds),
            exec_drain: Duration::from_secs(config.timeouts.exec_drain_seconds),
            exec_grace: Duration::from_secs(config.timeouts.exec_grace_seconds),
            recovery: Duration::from_secs(config.timeouts.recovery_seconds),
            ..Timeouts::default()
        },
        boot_id: gantry_sys::process::boot_id().context("read boot id")?,
        recovery_parallelism: 32,
    })
}

/// The configured limits, none above our own: a container's could not be raised over it.
fn rlimits(configured: &[String]) -> Result<Vec<gantry_spec::rlimit::PosixRlimit>> {
    use gantry_spec::rlimit::{UNLIMITED, name, parse};
    let one = |text: &String| {
        let wrong = |reason| anyhow::anyhow!("runtime.default_ulimits: {reason}");
        let limit = parse(text, UNLIMITED).map_err(wrong)?;
        let own = gantry_sys::process::hard_limit(&name(&limit)).context("read own limits")?;
        parse(text, own).map_err(wrong)
    };
    configured.iter().map(one).collect()
}

/// gantry-shim: as configured, beside our own executable, or in PATH.
fn shim(config: &Config) -> Result<PathBuf> {
    if !config.shim.as_os_str().is_empty() {
        return handlers::in_path(&config.shim)
            .with_context(|| format!("shim: {} is not an executable", config.shim.display()));
    }
    let beside = std::env::current_exe()
        .context("find own executable")?
        .with_file_name(SHIM);
    handlers::in_path(&beside)
        .or_else(|| handlers::in_path(Path::new(SHIM)))
        .with_context(|| format!("{SHIM} is neither beside gantryd nor in PATH"))
}

const SHIM: &str = "gantry-shim";

fn cgroups(config: &Config) -> Result<Cgroups> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("read mounts")?;
    let hierarchy = Cgroups::detect_hierarchy(&mounts)?;
    let v2 = matches!(hierarchy, Hierarchy::V2(_));
    // sd_booted(3)
    let systemd = Path::new("/run/systemd/system").is_dir();
    let driver = match config.cgroup.driver {
        config::CgroupDriver::Systemd => CgroupDriver::Systemd,
        config::CgroupDriver::Cgroupfs => CgroupDriver::Cgroupfs,
        config::CgroupDriver::Auto if v2 && systemd => CgroupDriver::Systemd,
        config::CgroupDriver::Auto => CgroupDriver::Cgroupfs,
    };
    let default_parent = match (config.cgroup.default_parent.as_str(), driver) {
        ("", CgroupDriver::Systemd) => "gantry.slice".to_owned(),
        ("", CgroupDriver::Cgroupfs) => "/gantry".to_owned(),
        (parent, _) => parent.to_owned(),
    };
    let shims = match (config.cgroup.shims.as_str(), driver) {
        ("", CgroupDriver::Systemd) => "gantry-shims.slice".to_owned(),
        ("", CgroupDriver::Cgroupfs) => "/gantry-shims".to_owned(),
        (parent, _) => parent.to_owned(),
    };
    let cgroups = Cgroups {
        driver,
        hierarchy,
        mounts: Cgroups::mounts(&mounts),
        default_parent,
        shims,
    };
    for (key, parent) in [
        ("cgroup.default_parent", &cgroups.default_parent),
        ("cgroup.shims", &cgroups.shims),
    ] {
        cgroups.parent(parent).context(key)?;
    }
    Ok(cgroups)
}

/// What the controllers of this node can do.
fn cgroup_node(cgroups: &Cgroups) -> CgroupNode {
    match &cgroups.hierarchy {
        Hierarchy::V2(mount) => {
            let controllers =
                std::fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
            CgroupNode {
                version: CgroupVersion::V2,
                hugetlb: controllers
                    .split_ascii_whitespace()
                    .any(|name| name == "hugetlb"),
                // The root has no memory.swap.max; without swap in the kernel there is no
                // /proc/swaps either.
                swap: Path::new("/proc/swaps").exists(),
            }
        }
        Hierarchy::V1 { memory, .. } => CgroupNode {
            version: CgroupVersion::V1,
            hugetlb: memory.with_file_name("hugetlb").is_dir(),
            swap: memory.join("memory.memsw.limit_in_bytes").exists(),
        },
    }
}
