//! The key file of a node: what `roamcast ims enroll` writes and `migkick node` reads.
//!
//! ```toml
//! hoa = "fd5e:6d61:74::1"
//! generation = 1
//! key = "<64 hexadecimal digits>"
//! home = "fd5e:6d61:74::/48"
//! servers = ["[2001:db8::1]:47413"]
//! ```

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use common::mat::key::Key;

use super::secret::hex;
use crate::config::Prefix;

/// What a key file says.
#[derive(Debug)]
pub struct KeyFile {
    /// HoA of the node.
    pub hoa: Ipv6Addr,
    /// Of the key.
    pub generation: u32,
    /// Key between the node and the servers.
    pub key: Key,
    /// Where all HoAs are.
    pub home: Prefix,
    /// The servers.
    pub servers: Vec<SocketAddrV6>,
}

impl fmt::Display for KeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<String> = self.servers.iter().map(|it| format!("\"{it}\"")).collect();
        writeln!(f, "hoa = \"{}\"", self.hoa)?;
        writeln!(f, "generation = {}", self.generation)?;
        writeln!(f, "key = \"{}\"", hex(&self.key.0))?;
        writeln!(f, "home = \"{}\"", self.home)?;
        writeln!(f, "servers = [{}]", servers.join(", "))
    }
}

/// A key file that is still empty, mode 0600. It is removed again unless it is written.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    file: File,
    written: bool,
}

impl Place {
    /// Makes the file, which must not be there.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn new(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            written: false,
        })
    }

    /// Writes it.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn write(mut self, content: &KeyFile) -> io::Result<()> {
        self.file.write_all(content.to_string().as_bytes())?;
        self.file.sync_all()?;
        self.written = true;
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.written {
            // Nothing is lost with an empty file that stays.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
