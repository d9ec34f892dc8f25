//! The port with the plugins that nodes have: bridge, host-local and portmap, in a network
//! namespace that plays the node, so that the machine's own network is left alone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_network_cni::{Cni, Options};
use gantry_ports::Network;
use gantry_ports::network::{Attachment, PortMapping, Protocol};
use gantry_types::PodId;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::json;

const TEST: &str = "bridge_host_local_and_portmap";

fn bin_dir() -> Option<PathBuf> {
    ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"]
        .map(PathBuf::from)
        .into_iter()
        .find(|dir| {
            ["bridge", "host-local", "portmap"]
                .iter()
                .all(|it| dir.join(it).is_file())
        })
}

/// A network namespace pinned at a path; unpinned when dropped.
struct Pinned(PathBuf);

impl Pinned {
    fn new(path: PathBuf) -> Self {
        std::fs::write(&path, "").unwrap();
        let target = path.clone();
        // The thread ends with its namespace; the mount keeps it.
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let own = Some("/proc/thread-self/ns/net");
            mount(own, &target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        })
        .join()
        .unwrap();
        Self(path)
    }

    /// Names of the interfaces in it.
    fn interfaces(&self) -> Vec<String> {
        let file = std::fs::File::open(&self.0).unwrap();
        std::thread::spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            interfaces()
        })
        .join()
        .unwrap()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

/// Names of the interfaces of the calling thread's namespace.
fn interfaces() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let names = text.lines().filter_map(|line| line.split_once(':'));
    names.map(|(name, _)| name.trim().to_owned()).collect()
}

fn reserved(dir: &Path) -> Vec<String> {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = files.map(|file| file.file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("10.")).collect()
}

#[test]
fn bridge_host_local_and_portmap() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP {TEST}: needs root");
        return;
    }
    let Some(bin_dir) = bin_dir() else {
        println!("SKIP {TEST}: bridge, host-local and portmap are not installed");
        return;
    };
    // Plugins run in the namespace of the thread that starts them: this one plays the node.
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(attach_and_detach(bin_dir));
    })
    .join()
    .unwrap();
}

async fn attach_and_detach(bin_dir: PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let conf_dir = temp.path().join("net.d");
    std::fs::create_dir(&conf_dir).unwrap();
    let config = json!({
        "cniVersion": "1.0.0",
        "name": "gantry-test",
        "plugins": [
            {
                "type": "bridge", "bridge": "gtest0", "isGateway": true, "ipMasq": false,
                "ipam": {
                    "type": "host-local", "dataDir": temp.path().join("ipam"),
                    "ranges": [[{"subnet": "10.254.77.0/24"}], [{"subnet": "fd00:77::/64"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    std::fs::write(conf_dir.join("10-test.conflist"), config.to_string()).unwrap();
    let netns = Pinned::new(temp.path().join("pod-netns"));
    let pod = Attachment {
        pod: PodId::from_random([9; 32]),
        name: "web".into(),
        namespace: "test".into(),
        uid: "u".into(),
        netns: Some(netns.0.clone()),
        port_mappings: vec![PortMapping {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_port: 18080,
            host_ip: String::new(),
        }],
        dns: None,
        annotations: Default::default(),
        cgroup_parent: String::new(),
    };
    let cni = Cni::start(Options {
        conf_dir,
        bin_dirs: vec![bin_dir],
        timeout: Duration::from_secs(60),
        ..Options::default()
    })
    .unwrap();
    cni.ready().unwrap();

    let intent = cni.intent().unwrap();
    let attached = cni.attach(&pod, &intent).await.unwrap();
    let ips: Vec<_> = attached.ips.iter().map(ToString::to_string).collect();
    assert_eq!(ips, ["10.254.77.2", "fd00:77::2"]);
    assert!(netns.interfaces().contains(&"eth0".to_owned()));
    assert!(interfaces().contains(&"gtest0".to_owned()));
    let ipam = temp.path().join("ipam/gantry-test");
    assert_eq!(reserved(&ipam), ["10.254.77.2"]);

    // An attach for a pod that has its interface already fails in the plugin's words; what it
    // reserved on the way is given back.
    let again = Attachment {
        pod: PodId::from_random([8; 32]),
        ..pod.clone()
    };
    let error = cni.attach(&again, &intent).await.unwrap_err().to_string();
    assert!(error.contains("eth0"), "{error}");
    assert_eq!(reserved(&ipam), ["10.254.77.2"]);

    cni.detach(&pod, &attached.raw).await.unwrap();
    cni.detach(&pod, &attached.raw).await.unwrap();
    assert!(!netns.interfaces().contains(&"eth0".to_owned()));
    assert_eq!(reserved(&ipam), [""; 0]);

    // With the namespace lost and no result kept, the address still comes back.
    let netns = Pinned::new(temp.path().join("lost-netns"));
    let lost = Attachment {
        netns: Some(netns.0.clone()),
        ..pod
    };
    cni.attach(&lost, &intent).await.unwrap();
    assert_eq!(reserved(&ipam).len(), 1);
    drop(netns);
    let gone = Attachment {
        netns: None,
        ..lost
    };
    cni.detach(&gone, &intent).await.unwrap();
    assert_eq!(reserved(&ipam), [""; 0]);
}
