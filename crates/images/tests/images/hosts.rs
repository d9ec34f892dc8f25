//! Registries that want to know who asks, mirrors, and hosts that lead elsewhere.

use gantry_images::{Credentials, Options, PullRequest};
use gantry_testkit::registry::{Auth, Registry};
use gantry_types::{ErrorKind, Kind};

use crate::node::{Node, image, not_root, options};

fn user(password: &str) -> Credentials {
    Credentials {
        username: "user".into(),
        password: password.into(),
        ..Default::default()
    }
}

fn basic() -> Auth {
    Auth::Basic {
        user: "user".into(),
        password: "secret".into(),
    }
}

fn bearer(user: &str, refresh: &str) -> Auth {
    let password = if user.is_empty() { "" } else { "secret" };
    Auth::Bearer {
        user: user.into(),
        password: password.into(),
        refresh: refresh.into(),
    }
}

/// Pulls `a:v1` from `registry`, which now has it.
async fn pull(
    node: &Node,
    registry: &Registry,
    credentials: Credentials,
) -> gantry_images::Result<String> {
    registry.add("a", "v1", &image("one"));
    let reference = format!("{}/a:v1", registry.host());
    node.images
        .pull(PullRequest {
            reference,
            credentials,
            snapshotter: None,
        })
        .await
}

/// A node whose `hosts.toml` for `registry` says this.
fn node_with_hosts(registry: &str, text: &str) -> (Node, tempfile::TempDir) {
    node_with_hosts_and(options(), registry, text)
}

fn node_with_hosts_and(
    mut options: Options,
    registry: &str,
    text: &str,
) -> (Node, tempfile::TempDir) {
    let certs = tempfile::tempdir().unwrap();
    let dir = certs.path().join(registry);
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("hosts.toml"), text).unwrap();
    options.registry.certs_d = Some(certs.path().to_owned());
    (Node::with(options), certs)
}

#[tokio::test]
async fn every_way_to_say_who_one_is() {
    if not_root("every_way_to_say_who_one_is") {
        return;
    }
    let encoded = Credentials {
        auth: "dXNlcjpzZWNyZXQ=".into(),
        ..Default::default()
    };
    let identity = Credentials {
        identity_token: "refresh-1".into(),
        ..Default::default()
    };
    let ready = Credentials {
        registry_token: "token-0".into(),
        ..Default::default()
    };
    for (auth, credentials) in [
        (basic(), user("secret")),
        (basic(), encoded.clone()),
        (bearer("user", ""), user("secret")),
        (bearer("user", ""), encoded),
        (bearer("", ""), Credentials::default()),
        (bearer("", "refresh-1"), identity),
        (bearer("user", ""), ready),
    ] {
        let (node, registry) = (Node::new(), Registry::start().await.unwrap());
        registry.behave(|b| b.auth = auth.clone());
        let pulled = pull(&node, &registry, credentials.clone()).await;
        assert!(pulled.is_ok(), "{auth:?}: {}", pulled.unwrap_err());
        let tokens = registry.count("GET", "/token") + registry.count("POST", "/token");
        let wanted = usize::from(
            matches!(auth, Auth::Bearer { .. }) && credentials.registry_token.is_empty(),
        );
        assert_eq!(tokens, wanted, "{auth:?}");
    }
}

