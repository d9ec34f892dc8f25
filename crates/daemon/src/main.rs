//! gantryd: the container supervisor of a Kubernetes node.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use gantry_daemon::config::{Config, LogFormat, Overrides};
use gantry_daemon::traces::{self, TRACE, Traces};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::{self, format};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// Container supervisor for Kubernetes nodes: serves CRI v1 on a unix socket.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Configuration file [default: /etc/gantry/config.toml if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where records, images and layers are kept
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Where the state of this boot is kept
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Unix socket to serve CRI on
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Directory with CNI configurations
    #[arg(long, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Directories with CNI plugins
    #[arg(long, value_name = "DIR[:DIR]")]
    cni_bin_dir: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Kept until the end: dropping it disarms all failpoints.
    let _failpoints = gantry_sys::failpoint::arm();
    let overrides = Overrides {
        root: args.root,
        state: args.state,
        socket: args.socket,
        cni_conf_dir: args.cni_conf_dir,
        cni_bin_dirs: args
            .cni_bin_dir
            .map(|dirs| std::env::split_paths(&dirs).collect()),
    };
    let outcome = Config::load(args.config.as_deref(), overrides)
        .map_err(anyhow::Error::from)
        .and_then(|config| {
            let traces = start_log(&config)?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                // Idle blocking threads go back to the system soon: each holds a stack.
                .thread_keep_alive(std::time::Duration::from_secs(2))
                .build()?;
            let outcome = runtime.block_on(gantry_daemon::run(config, traces));
            // Threads that wait for a hung disk or plugin must not keep us from ending.
            runtime.shutdown_timeout(std::time::Duration::from_secs(2));
            outcome
        });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The log may not be up yet, and whoever started us looks here.
            eprintln!("gantryd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Structured log on standard error, and traces where they are to go.
fn start_log(config: &Config) -> anyhow::Result<Option<Traces>> {
    let level: LevelFilter = config.log.level.parse().map_err(|_| {
        anyhow::anyhow!(
            "log.level: {:?} is not error, warn, info, debug or trace",
            config.log.level
        )
    })?;
    // Libraries at debug speak of every frame.
    let filter = Targets::new().with_default(level).with_targets(
        [
            "h2",
            "hyper",
            "hyper_util",
            "tonic",
            "tower",
            "rustls",
            "sled",
        ]
        .map(|library| (library, LevelFilter::WARN)),
    );
    let filter = filter.with_target(TRACE, LevelFilter::OFF);
    let colour = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let Some((spans, traces)) = traces::layer(&config.tracing) else {
        // One filter for all: what it refuses is never made.
        let registry = tracing_subscriber::registry().with(filter);
        match config.log.format {
            LogFormat::Text => registry.with(lines().with_ansi(colour)).init(),
            LogFormat::Json => registry.with(lines().json()).init(),
        }
        return Ok(None);
    };
    let registry = tracing_subscriber::registry().with(spans);
    match config.log.format {
        LogFormat::Text => {
            let layer = lines().with_ansi(colour).with_filter(filter);
            registry.with(layer).init();
        }
        LogFormat::Json => registry.with(lines().json().with_filter(filter)).init(),
    }
    Ok(Some(traces))
}

type Lines<S> = fmt::Layer<S, format::DefaultFields, format::Format, fn() -> std::io::Stderr>;

fn lines<S>() -> Lines<S>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    let stderr: fn() -> std::io::Stderr = std::io::stderr;
    fmt::layer().with_writer(stderr).with_target(false)
}
