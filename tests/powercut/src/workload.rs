//! What a busy node does: images come and go, and pods with them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use gantry_integration::gantryctl::Gantryctl;
use gantry_integration::{Node, busybox_image, script_config};
use gantry_testkit::image::{Compression, Image, ImageBuilder, Layer, oci_layout_of, write_tar};
use serde_json::json;

use crate::history::{Answer, History, Operation};

/// The code that containers end with when they are told to.
const ENDED: i32 = 7;

/// Images of a run, under the names that the registry has them.
#[derive(Debug)]
pub struct Images {
    /// By full name.
    pub images: BTreeMap<String, Image>,
    /// The image of the workload's containers: always there.
    pub base: String,
    /// Archives of the images, for imports.
    archives: tempfile::TempDir,
}

/// The longest time without changes of images.
const QUIET_MS: u64 = 2000;

/// Layers that images are made of.
const LAYERS: usize = 5;
const IMAGES: usize = 6;

impl Images {
    /// Makes the images of a seed and puts them into the node's registry. They have layers in
    /// common, and all of them a shell.
    pub fn make(node: &Node, random: &mut fastrand::Rng) -> Result<Self> {
        let busybox = busybox_image();
        let base = "test/base".to_owned();
        node.registry.add(&base, "1", busybox);
        let layers: Vec<_> = (0..LAYERS).map(|number| layer(number, random)).collect();
        let archives = tempfile::tempdir_in("/var/tmp")?;
        let mut images = BTreeMap::new();
        for number in 0..IMAGES {
            let mut image = ImageBuilder::on(busybox);
            for (at, layer) in layers.iter().enumerate() {
                if random.bool() || at == number % LAYERS {
                    let packed = [Compression::Gzip, Compression::Zstd, Compression::Plain];
                    image = image.layer(layer.clone(), packed[at % packed.len()]);
                }
            }
            let image = image
                .config("Labels", json!({ "number": number.to_string() }))
                .build();
            let repository = format!("test/image-{number}");
            node.registry.add(&repository, "1", &image);
            let name = format!("{}/{repository}:1", node.registry.host());
            let files = oci_layout_of(&image, &name);
            write_tar(
                &files,
                std::fs::File::create(archive(archives.path(), &name))?,
            )?;
            images.insert(name, image);
        }
        Ok(Self {
            images,
            base: format!("{}/{base}:1", node.registry.host()),
            archives,
        })
    }

    fn archive(&self, name: &str) -> PathBuf {
        archive(self.archives.path(), name)
    }
}

fn archive(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{}.tar", name.replace(['/', ':'], "-")))
}

/// Some files that nobody can compress, an empty one, a link and a directory.
fn layer(number: usize, random: &mut fastrand::Rng) -> Layer {
    let dir = format!("layer-{number}");
    let mut layer = Layer::new().dir(&dir, 0o755);
    for file in 0..random.usize(2..12) {
        let mut data = vec![0; random.usize(1..100_000)];
        random.fill(&mut data);
        layer = layer.file(&format!("{dir}/{file}"), &data);
    }
    layer
        .file(&format!("{dir}/empty"), b"")
        .hardlink(&format!("{dir}/again"), &format!("{dir}/0"))
        .symlink(&format!("{dir}/link"), "0")
}

/// Works on the node for that long, and tells `history` of everything.
pub async fn run(
    node: &Node,
    images: &Images,
    history: &History,
    time: Duration,
    random: &mut fastrand::Rng,
) -> Result<()> {
    let until = Instant::now() + time;
    let worker = |random: &mut fastrand::Rng| Worker {
        node,
        images,
        history,
        until,
        random: random.fork(),
    };
    let asked = history.asked(Operation::AddImage(images.base.clone()));
    node.client
        .pull(&images.base)
        .await
        .context("pull the base")?;
    history.answered(asked, Answer::Done);
    let names: Vec<&String> = images.images.keys().collect();
    let (some, others) = names.split_at(names.len() / 2);
    tokio::try_join!(
        worker(random).images(some),
        worker(random).images(others),
        worker(random).pods("a"),
        worker(random).pods("b"),
    )?;
    Ok(())
}

struct Worker<'a> {
    node: &'a Node,
    images: &'a Images,
    history: &'a History,
    until: Instant,
    random: fastrand::Rng,
}

