//! RunPodSandbox: reserve, flush the intent, make, flush the result, publish, answer.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use gantry_cri_api::v1 as cri;
use gantry_ports::network::{Attached, Attachment, Dns, PortMapping, Protocol};
use gantry_ports::scopes::Scope;
use gantry_shim_api::v1;
use gantry_spec::resolved::SelinuxLabels;
use gantry_spec::userns::Mapping;
use gantry_store::record;
use gantry_types::{ErrorKind, PodState, ProcessRef};
use tokio::sync::mpsc;

use super::{Awaited, Driver, Msg, SHIM_ENDED, answer, blocking, files, teardown};
use crate::activity::Of;
use crate::registry::PodFacts;
use crate::settings::{Handler, Settings};
use crate::shim::{Shim, spawn};
use crate::undo::Undo;
use crate::{Context, Error, cgroup, failpoint};

/// What a shim's start is listed as while it is under way.
pub(super) const START_SHIM: &str = "start shim";

/// tmpfs shared by the pod's containers as /dev/shm.
const SHM_BYTES: &str = "67108864";

/// tmpfs that holds what becomes /etc/hostname, /etc/hosts and /etc/resolv.conf. Containers may
/// write there: on the node's own tmpfs they could fill it for all (CVE-2020-8557).
const FILES_BYTES: u64 = 4 << 20;

/// Applied in a pod's own network namespace unless the pod says otherwise, as containerd does:
/// a container without capabilities may bind low ports and send pings.
const UNPRIVILEGED_PORTS: &str = "net/ipv4/ip_unprivileged_port_start";
const PING_GROUPS: &str = "net/ipv4/ping_group_range";

/// Namespaces that a pod asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub host_network: bool,
    pub host_ipc: bool,
    pub pid: cri::NamespaceMode,
    /// The pod has a user namespace of its own.
    pub user: Option<Mapping>,
}

impl Asked {
    pub(crate) fn of(config: &cri::PodSandboxConfig) -> Self {
        let options = config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref())
            .and_then(|security| security.namespace_options.clone())
            .unwrap_or_default();
        Self {
            // What is malformed was refused before anything was made of it.
            user: gantry_spec::userns::of_pod(&options).unwrap_or_default(),
            host_network: options.network() == cri::NamespaceMode::Node,
            host_ipc: options.ipc() == cri::NamespaceMode::Node,
            pid: options.pid(),
        }
    }
}

/// Refuses what cannot be served, before anything is made. `no_user_namespaces`: why the handler
/// has none.
pub(crate) fn check(
    config: &cri::PodSandboxConfig,
    no_user_namespaces: Option<&str>,
) -> Result<(), Error> {
    let metadata = config.metadata.clone().unwrap_or_default();
    for (field, value) in [("name", &metadata.name), ("namespace", &metadata.namespace)] {
        if value.is_empty() {
            return Err(Error::Invalid {
                field: format!("config.metadata.{field}"),
                reason: "is empty".to_owned(),
            });
        }
    }
    // HOST_NAME_MAX; sethostname(2) would refuse it in the middle of the work.
    if config.hostname.len() > 64 || config.hostname.contains(['/', '\0', '\n']) {
        return Err(Error::Invalid {
            field: "config.hostname".to_owned(),
            reason: "is longer than 64 bytes or has a character that no host name has".to_owned(),
        });
    }
    let options = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|security| security.namespace_options.as_ref());
    let user = options
        .map_or(Ok(None), gantry_spec::userns::of_pod)
        .map_err(Error::step("check request"))?;
    if user.is_some()
        && let Some(reason) = no_user_namespaces
    {
        return Err(Error::Failed {
            step: "check request",
            kind: ErrorKind::FailedPrecondition,
            message: format!("namespace_options.userns_options: {reason}"),
        });
    }
    if options.is_some_and(|options| options.pid() == cri::NamespaceMode::Target) {
        return Err(Error::Invalid {
            field: "namespace_options.pid".to_owned(),
            reason: "TARGET is for containers".to_owned(),
        });
    }
    if let Some(options) = selinux_options(config) {
        gantry_spec::selinux::check(options).map_err(Error::step("check request"))?;
    }
    given_sysctls(config, Asked::of(config))?;
    config
        .port_mappings
        .iter()
        .filter(|m| m.host_port != 0)
        .try_for_each(|mapping| port_mapping(mapping).map(drop))
}

pub(crate) fn host_network(config: &cri::PodSandboxConfig) -> bool {
    Asked::of(config).host_network
}

