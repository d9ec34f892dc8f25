//! The configuration: one TOML file, drop-ins beside it, flags above all.
//!
//! `/etc/gantry/config.toml` and then `/etc/gantry/conf.d/*.toml` in the order of their names:
//! tables merge, everything else replaces. Unknown keys are errors that name the line. Without a
//! file the defaults run.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where the configuration is when no flag says otherwise.
pub const DEFAULT_FILE: &str = "/etc/gantry/config.toml";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    /// The text names line and column.
    #[error("{path}: {message}")]
    Parse { path: PathBuf, message: String },
    #[error("{key}: {reason}")]
    Invalid { key: &'static str, reason: String },
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What survives a reboot: records, images, layers.
    pub root: PathBuf,
    /// What does not: run directories. Must be on a tmpfs.
    pub state: PathBuf,
    /// The unix socket of CRI.
    pub socket: PathBuf,
    /// gantry-shim; empty: beside gantryd, then in PATH.
    pub shim: PathBuf,
    pub cadvisor: Cadvisor,
    pub log: Log,
    pub cgroup: Cgroup,
    pub network: Network,
    pub images: Images,
    pub runtime: Runtime,
    pub streaming: Streaming,
    pub timeouts: Timeouts,
    pub metrics: Metrics,
    pub tracing: Tracing,
    /// The files that this was read from, in their order.
    #[serde(skip)]
    pub sources: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cadvisor {
    /// A unix socket on which cAdvisor is answered as by a containerd; empty: none.
    pub socket: PathBuf,
}

impl Cadvisor {
    /// Where to listen, if anywhere.
    pub fn socket(&self) -> Option<&PathBuf> {
        Some(&self.socket).filter(|path| !path.as_os_str().is_empty())
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// error, warn, info, debug or trace.
    pub level: String,
    pub format: LogFormat,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// systemd where it runs the machine and cgroups are v2, else cgroupfs.
    #[default]
    Auto,
    Systemd,
    Cgroupfs,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cgroup {
    pub driver: CgroupDriver,
    /// Parent of pods whose request names none; empty: `/gantry`, or `gantry.slice` with systemd.
    pub default_parent: String,
    /// Parent of the shims' cgroups; empty: `/gantry-shims`, or `gantry-shims.slice` with systemd.
    pub shims: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    pub conf_dir: PathBuf,
    /// Directories with plugins; empty: `/opt/cni/bin`, then `/usr/lib/cni`.
    pub bin_dirs: Vec<PathBuf>,
    /// Where network namespaces are pinned.
    pub netns_dir: PathBuf,
}

/// What makes root file systems of layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotterName {
    #[default]
    Overlayfs,
    /// Copies: slow and large, on any file system.
    Native,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Images {
    /// Directory with `<host>/hosts.toml`.
    pub registry_config: PathBuf,
    /// Names (globs) of images that are never collected.
    pub pinned: Vec<String>,
    pub snapshotter: SnapshotterName,
    /// Where images are, if not in `root` with what containers write.
    pub root: PathBuf,
    /// Compressed layers go once they are unpacked.
    pub discard_unpacked_layers: bool,
    /// Layers of one image that are fetched and unpacked at once.
    pub layers_at_once: usize,
    /// Transfers of all pulls together on which bytes move at once.
    pub parallel_downloads: usize,
    /// Layers of all pulls together that are unpacked at once; 0: as many as there are CPUs.
    pub parallel_unpacks: usize,
    /// What all pulls together may take from the network; 0: no limit.
    pub bandwidth_bytes_per_second: u64,
    /// A transfer on which nothing comes for so long is given up or resumed.
    pub progress_timeout_seconds: u64,
    /// A `config.json` of docker's with credentials; empty: none.
    pub docker_config: PathBuf,
    /// Directory with `docker-credential-*` programs; empty: PATH.
    pub credential_helper_dir: PathBuf,
    /// Credentials for pulls that bring none, by `host[:port]`.
    pub credentials: BTreeMap<String, Credentials>,
}

/// The credentials of one registry host. Secrets are in files of their own, so that a
/// configuration can be shown. Either `helper`, or one of the files; `password_file` goes with
/// `username`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Credentials {
    pub username: String,
    pub password_file: PathBuf,
    /// OAuth2 refresh token.
    pub identity_token_file: PathBuf,
    /// Bearer token.
    pub registry_token_file: PathBuf,
    /// `ecr-login` is the program `docker-credential-ecr-login`.
    pub helper: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Runtime {
    /// Handler of pods whose request names none; empty: runc, crun or youki, the first found.
    pub default: String,
    /// By name; empty: those of runc, crun and youki that are in PATH.
    pub handlers: BTreeMap<String, Handler>,
    /// OOM score adjustment of shims; raised to what the kernel lets us write.
    pub shim_oom_score_adj: i32,
    /// Processes of a pod with a network of its own may bind ports below 1024 without a
    /// capability.
    pub unprivileged_ports: bool,
    /// And send ICMP echo requests.
    pub unprivileged_icmp: bool,
    /// Directories of CDI specs; the devices of a later one go before those of an earlier.
    pub cdi_dirs: Vec<PathBuf>,
    /// Device nodes belong to the user and group that a container is asked to run as.
    pub device_ownership_from_security_context: bool,
    /// Limits of containers, `name=soft:hard` or `name=both`; lowered to our own. Without one of a
    /// name containers have that of gantryd.
    pub default_ulimits: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Handler {
    /// Path of the OCI runtime, or a name to find in PATH.
    pub binary: PathBuf,
    /// Names of pod and container annotations that reach the OCI spec; `*` at the end is a glob.
    #[serde(default)]
    pub annotations: Vec<String>,
    /// What makes the roots of its containers; absent: [`Images::snapshotter`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshotter: Option<SnapshotterName>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StreamingTls {
    #[default]
    Off,
    /// With a certificate made at start.
    SelfSigned,
    /// With `certificate` and `key`.
    Files,
}

/// The server behind the URLs of Exec, Attach and PortForward.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Streaming {
    /// Where to listen; port 0 is any that is free.
    pub address: SocketAddr,
    pub tls: StreamingTls,
    /// PEM files, read again when they change.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// A connection on which nothing moves for so long is closed.
    pub idle_timeout_seconds: u64,
    /// Time for a client to open the streams that it asked for.
    pub creation_timeout_seconds: u64,
    /// A client that takes nothing for so long of what waits for it, after its command, container or
    /// connection has ended, is given up.
    pub drain_timeout_seconds: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// One call of the OCI runtime.
    pub runtime_seconds: u64,
    /// One call of a CNI plugin.
    pub network_seconds: u64,
    /// How long output may stay open after an ExecSync's command has ended.
    pub exec_drain_seconds: u64,
    /// How long the command of an Exec may take to end after its client has gone.
    pub exec_grace_seconds: u64,
    /// Recovery of one pod at start.
    pub recovery_seconds: u64,
}

/// Where traces go.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tracing {
    /// OTLP over gRPC, `http://127.0.0.1:4317`; empty: none.
    pub endpoint: String,
    /// Of a million calls whose client names no trace, those that begin one. A client that does has
    /// decided by itself.
    pub sampling_rate_per_million: u32,
}

impl Tracing {
    fn check(&self) -> Result<(), Error> {
        let rate = self.sampling_rate_per_million;
        if rate > 1_000_000 {
            let key = "tracing.sampling_rate_per_million";
            let reason = format!("{rate} is more than a million");
            return Err(Error::Invalid { key, reason });
        }
        let text = self.endpoint.as_str();
        if text.is_empty() {
            return Ok(());
        }
        let parsed = text.parse::<http::Uri>().ok();
        let usable = parsed.is_some_and(|uri| {
            let scheme = uri.scheme_str() == Some("http");
            let bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
            scheme && bare && uri.port_u16().is_some() && !text.contains('@')
        });
        if !usable {
            let key = "tracing.endpoint";
            let reason = format!("{text:?} is not of the form \"http://host:port\"");
            return Err(Error::Invalid { key, reason });
        }
        Ok(())
    }
}

/// The endpoint that Prometheus scrapes.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// `127.0.0.1:9464`, or the absolute path of a unix socket; empty: none.
    pub address: String,
}

/// Where [`Metrics`] are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Metrics {
    /// `None` when there is to be no endpoint.
    pub fn address(&self) -> Result<Option<MetricsAddress>, Error> {
        let key = "metrics.address";
        let invalid = |reason: String| Err(Error::Invalid { key, reason });
        let text = self.address.as_str();
        if text.is_empty() {
            return Ok(None);
        }
        if text.starts_with('/') {
            // sun_path has 108 bytes with its end (unix(7)).
            if text.len() > 107 || text.contains('\0') {
                return invalid(format!("{text:?} cannot be the path of a unix socket"));
            }
            return Ok(Some(MetricsAddress::Unix(text.into())));
        }
        match text.parse::<SocketAddr>() {
            // Names of pods and images are nobody's business beyond the node, and there is no TLS.
            Ok(address) if !address.ip().is_loopback() => {
                invalid(format!("{text:?} is not an address of the loopback"))
            }
            Ok(address) if address.port() == 0 => invalid(format!("{text:?} names no port")),
            Ok(address) => Ok(Some(MetricsAddress::Tcp(address))),
            Err(_) => invalid(format!(
                "{text:?} is neither address:port (\"127.0.0.1:9464\") nor an absolute path"
            )),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/gantry".into(),
            state: "/run/gantry".into(),
            socket: "/run/gantry/gantry.sock".into(),
            shim: PathBuf::new(),
            cadvisor: Cadvisor::default(),
            log: Log::default(),
            cgroup: Cgroup::default(),
            network: Network::default(),
            images: Images::default(),
            runtime: Runtime::default(),
            streaming: Streaming::default(),
            timeouts: Timeouts::default(),
            metrics: Metrics::default(),
            tracing: Tracing::default(),
            sources: Vec::new(),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: Vec::new(),
            netns_dir: "/var/run/netns".into(),
        }
    }
}

