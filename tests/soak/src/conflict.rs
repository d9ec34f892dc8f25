//! Pods that several clients make, use and remove at the same time. What becomes of them nobody can
//! say; they are never two, and every call ends in success or in an error that says why.

use std::path::Path;

use gantry_integration::script_config;
use gantry_testkit::cri::{self, v1};

use crate::actor::{Actor, is_conflict};
use crate::history::Run;
use crate::model::Does;

/// Names that are fought over.
const NAMES: u64 = 2;

const LABEL: &str = "soak-shared";

/// One call about one of them.
pub async fn step(actor: &mut Actor, logs: &Path, image: &str) -> Run<()> {
    let name = format!("shared-{}", actor.rng.number(0..NAMES));
    let directory = logs.join(&name);
    std::fs::create_dir_all(&directory)
        .map_err(|error| actor.shared.history.fault("log directory", error))?;
    let mut pod = cri::pod_config(&name, &directory);
    pod.labels.insert(LABEL.into(), name.clone());
    let filter = v1::PodSandboxFilter {
        label_selector: [(LABEL.to_owned(), name.clone())].into_iter().collect(),
        ..Default::default()
    };
    let call = async |c: &cri::Client| c.list_pods(Some(filter)).await;
    let listed = actor.call("ListPodSandbox", None, |_| false, call).await?;
    let Some(listed) = listed.done() else {
        return Ok(());
    };
    let ready = |pod: &&v1::PodSandbox| pod.state() == v1::PodSandboxState::SandboxReady;
    if listed.iter().filter(ready).count() > 1 {
        let error = format!("is ready twice: {listed:?}");
        return actor.expect(&name, Err(error));
    }
    let (cut, dice) = (actor.cut(), actor.rng.number(0..100));
    if listed.is_empty() || dice < 15 {
        let call = async |c: &cri::Client| c.run_pod(&pod).await;
        let what = format!("RunPodSandbox {name}");
        return actor.call(&what, cut, is_conflict, call).await.map(drop);
    }
    let id = actor.rng.one(&listed).id.clone();
    let of_pod = v1::ContainerFilter {
        pod_sandbox_id: id.clone(),
        ..Default::default()
    };
    let call = async |c: &cri::Client| c.list(Some(of_pod)).await;
    let containers = actor.call("ListContainers", None, |_| false, call).await?;
    let containers = containers.done().unwrap_or_default();
    if containers.is_empty() || dice < 35 {
        let does = *actor.rng.one(&[
            Does::Sleeps,
            Does::Ends {
                after_ms: 300,
                code: 3,
            },
        ]);
        let container = format!("c{}", actor.rng.number(0..3));
        let config = script_config(&container, image, &does.script());
        let call = async |c: &cri::Client| {
            let id = c.create(&id, &config, &pod).await?;
            c.start(&id).await
        };
        let what = format!("create and start {name}/{container}");
        return actor.call(&what, cut, is_conflict, call).await.map(drop);
    }
    let container = actor.rng.one(&containers).id.clone();
    let what = format!("conflict {dice} on {name}");
    let call = async |c: &cri::Client| match dice {
        35..50 => c.start(&container).await,
        50..65 => c.stop(&container, 0).await,
        65..75 => c.remove(&container).await,
        75..85 => c.exec(&container, &["true"], 5).await.map(drop),
        85..92 => c.stop_pod(&id).await,
        _ => c.remove_pod(&id).await,
    };
    actor.call(&what, cut, is_conflict, call).await.map(drop)
}

/// Removes all of them, which must go.
pub async fn remove_all(actor: &mut Actor) -> Run<()> {
    let filter = v1::PodSandboxFilter {
        label_selector: Default::default(),
        ..Default::default()
    };
    let call = async |c: &cri::Client| c.list_pods(Some(filter.clone())).await;
    for pod in actor.insist("ListPodSandbox", call).await? {
        if !pod.labels.contains_key(LABEL) {
            let error = format!("is left: {pod:?}");
            return actor.expect("a pod", Err(error));
        }
        let call = async |c: &cri::Client| c.remove_pod(&pod.id).await;
        actor
            .insist("RemovePodSandbox of a shared pod", call)
            .await?;
    }
    Ok(())
}
