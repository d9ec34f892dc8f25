//! On SIGUSR1: what is under way, into a file and, where something is stuck, into the log.
//!
//! The signal is waited for by a thread of its own, so that it is heard when no worker of the async
//! runtime answers. It is caught and not blocked: a mask would be inherited by plugins, shims and
//! containers. Threads come first in the file, since their states need none of our locks; then
//! everything that [`State`] reads, which asks no driver, shim, plugin or disk.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use gantry_cri::State;
use gantry_sys::process::Stat;
use serde_json::Value;
use signal_hook::consts::SIGUSR1;
use signal_hook::iterator::Signals;

/// Dumps that are kept; the oldest goes for the next.
const KEPT: usize = 8;

/// Longest dump. A node with a thousand busy pods has less.
const LONGEST: usize = 4 << 20;

/// Stuck things that get a line of the log.
const LOGGED: usize = 20;

/// What the thread is to look at, once there is something.
#[derive(Clone, Default)]
pub struct Dump(Arc<OnceLock<State>>);

impl Dump {
    /// Begins to listen. `dir` is made for the first dump.
    pub fn listen(dir: PathBuf) -> io::Result<Self> {
        let dump = Self::default();
        let mut signals = Signals::new([SIGUSR1])?;
        let slot = Arc::clone(&dump.0);
        std::thread::Builder::new()
            .name("dump".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                for _ in signals.forever() {
                    match write(&dir, slot.get()) {
                        Ok(path) => {
                            tracing::warn!(path = %path.display(), "SIGUSR1: dump written");
                        }
                        Err(error) => {
                            let path = dir.display();
                            tracing::error!(%path, %error, "SIGUSR1: dump not written");
                        }
                    }
                }
            })?;
        Ok(dump)
    }

    pub fn look_at(&self, state: State) {
        // There is one for the life of the daemon.
        let _ = self.0.set(state);
    }
}

fn write(dir: &Path, state: Option<&State>) -> io::Result<PathBuf> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(dir)?;
    make_room(dir)?;
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = since.unwrap_or_default().as_nanos();
    let path = dir.join(format!("dump-{now:020}.txt"));
    let mut file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    file.write_all(threads()?.as_bytes())?;
    let Some(state) = state else {
        file.write_all(b"\ngantryd is starting: it knows of no pods yet\n")?;
        return Ok(path);
    };
    let state = state.read();
    let mut shown = render(&state);
    if shown.len() > LONGEST {
        let end = shown.floor_char_boundary(LONGEST);
        shown.truncate(end);
        shown.push_str("\n(cut off)\n");
    }
    file.write_all(shown.as_bytes())?;
    // The log may be what hangs: a pipe that nobody reads.
    for stuck in entries(&state, "stuck").take(LOGGED) {
        tracing::warn!(stuck = text(stuck), "SIGUSR1");
    }
    Ok(path)
}

/// The names begin with the time, in digits of one length.
fn make_room(dir: &Path) -> io::Result<()> {
    let entries = std::fs::read_dir(dir)?;
    let mut dumps: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("dump-"))
        })
        .collect();
    dumps.sort();
    let over = (dumps.len() + 1).saturating_sub(KEPT);
    dumps.iter().take(over).try_for_each(std::fs::remove_file)
}

/// Our threads as the kernel has them: D is one that waits for a disk (proc_pid_stat(5)).
fn threads() -> io::Result<String> {
    let mut text = format!(
        "gantryd {} pid {}\n\nTHREADS\n",
        env!("CARGO_PKG_VERSION"),
        std::process::id()
    );
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        let read = |name: &str| std::fs::read_to_string(task.join(name)).unwrap_or_default();
        let id = task.file_name().unwrap_or_default().to_string_lossy();
        let stat = id.parse().ok().and_then(|id| Stat::read(id).ok());
        // Without one it has ended since it was listed.
        let state = stat.map_or('?', |thread| thread.state.into());
        let (comm, wait) = (read("comm"), read("wchan"));
        let name = printable(comm.trim_end());
        // Formatting into memory cannot fail.
        let _ = writeln!(text, "  {id} {state} {name} {}", printable(&wait));
    }
    Ok(text)
}

fn entries<'a>(state: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    state[key].as_array().into_iter().flatten()
}

/// A string as it is, anything else as JSON; on one line.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => printable(text),
        other => printable(&other.to_string()),
    }
}

/// Names are what clients say they are.
fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(shown).collect()
}

/// A section for each list, a line for each entry, and before them what is no list.
fn render(state: &Value) -> String {
    let mut out = String::from("\nDAEMON\n");
    let fields = || state.as_object().into_iter().flatten();
    for (key, value) in fields().filter(|(_, value)| !value.is_array()) {
        let _ = writeln!(out, "  {key}: {}", text(value));
    }
    for (key, value) in fields() {
        let Some(list) = value.as_array() else {
            continue;
        };
        let _ = writeln!(out, "\n{}", key.to_uppercase());
        for entry in list {
            let line = match entry.as_object() {
                None => text(entry),
                Some(fields) => {
                    let empty = |value: &Value| {
                        matches!(value, Value::String(text) if text.is_empty())
                            || matches!(value, Value::Array(list) if list.is_empty())
                            || value.is_null()
                    };
                    let fields = fields.iter().filter(|(_, value)| !empty(value));
                    let fields: Vec<_> = fields
                        .map(|(key, value)| format!("{key}={}", text(value)))
                        .collect();
                    fields.join(" ")
                }
            };
            let _ = writeln!(out, "  {line}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_dump_is_private_readable_and_one_of_few() {
        let dir = tempfile::tempdir().unwrap();
        let dumps = dir.path().join("dumps");
        let mut paths: Vec<_> = (0..KEPT + 3)
            .map(|_| write(&dumps, None).unwrap())
            .collect();
        let last = paths.pop().unwrap();
        let text = std::fs::read_to_string(&last).unwrap();
        assert!(
            text.contains("THREADS") && text.contains("is starting"),
            "{text}"
        );
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&last), mode(&dumps)), (0o600, 0o700));
        assert_eq!(std::fs::read_dir(&dumps).unwrap().count(), KEPT);
        assert!(!paths[0].exists() && paths.last().unwrap().exists());
    }

    #[test]
    fn names_cannot_forge_lines() {
        let state = json!({
            "version": "1",
            "steps": [{ "step": "network ADD", "pod": "a\nSTUCK", "container": "" }],
        });
        let text = render(&state);
        assert!(text.contains("\nSTEPS\n  "), "{text}");
        assert!(
            text.contains("pod=a\u{fffd}STUCK") && !text.contains("container"),
            "{text}"
        );
    }
}
