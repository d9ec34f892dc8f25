//! Runs a plugin: environment, configuration on stdin, answer on stdout (CNI spec, section 2).
//!
//! A plugin is a process group of its own. It is killed as a group when its time is over and when
//! the caller loses interest, so that nothing it started outlives the call.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::error::Error;
use crate::leftovers::{self, Noted};

/// Largest answer that is read.
const MAX_STDOUT: usize = 1 << 20;
/// What is kept of stderr, for errors that say nothing on stdout.
const MAX_STDERR: usize = 16 << 10;
/// Longest text of a plugin that goes into an error.
const MAX_MESSAGE: usize = 4 << 10;
/// How long the pipes may stay open after the plugin has ended: a child of it may hold them.
const DRAIN: Duration = Duration::from_secs(1);
/// Plugins call iptables and its like by name.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// One call of one plugin.
pub struct Call<'a> {
    pub network: &'a str,
    /// Name of the executable; checked to be a file name.
    pub plugin: &'a str,
    pub command: &'static str,
    /// Where the call is noted for the next daemon, should this one be killed ([`leftovers`]).
    pub calls_dir: &'a Path,
    /// `CNI_*` beyond command and path.
    pub env: &'a [(&'static str, OsString)],
    pub stdin: Vec<u8>,
}

impl Call<'_> {
    fn io(&self, source: std::io::Error) -> Error {
        Error::Exec {
            network: self.network.into(),
            plugin: self.plugin.into(),
            command: self.command,
            source,
        }
    }

    fn failed(&self, code: Option<u64>, message: String) -> Error {
        Error::Failed {
            network: self.network.into(),
            plugin: self.plugin.into(),
            command: self.command,
            code,
            message,
        }
    }

    pub fn bad_result(&self, reason: String) -> Error {
        Error::Result {
            network: self.network.into(),
            plugin: self.plugin.into(),
            command: self.command,
            reason,
        }
    }
}

/// Executes a plugin and returns what it wrote to stdout.
///
/// # Errors
/// [`Error::Failed`] with the plugin's own words when it does not exit with zero, [`Error::Hung`]
/// after `limit`, others when it could not be run or answered beyond all bounds.
pub async fn run(bin_dirs: &[PathBuf], limit: Duration, call: Call<'_>) -> Result<Vec<u8>, Error> {
    let path = find(bin_dirs, &call)?;
    let noted = Noted::new(call.calls_dir);
    let mut child = spawn(&path, bin_dirs, &call, noted.as_ref()).await?;
    // From here on every way out kills the group, until the child has ended in good order.
    let mut group = Group::of(&child);
    let Some(pid) = group.leader else {
        return Err(call.io(std::io::ErrorKind::NotFound.into()));
    };

    let (mut stdout, mut stderr) = (Capped::new(MAX_STDOUT), Capped::new(MAX_STDERR));
    {
        let io = async {
            tokio::join!(
                feed(child.stdin.take(), &call.stdin),
                drain(child.stdout.take(), &mut stdout),
                drain(child.stderr.take(), &mut stderr),
            )
        };
        let mut io = pin!(io);
        let mut ended = pin!(tokio::task::spawn_blocking(move || until_ended(pid)));
        let finish = async {
            let ended = tokio::select! {
                ended = &mut ended => {
                    // Whoever still holds the pipes is not waited for.
                    if tokio::time::timeout(DRAIN, &mut io).await.is_err() {
                        group.kill();
                    }
                    ended
                }
                _ = &mut io => (&mut ended).await,
            };
            ended.map_err(std::io::Error::other).flatten()
        };
        match tokio::time::timeout(limit, finish).await {
            Ok(ended) => ended.map_err(|error| call.io(error))?,
            Err(_) => {
                return Err(Error::Hung {
                    network: call.network.into(),
                    plugin: call.plugin.into(),
                    command: call.command,
                    limit,
                });
            }
        }
    }
    // Once reaped, the number may belong to others.
    group.leader = None;
    let status = child.wait().await.map_err(|error| call.io(error))?;
    if !status.success() {
        let (code, message) = explain(&stdout.kept, &stderr.kept, status);
        return Err(call.failed(code, message));
    }
    if stdout.overflowed {
        return Err(call.bad_result(format!("longer than {MAX_STDOUT} bytes")));
    }
    Ok(stdout.kept)
}

