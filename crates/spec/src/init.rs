//! An init as first process, for those who ask: it reaps what others leave behind, forwards
//! signals to the command and ends with it.

use std::path::Path;

use crate::Error;
use crate::container::{Draft, Input};

/// Annotation of the container, or of its pod for all of its containers: `true` or `false`.
pub const ANNOTATION: &str = "gantry.io/init";

/// Where the container sees it. In /dev, which is the container's own tmpfs, nothing is left in
/// the root.
pub const PLACE: &str = "/dev/gantry-init";

/// Step: the init goes before the command.
pub(crate) fn init(input: &Input<'_>, draft: &mut Draft) -> Result<(), Error> {
    if !asked(input)? {
        return Ok(());
    }
    let field = format!("annotations[{ANNOTATION}]");
    let dev = |mount: &oci_spec::runtime::Mount| {
        mount.destination() == Path::new("/dev") && mount.typ().as_deref() != Some("tmpfs")
    };
    if draft.mounts.iter().any(dev) {
        // The place would be made on the host.
        return Err(Error::invalid(field, "goes not with a mount at /dev"));
    }
    let options = ["bind", "rprivate", "ro", "nosuid", "nodev"];
    let mount = crate::mounts::bind(PLACE.into(), &input.resolved.init, &options);
    draft.mounts.push(mount);
    let mut args = vec![PLACE.to_owned()];
    args.extend(draft.process.args().iter().flatten().cloned());
    draft.process.set_args(Some(args));
    Ok(())
}

fn asked(input: &Input<'_>) -> Result<bool, Error> {
    let annotations = [&input.config.annotations, &input.sandbox.annotations];
    let value = annotations.iter().find_map(|set| set.get(ANNOTATION));
    match value.map(String::as_str) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(Error::invalid(
            format!("annotations[{ANNOTATION}]"),
            format!("{other:?} is neither true nor false"),
        )),
    }
}
