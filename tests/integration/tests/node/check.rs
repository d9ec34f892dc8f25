//! `gantryctl check`: everything has an owner, and what has none is removed under running pods.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use gantry_integration::gantryctl::Gantryctl;
use gantry_integration::{Fault, Node, Pod, on_failing_node, on_plain_node, sleeper};
use gantry_testkit::daemon::{Daemon, Options};
use gantry_testkit::netns::Netns;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A line of the table.
#[derive(Clone, Debug)]
struct Row {
    kind: String,
    what: String,
    /// `-`: nobody.
    owner: String,
    remark: String,
}

/// An address that host-local gave to a pod so long ago that nobody can still be adding it.
fn given_out(address: &Path, pod: &str) {
    fs::write(address, format!("{pod}\r\neth0")).unwrap();
    let file = fs::File::options().write(true).open(address).unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(3600);
    file.set_modified(long_ago).unwrap();
}

struct Check {
    code: i32,
    rows: Vec<Row>,
    /// The last line.
    sum: String,
}

impl Check {
    fn run(gantryctl: &Gantryctl, args: &[&str]) -> Self {
        let output = gantryctl.feed(&[&["check"], args].concat(), Vec::new());
        let text = String::from_utf8(output.stdout).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let mut lines: Vec<&str> = text.lines().collect();
        let sum = lines.pop().unwrap_or_else(|| panic!("no output: {said}"));
        let rows = lines[1..].iter().map(|line| {
            // No name has two spaces.
            let mut columns = line
                .split("  ")
                .map(str::trim)
                .filter(|text| !text.is_empty());
            let mut next = || columns.next().unwrap_or_default().to_owned();
            Row {
                kind: next(),
                what: next(),
                owner: next(),
                remark: next(),
            }
        });
        Self {
            code: output.status.code().unwrap(),
            rows: rows.collect(),
            sum: sum.to_owned(),
        }
    }

    fn orphans(&self) -> Vec<&Row> {
        self.rows.iter().filter(|row| row.owner == "-").collect()
    }

    #[track_caller]
    fn assert_clean(&self) {
        assert!(self.orphans().is_empty(), "{:#?}", self.orphans());
        assert_eq!(self.code, 0);
        let expected = format!("{} things, 0 belong to nothing", self.rows.len());
        assert!(self.sum.starts_with(&expected), "{}", self.sum);
    }

    /// Kinds of what has this owner.
    fn kinds_of(&self, owner: &str) -> BTreeSet<&str> {
        let own = self.rows.iter().filter(|row| row.owner == owner);
        own.map(|row| row.kind.as_str()).collect()
    }
}

/// An id that no object has, nor another test: what one daemon has is none of the next one's.
fn id(daemon: &Daemon, digit: char) -> String {
    let cgroup = &daemon.places().cgroup;
    let own = cgroup[cgroup.len() - 8..].repeat(8);
    format!("{digit}{}", &own[1..])
}

/// Two pods: one with a network of its own and a container, one in the host's.
struct Inhabitants {
    pod: Pod,
    container: String,
    pid: i64,
    other: Pod,
}

impl Inhabitants {
    async fn of(node: &Node) -> Self {
        let image = node.busybox().await;
        let pod = node.pod("one").await;
        let container = node.run(&pod, &sleeper("c", &image)).await;
        node.create(&pod, &sleeper("created", &image)).await;
        let other = node.host_pod("other").await;
        let exited = node.run_script(&other, "exited", &image, "exit 3").await;
        node.exited(&exited).await;
        let pid = node.container_info(&container).await["pid"]
            .as_i64()
            .unwrap();
        Self {
            pod,
            container,
            pid,
            other,
        }
    }

    /// They live on, and notice nothing.
    async fn assert_well(&self, node: &Node) {
        assert!(node.pod_is_ready(&self.pod.id).await && node.pod_is_ready(&self.other.id).await);
        assert_eq!(
            node.sh(&self.container, "cat /etc/hostname >/dev/null; echo x")
                .await,
            "x"
        );
        let info = node.container_info(&self.container).await;
        assert_eq!(info["pid"].as_i64(), Some(self.pid));
        assert_eq!(node.client.list(None).await.unwrap().len(), 3);
        assert!(!node.ip(&self.pod).await.is_empty());
    }
}

