//! What the kernel programs tell of their decisions, one record for each frame.
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `TRACE_FILTER` | 0 | [`Filter`] | agent |
//! | `TRACE_CPU` | 0 | [`Cpu`], per CPU | kernel |
//! | `TRACE` | ring buffer | [`Record`] | kernel |
//!
//! Only the traced object has these maps (feature `trace` of the kernel programs). The programs
//! that are attached while nobody traces have no instruction of this.

mod frame;

use crate::counter::{self, Counter};
use crate::maps::{Address, StreamKey};

/// Bytes of a frame that a record carries: the headers up to the UDP ports, with a tag and
/// Hop-by-Hop Options.
pub const FRAME_BYTES: usize = 96;

/// Makes an enum of names that a record holds as numbers.
macro_rules! names {
    ($(#[$doc:meta])* $name:ident: $number:ty { $($(#[$variant_doc:meta])* $variant:ident => $text:literal,)* }) => {
        $(#[$doc])*
        #[repr($number)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Name for tables and JSON: lower case with underscores.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }

            /// The one with a number, for records.
            pub fn from_number(number: $number) -> Option<Self> {
                Self::ALL.get(usize::from(number)).copied()
            }

            /// The one with a name, for operators.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|it| it.as_str() == name)
            }
        }
    };
}

names! {
    /// Who decides.
    Program: u8 {
        /// Frames that a VM sends.
        Snoop => "snoop",
        /// Frames on their way into a TAP.
        Gate => "gate",
        /// Frames that come from the network.
        Uplink => "uplink",
        /// Frames that leave the host.
        Leak => "leak",
        /// Stream packets that a relay receives.
        Replicate => "replicate",
        /// The agent itself, which replays held frames.
        Agent => "agent",
    }
}

impl Program {
    /// The program's bit in [`Filter::programs`].
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }
}

names! {
    /// What becomes of a frame.
    Decision: u8 {
        /// The frame goes on.
        Passed => "passed",
        /// The frame ends here.
        Dropped => "dropped",
        /// The gate numbered and recorded the frame, which goes on into the TAP.
        Recorded => "recorded",
        /// The gate holds the frame for the agent.
        Held => "held",
        /// The frame opened the gate, and goes on into the TAP.
        Opened => "opened",
        /// The agent put a held frame into the TAP.
        Replayed => "replayed",
        /// A relayed datagram became a multicast packet, which goes on.
        Restored => "restored",
        /// A packet from an address that the VM has left is sent from the VM's new address.
        Translated => "translated",
        /// A packet for an address that a VM has left is sent to where the VM is.
        SentOn => "sent_on",
        /// The Report or Done changed the tables, and goes on.
        Admitted => "admitted",
        /// The agent finishes the Report, which goes on.
        HandedOver => "handed_over",
        /// The message leaves no state here, and goes on.
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
        /// Nobody on this host is known to listen to the multicast address.
        NotManaged => "not_managed",
        /// No agent asked the relay for the flow.
        NoSubscriber => "no_subscriber",
        /// The gate is open already.
        GateOpen => "gate_open",
    }
}

/// Why, as a record holds it: 0 for no reason, then the counters, then [`Uncounted`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason(u16);

impl Reason {
    /// The decision needs none.
    pub const NONE: Self = Self(0);

    const FIRST_UNCOUNTED: u16 = counter::COUNT as u16 + 1;

    /// The reason with a number, for records.
    pub fn from_number(number: u16) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn number(self) -> u16 {
        self.0
    }

    /// The reason's name; `None` for no reason.
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

/// A decision about one frame: 168 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// When, `CLOCK_MONOTONIC` nanoseconds.
    pub at_ns: u64,
    /// The gate's number of the frame, or the index of the relay's subscriber; 0 for none.
    pub number: u64,
    /// Port that the program is attached to.
    pub ifindex: u32,
    /// Length of the frame, bytes.
    pub length: u32,
    /// [`Program`].
    pub program: u8,
    /// [`Decision`].
    pub decision: u8,
    /// [`Reason`].
    pub reason: u16,
    /// VLAN that the card took out of the frame, 0 for none.
    pub vlan: u16,
    /// Bytes in [`Record::frame`].
    pub copied: u16,
    /// The multicast flow where the frame itself shows another one; all zero elsewhere.
    pub stream: StreamKey,
    /// The first bytes of the frame.
    pub frame: [u8; FRAME_BYTES],
}

