//! The images that critest pulls, made of Debian packages and served under critest's own names.
//!
//! critest can be told another name for two of its images only, and looks images up by the names
//! that it has built in: so the names stay, and the node under test has mirrors for their hosts.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use gantry_testkit::image::{Compression, Image, ImageBuilder, Layer, Types, index};
use gantry_testkit::registry::Registry;
use serde_json::json;

use crate::debian::Packages;

/// Hosts of critest's images: the node under test finds them in the local registry.
pub const HOSTS: [&str; 3] = ["registry.k8s.io", "gcr.io", "k8s.gcr.io"];

/// The Debian packages that the images are made of. Where one has changed its name between
/// releases, either will do.
pub const PACKAGES: [&[&str]; 7] = [
    &["busybox"],
    &["libc6"],
    &["nginx"],
    &["libcrypt1"],
    &["libpcre2-8-0"],
    &["zlib1g"],
    &["libssl3t64", "libssl3"],
];

const E2E: &str = "e2e-test-images";
const CRI_TOOLS: &str = "k8s-staging-cri-tools";

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    www-data:x:33:33:www-data:/var/www:/bin/false\n\
    nobody:x:65534:65534:nobody:/home:/bin/false\n";
const GROUP: &str = "root:x:0:\nwww-data:x:33:\nusers:x:100:\nnogroup:x:65534:\n";

/// For an image that is pulled from a multi-platform index: entries of other platforms hold
/// nothing that runs, so that a wrong choice shows.
const FOREIGN: [&str; 3] = ["amd64", "arm64", "s390x"];

/// What differs between machines.
struct Machine {
    /// As images name it.
    architecture: &'static str,
    /// As Debian's library directory is named.
    triplet: &'static str,
    loader: &'static str,
}

impl Machine {
    fn this() -> Result<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Ok(Self {
                architecture: "amd64",
                triplet: "x86_64-linux-gnu",
                loader: "lib64/ld-linux-x86-64.so.2",
            }),
            "aarch64" => Ok(Self {
                architecture: "arm64",
                triplet: "aarch64-linux-gnu",
                loader: "lib/ld-linux-aarch64.so.1",
            }),
            other => anyhow::bail!("no images for {other}"),
        }
    }
}

/// Fills the registry; returns the digest of `test-image-digest`, which critest pulls by digest.
pub fn publish(registry: &Registry, packages: &Path) -> Result<String> {
    let mut kitchen = Kitchen {
        packages: Packages::new(packages),
        machine: Machine::this()?,
        registry,
    };
    let base = kitchen.base()?;
    let shell = |types| on(&base, types).cmd(["sh"]);
    let marked = |name: &str| {
        let layer = Layer::new().file(name, b"");
        shell(Types::Oci).layer(layer, Compression::Gzip).build()
    };

    kitchen.serve(E2E, "busybox:1.29-2", &shell(Types::Docker).build());
    let nginx = kitchen.nginx(&base)?;
    kitchen.serve(E2E, "nginx:1.14-2", &listening(&nginx, 80));
    // A manifest without an index, as this image has always been.
    let image = listening(&nginx, 12003);
    let name = format!("{CRI_TOOLS}/hostnet-nginx-{}", kitchen.machine.architecture);
    registry.add(&name, "latest", &image);
    kitchen.serve(E2E, "httpd:2.4.39-4", &httpd(&base));
    kitchen.serve(E2E, "nonewprivs:1.3", &nonewprivs(&base, packages)?);

    // One image under two hosts. Never run: a sandbox of ours needs none.
    let pause = ImageBuilder::new()
        .types(Types::Docker)
        .layer(
            Layer::new().file_mode("pause", b"", 0o755),
            Compression::Gzip,
        )
        .config("Entrypoint", json!(["/pause"]))
        .build();
    kitchen.serve("", "pause:3.9", &pause);

    for (suffix, user) in [
        ("uid", "1002"),
        ("username", "www-data"),
        ("uid-group", "1003:1004"),
        ("username-group", "www-data:1004"),
    ] {
        let image = shell(Types::Oci).user(user).build();
        let name = format!("test-image-user-{suffix}:latest");
        kitchen.serve(CRI_TOOLS, &name, &image);
    }
    kitchen.serve(
        CRI_TOOLS,
        "test-image-predefined-group:latest",
        &predefined_group(&base),
    );
    for name in ["1", "2", "3", "latest"] {
        let name = format!("test-image-{name}");
        kitchen.serve(CRI_TOOLS, &format!("{name}:latest"), &marked(&name));
    }
    for tag in ["test", "all"] {
        kitchen.serve(CRI_TOOLS, &format!("test-image-tag:{tag}"), &marked(tag));
    }
    for tag in ["1", "2", "3"] {
        let image = marked("one-image-of-three-tags");
        kitchen.serve(CRI_TOOLS, &format!("test-image-tags:{tag}"), &image);
    }
    let image = marked("test-image-digest");
    Ok(kitchen.serve(CRI_TOOLS, "test-image-digest:latest", &image))
}