#[test]
fn everything_on_a_node_has_an_owner() {
    const NAME: &str = "everything_on_a_node_has_an_owner";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        let empty = Check::run(&gantryctl, &[]);
        empty.assert_clean();
        assert_eq!(empty.rows.len(), 1, "the daemon alone: {:?}", empty.rows);
        let all = Inhabitants::of(node).await;
        let view = node.daemon.path("view");
        fs::create_dir(&view).unwrap();
        let view = view.display().to_string();
        let image = node.client.list_images().await.unwrap().remove(0).id;
        assert_eq!(gantryctl.image(&["mount", &image, &view]).0, 0);
        for repair in [&[][..], &["--repair"]] {
            let check = Check::run(&gantryctl, repair);
            check.assert_clean();
            assert!(
                check.rows.iter().all(|row| row.remark.is_empty()),
                "{:?}",
                check.rows
            );
            let has = |kind: &str, what: &str, owner: &str| {
                let mut rows = check.rows.iter();
                let found =
                    rows.any(|row| row.kind == kind && row.what == what && row.owner == owner);
                assert!(found, "{kind} {what} of {owner} in {:#?}", check.rows);
            };
            let pod = format!("pod {} test/one", &all.pod.id[..13]);
            let container = format!("container {} test/one/c", &all.container[..13]);
            let info = node.pod_info(&all.pod.id).await;
            let places = node.daemon.places();
            let path = |path: PathBuf| path.display().to_string();
            has("process", &format!("{} gantry-shim", info["shimPid"]), &pod);
            has("attachment", &node.ip(&all.pod).await, &pod);
            has(
                "netns",
                &path(places.netns_dir.join(format!("gantry-{}", all.pod.id))),
                &pod,
            );
            has(
                "directory",
                &path(places.state.join("pods").join(&all.pod.id)),
                &pod,
            );
            has(
                "mount",
                &path(places.state.join("pods").join(&all.pod.id).join("shm")),
                &pod,
            );
            has(
                "cgroup",
                &format!("/{}/{}", places.cgroup, all.container),
                &container,
            );
            has(
                "cgroup",
                &format!("/{}/{}", places.cgroup, all.pod.id),
                &pod,
            );
            has(
                "cgroup",
                &format!("/{}/shims/{}", places.cgroup, &all.pod.id[..32]),
                &pod,
            );
            let bundle = places.state.join("containers").join(&all.container);
            has("directory", &path(bundle.clone()), &container);
            has("mount", &path(bundle.join("rootfs")), &container);
            let state = places.state.join("runtime/runc").join(&all.container);
            has("runtime", &path(state), &container);
            has(
                "snapshot",
                &format!("overlayfs {}", all.container),
                &container,
            );
            has("mount", &view, &format!("image {image}"));
            let kinds = [
                "attachment",
                "cgroup",
                "directory",
                "mount",
                "netns",
                "process",
            ];
            assert_eq!(check.kinds_of(&pod), BTreeSet::from(kinds));
            let kinds = [
                "cgroup",
                "directory",
                "mount",
                "process",
                "runtime",
                "snapshot",
            ];
            assert_eq!(check.kinds_of(&container), BTreeSet::from(kinds));
            let mut processes = check.rows.iter().filter(|row| row.owner == container);
            assert!(processes.any(|row| row.what.starts_with(&format!("{} ", all.pid))));
            all.assert_well(node).await;
        }
        assert_eq!(gantryctl.image(&["unmount", &view]).0, 0);
        node.remove_pods().await;
        let left = Check::run(&gantryctl, &[]);
        left.assert_clean();
        assert_eq!(left.rows.len(), 1, "{:?}", left.rows);
        node.daemon.kill().unwrap();
        let output = gantryctl.feed(&["check"], Vec::new());
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("connect to"));
        node.start_again(&[]).await;
        node.accept_now();
    });
}

/// Things that look like gantryd's and that no pod has ever had.
struct Planted {
    /// Kind and name of each.
    things: BTreeSet<(String, String)>,
    /// What repair must not follow links to.
    outside: PathBuf,
    /// In a cgroup, and with the log of a shim that has nothing else.
    sleepers: [Child; 2],
    _netns: Netns,
}

