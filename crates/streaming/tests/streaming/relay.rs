//! Real processes behind real clients.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio as Std};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use gantry_ports::Error;
use gantry_streaming::{
    AttachRequest, Backend, Config, Drain, Duplex, ExecRequest, ProcessIo, Server, Stdio, Streams,
    relay,
};
use gantry_types::PodId;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use tokio::io::AsyncWriteExt;

use crate::common::http;
use crate::common::spdy::{Client, control, open};
use crate::common::{ALL, IN_OUT, OUT, TERMINAL, container, noise, sha256, soon};

/// Runs commands of the host.
struct Host;

const DRAIN: Drain = Drain {
    silence: Duration::from_millis(300),
    stall: Duration::from_secs(1),
};

#[async_trait]
impl Backend for Host {
    async fn exec(&self, request: ExecRequest, streams: Streams) -> Result<i32, Error> {
        let failed = |error| Error::io("the test's host", error);
        let mut command = Command::new(&request.command[0]);
        command.args(&request.command[1..]);
        let io;
        let mut child = if request.stdio.tty {
            let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
            grantpt(&master).and_then(|()| unlockpt(&master)).unwrap();
            let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
            let slave = File::options()
                .read(true)
                .write(true)
                .open(name)
                .map_err(failed)?;
            let end = || Std::from(slave.try_clone().unwrap());
            io = ProcessIo::terminal(master).map_err(failed)?;
            command
                .stdin(end())
                .stdout(end())
                .stderr(end())
                .spawn()
                .map_err(failed)?
        } else {
            let pipe = |wanted| if wanted { Std::piped() } else { Std::null() };
            let wanted = request.stdio;
            command
                .stdin(pipe(wanted.stdin))
                .stdout(pipe(wanted.stdout));
            let mut child = command
                .stderr(pipe(wanted.stderr))
                .spawn()
                .map_err(failed)?;
            io = ProcessIo::pipes(
                child.stdin.take().map(OwnedFd::from),
                child.stdout.take().map(OwnedFd::from),
                child.stderr.take().map(OwnedFd::from),
            )
            .map_err(failed)?;
            child
        };
        // Its ends of the streams must not stay open here.
        drop(command);
        let exit = tokio::task::spawn_blocking(move || child.wait());
        let ends = (streams.stdin, streams.stdout, streams.stderr);
        let status = relay(ends, io, exit, DRAIN)
            .await
            .unwrap()
            .map_err(failed)?;
        Ok(status.code().unwrap_or(137))
    }

    async fn attach(&self, _: AttachRequest, _: Streams) -> Result<(), Error> {
        Err(Error::internal("not here"))
    }

    async fn port_forward(&self, _: &PodId, _: u16, _: Duplex) -> Result<(), Error> {
        Err(Error::internal("not here"))
    }
}

/// The server's bound is half of the relay's.
fn config() -> Config {
    Config {
        drain_timeout: DRAIN.stall / 2,
        max_sessions: 1,
        ..Config::default()
    }
}

/// A client of `sh -c script` with all its streams open: error, then stdin, stdout and stderr as
/// wanted.
async fn sh(stdio: Stdio, script: &str) -> (Server, Client<tokio::net::TcpStream>) {
    let server = Server::bind(config(), Arc::new(Host)).await.unwrap();
    let request = ExecRequest {
        container: container(),
        command: ["sh", "-c", script].map(String::from).to_vec(),
        stdio,
    };
    let url = server.exec(request).unwrap();
    let mut types = vec!["error"];
    for (name, wanted) in [
        ("stdin", stdio.stdin),
        ("stdout", stdio.stdout),
        ("stderr", stdio.stderr),
        ("resize", stdio.tty),
    ] {
        if wanted {
            types.push(name);
        }
    }
    (server, open(&url, &types).await)
}

#[tokio::test]
async fn a_process_gets_its_input_and_its_output_and_exit_code_are_seen() {
    let (_server, mut client) = sh(ALL, "cat; echo oops >&2; exit 5").await;
    let sent = noise(2 << 20);
    let mut received = 0;
    for piece in sent.chunks(100_000) {
        client.send(3, piece).await;
        received += piece.len();
        client.until(|c| c.seen(5).data.len() == received).await;
    }
    client.fin(3).await;
    client.finish().await;
    assert_eq!(sha256(&client.seen(5).data), sha256(&sent));
    assert_eq!(client.text(7), "oops\n");
    assert_eq!(client.status(1)["details"]["causes"][0]["message"], "5");
}

#[tokio::test]
async fn all_output_of_a_process_that_has_ended_reaches_a_client_that_reads_late() {
    let (_server, mut client) = sh(OUT, "head -c 3000000 /dev/zero; echo end").await;
    tokio::time::sleep(DRAIN.silence * 3).await;
    client.finish().await;
    assert_eq!(client.seen(3).data.len(), 3_000_004);
    assert!(client.seen(3).data.ends_with(b"end\n"));
}

#[tokio::test]
async fn a_process_that_does_not_read_holds_its_client_back_and_ends_all_the_same() {
    let (_server, mut client) = sh(IN_OUT, "sleep 2; echo done").await;
    let flood = async {
        loop {
            client.send(3, &[0; 32 * 1024]).await;
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(1), flood)
            .await
            .is_err()
    );
    client.until(|c| c.seen(1).fin).await;
    assert_eq!(client.text(5), "done\n");
}

#[tokio::test]
async fn a_descendant_that_holds_the_output_is_not_waited_for() {
    let start = Instant::now();
    let (_server, mut client) = sh(OUT, "sleep 20 & echo parent").await;
    client.finish().await;
    assert_eq!(client.text(3), "parent\n");
    assert_eq!(client.status(1)["status"], "Success");
    assert!(start.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn a_client_that_goes_away_closes_the_output() {
    let (server, mut client) = sh(OUT, "exec yes").await;
    client.until(|c| c.seen(3).data.len() > 1000).await;
    drop(client);
    // Waits for the process, which dies of writing to nobody.
    soon(server.shutdown(crate::common::SOON)).await;
}

#[tokio::test]
async fn a_terminal_carries_both_directions() {
    let (_server, mut client) = sh(TERMINAL, "test -t 0 && read line && echo got $line").await;
    client.send(3, b"this\n").await;
    client.finish().await;
    assert!(
        client.text(5).ends_with("got this\r\n"),
        "{:?}",
        client.text(5)
    );
    assert_eq!(client.status(1)["status"], "Success");
}

#[tokio::test]
async fn a_client_that_does_not_take_the_last_bytes_is_given_up() {
    // It writes until nobody takes any more, and ends.
    let script = "timeout 1 yes; sleep 0.1";
    let (server, client) = sh(OUT, script).await;
    let start = Instant::now();
    free_again(&server).await;
    assert!(start.elapsed() > DRAIN.stall, "{:?}", start.elapsed());
    drop(client);
    // What is sent is no sign that it reads.
    let (server, mut client) = sh(IN_OUT, script).await;
    let chatty = async {
        let ping = control(6, 0, &1u32.to_be_bytes());
        while client.io().write_all(&ping).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::join!(free_again(&server), chatty);
}

/// Waits until the one session that there may be is over.
async fn free_again(server: &Server) {
    let request = ExecRequest {
        container: container(),
        command: vec!["true".to_owned()],
        stdio: OUT,
    };
    let mut headers = http::SPDY.to_vec();
    headers.push(("X-Stream-Protocol-Version", "v4.channel.k8s.io"));
    let url = server.exec(request).unwrap();
    soon(async {
        while http::status("GET", &url, &headers).await != 101 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}
