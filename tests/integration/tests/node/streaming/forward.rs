//! PortForward: addresses, and pods that do not listen.

use gantry_integration::{eventually, on_plain_node, refused};
use gantry_testkit::cri::v1;
use tonic::Code;

use super::forward;

#[test]
fn ports_lead_to_the_loopback_of_the_pod() {
    on_plain_node("ports_lead_to_the_loopback_of_the_pod", async |node| {
        let image = node.busybox().await;
        let own = node.pod("own").await;
        let hosts = node.host_pod("hosts").await;
        for (pod, address, port) in [
            (&own, "127.0.0.1", 8080),
            (&own, "[::1]", 8081),
            (&hosts, "127.0.0.1", 8082),
        ] {
            let script = format!(
                "echo of {port} > /tmp/index.html; exec httpd -f -p {address}:{port} -h /tmp"
            );
            let name = format!("httpd{port}");
            node.run_script(pod, &name, &image, &script).await;
            let ask = b"GET /index.html HTTP/1.0\r\n\r\n";
            eventually("it is served", async || {
                let mut socket = forward(node, &pod.id, port).await;
                socket.send(0, ask).ok()?;
                let text = socket.channel(0, &format!("of {port}\n"));
                // What comes first on each channel is its port.
                assert!(text.starts_with(&port.to_le_bytes()[..2]));
                String::from_utf8_lossy(&text)
                    .contains(&format!("of {port}\n"))
                    .then_some(())
            })
            .await;
        }
        // Nobody listens: both addresses are named.
        let mut socket = forward(node, &own.id, 9).await;
        let error = socket.channel(1, "111)");
        let error = String::from_utf8_lossy(&error[2..]).into_owned();
        assert!(
            error.contains("127.0.0.1:9") && error.contains("[::1]:9"),
            "{error}"
        );
        let mut client = node.client.runtime.clone();
        node.client.stop_pod(&own.id).await.unwrap();
        for (pod, port, code, says) in [
            (own.id.as_str(), 80, Code::FailedPrecondition, "not ready"),
            ("0123456789ab", 80, Code::NotFound, "0123456789ab"),
            (hosts.id.as_str(), 0, Code::InvalidArgument, "port"),
            (hosts.id.as_str(), 70_000, Code::InvalidArgument, "70000"),
            (hosts.id.as_str(), -1, Code::InvalidArgument, "-1"),
        ] {
            let request = v1::PortForwardRequest {
                pod_sandbox_id: pod.to_owned(),
                port: vec![port],
            };
            refused(client.port_forward(request).await, code, says);
        }
    });
}
