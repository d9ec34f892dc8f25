//! Streaming over TLS, through gantryd: with certificates from files, and with one of its own.

use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use gantry_integration::{Node, eventually, on_node, sleeper};
use gantry_testkit::cri::v1;
use gantry_testkit::daemon::Options;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme,
    StreamOwned,
};

/// Writes a certificate for the loopback and its key, as a rotation does: each by rename.
fn rotate(dir: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).unwrap();
    for (name, text) in [
        ("cert.pem", made.cert.pem()),
        ("key.pem", made.signing_key.serialize_pem()),
    ] {
        std::fs::write(dir.join("new"), text).unwrap();
        std::fs::rename(dir.join("new"), dir.join(name)).unwrap();
    }
    made.cert.der().clone()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A client that trusts one certificate.
fn trusting(certificate: &CertificateDer<'static>) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    builder.with_root_certificates(roots).with_no_client_auth()
}

/// Whoever it is, as long as it has the key of what it presents.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn trusting_anybody() -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let verifier = Arc::new(Anybody(provider()));
    builder
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth()
}

/// Runs `echo there` by Exec over TLS, with a WebSocket client that reads just so far. Fails when
/// the handshake does.
async fn echo(node: &Node, id: &str, config: ClientConfig) -> io::Result<()> {
    let request = v1::ExecRequest {
        container_id: id.to_owned(),
        cmd: vec!["echo".to_owned(), "there".to_owned()],
        stdout: true,
        ..Default::default()
    };
    let mut client = node.client.runtime.clone();
    let url = client.exec(request).await.expect("Exec").into_inner().url;
    let rest = url.strip_prefix("https://").expect("a URL of TLS");
    let (host, path) = rest.split_once('/').expect("a path");
    let tcp = node.daemon.netns().run(|| TcpStream::connect(host))??;
    tcp.set_read_timeout(Some(Duration::from_secs(20)))?;
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let tls = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(tls, tcp);
    write!(
        stream,
        "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
    )?;
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    stream.read_until(b'\n', &mut line)?;
    assert!(line.starts_with(b"HTTP/1.1 101"), "{line:?}");
    while !line.ends_with(b"there\n") {
        assert!(stream.read_until(b'\n', &mut line)? > 0, "{line:?}");
    }
    Ok(())
}

/// A container in which `echo` can be run.
async fn idle(node: &Node) -> String {
    let image = node.busybox().await;
    let pod = node.host_pod("tls").await;
    node.run(&pod, &sleeper("c", &image)).await
}

#[test]
fn a_certificate_from_files_is_served_and_rotated() {
    const NAME: &str = "a_certificate_from_files_is_served_and_rotated";
    let dir = tempfile::tempdir().unwrap();
    let first = rotate(dir.path());
    let config = format!(
        "[streaming]\ntls = 'files'\ncertificate = '{0}/cert.pem'\nkey = '{0}/key.pem'\n",
        dir.path().display()
    );
    on_node(NAME, Options::default().config(&config), async |node| {
        let id = idle(node).await;
        echo(node, &id, trusting(&first)).await.unwrap();
        let second = rotate(dir.path());
        eventually("the new one is served", async || {
            echo(node, &id, trusting(&second)).await.ok()
        })
        .await;
        let error = echo(node, &id, trusting(&first)).await.unwrap_err();
        assert!(error.to_string().contains("certificate"), "{error}");
        // Files that are no pair leave the last good one in use.
        std::fs::write(dir.path().join("key.pem"), "nonsense").unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        echo(node, &id, trusting(&second)).await.unwrap();
    });
}

#[test]
fn a_self_signed_certificate_is_for_clients_that_do_not_verify() {
    const NAME: &str = "a_self_signed_certificate_is_for_clients_that_do_not_verify";
    let options = Options::default().config("[streaming]\ntls = 'self-signed'\n");
    let dir = tempfile::tempdir().unwrap();
    let other = rotate(dir.path());
    on_node(NAME, options, async |node| {
        let id = idle(node).await;
        echo(node, &id, trusting_anybody()).await.unwrap();
        // The kubelet is none of them: it trusts the machine's authorities.
        let error = echo(node, &id, trusting(&other)).await.unwrap_err();
        assert!(error.to_string().contains("certificate"), "{error}");
    });
}
