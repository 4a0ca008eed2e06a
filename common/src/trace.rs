//! Records of the kernel programs' decisions: one record per decision about a frame.
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `TRACE_FILTER` | 0 | [`Filter`] | agent |
//! | `TRACE_CPU` | 0 | [`Cpu`], per CPU | kernel |
//! | `TRACE` | ring buffer | [`Record`] | kernel |
//!
//! Only the object with feature `trace` has these maps. The agent attaches that object while someone
//! traces; the usual object contains no tracing instruction.

mod frame;

use crate::counter::{self, Counter};
use crate::maps::{Address, StreamKey};
use crate::rate;

/// Bytes of a frame in a record: the headers up to the UDP ports, with a VLAN tag and Hop-by-Hop
/// Options.
pub const FRAME_BYTES: usize = 96;

/// Defines an enum of named numbers for records.
macro_rules! names {
    ($(#[$doc:meta])* $name:ident: $number:ty { $($(#[$variant_doc:meta])* $variant:ident => $text:literal,)* }) => {
        $(#[$doc])*
        #[repr($number)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            /// All values in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Name for tables and JSON: lower case with underscores.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }

            /// Decodes the number in a record; `None` for an unknown number.
            pub fn from_number(number: $number) -> Option<Self> {
                Self::ALL.get(usize::from(number)).copied()
            }

            /// Parses the name that an operator types.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|it| it.as_str() == name)
            }
        }
    };
}

names! {
    /// The program that decides.
    Program: u8 {
        /// Frames from a VM.
        Snoop => "snoop",
        /// Frames into a TAP.
        Gate => "gate",
        /// Frames from the network.
        Uplink => "uplink",
        /// Frames that leave the host.
        Leak => "leak",
        /// Stream packets that a relay receives.
        Replicate => "replicate",
        /// The agent, which replays held frames.
        Agent => "agent",
    }
}

impl Program {
    /// Bit of the program in [`Filter::programs`].
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }
}

names! {
    /// What happens to a frame.
    Decision: u8 {
        /// The frame continues.
        Passed => "passed",
        /// The frame ends here.
        Dropped => "dropped",
        /// The gate numbered and recorded the frame, which continues into the TAP.
        Recorded => "recorded",
        /// The gate holds the frame for the agent.
        Held => "held",
        /// The frame opened the gate and continues into the TAP.
        Opened => "opened",
        /// The agent put a held frame into the TAP.
        Replayed => "replayed",
        /// A relayed datagram became a multicast packet and continues.
        Restored => "restored",
        /// A packet from an address that the VM has left leaves from the VM's new address.
        Translated => "translated",
        /// A packet for an address that a VM has left goes to the VM's new address.
        SentOn => "sent_on",
        /// The Report or Done changed the tables, and continues.
        Admitted => "admitted",
        /// The Report exceeds the program's limits; the agent processes it, and the frame
        /// continues.
        HandedOver => "handed_over",
        /// The message changes no state, and continues.
        Ignored => "ignored",
        /// The relay sent a copy to a subscriber.
        Copied => "copied",
        /// The relay sent no copy.
        NotCopied => "not_copied",
    }
}

names! {
    /// A reason that no [`Counter`] counts.
    Uncounted: u16 {
        /// This host has no listener of the multicast address.
        NotManaged => "not_managed",
        /// No agent has a subscription to the flow.
        NoSubscriber => "no_subscriber",
        /// The gate is already open.
        GateOpen => "gate_open",
    }
}

/// Reason of a decision as a number: 0 for none, then the counters, then [`Uncounted`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason(u16);

impl Reason {
    /// The decision has no reason.
    pub const NONE: Self = Self(0);

    const FIRST_UNCOUNTED: u16 = counter::COUNT as u16 + 1;

    /// Wraps the number in a record, without a check.
    pub fn from_number(number: u16) -> Self {
        Self(number)
    }

    /// Number for a record: 0 for none, else 1 and up.
    pub const fn number(self) -> u16 {
        self.0
    }

    /// Name of the reason; `None` for no reason and for unknown numbers.
    pub fn as_str(self) -> Option<&'static str> {
        if let Some(index) = self.0.checked_sub(Self::FIRST_UNCOUNTED) {
            return Uncounted::from_number(index).map(Uncounted::as_str);
        }
        let index = self.0.checked_sub(1)?;
        Counter::ALL
            .get(usize::from(index))
            .map(|counter| counter.as_str())
    }
}

impl From<Counter> for Reason {
    #[inline(always)]
    fn from(counter: Counter) -> Self {
        Self(counter as u16 + 1)
    }
}

impl From<Uncounted> for Reason {
    #[inline(always)]
    fn from(reason: Uncounted) -> Self {
        Self(Self::FIRST_UNCOUNTED + reason as u16)
    }
}

/// Record of `TRACE`, a decision about one frame: 168 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Time of the decision, `CLOCK_MONOTONIC` nanoseconds.
    pub at_ns: u64,
    /// Sequence number of the gate, or index of the relay's subscriber; 0 for none.
    pub number: u64,
    /// Interface that the program is attached to.
    pub ifindex: u32,
    /// Length of the frame, bytes.
    pub length: u32,
    /// Number of a [`Program`].
    pub program: u8,
    /// Number of a [`Decision`].
    pub decision: u8,
    /// Number of a [`Reason`], 0 for none.
    pub reason: u16,
    /// VLAN identifier in the skb metadata, 0 for none.
    pub vlan: u16,
    /// Bytes in [`Record::frame`].
    pub copied: u16,
    /// Multicast flow of a frame that does not show the flow itself; else all zero.
    pub stream: StreamKey,
    /// The first bytes of the frame.
    pub frame: [u8; FRAME_BYTES],
}

