//! gantryctl: what crictl cannot do.

mod check;
mod image;
mod progress;
mod state;
mod table;
mod top;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};

/// Works on what gantryd keeps, beside CRI.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// gantryd's socket
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/run/gantry/gantry.sock",
        global = true
    )]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Images: in and out, what they are, and whether they still are
    #[command(subcommand)]
    Image(image::Command),
    /// List every process, mount, network namespace, address, cgroup, directory and snapshot with
    /// what it belongs to; exits with 2 if something belongs to nothing (`-`) and is still there
    ///
    /// Layers and blobs of images are listed by `image gc --dry-run`.
    Check {
        /// Remove what belongs to nothing; pods may run meanwhile
        #[arg(long)]
        repair: bool,
    },
    /// Show what gantryd is at: pods and containers by state, calls and steps under way with their
    /// age, pulls, shims, the store; exits with 2 if something is stuck
    State {
        /// As JSON, with every driver (docs/observability.md)
        #[arg(long)]
        json: bool,
    },
    /// Show what pods and containers use: CPU in cores, working set, processes, what they have
    /// written, and what their network moves
    Top(top::Options),
}

/// What a listing may take: thousands of images, or pods.
const MESSAGE_LIMIT: usize = 64 << 20;

/// What is exited with when something is bad: not the 1 of what could not be done.
const BAD: u8 = 2;

/// How long a gantryd that is well may take for what it has in memory.
const PROMPTLY: Duration = Duration::from_secs(10);

/// An answer that needs neither a disk nor a pod, or the word that gantryd hangs: its socket takes
/// connections all the same.
async fn promptly<T>(answer: impl Future<Output = T>) -> Result<T> {
    let answer = tokio::time::timeout(PROMPTLY, answer).await;
    answer.with_context(|| {
        format!(
            "gantryd does not answer within {PROMPTLY:?}; SIGUSR1 makes it write down what hangs"
        )
    })
}

/// The daemon's message is the error; its code adds nothing for people.
fn status(status: tonic::Status) -> anyhow::Error {
    match status.message() {
        // An earlier gantryd says nothing of a request that it does not know.
        "" => anyhow::anyhow!("{}", status.code().description()),
        message => anyhow::anyhow!("{message}"),
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = async {
        let channel = promptly(connect(&args.socket)).await??;
        match args.command {
            Command::Image(command) => image::run(command, channel).await,
            Command::Check { repair } => check::run(channel, repair).await,
            Command::State { json } => state::run(channel, json).await,
            Command::Top(options) => top::run(options, channel).await,
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(outcome);
            // Nobody waits for a read from a terminal or a pipe that nobody writes to.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(error).context("start"),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("gantryctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn connect(socket: &Path) -> Result<Channel> {
    let path = socket.to_owned();
    // The authority names nothing: the connection goes to the socket.
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move {
                tokio::net::UnixStream::connect(path)
                    .await
                    .map(TokioIo::new)
            }
        }))
        .await
        .with_context(|| format!("connect to {}", socket.display()))
}
