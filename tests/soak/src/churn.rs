//! Mode `churn`: pods by the thousand come and go; what the daemon takes of the machine does not
//! grow.

use std::time::Instant;

use futures::future::join_all;
use gantry_integration::{Node, eventually, on_node, sleeper};
use gantry_testkit::cri::{self, v1};
use gantry_testkit::daemon::Options as DaemonOptions;
use gantry_testkit::leakcheck::descriptors;
use gantry_testkit::process::{private_memory, threads};

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub pods: usize,
    pub clients: usize,
    /// Every so many pods has a container; 0 is none.
    pub container_every: usize,
    /// Pods between two measurements.
    pub stretch: usize,
}

/// What a pod may leave in private memory, in bytes, over a long run: nothing of any size.
const A_POD: u64 = 256;

/// What the daemon takes of the machine while there is no pod.
#[derive(Clone, Copy, Debug)]
struct Figures {
    pods: usize,
    memory: u64,
    descriptors: usize,
    threads: usize,
}

/// Runs it, and panics where something grows or is left.
pub fn run(options: Options) {
    // Every pod of a debug log would be seen in the time, and on the disk.
    let quiet = DaemonOptions::default().config("[log]\nlevel = \"warn\"\n");
    on_node("churn", quiet, async |node| {
        let image = node.busybox().await;
        let mut table = Vec::new();
        let began = Instant::now();
        let mut done = 0;
        // The first ones make what stays: threads, connections, caches.
        stretch(node, options, &image, 0, options.stretch.min(200)).await;
        table.push(measure(node, 0, usize::MAX).await);
        println!(
            "{:>8}{:>14}{:>14}{:>10}{:>10}",
            "pods", "KiB private", "descriptors", "threads", "pods/s"
        );
        while done < options.pods {
            let from = Instant::now();
            let more = options.stretch.min(options.pods - done);
            stretch(node, options, &image, done, more).await;
            done += more;
            let rate = more as f64 / from.elapsed().as_secs_f64();
            let figures = measure(node, done, table[0].descriptors).await;
            println!(
                "{:>8}{:>14}{:>14}{:>10}{rate:>10.1}",
                figures.pods,
                figures.memory >> 10,
                figures.descriptors,
                figures.threads
            );
            table.push(figures);
        }
        println!("{done} pods in {:.0?}", began.elapsed());
        assert_flat(&table);
    });
}

/// Makes and removes pods, several at a time.
async fn stretch(node: &Node, options: Options, image: &str, from: usize, pods: usize) {
    let clients = (0..options.clients).map(async |client| {
        for n in (from + client..from + pods).step_by(options.clients) {
            let name = format!("churn-{n}");
            let mut config = node.pod_config(&name);
            cri::pod_namespaces(&mut config).network = v1::NamespaceMode::Node.into();
            let pod = node.run_pod(&config).await;
            if options.container_every > 0 && n % options.container_every == 0 {
                node.run(&pod, &sleeper("c", image)).await;
            }
            node.client.stop_pod(&pod.id).await.expect("StopPodSandbox");
            node.client
                .remove_pod(&pod.id)
                .await
                .expect("RemovePodSandbox");
            std::fs::remove_dir_all(&config.log_directory).expect("log directory");
        }
    });
    join_all(clients).await;
}

async fn measure(node: &Node, pods: usize, had: usize) -> Figures {
    let daemon = node.daemon.pid().expect("a daemon");
    eventually("no descriptor is left", async || {
        (descriptors(daemon).len() <= had).then_some(())
    })
    .await;
    // Blocking threads go when they are idle for a while.
    eventually("no thread is left", async || {
        (threads(daemon).expect("threads") < 32).then_some(())
    })
    .await;
    Figures {
        pods,
        memory: private_memory(daemon).expect("memory"),
        descriptors: descriptors(daemon).len(),
        threads: threads(daemon).expect("threads"),
    }
}

/// What pods leave, those of every stretch leave; an allocator takes some more now and then, for
/// long, and then no more.
fn assert_flat(table: &[Figures]) {
    let mut stretches = table.windows(2);
    let grows = stretches.all(|pair| {
        let pods = (pair[1].pods - pair[0].pods) as u64;
        pair[1].memory >= pair[0].memory + pods * A_POD
    });
    assert!(!grows, "memory grows with each stretch: {table:?}");
    // Over the second half, when all that stays has been made.
    let (half, end) = (table[table.len() / 2], table[table.len() - 1]);
    let pods = (end.pods - half.pods) as u64;
    let allowed = half.memory + pods * A_POD + (1 << 20);
    assert!(end.memory <= allowed, "memory grows: {table:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(memory: &[u64]) -> Vec<Figures> {
        let figures = |(n, memory): (usize, &u64)| Figures {
            pods: n * 500,
            memory: *memory,
            descriptors: 9,
            threads: 9,
        };
        memory.iter().enumerate().map(figures).collect()
    }

    #[test]
    fn what_grows_once_is_no_leak() {
        assert_flat(&table(&[1 << 20, 9 << 20, 9 << 20, 9 << 20, 9 << 20]));
    }

    #[test]
    #[should_panic(expected = "memory grows with each stretch")]
    fn what_grows_with_each_stretch_is_one() {
        let step = 500 * A_POD;
        assert_flat(&table(&[0, step, 2 * step, 3 * step, 4 * step]));
    }

    #[test]
    #[should_panic(expected = "memory grows:")]
    fn what_grows_over_the_second_half_is_one() {
        assert_flat(&table(&[9 << 20, 1 << 20, 1 << 20, 2 << 20, 9 << 20]));
    }
}
