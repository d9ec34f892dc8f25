//! An OCI runtime that fails, hangs or dies on request and is the real one otherwise.

use std::io;
use std::path::Path;

use crate::faults::{Faults, write_script};

/// Writes the script to `path`; its switches lie in `dir`, by the runtime's command (`create`,
/// `start`, `exec`, `kill`, `delete`, `update`). `real` is the path or name of what does the work.
pub fn write(path: &Path, dir: &Path, real: &str) -> io::Result<Faults> {
    let faults = Faults::new(dir)?;
    let script = SCRIPT
        .replace("@DIR@", &dir.to_string_lossy())
        .replace("@REAL@", real);
    write_script(path, &script)?;
    Ok(faults)
}

const SCRIPT: &str = r#"#!/bin/sh
# The command is the first word that is neither an option nor an option's value.
command= log= next=
for word; do
    case $next in
        log) log=$word next= ; continue ;;
        skip) next= ; continue ;;
    esac
    case $word in
        --log) next=log ;;
        --root | --log-format) next=skip ;;
        -*) ;;
        *) command=$word; break ;;
    esac
done
echo "$command" >>'@DIR@/calls'
say() {
    echo "$1" >&2
    [ -z "$log" ] || printf '{"level":"error","msg":"%s","time":"2024-01-01T00:00:00Z"}\n' "$1" >>"$log"
}
if [ -n "$command" ]; then
    if [ -e "@DIR@/fail-$command" ]; then say "$command fails on request"; exit 1; fi
    if [ -e "@DIR@/hang-$command" ]; then exec sleep 1000; fi
    if [ -e "@DIR@/die-$command" ]; then kill -9 $$; fi
    if [ -e "@DIR@/fail-after-$command" ]; then
        @REAL@ "$@" </dev/null
        say "$command fails on request after its work"
        exit 1
    fi
fi
exec @REAL@ "$@"
"#;