#[tokio::test]
async fn wrong_credentials_are_denied_and_shown_nowhere() {
    let node = Node::new();
    for auth in [basic(), bearer("user", "")] {
        let registry = Registry::start().await.unwrap();
        registry.behave(|b| b.auth = auth);
        let error = pull(&node, &registry, user("hunter2")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"));
        let error = pull(&node, &registry, Credentials::default())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    }
    node.assert_empty();
}

#[tokio::test]
async fn credentials_of_another_host_stay_at_home() {
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    registry.behave(|b| b.auth = basic());
    let elsewhere = Credentials {
        server_address: "https://other.example".into(),
        ..user("secret")
    };
    let error = pull(&node, &registry, elsewhere).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert!(
        registry
            .seen()
            .iter()
            .all(|seen| seen.authorization.is_none())
    );
}

#[tokio::test]
async fn a_token_that_expires_in_mid_pull_is_renewed() {
    if not_root("a_token_that_expires_in_mid_pull_is_renewed") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    registry.behave(|b| {
        b.auth = bearer("user", "");
        b.cut_after = Some((10, 1));
    });
    let made = image("one");
    registry.add("a", "v1", &made);
    let expire = async {
        while registry.count("GET", "/blobs/") == 0 {
            tokio::task::yield_now().await;
        }
        registry.expire_tokens();
    };
    let (pulled, ()) = tokio::join!(pull(&node, &registry, user("secret")), expire);
    assert_eq!(pulled.unwrap(), made.id());
    assert!(registry.count("GET", "/token") >= 2);
}

#[tokio::test]
async fn a_redirect_to_another_host_takes_no_credentials_along() {
    if not_root("a_redirect_to_another_host_takes_no_credentials_along") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let other = Registry::start().await.unwrap();
    other.add("a", "v1", &image("one"));
    registry.behave(|b| {
        b.auth = basic();
        b.redirect = Some(other.url());
    });
    pull(&node, &registry, user("secret")).await.unwrap();
    assert_eq!(
        other.seen().len(),
        3,
        "config and two layers came from there"
    );
    assert!(other.seen().iter().all(|seen| seen.authorization.is_none()));
    // Nor does the other host get to ask for them.
    let node = Node::new();
    other.behave(|b| b.auth = basic());
    let error = pull(&node, &registry, user("secret")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert!(other.seen().iter().all(|seen| seen.authorization.is_none()));
}

#[tokio::test]
async fn redirects_end() {
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    registry.behave(|b| b.redirect = Some(registry.url()));
    let error = pull(&node, &registry, Credentials::default())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("redirects"), "{error}");
    assert!(registry.count("GET", "/blobs/") <= 11 * 3);
    registry.behave(|b| b.redirect = Some("file:///etc/passwd?".to_owned()));
    let error = pull(&node, &registry, Credentials::default())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("not followed"), "{error}");
}

#[tokio::test]
async fn urls_of_foreign_layers_are_not_asked() {
    if not_root("urls_of_foreign_layers_are_not_asked") {
        return;
    }
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    let sink = Registry::start().await.unwrap();
    let url = format!("{}/steal", sink.url());
    let made = image("one").with_manifest(|manifest| {
        manifest["layers"][0]["urls"] = serde_json::json!([url]);
        manifest["layers"][0]["mediaType"] =
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip".into();
    });
    registry.behave(|b| b.auth = basic());
    registry.add("a", "f", &made);
    let reference = format!("{}/a:f", registry.host());
    let credentials = user("secret");
    node.images
        .pull(PullRequest {
            reference,
            credentials,
            snapshotter: None,
        })
        .await
        .unwrap();
    assert!(sink.seen().is_empty());
}

#[tokio::test]
async fn a_realm_without_tls_is_for_registries_without_tls() {
    if not_root("a_realm_without_tls_is_for_registries_without_tls") {
        return;
    }
    let (tls, sink) = (
        Registry::start_tls().await.unwrap(),
        Registry::start().await.unwrap(),
    );
    let text = format!("server = \"{}\"\nca = \"ca.pem\"\n", tls.url());
    let (node, certs) = node_with_hosts(&tls.host(), &text);
    std::fs::write(
        certs.path().join(tls.host()).join("ca.pem"),
        tls.ca().unwrap(),
    )
    .unwrap();
    tls.behave(|b| {
        b.auth = bearer("user", "");
        b.realm = Some(format!("{}/token", sink.url()));
    });
    let error = pull(&node, &tls, user("secret")).await.unwrap_err();
    assert!(error.to_string().contains("not https"), "{error}");
    assert!(sink.seen().is_empty());
    tls.behave(|b| b.realm = None);
    pull(&node, &tls, user("secret")).await.unwrap();
}

#[tokio::test]
async fn a_certificate_must_be_trusted_or_waived() {
    if not_root("a_certificate_must_be_trusted_or_waived") {
        return;
    }
    let tls = Registry::start_tls().await.unwrap();
    let server = format!("server = \"{}\"\n", tls.url());
    let (node, _certs) = node_with_hosts(&tls.host(), &server);
    let error = pull(&node, &tls, Credentials::default()).await.unwrap_err();
    assert!(
        error.to_string().starts_with("RegistryUnavailable: "),
        "{error}"
    );
    assert!(error.to_string().contains("certificate"), "{error}");
    let (node, _certs) = node_with_hosts(&tls.host(), &format!("{server}skip_verify = true\n"));
    pull(&node, &tls, Credentials::default()).await.unwrap();
}

