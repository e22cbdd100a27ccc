//! A pseudoterminal.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// A terminal with its controlling side. Its size is 33 lines of 77 columns.
pub struct Terminal {
    controller: OwnedFd,
}

impl Terminal {
    pub fn new() -> Self {
        let controller =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        unlockpt(&controller).unwrap();
        let terminal = Self { controller };
        terminal.resize(33, 77);
        terminal
    }

    pub fn resize(&self, ws_row: u16, ws_col: u16) {
        tcsetwinsize(&self.controller, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 })
            .unwrap();
    }

    /// The controlling side, to read what programs print and to type.
    pub fn controller(&self) -> File {
        File::from(self.controller.try_clone().unwrap())
    }

    /// The side that a program uses as its terminal.
    pub fn side(&self) -> OwnedFd {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        ioctl_tiocgptpeer(&self.controller, flags).unwrap()
    }

    /// Types these bytes.
    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        rustix::io::write(&self.controller, bytes)?;
        Ok(())
    }

    /// Starts the command in this terminal.
    pub fn spawn(&self, command: &mut Command) -> Child {
        command.stdin(self.side()).stdout(self.side()).stderr(self.side());
        let child = command.spawn().unwrap();
        // Closes the command's copies of the terminal.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        child
    }

    /// Reads the output until all programs in this terminal have ended.
    pub fn read_to_end(&self) -> String {
        let mut output = Vec::new();
        let mut buffer = [0; 4096];
        // EIO: no process has the terminal open any more.
        while let Ok(length @ 1..) = rustix::io::read(&self.controller, &mut buffer) {
            output.extend(&buffer[..length]);
        }
        String::from_utf8(output).unwrap()
    }

    /// Reads the output until it contains this text.
    pub fn read_until(&self, part: &str) {
        let mut output = String::new();
        let mut buffer = [0; 4096];
        while !output.contains(part) {
            let length = rustix::io::read(&self.controller, &mut buffer).unwrap();
            output.push_str(str::from_utf8(&buffer[..length]).unwrap());
        }
    }
}
