//! Reads records of ring buffers from bytes.
#![allow(unsafe_code, reason = "a record is read from plain memory")]

use common::event::{FirstPacketEvent, ListenerEvent, QueryEvent, SourceEvent, UnfinishedEvent};
use common::maps::HeldFrame;
use common::{mat, trace};

/// A record type of a ring buffer.
///
/// # Safety
///
/// The type must be `#[repr(C)]` and accept any bytes.
pub unsafe trait Record: Copy {}

// SAFETY: `#[repr(C)]` structs of integers and byte arrays.
unsafe impl Record for ListenerEvent {}
// SAFETY: as above.
unsafe impl Record for SourceEvent {}
// SAFETY: as above.
unsafe impl Record for FirstPacketEvent {}
// SAFETY: as above.
unsafe impl Record for QueryEvent {}
// SAFETY: as above.
unsafe impl Record for UnfinishedEvent {}
// SAFETY: as above.
unsafe impl Record for HeldFrame {}
// SAFETY: as above.
unsafe impl Record for mat::maps::Held {}
// SAFETY: as above.
unsafe impl Record for trace::Record {}

/// Reads a record; `None` if there are too few bytes.
pub fn read<T: Record>(bytes: &[u8]) -> Option<T> {
    let bytes = bytes.get(..size_of::<T>())?;
    // SAFETY: there are enough bytes, and `Record` accepts any bytes.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
