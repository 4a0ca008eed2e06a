//! FIB look-ups (`bpf_fib_lookup`) for packets that the programs send.

#![allow(unsafe_code, reason = "the helper takes raw pointers")]

use core::ffi::c_void;

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
    BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_DIRECT, BPF_FIB_LOOKUP_TBID,
};
use aya_ebpf::helpers::bpf_fib_lookup;
use common::maps::Address;

use crate::instruction;

/// `AF_INET6`.
pub const INET6: u32 = 10;
/// Index of the loopback interface in every network namespace. The look-up treats a packet as if
/// the host itself sent it, so the packet enters by the loopback. The helper requires forwarding on
/// that interface; `net.ipv6.conf.lo.forwarding` enables forwarding without making the host a
/// router.
pub const LOOPBACK: u32 = 1;

/// `struct bpf_fib_lookup`: 64 bytes, align 4.
#[repr(C)]
pub struct Route {
    family: u8,
    /// Next header of the packet (IPv6).
    pub protocol: u8,
    /// UDP or TCP source port, network order; 0 for any.
    pub source_port: u16,
    /// UDP or TCP destination port, network order; 0 for any.
    pub destination_port: u16,
    /// In: length of the packet, bytes. Out: the path MTU.
    pub bytes: u16,
    /// In: ingress interface. Out: egress interface.
    pub ifindex: u32,
    flow: u32,
    /// Source address of the packet, network order.
    pub source: Address,
    /// In: destination address of the packet. Out: next hop.
    pub destination: Address,
    /// In: routing table for a look-up in one table. Out: VLAN.
    vlan_or_table: u32,
    /// Out: MAC of the interface, then MAC of the next hop.
    macs: [u32; 3],
}

const _: () = assert!(size_of::<Route>() == 64);

/// Why a packet cannot be sent.
#[derive(Clone, Copy)]
pub enum NoRoute {
    /// The kernel knows no link address of the next hop.
    Neighbour,
    /// The packet exceeds the path MTU.
    TooBig,
    /// Forwarding is disabled on the ingress interface.
    Forwarding,
    /// The table has no usable route.
    Route,
}

impl Route {
    /// Builds the look-up for a packet of `bytes` bytes (0 skips the MTU check) that enters by
    /// `ifindex`.
    #[inline(always)]
    pub fn new(
        ifindex: u32,
        protocol: u8,
        bytes: u16,
        source: Address,
        destination: Address,
    ) -> Self {
        // `opaque`: the compiler would write constants by a call of `memset`.
        let zero = instruction::opaque(0) as u32;
        Self {
            family: INET6 as u8,
            protocol,
            source_port: 0,
            destination_port: 0,
            bytes,
            ifindex,
            flow: 0,
            source,
            destination,
            vlan_or_table: zero,
            macs: [zero, zero, zero],
        }
    }

    /// MACs of the frame to send: destination, then source.
    #[inline(always)]
    pub fn macs(&self) -> [[u8; 6]; 2] {
        let [first, middle, last] = self.macs.map(u32::to_ne_bytes);
        let [a, b, c, d] = first;
        let [e, f, g, h] = middle;
        let [i, j, k, l] = last;
        [[g, h, i, j, k, l], [a, b, c, d, e, f]]
    }

    /// Looks up the route in the usual tables; `context` is the program's context.
    #[inline(always)]
    pub fn look_up(&mut self, context: *mut c_void) -> Result<(), NoRoute> {
        self.ask(context, 0)
    }

    /// Looks up the route in one table (kernel 6.5).
    #[inline(always)]
    pub fn look_up_in(&mut self, context: *mut c_void, table: u32) -> Result<(), NoRoute> {
        self.vlan_or_table = table;
        self.ask(context, BPF_FIB_LOOKUP_DIRECT | BPF_FIB_LOOKUP_TBID)
    }

    #[inline(always)]
    fn ask(&mut self, context: *mut c_void, flags: u32) -> Result<(), NoRoute> {
        // SAFETY: the pointers are the program's context and a structure of the kernel's layout and
        // size.
        let found = unsafe {
            bpf_fib_lookup(
                context,
                (&raw mut *self).cast(),
                size_of::<Self>() as i32,
                flags,
            )
        };
        if found == i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
            return Ok(());
        }
        Err(match found as u32 {
            BPF_FIB_LKUP_RET_NO_NEIGH => NoRoute::Neighbour,
            BPF_FIB_LKUP_RET_FRAG_NEEDED => NoRoute::TooBig,
            BPF_FIB_LKUP_RET_FWD_DISABLED => NoRoute::Forwarding,
            _ => NoRoute::Route,
        })
    }
}
