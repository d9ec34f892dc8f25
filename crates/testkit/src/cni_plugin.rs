//! A CNI plugin that fails, hangs or dies on request and is the bridge plugin otherwise.

use std::io;
use std::path::Path;

use serde_json::{Value, json};

use crate::faults::{Faults, write_script};

/// `type` in a network configuration, and file name.
pub const NAME: &str = "faulty-bridge";

/// Writes the plugin into directory `bin`; its switches lie in `dir`, by CNI command (`ADD`,
/// `DEL`, `CHECK`). `real` is the bridge plugin.
pub fn write(bin: &Path, dir: &Path, real: &Path) -> io::Result<Faults> {
    let faults = Faults::new(dir)?;
    let script = SCRIPT
        .replace("@DIR@", &dir.to_string_lossy())
        .replace("@REAL@", &real.to_string_lossy());
    write_script(&bin.join(NAME), &script)?;
    Ok(faults)
}

/// A network list of this plugin and portmap.
pub fn conflist(name: &str, bridge: &str, subnet: &str, data_dir: &Path) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": name,
        "plugins": [
            {
                "type": NAME,
                "bridge": bridge,
                "isGateway": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": data_dir,
                    "ranges": [[{ "subnet": subnet }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
}

const SCRIPT: &str = r#"#!/bin/sh
echo "$CNI_COMMAND" >>'@DIR@/calls'
fail() {
    printf '{"cniVersion":"1.0.0","code":100,"msg":"%s %s"}\n' "$CNI_COMMAND" "$1"
    exit 1
}
if [ -e "@DIR@/fail-$CNI_COMMAND" ]; then fail "fails on request"; fi
if [ -e "@DIR@/hang-$CNI_COMMAND" ]; then exec sleep 1000; fi
if [ -e "@DIR@/die-$CNI_COMMAND" ]; then kill -9 $$; fi
if [ -e "@DIR@/fail-after-$CNI_COMMAND" ]; then
    @REAL@ >/dev/null
    fail "fails on request after its work"
fi
exec @REAL@
"#;
