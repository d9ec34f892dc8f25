//! Requests before the upgrade: tokens, methods, negotiation.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use gantry_streaming::{Config, ExecRequest, PortForwardRequest, Stdio};
use gantry_types::{ErrorKind, Kind};

use crate::common::http::{SPDY, WEBSOCKET, ask, connect, split, status};
use crate::common::{IN_OUT, OUT, container, pod, start, start_with};

const V4: (&str, &str) = ("X-Stream-Protocol-Version", "v4.channel.k8s.io");

fn with<'a>(base: &[(&'a str, &'a str)], more: (&'a str, &'a str)) -> Vec<(&'a str, &'a str)> {
    let mut headers = base.to_vec();
    headers.push(more);
    headers
}

#[tokio::test]
async fn urls_are_absolute_and_on_the_loopback() {
    let node = start().await;
    let address = node.server.address();
    assert_eq!(address.ip(), IpAddr::from(Ipv4Addr::LOCALHOST));
    for (url, path) in [
        (node.exec(OUT, &["x"]), "exec"),
        (node.attach(OUT), "attach"),
        (node.forward(&[]), "portforward"),
    ] {
        let token = url
            .strip_prefix(&format!("http://{address}/{path}/"))
            .expect("absolute");
        assert!(token.len() >= 8 && !token.contains('/'), "{url}");
    }
    let everywhere = Config {
        address: "[::]:0".parse().unwrap(),
        ..Config::default()
    };
    let node = start_with(everywhere).await;
    let url = node.exec(OUT, &["x"]);
    let port = node.server.address().port();
    assert!(
        url.starts_with(&format!("http://127.0.0.1:{port}/exec/")),
        "{url}"
    );
    assert_eq!(status("GET", &url, &with(&SPDY, V4)).await, 101);
}

#[tokio::test]
async fn a_token_is_good_once_and_for_its_own_kind() {
    let node = start().await;
    let url = node.exec(OUT, &["deaf"]);
    let headers = with(&SPDY, V4);
    assert_eq!(status("GET", &url, &headers).await, 101);
    assert_eq!(status("GET", &url, &headers).await, 404);

    let exec = node.exec(OUT, &["deaf"]);
    assert_eq!(
        status("POST", &exec.replace("/exec/", "/attach/"), &headers).await,
        404
    );
    assert_eq!(
        status("POST", &exec, &headers).await,
        404,
        "it was presented before"
    );
    let forward = node.forward(&[80]).replace("/portforward/", "/exec/");
    assert_eq!(status("POST", &forward, &headers).await, 404);
}

#[tokio::test]
async fn a_token_that_is_too_old_is_not_found() {
    let config = Config {
        token_lifetime: Duration::from_millis(50),
        ..Config::default()
    };
    let node = start_with(config).await;
    let url = node.exec(OUT, &["deaf"]);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(status("GET", &url, &with(&SPDY, V4)).await, 404);
}

#[tokio::test]
async fn guessed_tokens_and_other_paths_are_not_found() {
    let node = start().await;
    let url = node.exec(OUT, &["deaf"]);
    let (host, _) = split(&url);
    let guess = |n: u64| {
        format!(
            "http://{host}/exec/{:024x}",
            n.wrapping_mul(0x9e37_79b9_7f4a_7c15)
        )
    };
    for n in 0..500 {
        assert_eq!(status("GET", &guess(n), &with(&SPDY, V4)).await, 404);
    }
    for path in [
        "/",
        "/exec",
        "/exec/",
        "/exec//",
        "//",
        "/exec/../exec/x",
        "/metrics",
        "/exec/a/b",
    ] {
        assert_eq!(
            status("GET", &format!("http://{host}{path}"), &[]).await,
            404,
            "{path}"
        );
    }
    assert_eq!(status("GET", &url, &with(&SPDY, V4)).await, 101);
}

