//! An eavesdropper that searches all packets of a host for known bytes, which would show that a
//! connection is not encrypted.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use memchr::memmem::Finder;
use socket2::{Domain, Protocol, Socket, Type};

use crate::host::Host;

/// Longest aggregated packet, bytes.
const PACKET_BYTES: usize = 1 << 17;
/// Size of the socket's buffer, bytes.
const BUFFER_BYTES: usize = 64 << 20;
/// Interval at which a blocked thread checks whether to stop.
const STOP_CHECK: Duration = Duration::from_millis(100);

/// An eavesdropper on all interfaces of a host.
pub struct Eavesdropper {
    shall_stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Heard>>,
}

/// Counts of an eavesdropper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Bytes of all packets together.
    pub bytes: u64,
    /// Packets that contain the known bytes.
    pub known: u64,
}

impl Eavesdropper {
    /// Starts to listen for packets with the bytes `known`.
    ///
    /// # Errors
    ///
    /// When the kernel refuses a packet socket.
    pub fn start(host: &Host, known: &'static [u8]) -> Result<Self> {
        let socket = host.within(|| all_packets(Type::RAW, BUFFER_BYTES));
        let socket = socket?.context("Cannot listen to packets")?;
        let shall_stop = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&shall_stop);
        let thread = thread::spawn(move || listen(socket, known, &stop));
        Ok(Self { shall_stop, thread })
    }

    /// Stops listening and returns the counts.
    ///
    /// # Errors
    ///
    /// When the socket failed before.
    pub fn finish(self) -> Result<Heard> {
        self.shall_stop.store(true, Ordering::Relaxed);
        let heard = self.thread.join();
        heard.map_err(|_| anyhow!("The eavesdropper panicked"))?
    }
}

/// Opens a packet socket (`packet(7)`) for all interfaces in the namespace of the calling thread. A
/// read returns after [`STOP_CHECK`] at the latest.
pub(super) fn all_packets(kind: Type, buffer_bytes: usize) -> io::Result<Socket> {
    let all = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
    let socket = Socket::new(Domain::PACKET, kind, Some(all))?;
    socket.set_recv_buffer_size(buffer_bytes)?;
    socket.set_read_timeout(Some(STOP_CHECK))?;
    Ok(socket)
}

fn listen(mut socket: Socket, known: &[u8], shall_stop: &AtomicBool) -> Result<Heard> {
    let finder = Finder::new(known);
    let mut heard = Heard::default();
    let mut packet = vec![0; PACKET_BYTES];
    while !shall_stop.load(Ordering::Relaxed) {
        match io::Read::read(&mut socket, &mut packet) {
            Ok(length) => {
                let packet = packet.get(..length).unwrap_or_default();
                heard.bytes += packet.len() as u64;
                heard.known += u64::from(finder.find(packet).is_some());
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error).context("Cannot listen to packets any more"),
        }
    }
    Ok(heard)
}
