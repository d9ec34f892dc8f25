//! Pulls from a registry on the loopback: a big image of gzip layers, the same of zstd layers, and
//! one of many small layers.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use gantry_testkit::image::{Compression, Image, ImageBuilder, Layer, digest};
use gantry_testkit::registry::Registry;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::{ImageSpec, PullImageRequest, RemoveImageRequest};
use serde_json::json;
use tonic::transport::{Channel, Endpoint};

use crate::Common;
use crate::process::{Role, programs, sum};
use crate::stats::{Summary, ratio};

/// Longest time that a pull may take before the measurement is given up.
const PULL_TIMEOUT: Duration = Duration::from_secs(600);

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Pulls of each image by each runtime
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// MiB of the big images, unpacked
    #[arg(long, default_value_t = 1024)]
    size: u64,
    /// Seconds to wait after images were removed. ext4 goes around inodes that were freed in the
    /// last minute, which may cost more than the pull itself
    #[arg(long, default_value_t = 61)]
    settle: u64,
    /// Images to pull, of gzip, zstd and small
    #[arg(long, value_delimiter = ',', default_value = "gzip,zstd,small")]
    shapes: Vec<String>,
}

/// Figures of one pull. Memory is the most that was resident at once.
const FIGURES: [(&str, &str); 3] = [("wall", "s"), ("cpu", "s"), ("peak", "MiB")];

struct Puller {
    name: String,
    client: ImageServiceClient<Channel>,
}

pub async fn run(options: Options) -> Result<()> {
    let mut pullers = Vec::new();
    for runtime in &options.common.runtimes {
        let (name, socket) = runtime
            .split_once('=')
            .with_context(|| format!("--runtime {runtime:?} is not NAME=SOCKET"))?;
        let channel = Endpoint::from_shared(format!("unix:{socket}"))
            .with_context(|| format!("socket {socket:?}"))?
            .timeout(PULL_TIMEOUT)
            .connect()
            .await
            .with_context(|| format!("connect to {socket}"))?;
        pullers.push(Puller {
            name: name.to_owned(),
            client: ImageServiceClient::new(channel),
        });
    }
    // On threads of its own, so that it is no bottleneck of this program.
    let server = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let registry = server.spawn(Registry::start()).await??;
    let mut result = serde_json::Map::new();
    for shape in &options.shapes {
        let image = make(shape, options.size)?;
        let packed: usize = image.layers.iter().map(|layer| layer.data.len()).sum();
        eprintln!(
            "{shape}: {} layers, {} MiB packed",
            image.layers.len(),
            packed >> 20
        );
        registry.add("bench/pull", shape, &image);
        drop(image);
        let name = format!("{}/bench/pull:{shape}", registry.host());
        let mut samples: Vec<[Vec<f64>; 3]> = pullers.iter().map(|_| Default::default()).collect();
        for turn in 0..options.rounds as usize {
            for place in 0..pullers.len() {
                let which = (place + turn) % pullers.len();
                let puller = &mut pullers[which];
                let figures = pull(puller, &name).await?;
                eprintln!("round {} {shape} {} {figures:.2?}", turn + 1, puller.name);
                for (list, figure) in samples[which].iter_mut().zip(figures) {
                    list.push(figure);
                }
            }
            // Also because the next image may have the same layers, packed otherwise.
            for puller in &mut pullers {
                remove(puller, &name).await?;
            }
            tokio::time::sleep(Duration::from_secs(options.settle)).await;
        }
        show(shape, &pullers, &samples, packed, &mut result)?;
    }
    // A runtime of tokio cannot be dropped where another one runs.
    server.shutdown_background();
    options.common.write(&json!({
        "mode": "pull", "rounds": options.rounds, "size_mib": options.size, "results": result,
    }))
}