#[tokio::test]
async fn other_methods_are_refused_and_cost_no_token() {
    let node = start().await;
    let url = node.exec(OUT, &["deaf"]);
    for method in ["PUT", "DELETE", "HEAD", "OPTIONS", "CONNECTED"] {
        assert_eq!(
            status(method, &url, &with(&SPDY, V4)).await,
            405,
            "{method}"
        );
    }
    assert_eq!(status("GET", &url, &with(&SPDY, V4)).await, 101);
}

#[tokio::test]
async fn what_cannot_be_negotiated_is_refused() {
    let node = start().await;
    let exec = || node.exec(OUT, &["deaf"]);
    assert_eq!(status("POST", &exec(), &SPDY).await, 400, "no version");
    assert_eq!(status("POST", &exec(), &[V4]).await, 400, "no upgrade");
    let v5 = with(&SPDY, ("X-Stream-Protocol-Version", "v5.channel.k8s.io"));
    let url = exec();
    let answer = ask(&mut connect(&url).await, "POST", &url, &v5).await;
    assert_eq!(answer.status, 403);
    assert_eq!(answer.one("connection"), Some("close"));
    assert_eq!(
        answer.all("x-accepted-stream-protocol-versions"),
        [
            "v4.channel.k8s.io",
            "v3.channel.k8s.io",
            "v2.channel.k8s.io",
            "channel.k8s.io"
        ]
    );
    let v6 = with(&WEBSOCKET, ("Sec-WebSocket-Protocol", "v6.channel.k8s.io"));
    assert_eq!(status("GET", &exec(), &v6).await, 403);
    assert_eq!(
        status("POST", &exec(), &WEBSOCKET).await,
        400,
        "WebSocket by POST"
    );
    assert_eq!(status("GET", &exec(), &WEBSOCKET[..3]).await, 400, "no key");
    let forward = with(&SPDY, ("X-Stream-Protocol-Version", "v4.channel.k8s.io"));
    assert_eq!(status("GET", &node.forward(&[1]), &forward).await, 403);
    let channels = with(&WEBSOCKET, ("Sec-WebSocket-Protocol", "v4.channel.k8s.io"));
    assert_eq!(
        status("GET", &node.forward(&[]), &channels).await,
        400,
        "no ports"
    );
}

#[tokio::test]
async fn as_many_requests_wait_as_configured() {
    let config = Config {
        max_waiting: 3,
        ..Config::default()
    };
    let node = start_with(config).await;
    for _ in 0..3 {
        node.exec(OUT, &["deaf"]);
    }
    let (container, command) = (container(), vec!["x".to_owned()]);
    let request = ExecRequest {
        container,
        command,
        stdio: OUT,
    };
    let error = node.server.exec(request).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    assert_eq!(Config::default().max_waiting, 1000);
}

#[tokio::test]
async fn requests_that_no_client_could_use_are_refused() {
    let node = start().await;
    let exec = |stdio, command: &[&str]| {
        let request = ExecRequest {
            container: container(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            stdio,
        };
        node.server.exec(request).unwrap_err()
    };
    let both = Stdio {
        stderr: true,
        tty: true,
        ..IN_OUT
    };
    for (error, field) in [
        (exec(Stdio::default(), &["x"]), "stdin, stdout, stderr"),
        (exec(both, &["x"]), "stderr"),
        (exec(OUT, &[]), "cmd"),
    ] {
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().starts_with(field), "{error}");
    }
    let forward = |ports: Vec<u16>| {
        let request = PortForwardRequest { pod: pod(), ports };
        node.server.port_forward(request).unwrap_err().kind()
    };
    assert_eq!(forward(vec![80, 0]), ErrorKind::InvalidArgument);
    assert_eq!(forward(vec![80; 65]), ErrorKind::ResourceExhausted);
}

#[tokio::test]
async fn an_address_in_use_is_an_error_that_names_it() {
    let node = start().await;
    let address: SocketAddr = node.server.address();
    let config = Config {
        address,
        ..Config::default()
    };
    let error = gantry_streaming::Server::bind(config, node.memory.clone())
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}