impl Worker<'_> {
    /// A call that must succeed, between its two events.
    async fn change(
        &self,
        operation: Operation,
        call: impl Future<Output = Result<Answer>>,
    ) -> Result<Answer> {
        let what = format!("{operation:?}");
        let asked = self.history.asked(operation);
        let answer = call.await.context(what)?;
        self.history.answered(asked, answer.clone());
        Ok(answer)
    }

    fn over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Lets images come and go.
    async fn images(mut self, names: &[&String]) -> Result<()> {
        let mut there = vec![false; names.len()];
        while !self.over() {
            // An image's syncs make durable what pods have left in memory: there are times
            // without them.
            if self.random.u8(..4) == 0 {
                let quiet = Duration::from_millis(self.random.u64(..QUIET_MS));
                tokio::time::sleep(quiet).await;
            }
            let at = self.random.usize(..names.len());
            let name = names[at];
            if there[at] && self.random.u8(..4) > 0 {
                let operation = Operation::RemoveImage(name.clone());
                let removed = async { Ok(done(self.node.client.remove_image(name).await?)) };
                self.change(operation, removed).await?;
                there[at] = false;
            } else {
                let operation = Operation::AddImage(name.clone());
                if self.random.u8(..3) == 0 {
                    self.change(operation, self.import(name)).await?;
                } else {
                    let pulled = async { Ok(done(self.node.client.pull(name).await?)) };
                    self.change(operation, pulled).await?;
                }
                there[at] = true;
            }
        }
        Ok(())
    }

    async fn import(&self, name: &str) -> Result<Answer> {
        let program = gantry_testkit::daemon::gantryctl()?;
        let gantryctl = Gantryctl::new(&program, &self.node.daemon);
        let archive = self.images.archive(name);
        let import = move || {
            let archive = archive.to_string_lossy();
            gantryctl.image(&["import", &archive])
        };
        match tokio::task::spawn_blocking(import).await? {
            (0, _, _) => Ok(Answer::Done),
            (code, _, said) => bail!("gantryctl image import: {code}: {said}"),
        }
    }

    /// Lets pods come and go, some of which stay.
    async fn pods(mut self, prefix: &str) -> Result<()> {
        let mut stay = Vec::new();
        let mut number = 0;
        while !self.over() {
            number += 1;
            let pod = self.pod(&format!("{prefix}{number}")).await?;
            stay.push(pod);
            if stay.len() > 2 {
                let at = self.random.usize(..stay.len());
                self.remove_pod(stay.swap_remove(at)).await?;
            }
        }
        Ok(())
    }

    /// A pod with containers in all states.
    async fn pod(&mut self, name: &str) -> Result<String> {
        let client = &self.node.client;
        let config = self.node.pod_config(name);
        let run = async { Ok(Answer::Made(client.run_pod(&config).await?)) };
        let pod = id(self.change(Operation::RunPod(name.to_owned()), run).await?)?;
        for number in 0..self.random.u8(..3) {
            let name = format!("{name}-{number}");
            let script =
                format!("trap 'exit {ENDED}' TERM; while :; do sleep 1000 & wait $!; done");
            let container = script_config(&name, &self.images.base, &script);
            let operation = Operation::CreateContainer {
                pod: pod.clone(),
                name,
            };
            let create = async {
                Ok(Answer::Made(
                    client.create(&pod, &container, &config).await?,
                ))
            };
            let id = id(self.change(operation, create).await?)?;
            let far = self.random.u8(..5);
            if far >= 1 {
                let start = async { Ok(done(client.start(&id).await?)) };
                self.change(Operation::StartContainer(id.clone()), start)
                    .await?;
            }
            if far >= 3 {
                let stop = async {
                    client.stop(&id, 10).await?;
                    Ok(Answer::Ended(client.status(&id).await?.exit_code))
                };
                self.change(Operation::StopContainer(id.clone()), stop)
                    .await?;
            }
            if far >= 4 {
                let remove = async { Ok(done(client.remove(&id).await?)) };
                self.change(Operation::RemoveContainer(id.clone()), remove)
                    .await?;
            }
        }
        Ok(pod)
    }

    async fn remove_pod(&mut self, id: String) -> Result<()> {
        let client = &self.node.client;
        if self.random.bool() {
            let stop = async { Ok(done(client.stop_pod(&id).await?)) };
            self.change(Operation::StopPod(id.clone()), stop).await?;
        }
        // What is in the pod goes with it, asked for by that one request.
        let remove = async { Ok(done(client.remove_pod(&id).await?)) };
        self.change(Operation::RemovePod(id.clone()), remove)
            .await?;
        Ok(())
    }
}

fn done<T>(_: T) -> Answer {
    Answer::Done
}

fn id(answer: Answer) -> Result<String> {
    match answer {
        Answer::Made(id) => Ok(id),
        other => bail!("{other:?} instead of an id"),
    }
}
