//! The key file of a node, which `roamcast ims enroll` writes and `migkick node` reads.
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
use crate::value::Prefix;

/// Content of a key file.
#[derive(Debug)]
pub struct KeyFile {
    /// Home address of the node.
    pub hoa: Ipv6Addr,
    /// Generation of the key.
    pub generation: u32,
    /// Key that the node shares with the servers, 32 bytes.
    pub key: Key,
    /// Home prefix: the prefix of all home addresses.
    pub home: Prefix,
    /// Mapping servers at which the node registers.
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

/// An empty key file with mode 0600. Dropping the value without a write removes the file.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    file: File,
    written: bool,
}

impl Place {
    /// Creates the file. The file must not exist.
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

    /// Writes the content, and keeps the file.
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
            // An empty file that stays does no harm.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
