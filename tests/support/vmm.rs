//! A small VMM: vhost-net reads a TAP into a receive ring of ours, and is stopped as QEMU stops it.
//!
//! ```text
//!          vhost-net (kernel) --> receive ring --> Vmm::take, the guest
//!  TAP --<
//!          tap::read, QEMU's main loop after the stop: one frame, held back
//! ```
//!
//! The ring is a split virtqueue (virtio 1.2 §2.7) with one descriptor of [`BUFFER_BYTES`] for each
//! entry, so that a frame of an Ethernet takes one.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::net::VhostNet as _;
use vhost::vhost_kern::net::Net;
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
};
use vmm_sys_util::eventfd::EventFd;

use super::tap::HEADER_BYTES;

/// Number of the receive queue.
const RECEIVE: usize = 0;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
/// Flag of a descriptor that the device writes to.
const WRITE: u16 = 2;
/// Flag of the available ring: no interrupts, since the guest polls.
const NO_INTERRUPT: u16 = 1;
/// `struct vring_desc`, bytes.
const DESCRIPTOR_BYTES: u64 = 16;
/// Ring entries from its beginning: `flags` and `idx` are before them, bytes.
const ENTRIES: u64 = 4;
/// Where the index of a ring stands, bytes.
const INDEX: u64 = 2;
/// One entry of the used ring, bytes.
const USED_BYTES: u64 = 8;
const DESCRIPTORS_AT: u64 = 0;
const AVAILABLE_AT: u64 = 0x8000;
const USED_AT: u64 = 0xa000;
const BUFFERS_AT: u64 = 0x1_0000;
/// A buffer, header included.
const BUFFER_BYTES: u64 = 2048;
/// Most entries of a ring.
const MAX_ENTRIES: u64 = 1024;
const MEMORY_BYTES: u64 = BUFFERS_AT + MAX_ENTRIES * BUFFER_BYTES;

/// Whether this kernel has vhost-net; where it has not, that is printed.
pub(crate) fn is_there() -> bool {
    let is_there = Path::new("/dev/vhost-net").exists();
    if !is_there {
        println!("skipped: this kernel has no vhost-net");
    }
    is_there
}

/// A VM whose only device is the receiving half of a NIC.
pub(crate) struct Vmm {
    vhost: Net<Arc<GuestMemoryMmap>>,
    memory: Arc<GuestMemoryMmap>,
    kick: EventFd,
    entries: u16,
    /// Buffers that the guest has given.
    given: u16,
    /// Buffers that the guest has taken back.
    taken: u16,
}

impl Vmm {
    /// The VM runs, and vhost-net reads the TAP into an empty ring of so many entries, a power of two up
    /// to 1024.
    pub(crate) fn start(tap: &File, entries: u16, is_mergeable: bool) -> Self {
        let range = (GuestAddress(0), MEMORY_BYTES as usize);
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[range]).unwrap());
        let vhost = Net::new(memory.clone()).unwrap();
        vhost.set_owner().unwrap();
        let mergeable = if is_mergeable {
            VIRTIO_NET_F_MRG_RXBUF
        } else {
            0
        };
        let features = VIRTIO_F_VERSION_1 | mergeable;
        assert_eq!(vhost.get_features().unwrap() & features, features);
        vhost.set_features(features).unwrap();
        let region = memory.iter().next().unwrap();
        let info = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
            mmap_offset: 0,
            mmap_handle: -1,
        };
        vhost.set_mem_table(&[info]).unwrap();
        let mut vmm = Self {
            vhost,
            memory,
            kick: EventFd::new(0).unwrap(),
            entries,
            given: 0,
            taken: 0,
        };
        vmm.write(AVAILABLE_AT, NO_INTERRUPT);
        for entry in 0..entries {
            let at = DESCRIPTORS_AT + u64::from(entry) * DESCRIPTOR_BYTES;
            vmm.write(at, BUFFERS_AT + u64::from(entry) * BUFFER_BYTES);
            vmm.write(at + 8, BUFFER_BYTES as u32);
            vmm.write(at + 12, WRITE);
            vmm.give(entry);
        }
        let config = VringConfigData {
            queue_max_size: entries,
            queue_size: entries,
            flags: 0,
            desc_table_addr: DESCRIPTORS_AT,
            used_ring_addr: USED_AT,
            avail_ring_addr: AVAILABLE_AT,
            log_addr: None,
        };
        let vhost = &vmm.vhost;
        vhost.set_vring_num(RECEIVE, entries).unwrap();
        vhost.set_vring_base(RECEIVE, 0).unwrap();
        vhost.set_vring_addr(RECEIVE, &config).unwrap();
        vhost.set_vring_kick(RECEIVE, &vmm.kick).unwrap();
        vhost.set_backend(RECEIVE, Some(tap)).unwrap();
        vmm
    }

    /// The VM stops: what vhost-net has put into the ring is the guest's, and nothing comes any more.
    pub(crate) fn stop(&self) {
        self.vhost.set_backend(RECEIVE, None).unwrap();
    }

    /// What the guest takes out of the ring, at most so many frames; it gives the buffers back.
    pub(crate) fn take(&mut self, most: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while frames.len() < most && self.load(USED_AT + INDEX) != self.taken {
            let entry = u64::from(self.taken % self.entries);
            let used = USED_AT + ENTRIES + entry * USED_BYTES;
            let number: u32 = self.memory.read_obj(GuestAddress(used)).unwrap();
            let length: u32 = self.memory.read_obj(GuestAddress(used + 4)).unwrap();
            let mut frame = vec![0; length as usize];
            let buffer = BUFFERS_AT + u64::from(number) * BUFFER_BYTES;
            self.memory
                .read_slice(&mut frame, GuestAddress(buffer))
                .unwrap();
            frame.drain(..HEADER_BYTES);
            frames.push(frame);
            self.taken = self.taken.wrapping_add(1);
            self.give(number as u16);
        }
        if !frames.is_empty() {
            self.kick.write(1).unwrap();
        }
        frames
    }

    fn give(&mut self, entry: u16) {
        let at = AVAILABLE_AT + ENTRIES + u64::from(self.given % self.entries) * 2;
        self.write(at, entry);
        self.given = self.given.wrapping_add(1);
        let index = GuestAddress(AVAILABLE_AT + INDEX);
        self.memory
            .store(self.given, index, Ordering::Release)
            .unwrap();
    }

    fn load(&self, at: u64) -> u16 {
        self.memory
            .load(GuestAddress(at), Ordering::Acquire)
            .unwrap()
    }

    fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }
}
