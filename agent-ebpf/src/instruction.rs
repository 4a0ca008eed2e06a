//! Inline assembly: atomic operations, which the BPF target does not offer through
//! `core::sync::atomic`; word access to packets; and an optimizer barrier.

#![allow(unsafe_code, reason = "the instructions have no safe form")]

use core::arch::asm;
use core::mem::MaybeUninit;

/// Atomically adds to a number in a map value (`BPF_ADD`, no fetch).
///
/// # Safety
///
/// `number` points into a live map value.
#[inline(always)]
pub unsafe fn add_u64(number: *mut u64, amount: u64) {
    // SAFETY: the caller's pointer is valid; the instruction reads and writes 8 aligned bytes.
    unsafe {
        asm!("lock *(u64 *)({number} + 0) += {amount}", number = in(reg) number, amount = in(reg) amount);
    }
}

/// 32-bit variant of [`add_u64`]; wraps.
///
/// # Safety
///
/// `number` points into a live map value.
#[inline(always)]
pub unsafe fn add_u32(number: *mut u32, amount: u32) {
    // SAFETY: the caller's pointer is valid; the instruction reads and writes 4 aligned bytes.
    unsafe {
        asm!("lock *(u32 *)({number} + 0) += {amount}", number = in(reg) number, amount = in(reg) u64::from(amount));
    }
}

/// Atomically adds to a number in a map value, with a full barrier (kernel 5.12). Returns the
/// previous number.
///
/// # Safety
///
/// `number` points into a live map value.
#[inline(always)]
#[cfg(target_arch = "bpf")]
pub unsafe fn fetch_add(number: *mut u64, amount: u64) -> u64 {
    let mut found = amount;
    // SAFETY: the caller's pointer is valid; the instruction reads and writes 8 aligned bytes.
    unsafe {
        asm!("{found} = atomic_fetch_add((u64 *)({number} + 0), {found})", number = in(reg) number, found = inout(reg) found);
    }
    found
}

/// For lints on other targets, which have another instruction.
///
/// # Safety
///
/// None is needed.
#[cfg(not(target_arch = "bpf"))]
pub unsafe fn fetch_add(_number: *mut u64, amount: u64) -> u64 {
    amount
}

/// Atomically replaces a word of a map value, with a full barrier (kernel 5.12). Returns the
/// previous word.
///
/// # Safety
///
/// `word` points to an aligned word of a live map value.
#[inline(always)]
#[cfg(target_arch = "bpf")]
pub unsafe fn exchange(word: *mut u64, new: u64) -> u64 {
    let mut found = new;
    // SAFETY: the caller's pointer is valid; the instruction reads and writes 8 aligned bytes.
    unsafe {
        asm!("{found} = xchg_64({word} + 0, {found})", word = in(reg) word, found = inout(reg) found);
    }
    found
}

/// For lints on other targets.
///
/// # Safety
///
/// None is needed.
#[cfg(not(target_arch = "bpf"))]
pub unsafe fn exchange(_word: *mut u64, new: u64) -> u64 {
    new
}

/// Atomically writes `new` to a word of a map value that holds `expected` (kernel 5.12). Returns
/// the previous word.
///
/// # Safety
///
/// `word` points to an aligned word of a live map value.
#[inline(always)]
#[cfg(target_arch = "bpf")]
pub unsafe fn compare_exchange(word: *mut u64, expected: u64, new: u64) -> u64 {
    let mut found = expected;
    // SAFETY: the caller's pointer is valid; the instruction reads and writes 8 aligned bytes.
    unsafe {
        asm!("r0 = cmpxchg_64({word} + 0, r0, {new})", word = in(reg) word, new = in(reg) new, inout("r0") found);
    }
    found
}

/// For lints on other targets, which have no register `r0`.
///
/// # Safety
///
/// None is needed.
#[cfg(not(target_arch = "bpf"))]
pub unsafe fn compare_exchange(_word: *mut u64, expected: u64, _new: u64) -> u64 {
    expected
}

/// Reads 8 bytes of a packet or map value in one instruction.
///
/// The compiler would emit eight loads, because it assumes no alignment. On CPUs that require
/// alignment, the addresses are aligned: an IPv6 address has an offset of a multiple of 8 from the
/// IPv6 header, which the kernel aligns.
///
/// # Safety
///
/// `from` points to 8 live bytes of a packet or map value.
#[inline(always)]
pub unsafe fn load_u64(from: *const u8) -> u64 {
    let value;
    // SAFETY: the caller's pointer is valid; the instruction reads 8 bytes.
    unsafe {
        asm!("{value} = *(u64 *)({from} + 0)", value = out(reg) value, from = in(reg) from, options(pure, readonly));
    }
    value
}

