//! Clients that watch a container's output as it comes.
//!
//! The daemon hands over the writing ends of pipes and gets a descriptor of the container's input
//! in return, so that input never crosses the shim. Output is written to the log first and then
//! here, without ever waiting: a client whose pipe is full is cut off and told why. One pipe of
//! each attachment carries no output: its ends tell either side that the other has let go.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use gantry_shim_api::v1;
use gantry_shim_api::v1::message::Body;

use crate::call::Asker;
use crate::error::Error;
use crate::log::Kind;
use crate::shim::Shim;

/// Attachments that one container may have at a time.
const MAX_ATTACHMENTS: usize = 64;

/// Told to a client that is cut off. Fits any pipe that is empty.
const TOO_SLOW: &str = "the client reads more slowly than the container writes";

pub struct Attachment {
    pub number: u32,
    /// Open for as long as the attachment lasts.
    pipe: OwnedFd,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Attachment {
    /// Shows output to the client. False when the client was cut off.
    pub fn show(&mut self, kind: Kind, bytes: &[u8]) -> bool {
        let slot = match kind {
            Kind::Stdout => &mut self.stdout,
            Kind::Stderr => &mut self.stderr,
        };
        let Some(stream) = slot else { return true };
        match gantry_sys::io::write(stream, bytes) {
            Ok(written) if written == bytes.len() => true,
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                // It wants no more of this stream.
                *slot = None;
                true
            }
            // A part of it (pipe(7), O_NONBLOCK) would leave a gap.
            Ok(_) | Err(_) => {
                // Nothing was written to this pipe before. Fails when the client has gone.
                let _ = gantry_sys::io::write(&self.pipe, TOO_SLOW.as_bytes());
                false
            }
        }
    }
}

impl Shim {
    pub fn attach(
        &mut self,
        asker: Asker,
        attach: &v1::Attach,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Error> {
        let expected = 1 + usize::from(attach.stdout) + usize::from(attach.stderr);
        if fds.len() != expected {
            let message = format!("attach needs {expected} descriptors, {} came", fds.len());
            return Err(Error::InvalidArgument(message));
        }
        let prepare = Error::call("prepare a client's pipes");
        let pipes = fds.iter().try_fold(true, |pipes, fd| {
            gantry_sys::io::set_nonblocking(fd)?;
            Ok(pipes && gantry_sys::fs::is_fifo(fd)?)
        });
        if !pipes.map_err(prepare)? {
            let message = "attach needs pipes".to_owned();
            return Err(Error::InvalidArgument(message));
        }
        let number = self.number();
        let container = self.find_running(&attach.container_id)?;
        if container.attachments.len() >= MAX_ATTACHMENTS {
            let message = format!("container {:?} has enough clients", attach.container_id);
            return Err(Error::Exhausted(message));
        }
        let mut fds = fds.into_iter();
        let mut next = |wanted: bool| if wanted { fds.next() } else { None };
        let (Some(pipe), stdout, stderr) = (next(true), next(attach.stdout), next(attach.stderr))
        else {
            return Err(Error::InvalidArgument("attach needs a pipe".to_owned()));
        };
        let container = container.number;
        self.watch_attachment(number, pipe.as_fd())
            .map_err(Error::call("watch a client's pipe"))?;
        // Last of what can fail: it may be the only one that there is.
        let input = match self.containers.get_mut(&container) {
            Some(container) if attach.stdin => container
                .input()
                .map_err(Error::call("give the container's input away"))?,
            _ => None,
        };
        if let Some(container) = self.containers.get_mut(&container) {
            container.attachments.push(Attachment {
                number,
                pipe,
                stdout,
                stderr,
            });
        }
        let fds = input.into_iter().collect();
        self.answer_with(asker, Body::Attached(v1::Attached {}), fds);
        Ok(())
    }

    /// The daemon has let go of an attachment.
    pub fn detach(&mut self, number: u32) {
        for container in self.containers.values_mut() {
            container
                .attachments
                .retain(|client| client.number != number);
        }
    }
}