/// A pod as the steps left it.
struct Made {
    shim: Arc<Shim>,
    status: record::PodStatus,
    state: PodState,
}

/// Why it was not made, and what could not be taken back.
struct Failed {
    error: Error,
    left: Option<String>,
}

impl Driver {
    /// Begins to make the pod; everybody in `creating` is answered when that has ended.
    pub(crate) fn begin_run(&mut self) {
        self.busy = Some("creating");
        let (ctx, facts) = (Arc::clone(&self.ctx), Arc::clone(&self.facts));
        let mailbox = self.mailbox();
        self.effect(
            async move {
                let making = make(&ctx, &facts, mailbox);
                ctx.activity
                    .during("run pod", Of::pod(&facts), making)
                    .await
            },
            Self::finish_run,
        );
    }

    fn finish_run(&mut self, outcome: Result<Made, Failed>) {
        self.busy = None;
        let waiters = std::mem::take(&mut self.creating);
        match outcome {
            Ok(made) => {
                self.shim = Some(made.shim);
                self.status = made.status;
                self.state = made.state;
                if let Some(reason) = self.lost_early.take() {
                    self.status.half_made = true;
                    if reason == SHIM_ENDED {
                        self.shim = None;
                    }
                    self.lose(reason);
                    let error = Error::internal("make pod sandbox", reason);
                    return answer(waiters, &Err(error));
                }
                self.prepare_for_loss();
                self.publish();
                answer(waiters, &Ok(Awaited::Ready(self.id().clone())));
            }
            Err(Failed { error, left: None }) => {
                self.ctx.registry.remove(&self.name(), self.id());
                self.ended = true;
                answer(waiters, &Err(error));
            }
            Err(Failed {
                error,
                left: Some(left),
            }) => {
                tracing::error!(pod = %self.id(), %error, left, "a failed pod is left to be removed");
                self.status.half_made = true;
                self.set_state(PodState::NotReady {
                    reason: format!("{error}; {left}"),
                });
                self.ctx.registry.release_name(&self.name(), self.id());
                self.publish();
                answer(waiters, &Err(error));
            }
        }
    }
}

async fn make(
    ctx: &Arc<Context>,
    facts: &Arc<PodFacts>,
    mailbox: mpsc::Sender<Msg>,
) -> Result<Made, Failed> {
    let mut undo = Undo::default();
    match steps(ctx, facts, mailbox, &mut undo).await {
        Ok(made) => Ok(made),
        Err(error) => match take_back(ctx, facts, undo).await {
            Ok(()) => Err(Failed { error, left: None }),
            Err(left) => {
                let (ctx, id) = (Arc::clone(ctx), facts.id.clone());
                let mut status = record::PodStatus {
                    reason: format!("{error}; {left}"),
                    half_made: true,
                    ..Default::default()
                };
                status.set_phase(record::PodPhase::NotReady);
                // The record of the intent stays either way, and is enough to clean up by.
                if let Err(error) = blocking(move || ctx.records.put_pod_status(&id, &status)).await
                {
                    tracing::error!(pod = %facts.id, %error, "failed pod not recorded as such");
                }
                Err(Failed {
                    error,
                    left: Some(left),
                })
            }
        },
    }
}

/// The record goes last, and only when nothing is owed any more.
async fn take_back(ctx: &Arc<Context>, facts: &Arc<PodFacts>, undo: Undo) -> Result<(), String> {
    undo.run().await?;
    let (ctx, id) = (Arc::clone(ctx), facts.id.clone());
    blocking(move || ctx.records.forget_pod(&id))
        .await
        .map_err(|error| error.to_string())
}

