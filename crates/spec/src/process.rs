//! The process object: what is run, as whom, with what around it.

use std::collections::HashMap;
use std::path::Path;

use oci_spec::runtime::{LinuxCapabilities, Process, User};

use crate::Error;
use crate::container::{Draft, Input};
use crate::path;

/// Where commands are looked up when neither image nor pod sets PATH.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Arguments and environment together, in bytes: execve(2) takes no more than three quarters of
/// the 8 MiB stack limit, so that more can only waste memory on its way to an error.
const MAX_EXEC_BYTES: usize = 6 << 20;

/// Step: CRI's command stands for the image's ENTRYPOINT and drops its CMD; args alone stand for
/// the CMD.
pub(crate) fn args(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let (config, image) = (input.config, &input.resolved.image);
    let mut args = config.command.clone();
    if args.is_empty() && image.entrypoint != [""] {
        // An ENTRYPOINT of one empty string is Docker's way to reset an inherited one.
        args.clone_from(&image.entrypoint);
    }
    if config.command.is_empty() && config.args.is_empty() {
        args.extend_from_slice(&image.cmd);
    } else {
        args.extend_from_slice(&config.args);
    }
    if args.is_empty() {
        return Err(Error::invalid(
            "command",
            "neither the request nor the image names a command",
        ));
    }
    check_args("command", &args)?;
    draft.process.set_args(Some(args));
    Ok(())
}

/// Step: image first, then what every container gets, then CRI; the later of two with one name
/// wins and takes the place of the earlier.
pub(crate) fn env(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let mut env = Env::default();
    env.set(DEFAULT_PATH.to_owned());
    for variable in &input.resolved.image.env {
        if variable.contains('\0') {
            return Err(Error::invalid(
                "image config Env",
                "a variable has a NUL byte",
            ));
        }
        // Without `=` it sets nothing; images in the wild have such.
        if variable.find('=').is_some_and(|at| at > 0) {
            env.set(variable.clone());
        }
    }
    if input.config.tty {
        env.set("TERM=xterm".into());
    }
    env.set(format!("HOSTNAME={}", input.resolved.hostname));
    for variable in &input.config.envs {
        env.set(cri_variable(variable)?);
    }
    if env.bytes > MAX_EXEC_BYTES {
        return Err(Error::invalid(
            "envs",
            format!("more than {MAX_EXEC_BYTES} bytes"),
        ));
    }
    draft.process.set_env(Some(env.list));
    Ok(())
}

fn cri_variable(variable: &gantry_cri_api::v1::KeyValue) -> Result<String, Error> {
    let field = || {
        format!(
            "envs[{}]",
            variable.key.chars().take(80).collect::<String>()
        )
    };
    if variable.key.is_empty() || variable.key.contains(['=', '\0']) {
        return Err(Error::invalid(field(), "is not the name of a variable"));
    }
    // The runtime spec is JSON, which has no bytes beyond UTF-8.
    let value = std::str::from_utf8(&variable.value)
        .map_err(|_| Error::invalid(field(), "value is not UTF-8"))?;
    if value.contains('\0') {
        return Err(Error::invalid(field(), "value has a NUL byte"));
    }
    Ok(format!("{}={value}", variable.key))
}

/// An environment under construction.
#[derive(Default)]
struct Env {
    list: Vec<String>,
    places: HashMap<String, usize>,
    bytes: usize,
}

impl Env {
    /// `variable` is `NAME=value`.
    fn set(&mut self, variable: String) {
        let name = variable.split('=').next().unwrap_or_default().to_owned();
        self.bytes += variable.len() + 1;
        match self.places.get(&name) {
            Some(&place) => {
                self.bytes -= self.list[place].len() + 1;
                self.list[place] = variable;
            }
            None => {
                self.places.insert(name, self.list.len());
                self.list.push(variable);
            }
        }
    }
}

/// Step: CRI's, else the image's, else the root.
pub(crate) fn cwd(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let image = &input.resolved.image.working_dir;
    let (field, text) = if input.config.working_dir.is_empty() {
        ("image config WorkingDir", image)
    } else {
        ("working_dir", &input.config.working_dir)
    };
    // Images also write relative ones, meant from the root.
    let cwd = path::clean(&Path::new("/").join(text))
        .ok_or_else(|| Error::invalid(field, format!("{text:?} is no path")))?;
    if path::is_open_file(&cwd) {
        return Err(Error::invalid(
            field,
            format!("{text:?} is an open file of a process"),
        ));
    }
    draft.process.set_cwd(cwd);
    Ok(())
}

/// Step.
pub(crate) fn user(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let resolved = &input.resolved.user;
    let mut user = User::default();
    user.set_uid(resolved.uid)
        .set_gid(resolved.gid)
        .set_additional_gids(Some(resolved.additional_gids.clone()));
    draft.process.set_user(user);
    Ok(())
}

/// Step.
pub(crate) fn terminal(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    draft.process.set_terminal(Some(input.config.tty));
    Ok(())
}

/// Step: OOM score and rlimits. The score is always set: the runtime's own is that of the shim,
/// which no container may inherit.
pub(crate) fn limits(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    let linux = input.config.linux.as_ref();
    let asked = linux
        .and_then(|linux| linux.resources.as_ref())
        .map_or(0, |it| it.oom_score_adj);
    let score = i32::try_from(asked)
        .ok()
        .filter(|score| (-1000..=1000).contains(score));
    let score = score.ok_or_else(|| {
        Error::invalid(
            "linux.resources.oom_score_adj",
            format!("{asked} is not within -1000 to 1000"),
        )
    })?;
    draft
        .process
        .set_oom_score_adj(Some(score.max(input.resolved.oom_score_adj_floor)));
    let rlimits = &input.resolved.rlimits;
    draft
        .process
        .set_rlimits((!rlimits.is_empty()).then(|| rlimits.clone()));
    Ok(())
}

/// The process of an Exec or ExecSync: the container's own with another command. User,
/// environment, capabilities, rlimits and no_new_privileges stay; inheritable and ambient
/// capabilities are empty (CVE-2022-24769).
///
/// # Errors
/// InvalidArgument for an empty command, one with a NUL byte, or one too long for execve(2).
pub fn exec(container: &Process, command: &[String], terminal: bool) -> Result<Process, Error> {
    if command.is_empty() {
        return Err(Error::invalid("cmd", "is empty"));
    }
    check_args("cmd", command)?;

    let mut process = container.clone();
    process
        .set_args(Some(command.to_vec()))
        .set_terminal(Some(terminal))
        .set_console_size(None);
    if terminal {
        let env = process.env_mut().get_or_insert_with(Vec::new);
        if !env.iter().any(|variable| variable.starts_with("TERM=")) {
            env.push("TERM=xterm".into());
        }
    }
    if let Some(sets) = process.capabilities() {
        let mut sets: LinuxCapabilities = sets.clone();
        sets.set_inheritable(Some(Default::default()))
            .set_ambient(Some(Default::default()));
        process.set_capabilities(Some(sets));
    }
    Ok(process)
}

fn check_args(field: &str, args: &[String]) -> Result<(), Error> {
    if args.iter().any(|arg| arg.contains('\0')) {
        return Err(Error::invalid(field, "an argument has a NUL byte"));
    }
    if args.iter().map(|arg| arg.len() + 1).sum::<usize>() > MAX_EXEC_BYTES {
        return Err(Error::invalid(
            field,
            format!("more than {MAX_EXEC_BYTES} bytes"),
        ));
    }
    Ok(())
}