impl Default for Images {
    fn default() -> Self {
        Self {
            registry_config: "/etc/gantry/certs.d".into(),
            pinned: Vec::new(),
            snapshotter: SnapshotterName::default(),
            root: PathBuf::new(),
            discard_unpacked_layers: false,
            layers_at_once: 3,
            parallel_downloads: 12,
            parallel_unpacks: 0,
            bandwidth_bytes_per_second: 0,
            progress_timeout_seconds: 60,
            docker_config: PathBuf::new(),
            credential_helper_dir: PathBuf::new(),
            credentials: BTreeMap::new(),
        }
    }
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            default: String::new(),
            handlers: BTreeMap::new(),
            shim_oom_score_adj: -998,
            unprivileged_ports: true,
            unprivileged_icmp: true,
            cdi_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            device_ownership_from_security_context: false,
            // As systemd gives its services: old programs walk through all descriptors that there
            // may be, which takes them for ever where there is no limit.
            default_ulimits: vec!["nofile=1024:524288".to_owned()],
        }
    }
}

impl Default for Streaming {
    fn default() -> Self {
        Self {
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            tls: StreamingTls::Off,
            certificate: PathBuf::new(),
            key: PathBuf::new(),
            idle_timeout_seconds: 4 * 60 * 60,
            creation_timeout_seconds: 30,
            drain_timeout_seconds: 10 * 60,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            runtime_seconds: 60,
            network_seconds: 60,
            exec_drain_seconds: 2,
            exec_grace_seconds: 5,
            recovery_seconds: 10,
        }
    }
}

