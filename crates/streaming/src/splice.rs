//! Moves bytes between a forwarded connection and a socket in the pod.

use std::io;
use std::pin::pin;
use std::time::Duration;

use futures::FutureExt;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::backend::{Duplex, Input, Output};

/// Bytes that are read from the pod, or taken from the client, at a time. The memory for them is
/// there only while they move: a session may have many connections on which nothing does.
const BUFFER: usize = 64 * 1024;

/// What was moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    pub to_pod: u64,
    pub to_client: u64,
}

/// Moves bytes both ways, with half-closes, until both are done.
///
/// A pod that closes its end or reads no more does not end what comes from it. Once it has said all,
/// a connection on which nothing moves for `stall` is over; what the client did not take by then
/// makes it a reset. Fails when the pod's end breaks, and with `TimedOut` after such a reset.
pub async fn splice(stream: Duplex, mut pod: TcpStream, stall: Duration) -> io::Result<Moved> {
    let channel = stream.channel();
    let (mut input, mut output) = stream.into_split();
    let (read, mut write) = pod.split();
    let (said_all, mut said) = watch::channel(false);
    let mut moved = Moved::default();
    let done = {
        let from_client = to_pod(&mut input, &mut write, &mut said, stall, &mut moved.to_pod);
        let from_pod = async {
            let done = to_client(&read, &mut output, stall, &mut moved.to_client).await;
            // Received by the other direction, which may be over.
            said_all.send_replace(true);
            done
        };
        let (mut from_client, mut from_pod) = (pin!(from_client), pin!(from_pod));
        tokio::select! {
            () = &mut from_client => from_pod.await,
            done = &mut from_pod => {
                if done.is_ok() {
                    from_client.await;
                }
                done
            }
        }
    };
    if done
        .as_ref()
        .is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
    {
        channel.abort();
    }
    done.map(|()| moved)
}

/// Until the client's half-close, which the pod is told, or either is gone.
async fn to_pod(
    input: &mut Input,
    pod: &mut WriteHalf<'_>,
    said_all: &mut watch::Receiver<bool>,
    stall: Duration,
    moved: &mut u64,
) {
    loop {
        // One step: it moves something, or waits until the pod has said all and then for so long.
        let step = async {
            let bytes = input.receive(BUFFER).await.ok().flatten();
            let Some(mut bytes) = bytes else {
                // A pod that has closed its end already need not be told.
                let _ = pod.shutdown().await;
                return false;
            };
            *moved += bytes.len() as u64;
            // It reads no more: what it says still counts.
            pod.write_all_buf(&mut bytes).await.is_ok()
        };
        let late = async {
            // The sender outlives this.
            let _ = said_all.wait_for(|said| *said).await;
            sleep(stall).await;
        };
        tokio::select! {
            go_on = step => if !go_on { return },
            () = late => return,
        }
    }
}

