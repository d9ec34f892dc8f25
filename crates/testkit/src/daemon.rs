//! A real gantryd with everything of its own: directories, socket, network namespace, bridge,
//! cgroup parent. Several run side by side, and each is gone without a trace when it is dropped.

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cri::Client;
use crate::faults::Faults;
use crate::leakcheck::{self, Places, Snapshot};
use crate::netns::Netns;
use crate::{cni_plugin, oci_runtime};

/// How long a daemon may take to answer after its start, and to end after SIGTERM.
const LIMIT: Duration = Duration::from_secs(30);

/// What the parent of the shims' cgroups is named.
pub(crate) const SHIMS: &str = "shims";

/// Lines of the daemon's log that are shown when a test fails.
const SHOWN: usize = 80;

/// Arguments: a file with the id of a boot, and the daemon's command line.
const REBOOTED: &str = r#"mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@""#;

const CNI_BIN_DIRS: [&str; 3] = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"];

/// Handler whose OCI runtime has [`Daemon::runtime_faults`].
pub const FAULTY: &str = "faulty";

#[derive(Clone, Debug)]
pub struct Options {
    /// Added to the daemon's environment, as `FAILPOINTS`.
    pub env: Vec<(String, String)>,
    /// A drop-in for the configuration, TOML.
    pub config: String,
    /// Without it there is no CNI configuration.
    pub network: bool,
    /// `--root` is a tmpfs of so many bytes instead of a directory.
    pub root_bytes: Option<u64>,
    /// A file system of the caller's, mounted there, that `--root` and the directory of host-local
    /// lie on. Only its caller unmounts it.
    pub disk: Option<PathBuf>,
    /// The systemd cgroup driver instead of cgroupfs.
    pub systemd: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            env: Vec::new(),
            config: String::new(),
            network: true,
            root_bytes: None,
            disk: None,
            systemd: false,
        }
    }
}

impl Options {
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    #[must_use]
    pub fn config(mut self, text: &str) -> Self {
        text.clone_into(&mut self.config);
        self
    }

    #[must_use]
    pub fn systemd(mut self) -> Self {
        self.systemd = true;
        self
    }
}

/// Why tests that need a daemon cannot run here; `None` when they can.
pub fn unable() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    if in_path("runc").is_none() {
        return Some("runc is not in PATH".to_owned());
    }
    if real_bridge().is_none() {
        return Some(format!(
            "no CNI bridge plugin in {}",
            CNI_BIN_DIRS.join(", ")
        ));
    }
    None
}

/// The program `name` in PATH.
pub fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

fn real_bridge() -> Option<PathBuf> {
    CNI_BIN_DIRS
        .iter()
        .map(|dir| Path::new(dir).join("bridge"))
        .find(|file| file.is_file())
}

/// The daemon under test: `GANTRYD`, or the one that cargo built beside this test.
pub fn gantryd() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os("GANTRYD") {
        return Ok(path.into());
    }
    let path = build_dir()?.join("gantryd");
    if path.is_file() {
        return Ok(path);
    }
    let hint = "set GANTRYD or run cargo build -p gantryd --features gantryd/failpoints";
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("{}: not built; {hint}", path.display()),
    ))
}

/// The command line under test: `GANTRYCTL`, or the one that cargo built beside this test.
pub fn gantryctl() -> io::Result<PathBuf> {
    match std::env::var_os("GANTRYCTL") {
        Some(path) => Ok(path.into()),
        None => fs::canonicalize(build_dir()?.join("gantryctl")),
    }
}

/// The shim under test: `GANTRY_SHIM`, or what cargo or deploy/build-shim built beside this test.
pub fn gantry_shim() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os("GANTRY_SHIM") {
        return Ok(path.into());
    }
    let build = build_dir()?;
    let target = build.parent().unwrap_or(&build);
    // The static one first: it is what nodes run.
    let static_ones = leakcheck::names(target)
        .into_iter()
        .filter(|name| name.contains("-linux-"))
        .map(|triple| target.join(triple).join("shim/gantry-shim"));
    static_ones
        .chain([build.join("gantry-shim")])
        .find(|path| path.is_file())
        .ok_or_else(|| {
            let hint = "set GANTRY_SHIM or run deploy/build-shim";
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("gantry-shim: not built; {hint}"),
            )
        })
}