impl Planted {
    fn on(daemon: &Daemon) -> Self {
        let places = daemon.places();
        let mut things = BTreeSet::new();
        let mut add = |kind: &str, name: &str| things.insert((kind.to_owned(), name.to_owned()));
        let text = |path: &Path| path.display().to_string();

        let mut sleeper = Command::new("sleep");
        let sleeper = sleeper.arg("1000").spawn().unwrap();
        for root in places.cgroup_roots() {
            let dir = root.join(id(daemon, '1')).join("below");
            fs::create_dir_all(&dir).unwrap();
            // A hierarchy whose controller must be set up first takes none.
            let _ = fs::write(dir.join("cgroup.procs"), sleeper.id().to_string());
            fs::create_dir_all(root.join(id(daemon, '2'))).unwrap();
            fs::create_dir_all(root.join("shims").join(&id(daemon, '3')[..32])).unwrap();
        }
        add("process", &format!("{} sleep", sleeper.id()));
        add("cgroup", &format!("/{}/{}", places.cgroup, id(daemon, '1')));
        add("cgroup", &format!("/{}/{}", places.cgroup, id(daemon, '2')));
        add(
            "cgroup",
            &format!("/{}/shims/{}", places.cgroup, &id(daemon, '3')[..32]),
        );

        let (program, dir) = (
            daemon.path("gantry-shim"),
            places.state.join("pods").join(id(daemon, 'b')),
        );
        fs::copy("/bin/sleep", &program).unwrap();
        fs::create_dir(&dir).unwrap();
        let log = fs::File::create(dir.join("shim.log")).unwrap();
        let mut shim = Command::new(&program);
        let shim = shim.arg("1000").stderr(log).spawn().unwrap();
        fs::remove_dir_all(&dir).unwrap();
        add("process", &format!("{} gantry-shim", shim.id()));

        let bundle = places.state.join("containers").join(id(daemon, '4'));
        let rootfs = bundle.join("rootfs");
        for _ in 0..2 {
            fs::create_dir_all(&rootfs).unwrap();
            tmpfs(&rootfs);
        }
        fs::create_dir(rootfs.join("in")).unwrap();
        tmpfs(&rootfs.join("in"));
        add("directory", &text(&bundle));
        add("mount", &text(&rootfs));
        add("mount", &text(&rootfs.join("in")));

        let netns =
            Netns::make(&places.netns_dir.join(format!("gantry-{}", id(daemon, '5')))).unwrap();
        add("netns", &text(netns.path()));
        let addresses = places.ipam_dir.join("gantry-test");
        for (pod, address) in [
            (id(daemon, '5'), "10.127.0.5"),
            (id(daemon, '6'), "10.127.0.6"),
        ] {
            given_out(&addresses.join(address), &pod);
            add("attachment", address);
        }

        let dir = places.state.join("pods").join(id(daemon, '7'));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("shim.log"), "x").unwrap();
        add("directory", &text(&dir));
        let outside = daemon.path("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "x").unwrap();
        for link in ["pods", "containers", "runtime/runc"] {
            let link = places.state.join(link).join(id(daemon, '8'));
            std::os::unix::fs::symlink(&outside, &link).unwrap();
            let kind = if link.starts_with(places.state.join("runtime")) {
                "runtime"
            } else {
                "directory"
            };
            add(kind, &text(&link));
        }

        let state = places.state.join("runtime/runc").join(id(daemon, '9'));
        fs::create_dir(&state).unwrap();
        fs::write(state.join("x"), "x").unwrap();
        add("runtime", &text(&state));
        fs::create_dir_all(
            places
                .root
                .join("overlayfs/snapshots")
                .join(id(daemon, 'a'))
                .join("fs"),
        )
        .unwrap();
        add("snapshot", &format!("overlayfs {}", id(daemon, 'a')));
        for n in [1, 2] {
            let store = places.root.join(format!("store.damaged-{n}"));
            fs::create_dir(&store).unwrap();
            fs::write(store.join("db"), "x").unwrap();
            // Which came last is told by their times.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        add("store", &text(&places.root.join("store.damaged-1")));
        Self {
            things,
            outside,
            sleepers: [sleeper, shim],
            _netns: netns,
        }
    }

    fn assert_all_in(&self, rows: &[&Row]) {
        let found = rows.iter().map(|row| (row.kind.clone(), row.what.clone()));
        assert_eq!(found.collect::<BTreeSet<_>>(), self.things);
    }
}

fn tmpfs(point: &Path) {
    let none = None::<&str>;
    mount(
        Some("planted"),
        point,
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )
    .unwrap();
}

#[test]
fn what_belongs_to_nothing_is_removed_under_running_pods() {
    const NAME: &str = "what_belongs_to_nothing_is_removed_under_running_pods";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        let all = Inhabitants::of(node).await;
        Check::run(&gantryctl, &[]).assert_clean();
        let mut planted = Planted::on(&node.daemon);
        let places = node.daemon.places();
        // Not named by us, or not in a place of ours.
        let strange = [
            places.state.join("pods/notes"),
            places.state.join("mine"),
            places.netns_dir.join("cni-1"),
            places.netns_dir.join("gantry-notes"),
            places.root.join("overlayfs/snapshots/notes"),
        ];
        for dir in &strange {
            fs::create_dir_all(dir).unwrap();
        }
        tmpfs(&strange[1]);

        let check = Check::run(&gantryctl, &[]);
        planted.assert_all_in(&check.orphans());
        assert_eq!(check.code, 2);
        assert!(
            check
                .sum
                .contains(&format!("{} belong to nothing", planted.things.len()))
        );
        all.assert_well(node).await;
        for strange in &strange[..2] {
            let mut rows = check.rows.iter();
            let row = rows
                .find(|row| row.what == strange.display().to_string())
                .unwrap();
            assert_eq!(
                (row.owner.as_str(), row.remark.is_empty()),
                ("the host", false)
            );
        }
        for sleeper in &mut planted.sleepers {
            assert!(
                sleeper.try_wait().unwrap().is_none(),
                "looking ends nothing"
            );
        }

        // A zombie is not gone.
        let Planted {
            sleepers,
            things,
            outside,
            _netns,
        } = planted;
        let reaped = sleepers.map(|mut child| std::thread::spawn(move || child.wait()));
        let repair = Check::run(&gantryctl, &["--repair"]);
        let removed: BTreeSet<_> = repair
            .orphans()
            .iter()
            .filter(|row| row.remark == "removed")
            .map(|row| (row.kind.clone(), row.what.clone()))
            .collect();
        for child in reaped {
            child.join().unwrap().unwrap();
        }
        assert_eq!(removed, things, "{:#?}", repair.orphans());
        assert_eq!(repair.code, 0);
        assert!(outside.join("file").exists(), "no link is followed");
        assert!(strange.iter().all(|strange| strange.exists()));
        all.assert_well(node).await;

        let again = Check::run(&gantryctl, &["--repair"]);
        again.assert_clean();
        let aside = places.root.join("store.damaged-2").display().to_string();
        assert!(
            again.rows.iter().any(|row| row.what == aside),
            "the last one is kept"
        );
        umount2(&strange[1], MntFlags::MNT_DETACH).unwrap();
        for dir in strange.iter().chain([&PathBuf::from(aside)]) {
            fs::remove_dir_all(dir).unwrap();
        }
    });
}

