//! Requests that cannot be served.

use gantry_integration::{on_plain_node, refused, sleeper, streaming};
use gantry_testkit::cri::v1;
use tonic::Code;

use super::{Stdio, V5, attach_request, exec_request, idle};

#[test]
fn what_cannot_be_streamed_is_refused() {
    on_plain_node("what_cannot_be_streamed_is_refused", async |node| {
        let (pod, id) = idle(node, "refused").await;
        let mut client = node.client.runtime.clone();
        let good = exec_request(&id, "true", Stdio::default());
        let with = |change: fn(&mut v1::ExecRequest)| {
            let mut request = good.clone();
            change(&mut request);
            request
        };
        for (request, says) in [
            (with(|r| r.cmd.clear()), "cmd"),
            (with(|r| r.tty = true), "stderr"),
            (with(|r| (r.stdout, r.stderr) = (false, false)), "stdin"),
        ] {
            refused(client.exec(request).await, Code::InvalidArgument, says);
        }
        let mut none = attach_request(&id, Stdio::default());
        (none.stdout, none.stderr) = (false, false);
        refused(client.attach(none).await, Code::InvalidArgument, "stdin");
        let unknown = with(|r| r.container_id = "0123456789ab".to_owned());
        refused(client.exec(unknown).await, Code::NotFound, "0123456789ab");
        // Between URL and client the container may end.
        let url = client.exec(good.clone()).await.unwrap().into_inner().url;
        assert!(url.starts_with("http://127.0.0.1:"), "{url}");
        node.client.stop(&id, 0).await.unwrap();
        let mut socket = streaming::connect(node.daemon.netns(), &url, V5).unwrap();
        let result = socket.rest().result.to_string();
        assert!(result.contains("not running"), "{result}");
        refused(
            client.exec(good).await,
            Code::FailedPrecondition,
            "not running",
        );
        // One that was never started.
        let image = node.busybox().await;
        let created = node.create(&pod, &sleeper("created", &image)).await;
        let request = exec_request(&created, "true", Stdio::default());
        refused(
            client.exec(request).await,
            Code::FailedPrecondition,
            "not running",
        );
    });
}