/// Value of `TRACE_FILTER`: 40 bytes, align 8. A decision is traced when all conditions hold.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Source or destination of the packet; `::` for any packet.
    pub address: Address,
    /// Emission interval of the rate limit, nanoseconds per line.
    pub interval_ns: u64,
    /// Burst tolerance of the rate limit, nanoseconds.
    pub slack_ns: u64,
    /// Interface; 0 for any.
    pub ifindex: u32,
    /// Set of [`Program::bit`]s.
    pub programs: u32,
}

const NS_PER_SECOND: u64 = 1_000_000_000;

impl Filter {
    /// A filter that traces nothing.
    pub const NOTHING: Self = Self {
        address: [0; 16],
        interval_ns: NS_PER_SECOND,
        slack_ns: 0,
        ifindex: 0,
        programs: 0,
    };

    /// A filter that traces every decision, up to `lines_per_second` (at least 1).
    pub fn everything(lines_per_second: u32) -> Self {
        let mut filter = Self {
            programs: Program::ALL.iter().fold(0, |all, it| all | it.bit()),
            ..Self::NOTHING
        };
        filter.set_rate(lines_per_second);
        filter
    }

    /// Limits the rate to `lines_per_second` (at least 1), with a burst of one second.
    pub fn set_rate(&mut self, lines_per_second: u32) {
        self.interval_ns = NS_PER_SECOND / u64::from(lines_per_second.max(1));
        self.slack_ns = NS_PER_SECOND - self.interval_ns;
    }

    /// Returns the rate limit, lines per second.
    pub fn rate(&self) -> u32 {
        u32::try_from(NS_PER_SECOND / self.interval_ns.max(1)).unwrap_or(u32::MAX)
    }

    /// Whether the filter's programs, interface and address match a record.
    pub fn matches(&self, record: &Record) -> bool {
        let program = 1_u32.checked_shl(record.program.into()).unwrap_or(0);
        self.programs & program != 0
            && (self.ifindex == 0 || self.ifindex == record.ifindex)
            && (self.address == [0; 16]
                || record.flow().is_some_and(|flow| {
                    flow.source == self.address || flow.destination == self.address
                }))
    }

    /// Returns a filter that matches what either filter matches.
    pub fn union(&self, other: &Self) -> Self {
        let mut union = Self {
            address: if self.address == other.address {
                self.address
            } else {
                [0; 16]
            },
            ifindex: if self.ifindex == other.ifindex {
                self.ifindex
            } else {
                0
            },
            programs: self.programs | other.programs,
            ..*self
        };
        union.set_rate(self.rate().saturating_add(other.rate()));
        union
    }
}

/// Value of `TRACE_CPU`: 72 bytes, align 8. State of one CPU that does not fit on the programs'
/// stack.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Rate limit of the CPU.
    pub budget: Budget,
    /// [`Record::number`] of the current decision.
    pub number: u64,
    /// Program, decision and reason of the current decision.
    pub told: u64,
    /// Flow of the current packet, for copies that do not show the flow.
    pub stream: StreamKey,
}

/// Rate limit of one CPU: 16 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// Time when the bucket is full again, `CLOCK_MONOTONIC` nanoseconds: a token bucket as one
    /// number (generic cell rate algorithm).
    pub full_ns: u64,
    /// Decisions not traced because of the rate limit or a full `TRACE`.
    pub left_out: u64,
}

impl Budget {
    /// Takes one line from the budget; `false` above the filter's rate.
    #[inline(always)]
    pub fn take(&mut self, now_ns: u64, filter: &Filter) -> bool {
        match rate::take(self.full_ns, now_ns, filter.interval_ns, filter.slack_ns) {
            Some(full_ns) => {
                self.full_ns = full_ns;
                true
            }
            None => {
                self.left_out += 1;
                false
            }
        }
    }
}

/// Addresses and ports of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// IPv6 source, network order.
    pub source: Address,
    /// IPv6 destination, network order; the multicast address of a multicast packet.
    pub destination: Address,
    /// UDP or TCP source port, host order; 0 for other protocols.
    pub source_port: u16,
    /// UDP or TCP destination port, host order; 0 for other protocols.
    pub destination_port: u16,
    /// VLAN identifier; 0 for untagged.
    pub vlan: u16,
}

const _: () = {
    assert!(size_of::<Record>() == 168);
    assert!(size_of::<Filter>() == 40);
    assert!(size_of::<Budget>() == 16);
    assert!(size_of::<Cpu>() == 72);
};

#[cfg(feature = "pod")]
#[allow(
    unsafe_code,
    reason = "aya's marker for types that may be copied to and from the kernel"
)]
mod pod {
    use super::{Cpu, Filter};

    // SAFETY: `#[repr(C)]`, `Copy`, no padding (by the sizes asserted above), every bit pattern valid.
    unsafe impl aya::Pod for Filter {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Cpu {}
}

#[cfg(test)]
mod tests;