/// Flags that stand above the files.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    pub root: Option<PathBuf>,
    pub state: Option<PathBuf>,
    pub socket: Option<PathBuf>,
    pub cni_conf_dir: Option<PathBuf>,
    pub cni_bin_dirs: Option<Vec<PathBuf>>,
}

impl SnapshotterName {
    /// Every one that there is.
    pub const ALL: [Self; 2] = [Self::Overlayfs, Self::Native];

    /// As the configuration spells it, and the snapshotter itself.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Native => "native",
        }
    }
}

impl Handler {
    /// What makes the roots of its containers.
    pub fn snapshotter(&self, images: &Images) -> SnapshotterName {
        self.snapshotter.unwrap_or(images.snapshotter)
    }
}

impl Config {
    /// The key that names this snapshotter; `None` if none does.
    pub fn names_snapshotter(&self, name: SnapshotterName) -> Option<String> {
        if self.images.snapshotter == name {
            return Some("images.snapshotter".to_owned());
        }
        let mut handlers = self.runtime.handlers.iter();
        let (handler, _) = handlers.find(|(_, handler)| handler.snapshotter == Some(name))?;
        Some(format!("runtime.handlers.{handler}.snapshotter"))
    }

    /// Reads the file and its drop-ins. `file` that was named must exist; the default one need not.
    pub fn load(file: Option<&Path>, overrides: Overrides) -> Result<Self, Error> {
        let path = file.unwrap_or(Path::new(DEFAULT_FILE));
        let mut merged = match read(path) {
            Err(Error::Read { source, .. })
                if file.is_none() && source.kind() == std::io::ErrorKind::NotFound =>
            {
                toml::Table::new()
            }
            read => read?,
        };
        let mut sources = Vec::new();
        if path.exists() {
            sources.push(path.display().to_string());
        }
        for drop_in in drop_ins(path)? {
            sources.push(drop_in.display().to_string());
            merge(&mut merged, read(&drop_in)?);
        }
        let mut config: Config = merged.try_into().map_err(|error| Error::Parse {
            path: path.into(),
            message: error.to_string(),
        })?;
        config.sources = sources;
        config.apply(overrides);
        config.check()?;
        Ok(config)
    }

