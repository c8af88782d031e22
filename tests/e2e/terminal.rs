//! A terminal for programs that want one, as a user's terminal emulator makes it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context, Result};
use nix::pty::{Winsize, openpty};

use crate::command::{eventually, exit_code, wait_for};

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, Winsize);

/// A program that runs on a pseudo-terminal.
pub struct Terminal {
    master: File,
    child: Child,
    screen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts a program on a terminal of this size.
    pub fn start(command: &mut Command, rows: u16, columns: u16) -> Result<Terminal> {
        let pty = openpty(Some(&size(rows, columns)), None)?;
        let stdio = |fd: &OwnedFd| fd.try_clone().context("the terminal can be shared");
        // `setsid -c` makes the slave the controlling terminal, so that a change of size becomes SIGWINCH.
        let mut session = Command::new("setsid");
        session.args(["-c", "-w"]).arg(command.get_program()).args(command.get_args());
        session.stdin(stdio(&pty.slave)?).stdout(stdio(&pty.slave)?).stderr(pty.slave);
        let child = session.spawn().context("setsid runs")?;
        let master = File::from(pty.master);
        let screen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, seen) = (master.try_clone()?, Arc::clone(&screen));
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The master reports an error when the last user of the slave is gone.
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                seen.lock().expect("no thread panics here").extend_from_slice(&bytes[..count]);
            }
        });
        Ok(Terminal { master, child, screen })
    }

    /// Types at the keyboard.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Pulls the window to another size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        // SAFETY: the descriptor is open, and the kernel only reads a whole `Winsize` from the pointer.
        unsafe { set_window_size(self.master.as_raw_fd(), &size(rows, columns)) }?;
        Ok(())
    }

    /// Everything that was shown so far.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().expect("no thread panics here")).into_owned()
    }

    /// Waits until the screen shows a text.
    pub fn wait_for(&self, text: &str) -> Result<()> {
        eventually(&format!("the terminal shows {text:?}"), || Ok(self.screen().contains(text)))
            .with_context(|| format!("the screen: {:?}", self.screen()))
    }

    /// Waits for the program's end and returns its exit code.
    pub fn finish(mut self) -> Result<i32> {
        Ok(exit_code(wait_for(&mut self.child, "a program on a terminal")?))
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
