//! `other-shim SHIM older|newer POD_ID`: a shim of another version, for tests of what a daemon does
//! with the shims that one of another version has left.
//!
//! It is the shim SHIM behind a translator, which is what the daemon sees: the process, the socket
//! and every message. `older` knows the messages of protocol 1 as they were frozen, and nothing
//! else: a field that came later does not pass, and a request that came later is answered as the
//! shims of then answer it. `newer` says things that nobody knows yet.

use std::fs::{File, rename};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use gantry_shim_api::{Decoder, Frame, encode, read_frame, v1, write_frame};
use gantry_sys::process;
use gantry_sys::socket::{recv_with_fds, send_with_fds};
use prost::Message;

/// Generated from `proto/shim/v1/frozen/protocol-1.proto`.
mod protocol_1 {
    #![allow(clippy::doc_markdown, clippy::large_enum_variant)]
    include!(concat!(env!("OUT_DIR"), "/gantry.shim.v1.rs"));
}

/// What a newer shim may send at any time: an event that is none of ours, and a message that is not
/// even an event.
const UNHEARD_OF: [&[u8]; 2] = [
    &[0, 0, 0, 5, 0x3a, 3, 0x98, 6, 1],
    &[0, 0, 0, 5, 8, 0, 0x9a, 6, 0],
];

/// The messages that a version of the protocol has.
trait Version: 'static {
    type Bootstrap: Message + Default;
    type Ready: Message + Default;
    type Request: Message + Default;
    type Message: Message + Default;
    /// What it calls itself.
    const PROTOCOL: u32;
    const UNHEARD_OF: &[&[u8]];

    fn run_dir(bootstrap: &Self::Bootstrap) -> PathBuf;
    /// Puts the translator in the shim's place; false when there is no shim.
    fn stand_in(ready: &mut Self::Ready) -> io::Result<bool>;
    /// The answer to a request that this version does not have.
    fn refusal(request: &Self::Request) -> Option<Self::Message>;
    /// Puts the translator in the shim's place; whether this is where it tells its own.
    fn introduce(message: &mut Self::Message) -> io::Result<bool>;
}

macro_rules! version {
    ($name:ident, $proto:ident, $number:expr, $unheard_of:expr) => {
        struct $name;

        impl Version for $name {
            type Bootstrap = $proto::Bootstrap;
            type Ready = $proto::Ready;
            type Request = $proto::Request;
            type Message = $proto::Message;
            const PROTOCOL: u32 = $number;
            const UNHEARD_OF: &[&[u8]] = $unheard_of;

            fn run_dir(bootstrap: &Self::Bootstrap) -> PathBuf {
                PathBuf::from(&bootstrap.run_dir)
            }

            fn stand_in(ready: &mut Self::Ready) -> io::Result<bool> {
                let own = process::own_process()?;
                ready.shim = Some($proto::Process {
                    pid: own.pid,
                    start_time: own.start_time,
                });
                Ok(ready.error.is_empty())
            }

            fn refusal(request: &Self::Request) -> Option<Self::Message> {
                let error = $proto::Error {
                    kind: $proto::ErrorKind::Unimplemented.into(),
                    message: "this shim does not know the request".to_owned(),
                };
                request.body.is_none().then(|| Self::Message {
                    id: request.id,
                    body: Some($proto::message::Body::Error(error)),
                })
            }

            fn introduce(message: &mut Self::Message) -> io::Result<bool> {
                let Some($proto::message::Body::Hello(hello)) = &mut message.body else {
                    return Ok(false);
                };
                let own = process::own_process()?;
                hello.shim = Some($proto::Process {
                    pid: own.pid,
                    start_time: own.start_time,
                });
                hello.protocol = Self::PROTOCOL;
                Ok(true)
            }
        }
    };
}

