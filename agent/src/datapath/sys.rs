//! Calls that need `unsafe`: map operations of `bpf(2)` that aya 0.14 lacks or offers to an
//! exclusive owner only, registration of a ring buffer with the runtime, and memory-mapped maps.
#![allow(
    unsafe_code,
    reason = "bpf(2) is a raw system call, and mapped maps are plain memory"
)]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use aya::Pod;
use common::maps::GateRecord;
use linux::bpf::sys::bpf;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;

/// Update flag: create or replace.
pub(super) const ANY: u64 = 0;
/// Update flag: create only.
pub(super) const NOEXIST: u64 = 1;
/// Update flag: replace only.
pub(super) const EXIST: u64 = 2;

/// Element variant of `union bpf_attr`: 32 bytes.
#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Batch variant of `union bpf_attr`: 56 bytes.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

const _: () = {
    assert!(size_of::<ElementAttr>() == 32);
    assert!(size_of::<BatchAttr>() == 56);
};

fn element<K>(map: BorrowedFd<'_>, key: &K, value: u64, flags: u64) -> ElementAttr {
    ElementAttr {
        map_fd: map.as_raw_fd().unsigned_abs(),
        pad: 0,
        key: (&raw const *key) as u64,
        value,
        flags,
    }
}

/// Returns the value of a key. `K` and `V` must have the map's key and value sizes, which
/// [`super::table::Table`] has checked.
pub(super) fn lookup<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    read_value(BPF_MAP_LOOKUP_ELEM, map, key)
}

/// Atomically removes a key and returns its value (kernel 5.14).
pub(super) fn take<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    read_value(BPF_MAP_LOOKUP_AND_DELETE_ELEM, map, key)
}

fn read_value<K: Pod, V: Pod>(
    command: libc::c_int,
    map: BorrowedFd<'_>,
    key: &K,
) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::zeroed();
    let mut attr = element(map, key, value.as_mut_ptr() as u64, 0);
    // SAFETY: key and value point to live memory of the map's key and value size.
    match unsafe { bpf(command, &mut attr) } {
        // SAFETY: `V` is `Pod`, so any bytes are a value.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a value, subject to the flags.
pub(super) fn update<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &V,
    flags: u64,
) -> io::Result<()> {
    let mut attr = element(map, key, (&raw const *value) as u64, flags);
    // SAFETY: key and value point to live memory of the map's key and value size.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// Removes a key; returns false if there was none.
pub(super) fn delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = element(map, key, 0, 0);
    // SAFETY: the key points to live memory of the map's key size.
    match unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads a whole hash map (kernel 5.6). Unlike iteration by `BPF_MAP_GET_NEXT_KEY`, this never
/// restarts when the kernel deletes the entry of the current position.
pub(super) fn entries<K: Pod, V: Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut all = Vec::new();
    let mut capacity: usize = 4096;
    let (mut position, mut next) = (0u32, 0u32);
    let mut first = true;
    let mut keys: Vec<K> = Vec::new();
    let mut values: Vec<V> = Vec::new();
    loop {
        keys.reserve(capacity);
        values.reserve(capacity);
        let mut attr = BatchAttr {
            in_batch: if first { 0 } else { (&raw mut position) as u64 },
            out_batch: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(capacity).unwrap_or(u32::MAX),
            map_fd: map.as_raw_fd().unsigned_abs(),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: both vectors are empty and have room for `count` elements of the map's key and
        // value size; the position in a hash map is 4 bytes.
        let result = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) };
        let last = match result {
            Ok(_) => false,
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                // One bucket has more entries than the vectors have room for.
                Some(libc::ENOSPC) if capacity < 1 << 24 => {
                    capacity *= 4;
                    continue;
                }
                _ => return Err(error),
            },
        };
        let count = usize::try_from(attr.count).unwrap_or(0).min(capacity);
        // SAFETY: the kernel has written `count` elements of each; `Pod` accepts any bytes.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        all.extend(keys.drain(..).zip(values.drain(..)));
        if last {
            return Ok(all);
        }
        position = next;
        first = false;
    }
}

/// An array map in this process's memory, readable without a system call per entry. The map must
/// have `BPF_F_MMAPABLE` (kernel 5.5).
pub(super) struct Mapping {
    address: NonNull<GateRecord>,
    entries: usize,
    bytes: usize,
}

// SAFETY: the memory stays mapped until the value is dropped, and all accesses are word by word to
// memory that may change at any time.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps an array of [`GateRecord`]s; the caller has checked the value size.
    pub(super) fn new(map: BorrowedFd<'_>, entries: u32) -> io::Result<Self> {
        let entries = usize::try_from(entries).map_err(|_| io::ErrorKind::InvalidInput)?;
        let bytes = entries * size_of::<GateRecord>();
        // SAFETY: the kernel chooses the address, and refuses a length that exceeds the map.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self {
            address,
            entries,
            bytes,
        })
    }

    pub(super) fn entries(&self) -> usize {
        self.entries
    }

    /// Reads an entry; `None` beyond the end, and while a program writes the entry.
    pub(super) fn read(&self, index: usize) -> Option<GateRecord> {
        let entry = self.entry(index)?;
        // SAFETY: the entry is mapped. The number is read before and after the rest, which reveals
        // a concurrent write: a program first sets the number to 0, and finally to a different
        // number.
        unsafe {
            let number = AtomicU64::from_ptr(&raw mut (*entry).number);
            let before = number.load(Ordering::Acquire);
            let record = GateRecord {
                number: before,
                flow: (&raw const (*entry).flow).read_volatile(),
                fingerprint: (&raw const (*entry).fingerprint).read_volatile(),
                at_ns: (&raw const (*entry).at_ns).read_volatile(),
            };
            fence(Ordering::Acquire);
            (before != 0 && number.load(Ordering::Relaxed) == before).then_some(record)
        }
    }

    /// Clears an entry that no program writes.
    pub(super) fn clear(&self, index: usize) {
        if let Some(entry) = self.entry(index) {
            // SAFETY: the entry is mapped for writing.
            unsafe { entry.write_volatile(GateRecord::default()) }
        }
    }

    fn entry(&self, index: usize) -> Option<*mut GateRecord> {
        // SAFETY: the index is within the mapping.
        (index < self.entries).then(|| unsafe { self.address.as_ptr().add(index) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the memory was mapped with this length, and no reference to it is left.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}

/// A file descriptor for the runtime to watch; it stays open and unchanged as long as the value
/// lives.
pub(super) struct Watched<T>(pub(super) T, RawFd);

impl<T> AsRawFd for Watched<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.1
    }
}

/// Registers an object for reading. Must be called in a tokio runtime.
pub(super) fn watch<T: AsRawFd>(object: T) -> io::Result<AsyncFd<Watched<T>>> {
    let fd = object.as_raw_fd();
    // SAFETY: the descriptor belongs to `object`. The `AsyncFd` never moves `object` out, so the
    // descriptor stays open until the `AsyncFd` is dropped.
    unsafe { AsyncFd::register_with_interest(Watched(object, fd), Interest::READABLE) }
        .map_err(io::Error::from)
}
