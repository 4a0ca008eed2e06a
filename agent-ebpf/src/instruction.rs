//! What needs inline assembly: atomic operations, which the BPF target does not offer through
//! `core::sync::atomic`, wide access to packets, and a barrier to the optimizer.

#![allow(unsafe_code, reason = "the instructions have no safe form")]

use core::arch::asm;
use core::mem::MaybeUninit;

/// Adds to a number in a map value that other CPUs write too.
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

/// The same with 32 bits; wraps.
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

/// Adds to a number in a map value that other CPUs write too, in one step with reading it and
/// with a full barrier (kernel 5.12). Returns what it was before.
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

/// Only for lints, whose processor has another instruction for that.
///
/// # Safety
///
/// None is needed.
#[cfg(not(target_arch = "bpf"))]
pub unsafe fn fetch_add(_number: *mut u64, amount: u64) -> u64 {
    amount
}

/// Writes a word of a map value, and returns what it held: in one step and with a full barrier
/// (kernel 5.12).
///
/// # Safety
///
/// `word` points into a live map value, to an aligned word.
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

/// Only for lints, as above.
///
/// # Safety
///
/// None is needed.
#[cfg(not(target_arch = "bpf"))]
pub unsafe fn exchange(_word: *mut u64, new: u64) -> u64 {
    new
}

/// Writes `new` to a word of a map value if it holds `expected`, in one step (kernel 5.12).
/// Returns what it held.
///
/// # Safety
///
/// `word` points into a live map value, to an aligned word.
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

/// Only for lints, which read the programs for a processor without that register.
///
/// # Safety
///
/// None is needed.
#[cfg(not(target_arch = "bpf"))]
pub unsafe fn compare_exchange(_word: *mut u64, expected: u64, _new: u64) -> u64 {
    expected
}

/// Reads 8 bytes of a packet or map value, in one instruction.
///
/// The compiler would take eight for what may not be aligned. Where the processor has to have it
/// aligned, so it is: addresses stand at 8 bytes counted from where the kernel puts IPv6 headers.
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

/// The same with 4 bytes.
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

/// Writes 8 bytes of a packet.
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

/// The same with 4 bytes.
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
/// The compiler would call `memmove`, which copies byte by byte, for a value that is read and
/// written through pointers.
///
/// # Safety
///
/// `from` and `to` point to so many live bytes at even addresses, which do not overlap; on the stack
/// they are aligned to 8.
#[inline(always)]
pub unsafe fn copy<const BYTES: usize>(from: *const u8, to: *mut u8) {
    const { assert!(BYTES.is_multiple_of(2)) }
    // SAFETY: the caller answers for the bytes.
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

/// Calls `use_it` with a map value of zeros.
///
/// The compiler would call `memset`, which takes a frame of the stack in every chain of calls.
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

/// The two halves of a word, in the order in which they lie.
#[inline(always)]
pub fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
    ]
}

/// Returns `value`, of which the optimizer then knows nothing.
///
/// Verifier: two comparisons of one number stay two, on the number itself, instead of becoming
/// one of a difference, from which the verifier learns no bounds.
#[inline(always)]
pub fn opaque(mut value: u64) -> u64 {
    // An empty text would leave line information without an instruction, which the kernel refuses.
    // SAFETY: the instruction changes nothing.
    unsafe { asm!("{value} += 0", value = inout(reg) value) }
    value
}

/// Returns a length that helpers take as the size of memory, 1 to `MAX` bytes; `None` for any other.
///
/// Verifier: Older kernels, 6.1 among them, learn no lower bound from `!= 0`. One comparison of the number
/// below gives both bounds on every kernel.
#[inline(always)]
pub fn size<const MAX: usize>(length: usize) -> Option<u64> {
    let below = opaque((length as u64).wrapping_sub(1));
    (below < MAX as u64).then(|| opaque(below) + 1)
}
