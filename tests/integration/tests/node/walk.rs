//! The walking path: pull, pod, container, exec, log, stop, remove.

use gantry_integration::{on_plain_node, sleeper};

#[test]
fn a_pod_lives_and_is_gone_without_a_trace() {
    on_plain_node("a_pod_lives_and_is_gone_without_a_trace", async |node| {
        let image = node.busybox().await;
        let pod = node.pod("walk").await;
        assert!(node.pod_is_ready(&pod.id).await);
        let id = node.run(&pod, &sleeper("c", &image)).await;
        assert!(node.is_running(&id).await);
        assert_eq!(node.sh(&id, "echo hello").await, "hello");
        node.client.stop(&id, 10).await.unwrap();
        let status = node.exited(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
        node.client.remove(&id).await.unwrap();
        node.client.stop_pod(&pod.id).await.unwrap();
        assert!(!node.pod_is_ready(&pod.id).await);
        node.client.remove_pod(&pod.id).await.unwrap();
    });
}
