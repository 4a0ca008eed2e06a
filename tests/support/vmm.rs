//! A small VMM: vhost-net reads a TAP's queue into a receive ring of the test, and is stopped as
//! QEMU stops it.
//!
//! ```text
//!          vhost-net (kernel) --> receive ring --> Vmm::take, the guest
//!  TAP --<
//!          lab::main_loop, QEMU after the stop: one frame, held back
//! ```
//!
//! The ring is a split virtqueue (virtio 1.2 §2.7) with one descriptor per entry. A frame longer
//! than a buffer takes several if the buffers are mergeable (§5.1.6.4). The kernel supports no
//! packed rings for vhost-net.

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
const VIRTIO_F_RING_PACKED: u64 = 1 << 34;
/// Descriptor flag: the device writes to the buffer.
const WRITE: u16 = 2;
/// Flag of the available ring: no interrupts, because the guest polls.
const NO_INTERRUPT: u16 = 1;
/// Offset of a ring's entries, behind `flags` and `idx`, bytes.
const ENTRIES: u64 = 4;
/// Offset of a ring's index, bytes.
const INDEX: u64 = 2;
/// Size of a used ring's entry, bytes.
const USED_BYTES: u64 = 8;
const DESCRIPTORS_AT: u64 = 0;
const AVAILABLE_AT: u64 = 0x8000;
const USED_AT: u64 = 0xa000;
const BUFFERS_AT: u64 = 0x1_0000;
/// Space per buffer, bytes.
const BUFFER_BYTES: u64 = 2048;
/// Position of `num_buffers` in a frame's header.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// Limit of a ring's entries.
const MAX_ENTRIES: u64 = 1024;
const MEMORY_BYTES: u64 = BUFFERS_AT + MAX_ENTRIES * BUFFER_BYTES;

/// Returns true if this kernel has vhost-net; prints a message otherwise.
pub fn is_there() -> bool {
    let is_there = Path::new("/dev/vhost-net").exists();
    if !is_there {
        println!("skipped: this kernel has no vhost-net");
    }
    is_there
}

/// Ring that the guest's driver gives to the device.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// Number of entries, a power of two up to 1024.
    pub entries: u16,
    /// Whether a frame may take several buffers.
    pub is_mergeable: bool,
    /// Length of each buffer including the header, up to 2048 bytes.
    pub buffer_bytes: u32,
}

/// A VM whose only device is the receive queue of one NIC.
pub struct Vmm {
    vhost: Net<Arc<GuestMemoryMmap>>,
    memory: Arc<GuestMemoryMmap>,
    kick: EventFd,
    entries: u16,
    /// Buffers that the guest made available so far, modulo 2^16.
    given: u16,
    /// Buffers that the guest took back so far, modulo 2^16.
    taken: u16,
}

impl Vmm {
    /// Starts the VM: vhost-net reads a queue of the TAP into an empty ring.
    pub fn start(tap: &File, ring: Ring) -> Self {
        let range = (GuestAddress(0), MEMORY_BYTES as usize);
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[range]).unwrap());
        let vhost = Net::new(memory.clone()).unwrap();
        vhost.set_owner().unwrap();
        let mergeable = if ring.is_mergeable {
            VIRTIO_NET_F_MRG_RXBUF
        } else {
            0
        };
        let features = VIRTIO_F_VERSION_1 | mergeable;
        let offered = vhost.get_features().unwrap();
        assert_eq!(offered & features, features);
        assert_eq!(offered & VIRTIO_F_RING_PACKED, 0, "packed rings are new");
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
        let vmm = Self {
            vhost,
            memory,
            kick: EventFd::new(0).unwrap(),
            entries: ring.entries,
            given: ring.entries,
            taken: 0,
        };
        vmm.lay_out(ring);
        let config = VringConfigData {
            queue_max_size: ring.entries,
            queue_size: ring.entries,
            flags: 0,
            desc_table_addr: DESCRIPTORS_AT,
            used_ring_addr: USED_AT,
            avail_ring_addr: AVAILABLE_AT,
            log_addr: None,
        };
        let vhost = &vmm.vhost;
        vhost.set_vring_num(RECEIVE, ring.entries).unwrap();
        vhost.set_vring_base(RECEIVE, 0).unwrap();
        vhost.set_vring_addr(RECEIVE, &config).unwrap();
        vhost.set_vring_kick(RECEIVE, &vmm.kick).unwrap();
        vhost.set_backend(RECEIVE, Some(tap)).unwrap();
        vmm
    }

    /// Writes the descriptors and gives all buffers to the device.
    fn lay_out(&self, ring: Ring) {
        let mut descriptors = Vec::new();
        let mut available = Vec::new();
        available.extend(NO_INTERRUPT.to_le_bytes());
        available.extend(ring.entries.to_le_bytes());
        for entry in 0..ring.entries {
            descriptors.extend((BUFFERS_AT + u64::from(entry) * BUFFER_BYTES).to_le_bytes());
            descriptors.extend(ring.buffer_bytes.to_le_bytes());
            descriptors.extend(u32::from(WRITE).to_le_bytes());
            available.extend(entry.to_le_bytes());
        }
        for (at, bytes) in [(DESCRIPTORS_AT, descriptors), (AVAILABLE_AT, available)] {
            self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        }
    }

    /// Stops the VM: frames in the ring belong to the guest, and vhost-net adds no more.
    pub fn stop(&self) {
        self.vhost.set_backend(RECEIVE, None).unwrap();
    }

    /// Takes up to `most` frames out of the ring as the guest, and gives the buffers back.
    pub fn take(&mut self, most: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while frames.len() < most && self.load(USED_AT + INDEX) != self.taken {
            let mut frame = self.take_buffer();
            let buffers: [u8; 2] = frame[NUM_BUFFERS].try_into().unwrap();
            for _ in 1..u16::from_le_bytes(buffers) {
                frame.extend(self.take_buffer());
            }
            frame.drain(..HEADER_BYTES);
            frames.push(frame);
        }
        if !frames.is_empty() {
            self.kick.write(1).unwrap();
        }
        frames
    }

    fn take_buffer(&mut self) -> Vec<u8> {
        assert_ne!(self.load(USED_AT + INDEX), self.taken, "half a frame");
        let entry = u64::from(self.taken % self.entries);
        let used = USED_AT + ENTRIES + entry * USED_BYTES;
        let number: u32 = self.memory.read_obj(GuestAddress(used)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(used + 4)).unwrap();
        let mut part = vec![0; length as usize];
        let buffer = BUFFERS_AT + u64::from(number) * BUFFER_BYTES;
        self.memory
            .read_slice(&mut part, GuestAddress(buffer))
            .unwrap();
        self.taken = self.taken.wrapping_add(1);
        self.give(number as u16);
        part
    }

    fn give(&mut self, entry: u16) {
        let at = AVAILABLE_AT + ENTRIES + u64::from(self.given % self.entries) * 2;
        self.memory.write_obj(entry, GuestAddress(at)).unwrap();
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
}