#[test]
fn what_cannot_be_removed_is_told_and_holds_up_nothing() {
    const NAME: &str = "what_cannot_be_removed_is_told_and_holds_up_nothing";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        let all = Inhabitants::of(node).await;
        let (daemon, places) = (&node.daemon, node.daemon.places());
        let netns =
            Netns::make(&places.netns_dir.join(format!("gantry-{}", id(daemon, '5')))).unwrap();
        let address = places.ipam_dir.join("gantry-test/10.127.0.5");
        given_out(&address, &id(daemon, '5'));
        let unknown = places
            .state
            .join("runtime/no-such-handler")
            .join(id(daemon, '9'));
        let dir = places.state.join("pods").join(id(daemon, '7'));
        for dir in [&unknown, &dir] {
            fs::create_dir_all(dir).unwrap();
        }
        node.daemon.plugin_faults().set("DEL", Fault::Fail);
        let check = Check::run(&gantryctl, &["--repair"]);
        assert_eq!(check.code, 2, "{:?}", check.orphans());
        let remark = |what: &Path| {
            let what = what.display().to_string();
            let mut rows = check.rows.iter();
            rows.find(|row| row.what == what).unwrap().remark.clone()
        };
        for stays in [netns.path(), Path::new("10.127.0.5")] {
            assert!(
                remark(stays).contains("DEL fails on request"),
                "{:?}",
                remark(stays)
            );
        }
        assert!(
            remark(&unknown).contains("is not configured"),
            "{}",
            remark(&unknown)
        );
        assert_eq!(remark(&dir), "removed");
        assert!(
            check
                .sum
                .ends_with("4 belong to nothing, 1 of these removed"),
            "{}",
            check.sum
        );
        assert!(netns.path().exists() && address.exists() && unknown.exists() && !dir.exists());
        all.assert_well(node).await;

        node.daemon.plugin_faults().clear("DEL");
        fs::remove_dir_all(places.state.join("runtime/no-such-handler")).unwrap();
        assert_eq!(Check::run(&gantryctl, &["--repair"]).code, 0);
        assert!(!netns.path().exists() && !address.exists());
        Check::run(&gantryctl, &[]).assert_clean();
        all.assert_well(node).await;
    });
}

/// A kubelet's way with one pod.
async fn churn(node: &Node, name: &str, image: &str) {
    let config = node.pod_config(name);
    let client = &node.client;
    let pod = client.run_pod(&config).await.unwrap();
    let container = client
        .create(&pod, &sleeper("c", image), &config)
        .await
        .unwrap();
    client.start(&container).await.unwrap();
    let output = client.exec(&container, &["echo", "x"], 20).await.unwrap();
    assert_eq!(output.stdout, b"x\n");
    client.stop(&container, 0).await.unwrap();
    client.remove(&container).await.unwrap();
    client.stop_pod(&pod).await.unwrap();
    client.remove_pod(&pod).await.unwrap();
}

