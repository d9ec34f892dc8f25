//! Flow control: clients that keep windows and clients that do not.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use crate::common::spdy::{control, open};
use crate::common::{IN_OUT, OUT, noise, sha256, start};

/// What the specification gives a stream and a session before anything is said.
const INITIAL: usize = 65_536;

#[tokio::test]
async fn the_servers_windows_are_announced_and_given_back() {
    let node = start().await;
    let mut client = open(&node.exec(IN_OUT, &["sum"]), &["error", "stdin", "stdout"]).await;
    client
        .until(|c| c.seen(5).replied && c.session_window > 0)
        .await;
    let window = client.settings.iter().find(|(id, _)| *id == 7).unwrap().1 as usize;
    let session = INITIAL + client.session_window;
    assert!(session >= window);
    // A client that sends no more than it may is never stuck.
    let sent = noise(3 << 20);
    let mut at = 0;
    while at < sent.len() {
        let granted = (window + client.seen(3).window).min(INITIAL + client.session_window);
        let end = granted.min(sent.len());
        assert!(end - at <= window);
        client.send(3, &sent[at..end]).await;
        at = end;
        let seen = (client.seen(3).window, client.session_window);
        if at < sent.len() {
            client
                .until(|c| c.seen(3).window > seen.0 || c.session_window > seen.1)
                .await;
        }
    }
    client.fin(3).await;
    client.finish().await;
    assert_eq!(client.text(5), sha256(&sent));
}

#[tokio::test]
async fn a_clients_stream_window_is_kept() {
    let node = start().await;
    let mut client = open(&node.exec(OUT, &["noise", "5000"]), &["error"]).await;
    client.initial_window(1000).await;
    client.open(&[("streamType", "stdout")]).await;
    client.until(|c| c.seen(3).data.len() >= 1000).await;
    client.settle().await;
    assert_eq!(client.seen(3).data.len(), 1000);
    client.window_update(3, 500).await;
    client.until(|c| c.seen(3).data.len() >= 1500).await;
    client.settle().await;
    assert_eq!(client.seen(3).data.len(), 1500);
    // A smaller initial window takes back what is not used.
    client.initial_window(900).await;
    client.window_update(3, 100).await;
    client.settle().await;
    assert_eq!(client.seen(3).data.len(), 1500);
    client.window_update(3, 1_000_000).await;
    client.finish().await;
    assert_eq!(sha256(&client.seen(3).data), sha256(&noise(5000)));
    assert_eq!(client.status(1)["status"], "Success");
}

#[tokio::test]
async fn a_clients_session_window_is_kept() {
    let node = start().await;
    let mut client = open(&node.exec(OUT, &["noise", "200000"]), &["error"]).await;
    client.initial_window(1_000_000).await;
    client.open(&[("streamType", "stdout")]).await;
    client.until(|c| c.seen(3).data.len() >= INITIAL).await;
    client.settle().await;
    assert_eq!(client.seen(3).data.len(), INITIAL);
    client.window_update(0, 1_000_000).await;
    client.finish().await;
    assert_eq!(sha256(&client.seen(3).data), sha256(&noise(200_000)));
}

/// As much as the sockets and one queue hold, and no more.
#[tokio::test]
async fn a_client_that_does_not_read_holds_no_more_than_queues() {
    let node = start().await;
    let client = open(&node.exec(OUT, &["flood"]), &["error", "stdout"]).await;
    let (mut last, mut quiet) = (usize::MAX, 0);
    while quiet < 10 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let written = node.memory.written.load(SeqCst);
        quiet = if written == last { quiet + 1 } else { 0 };
        last = written;
        assert!(written < 64 << 20, "no end of it");
    }
    assert!(last > 0);
    drop(client);
    crate::common::until("the end", || node.memory.ended.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn a_client_whose_windows_are_full_holds_one_queue() {
    let node = start().await;
    let mut client = open(&node.exec(OUT, &["flood"]), &["error"]).await;
    client.initial_window(10_000).await;
    client.open(&[("streamType", "stdout")]).await;
    client.until(|c| c.seen(3).data.len() >= 10_000).await;
    client.settle().await;
    let written = node.memory.written.load(SeqCst);
    assert!(written <= 10_000 + 64 * 1024, "{written}");
    client.window_update(3, 5000).await;
    client.until(|c| c.seen(3).data.len() >= 15_000).await;
    client.settle().await;
    assert_eq!(client.seen(3).data.len(), 15_000);
}

#[tokio::test]
async fn a_window_over_the_largest_ends_the_stream_or_the_session() {
    let node = start().await;
    let mut client = open(&node.exec(OUT, &["flood"]), &["error"]).await;
    client.window_update(1, 0x7fff_ffff).await;
    client.until(|c| c.seen(1).reset.is_some()).await;
    assert_eq!(client.seen(1).reset, Some(7));
    client.window_update(0, 0x7fff_ffff).await;
    client.finish().await;
    assert_eq!(client.goaway, Some(1));

    let mut client = open(&node.exec(OUT, &["flood"]), &["error"]).await;
    let huge = [
        1u32.to_be_bytes(),
        7u32.to_be_bytes(),
        u32::MAX.to_be_bytes(),
    ]
    .concat();
    client.raw(&control(4, 0, &huge)).await;
    client.finish().await;
    assert_eq!(client.goaway, Some(1));
}