#[tokio::test]
async fn a_client_certificate_is_for_its_host_alone() {
    if not_root("a_client_certificate_is_for_its_host_alone") {
        return;
    }
    let [own, blobs, realm] = [
        Registry::start_tls().await.unwrap(),
        Registry::start_tls().await.unwrap(),
        Registry::start_tls().await.unwrap(),
    ];
    let text = format!(
        "server = \"{}\"\nca = \"ca.pem\"\nclient = \"client.pem\"\n",
        own.url()
    );
    let (node, certs) = node_with_hosts(&own.host(), &text);
    let dir = certs.path().join(own.host());
    // The authority is trusted wherever the registry leads to.
    let authorities = [&own, &blobs, &realm].map(|registry| registry.ca().unwrap());
    std::fs::write(dir.join("ca.pem"), authorities.concat()).unwrap();
    let identity = gantry_testkit::registry::client_identity().unwrap();
    std::fs::write(dir.join("client.pem"), identity).unwrap();

    own.behave(|b| b.auth = bearer("user", ""));
    pull(&node, &own, user("secret")).await.unwrap();
    let seen = own.seen();
    assert!(seen.iter().any(|seen| seen.path == "/token"));
    assert!(seen.iter().all(|seen| seen.client_certificate), "{seen:?}");

    node.remove(&format!("{}/a:v1", own.host())).await;
    own.behave(|b| {
        b.realm = Some(format!("{}/token", realm.url()));
        b.redirect = Some(blobs.url());
    });
    realm.behave(|b| b.auth = bearer("user", ""));
    blobs.add("a", "v1", &image("one"));
    own.forget_seen();
    pull(&node, &own, user("secret")).await.unwrap();
    assert!(own.seen().iter().all(|seen| seen.client_certificate));
    for other in [&blobs, &realm] {
        let seen = other.seen();
        assert!(!seen.is_empty());
        assert!(seen.iter().all(|seen| !seen.client_certificate), "{seen:?}");
    }
}