/// Four clients make and remove so many pods each, while repair follows repair.
async fn churn_under_repairs(node: &Node, gantryctl: Gantryctl, pods: usize) {
    let image = node.busybox().await;
    let all = Inhabitants::of(node).await;
    let done = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&done);
    let checking = std::thread::spawn(move || {
        let mut checks = 0;
        while !ended.load(Ordering::Relaxed) {
            Check::run(&gantryctl, &["--repair"]).assert_clean();
            checks += 1;
        }
        checks
    });
    let client = async |client: usize| {
        for pod in 0..pods {
            churn(node, &format!("churn-{client}-{pod}"), &image).await;
        }
    };
    tokio::join!(client(0), client(1), client(2), client(3));
    done.store(true, Ordering::Relaxed);
    let checks = checking.join().unwrap();
    println!("{checks} checks beside {} pods", 4 * pods);
    assert!(checks > 1);
    all.assert_well(node).await;
}

#[test]
fn repairs_hurt_no_pod_that_comes_or_goes() {
    const NAME: &str = "repairs_hurt_no_pod_that_comes_or_goes";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        churn_under_repairs(node, gantryctl, 8).await;
    });
}

/// Where nothing but the daemon's memory says whose a thing is: before its record is written, and
/// after that has gone.
#[test]
fn what_has_no_record_yet_is_no_leftover() {
    const NAME: &str = "what_has_no_record_yet_is_no_leftover";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    let slow = "rundir::made=sleep(150);rundir::removed=sleep(150)";
    on_failing_node(NAME, slow, async |node| {
        let gantryctl = Gantryctl::new(&program, &node.daemon);
        churn_under_repairs(node, gantryctl, 1).await;
    });
}

/// Two daemons that share what two daemons can share: cgroups, network and the directory of
/// network namespaces.
#[test]
fn the_things_of_another_gantryd_are_its_own() {
    const NAME: &str = "the_things_of_another_gantryd_are_its_own";
    let Some(program) = Gantryctl::find(NAME) else {
        return;
    };
    on_plain_node(NAME, async |node| {
        let all = Inhabitants::of(node).await;
        let places = node.daemon.places();
        let shared = format!(
            "[cgroup]\ndefault_parent = \"/{0}\"\nshims = \"/{0}/shims\"\n\
             [network]\nconf_dir = {1:?}\nnetns_dir = {2:?}\n",
            places.cgroup,
            node.daemon.path("cni"),
            places.netns_dir
        );
        let mut other = Daemon::start(Options::default().config(&shared)).unwrap();
        other.ready().await.unwrap();
        all.assert_well(node).await;
        let here = Gantryctl::new(&program, &node.daemon);
        let there = Gantryctl::new(&program, &other);
        let orphan = places.state.join("pods").join(id(&node.daemon, '7'));
        fs::create_dir(&orphan).unwrap();

        let check = Check::run(&there, &["--repair"]);
        check.assert_clean();
        let own = places.state.display().to_string();
        assert!(
            !check.rows.iter().any(|row| row.what.starts_with(&own)),
            "{:#?}",
            check.rows
        );
        let owner = format!("the gantryd at {own}");
        let kinds = ["attachment", "cgroup", "netns", "process"];
        assert_eq!(
            check.kinds_of(&owner),
            BTreeSet::from(kinds),
            "{:#?}",
            check.rows
        );
        assert!(orphan.exists());
        all.assert_well(node).await;

        // Nor does a start take them, with pods of both.
        let client = gantry_testkit::cri::Client::connect(other.socket()).unwrap();
        let config = gantry_testkit::cri::pod_config("there", &other.path("logs"));
        let pod = client.run_pod(&config).await.unwrap();
        other.kill().unwrap();
        assert_eq!(Check::run(&here, &["--repair"]).code, 0);
        assert!(!orphan.exists());
        Check::run(&here, &[]).assert_clean();
        other.spawn().unwrap();
        other.ready().await.unwrap();
        all.assert_well(node).await;
        let client = gantry_testkit::cri::Client::connect(other.socket()).unwrap();
        let status = client.pod_status(&pod).await.unwrap();
        assert_eq!(status.state, 0, "it is ready");
        Check::run(&there, &["--repair"]).assert_clean();
        client.stop_pod(&pod).await.unwrap();
        client.remove_pod(&pod).await.unwrap();
        all.assert_well(node).await;
    });
}