async fn steps(
    ctx: &Arc<Context>,
    facts: &Arc<PodFacts>,
    mailbox: mpsc::Sender<Msg>,
    undo: &mut Undo,
) -> Result<Made, Error> {
    let id = &facts.id;
    let handler = ctx
        .settings
        .handler(&facts.record.runtime_handler)
        .ok_or_else(|| Error::Invalid {
            field: "runtime_handler".into(),
            reason: "no such handler".into(),
        })?;
    let bootstrap = bootstrap(ctx, facts, handler)?;

    // Pushed before the effect: a step that failed midway is taken back as well.
    undo.push("sweep", {
        let (ctx, facts) = (Arc::clone(ctx), Arc::clone(facts));
        async move { blocking(move || teardown::sweep(&ctx, &facts)).await }
    });
    let of = || Of::pod(facts);
    let intent = blocking({
        let (ctx, facts) = (Arc::clone(ctx), Arc::clone(facts));
        move || {
            ctx.records.begin_pod(&facts.id, &facts.record)?;
            make_files(&ctx, &facts)?;
            make_shm(&ctx, &facts)?;
            failpoint::at("pod::after-intent")
        }
    });
    let activity = &ctx.activity;
    activity.during("flush intent", of(), intent).await?;

    undo.push("end shim", {
        let (ctx, facts) = (Arc::clone(ctx), Arc::clone(facts));
        async move { teardown::end_shim(&ctx, &facts, None, None, None).await }
    });
    let limit = ctx.settings.timeouts.shim_start;
    let started = spawn(&ctx.settings.shim, id, &bootstrap, limit);
    let ready = activity.during(START_SHIM, of(), started).await?;
    let process = |process: Option<v1::Process>, what: &str| match process {
        Some(process) => Ok(ProcessRef {
            pid: process.pid,
            start_time: process.start_time,
        }),
        None => Err(Error::internal("start shim", format!("it told no {what}"))),
    };
    let holder = process(ready.holder, "holder")?;
    let own = process(ready.shim, "process of its own")?;
    let socket = ctx.records.dirs.socket(id);
    let limit = ctx.settings.timeouts.shim_call;
    let (shim, _) = Shim::connect(activity, id, &socket, limit, mailbox).await?;

    failpoint::at("pod::after-shim")?;

    if !facts.record.netns_path.is_empty() {
        undo.push("release network", {
            let (ctx, facts) = (Arc::clone(ctx), Arc::clone(facts));
            let intent = facts.record.network_intent.clone();
            async move { teardown::release_network(&ctx, &facts, &intent).await }
        });
    }
    // Side by side, and each to its end: what takes them back must not meet them under way.
    let (placed, attached) = tokio::join!(
        activity.during("make scopes", of(), place(ctx, facts, holder, own)),
        attach(ctx, facts)
    );
    placed?;
    let mut status = record::PodStatus::default();
    if let Some(attached) = attached? {
        status.ips = attached.ips.iter().map(ToString::to_string).collect();
        status.network_result = attached.raw;
    }
    failpoint::at("pod::after-network")?;

    let state = PodState::Ready {
        shim: shim.process(),
        holder,
    };
    crate::records::set_pod_state(&mut status, &state);
    let result = blocking({
        let (ctx, id, status) = (Arc::clone(ctx), id.clone(), status.clone());
        move || {
            ctx.records.put_pod_status(&id, &status)?;
            failpoint::at("pod::after-result")
        }
    });
    activity.during("flush result", of(), result).await?;
    Ok(Made {
        shim,
        status,
        state,
    })
}

/// Asks systemd for the scopes of holder and shim. Without systemd they move by themselves.
async fn place(
    ctx: &Context,
    facts: &PodFacts,
    holder: ProcessRef,
    shim: ProcessRef,
) -> Result<(), Error> {
    let (Some(scopes), [name, _]) = (&ctx.scopes, facts.record.scopes.as_slice()) else {
        return Ok(());
    };
    let cgroups = &ctx.settings.cgroups;
    let linux = facts.config.linux.as_ref();
    let parent = cgroups.parent(linux.map_or("", |linux| linux.cgroup_parent.as_str()))?;
    let holder = scope(facts, name, cgroups.slice(parent), "sandbox", holder);
    let (holder, shim) = tokio::join!(scopes.start(&holder), place_shim(ctx, facts, shim));
    holder.map_err(Error::step("make scope")).and(shim)
}

/// As `place`, of the shim alone.
pub(super) async fn place_shim(
    ctx: &Context,
    facts: &PodFacts,
    shim: ProcessRef,
) -> Result<(), Error> {
    let (Some(scopes), [_, name]) = (&ctx.scopes, facts.record.scopes.as_slice()) else {
        return Ok(());
    };
    let cgroups = &ctx.settings.cgroups;
    let scope = scope(facts, name, cgroups.slice(&cgroups.shims), "shim", shim);
    let started = scopes.start(&scope).await;
    started.map_err(Error::step("make scope"))
}

fn scope(facts: &PodFacts, name: &str, slice: &str, what: &str, process: ProcessRef) -> Scope {
    let metadata = facts.config.metadata.clone().unwrap_or_default();
    Scope {
        name: name.to_owned(),
        slice: slice.to_owned(),
        description: format!("gantry {what} of {}/{}", metadata.namespace, metadata.name),
        pid: process.pid,
    }
}