fn show(
    shape: &str,
    pullers: &[Puller],
    samples: &[[Vec<f64>; 3]],
    packed: usize,
    result: &mut serde_json::Map<String, serde_json::Value>,
) -> Result<()> {
    println!("\n{shape}, {} MiB packed, median (max)", packed >> 20);
    let names: String = pullers.iter().map(|p| format!("{:>20}", p.name)).collect();
    let heading = if pullers.len() > 1 { "ratio" } else { "" };
    println!("{:<12}{names}{heading:>8}", "");
    for (n, (figure, unit)) in FIGURES.iter().enumerate() {
        let summaries: Vec<Summary> = samples
            .iter()
            .filter_map(|samples| Summary::of(&samples[n]))
            .collect();
        let mut line = format!("{:<12}", format!("{figure} {unit}"));
        for (puller, summary) in pullers.iter().zip(&summaries) {
            line += &format!("{:>11.2} ({:>6.2})", summary.median, summary.max);
            let entry = result.entry(&puller.name).or_insert_with(|| json!({}));
            entry[shape][*figure] = serde_json::to_value(summary)?;
        }
        if let [ours, theirs, ..] = summaries[..] {
            line += &format!("{:>8}", ratio(ours.median, theirs.median));
        }
        println!("{line}");
    }
    Ok(())
}

async fn remove(puller: &mut Puller, name: &str) -> Result<()> {
    let image = ImageSpec {
        image: name.to_owned(),
        ..Default::default()
    };
    let request = RemoveImageRequest { image: Some(image) };
    puller.client.remove_image(request).await?;
    Ok(())
}

/// Seconds, CPU seconds and peak MiB of one pull of an image that the runtime does not have.
async fn pull(puller: &mut Puller, name: &str) -> Result<[f64; 3]> {
    let image = ImageSpec {
        image: name.to_owned(),
        ..Default::default()
    };
    // What was written before must not count for this pull.
    let synced = std::process::Command::new("sync").status()?;
    ensure!(synced.success(), "sync: {synced}");
    let pids = daemons(&puller.name)?;
    for pid in &pids {
        // Resets the peak (proc_pid_clear_refs(5)).
        fs::write(PathBuf::from("/proc").join(pid).join("clear_refs"), "5")?;
    }
    let before = cpu_seconds(&puller.name)?;
    let start = Instant::now();
    let request = PullImageRequest {
        image: Some(image),
        ..Default::default()
    };
    puller.client.pull_image(request).await?;
    let wall = start.elapsed().as_secs_f64();
    let cpu = cpu_seconds(&puller.name)? - before;
    let peak: u64 = pids.iter().map(peak_kb).sum::<Result<u64>>()?;
    Ok([wall, cpu, peak as f64 / 1024.0])
}

fn cpu_seconds(runtime: &str) -> Result<f64> {
    let ticks = sum(&programs(runtime)?, Role::Daemon).cpu_ticks;
    // 100 on every architecture that Linux has to show user space (time(7), USER_HZ).
    Ok(ticks as f64 / 100.0)
}

/// The daemon's processes.
fn daemons(runtime: &str) -> Result<Vec<PathBuf>> {
    let program = match runtime {
        "gantry" => "gantryd",
        other => other,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("list /proc")? {
        let dir = entry?.path();
        let exe = fs::read_link(dir.join("exe")).unwrap_or_default();
        if exe.file_name().is_some_and(|name| name == program)
            && let Some(pid) = dir.file_name()
        {
            found.push(PathBuf::from(pid));
        }
    }
    ensure!(!found.is_empty(), "no process of {program}");
    Ok(found)
}

fn peak_kb(pid: &PathBuf) -> Result<u64> {
    let path = PathBuf::from("/proc").join(pid).join("status");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("{}: no VmHWM", path.display()))
}

// --- what is pulled ---

