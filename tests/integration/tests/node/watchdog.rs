//! systemd's watchdog: a ping means that a call came through and the store answers.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use gantry_integration::{Node, on_node};
use gantry_testkit::daemon::{Options, has_failpoints};

/// What systemd is told to wait for.
const LIMIT: Duration = Duration::from_secs(2);

/// No answer may be waited for longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// systemd's end of NOTIFY_SOCKET.
struct Manager {
    socket: UnixDatagram,
    _dir: tempfile::TempDir,
}

impl Manager {
    fn new(options: Options) -> (Self, Options) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let options = options
            .env("NOTIFY_SOCKET", path.to_str().unwrap())
            .env("TOKIO_WORKER_THREADS", "1");
        (Self { socket, _dir: dir }, options)
    }

    fn watching(options: Options) -> (Self, Options) {
        let (manager, options) = Self::new(options);
        let limit = LIMIT.as_micros().to_string();
        (manager, options.env("WATCHDOG_USEC", &limit))
    }

    /// The next message; `None` if none comes within `limit`.
    fn next(&self, limit: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(limit)).unwrap();
        let mut buffer = [0; 4096];
        match self.socket.recv(&mut buffer) {
            Ok(length) => Some(String::from_utf8(buffer[..length].to_vec()).unwrap()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn waits_for(&self, word: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self
            .next(PATIENCE)
            .is_some_and(|message| message.contains(word))
        {
            assert!(Instant::now() < deadline, "no {word}");
        }
    }

    /// Drops what has come.
    fn forget(&self) {
        while self.next(Duration::from_millis(1)).is_some() {}
    }

    /// Whether no ping comes for longer than systemd would wait.
    fn falls_silent(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.next(LIMIT * 2).is_some() {
            assert!(Instant::now() < deadline, "it pings all the same");
        }
    }
}

fn skipped(name: &str) -> bool {
    let built = matches!(has_failpoints(), Ok(true));
    if !built {
        println!("SKIP {name}: gantryd is built without its feature failpoints");
    }
    !built
}

#[test]
fn the_watchdog_is_told_that_all_is_well_after_ready() {
    let (manager, options) = Manager::watching(Options::default());
    on_node(
        "the_watchdog_is_told_that_all_is_well_after_ready",
        options,
        async |_| {
            let mut before = Vec::new();
            loop {
                let message = manager.next(PATIENCE).expect("a message");
                if message.contains("WATCHDOG=1") {
                    break;
                }
                before.push(message);
            }
            // During recovery more time is asked for.
            assert!(
                before
                    .iter()
                    .any(|message| message.contains("EXTEND_TIMEOUT_USEC="))
            );
            assert!(before.last().unwrap().contains("READY=1"), "{before:?}");
            for _ in 0..3 {
                manager.waits_for("WATCHDOG=1");
            }
        },
    );
}

#[test]
fn without_a_watchdog_there_are_no_pings() {
    let (manager, options) = Manager::new(Options::default());
    on_node(
        "without_a_watchdog_there_are_no_pings",
        options,
        async |_| {
            manager.waits_for("READY=1");
            assert_eq!(manager.next(LIMIT), None);
        },
    );
}

async fn stuck_in(node: &Node, manager: &Manager) {
    let pod = node.pod("p").await;
    manager.waits_for("WATCHDOG=1");
    let (client, id) = (node.client.clone(), pod.id.clone());
    let stop = tokio::spawn(async move { client.stop_pod(&id).await });
    manager.falls_silent();
    assert!(!stop.is_finished());
    stop.abort();
}

#[test]
fn the_watchdog_hears_nothing_of_a_runtime_whose_workers_are_stuck() {
    const NAME: &str = "the_watchdog_hears_nothing_of_a_runtime_whose_workers_are_stuck";
    if skipped(NAME) {
        return;
    }
    let options = Options::default().env("FAILPOINTS", "network::before-release=sleep(600000)");
    let (manager, options) = Manager::watching(options);
    on_node(NAME, options, async |node| {
        stuck_in(node, &manager).await;
        // The restart helps: the next one finishes what was asked for.
        node.kill_without_failpoints().await;
        node.remove_pods().await;
        node.assert_clean_but_daemon();
        node.accept_now();
    });
}

#[test]
fn the_watchdog_hears_nothing_of_a_store_that_does_not_answer() {
    const NAME: &str = "the_watchdog_hears_nothing_of_a_store_that_does_not_answer";
    if skipped(NAME) {
        return;
    }
    let options = Options::default().env("FAILPOINTS", "store::probed=1*off->sleep(600000)");
    let (manager, options) = Manager::watching(options);
    on_node(NAME, options, async |node| {
        manager.waits_for("WATCHDOG=1");
        manager.falls_silent();
        // It is only systemd that is not told: what does not need the store goes on.
        node.client.version().await.unwrap();
        node.client.list_pods(None).await.unwrap();
        node.kill_without_failpoints().await;
        node.accept_now();
    });
}

#[test]
fn a_disk_that_hangs_is_no_reason_for_the_watchdog() {
    const NAME: &str = "a_disk_that_hangs_is_no_reason_for_the_watchdog";
    if skipped(NAME) {
        return;
    }
    // The store's look-ups wait too, as they would behind a lock that is held across the flush.
    let failpoints = "store::written=1*off->sleep(600000);store::probed=1*off->sleep(600000)";
    let (manager, options) = Manager::watching(Options::default().env("FAILPOINTS", failpoints));
    on_node(NAME, options, async |node| {
        manager.waits_for("WATCHDOG=1");
        let (client, config) = (node.client.clone(), node.pod_config("p"));
        let run = tokio::spawn(async move { client.run_pod(&config).await });
        // The second flush and the second look-up hang; of what follows each is a ping.
        manager.forget();
        for _ in 0..5 {
            manager.waits_for("WATCHDOG=1");
        }
        run.abort();
        node.kill_without_failpoints().await;
        node.remove_pods().await;
        node.assert_clean_but_daemon();
        node.accept_now();
    });
}
