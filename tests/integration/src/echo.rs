//! A TCP server in a pod's network.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Sends back to each connection what it sent, once it has sent its end.
pub struct Echo {
    pub port: u16,
    stop: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Echo {
    /// Listens on 127.0.0.1 of the network namespace at `netns`.
    pub fn serve(netns: &Path) -> io::Result<Self> {
        let listener =
            gantry_sys::namespace::in_netns(netns, || TcpListener::bind("127.0.0.1:0"))??;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let server = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((connection, _)) => drop(std::thread::spawn(|| answer(connection))),
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Ok(Self {
            port,
            stop,
            server: Some(server),
        })
    }
}

/// A connection that breaks is its client's doing, which its client sees.
fn answer(mut connection: TcpStream) {
    let mut text = Vec::new();
    if connection.set_nonblocking(false).is_ok() && connection.read_to_end(&mut text).is_ok() {
        let _ = connection.write_all(&text);
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}
