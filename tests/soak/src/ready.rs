//! Mode `ready`: how long a daemon that was killed takes until it answers, with many pods running.

use std::time::{Duration, Instant};

use futures::future::join_all;
use gantry_integration::{on_node, sleeper, while_unavailable};
use gantry_testkit::cri::{Client, v1};
use gantry_testkit::daemon::Options as DaemonOptions;
use gantry_testkit::stats::Summary;

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub pods: usize,
    pub rounds: usize,
}

/// Within which a daemon answers again, with any number of pods that a node has.
const LIMIT: Duration = Duration::from_secs(30);

/// Clients that make the pods.
const CLIENTS: usize = 4;

/// Runs it, and panics if a pod or container is not as it was.
pub fn run(options: Options) {
    let quiet = DaemonOptions::default().config("[log]\nlevel = \"warn\"\n");
    on_node("ready", quiet, async |node| {
        let image = node.busybox().await;
        let began = Instant::now();
        let shared = &*node;
        join_all((0..CLIENTS).map(async |client| {
            for n in (client..options.pods).step_by(CLIENTS) {
                let pod = shared.host_pod(&format!("ready-{n}")).await;
                shared.run(&pod, &sleeper("c", &image)).await;
            }
        }))
        .await;
        println!(
            "{} pods with a container each, made in {:.0?}",
            options.pods,
            began.elapsed()
        );
        let mut before = node.client.list(None).await.expect("ListContainers");
        before.sort_by(|a, b| a.id.cmp(&b.id));
        let mut seconds = Vec::new();
        for _ in 0..options.rounds {
            node.daemon.kill().expect("kill -9");
            let began = Instant::now();
            node.daemon.spawn().expect("start");
            let client = Client::connect(node.daemon.socket()).expect("client");
            let pods = loop {
                match client.list_pods(None).await {
                    Ok(pods) => break pods,
                    Err(error) => assert!(began.elapsed() < LIMIT, "{error}"),
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            };
            let took = began.elapsed();
            seconds.push(took.as_secs_f64());
            println!("answers after {took:.0?}");
            let ready = |pod: &&v1::PodSandbox| pod.state() == v1::PodSandboxState::SandboxReady;
            assert_eq!(pods.iter().filter(ready).count(), options.pods);
            let mut after = client.list(None).await.expect("ListContainers");
            after.sort_by(|a, b| a.id.cmp(&b.id));
            assert_eq!(before, after);
        }
        // The node's own connection is still to a daemon that has gone.
        while_unavailable(async || node.client.version().await)
            .await
            .expect("Version");
        let summary = Summary::of(&seconds).expect("rounds");
        println!(
            "{} pods, {} rounds: median {:.3} s, longest {:.3} s",
            options.pods, summary.n, summary.median, summary.max
        );
    });
}
