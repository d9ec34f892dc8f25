//! A program in a terminal, as when somebody sits before it.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::termios::{LocalModes, tcgetattr};

/// How long a terminal may take to show what is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// The program by which a command makes its standard input its controlling terminal.
/// It does not fork, since no command of ours leads a process group: the child is the command.
pub const SESSION: [&str; 2] = ["setsid", "--ctty"];

/// A program whose standard streams are a terminal, as when somebody sits before it.
pub struct Terminal {
    child: Child,
    master: File,
    output: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Terminal {
    /// Starts a command that makes the terminal its own, see [`SESSION`].
    pub fn start(mut command: Command) -> Self {
        let (master, slave) = gantry_sys::pty::open().expect("terminal");
        let copy = || slave.try_clone().expect("terminal");
        let child = command
            .stdin(copy())
            .stdout(copy())
            .stderr(copy())
            .spawn()
            .expect("a program in a terminal");
        drop(slave);
        let output = Arc::new(Mutex::new(Vec::new()));
        let mut from = File::from(master.try_clone().expect("terminal"));
        let to = Arc::clone(&output);
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO when nobody has it open any more.
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                to.lock().expect("output").extend(&buffer[..count]);
            }
        });
        Self {
            child,
            master: master.into(),
            output,
            reader: Some(reader),
        }
    }

    pub fn resize(&self, width: u16, height: u16) {
        gantry_sys::pty::resize(&self.master, width, height).expect("resize");
    }

    pub fn write(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("terminal");
    }

    fn output(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().expect("output")).into_owned()
    }

    /// Waits until keys are the program's to read, Ctrl-C too (termios(3), ICANON and ISIG).
    #[track_caller]
    pub fn is_raw(&self) {
        let deadline = Instant::now() + PATIENCE;
        let cooked = LocalModes::ICANON | LocalModes::ISIG;
        while tcgetattr(&self.master)
            .expect("a terminal's modes")
            .local_modes
            .intersects(cooked)
        {
            assert!(Instant::now() < deadline, "not raw: {:?}", self.output());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Types `question` now and then until `answer` is shown after it.
    #[track_caller]
    pub fn ask_until(&mut self, question: &str, answer: &str) {
        let (deadline, before) = (Instant::now() + PATIENCE, self.output().len());
        loop {
            self.write(question);
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(25));
                if self
                    .output()
                    .get(before..)
                    .is_some_and(|new| new.contains(answer))
                {
                    return;
                }
            }
            assert!(
                Instant::now() < deadline,
                "no {answer:?} in {:?}",
                self.output()
            );
        }
    }

    /// What is shown between two texts.
    #[track_caller]
    pub fn until(&self, before: &str, after: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let output = self.output();
            let rest = output.split_once(before).map(|(_, rest)| rest);
            if let Some((found, _)) = rest.and_then(|rest| rest.split_once(after)) {
                return found.to_owned();
            }
            assert!(Instant::now() < deadline, "no {before:?} in {output:?}");
            std::thread::sleep(Duration::from_millis(25));
        }
    }

    /// Waits for its end; whether it succeeded, and all that was shown.
    #[track_caller]
    pub fn finish(mut self) -> (bool, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                if let Some(reader) = self.reader.take() {
                    reader.join().expect("reader");
                }
                return (status.success(), self.output());
            }
            assert!(
                Instant::now() < deadline,
                "it does not end: {:?}",
                self.output()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Of a test that failed; otherwise it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