/// Reads 4 bytes of a packet or map value in one instruction.
///
/// # Safety
///
/// As for [`load_u64`].
#[inline(always)]
pub unsafe fn load_u32(from: *const u8) -> u32 {
    let value: u64;
    // SAFETY: the caller's pointer is valid; the instruction reads 4 bytes.
    unsafe {
        asm!("{value} = *(u32 *)({from} + 0)", value = out(reg) value, from = in(reg) from, options(pure, readonly));
    }
    value as u32
}

/// Writes 8 bytes of a packet in one instruction.
///
/// # Safety
///
/// `to` points to 8 live bytes of a packet.
#[inline(always)]
pub unsafe fn store_u64(to: *mut u8, value: u64) {
    // SAFETY: the caller's pointer is valid; the instruction writes 8 bytes.
    unsafe {
        asm!("*(u64 *)({to} + 0) = {value}", value = in(reg) value, to = in(reg) to);
    }
}

/// Writes 4 bytes of a packet in one instruction.
///
/// # Safety
///
/// As for [`store_u64`].
#[inline(always)]
pub unsafe fn store_u32(to: *mut u8, value: u32) {
    // SAFETY: the caller's pointer is valid; the instruction writes 4 bytes.
    unsafe {
        asm!("*(u32 *)({to} + 0) = {value}", value = in(reg) u64::from(value), to = in(reg) to);
    }
}

/// Copies `BYTES` bytes, an even number, between packets, map values and the stack.
///
/// The compiler would call `memmove`, which copies single bytes, for a value that the program reads
/// and writes through pointers.
///
/// # Safety
///
/// `from` and `to` point to `BYTES` live bytes at even addresses, without overlap. A pointer to the
/// stack is aligned to 8 bytes.
#[inline(always)]
pub unsafe fn copy<const BYTES: usize>(from: *const u8, to: *mut u8) {
    const { assert!(BYTES.is_multiple_of(2)) }
    // SAFETY: the caller guarantees the bytes.
    unsafe {
        let mut at = 0;
        while at + 8 <= BYTES {
            store_u64(to.add(at), load_u64(from.add(at)));
            at += 8;
        }
        if at + 4 <= BYTES {
            store_u32(to.add(at), load_u32(from.add(at)));
            at += 4;
        }
        if at < BYTES {
            to.add(at)
                .cast::<u16>()
                .write(from.add(at).cast::<u16>().read());
        }
    }
}

/// Calls `use_it` with a zeroed map value on the stack.
///
/// The compiler would call `memset`, which adds a stack frame to every chain of calls.
///
/// # Safety
///
/// `T` consists of integers.
#[inline(always)]
pub unsafe fn with_zeroed<T: Copy, R>(use_it: impl FnOnce(&T) -> R) -> R {
    const { assert!(align_of::<T>() == 8) }
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the size of a type is a multiple of its alignment, and integers may be zero.
    unsafe {
        let mut at = 0;
        while at < size_of::<T>() {
            store_u64(value.as_mut_ptr().cast::<u8>().add(at), 0);
            at += 8;
        }
        use_it(value.assume_init_ref())
    }
}

/// Splits a word into its halves, in memory order.
#[inline(always)]
pub fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
    ]
}

/// Returns `value`, and hides its origin from the optimizer.
///
/// Verifier: two comparisons of one number must stay two comparisons of that number. The optimizer
/// would merge them into one comparison of a difference, which gives the verifier no bounds.
#[inline(always)]
pub fn opaque(mut value: u64) -> u64 {
    // An empty template would leave line information without an instruction; the kernel refuses
    // that.
    // SAFETY: the instruction changes nothing.
    unsafe { asm!("{value} += 0", value = inout(reg) value) }
    value
}

/// Returns a length between 1 and `MAX`, as helpers require for a memory size; `None` otherwise.
///
/// Verifier: older kernels, among them 6.1, learn no lower bound from `!= 0`. One comparison of
/// `length - 1` gives both bounds on every kernel.
#[inline(always)]
pub fn size<const MAX: usize>(length: usize) -> Option<u64> {
    let below = opaque((length as u64).wrapping_sub(1));
    (below < MAX as u64).then(|| opaque(below) + 1)
}