#[tokio::test]
async fn a_repair_has_only_the_nodes_credentials_and_says_so() {
    use gantry_images::{HostCredentials, Keychain};
    if not_root("a_repair_has_only_the_nodes_credentials_and_says_so") {
        return;
    }
    let registry = Registry::start().await.unwrap();
    registry.behave(|b| b.auth = basic());
    let made = image("one");
    let damage = |node: &Node| {
        let layer = node.dir.path().join("content/blobs/sha256");
        std::fs::write(layer.join(made.layers[0].digest.hex()), "").unwrap();
    };
    let in_use = crate::node::nothing_in_use;
    let node = Node::new();
    let id = pull(&node, &registry, user("secret")).await.unwrap();
    damage(&node);
    let bad = node.images.verify(&id).await.unwrap();
    let error = node.images.repair(&bad, in_use()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    let text = error.to_string();
    for part in [&registry.host(), "401", "images.credentials"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!format!("{error:?}").contains("secret"));
    // A pull that brings some heals what it needs; nothing was made worse.
    assert_eq!(node.images.verify(&id).await.unwrap().faults, bad.faults);

    let (node, _dir) = node_with_keychain(|dir| {
        std::fs::write(dir.join("password"), "secret\n").unwrap();
        let own = HostCredentials {
            username: "user".into(),
            password_file: Some(dir.join("password")),
            ..Default::default()
        };
        Keychain {
            hosts: [(registry.host(), own)].into(),
            ..Default::default()
        }
    });
    let id = pull(&node, &registry, user("secret")).await.unwrap();
    damage(&node);
    let bad = node.images.verify(&id).await.unwrap();
    assert_eq!(bad.faults.len(), 1);
    node.images.repair(&bad, in_use()).await.unwrap();
    assert_eq!(node.images.verify(&id).await.unwrap().faults, []);
}

#[tokio::test]
async fn token_answers_are_bounded_and_checked() {
    let (node, registry) = (Node::new(), Registry::start().await.unwrap());
    registry.behave(|b| b.auth = bearer("", ""));
    for (body, part) in [
        (vec![b' '; 5 << 20], "more than"),
        (b"{}".to_vec(), "empty token"),
        (b"[".to_vec(), "not a token"),
    ] {
        registry.behave(|b| b.token_body = Some(body.into()));
        let error = pull(&node, &registry, Credentials::default())
            .await
            .unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[tokio::test]
async fn a_mirror_is_asked_first_and_told_for_whom() {
    if not_root("a_mirror_is_asked_first_and_told_for_whom") {
        return;
    }
    let (mirror, made) = (Registry::start().await.unwrap(), image("one"));
    mirror.add("library/a", "v1", &made);
    let text = format!(
        "server = \"http://127.0.0.1:1\"\n[host.\"{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n\
         [host.\"{}\".header]\nx-site = \"here\"\n",
        mirror.url(),
        mirror.url()
    );
    let (node, _certs) = node_with_hosts("docker.io", &text);
    let credentials = user("secret");
    mirror.behave(|b| b.auth = bearer("", ""));
    let request = PullRequest {
        reference: "a:v1".into(),
        credentials,
        snapshotter: None,
    };
    assert_eq!(node.images.pull(request).await.unwrap(), made.id());
    let image = node.images.status("a:v1").unwrap().unwrap();
    assert_eq!(image.tags, ["docker.io/library/a:v1"]);
    let seen: Vec<_> = mirror
        .seen()
        .into_iter()
        .filter(|seen| seen.path != "/token")
        .collect();
    assert!(
        seen.iter().all(|seen| seen.query == "ns=docker.io"),
        "{seen:?}"
    );
    assert!(seen.iter().all(|seen| {
        seen.headers
            .get("x-site")
            .is_some_and(|site| site == "here")
    }));
    let told = |seen: &gantry_testkit::registry::Seen| {
        seen.authorization
            .as_deref()
            .is_some_and(|text| text.starts_with("Basic"))
    };
    assert!(
        !mirror.seen().iter().any(told),
        "the credentials are the registry's, not the mirror's"
    );
}

#[tokio::test]
async fn the_configured_server_gets_the_credentials_of_the_registry() {
    if not_root("the_configured_server_gets_the_credentials_of_the_registry") {
        return;
    }
    let server = Registry::start().await.unwrap();
    server.add("a", "v1", &image("one"));
    server.behave(|b| b.auth = basic());
    let (node, _certs) = node_with_hosts("r.example", &format!("server = \"{}\"", server.url()));
    let pull = |server_address: &str| {
        let credentials = Credentials {
            server_address: server_address.into(),
            ..user("secret")
        };
        node.images.pull(PullRequest {
            reference: "r.example/a:v1".into(),
            credentials,
            snapshotter: None,
        })
    };
    assert!(pull("other.example").await.is_err());
    assert!(
        server
            .seen()
            .iter()
            .all(|seen| seen.authorization.is_none())
    );
    pull("").await.unwrap();
    pull("https://r.example").await.unwrap();
}

#[tokio::test]
async fn a_mirror_that_fails_in_any_way_is_passed_over() {
    if not_root("a_mirror_that_fails_in_any_way_is_passed_over") {
        return;
    }
    let made = image("one");
    type Fault = fn(&mut gantry_testkit::registry::Behaviour);
    let faults: [(&str, Fault); 7] = [
        ("absent", |_| ()),
        ("unavailable", |b| b.fail = Some((503, 100, None))),
        ("denied", |b| {
            b.auth = Auth::Basic {
                user: "x".into(),
                password: "y".into(),
            }
        }),
        ("wrong bytes", |b| b.wrong_bytes = true),
        ("wrong digest header", |b| b.wrong_digest_header = true),
        ("cuts", |b| b.cut_after = Some((5, 100))),
        ("stalls", |b| b.stall_after = Some((5, 100))),
    ];
    for (what, fault) in faults {
        let (mirror, server) = (
            Registry::start().await.unwrap(),
            Registry::start().await.unwrap(),
        );
        if what != "absent" {
            mirror.add("a", "v1", &made);
        }
        mirror.behave(fault);
        server.add("a", "v1", &made);
        let text = format!(
            "server = \"{}\"\n[host.\"http://127.0.0.1:1\"]\n[host.\"{}\"]\n",
            server.url(),
            mirror.url()
        );
        let mut options = options();
        if what == "stalls" {
            options.registry.progress_timeout = std::time::Duration::from_secs(1);
        }
        let (node, _certs) = node_with_hosts_and(options, "r.example", &text);
        let pulled = node.pull("r.example/a:v1").await;
        assert!(pulled.is_ok(), "{what}: {}", pulled.unwrap_err());
        assert!(
            !mirror.seen().is_empty() && !server.seen().is_empty(),
            "{what}"
        );
        node.assert_tidy();
    }
}

#[tokio::test]
async fn a_mirror_that_may_only_pull_is_not_asked_for_tags() {
    if not_root("a_mirror_that_may_only_pull_is_not_asked_for_tags") {
        return;
    }
    let made = image("one");
    let (mirror, server) = (
        Registry::start().await.unwrap(),
        Registry::start().await.unwrap(),
    );
    mirror.add("a", "v1", &made);
    server.add("a", "v1", &made);
    let text = format!(
        "server = \"{}\"\n[host.\"{}\"]\ncapabilities = [\"pull\"]\n",
        server.url(),
        mirror.url()
    );
    let (node, _certs) = node_with_hosts("r.example", &text);
    node.pull("r.example/a:v1").await.unwrap();
    assert_eq!(
        (
            mirror.count("GET", "/manifests/"),
            server.count("GET", "/blobs/")
        ),
        (0, 0)
    );
}

#[tokio::test]
async fn a_broken_hosts_file_is_named() {
    let (node, _certs) = node_with_hosts("r.example", "server = 7");
    let error = node.pull("r.example/a:v1").await.unwrap_err();
    assert!(
        error.to_string().contains("r.example/hosts.toml"),
        "{error}"
    );
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
}

/// A node with credentials of its own; `fill` writes files into the directory.
fn node_with_keychain(
    fill: impl FnOnce(&std::path::Path) -> gantry_images::Keychain,
) -> (Node, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options();
    options.registry.keychain = fill(dir.path());
    (Node::with(options), dir)
}

/// By a process of its own: one that another test forks meanwhile would inherit a descriptor for
/// writing, and executing the file would fail with ETXTBSY.
fn write_helper(dir: &std::path::Path, script: &str) {
    let mut writer = std::process::Command::new("sh")
        .args(["-c", "cat >\"$0\" && chmod 755 \"$0\""])
        .arg(dir.join("docker-credential-test"))
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = writer.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, format!("#!/bin/sh\n{script}\n").as_bytes()).unwrap();
    drop(input);
    assert!(writer.wait().unwrap().success());
}

#[tokio::test]
async fn the_node_has_credentials_of_its_own() {
    use gantry_images::{HostCredentials, Keychain};
    if not_root("the_node_has_credentials_of_its_own") {
        return;
    }
    let registry = Registry::start().await.unwrap();
    let host = registry.host();
    let helper = r#"read -r s; echo "{\"ServerURL\": \"$s\", \"Username\": \"user\", \"Secret\": \"secret\"}""#;
    let file = |dir: &std::path::Path| {
        std::fs::write(dir.join("password"), "secret\n").unwrap();
        let own = HostCredentials {
            username: "user".into(),
            password_file: Some(dir.join("password")),
            ..Default::default()
        };
        Keychain {
            hosts: [(host.clone(), own)].into(),
            ..Default::default()
        }
    };
    let docker = |dir: &std::path::Path, text: String| {
        write_helper(dir, helper);
        std::fs::write(dir.join("config.json"), text).unwrap();
        Keychain {
            docker_config: Some(dir.join("config.json")),
            helper_dir: Some(dir.to_owned()),
            ..Default::default()
        }
    };
    let auths = format!(r#"{{"auths": {{"http://{host}/v2/": {{"auth": "dXNlcjpzZWNyZXQ="}}}}}}"#);
    let helpers = format!(r#"{{"credHelpers": {{"{host}": "test"}}}}"#);
    let store = r#"{"credsStore": "test"}"#.to_owned();
    for auth in [basic(), bearer("user", "")] {
        registry.behave(|b| b.auth = auth.clone());
        let nodes = [
            node_with_keychain(file),
            node_with_keychain(|dir| docker(dir, auths.clone())),
            node_with_keychain(|dir| docker(dir, helpers.clone())),
            node_with_keychain(|dir| docker(dir, store.clone())),
        ];
        for (n, (node, _dir)) in nodes.iter().enumerate() {
            let pulled = pull(node, &registry, Credentials::default()).await;
            assert!(pulled.is_ok(), "{n}: {}", pulled.unwrap_err());
            // What the request brings goes first, right or wrong.
            node.remove(&format!("{host}/a:v1")).await;
            assert!(pull(node, &registry, user("wrong")).await.is_err(), "{n}");
        }
    }
    // An identity token, and a token that is ready.
    for (auth, secret, is_identity) in [
        (bearer("", "refresh-1"), "refresh-1", true),
        (bearer("user", ""), "token-0", false),
    ] {
        registry.behave(|b| b.auth = auth);
        let (node, _dir) = node_with_keychain(|dir| {
            let path = dir.join("token");
            std::fs::write(&path, secret).unwrap();
            let mut own = HostCredentials::default();
            if is_identity {
                own.identity_token_file = Some(path);
            } else {
                own.registry_token_file = Some(path);
            }
            Keychain {
                hosts: [(host.clone(), own)].into(),
                ..Default::default()
            }
        });
        pull(&node, &registry, Credentials::default())
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn the_nodes_credentials_are_for_their_host_alone_and_only_if_asked() {
    use gantry_images::Keychain;
    if not_root("the_nodes_credentials_are_for_their_host_alone_and_only_if_asked") {
        return;
    }
    let registry = Registry::start().await.unwrap();
    let asked = "echo x >>$(dirname $0)/asked; echo credentials not found; exit 1";
    let keychain = |dir: &std::path::Path| {
        write_helper(dir, asked);
        let text =
            r#"{"auths": {"other.example": {"auth": "dXNlcjpzZWNyZXQ="}}, "credsStore": "test"}"#;
        std::fs::write(dir.join("config.json"), text).unwrap();
        Keychain {
            docker_config: Some(dir.join("config.json")),
            helper_dir: Some(dir.to_owned()),
            ..Default::default()
        }
    };
    let (node, dir) = node_with_keychain(keychain);
    pull(&node, &registry, Credentials::default())
        .await
        .unwrap();
    assert!(!dir.path().join("asked").exists(), "nobody wanted any");
    registry.behave(|b| b.auth = basic());
    let (node, dir) = node_with_keychain(keychain);
    let error = pull(&node, &registry, Credentials::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    let times = std::fs::read_to_string(dir.path().join("asked")).unwrap();
    assert_eq!(
        times, "x\nx\n",
        "once by the host's name, once by the registry's"
    );
    assert!(
        registry
            .seen()
            .iter()
            .all(|seen| seen.authorization.is_none())
    );

    // A helper that fails is named, with nothing of what it wrote.
    let (node, dir) = node_with_keychain(keychain);
    write_helper(dir.path(), "echo hunter2; exit 7");
    let error = pull(&node, &registry, Credentials::default())
        .await
        .unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(
        text.contains("docker-credential-test") && !text.contains("hunter2"),
        "{text}"
    );
}

#[tokio::test]
async fn a_real_registry_with_tls_and_passwords() {
    use gantry_testkit::docker_registry::{DockerRegistry, PASSWORD, USER, program};
    const NAME: &str = "a_real_registry_with_tls_and_passwords";
    if not_root(NAME) {
        return;
    }
    let Some(program) = program() else {
        println!("SKIP {NAME}: no docker-registry in PATH, and DOCKER_REGISTRY is not set");
        return;
    };
    let registry = DockerRegistry::start(&program).unwrap();
    let made = image("one");
    registry.add("team/app", "v1", &made).unwrap();
    registry
        .add("team/big", "v1", &crate::transfer::big(3_000_000))
        .unwrap();
    let certs = tempfile::tempdir().unwrap();
    let dir = certs.path().join(registry.host().replace(':', "_") + "_");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("ca.pem"), &registry.ca).unwrap();
    let text = format!(
        "server = \"https://{}\"\nca = \"ca.pem\"\n",
        registry.host()
    );
    std::fs::write(dir.join("hosts.toml"), text).unwrap();
    let mut options = options();
    options.registry.certs_d = Some(certs.path().to_owned());
    options.registry.range_bytes = 256 << 10;
    options.registry.header_timeout = std::time::Duration::from_secs(30);
    let node = Node::with(options);
    let pull = |name: &str, password: &str| {
        let credentials = match password {
            "" => Credentials::default(),
            password => Credentials {
                username: USER.into(),
                password: password.into(),
                ..Default::default()
            },
        };
        node.images.pull(PullRequest {
            reference: format!("{}/{name}", registry.host()),
            credentials,
            snapshotter: None,
        })
    };
    for password in ["", "wrong"] {
        let error = pull("team/app:v1", password).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains("401"), "{error}");
    }
    let error = pull("team/app:v2", PASSWORD).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert_eq!(pull("team/app:v1", PASSWORD).await.unwrap(), made.id());
    let by_digest = format!("team/app@{}", made.manifest.digest);
    assert_eq!(pull(&by_digest, PASSWORD).await.unwrap(), made.id());
    pull("team/big:v1", PASSWORD).await.unwrap();
    node.assert_tidy();
    assert_eq!(node.parts(), [""; 0]);
}
