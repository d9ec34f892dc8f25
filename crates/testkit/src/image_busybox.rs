//! A small real image: static busybox with its applets and the files that a user look-up reads.

use std::io;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::image::{Compression, Image, ImageBuilder, Layer, Types};

/// Where Debian's busybox-static puts it.
const BUSYBOX: &str = "/bin/busybox";

const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
    daemon:x:1:1:daemon:/usr/sbin:/bin/false\n\
    www-data:x:33:33:www-data:/var/www:/bin/false\n\
    default-user:x:1000:1000::/home:/bin/sh\n\
    nobody:x:65534:65534:nobody:/home:/bin/false\n";
const GROUP: &[u8] = b"root:x:0:\n\
    daemon:x:1:\n\
    www-data:x:33:\n\
    default-group:x:1000:\n\
    group-defined-in-image:x:50000:default-user\n\
    nogroup:x:65534:\n";

/// The image of the host's `/bin/busybox`, which must be static. `/bin/NAME` is a link to it for
/// every applet that it says it has.
pub fn busybox() -> io::Result<Image> {
    busybox_from(Path::new(BUSYBOX))
}

/// As [`busybox`], from another binary.
pub fn busybox_from(binary: &Path) -> io::Result<Image> {
    let about = |e: io::Error| {
        io::Error::new(
            e.kind(),
            format!("{} (package busybox-static): {e}", binary.display()),
        )
    };
    let program = std::fs::read(binary).map_err(about)?;
    let list = Command::new(binary).arg("--list").output().map_err(about)?;
    let mut layer = Layer::new().dir("./", 0o755);
    for (dir, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("lib", 0o755),
        ("proc", 0o555),
        ("root", 0o700),
        ("sys", 0o555),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("usr/sbin", 0o755),
        ("sbin", 0o755),
        ("var", 0o755),
        ("var/www", 0o755),
    ] {
        layer = layer.dir(dir, mode);
    }
    layer = layer
        .file_mode("bin/busybox", &program, 0o755)
        .file("etc/passwd", PASSWD)
        .file("etc/group", GROUP)
        .file_mode("etc/shadow", b"root:*:::::::\n", 0o600)
        .file("etc/nsswitch.conf", b"hosts: files dns\n")
        .symlink("usr/bin/env", "/bin/busybox");
    for applet in String::from_utf8_lossy(&list.stdout).lines() {
        let fit = !applet.is_empty() && applet != "busybox" && !applet.contains('/');
        if fit {
            layer = layer.hardlink(&format!("bin/{applet}"), "bin/busybox");
        }
    }
    Ok(ImageBuilder::new()
        .types(Types::Docker)
        .layer(layer, Compression::Plain)
        .config(
            "Env",
            json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]),
        )
        .cmd(["sh"])
        .build())
}