fn make(shape: &str, mib: u64) -> Result<Image> {
    let (layers, bytes, compression) = match shape {
        "gzip" => (10, (mib << 20) / 10, Compression::Gzip),
        "zstd" => (10, (mib << 20) / 10, Compression::Zstd),
        "small" => (200, 64 << 10, Compression::Gzip),
        other => anyhow::bail!("--shapes: {other:?} is not gzip, zstd or small"),
    };
    let numbers: Vec<u64> = (0..layers).collect();
    // Two at a time: packing is what takes long.
    let mut builder = ImageBuilder::new();
    for pair in numbers.chunks(2) {
        let packed = std::thread::scope(|scope| {
            let threads: Vec<_> = pair
                .iter()
                .map(|&n| scope.spawn(move || layer(n, bytes, compression)))
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .map_err(|_| anyhow::anyhow!("packing failed"))?
                })
                .collect::<Result<Vec<_>>>()
        });
        for (diff_id, data) in packed? {
            builder = builder.packed(diff_id, compression, data);
        }
    }
    Ok(builder.cmd(["/bin/true"]).build())
}

/// A layer of about `bytes`: many small files and a few big ones, most of them text, the rest as
/// dense as programs or as noise.
fn layer(
    n: u64,
    bytes: u64,
    compression: Compression,
) -> Result<(gantry_testkit::image::Digest, Vec<u8>)> {
    const SIZES: [usize; 16] = [
        900, 3_000, 700, 12_000, 5_000, 2_000, 40_000, 1_500, 8_000, 25_000, 600, 110_000, 4_000,
        16_000, 350_000, 1_900_000,
    ];
    let mut random = Random(n + 1);
    let mut made = 0;
    let mut layer = Layer::new();
    for file in 0_usize.. {
        if made >= bytes {
            break;
        }
        if file % 64 == 0 {
            layer = layer.dir(&format!("usr/share/l{n}/d{}", file / 64), 0o755);
        }
        let left = usize::try_from(bytes - made).unwrap_or(usize::MAX);
        let size = SIZES[file % SIZES.len()].min(left);
        let data = match random.next() % 8 {
            0 => random.noise(size),
            1 | 2 => random.program(size),
            _ => random.text(size),
        };
        made += size as u64;
        layer = layer.file(&format!("usr/share/l{n}/d{}/f{file}", file / 64), &data);
    }
    let tar = layer.tar();
    let packed = match compression {
        Compression::Plain => tar.clone(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
            encoder.write_all(&tar)?;
            encoder.finish()?
        }
        Compression::Zstd => zstd::encode_all(tar.as_slice(), 3)?,
    };
    Ok((digest(&tar), packed))
}

/// xorshift64*: the same images in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn noise(&mut self, size: usize) -> Vec<u8> {
        let mut data = Vec::with_capacity(size + 8);
        while data.len() < size {
            data.extend_from_slice(&self.next().to_le_bytes()[..6]);
        }
        data.truncate(size);
        data
    }

    /// Short runs that come again and again between bytes that do not, as in machine code.
    fn program(&mut self, size: usize) -> Vec<u8> {
        let phrases = self.noise(4096);
        let mut data = Vec::with_capacity(size + 16);
        while data.len() < size {
            let at = self.next() as usize % (phrases.len() - 12);
            let length = 4 + self.next() as usize % 8;
            data.extend_from_slice(&phrases[at..at + length]);
            data.push(self.next() as u8);
        }
        data.truncate(size);
        data
    }

    fn text(&mut self, size: usize) -> Vec<u8> {
        const SYLLABLES: [&str; 24] = [
            "al", "ber", "con", "de", "er", "fun", "ge", "in", "key", "lo", "map", "no", "or",
            "pre", "que", "re", "st", "ti", "un", "ver", "we", "ex", "ya", "zo",
        ];
        let mut words = BTreeMap::new();
        let mut data = Vec::with_capacity(size + 32);
        while data.len() < size {
            // Few words are frequent, as in any text.
            let rank = self.next() % (1 + self.next() % 2000);
            let word = words.entry(rank).or_insert_with(|| {
                let count = 1 + self.next() % 3;
                (0..count)
                    .map(|_| SYLLABLES[self.next() as usize % SYLLABLES.len()])
                    .collect::<String>()
            });
            data.extend_from_slice(word.as_bytes());
            data.push(if self.next().is_multiple_of(12) {
                b'\n'
            } else {
                b' '
            });
        }
        data.truncate(size);
        data
    }
}
