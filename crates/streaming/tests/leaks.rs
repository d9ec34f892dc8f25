//! Sessions leave nothing behind. A program of its own: it counts the process's descriptors.

#[path = "streaming/common/mod.rs"]
mod common;

use std::sync::atomic::Ordering::SeqCst;

use common::spdy::open;
use common::{IN_OUT, TERMINAL, start, until};

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn tasks() -> usize {
    tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks()
}

#[tokio::test]
async fn a_thousand_attached_clients_that_drop_leave_no_task_and_no_descriptor() {
    let node = start().await;
    let (fds, alive) = (descriptors(), tasks());
    for round in 0..10 {
        for n in 0..100 {
            let mut client = open(&node.attach(IN_OUT), &["error", "stdin", "stdout"]).await;
            // Some are gone before all is set up, some in the middle.
            if n % 2 == 0 {
                client.until(|c| c.text(5) == "attached\n").await;
            }
        }
        until("all over", || tasks() <= alive && descriptors() <= fds).await;
        let (begun, ended) = (&node.memory.begun, &node.memory.ended);
        assert_eq!(begun.load(SeqCst), ended.load(SeqCst), "round {round}");
    }
}

/// A terminal nobody listens to, as that of a command that has ended or hangs.
#[tokio::test]
async fn a_thousand_sizes_that_nobody_takes_are_no_queue() {
    let node = start().await;
    let types = ["error", "stdin", "stdout", "resize"];
    let mut client = open(&node.exec(TERMINAL, &["deaf"]), &types).await;
    for n in 0..1000 {
        client
            .send(7, format!("{{\"Width\":{n},\"Height\":{n}}}").as_bytes())
            .await;
    }
    client.ping(1).await;
    client.until(|c| !c.pongs.is_empty()).await;
    drop(client);
    until("gone", || node.memory.gone.load(SeqCst) == 1).await;
}
