//! Routes and next hops, looked up for packets that are sent from here.

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
/// The loopback of every network namespace. Routes are looked up as for packets that this host
/// sends itself, which come from there. The helper wants an interface that forwards, which the
/// loopback may be (`net.ipv6.conf.lo.forwarding`) without making a router of the host.
pub const LOOPBACK: u32 = 1;

/// `struct bpf_fib_lookup`: 64 bytes.
#[repr(C)]
pub struct Route {
    family: u8,
    /// Next header of the packet.
    pub protocol: u8,
    /// Its UDP or TCP source port, network order; 0 for any.
    pub source_port: u16,
    /// Its destination port.
    pub destination_port: u16,
    /// In: bytes of the packet. Out: the path's MTU.
    pub bytes: u16,
    /// In: where the packet comes in. Out: where it goes out.
    pub ifindex: u32,
    flow: u32,
    /// Source address of the packet.
    pub source: Address,
    /// In: its destination address. Out: the next hop.
    pub destination: Address,
    /// In: the table, where one is given. Out: the VLAN.
    vlan_or_table: u32,
    /// Out: MACs of the interface and of the next hop.
    macs: [u32; 3],
}

const _: () = assert!(size_of::<Route>() == 64);

/// Why a packet cannot be sent.
#[derive(Clone, Copy)]
pub enum NoRoute {
    /// The next hop's link address is not known.
    Neighbour,
    /// The packet is larger than the path takes.
    TooBig,
    /// Routes cannot be looked up.
    Forwarding,
    /// There is none.
    Route,
}

impl Route {
    /// A question for the route of a packet of so many bytes, 0 for any, as if it came in by an
    /// interface.
    #[inline(always)]
    pub fn new(
        ifindex: u32,
        protocol: u8,
        bytes: u16,
        source: Address,
        destination: Address,
    ) -> Self {
        // Constants would be written by a call of `memset`.
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

    /// Looks it up; `context` is that of the program.
    #[inline(always)]
    pub fn look_up(&mut self, context: *mut c_void) -> Result<(), NoRoute> {
        self.ask(context, 0)
    }

    /// Looks it up in one table (kernel 6.5).
    #[inline(always)]
    pub fn look_up_in(&mut self, context: *mut c_void, table: u32) -> Result<(), NoRoute> {
        self.vlan_or_table = table;
        self.ask(context, BPF_FIB_LOOKUP_DIRECT | BPF_FIB_LOOKUP_TBID)
    }

    #[inline(always)]
    fn ask(&mut self, context: *mut c_void, flags: u32) -> Result<(), NoRoute> {
        // SAFETY: the context, and a structure of the kernel's form and size.
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
