//! Counts the frames that QEMU itself reads from a TAP served by vhost-net, apart from those that
//! vhost-net reads.
//!
//! ```text
//!          vhost-net --.
//!  TAP --<              >-- counted together by the kernel (`tx_packets`)
//!          QEMU -------'
//!            '-- read(2) --> read_enter, read_exit --> READS
//! ```
//!
//! While a counter exists, two programs run on every system call of the host and slow each call
//! down by some tenths of a microsecond.

use std::fs;
use std::io;
use std::mem::offset_of;
use std::os::linux::fs::MetadataExt as _;

use aya::Ebpf;
use aya::maps::{Array, MapData};
use aya::programs::RawTracePoint;
use common::reads::Reader;

use super::table::Table;
use super::{Datapath, DatapathError, convert, load_error, lock, map_error, object};

/// Programs and their tracepoints. `sys_exit` comes first, so that no read begins without an
/// observed end.
const PROGRAMS: [(&str, &str); 2] = [("read_exit", "sys_exit"), ("read_enter", "sys_enter")];
/// PID namespace to which the numbers in `/proc` belong.
const PID_NAMESPACE: &str = "/proc/self/ns/pid";
/// Bits of the minor number in the kernel's internal encoding of a device number.
const MINOR_BITS: u32 = 20;

/// Offset of the first system call argument in the kernel's `struct pt_regs`, in bytes. The
/// registers have the same order there as in ptrace's `user_regs_struct`. `None` on other
/// architectures.
const ARGUMENT_AT: Option<usize> = cfg_select! {
    target_arch = "x86_64" => Some(offset_of!(libc::user_regs_struct, rdi)),
    target_arch = "aarch64" => Some(offset_of!(libc::user_regs_struct, regs)),
    _ => None,
};

/// Name of the object in messages.
const OBJECT: &str = "reads";

/// Counter of what one thread reads from one TAP; dropping the value stops it.
pub struct OwnReads {
    reads: Table<u32, u64>,
    descriptors: Vec<u32>,
    /// Keeps the programs and their links alive.
    _programs: Ebpf,
}

impl Datapath {
    /// Starts to count the reads of a thread (the main thread of a QEMU) from the process's
    /// descriptors of a TAP, one per queue.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Load`] if the kernel lacks the tracepoints or refuses the programs.
    pub fn own_reads(&self, thread: u32, descriptors: &[u32]) -> Result<OwnReads, DatapathError> {
        let reader = reader(thread).map_err(|error| {
            DatapathError::Load(format!(
                "the system calls of QEMU cannot be told apart: {error}"
            ))
        })?;
        let mut programs = lock(&self.inner.loader)
            .load(object::READS)
            .map_err(|error| load_error(OBJECT, &error))?;
        let mut readers: Array<MapData, Reader> = convert("READER", programs.take_map("READER"))?;
        readers
            .set(0, reader, 0)
            .map_err(|error| map_error("READER", error))?;
        let reads: Table<u32, u64> = Table::new("READS", programs.take_map("READS"))?;
        for descriptor in descriptors {
            reads.insert(descriptor, &0)?;
        }
        for (name, tracepoint) in PROGRAMS {
            let program: &mut RawTracePoint = programs
                .program_mut(name)
                .and_then(|program| program.try_into().ok())
                .ok_or(DatapathError::Layout { name })?;
            program.load().map_err(|error| load_error(name, &error))?;
            program
                .attach(tracepoint)
                .map_err(|error| load_error(name, &error))?;
        }
        Ok(OwnReads {
            reads,
            descriptors: descriptors.to_vec(),
            _programs: programs,
        })
    }
}

impl OwnReads {
    /// Returns the frames that the thread has read from all queues since [`Datapath::own_reads`].
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn count(&self) -> Result<u64, DatapathError> {
        self.descriptors.iter().try_fold(0_u64, |sum, descriptor| {
            let reads = self.reads.get(descriptor)?.unwrap_or_default();
            Ok(sum.saturating_add(reads))
        })
    }
}

fn reader(thread: u32) -> io::Result<Reader> {
    let argument_at = ARGUMENT_AT.ok_or(io::ErrorKind::Unsupported)?;
    let namespace = fs::metadata(PID_NAMESPACE)?;
    let device = namespace.st_dev();
    let device = u64::from(libc::major(device)) << MINOR_BITS | u64::from(libc::minor(device));
    Ok(Reader {
        namespace_device: device,
        namespace_inode: namespace.st_ino(),
        read: libc::SYS_read.cast_unsigned(),
        argument_at: argument_at as u64,
        thread,
        pad: 0,
    })
}
