//! Pseudoterminals (pty(7)).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// A new pair, master first.
pub fn open() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    Ok((master, slave))
}

/// Tells the terminal its size in characters; its foreground process group gets SIGWINCH
/// (TIOCSWINSZ(2const)).
pub fn resize(terminal: impl AsFd, width: u16, height: u16) -> io::Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

pub fn is_terminal(fd: impl AsFd) -> bool {
    rustix::termios::isatty(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_arrives_at_the_other_end() {
        let (master, slave) = open().unwrap();
        assert!(is_terminal(&master) && is_terminal(&slave));
        resize(&master, 100, 40).unwrap();
        let size = rustix::termios::tcgetwinsize(&slave).unwrap();
        assert_eq!((size.ws_col, size.ws_row), (100, 40));
    }
}