    fn apply(&mut self, overrides: Overrides) {
        fn set<T>(target: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *target = value;
            }
        }
        set(&mut self.root, overrides.root);
        set(&mut self.state, overrides.state);
        set(&mut self.socket, overrides.socket);
        set(&mut self.network.conf_dir, overrides.cni_conf_dir);
        set(&mut self.network.bin_dirs, overrides.cni_bin_dirs);
    }

    /// Where content and layers are.
    pub fn image_root(&self) -> &Path {
        match self.images.root.as_os_str().is_empty() {
            true => &self.root,
            false => &self.images.root,
        }
    }

    fn check(&self) -> Result<(), Error> {
        let dirs: [(&'static str, &Path); 5] = [
            ("root", &self.root),
            ("state", &self.state),
            ("socket", &self.socket),
            ("network.conf_dir", &self.network.conf_dir),
            ("network.netns_dir", &self.network.netns_dir),
        ];
        let cadvisor = self.cadvisor.socket().map(PathBuf::as_path);
        let cadvisor = cadvisor.map(|socket| ("cadvisor.socket", socket));
        for (key, path) in dirs.into_iter().chain(cadvisor) {
            if !path.is_absolute() {
                let reason = format!("{} is not an absolute path", path.display());
                return Err(Error::Invalid { key, reason });
            }
        }
        // sun_path has 108 bytes with its end (unix(7)); the longest below the state directory is
        // that of a shim.
        for (key, length) in [
            ("socket", self.socket.as_os_str().len()),
            ("cadvisor.socket", self.cadvisor.socket.as_os_str().len()),
            (
                "state",
                self.state.as_os_str().len() + "/pods//shim.sock".len() + 64,
            ),
        ] {
            if length > 107 {
                let reason =
                    format!("makes a socket path of {length} bytes; unix sockets end at 107");
                return Err(Error::Invalid { key, reason });
            }
        }
        if self.cadvisor.socket == self.socket {
            return Err(Error::Invalid {
                key: "cadvisor.socket",
                reason: "is the CRI socket".to_owned(),
            });
        }
        for limit in &self.runtime.default_ulimits {
            gantry_spec::rlimit::parse(limit, u64::MAX).map_err(|reason| Error::Invalid {
                key: "runtime.default_ulimits",
                reason,
            })?;
        }
        self.images.check()?;
        self.streaming.check()?;
        if let Some(MetricsAddress::Unix(path)) = self.metrics.address()? {
            let others = [
                ("socket", Some(&self.socket)),
                ("cadvisor.socket", self.cadvisor.socket()),
            ];
            // As paths: "/run//s" is "/run/s".
            let same = |other: Option<&PathBuf>| other.is_some_and(|other| *other == path);
            if let Some((other, _)) = others.into_iter().find(|(_, other)| same(*other)) {
                let reason = format!("is that of {other}");
                let key = "metrics.address";
                return Err(Error::Invalid { key, reason });
            }
        }
        self.tracing.check()?;
        let images = &self.images;
        let other = SnapshotterName::ALL
            .into_iter()
            .filter(|name| *name != images.snapshotter)
            .find_map(|name| self.names_snapshotter(name));
        if let Some(other) = other.filter(|_| images.discard_unpacked_layers) {
            let reason = format!(
                "{other} unpacks layers when a container needs them, from what would be discarded"
            );
            let key = "images.discard_unpacked_layers";
            return Err(Error::Invalid { key, reason });
        }
        if !self.runtime.default.is_empty()
            && !self.runtime.handlers.is_empty()
            && !self.runtime.handlers.contains_key(&self.runtime.default)
        {
            return Err(Error::Invalid {
                key: "runtime.default",
                reason: format!("no handler {:?} is configured", self.runtime.default),
            });
        }
        Ok(())
    }
}

