//! TLS: a certificate of the server's own, and one from files that change.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use gantry_streaming::{Certificate, Config, Server};
use gantry_types::{ErrorKind, Kind};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::common::http::{self, ask, split};
use crate::common::spdy::Client;
use crate::common::{Memory, OUT, soon, start_with};

fn config(tls: Certificate) -> Config {
    Config {
        tls: Some(tls),
        ..Config::default()
    }
}

/// Writes a certificate for the loopback and its key.
fn write(directory: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).unwrap();
    std::fs::write(directory.join("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(directory.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    made.cert.der().clone()
}

fn files(directory: &Path) -> Certificate {
    Certificate::Files {
        certificate: directory.join("cert.pem"),
        key: directory.join("key.pem"),
    }
}

/// Connects, trusting `trusted` alone.
async fn connect(
    url: &str,
    trusted: &CertificateDer<'static>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = http::connect(url).await;
    let name = ServerName::try_from("127.0.0.1").unwrap();
    soon(TlsConnector::from(Arc::new(config)).connect(name, tcp)).await
}

#[tokio::test]
async fn a_session_runs_over_tls_and_files_are_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let first = write(directory.path());
    let node = start_with(config(files(directory.path()))).await;
    let url = node.exec(OUT, &["say", "a", "b"]);
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");

    let url = node.exec(OUT, &["noise", "300000"]);
    let mut tls = connect(&url, &first).await.unwrap();
    let mut headers = http::SPDY.to_vec();
    headers.push(("X-Stream-Protocol-Version", "v4.channel.k8s.io"));
    assert_eq!(ask(&mut tls, "POST", &url, &headers).await.status, 101);
    let mut client = Client::new(tls);
    for kind in ["error", "stdout"] {
        client.open(&[("streamType", kind)]).await;
    }
    client.finish().await;
    assert_eq!(client.seen(3).data.len(), 300_000);
    assert_eq!(client.status(1)["status"], "Success");

    // A half-written change keeps the old one in use.
    std::fs::write(directory.path().join("cert.pem"), "").unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    connect(&url, &first).await.unwrap();
    let second = write(directory.path());
    let start = std::time::Instant::now();
    while connect(&url, &second).await.is_err() {
        assert!(start.elapsed() < crate::common::SOON, "never read again");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(connect(&url, &first).await.is_err());
}

#[tokio::test]
async fn a_client_that_does_not_speak_tls_or_stays_silent_is_let_go() {
    let config = Config {
        request_timeout: Duration::from_millis(300),
        ..config(Certificate::SelfSigned)
    };
    let node = start_with(config).await;
    let url = node.exec(OUT, &["deaf"]);
    assert!(split(&url).0.starts_with("127.0.0.1:"));
    let mut silent = http::connect(&url).await;
    assert_eq!(soon(silent.read(&mut [0; 1])).await.unwrap(), 0);
    let mut plain = http::connect(&url).await;
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = soon(plain.read_to_end(&mut answer)).await;
    assert!(!answer.starts_with(b"HTTP"));
}

#[tokio::test]
async fn files_that_are_no_certificate_are_an_error_that_names_them() {
    let directory = tempfile::tempdir().unwrap();
    let start = async || {
        let config = config(files(directory.path()));
        Server::bind(config, Arc::new(Memory::default()))
            .await
            .err()
            .unwrap()
    };
    let error = start().await;
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("cert.pem"), "{error}");
    write(directory.path());
    std::fs::write(directory.path().join("key.pem"), "no key").unwrap();
    let error = start().await;
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.to_string().contains("key.pem"), "{error}");
}
