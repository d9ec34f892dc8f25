//! TLS for the streaming server: a certificate of its own, or one from files that are read again
//! when they change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::error::{Error, Result};

/// What the server presents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Certificate {
    /// Made at start and signed by itself, for clients that do not verify. The kubelet is none of
    /// them: its proxy (NewUpgradeAwareHandler without a transport, pkg/kubelet/server) dials with
    /// Go's defaults, which trust the machine's authorities alone.
    SelfSigned,
    /// PEM files: certificate chain and private key. For the kubelet the chain must lead to an
    /// authority that its machine trusts, and name the address that is served on.
    Files { certificate: PathBuf, key: PathBuf },
}

/// How often, at most, files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// The acceptor of the moment.
pub(crate) struct Tls {
    certificate: Certificate,
    current: Mutex<Current>,
}

struct Current {
    acceptor: TlsAcceptor,
    stamps: Option<[Stamp; 2]>,
    looked: Instant,
}

/// A file as far as a change of it shows.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    length: u64,
}

impl Tls {
    /// Reads or makes the certificate. `names` are the addresses that a made one is for.
    pub fn new(certificate: Certificate, names: Vec<String>) -> Result<Self> {
        let (acceptor, stamps) = match &certificate {
            Certificate::SelfSigned => (self_signed(names)?, None),
            // Stamps first: a file that changes while it is read is read again.
            Certificate::Files { certificate, key } => {
                let stamps = stamps(certificate, key)?;
                (from_files(certificate, key)?, Some(stamps))
            }
        };
        let current = Current {
            acceptor,
            stamps,
            looked: Instant::now(),
        };
        Ok(Self {
            certificate,
            current: Mutex::new(current),
        })
    }

    /// For the next connection. Files that cannot be read now leave the last good ones in use: they
    /// are replaced one after the other.
    pub fn acceptor(&self) -> TlsAcceptor {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Certificate::Files { certificate, key } = &self.certificate
            && current.looked.elapsed() >= LOOK
        {
            current.looked = Instant::now();
            if let Err(error) = reload(&mut current, certificate, key) {
                tracing::warn!(%error, "keeping the last streaming certificate");
            }
        }
        current.acceptor.clone()
    }
}

fn reload(current: &mut Current, certificate: &Path, key: &Path) -> Result<()> {
    let stamps = stamps(certificate, key)?;
    if current.stamps != Some(stamps) {
        current.acceptor = from_files(certificate, key)?;
        current.stamps = Some(stamps);
        tracing::info!(certificate = %certificate.display(), "streaming certificate read again");
    }
    Ok(())
}

fn stamps(certificate: &Path, key: &Path) -> Result<[Stamp; 2]> {
    let stamp = |path: &Path| {
        let found = std::fs::metadata(path)
            .map_err(|error| Error::io(path.display().to_string(), error))?;
        Ok(Stamp {
            modified: found.modified().ok(),
            length: found.len(),
        })
    };
    Ok([stamp(certificate)?, stamp(key)?])
}

fn from_files(certificate: &Path, key: &Path) -> Result<TlsAcceptor> {
    let bad = |path: &Path, reason: &dyn ToString| {
        Error::tls(path.display().to_string(), reason.to_string())
    };
    let chain: Vec<_> = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect)
        .map_err(|error| bad(certificate, &error))?;
    if chain.is_empty() {
        return Err(bad(certificate, &"no certificate in it"));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| bad(key, &error))?;
    acceptor(chain, private).map_err(|error| bad(certificate, &error))
}

fn self_signed(names: Vec<String>) -> Result<TlsAcceptor> {
    let bad = |reason: &dyn ToString| Error::tls("self-signed certificate", reason.to_string());
    let made = rcgen::generate_simple_self_signed(names).map_err(|error| bad(&error))?;
    let key =
        PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(|error| bad(&error))?;
    acceptor(vec![made.cert.der().clone()], key).map_err(|error| bad(&error))
}

fn acceptor(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> std::result::Result<TlsAcceptor, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    // Upgrades are of HTTP/1.1 alone.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