impl Images {
    fn check(&self) -> Result<(), Error> {
        let counts: [(&'static str, usize, usize); 3] = [
            ("images.layers_at_once", self.layers_at_once, 1),
            ("images.parallel_downloads", self.parallel_downloads, 1),
            ("images.parallel_unpacks", self.parallel_unpacks, 0),
        ];
        for (key, count, least) in counts {
            if !(least..=1000).contains(&count) {
                let reason = format!("{count} is not from {least} to 1000");
                return Err(Error::Invalid { key, reason });
            }
        }
        if !(1..=LONGEST).contains(&self.progress_timeout_seconds) {
            let seconds = self.progress_timeout_seconds;
            let key = "images.progress_timeout_seconds";
            let reason = format!("{seconds} is not from 1 to {LONGEST}");
            return Err(Error::Invalid { key, reason });
        }
        let dirs: [(&'static str, &Path); 3] = [
            ("images.root", &self.root),
            ("images.docker_config", &self.docker_config),
            ("images.credential_helper_dir", &self.credential_helper_dir),
        ];
        for (key, path) in dirs {
            if !path.as_os_str().is_empty() && !path.is_absolute() {
                let reason = format!("{} is not an absolute path", path.display());
                return Err(Error::Invalid { key, reason });
            }
        }
        for (host, credentials) in &self.credentials {
            credentials.check().map_err(|reason| Error::Invalid {
                key: "images.credentials",
                reason: format!("{host:?}: {reason}"),
            })?;
        }
        Ok(())
    }
}

impl Credentials {
    fn check(&self) -> Result<(), String> {
        let files = [
            &self.password_file,
            &self.identity_token_file,
            &self.registry_token_file,
        ];
        let given: Vec<_> = files
            .into_iter()
            .filter(|path| !path.as_os_str().is_empty())
            .collect();
        if let Some(path) = given.iter().find(|path| !path.is_absolute()) {
            return Err(format!("{} is not an absolute path", path.display()));
        }
        if given.len() + usize::from(!self.helper.is_empty()) != 1 {
            return Err(
                "needs exactly one of password_file, identity_token_file, registry_token_file \
                 and helper"
                    .to_owned(),
            );
        }
        if self.username.is_empty() != self.password_file.as_os_str().is_empty() {
            return Err("username and password_file go together".to_owned());
        }
        if !self.helper.is_empty() && !gantry_images::is_helper_name(&self.helper) {
            return Err(format!(
                "helper {:?} is not the end of the name of a docker-credential- program",
                self.helper
            ));
        }
        Ok(())
    }
}

impl Streaming {
    fn check(&self) -> Result<(), Error> {
        let files: [(&'static str, &Path); 2] = [
            ("streaming.certificate", &self.certificate),
            ("streaming.key", &self.key),
        ];
        for (key, path) in files {
            let reason = match self.tls {
                StreamingTls::Files if path.is_absolute() => continue,
                StreamingTls::Files => "is not an absolute path",
                StreamingTls::Off | StreamingTls::SelfSigned if path.as_os_str().is_empty() => {
                    continue;
                }
                // Whoever names a certificate expects it to be served.
                StreamingTls::Off | StreamingTls::SelfSigned => "is for streaming.tls \"files\"",
            };
            let reason = format!("{:?} {reason}", path.display());
            return Err(Error::Invalid { key, reason });
        }
        for (key, seconds) in [
            ("streaming.idle_timeout_seconds", self.idle_timeout_seconds),
            (
                "streaming.creation_timeout_seconds",
                self.creation_timeout_seconds,
            ),
            (
                "streaming.drain_timeout_seconds",
                self.drain_timeout_seconds,
            ),
        ] {
            if !(1..=LONGEST).contains(&seconds) {
                let reason = format!("{seconds} is not from 1 to {LONGEST}");
                return Err(Error::Invalid { key, reason });
            }
        }
        Ok(())
    }
}

/// A year: what is longer would overflow an instant sooner or later.
const LONGEST: u64 = 365 * 24 * 60 * 60;

/// Reads one file. It is checked as a whole configuration of its own first, because only then
/// the error can name the line.
fn read(path: &Path) -> Result<toml::Table, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
        path: path.into(),
        source,
    })?;
    let parse = |error: toml::de::Error| Error::Parse {
        path: path.into(),
        message: error.to_string(),
    };
    toml::from_str::<Config>(&text).map_err(parse)?;
    toml::from_str(&text).map_err(parse)
}

