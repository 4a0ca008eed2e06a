//! A guest behind a real TAP. The guest's NIC is a second TAP in a separate namespace, and a thread
//! carries frames between the two, as a hypervisor does.
#![allow(unsafe_code, reason = "TUNSETIFF is an ioctl")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::netns::Namespace;

/// `struct ifreq` with flags: 40 bytes.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    padding: [u8; 22],
}

mod ioctl {
    nix::ioctl_write_ptr_bad!(
        /// `TUNSETIFF`: makes the TAP.
        set_interface,
        0x4004_54ca,
        super::Request
    );
    nix::ioctl_write_ptr_bad!(
        /// `TUNSETVNETHDRSZ`: length of the header in front of each frame.
        set_header_bytes,
        0x4004_54d8,
        libc::c_int
    );
    nix::ioctl_write_int_bad!(
        /// `TUNSETOFFLOAD`: aggregates and partial checksums that the reader takes.
        set_offload,
        0x4004_54d0
    );
}

/// `TUN_F_CSUM`, `TUN_F_TSO4`, `TUN_F_TSO6`, `TUN_F_USO4` and `TUN_F_USO6`.
const EVERY_OFFLOAD: libc::c_int = 0x67;

const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// `struct virtio_net_hdr_v1`, bytes.
pub const HEADER_BYTES: usize = 12;

/// Opens a TAP in the namespace of the calling thread; the TAP disappears when the file is closed.
pub fn open(name: &str) -> File {
    open_as(name, IFF_TAP | IFF_NO_PI)
}

/// Opens a TAP with several queues, one file each. Each frame has [`HEADER_BYTES`] in front, as for
/// QEMU and vhost-net.
pub fn open_queues(name: &str, queues: usize) -> Vec<File> {
    let several = if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
    let open = || {
        let file = open_as(name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | several);
        let bytes = HEADER_BYTES as libc::c_int;
        // SAFETY: the number is live and of the size that the ioctl reads.
        unsafe { ioctl::set_header_bytes(file.as_raw_fd(), &raw const bytes) }
            .expect("TUNSETVNETHDRSZ");
        file
    };
    (0..queues).map(|_| open()).collect()
}

/// Makes a TAP accept aggregates of TCP and UDP whole, as QEMU does for a capable guest. Returns
/// false if the kernel has no UDP aggregates.
pub fn takes_aggregates(tap: &File) -> bool {
    // SAFETY: the ioctl takes a number.
    unsafe { ioctl::set_offload(tap.as_raw_fd(), EVERY_OFFLOAD) }.is_ok()
}

/// Reads one frame from a TAP, as a hypervisor's main loop does; `None` if none arrives in time.
pub fn read(mut tap: &File, patience: PollTimeout) -> Option<Vec<u8>> {
    let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, patience).expect("poll");
    let mut frame = vec![0; 2048];
    let length = tap.read(&mut frame).ok()?;
    Some(frame[..length].to_vec())
}

fn open_as(name: &str, flags: u16) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .expect("/dev/net/tun");
    let mut request = Request {
        name: [0; 16],
        flags,
        padding: [0; 22],
    };
    for (target, byte) in request.name.iter_mut().zip(name.bytes()) {
        *target = byte;
    }
    // SAFETY: the request is a live structure of the size that the ioctl reads and writes.
    unsafe { ioctl::set_interface(file.as_raw_fd(), &raw const request) }.expect("TUNSETIFF");
    file
}

/// A guest with one NIC, `eth0`, connected to a bridge by a TAP. Dropping the guest removes the
/// TAP.
pub struct Guest {
    /// Namespace of the guest, with `eth0`.
    pub namespace: Namespace,
    /// Interface index of the TAP at the host.
    pub ifindex: u32,
    stop: Arc<AtomicBool>,
    pump: Option<JoinHandle<()>>,
}

impl Guest {
    /// Starts a guest on a TAP named `port` of `bridge` in `host`. `version` forces the guest's MLD
    /// version (0: follow the querier).
    pub fn start(host: &Namespace, bridge: &str, port: &str, version: u8) -> Self {
        let namespace = Namespace::new(port);
        let outer = host.run(|| open(port));
        let inner = namespace.run(|| open("eth0"));
        host.ip(&format!("link set {port} master {bridge} up"));
        namespace.run(|| {
            let path = "/proc/sys/net/ipv6/conf/eth0/force_mld_version";
            std::fs::write(path, version.to_string()).expect("force_mld_version");
        });
        let stop = Arc::new(AtomicBool::new(false));
        let pump = thread::spawn({
            let stop = Arc::clone(&stop);
            move || carry(&outer, &inner, &stop)
        });
        namespace.ip("link set eth0 up");
        let ifindex = host.ifindex(port);
        Self {
            namespace,
            ifindex,
            stop,
            pump: Some(pump),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(pump) = self.pump.take() {
            let _ = pump.join();
        }
    }
}

fn carry(outer: &File, inner: &File, stop: &AtomicBool) {
    let mut frame = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        let mut fds = [
            PollFd::new(outer.as_fd(), PollFlags::POLLIN),
            PollFd::new(inner.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, PollTimeout::from(50u8));
        for (mut from, mut to) in [(outer, inner), (inner, outer)] {
            while let Ok(length) = from.read(&mut frame) {
                // A NIC that is down refuses the frame, like an unplugged cable.
                let _ = to.write(&frame[..length]);
            }
        }
    }
}
