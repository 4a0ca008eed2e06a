//! The terminal of a shell in the host machine, in raw mode: every key, even Ctrl-C, goes to the
//! machine, and the terminal driver there interprets the keys.

use std::io::{Read as _, stdin};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use anyhow::{Context, Result};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Size if the terminal reports none: rows, columns.
const SIZE: (u16, u16) = (24, 80);

/// This process's terminal in raw mode. Dropping the value restores the terminal.
pub(super) struct Terminal {
    before: Termios,
    size: (u16, u16),
}

impl Terminal {
    /// Switches the terminal on standard input to raw mode.
    pub(super) fn take() -> Result<Self> {
        let before = tcgetattr(stdin()).context("Failed to read the terminal's settings")?;
        let size = Command::new("stty")
            .arg("size")
            .stdin(Stdio::inherit())
            .output()
            .ok()
            .and_then(|output| parse_size(&String::from_utf8_lossy(&output.stdout)))
            .unwrap_or(SIZE);
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin(), SetArg::TCSANOW, &raw)
            .context("Failed to set the terminal to raw mode")?;
        Ok(Self { before, size })
    }

    /// Returns the numbers of rows and columns.
    pub(super) fn size(&self) -> (u16, u16) {
        self.size
    }

    /// Returns a channel that receives the typed bytes.
    pub(super) fn keyboard(&self) -> Receiver<Vec<u8>> {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut chunk = [0; 1024];
            while let Ok(length @ 1..) = stdin().read(&mut chunk) {
                let typed = chunk.get(..length).unwrap_or_default().to_vec();
                if sender.send(typed).is_err() {
                    return;
                }
            }
        });
        receiver
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = tcsetattr(stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// Parses the output of `stty size`.
fn parse_size(text: &str) -> Option<(u16, u16)> {
    let (rows, columns) = text.trim().split_once(' ')?;
    match (rows.parse().ok()?, columns.parse().ok()?) {
        (0, _) | (_, 0) => None,
        size => Some(size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_comes_from_stty_unless_the_terminal_has_none() {
        assert_eq!(parse_size("50 132\n"), Some((50, 132)));
        assert_eq!(parse_size("0 0\n"), None);
        assert_eq!(parse_size(""), None);
    }
}