async fn attach(ctx: &Context, facts: &PodFacts) -> Result<Option<Attached>, Error> {
    if facts.record.netns_path.is_empty() {
        return Ok(None);
    }
    let attachment = attachment(facts, Some(Path::new(&facts.record.netns_path)))?;
    let intent = &facts.record.network_intent;
    let attached = ctx.network.attach(&attachment, intent);
    let attached = ctx.activity.during("network ADD", Of::pod(facts), attached);
    attached
        .await
        .map(Some)
        .map_err(Error::step("set up network"))
}

/// The name that containers of the pod see. Never read back from the pod's file, which they may
/// write.
pub(crate) fn hostname(config: &cri::PodSandboxConfig) -> String {
    // The host's network comes with the host's name: both belong to the node.
    if !host_network(config) && !config.hostname.is_empty() {
        return config.hostname.clone();
    }
    nix::unistd::gethostname()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_else(|_| "localhost".to_owned())
}

pub(super) fn bootstrap(
    ctx: &Context,
    facts: &PodFacts,
    handler: &Handler,
) -> Result<v1::Bootstrap, Error> {
    let asked = Asked::of(&facts.config);
    let dirs = &ctx.records.dirs;
    // systemd moves both when they are there.
    let (cgroup_dirs, shim_cgroup_dirs) = match ctx.settings.cgroups.driver {
        cgroup::Driver::Systemd => (Vec::new(), Vec::new()),
        cgroup::Driver::Cgroupfs => {
            let record = &facts.record;
            (record.cgroup_dirs.clone(), record.shim_cgroup_dirs.clone())
        }
    };
    let hostname = if asked.host_network {
        String::new()
    } else {
        facts.config.hostname.clone()
    };
    Ok(v1::Bootstrap {
        protocol: gantry_shim_api::PROTOCOL,
        pod_id: facts.id.to_string(),
        run_dir: path_text(&dirs.pod(&facts.id))?,
        holder: Some(v1::Holder {
            netns_path: facts.record.netns_path.clone(),
            pin_dir: path_text(&dirs.pins(&facts.id))?,
            new_ipc: !asked.host_ipc,
            // The host's network comes with the host's name: both belong to the node.
            new_uts: !asked.host_network,
            new_pid: asked.pid == cri::NamespaceMode::Pod,
            hostname,
            sysctls: sysctls(&ctx.settings, &facts.config, asked)?,
            cgroup_dirs,
            uid_mappings: asked
                .user
                .map(|user| id_mapping(user.host_uid, user.uids))
                .into_iter()
                .collect(),
            gid_mappings: asked
                .user
                .map(|user| id_mapping(user.host_gid, user.gids))
                .into_iter()
                .collect(),
            oom_score_adj: ctx.settings.shim_oom_score_adj,
        }),
        runtime: Some(v1::Runtime {
            binary: path_text(&handler.binary)?,
            root: path_text(&handler.root)?,
            systemd_cgroup: ctx.settings.cgroups.driver == cgroup::Driver::Systemd,
            timeout_ms: u32::try_from(ctx.settings.timeouts.runtime.as_millis())
                .unwrap_or(u32::MAX),
        }),
        oom_score_adj: ctx.settings.shim_oom_score_adj,
        cgroup_dirs: shim_cgroup_dirs,
        adopt: None,
        open_files: ctx.settings.open_files,
    })
}

fn id_mapping(host_id: u32, length: u32) -> v1::IdMapping {
    v1::IdMapping {
        container_id: 0,
        host_id,
        length,
    }
}

fn path_text(path: &Path) -> Result<String, Error> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Error::Invalid {
            field: "path".to_owned(),
            reason: format!("{} is not UTF-8", path.display()),
        })
}

/// The node's defaults under what the pod asks for.
fn sysctls(
    settings: &Settings,
    config: &cri::PodSandboxConfig,
    asked: Asked,
) -> Result<BTreeMap<String, String>, Error> {
    let mut all = BTreeMap::new();
    if !asked.host_network && settings.unprivileged_ports {
        all.insert(UNPRIVILEGED_PORTS.to_owned(), "0".to_owned());
    }
    if !asked.host_network && settings.unprivileged_icmp {
        // The kernel refuses groups that the user namespace does not have.
        let last = asked
            .user
            .map_or(gantry_spec::user::MAX_ID, |user| user.gids - 1);
        all.insert(PING_GROUPS.to_owned(), format!("0 {last}"));
    }
    all.extend(given_sysctls(config, asked)?);
    Ok(all)
}