/// Until the pod's half-close, which the client is told after all that was said before.
async fn to_client(
    pod: &ReadHalf<'_>,
    output: &mut Output,
    stall: Duration,
    moved: &mut u64,
) -> io::Result<()> {
    loop {
        pod.readable().await?;
        let mut buffer = Vec::with_capacity(BUFFER);
        loop {
            match pod.try_read_buf(&mut buffer) {
                Ok(0) => return output.shutdown().await,
                Ok(count) => *moved += count as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
            let mut rest = &buffer[..];
            while !rest.is_empty() {
                match timeout(stall, output.write(rest)).await {
                    Ok(count) => rest = &rest[count?..],
                    Err(_) if has_closed(pod) => {
                        let what = "the client does not take what the pod has sent";
                        return Err(io::Error::new(io::ErrorKind::TimedOut, what));
                    }
                    // A pod that may still say more has a client that may still come back to it.
                    Err(_) => {}
                }
            }
            buffer.clear();
        }
    }
}

/// Whether the pod sends no more than what waits. Its end is not to be seen yet while more waits
/// before it than our socket holds: then only the session's idle time bounds the client's.
fn has_closed(pod: &ReadHalf<'_>) -> bool {
    let ready = pod.ready(Interest::READABLE).now_or_never();
    ready.is_some_and(|ready| ready.is_ok_and(|ready| ready.is_read_closed()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{Channel, OUTGOING};
    use bytes::BytesMut;
    use std::sync::Arc;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;
    use tokio::sync::Notify;
    use tokio::task::JoinHandle;

    type Splicing = JoinHandle<io::Result<Moved>>;

    /// A forwarded connection: the client's side of it, and the pod's.
    async fn forward(stall: Duration) -> (Arc<Channel>, TcpStream, Splicing) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap());
        let (near, far) = tokio::join!(near, listener.accept());
        let (channel, input, output) = Channel::new(Arc::new(Notify::new()));
        let splicing = tokio::spawn(splice(Duplex::new(input, output), near.unwrap(), stall));
        (channel, far.unwrap().0, splicing)
    }

    const LONG: Duration = Duration::from_secs(60);

    /// All that comes until the end.
    async fn all(channel: &Channel) -> Vec<u8> {
        let mut out = BytesMut::new();
        loop {
            channel.pull(usize::MAX, &mut out);
            let pending = channel.pending();
            if pending.finished && pending.bytes == 0 {
                return out.to_vec();
            }
            sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn each_direction_has_its_own_end() {
        let (channel, mut pod, splicing) = forward(LONG).await;
        channel.deliver(&[7; 100_000]);
        channel.finish_incoming();
        let mut received = Vec::new();
        pod.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, [7; 100_000]);
        let sent = vec![8; 1_000_000];
        let (taken, ()) = tokio::join!(all(&channel), async {
            pod.write_all(&sent).await.unwrap();
            pod.shutdown().await.unwrap();
        });
        assert!(taken == sent);
        let moved = splicing.await.unwrap().unwrap();
        assert_eq!((moved.to_pod, moved.to_client), (100_000, 1_000_000));
    }

    /// A server that answers before it has read the whole question, and hangs up.
    #[tokio::test]
    async fn a_pod_that_reads_no_more_is_heard_to_its_end() {
        let (channel, mut pod, splicing) = forward(LONG).await;
        channel.deliver(&[7; 1000]);
        pod.read_exact(&mut [0; 1000]).await.unwrap();
        let sent = vec![8; 50_000];
        pod.write_all(&sent).await.unwrap();
        drop(pod);
        for _ in 0..100 {
            channel.deliver(&[7; 100]);
            tokio::task::yield_now().await;
        }
        channel.finish_incoming();
        assert!(all(&channel).await == sent);
        // The pod's reset comes after all that was said before.
        if let Err(error) = splicing.await.unwrap() {
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
    }

    #[tokio::test]
    async fn what_nobody_takes_of_a_pod_that_has_ended_is_given_up() {
        let stall = Duration::from_millis(200);
        let (channel, mut pod, splicing) = forward(stall).await;
        // Its end is behind these, and comes as far as our socket only if they do.
        pod.write_all(&vec![8; OUTGOING + BUFFER + 20_000])
            .await
            .unwrap();
        // As long as the pod may go on, its client may take its time.
        sleep(stall * 3).await;
        assert!(!splicing.is_finished());
        assert_eq!(channel.pending().bytes, OUTGOING);
        drop(pod);
        let error = splicing.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // The client is not to take a part for the whole.
        assert!(channel.pending().aborted);
    }

    #[tokio::test]
    async fn a_client_that_says_nothing_to_a_pod_that_has_ended_is_given_up() {
        let (channel, pod, splicing) = forward(Duration::from_millis(200)).await;
        drop(pod);
        splicing.await.unwrap().unwrap();
        assert!(channel.pending().finished && !channel.pending().aborted);
    }
}
