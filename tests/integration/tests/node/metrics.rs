//! What Prometheus is told: true counts after real traffic, and a server that nobody can hurt.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_integration::metrics::{Samples, ask, get, scrape};
use gantry_integration::{
    Fault, Node, eventually, on_failing_node, on_node, on_plain_node, sleeper,
};
use gantry_testkit::daemon::Options;

/// A node with metrics on a unix socket, which is returned with the directory that it lies in.
fn with_socket(options: Options) -> (tempfile::TempDir, PathBuf, Options) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("metrics.sock");
    let config = format!("{}[metrics]\naddress = {socket:?}\n", options.config);
    let options = options.config(&config);
    (dir, socket, options)
}

async fn until(socket: &Path, what: &str, holds: impl Fn(&Samples) -> bool) -> Samples {
    eventually(what, async || {
        let samples = scrape(socket);
        holds(&samples).then_some(samples)
    })
    .await
}

#[test]
fn metrics_tell_what_has_happened() {
    const NAME: &str = "metrics_tell_what_has_happened";
    let (_dir, socket, options) = with_socket(Options::default());
    on_node(NAME, options, async |node| {
        let before = scrape(&socket);
        assert_eq!(before.of("gantry_ready"), 1.0);
        assert_eq!(before.of("gantry_pods{state=ready}"), 0.0);

        let image = node.busybox().await;
        let pod = node.pod("p").await;
        let id = node.run(&pod, &sleeper("c", &image)).await;
        let missing = node.client.status("0".repeat(64).as_str()).await;
        assert!(missing.is_err());

        let run = "gantry_rpcs_total{service=RuntimeService,method=RunPodSandbox,code=OK}";
        let samples = until(&socket, "the calls are counted", |samples| {
            samples.get(run) == Some(1.0)
        })
        .await;
        assert_eq!(samples.of("gantry_pods{state=ready}"), 1.0);
        assert_eq!(samples.of("gantry_containers{state=running}"), 1.0);
        assert_eq!(samples.of("gantry_images"), 1.0);
        assert_eq!(samples.of("gantry_pull_duration_seconds_count"), 1.0);
        assert_eq!(
            samples.of(
                "gantry_rpcs_total{service=RuntimeService,method=ContainerStatus,code=NotFound}"
            ),
            1.0
        );
        assert!(
            samples
                .of("gantry_rpc_duration_seconds_sum{service=RuntimeService,method=RunPodSandbox}")
                > 0.0
        );
        for step in [
            "run pod",
            "start shim",
            "network ADD",
            "create container",
            "start container",
        ] {
            let series = format!("gantry_step_duration_seconds_count{{step={step},handler=runc}}");
            assert_eq!(samples.of(&series), 1.0, "{step}");
            let series = format!("gantry_step_failures_total{{step={step},handler=runc}}");
            assert_eq!(samples.of(&series), 0.0, "{step}");
        }
        assert!(samples.of("gantry_store_flush_duration_seconds_count") > 0.0);
        assert_eq!(samples.of("gantry_store_flush_failures_total"), 0.0);
        assert!(samples.of("process_resident_memory_bytes") > 1e6);
        assert!(samples.of("process_open_fds") > 3.0);

        // A plugin that fails is counted where it failed.
        node.daemon.plugin_faults().set("ADD", Fault::Fail);
        let config = node.pod_config("unlucky");
        assert!(node.client.run_pod(&config).await.is_err());
        node.daemon.plugin_faults().clear("ADD");
        let failed = "gantry_step_failures_total{step=network ADD,handler=runc}";
        until(&socket, "the failure is counted", |samples| {
            samples.of(failed) == 1.0
        })
        .await;

        // So is the death of a shim.
        node.outlives_shim(&pod, &[&id]).await;
        node.kill_shim(&pod).await;
        node.adopted(&pod, 1).await;
        until(&socket, "the adoption is counted", |samples| {
            samples.of("gantry_shim_adoptions_total") == 1.0
        })
        .await;

        node.client.stop(&id, 0).await.unwrap();
        let samples = until(&socket, "the stop is counted", |samples| {
            samples.get("gantry_step_duration_seconds_count{step=stop container,handler=runc}")
                == Some(1.0)
        })
        .await;
        assert_eq!(samples.of("gantry_containers{state=exited}"), 1.0);

        assert!(node.daemon.terminate().unwrap().success());
        assert!(!socket.exists(), "it would be stale");
        node.start_again(&[]).await;
        until(&socket, "metrics are served", |samples| {
            samples.get("gantry_ready") == Some(1.0)
        })
        .await;
    });
}

/// Calls of a method that nobody serves, which a client may name as it likes.
async fn call_nonsense(socket: &Path, times: u32) {
    for n in 0..times {
        let path = socket.to_owned();
        let channel = tonic::transport::Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move {
                    let stream = tokio::net::UnixStream::connect(path).await?;
                    Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
                }
            }))
            .await
            .unwrap();
        let mut grpc = tonic::client::Grpc::new(channel);
        grpc.ready().await.unwrap();
        let path = format!("/a.Service/Method{n}").parse().unwrap();
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        let answer = grpc.unary(tonic::Request::new(()), path, codec).await;
        assert_eq!(answer.unwrap_err().code(), tonic::Code::Unimplemented);
    }
}

