//! The program that libvirt's hook runs when an incoming migration begins.
//!
//! ```text
//! libvirt --- domain XML ---> read, at most [`MAX_XML_BYTES`]
//!                             ask the local agent to prepare   (operator's socket)
//! libvirt <---- nothing ----- done, refused, or [`BOUND`](super::BOUND) is over
//! ```

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::control::client::{Client, ClientError};
use crate::control::request;
use crate::hypervisor::domain_xml::DomainXmlError;
use crate::hypervisor::metadata::{self, MAX_XML_BYTES};

/// Socket of the system's log.
const SYSTEM_LOG: &str = "/dev/log";
/// Facility daemon, severity warning (RFC 5424 §6.2.1).
const PRIORITY: u8 = 3 * 8 + 4;

/// Why a domain arrives without preparation.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// Reading libvirt's XML failed.
    #[error("libvirt's domain XML could not be read: {0}; run the hook by libvirt only")]
    Input(#[from] io::Error),
    /// The XML is larger than the XML of any domain.
    #[error(
        "libvirt's domain XML has more than {MAX_XML_BYTES} bytes; run the hook by libvirt only"
    )]
    TooLong,
    /// The XML is unusable.
    #[error(transparent)]
    Xml(#[from] DomainXmlError),
    /// The metadata names no agent.
    #[error(
        "Domain {domain} comes from a host without an agent, or one with libvirt.metadata = false; \
         start the agent there to have its streams handed over"
    )]
    NoAgent {
        /// Name of the arriving domain.
        domain: String,
    },
    /// The agent of this host refused, or gave no answer.
    #[error("{0}")]
    Client(#[from] ClientError),
    /// The time limit is over.
    #[error("The agent of this host did not answer within {} s; see its log", .0.as_secs())]
    Late(Duration),
    /// The system refuses a thread.
    #[error("Cannot start a thread: {0}; raise the limit of threads")]
    Thread(#[source] io::Error),
}

/// Returns true if libvirt's arguments (name, operation, sub-operation, extra) announce an incoming
/// migration.
pub fn concerns(arguments: &[OsString]) -> bool {
    matches!(arguments, [_, operation, sub_operation, ..]
        if operation == "migrate" && sub_operation == "begin")
}

/// Makes the agent behind `socket` prepare for a domain, whose XML `input` contains, within
/// `bound`.
///
/// # Errors
///
/// [`HookError`]: the domain arrives without preparation. The caller can do nothing about that.
pub fn run(
    input: impl Read + Send + 'static,
    socket: PathBuf,
    bound: Duration,
) -> Result<(), HookError> {
    // After the time limit the thread is abandoned: its calls cannot be interrupted.
    let (sender, result) = mpsc::channel();
    thread::Builder::new()
        .name("hook".to_owned())
        .spawn(move || {
            let _ = sender.send(prepare(input, &socket));
        })
        .map_err(HookError::Thread)?;
    result
        .recv_timeout(bound)
        .unwrap_or(Err(HookError::Late(bound)))
}

fn prepare(input: impl Read, socket: &std::path::Path) -> Result<(), HookError> {
    let mut xml = String::new();
    let length = input.take(MAX_XML_BYTES + 1).read_to_string(&mut xml)?;
    if u64::try_from(length).is_ok_and(|length| length > MAX_XML_BYTES) {
        return Err(HookError::TooLong);
    }
    let domain = metadata::arriving(&xml)?;
    let Some(agent) = domain.agent else {
        let domain = domain.name;
        return Err(HookError::NoAgent { domain });
    };
    let request = request::Agent::Prepare {
        domain_uuid: domain.uuid,
        domain_name: domain.name,
        source: agent.to_string(),
    };
    Client::connect(socket)?.ask(&request, |_| {})?;
    Ok(())
}

/// Logs why a domain arrives without preparation: to standard error, and to the system's log if
/// there is one. libvirt logs the standard error of a successful hook only at its debug level.
pub fn report(error: &HookError) {
    // Standard error may be closed.
    let _ = writeln!(io::stderr(), "{error}");
    let line = format!("<{PRIORITY}>roamcast-hook: {error}");
    if let Ok(log) = UnixDatagram::unbound()
        && log.set_nonblocking(true).is_ok()
    {
        let _ = log.send_to(line.as_bytes(), SYSTEM_LOG);
    }
}

#[cfg(test)]
mod tests;
