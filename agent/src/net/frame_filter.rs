//! Classic BPF filters that select the frames of a packet socket in the kernel.

use std::io;
use std::net::Ipv6Addr;

use common::wire::neighbour::{ADVERTISEMENT, ICMPV6, SOLICITATION};
use linux::packet_socket::{Instruction, PacketSocket};

const IPV6: u32 = 0x86dd;
/// `SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT`: nonzero if the kernel has moved a VLAN tag out of the
/// frame.
const TAG_PRESENT: u32 = (-0x1000_i32 + 48).cast_unsigned();

/// Offsets in an untagged frame.
const ETHER_TYPE: u32 = 12;
const NEXT_HEADER: u32 = 20;
const SOURCE: u32 = 22;
const DESTINATION: u32 = 38;
const ICMPV6_TYPE: u32 = 54;
/// First byte of an IPv6 multicast address.
const MULTICAST: u32 = 0xff;

const WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
const BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// A selection of untagged frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Neighbor Solicitations and Advertisements.
    Neighbours,
    /// Neighbor Solicitations to a unicast address, as sent by Neighbor Unreachability Detection
    /// (RFC 4861 §7.3).
    UnicastSolicitations,
    /// IPv6 packets from this source address.
    From(Ipv6Addr),
}

/// Opens a packet socket for frames that arrive on an interface of the calling thread's network
/// namespace.
///
/// # Errors
///
/// The error of the kernel; the call needs `CAP_NET_RAW`.
pub fn open(ifindex: u32, wanted: Wanted) -> io::Result<PacketSocket> {
    PacketSocket::filtered(ifindex, &program(wanted))
}

/// Neighbor Solicitations and Advertisements.
const NEIGHBOURS: [Instruction; 11] = [
    load(BYTE, TAG_PRESENT),
    equal(0, 8),
    load(HALF, ETHER_TYPE),
    equal(IPV6, 6),
    load(BYTE, NEXT_HEADER),
    equal(ICMPV6 as u32, 4),
    load(BYTE, ICMPV6_TYPE),
    jump(SOLICITATION as u32, 1, 0),
    equal(ADVERTISEMENT as u32, 1),
    PASS,
    DROP,
];

/// Neighbor Solicitations to a unicast address.
const UNICAST_SOLICITATIONS: [Instruction; 12] = [
    load(BYTE, TAG_PRESENT),
    equal(0, 9),
    load(HALF, ETHER_TYPE),
    equal(IPV6, 7),
    load(BYTE, NEXT_HEADER),
    equal(ICMPV6 as u32, 5),
    load(BYTE, ICMPV6_TYPE),
    equal(SOLICITATION as u32, 3),
    load(BYTE, DESTINATION),
    jump(MULTICAST, 1, 0),
    PASS,
    DROP,
];

/// IPv6 packets from an address, given as four words.
const fn from(address: [u32; 4]) -> [Instruction; 14] {
    let [first, second, third, fourth] = address;
    [
        load(BYTE, TAG_PRESENT),
        equal(0, 11),
        load(HALF, ETHER_TYPE),
        equal(IPV6, 9),
        load(WORD, SOURCE),
        equal(first, 7),
        load(WORD, SOURCE + 4),
        equal(second, 5),
        load(WORD, SOURCE + 8),
        equal(third, 3),
        load(WORD, SOURCE + 12),
        equal(fourth, 1),
        PASS,
        DROP,
    ]
}

const PASS: Instruction = instruction(RETURN, 0, 0, u32::MAX);
const DROP: Instruction = instruction(RETURN, 0, 0, 0);

const fn load(code: u16, at: u32) -> Instruction {
    instruction(code, 0, 0, at)
}

/// Continues if the accumulator equals `value`, otherwise skips `skip` instructions.
const fn equal(value: u32, skip: u8) -> Instruction {
    jump(value, 0, skip)
}

/// Skips `jt` instructions if the accumulator equals `value`, otherwise `jf`.
const fn jump(value: u32, jt: u8, jf: u8) -> Instruction {
    instruction(JUMP_EQUAL, jt, jf, value)
}

const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> Instruction {
    Instruction { code, jt, jf, k }
}

fn program(wanted: Wanted) -> Vec<Instruction> {
    match wanted {
        Wanted::Neighbours => NEIGHBOURS.to_vec(),
        Wanted::UnicastSolicitations => UNICAST_SOLICITATIONS.to_vec(),
        Wanted::From(address) => {
            let bits = address.to_bits();
            from([96, 64, 32, 0].map(|shift| (bits >> shift) as u32)).to_vec()
        }
    }
}

#[cfg(test)]
mod tests {
    use common::wire::neighbour::{Audience, advertisement, probe};

    use super::*;

    /// Runs a program as the kernel would on a frame without a VLAN tag.
    fn passes(wanted: Wanted, frame: &[u8]) -> bool {
        let program = program(wanted);
        let (mut at, mut value) = (0, 0_u32);
        loop {
            let it = &program[at];
            at += 1;
            let bytes = |length: usize| {
                let start = it.k as usize;
                frame.get(start..start + length).map(|bytes| {
                    bytes
                        .iter()
                        .fold(0, |sum, byte| sum << 8 | u32::from(*byte))
                })
            };
            let loaded = match it.code {
                WORD => bytes(4),
                HALF => bytes(2),
                BYTE if it.k == TAG_PRESENT => Some(0),
                BYTE => bytes(1),
                JUMP_EQUAL => {
                    at += usize::from(if value == it.k { it.jt } else { it.jf });
                    continue;
                }
                _ => return it.k != 0,
            };
            let Some(loaded) = loaded else {
                return false;
            };
            value = loaded;
        }
    }

    #[test]
    fn filter_passes_what_is_wanted_only() {
        let target = "2001:db8::5".parse::<Ipv6Addr>().unwrap().octets();
        let asks = probe(&target, [2; 6], [0; 6]);
        let source = "fe80::1".parse::<Ipv6Addr>().unwrap().octets();
        let says = advertisement(&target, [2; 6], true, &source, [2; 6], Audience::Everybody);
        let mut asks_one = asks;
        asks_one[38] = 0x20;
        let mut other = asks;
        other[54] = 134;
        for (wanted, expected) in [
            (Wanted::Neighbours, [true, true, true, false]),
            (Wanted::UnicastSolicitations, [false, false, true, false]),
            (
                Wanted::From("fe80::1".parse().unwrap()),
                [false, true, false, false],
            ),
            (Wanted::From("fe80::2".parse().unwrap()), [false; 4]),
        ] {
            let frames = [asks, says, asks_one, other];
            assert_eq!(frames.map(|frame| passes(wanted, &frame)), expected);
            assert!(!passes(wanted, &asks[..30]), "a short frame");
        }
    }
}