/// Which decisions are told: 40 bytes, align 8. All conditions hold.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Source or destination of the packet; `::` for any.
    pub address: Address,
    /// Time of one line, nanoseconds.
    pub interval_ns: u64,
    /// Time of the lines that may come at once, nanoseconds.
    pub slack_ns: u64,
    /// The port; 0 for any.
    pub ifindex: u32,
    /// [`Program::bit`] of each program.
    pub programs: u32,
}

const NS_PER_SECOND: u64 = 1_000_000_000;

impl Filter {
    /// Tells nothing.
    pub const NOTHING: Self = Self {
        address: [0; 16],
        interval_ns: NS_PER_SECOND,
        slack_ns: 0,
        ifindex: 0,
        programs: 0,
    };

    /// Tells every decision, so many lines a second (at least one).
    pub fn everything(lines_per_second: u32) -> Self {
        let mut filter = Self {
            programs: Program::ALL.iter().fold(0, |all, it| all | it.bit()),
            ..Self::NOTHING
        };
        filter.set_rate(lines_per_second);
        filter
    }

    /// Tells so many lines a second (at least one), a second's lines at once.
    pub fn set_rate(&mut self, lines_per_second: u32) {
        self.interval_ns = NS_PER_SECOND / u64::from(lines_per_second.max(1));
        self.slack_ns = NS_PER_SECOND - self.interval_ns;
    }

    /// Lines a second.
    pub fn rate(&self) -> u32 {
        u32::try_from(NS_PER_SECOND / self.interval_ns.max(1)).unwrap_or(u32::MAX)
    }

    /// Whether a decision is told, as far as program, port and addresses decide.
    pub fn matches(&self, record: &Record) -> bool {
        let program = 1_u32.checked_shl(record.program.into()).unwrap_or(0);
        self.programs & program != 0
            && (self.ifindex == 0 || self.ifindex == record.ifindex)
            && (self.address == [0; 16]
                || record.flow().is_some_and(|flow| {
                    flow.source == self.address || flow.destination == self.address
                }))
    }

    /// What both filters tell together.
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

/// Value of `TRACE_CPU`: 72 bytes, align 8. What one CPU keeps, off the small stack of the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// The CPU's lines.
    pub budget: Budget,
    /// [`Record::number`] of the decision that is being told.
    pub number: u64,
    /// Its program, decision and reason.
    pub told: u64,
    /// The flow of the packet that the program works on, where its copies do not show the flow.
    pub stream: StreamKey,
}

/// A CPU's lines: 16 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// When all lines may be told at once again, `CLOCK_MONOTONIC` nanoseconds: a token bucket as one
    /// number (the generic cell rate algorithm).
    pub full_ns: u64,
    /// Decisions that were not told, because there were too many or `TRACE` was full.
    pub left_out: u64,
}

impl Budget {
    /// Takes one line; `false` when the filter's rate is used up.
    #[inline(always)]
    pub fn take(&mut self, now_ns: u64, filter: &Filter) -> bool {
        let full_ns = if self.full_ns > now_ns {
            self.full_ns
        } else {
            now_ns
        };
        if full_ns - now_ns > filter.slack_ns {
            self.left_out += 1;
            return false;
        }
        self.full_ns = full_ns + filter.interval_ns;
        true
    }
}

/// The addresses and ports of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Source address.
    pub source: Address,
    /// Destination address; that of the multicast group in a multicast packet.
    pub destination: Address,
    /// Source port of UDP or TCP; 0 where there is none.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// VLAN; 0 for none.
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