/// The executable in the first directory that has it.
fn find(bin_dirs: &[PathBuf], call: &Call<'_>) -> Result<PathBuf, Error> {
    let candidates = bin_dirs.iter().map(|dir| dir.join(call.plugin));
    candidates
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| Error::NotInstalled {
            network: call.network.into(),
            plugin: call.plugin.into(),
            dirs: bin_dirs.to_vec(),
        })
}

async fn spawn(
    path: &Path,
    bin_dirs: &[PathBuf],
    call: &Call<'_>,
    noted: Option<&Noted>,
) -> Result<Child, Error> {
    let dirs: Vec<&[u8]> = bin_dirs
        .iter()
        .map(|dir| dir.as_os_str().as_bytes())
        .collect();
    let mut command = Command::new(path);
    command
        .env_clear()
        .env("PATH", PATH)
        .envs(noted.map(|noted| (leftovers::CALL, noted.path())))
        .env("CNI_COMMAND", call.command)
        .env("CNI_PATH", OsStr::from_bytes(&dirs.join(&b':')))
        .envs(call.env.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    for _ in 0..20 {
        match command.spawn() {
            // The file is being replaced, or a fork elsewhere still holds it open for writing.
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            other => return other.map_err(|error| call.io(error)),
        }
    }
    command.spawn().map_err(|error| call.io(error))
}

/// Kills the plugin's process group when dropped, as long as `leader` holds its number.
struct Group {
    leader: Option<Pid>,
}

impl Group {
    fn of(child: &Child) -> Self {
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        Self {
            leader: pid.map(Pid::from_raw),
        }
    }

    fn kill(&self) {
        if let Some(leader) = self.leader {
            // ESRCH: all of them have ended already, which is what is wanted.
            let _ = killpg(leader, Signal::SIGKILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Blocks until the process has ended and leaves it unreaped, so that its number, which is also
/// the group's, stays taken.
fn until_ended(pid: Pid) -> std::io::Result<()> {
    loop {
        match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

async fn feed(stdin: Option<tokio::process::ChildStdin>, config: &[u8]) {
    if let Some(mut stdin) = stdin {
        // A plugin that does not read it says so by its exit status; EPIPE adds nothing.
        let _ = stdin.write_all(config).await;
    }
}

/// Bytes up to a bound; what is more is read and dropped, so that the writer is not blocked.
struct Capped {
    kept: Vec<u8>,
    limit: usize,
    overflowed: bool,
}

impl Capped {
    fn new(limit: usize) -> Self {
        Self {
            kept: Vec::new(),
            limit,
            overflowed: false,
        }
    }
}

async fn drain(pipe: Option<impl AsyncRead + Unpin>, into: &mut Capped) {
    let Some(mut pipe) = pipe else { return };
    let mut buffer = [0; 4096];
    // A read error ends the answer; what is missing shows when it is parsed.
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        let room = into.limit - into.kept.len();
        into.kept.extend_from_slice(&buffer[..count.min(room)]);
        into.overflowed |= count > room;
    }
}

/// The error object of a plugin.
#[derive(Deserialize)]
struct Failure {
    #[serde(default)]
    code: Option<u64>,
    msg: String,
    #[serde(default)]
    details: String,
}

/// Why a plugin failed, in its own words where it has any.
fn explain(
    stdout: &[u8],
    stderr: &[u8],
    status: std::process::ExitStatus,
) -> (Option<u64>, String) {
    if let Ok(failure) = serde_json::from_slice::<Failure>(stdout) {
        let mut message = failure.msg;
        if !failure.details.is_empty() {
            message = format!("{message}; {}", failure.details);
        }
        return (failure.code, shorten(&message));
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let said = [text(stderr), text(stdout)]
        .into_iter()
        .find(|text| !text.is_empty());
    let said = said.unwrap_or_else(|| "it said nothing".into());
    (None, format!("{status}: {}", shorten(&said)))
}

fn shorten(text: &str) -> String {
    text.chars().take(MAX_MESSAGE).collect()
}
