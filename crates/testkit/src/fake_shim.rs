//! A shim that only speaks: for tests of the daemon's end that need no root, no namespace and no
//! process. Its peer's pid is that of the test itself, so it must never be killed as hung.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use gantry_shim_api::v1::{self, message, request};
use gantry_shim_api::{read_frame, write_frame};

/// What the fake does with a request.
pub enum Answer {
    Body(message::Body),
    /// Takes the request and never answers.
    Silence,
    /// Closes the connection instead.
    HangUp,
}

/// Serves one connection at a time until it is dropped.
pub struct FakeShim {
    connections: Receiver<UnixStream>,
}

impl FakeShim {
    /// Listens at `socket` as the shim of `pod`. Hello is answered; everything else by `answer`.
    pub fn start(
        socket: &Path,
        pod: &str,
        answer: impl Fn(request::Body) -> Answer + Send + 'static,
    ) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let (sender, connections) = channel();
        let pod = pod.to_owned();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let Ok(copy) = stream.try_clone() else { return };
                if sender.send(copy).is_err() {
                    return;
                }
                // Ends with the connection.
                let _ = serve(stream, &pod, &answer);
            }
        });
        Ok(Self { connections })
    }

    /// The latest connection, for sending what nobody asked for.
    pub fn connection(&self) -> Connection {
        let stream = self.connections.recv_timeout(Duration::from_secs(10));
        Connection(stream.expect("a daemon connects"))
    }
}

/// The fake's end of a connection.
pub struct Connection(UnixStream);

impl Connection {
    pub fn event(&mut self, body: v1::event::Body) {
        let event = v1::Event { body: Some(body) };
        let message = v1::Message {
            id: 0,
            body: Some(message::Body::Event(event)),
        };
        write_frame(&mut self.0, &message).expect("the daemon reads");
    }
}

fn serve(
    mut stream: UnixStream,
    pod: &str,
    answer: &impl Fn(request::Body) -> Answer,
) -> Result<(), gantry_shim_api::Error> {
    loop {
        let request: v1::Request = read_frame(&mut stream)?;
        let body = match request.body {
            Some(request::Body::Hello(hello)) => message::Body::Hello(v1::HelloReply {
                protocol: hello.protocol,
                pod_id: pod.to_owned(),
                ..Default::default()
            }),
            Some(body) => match answer(body) {
                Answer::Body(body) => body,
                Answer::Silence => continue,
                Answer::HangUp => {
                    stream.shutdown(Shutdown::Both)?;
                    return Ok(());
                }
            },
            None => continue,
        };
        let message = v1::Message {
            id: request.id,
            body: Some(body),
        };
        write_frame(&mut stream, &message)?;
    }
}