#[test]
fn a_client_cannot_make_series() {
    const NAME: &str = "a_client_cannot_make_series";
    let (_dir, socket, options) = with_socket(Options::default());
    on_node(NAME, options, async |node| {
        call_nonsense(node.daemon.socket(), 1).await;
        let other = "gantry_rpcs_total{service=other,method=other,code=Unimplemented}";
        let before = until(&socket, "it is counted", |samples| {
            samples.get(other) == Some(1.0)
        })
        .await;
        call_nonsense(node.daemon.socket(), 20).await;
        let after = until(&socket, "they are counted", |samples| {
            samples.of(other) == 21.0
        })
        .await;
        assert_eq!(before.len(), after.len());
    });
}

#[test]
fn metrics_are_off_until_configured() {
    on_plain_node("metrics_are_off_until_configured", async |node| {
        let connected = node
            .daemon
            .netns()
            .run(|| TcpStream::connect("127.0.0.1:9464"))
            .unwrap();
        assert!(connected.is_err());
    });
}

fn tcp(node: &Node) -> TcpStream {
    let connect = || TcpStream::connect("127.0.0.1:9464");
    let stream = node.daemon.netns().run(connect).unwrap().unwrap();
    let limit = Some(Duration::from_secs(120));
    stream.set_read_timeout(limit).unwrap();
    stream
}

#[test]
fn the_metrics_endpoint_serves_one_thing_and_bounds_its_clients() {
    const NAME: &str = "the_metrics_endpoint_serves_one_thing_and_bounds_its_clients";
    let options = Options::default().config("[metrics]\naddress = \"127.0.0.1:9464\"\n");
    on_node(NAME, options, async |node| {
        for (request, status) in [
            (get("/metrics"), 200),
            (get("/metrics?x=y"), 200),
            (get("/"), 404),
            (get("/metrics/.."), 404),
            (
                "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".to_owned(),
                405,
            ),
            ("nonsense\r\n\r\n".to_owned(), 400),
        ] {
            assert_eq!(ask(&mut tcp(node), &request).0, status, "{request}");
        }
        // A head that does not end.
        let mut stream = tcp(node);
        let endless = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n", "y".repeat(64 << 10));
        // It may be refused before it is all written.
        let _ = stream.write_all(endless.as_bytes());
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");

        // Clients that never end their request: more than there are places for.
        let mut slow: Vec<_> = (0..100).map(|_| tcp(node)).collect();
        for stream in &mut slow {
            // One whose place was taken is closed.
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\n");
        }
        let (status, text) = ask(&mut tcp(node), &get("/metrics"));
        assert_eq!(status, 200);
        Samples::parse(&text);
        // CRI is served as ever, and each of them is sent away in the end.
        node.client.version().await.unwrap();
        for mut stream in slow {
            let mut answer = Vec::new();
            let ended = stream
                .read_to_end(&mut answer)
                .map_err(|error| error.kind());
            // Closed or reset, and not left open until we no longer wait.
            assert_ne!(ended, Err(std::io::ErrorKind::WouldBlock));
            assert!(!answer.starts_with(b"HTTP/1.1 200"));
        }
    });
}

#[test]
fn metrics_are_served_during_recovery() {
    const NAME: &str = "metrics_are_served_during_recovery";
    on_failing_node(NAME, "", async |node| {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("metrics.sock");
        let config = format!("[metrics]\naddress = {socket:?}\n");
        std::fs::write(node.daemon.path("conf.d/20-metrics.toml"), config).unwrap();
        let pod = node.host_pod("p").await;
        node.daemon.kill().unwrap();
        // Its first call of the shim waits, and a worker with it, until that daemon is killed.
        let held = [
            ("FAILPOINTS", "shim::before-call=1*sleep(600000)"),
            ("TOKIO_WORKER_THREADS", "4"),
        ];
        node.daemon.set_env(&held);
        node.daemon.spawn().unwrap();
        let ready = |socket: &Path| {
            let mut stream = UnixStream::connect(socket).ok()?;
            let (_, text) = ask(&mut stream, &get("/metrics"));
            Some(Samples::parse(&text).of("gantry_ready"))
        };
        let first = eventually("metrics are served", async || ready(&socket)).await;
        assert_eq!(first, 0.0, "while the pod is recovered");
        node.kill_without_failpoints().await;
        eventually("it says so", async || {
            (ready(&socket) == Some(1.0)).then_some(())
        })
        .await;
        gantry_integration::while_unavailable(async || node.client.version().await)
            .await
            .unwrap();
        assert!(node.pod_is_ready(&pod.id).await);
        node.remove_pods().await;
        node.assert_clean_but_daemon();
        node.accept_now();
    });
}