/// `conf.d/*.toml` beside the file, by name.
fn drop_ins(file: &Path) -> Result<Vec<PathBuf>, Error> {
    let dir = file.with_file_name("conf.d");
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::Read { path: dir, source }),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|source| Error::Read {
                path: dir.clone(),
                source,
            })?
            .path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn merge(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(base)), toml::Value::Table(over)) => merge(base, over),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn load(dir: &Path) -> Result<Config, Error> {
        Config::load(Some(&dir.join("config.toml")), Overrides::default())
    }

    #[test]
    fn credentials_are_files_or_a_helper() {
        let check = |text: &str| {
            let text = format!("[images.credentials.\"r.io:5000\"]\n{text}");
            toml::from_str::<Config>(&text).unwrap().check()
        };
        for good in [
            "username = 'u'\npassword_file = '/p'",
            "identity_token_file = '/p'",
            "registry_token_file = '/p'",
            "helper = 'ecr-login'",
        ] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "username = 'u'",
            "password_file = '/p'",
            "username = 'u'\npassword_file = 'p'",
            "helper = '../x'",
            "helper = 'x'\nregistry_token_file = '/p'",
        ] {
            let error = check(bad).unwrap_err().to_string();
            assert!(
                error.contains("images.credentials") && error.contains("r.io:5000"),
                "{bad}: {error}"
            );
        }
        let password = "[images.credentials.\"r.io\"]\npassword = 'secret'";
        assert!(toml::from_str::<Config>(password).is_err());
    }

    #[test]
    fn traces_go_to_a_host_and_port() {
        let check = |endpoint: &str, rate| {
            let tracing = Tracing {
                endpoint: endpoint.to_owned(),
                sampling_rate_per_million: rate,
            };
            tracing.check()
        };
        assert!(check("", 0).is_ok());
        assert!(check("http://127.0.0.1:4317", 1_000_000).is_ok());
        for bad in [
            "127.0.0.1:4317",
            "https://collector:4317",
            "http://collector",
            "http://collector:4317/v1/traces",
            "http://me:secret@collector:4317",
            "nonsense",
        ] {
            let error = check(bad, 0).unwrap_err().to_string();
            assert!(error.starts_with("tracing.endpoint: "), "{error}");
        }
        assert!(check("", 1_000_001).is_err());
    }

    #[test]
    fn metrics_are_for_the_loopback_or_a_unix_socket() {
        let address = |address: &str| {
            let address = address.to_owned();
            Metrics { address }.address()
        };
        assert_eq!(address("").unwrap(), None);
        let tcp = "127.0.0.1:9464".parse().unwrap();
        assert_eq!(
            address("127.0.0.1:9464").unwrap(),
            Some(MetricsAddress::Tcp(tcp))
        );
        assert!(address("[::1]:1").is_ok());
        let unix = MetricsAddress::Unix("/run/gantry/metrics.sock".into());
        assert_eq!(address("/run/gantry/metrics.sock").unwrap(), Some(unix));
        for bad in [
            "0.0.0.0:9464",
            "192.0.2.1:9464",
            "127.0.0.1:0",
            "127.0.0.1",
            "localhost:9464",
            "run/metrics.sock",
            "http://127.0.0.1:9464",
            "127.0.0.1:99999",
        ] {
            let error = address(bad).unwrap_err().to_string();
            let names = error.starts_with("metrics.address: ") && error.contains(bad);
            assert!(names, "{error}");
        }
        let long = format!("/{}", "x".repeat(108));
        assert!(address(&long).is_err());
    }

    /// Every line of the example that is a key or a table, without its comment sign, says what
    /// holds without it, and no key is left out there or in the table of keys.
    #[test]
    fn the_example_shows_every_key_with_its_default() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let example = fs::read_to_string(repository.join("deploy/config.toml")).unwrap();
        let says: String = example
            .lines()
            .map(|line| line.strip_prefix("# ").unwrap_or(line))
            .filter(|line| line.starts_with('[') || line.contains(" = "))
            .flat_map(|line| [line, "\n"])
            .collect();
        let mut shown: toml::Table = says.parse().unwrap();
        let mut default = toml::Table::try_from(Config::default()).unwrap();
        // The defaults depend on the machine; the example has one for its keys.
        for table in [&mut shown, &mut default] {
            let runtime = table.get_mut("runtime").unwrap().as_table_mut().unwrap();
            runtime.remove("handlers");
            let images = table.get_mut("images").unwrap().as_table_mut().unwrap();
            images.remove("credentials");
        }
        assert_eq!(shown, default);
        let table = fs::read_to_string(repository.join("docs/configuration.md")).unwrap();
        for (name, value) in default {
            let keys = match value {
                toml::Value::Table(keys) => {
                    keys.keys().map(|key| format!("{name}.{key}")).collect()
                }
                _ => vec![name],
            };
            for key in keys {
                assert!(
                    table.contains(&format!("\n| `{key}` |")),
                    "docs/configuration.md: {key}"
                );
            }
        }
    }

    #[test]
    fn drop_ins_merge_tables_and_replace_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("conf.d")).unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write(
            "config.toml",
            "root = '/a'\n[network]\nbin_dirs = ['/x', '/y']\n[log]\nlevel = 'warn'\n",
        );
        write("conf.d/20.toml", "[network]\nbin_dirs = ['/z']\n");
        write(
            "conf.d/10.toml",
            "[network]\nbin_dirs = ['/w']\nconf_dir = '/c'\n",
        );
        write("conf.d/ignored.txt", "nonsense");
        let config = load(dir.path()).unwrap();
        assert_eq!(config.root, Path::new("/a"));
        assert_eq!(config.log.level, "warn");
        assert_eq!(config.network.bin_dirs, [PathBuf::from("/z")]);
        assert_eq!(config.network.conf_dir, Path::new("/c"));
        assert_eq!(config.state, Config::default().state);
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_file_and_line() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("config.toml"),
            "root = '/a'\n\n[log]\nlvel = 'x'\n",
        )
        .unwrap();
        let error = load(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("config.toml") && error.contains("line 4"),
            "{error}"
        );
        assert!(error.contains("lvel"), "{error}");
    }

    #[test]
    fn a_handler_has_its_own_snapshotter_or_that_of_images() {
        let handlers = |first: &str, more: &str| {
            format!(
                "[images]\nsnapshotter = '{first}'\n{more}\n\
                 [runtime.handlers.plain]\nbinary = 'runc'\n\
                 [runtime.handlers.copies]\nbinary = 'runc'\nsnapshotter = 'native'\n"
            )
        };
        let parse = |text: &str| toml::from_str::<Config>(text);
        for (first, plain) in [
            ("overlayfs", SnapshotterName::Overlayfs),
            ("native", SnapshotterName::Native),
        ] {
            let config = parse(&handlers(first, "")).unwrap();
            config.check().unwrap();
            let of = |name: &str| config.runtime.handlers[name].snapshotter(&config.images);
            assert_eq!(
                (of("plain"), of("copies")),
                (plain, SnapshotterName::Native)
            );
            let named = config.names_snapshotter(SnapshotterName::Overlayfs);
            assert_eq!(named.is_some(), first == "overlayfs");
        }
        let config = parse(&handlers("overlayfs", "")).unwrap();
        assert_eq!(
            config.names_snapshotter(SnapshotterName::Native).as_deref(),
            Some("runtime.handlers.copies.snapshotter")
        );
        // It would have to unpack what is no longer there.
        let discard = "discard_unpacked_layers = true";
        let error = parse(&handlers("overlayfs", discard)).unwrap().check();
        let error = error.unwrap_err().to_string();
        assert!(
            error.starts_with("images.discard_unpacked_layers: ")
                && error.contains("runtime.handlers.copies.snapshotter"),
            "{error}"
        );
        let same = parse(&handlers("native", discard)).unwrap();
        same.check().unwrap();
        for bad in ["'zfs'", "''", "true"] {
            let text = format!("[runtime.handlers.x]\nbinary = 'runc'\nsnapshotter = {bad}\n");
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains("line 3"), "{bad}: {error}");
        }
    }

    #[test]
    fn flags_stand_above_files_and_a_named_file_must_exist() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(dir.path()), Err(Error::Read { .. })));
        fs::write(dir.path().join("config.toml"), "root = '/a'\n").unwrap();
        let overrides = Overrides {
            root: Some("/b".into()),
            ..Default::default()
        };
        let config = Config::load(Some(&dir.path().join("config.toml")), overrides).unwrap();
        assert_eq!(config.root, Path::new("/b"));
    }

    #[test]
    fn paths_that_cannot_work_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        for (text, key) in [
            ("root = 'relative'", "root"),
            ("[images]\nroot = 'relative'", "images.root"),
            ("[cadvisor]\nsocket = 'relative'", "cadvisor.socket"),
            (
                "socket = '/s'\n[cadvisor]\nsocket = '/s'",
                "cadvisor.socket",
            ),
            (
                "socket = '/s'\n[metrics]\naddress = '//s'",
                "metrics.address",
            ),
            (
                "[cadvisor]\nsocket = '/s'\n[metrics]\naddress = '/s'",
                "metrics.address",
            ),
            (
                "[streaming]\ntls = 'files'\nkey = '/k'",
                "streaming.certificate",
            ),
            (
                "[streaming]\ntls = 'files'\ncertificate = '/c'\nkey = 'k'",
                "streaming.key",
            ),
            ("[streaming]\nkey = '/k'", "streaming.key"),
            (
                "[streaming]\nidle_timeout_seconds = 0",
                "streaming.idle_timeout_seconds",
            ),
            (
                "[streaming]\ncreation_timeout_seconds = 99999999999",
                "streaming.creation_timeout_seconds",
            ),
            (
                "[streaming]\ndrain_timeout_seconds = 0",
                "streaming.drain_timeout_seconds",
            ),
            (
                "[runtime]\ndefault = 'x'\n[runtime.handlers.y]\nbinary = 'y'",
                "runtime.default",
            ),
        ] {
            fs::write(&file, text).unwrap();
            let error = load(dir.path()).unwrap_err().to_string();
            assert!(error.starts_with(key), "{error}");
        }
        fs::write(&file, format!("state = '/{}'", "x".repeat(60))).unwrap();
        assert!(load(dir.path()).unwrap_err().to_string().contains("107"));
    }

    #[test]
    fn the_default_configuration_is_read_back_as_itself() {
        let text = toml::to_string(&Config::default()).unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), Config::default());
    }
}