fn on(base: &Image, types: Types) -> ImageBuilder {
    ImageBuilder::on(base)
        .types(types)
        .config("Env", json!([PATH]))
}

/// nginx on `port`.
fn listening(nginx: &Image, port: u16) -> Image {
    let config = format!(
        "user www-data;\nworker_processes 1;\npid /var/run/nginx.pid;\nerror_log /dev/stderr;\n\
         events {{ worker_connections 64; }}\n\
         http {{ access_log off; server {{ listen {port}; root /usr/share/nginx/html; }} }}\n"
    );
    let layer = Layer::new()
        .dir("etc/nginx", 0o755)
        .file("etc/nginx/nginx.conf", config.as_bytes());
    on(nginx, Types::Docker)
        .layer(layer, Compression::Gzip)
        .config("Entrypoint", json!(["nginx"]))
        .config("ExposedPorts", json!({"80/tcp": {}}))
        .config("StopSignal", json!("SIGQUIT"))
        .cmd(["-g", "daemon off;"])
        .build()
}

/// A web server that names itself in its log.
fn httpd(base: &Image) -> Image {
    let layer = Layer::new().dir("var/www", 0o755).file(
        "var/www/index.html",
        b"<html><body>It works!</body></html>\n",
    );
    let command = "echo 'httpd: serving on port 80'; exec httpd -f -p 80 -h /var/www";
    on(base, Types::Docker)
        .layer(layer, Compression::Gzip)
        .config("ExposedPorts", json!({"80/tcp": {}}))
        .cmd(["sh", "-c", command])
        .build()
}

/// Compiles what images need beside packages into the directory `into`, for a machine that has no
/// compiler.
pub fn compile(into: &Path) -> Result<()> {
    let source = into.join("nonewprivs.c");
    std::fs::write(&source, include_str!("../nonewprivs.c"))?;
    let status = Command::new("cc")
        .args(["-static", "-Os", "-s", "-o"])
        .args([&into.join(NNP), &source])
        .status()
        .context("run cc")?;
    ensure!(status.success(), "cc: {status}");
    Ok(())
}

const NNP: &str = "nnp";

/// A set-uid program: the one in `packages`, or compiled now.
fn nonewprivs(base: &Image, packages: &Path) -> Result<Image> {
    let dir = tempfile::tempdir()?;
    let mut program = packages.join(NNP);
    if !program.is_file() {
        compile(dir.path())?;
        program = dir.path().join(NNP);
    }
    let layer = Layer::new().file_mode("nnp", &std::fs::read(&program)?, 0o4755);
    Ok(on(base, Types::Oci)
        .layer(layer, Compression::Gzip)
        .config("Entrypoint", json!(["/nnp"]))
        .build())
}

/// A user who is in a group of the image.
fn predefined_group(base: &Image) -> Image {
    let passwd = format!("{PASSWD}default-user:x:1000:1000::/home:/bin/sh\n");
    let group =
        format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n");
    let layer = Layer::new()
        .file("etc/passwd", passwd.as_bytes())
        .file("etc/group", group.as_bytes());
    on(base, Types::Oci)
        .layer(layer, Compression::Gzip)
        .user("1000")
        .cmd(["sh"])
        .build()
}

struct Kitchen<'a> {
    packages: Packages,
    machine: Machine,
    registry: &'a Registry,
}