/// What the pod asks for, by path below /proc/sys.
fn given_sysctls(
    config: &cri::PodSandboxConfig,
    asked: Asked,
) -> Result<BTreeMap<String, String>, Error> {
    let mut all = BTreeMap::new();
    let given = config.linux.as_ref().map(|linux| &linux.sysctls);
    for (name, value) in given.into_iter().flatten() {
        let path = gantry_spec::sysctl::validate(name, value, asked.host_network, asked.host_ipc)
            .map_err(Error::step("check request"))?;
        all.insert(path.to_string_lossy().into_owned(), value.clone());
    }
    Ok(all)
}

/// What the network plugin is told of a pod.
pub(super) fn attachment(facts: &PodFacts, netns: Option<&Path>) -> Result<Attachment, Error> {
    let metadata = facts.config.metadata.clone().unwrap_or_default();
    let linux = facts.config.linux.clone().unwrap_or_default();
    let mappings = facts
        .config
        .port_mappings
        .iter()
        .filter(|mapping| mapping.host_port != 0);
    Ok(Attachment {
        pod: facts.id.clone(),
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        netns: netns.map(Path::to_owned),
        port_mappings: mappings.map(port_mapping).collect::<Result<_, _>>()?,
        dns: facts.config.dns_config.as_ref().map(|dns| Dns {
            servers: dns.servers.clone(),
            searches: dns.searches.clone(),
            options: dns.options.clone(),
        }),
        annotations: facts.config.annotations.clone(),
        cgroup_parent: linux.cgroup_parent,
    })
}

fn port_mapping(mapping: &cri::PortMapping) -> Result<PortMapping, Error> {
    let port = |name: &str, value: i32| {
        u16::try_from(value)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| Error::Invalid {
                field: format!("port_mappings.{name}"),
                reason: format!("{value} is not a port"),
            })
    };
    Ok(PortMapping {
        protocol: match mapping.protocol() {
            cri::Protocol::Tcp => Protocol::Tcp,
            cri::Protocol::Udp => Protocol::Udp,
            cri::Protocol::Sctp => Protocol::Sctp,
        },
        container_port: port("container_port", mapping.container_port)?,
        host_port: port("host_port", mapping.host_port)?,
        host_ip: mapping.host_ip.clone(),
    })
}

/// Labels of what belongs to the whole pod; `None` where SELinux is off.
fn selinux_labels(ctx: &Context, facts: &PodFacts) -> Result<Option<SelinuxLabels>, Error> {
    let Some(defaults) = &ctx.settings.host.selinux else {
        return Ok(None);
    };
    gantry_spec::selinux::labels(
        defaults,
        selinux_options(&facts.config),
        None,
        &facts.id,
        false,
    )
    .map(Some)
    .map_err(Error::step("resolve SELinux labels"))
}

pub(crate) fn selinux_options(config: &cri::PodSandboxConfig) -> Option<&cri::SeLinuxOption> {
    let security = config.linux.as_ref()?.security_context.as_ref()?;
    security.selinux_options.as_ref()
}

fn make_files(ctx: &Context, facts: &PodFacts) -> Result<(), Error> {
    let path = ctx.records.dirs.etc(&facts.id);
    let options = format!("mode=755,size={FILES_BYTES},nr_inodes=16");
    mount_tmpfs(ctx, facts, &path, &options)?;
    let user = Asked::of(&facts.config).user;
    files::write(&path, &facts.config, &hostname(&facts.config), user)
}

fn make_shm(ctx: &Context, facts: &PodFacts) -> Result<(), Error> {
    if Asked::of(&facts.config).host_ipc {
        return Ok(());
    }
    let path = ctx.records.dirs.shm(&facts.id);
    mount_tmpfs(ctx, facts, &path, &format!("mode=1777,size={SHM_BYTES}"))
}

/// Makes a directory with a tmpfs on it that belongs to the pod's root.
fn mount_tmpfs(ctx: &Context, facts: &PodFacts, path: &Path, options: &str) -> Result<(), Error> {
    use nix::mount::{MsFlags, mount};
    crate::rundir::make_dir(path).map_err(|error| Error::io("make directory", path, &error))?;
    let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let mut options = options.to_owned();
    if let Some(user) = Asked::of(&facts.config).user {
        options.push_str(&format!(",uid={},gid={}", user.host_uid, user.host_gid));
    }
    if let Some(labels) = selinux_labels(ctx, facts)? {
        options.push_str(&format!(",context=\"{}\"", labels.mount));
    }
    let name = path.file_name();
    mount(name, path, Some("tmpfs"), flags, Some(options.as_str()))
        .map_err(|error| Error::io("mount tmpfs", path, &error.into()))
}
