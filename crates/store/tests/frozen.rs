//! What is on the disks of nodes is read by every gantryd that comes: `version-1.hex` has one of each
//! record as version 1 writes it, with every field, in its envelope.

use std::collections::BTreeMap;

use gantry_store::record::{
    ContainerConfig, ContainerPhase, ContainerStatus, ImageMount, ImageRecord, PodConfig, PodPhase,
    PodStatus, ProcessRef, User,
};
use gantry_store::{Record, open_record};

/// Fails unless the frozen record of this kind says the same.
#[track_caller]
fn reads<R: Record + PartialEq + std::fmt::Debug>(says: &R) {
    let frozen: BTreeMap<&str, &str> = include_str!("version-1.hex")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_once(' ').unwrap())
        .collect();
    let hex = frozen[R::TREE].as_bytes();
    let digits = hex.chunks(2).map(|two| std::str::from_utf8(two).unwrap());
    let bytes: Vec<u8> = digits
        .map(|two| u8::from_str_radix(two, 16).unwrap())
        .collect();
    assert_eq!(
        open_record::<R>(&bytes).as_ref(),
        Ok(says),
        "records that are on disk must go on meaning the same: add fields, and where an older \
         gantryd must leave the record alone raise its version and go on reading this one"
    );
}

fn process(pid: i32) -> Option<ProcessRef> {
    let start_time = 1_000_000;
    Some(ProcessRef { pid, start_time })
}

#[test]
fn what_version_1_wrote_is_read() {
    let text = |text: &str| text.to_owned();
    reads(&PodConfig {
        id: text("p"),
        cri_config: b"cri".to_vec(),
        runtime_handler: text("runc"),
        created_at: 1_700_000_000_000_000_000,
        config_hash: b"hash".to_vec(),
        boot_id: text("boot"),
        netns_path: text("/netns/p"),
        cgroup_dirs: vec![text("/cg/p")],
        network_intent: b"intent".to_vec(),
        shim_cgroup_dirs: vec![text("/cg/s")],
        scopes: vec![text("h.scope"), text("s.scope")],
    });
    reads(&PodStatus {
        phase: PodPhase::NotReady.into(),
        shim: process(2),
        holder: process(3),
        ips: vec![text("10.0.0.2")],
        network_result: b"result".to_vec(),
        network_released: true,
        reason: text("why"),
        half_made: true,
        overhead: b"o".to_vec(),
        resources: b"r".to_vec(),
        shim_adoptions: 4,
    });
    reads(&ContainerConfig {
        id: text("c"),
        pod_id: text("p"),
        cri_config: b"cri".to_vec(),
        created_at: 1_700_000_000_000_000_000,
        config_hash: b"hash".to_vec(),
        boot_id: text("boot"),
        image_id: text("sha256:i"),
        layers: vec![text("sha256:l")],
        log_path: text("/log"),
        stop_signal: 15,
        cgroup_dir: text("/cg/c"),
        oom_file: text("/cg/c/oom"),
        image_mounts: vec![ImageMount {
            mount: 1,
            image_id: text("sha256:m"),
            layers: vec![text("sha256:n")],
        }],
        snapshotter: text("overlayfs"),
    });
    reads(&ContainerStatus {
        phase: ContainerPhase::Exited.into(),
        process: process(4),
        started_at: 1_700_000_000_000_000_001,
        finished_at: 1_700_000_000_000_000_002,
        exit_code: 137,
        oom_killed: true,
        reason: text("OOMKilled"),
        message: text("why"),
        resources: b"r".to_vec(),
        user: Some(User {
            uid: 1,
            gid: 2,
            supplemental_groups: vec![3, 4],
        }),
    });
    reads(&ImageRecord {
        id: text("sha256:i"),
        tags: vec![text("t")],
        digests: vec![text("d")],
        manifest: text("sha256:m"),
        size: 5,
        layers: vec![text("sha256:l")],
        pinned: true,
        user: text("nobody"),
        created_at: 1_700_000_000_000_000_000,
    });
}