impl Kitchen<'_> {
    /// Serves an image under `NAME:TAG` within an index of several platforms; returns the digest
    /// that the name resolves to.
    fn serve(&self, namespace: &str, name: &str, image: &Image) -> String {
        let (name, tag) = name.split_once(':').unwrap_or((name, "latest"));
        let repository = match namespace {
            "" => name.to_owned(),
            _ => format!("{namespace}/{name}"),
        };
        let types = match image.manifest.media_type.contains("docker") {
            true => Types::Docker,
            false => Types::Oci,
        };
        let own = self.machine.architecture;
        let foreign: Vec<_> = FOREIGN
            .iter()
            .filter(|architecture| **architecture != own)
            .map(|architecture| {
                let layer = Layer::new().file("wrong-platform", architecture.as_bytes());
                let image = ImageBuilder::new()
                    .types(types)
                    .platform("linux", architecture, "")
                    .layer(layer, Compression::Gzip)
                    .build();
                (image, *architecture)
            })
            .collect();
        let mut entries = vec![(image, Some(("linux", own, "")))];
        entries.extend(
            foreign
                .iter()
                .map(|(image, architecture)| (image, Some(("linux", *architecture, "")))),
        );
        // The right one is not the first.
        entries.reverse();
        let top = index(&entries, types);
        for (image, _) in &entries {
            let digest = image.manifest.digest.to_string();
            self.registry.add(&repository, &digest, image);
        }
        self.registry.add_manifest(&repository, tag, &top);
        top.digest.to_string()
    }

    fn library(&mut self, layer: Layer, package: &[&str], name: &str) -> Result<Layer> {
        let triplet = self.machine.triplet;
        let paths = [
            format!("usr/lib/{triplet}/{name}"),
            format!("lib/{triplet}/{name}"),
        ];
        let data = self
            .packages
            .file(package, &paths.each_ref().map(String::as_str))?;
        Ok(layer.file_mode(&format!("lib/{triplet}/{name}"), &data, 0o755))
    }

    /// busybox with its libraries, users, and the two programs that critest calls and busybox
    /// lacks. The dynamic build: the shell of the static one runs its other programs within
    /// itself, so that what one of them opens was opened by the shell.
    fn base(&mut self) -> Result<Image> {
        let mut layer = Layer::new();
        let library_dir = format!("lib/{}", self.machine.triplet);
        for (dir, mode) in [
            ("bin", 0o755),
            ("dev", 0o755),
            ("etc", 0o755),
            ("home", 0o755),
            ("lib", 0o755),
            ("lib64", 0o755),
            (&library_dir, 0o755),
            ("mnt", 0o755),
            ("proc", 0o555),
            ("root", 0o700),
            ("run", 0o755),
            ("sys", 0o555),
            ("tmp", 0o1777),
            ("usr", 0o755),
            ("usr/bin", 0o755),
            ("usr/sbin", 0o755),
            ("var", 0o755),
            ("var/log", 0o755),
            ("var/run", 0o755),
            ("var/tmp", 0o1777),
        ] {
            layer = layer.dir(dir, mode);
        }
        let loader = self.machine.loader;
        let name = loader.rsplit('/').next().unwrap_or(loader);
        let paths = [
            format!("usr/lib/{}/{name}", self.machine.triplet),
            format!("lib/{}/{name}", self.machine.triplet),
        ];
        let paths = paths.each_ref().map(String::as_str);
        let data = self.packages.file(&["libc6"], &paths)?;
        layer = layer.file_mode(loader, &data, 0o755);
        for name in ["libc.so.6", "libresolv.so.2"] {
            layer = self.library(layer, &["libc6"], name)?;
        }
        let busybox = self
            .packages
            .file(&["busybox"], &["bin/busybox", "usr/bin/busybox"])?;
        layer = layer.file_mode("bin/busybox", &busybox, 0o755);
        for applet in applets(&busybox)? {
            layer = layer.hardlink(&format!("bin/{applet}"), "bin/busybox");
        }
        let layer = layer
            .file_mode(
                "bin/pgrep",
                b"#!/bin/sh\nfor p in $(pidof \"$1\"); do echo \"$p\"; done\n",
                0o755,
            )
            .file_mode(
                "bin/ipcs",
                b"#!/bin/sh\necho '------ Shared Memory Segments --------'\ncat /proc/sysvipc/shm\n",
                0o755,
            )
            .file("etc/passwd", PASSWD.as_bytes())
            .file("etc/group", GROUP.as_bytes())
            .file_mode("etc/shadow", b"root:*:::::::\n", 0o600);
        Ok(ImageBuilder::new().layer(layer, Compression::Gzip).build())
    }

    /// nginx and its libraries on the base; no configuration yet.
    fn nginx(&mut self, base: &Image) -> Result<Image> {
        let mut layer = Layer::new();
        for dir in [
            "var/lib",
            "var/lib/nginx",
            "var/log/nginx",
            "usr/share",
            "usr/share/nginx",
            "usr/share/nginx/html",
        ] {
            layer = layer.dir(dir, 0o755);
        }
        let program = self.packages.file(&["nginx"], &["usr/sbin/nginx"])?;
        layer = layer.file_mode("usr/sbin/nginx", &program, 0o755).file(
            "usr/share/nginx/html/index.html",
            b"<html><body>It works!</body></html>\n",
        );
        let ssl: &[&str] = &["libssl3t64", "libssl3"];
        for (package, name) in [
            (&["libcrypt1"][..], "libcrypt.so.1"),
            (&["libpcre2-8-0"], "libpcre2-8.so.0"),
            (&["zlib1g"], "libz.so.1"),
            (ssl, "libssl.so.3"),
            (ssl, "libcrypto.so.3"),
        ] {
            layer = self.library(layer, package, name)?;
        }
        Ok(ImageBuilder::on(base)
            .layer(layer, Compression::Gzip)
            .build())
    }
}

/// The names under which a busybox does something, but for those that the image has scripts for.
fn applets(busybox: &[u8]) -> Result<Vec<String>> {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir()?;
    // It looks at the name that it was called by.
    let program = dir.path().join("busybox");
    std::fs::write(&program, busybox)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let output = Command::new(&program)
        .arg("--list")
        .output()
        .context("run busybox --list")?;
    ensure!(output.status.success(), "busybox --list: {}", output.status);
    let names = String::from_utf8(output.stdout)?;
    Ok(names
        .lines()
        .filter(|name| !name.is_empty() && !["busybox", "pgrep", "ipcs"].contains(name))
        .map(str::to_owned)
        .collect())
}