/// `target/debug` of a test in `target/debug/deps`.
fn build_dir() -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let dir = own.parent().and_then(Path::parent);
    dir.map(Path::to_owned)
        .ok_or_else(|| io::Error::other("no build directory"))
}

/// Whether the daemon under test was built with its feature `failpoints`: the name of the variable
/// that drives them is in the program only then.
pub fn has_failpoints() -> io::Result<bool> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(*found);
    }
    let program = fs::read(gantryd()?)?;
    Ok(*FOUND.get_or_init(|| memchr::memmem::find(&program, b"FAILPOINTS").is_some()))
}

/// A running gantryd.
pub struct Daemon {
    /// `gantry-test-` and eight hexadecimal digits that no other fixture on this machine has.
    name: String,
    /// Ends the daemon and all that it made, before the directories below go.
    child: Option<Child>,
    places: Places,
    socket: PathBuf,
    env: Vec<(String, String)>,
    disk: Option<PathBuf>,
    /// What the daemon is told that this boot's id is; none: the machine's own.
    boot_id: Option<PathBuf>,
    netns: Netns,
    plugin_faults: Faults,
    runtime_faults: Faults,
    dir: tempfile::TempDir,
}

impl Daemon {
    /// Makes the surroundings and starts the daemon. Does not wait until it is ready.
    pub fn start(options: Options) -> io::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("gantry-test-")
            .tempdir_in("/var/tmp")?;
        let name = fresh_name();
        let at = |below: &str| dir.path().join(below);
        let lasting = options.disk.as_deref().unwrap_or(dir.path());
        let (root, ipam_dir) = (lasting.join("root"), lasting.join("ipam"));
        let made = ["logs", "bin", "cni", "netns", "certs.d", "conf.d"].map(at);
        for made in made.iter().chain([&root, &ipam_dir]) {
            fs::create_dir(made)?;
        }
        // Short, since socket paths lie below it, and a tmpfs on any machine.
        let state = Path::new("/run").join(&name);
        let netns = Netns::make(&at("net"))?;
        let bridge = real_bridge().ok_or_else(|| io::Error::other("no CNI bridge plugin"))?;
        let plugin_faults = cni_plugin::write(&at("bin"), &at("plugin-faults"), &bridge)?;
        let faulty = at("bin/faulty-runtime");
        let runtime_faults = oci_runtime::write(&faulty, &at("runtime-faults"), "runc")?;
        // A slice's name tells its parents by dashes, and this one has none (systemd.slice(5)).
        let slice = name.replace('-', "");
        let (driver, cgroup, parent, shims) = if options.systemd {
            let cgroup = format!("{slice}.slice");
            let shims = format!("{slice}-{SHIMS}.slice");
            ("systemd", cgroup.clone(), cgroup, shims)
        } else {
            let (parent, shims) = (format!("/{name}"), format!("/{name}/{SHIMS}"));
            ("cgroupfs", name.clone(), parent, shims)
        };
        let mut dirs = vec![state.clone(), dir.path().to_owned()];
        dirs.extend(options.disk.clone());
        let places = Places {
            root,
            state: state.clone(),
            dirs,
            netns_dir: at("netns"),
            netns: netns.link()?,
            cgroup,
            ipam_dir,
        };
        let mut daemon = Self {
            name,
            child: None,
            socket: state.join("cri.sock"),
            env: options.env,
            disk: options.disk,
            boot_id: None,
            netns,
            plugin_faults,
            runtime_faults,
            places,
            dir,
        };
        fs::create_dir(&state)?;
        tmpfs(&state, 64 << 20)?;
        if let Some(bytes) = options.root_bytes {
            tmpfs(&daemon.places.root, bytes)?;
        }
        let bins = format!(
            "{:?}, {:?}",
            daemon.path("bin"),
            bridge.parent().unwrap_or(&bridge)
        );
        let shim = gantry_shim()?;
        let config = format!(
            "root = {root:?}\nstate = {state:?}\nsocket = {socket:?}\nshim = {shim:?}\n\
             [log]\nlevel = \"debug\"\n\
             [cgroup]\ndriver = {driver:?}\ndefault_parent = {parent:?}\nshims = {shims:?}\n\
             [network]\nconf_dir = {cni:?}\nbin_dirs = [{bins}]\nnetns_dir = {netns:?}\n\
             [images]\nregistry_config = {certs:?}\n\
             [runtime]\ndefault = \"runc\"\n\
             [runtime.handlers.runc]\nbinary = \"runc\"\n\
             [runtime.handlers.{FAULTY}]\nbinary = {faulty:?}\n",
            root = daemon.places.root,
            socket = daemon.socket,
            cni = daemon.path("cni"),
            netns = daemon.places.netns_dir,
            certs = daemon.path("certs.d"),
        );
        fs::write(daemon.path("config.toml"), config)?;
        fs::write(daemon.path("conf.d/10-test.toml"), options.config)?;
        if options.network {
            daemon.write_network()?;
        }
        daemon.spawn()?;
        Ok(daemon)
    }

    /// A file or directory of the fixture: `logs`, `certs.d`, `config.toml`.
    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn places(&self) -> &Places {
        &self.places
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Switches of the CNI plugin, by CNI command.
    pub fn plugin_faults(&self) -> &Faults {
        &self.plugin_faults
    }

    /// Switches of the OCI runtime of handler [`FAULTY`], by its command.
    pub fn runtime_faults(&self) -> &Faults {
        &self.runtime_faults
    }

    /// Writes the CNI configuration: a bridge with a subnet of this fixture's own.
    pub fn write_network(&self) -> io::Result<()> {
        // Of 10.64.0.0/10, by this daemon's number. No other namespace sees it.
        let number = NUMBER.load(Ordering::Relaxed);
        let subnet =
            Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 64, 0, 0)) | (number & 0x3fff) << 8);
        let bridge = format!("gt{}", &self.name["gantry-test-".len()..]);
        let list = cni_plugin::conflist(
            "gantry-test",
            &bridge,
            &format!("{subnet}/24"),
            &self.places.ipam_dir,
        );
        fs::write(self.path("cni/10-test.conflist"), list.to_string())
    }

    /// Environment of the next start.
    pub fn set_env(&mut self, env: &[(&str, &str)]) {
        self.env = env
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
    }

    /// The daemon's next starts are in a boot of that id. It gets a mount namespace of its own
    /// for that: mounts that are its own are seen in `/proc/PID/mountinfo` alone.
    pub fn set_boot_id(&mut self, id: &str) -> io::Result<()> {
        let path = self.path("boot_id");
        fs::write(&path, format!("{id}\n"))?;
        self.boot_id = Some(path);
        Ok(())
    }

    /// Starts the daemon, which must not be running.
    pub fn spawn(&mut self) -> io::Result<()> {
        if self.running() {
            return Err(io::Error::other("the daemon is running"));
        }
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("gantryd.log"))?;
        let mut command = match &self.boot_id {
            None => Command::new(gantryd()?),
            Some(id) => {
                let mut command = Command::new("unshare");
                command
                    .args(["--mount", "--propagation", "slave", "sh", "-c", REBOOTED])
                    .arg(id)
                    .arg(gantryd()?);
                command
            }
        };
        command
            .arg("--config")
            .arg(self.path("config.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .env("RUST_BACKTRACE", "1")
            .env_remove("FAILPOINTS")
            .envs(self.env.iter().map(|(k, v)| (k, v)));
        // The child is made by a thread in the namespace and so begins in it.
        self.child = Some(self.netns.run(|| command.spawn())??);
        Ok(())
    }

    /// Waits until the daemon answers, which is after its recovery.
    pub async fn ready(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + LIMIT;
        let client = Client::connect(&self.socket)?;
        loop {
            if let Some(status) = self.ended()? {
                return Err(io::Error::other(format!(
                    "gantryd ended before it was ready: {status}"
                )));
            }
            match client.version().await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= deadline => return Err(io::Error::other(error)),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    pub fn pid(&self) -> Option<i32> {
        self.child
            .as_ref()
            .and_then(|child| i32::try_from(child.id()).ok())
    }

    pub fn running(&mut self) -> bool {
        self.child.is_some() && matches!(self.ended(), Ok(None))
    }

    fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        match &mut self.child {
            None => Ok(None),
            Some(child) => child.try_wait(),
        }
    }

    /// Waits until the daemon has ended by itself, as at a failpoint that kills it.
    pub async fn wait_ended(&mut self) -> io::Result<ExitStatus> {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.ended()? {
                self.child = None;
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(io::Error::other("gantryd does not end"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// kill -9.
    pub fn kill(&mut self) -> io::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// SIGTERM; kill -9 and an error if that does not end it.
    pub fn terminate(&mut self) -> io::Result<ExitStatus> {
        let Some(pid) = self.pid() else {
            return Err(io::Error::other("the daemon is not running"));
        };
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            if let Some(status) = self.ended()? {
                self.child = None;
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill()?;
        Err(io::Error::other("gantryd does not end by SIGTERM"))
    }

    /// What is there now.
    pub fn snapshot(&self) -> Snapshot {
        let interfaces = self.netns.interfaces().unwrap_or_default();
        // The bridge stays for the next pod.
        let bridge = format!("gt{}", &self.name["gantry-test-".len()..]);
        let interfaces = interfaces
            .into_iter()
            .filter(|name| *name != bridge)
            .collect();
        self.places.snapshot(interfaces, self.pid())
    }

    /// What is there and was not `before`, once what is being torn down has gone.
    pub fn leaks(&self, before: &Snapshot) -> Vec<String> {
        leakcheck::settle(before, || self.snapshot())
    }

    /// All that the daemon has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("gantryd.log")).unwrap_or_default()
    }

    /// The end of the log, and what shims said.
    pub fn show(&self) {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        let from = lines.len().saturating_sub(SHOWN);
        println!(
            "--- gantryd.log, last {} of {} lines",
            lines.len() - from,
            lines.len()
        );
        lines[from..].iter().for_each(|line| println!("{line}"));
        for pod in leakcheck::names(&self.places.state.join("pods")) {
            let path = self.places.state.join("pods").join(&pod).join("shim.log");
            let text = fs::read_to_string(&path).unwrap_or_default();
            if !text.is_empty() {
                println!("--- {pod}/shim.log\n{text}");
            }
        }
    }

    /// What a reboot leaves: the root directory, the network configuration and host-local's files.
    pub fn power_cut(&mut self) -> io::Result<()> {
        self.end_everything()?;
        for entry in fs::read_dir(&self.places.state)? {
            let path = entry?.path();
            if path.is_dir() {
                fs::remove_dir_all(path)?;
            } else {
                fs::remove_file(path)?;
            }
        }
        for name in leakcheck::names(&self.places.netns_dir) {
            fs::remove_file(self.places.netns_dir.join(name))?;
        }
        Ok(())
    }

    /// Kills every process, and undoes every mount and cgroup but the fixture's own.
    fn end_everything(&mut self) -> io::Result<()> {
        self.kill()?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = self.places.processes();
            if left.is_empty() {
                break;
            }
            if Instant::now() >= deadline {
                return Err(io::Error::other(format!(
                    "processes outlive SIGKILL: {left:?}"
                )));
            }
            for process in left {
                // One that has ended by now is what is wanted.
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let own = [self.netns.path(), &self.places.state, &self.places.root];
        for point in self.places.mounts().iter().rev() {
            if !own.contains(&point.as_path()) && self.disk.as_ref() != Some(point) {
                umount2(point, MntFlags::MNT_DETACH)?;
            }
        }
        leakcheck::remove_cgroups(&self.places)
    }

    /// Ends and removes everything, whatever state it is in.
    fn clean_up(&mut self) -> io::Result<()> {
        self.end_everything()?;
        if self.places.cgroup.ends_with(".slice") && Path::new("/run/systemd/system").is_dir() {
            // Removed by now, but not forgotten; with it go those below.
            let mut systemctl = Command::new("systemctl");
            systemctl.args(["stop", &self.places.cgroup]).status()?;
        }
        for point in self.places.mounts().iter().rev() {
            if point != self.netns.path() && self.disk.as_ref() != Some(point) {
                umount2(point, MntFlags::MNT_DETACH)?;
            }
        }
        fs::remove_dir(&self.places.state)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show();
        }
        if let Err(error) = self.clean_up() {
            println!("clean-up of {}: {error}", self.dir.path().display());
        }
    }
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// `gantry-test-` and eight hexadecimal digits that no other fixture on this machine has: what its
/// cgroup and its directory below /run are named for.
fn fresh_name() -> String {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed) + 1;
    format!(
        "gantry-test-{:06x}{:02x}",
        std::process::id() & 0xff_ffff,
        number & 0xff
    )
}

fn tmpfs(path: &Path, bytes: u64) -> io::Result<()> {
    let options = format!("mode=711,size={bytes}");
    Ok(mount(
        Some("tmpfs"),
        path,
        Some("tmpfs"),
        MsFlags::empty(),
        Some(options.as_str()),
    )?)
}
