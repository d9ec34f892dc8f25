//! What a pod costs in memory. Only the small static binary is measured.

use std::path::Path;

use crate::common::{Pod, eventually, pod, records, skip};

/// Proportional and private dirty memory of shim and holder together, in KiB, that a pod with a
/// running container may take.
const PSS: u64 = 512;
const PRIVATE_DIRTY: u64 = 256;

const PODS: usize = 20;

/// PSS and private dirty memory of a process in KiB (proc_pid_smaps_rollup(5)).
fn memory(pid: i32) -> (u64, u64) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let field = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("Pss:"), field("Private_Dirty:"))
}

fn average(pods: &[Pod]) -> (u64, u64) {
    let sums = pods
        .iter()
        .flat_map(|pod| [pod.shim.pid, pod.holder.pid])
        .map(memory);
    let (pss, dirty) = sums.fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
    (pss / pods.len() as u64, dirty / pods.len() as u64)
}

#[test]
fn a_pod_keeps_to_its_budget() {
    const NAME: &str = "a_pod_keeps_to_its_budget";
    if skip(NAME) {
        return;
    }
    if std::env::var_os("GANTRY_SHIM").is_none() {
        println!("SKIP {NAME}: GANTRY_SHIM does not name the static binary");
        return;
    }
    let mut pods: Vec<Pod> = (0..PODS)
        .map(|_| pod(Path::new("/usr/sbin/runc")))
        .collect();
    pods.iter_mut().for_each(Pod::keep_holder);
    let (pss, dirty) = average(&pods);
    println!("empty: PSS {pss} KiB, private dirty {dirty} KiB");
    for pod in &mut pods {
        let bundle = pod.run("c1", "echo up; seq 1 20000; echo done; sleep 600");
        eventually("its output", || {
            records(&bundle.log)
                .last()
                .is_some_and(|line| line.ends_with("done"))
        });
        for n in 0..3 {
            let exec_id = format!("e{n}");
            pod.exec("c1", &exec_id, "exit 0").unwrap();
            pod.daemon.exec_exited(&exec_id);
        }
    }
    // The buffers are given back when output pauses.
    eventually("memory is given back", || {
        pods.iter()
            .all(|pod| memory(pod.shim.pid).1 <= PRIVATE_DIRTY)
    });
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let (pss, dirty) = average(&pods);
    for pid in [pods[0].shim.pid, pods[0].holder.pid] {
        let (pss, dirty) = memory(pid);
        println!("process {pid}: PSS {pss} KiB, private dirty {dirty} KiB");
    }
    if let Some(path) = std::env::var_os("GANTRY_SHIM_SMAPS") {
        let smaps = std::fs::read(format!("/proc/{}/smaps", pods[0].shim.pid)).unwrap();
        std::fs::write(path, smaps).unwrap();
    }
    println!("with a container: PSS {pss} KiB, private dirty {dirty} KiB");
    assert!(pss <= PSS && dirty <= PRIVATE_DIRTY);
    for pod in &mut pods {
        pod.shutdown();
    }
}
