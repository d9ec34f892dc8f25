//! Debian's `docker-registry` (distribution) on the loopback: a registry that nobody of ours wrote.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::daemon::in_path;
use crate::image::{Blob, Image};

/// The user that it knows, and the password.
pub const USER: &str = "ann";
pub const PASSWORD: &str = "pass-word-7";
/// bcrypt of it, as htpasswd -B writes it.
const HASH: &str = "$2y$05$abcdefghijklmnopqrstuuTs65WIqQdpH1Wd2DEDM6eMNsJ0XXu16";

/// The program: `$DOCKER_REGISTRY`, or one in PATH. `None` if there is none.
pub fn program() -> Option<PathBuf> {
    std::env::var_os("DOCKER_REGISTRY")
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .or_else(|| in_path("docker-registry"))
}

/// A running one, over TLS and with password; it ends when this is dropped.
pub struct DockerRegistry {
    dir: tempfile::TempDir,
    child: Child,
    host: String,
    /// The certificate to trust, PEM.
    pub ca: String,
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        // It has nothing to lose, and was ours to start.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl DockerRegistry {
    pub fn start(program: &Path) -> io::Result<Self> {
        let dir = tempfile::tempdir()?;
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).map_err(io::Error::other)?;
        let at = |name: &str| dir.path().join(name);
        fs::write(at("cert.pem"), made.cert.pem())?;
        fs::write(at("key.pem"), made.signing_key.serialize_pem())?;
        fs::write(at("htpasswd"), format!("{USER}:{HASH}\n"))?;
        // Free now; whoever takes it in between makes the start fail, not the test pass.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let host = format!("127.0.0.1:{port}");
        let config = format!(
            "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\n\
             storage:\n  filesystem:\n    rootdirectory: {}\n\
             http:\n  addr: {host}\n  tls:\n    certificate: {}\n    key: {}\n\
             auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
            at("data").display(),
            at("cert.pem").display(),
            at("key.pem").display(),
            at("htpasswd").display(),
        );
        fs::write(at("config.yml"), config)?;
        let mut child = Command::new(program)
            .arg("serve")
            .arg(at("config.yml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(at("log"))?)
            .spawn()?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(&host).is_err() {
            let ended = child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(at("log")).unwrap_or_default();
                let _ = child.kill();
                return Err(io::Error::other(format!("{}: {log}", program.display())));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self {
            dir,
            child,
            host,
            ca: made.cert.pem(),
        })
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Puts an image into its storage (distribution, registry/storage/paths.go).
    pub fn add(&self, repository: &str, tag: &str, image: &Image) -> io::Result<()> {
        let root = self.dir.path().join("data/docker/registry/v2");
        let own = root.join("repositories").join(repository);
        let write = |path: PathBuf, data: &[u8]| {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(path, data)
        };
        let blob = |blob: &Blob| {
            let hex = blob.digest.hex();
            let dir = root.join("blobs/sha256").join(&hex[..2]).join(hex);
            write(dir.join("data"), &blob.data)
        };
        for part in image.layers.iter().chain([&image.config]) {
            blob(part)?;
            let link = own.join("_layers/sha256").join(part.digest.hex());
            write(link.join("link"), part.digest.as_str().as_bytes())?;
        }
        blob(&image.manifest)?;
        let (digest, hex) = (image.manifest.digest.as_str(), image.manifest.digest.hex());
        let manifests = own.join("_manifests");
        for dir in [
            format!("revisions/sha256/{hex}"),
            format!("tags/{tag}/current"),
            format!("tags/{tag}/index/sha256/{hex}"),
        ] {
            write(manifests.join(dir).join("link"), digest.as_bytes())?;
        }
        Ok(())
    }
}
