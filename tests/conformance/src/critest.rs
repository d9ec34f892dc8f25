//! Running critest.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use gantry_testkit::daemon::Daemon;

/// The image that critest pulls by the digest that it has built in.
const PINNED: &[u8] = b"k8s-staging-cri-tools/test-image-digest@sha256:";

/// When ginkgo gives up, and how long it may take for that.
const LIMIT: Duration = Duration::from_secs(600);
const GRACE: Duration = Duration::from_secs(60);

/// How critest runs its specs: one after the other, or the ones that allow it in so many
/// processes. `1` and `4`, for `parallel=4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    pub processes: u16,
}

impl Mode {
    /// critest takes even `-parallel=1` for a wish to run in parallel, and refuses it.
    fn argument(self) -> Option<String> {
        (self.processes > 1).then(|| format!("-parallel={}", self.processes))
    }
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(processes) if processes > 0 => Ok(Self { processes }),
            _ => Err(format!("{text:?} is not a number of processes")),
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.processes {
            1 => f.write_str("serial"),
            n => write!(f, "parallel, {n} processes"),
        }
    }
}

/// Copies critest to `into` with another digest in the place of the built-in one: that image
/// cannot be made again, so the local registry has one of its own under the name.
pub fn pin(critest: &Path, digest: &str, into: &Path) -> Result<()> {
    let mut program = std::fs::read(critest).with_context(|| critest.display().to_string())?;
    let hex = digest.trim_start_matches("sha256:").as_bytes();
    let places: Vec<usize> = memchr::memmem::find_iter(&program, PINNED)
        .map(|at| at + PINNED.len())
        .filter(|at| {
            let old = program.get(*at..at + hex.len());
            old.is_some_and(|old| old.iter().all(u8::is_ascii_hexdigit))
        })
        .collect();
    ensure!(
        !places.is_empty(),
        "{}: no image is pinned in it",
        critest.display()
    );
    for at in places {
        program[at..at + hex.len()].copy_from_slice(hex);
    }
    std::fs::write(into, program)?;
    std::fs::set_permissions(into, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// One run.
pub struct Run<'a> {
    pub critest: &'a Path,
    pub mode: Mode,
    /// Of specs that are not to run.
    pub skip: Vec<String>,
    pub arguments: &'a [String],
    /// For its output and its report.
    pub dir: &'a Path,
}

impl Run<'_> {
    /// Runs critest against `daemon`, in its network namespace; returns the path of the report.
    /// That specs failed is for the report to say.
    pub fn run(&self, daemon: &Daemon) -> Result<PathBuf> {
        let report = self.dir.join("report.json");
        let log = File::create(self.dir.join("critest.log"))?;
        // Its own files: what it mounts there is found if it stays.
        let work = tempfile::Builder::new()
            .prefix("work-")
            .tempdir_in(daemon.path("."))?;
        // Nobody's configuration, and no word about its absence.
        let config = work.path().join("crictl.yaml");
        File::create(&config)?;
        let endpoint = format!("unix://{}", daemon.socket().display());
        let mut command = Command::new("timeout");
        command
            .arg(format!("--kill-after={}", GRACE.as_secs()))
            .arg((LIMIT + GRACE).as_secs().to_string())
            .arg(self.critest)
            .arg(format!("-runtime-endpoint={endpoint}"))
            .arg(format!("-image-endpoint={endpoint}"))
            .arg(format!("-config={}", config.display()))
            .arg("-ginkgo.no-color")
            .arg(format!("-ginkgo.timeout={}s", LIMIT.as_secs()))
            .arg(format!("-ginkgo.json-report={}", report.display()))
            .args(self.mode.argument())
            .args(self.skip.iter().map(|skip| format!("-ginkgo.skip={skip}")))
            .args(self.arguments)
            .env("TMPDIR", work.path())
            .current_dir(work.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // A report of an earlier run is not one of this.
        match std::fs::remove_file(&report) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let status = daemon.netns().run(|| command.status())??;
        ensure!(
            report.is_file(),
            "critest wrote no report: {status}; see {}",
            self.dir.join("critest.log").display()
        );
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pinned_digest_is_replaced_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let image = String::from_utf8(PINNED.to_vec()).unwrap();
        let (old, new) = ("ab".repeat(32), "cd".repeat(32));
        let text = |digest: &str| format!("\0gcr.io/{image}{digest}gcr.io/other {image}short");
        std::fs::write(&from, text(&old)).unwrap();
        pin(&from, &format!("sha256:{new}"), &to).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), text(&new));
        std::fs::write(&from, "nothing").unwrap();
        assert!(pin(&from, &new, &to).is_err());
    }

    #[test]
    fn a_mode_is_a_number_of_processes() {
        assert_eq!(
            "4".parse::<Mode>().unwrap().to_string(),
            "parallel, 4 processes"
        );
        let serial: Mode = "1".parse().unwrap();
        assert_eq!(
            (serial.to_string().as_str(), serial.argument()),
            ("serial", None)
        );
        assert!("0".parse::<Mode>().is_err() && "x".parse::<Mode>().is_err());
    }
}