version!(Older, protocol_1, 1, &[]);
version!(Newer, v1, 99, &UNHEARD_OF);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [shim, version, pod] = arguments.as_slice() else {
        eprintln!("usage: other-shim SHIM older|newer POD_ID");
        return ExitCode::from(2);
    };
    let ended = match version.as_str() {
        "older" => run::<Older>(shim, pod),
        _ => run::<Newer>(shim, pod),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("other-shim: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Until the shim ends, which does when this does.
fn run<V: Version>(shim: &str, pod: &str) -> io::Result<()> {
    process::setsid()?;
    let bootstrap: V::Bootstrap = read_frame(&mut io::stdin()).map_err(io::Error::other)?;
    let mut shim = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", shim, pod])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let missing = || io::Error::other("no pipe");
    let mut stdin = shim.stdin.take().ok_or_else(missing)?;
    let mut stdout = shim.stdout.take().ok_or_else(missing)?;
    write_frame(&mut stdin, &bootstrap).map_err(io::Error::other)?;
    let mut ready: V::Ready = read_frame(&mut stdout).map_err(io::Error::other)?;
    let relays = Arc::new(Mutex::new(Vec::new()));
    if V::stand_in(&mut ready)? {
        let dir = V::run_dir(&bootstrap);
        let (socket, real) = (dir.join("shim.sock"), dir.join("real.sock"));
        rename(&socket, &real)?;
        let listener = gantry_sys::socket::listen(&socket)?;
        let relays = Arc::clone(&relays);
        std::thread::spawn(move || accept::<V>(&listener, &real, &relays));
    }
    write_frame(&mut io::stdout(), &ready).map_err(io::Error::other)?;
    io::stdout().flush()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    process::replace_stdio(&null, 0)?;
    process::replace_stdio(&null, 1)?;
    shim.wait()?;
    // Its last words.
    let relays = std::mem::take(&mut *relays.lock().unwrap_or_else(PoisonError::into_inner));
    for relay in relays {
        relay
            .join()
            .map_err(|_| io::Error::other("a relay panicked"))?;
    }
    Ok(())
}

fn accept<V: Version>(listener: &UnixListener, real: &Path, relays: &Mutex<Vec<JoinHandle<()>>>) {
    for daemon in listener.incoming().map_while(Result::ok) {
        let Ok(shim) = UnixStream::connect(real) else {
            return;
        };
        let connection = Arc::new(Connection {
            daemon,
            shim,
            to_daemon: Mutex::new(()),
        });
        let requests = Arc::clone(&connection);
        std::thread::spawn(move || requests.end(requests.requests::<V>()));
        let messages = std::thread::spawn(move || connection.end(connection.messages::<V>()));
        let mut relays = relays.lock().unwrap_or_else(PoisonError::into_inner);
        relays.push(messages);
    }
}

struct Connection {
    daemon: UnixStream,
    shim: UnixStream,
    /// Held while a frame is written: both threads do.
    to_daemon: Mutex<()>,
}

impl Connection {
    fn requests<V: Version>(&self) -> io::Result<()> {
        relay(&self.daemon, |frame: Frame<V::Request>| {
            if let Some(refusal) = V::refusal(&frame.message) {
                // Into the shim's log, for the test.
                eprintln!("other-shim: unknown request");
                return self.tell_daemon(&encoded(&refusal)?, &[]);
            }
            send(&self.shim, &encoded(&frame.message)?, &frame.fds)
        })
    }

    fn messages<V: Version>(&self) -> io::Result<()> {
        relay(&self.shim, |mut frame: Frame<V::Message>| {
            let hello = V::introduce(&mut frame.message)?;
            self.tell_daemon(&encoded(&frame.message)?, &frame.fds)?;
            let mut more = V::UNHEARD_OF.iter().filter(|_| hello);
            more.try_for_each(|frame| self.tell_daemon(frame, &[]))
        })
    }

    fn tell_daemon(&self, frame: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
        let _whole = self
            .to_daemon
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        send(&self.daemon, frame, fds)
    }

    /// One side has gone, and so does the other.
    fn end(&self, ended: io::Result<()>) {
        if let Err(error) = ended {
            eprintln!("other-shim: {error}");
        }
        // The other thread may have been first.
        let _ = self.daemon.shutdown(Shutdown::Both);
        let _ = self.shim.shutdown(Shutdown::Both);
    }
}

fn encoded(message: &impl Message) -> io::Result<Vec<u8>> {
    encode(message).map_err(io::Error::other)
}

fn relay<M: Message + Default>(
    from: &UnixStream,
    mut each: impl FnMut(Frame<M>) -> io::Result<()>,
) -> io::Result<()> {
    let (mut decoder, mut buffer) = (Decoder::new(), [0; 4096]);
    loop {
        let mut fds = Vec::new();
        let n = recv_with_fds(from, &mut buffer, &mut fds)?;
        if n == 0 {
            return Ok(());
        }
        decoder.feed(&buffer[..n], fds).map_err(io::Error::other)?;
        while let Some(frame) = decoder.next::<M>().map_err(io::Error::other)? {
            each(frame)?;
        }
    }
}

fn send(to: &UnixStream, frame: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut sent = send_with_fds(to, frame, &fds)?;
    while sent < frame.len() {
        sent += send_with_fds(to, &frame[sent..], &[])?;
    }
    Ok(())
}
