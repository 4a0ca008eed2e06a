//! Keys and values of the BPF maps under `/sys/fs/bpf/roamcast/`.
//!
//! All are `#[repr(C)]` without implicit padding, so BTF shows every field and a key compares
//! equal byte for byte. Addresses are 16 bytes in network order (IPv4, when it comes, will be
//! v4-mapped); every other number is in host order. Times are `CLOCK_MONOTONIC` nanoseconds
//! (`bpf_ktime_get_ns`).

mod forward;
mod gate;
mod relay;

pub use forward::*;
pub use gate::*;
pub use relay::*;

/// Version of all layouts in this module and in [`crate::event`]; part of the pin path, so an
/// agent with other layouts starts clean instead of misreading what is pinned.
pub const LAYOUT_VERSION: u32 = 8;

/// Multicast address in network order.
pub type Address = [u8; 16];

/// Filter mode of a listener (RFC 9777 §4.2), as stored in [`Listener::filter_mode`].
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilterMode {
    /// Reception only from the listed sources.
    Include = 1,
    /// Reception from all but the listed sources.
    Exclude = 2,
}

impl FilterMode {
    /// Decodes [`Listener::filter_mode`]; `None` for a byte that was never written by us.
    pub fn from_u8(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Include),
            2 => Some(Self::Exclude),
            _ => None,
        }
    }
}

/// Key of `LISTENERS`: 24 bytes, align 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerKey {
    /// The TAP that the Report came in by, which is the identity of the VM.
    pub ifindex: u32,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Always zero.
    pub pad: u16,
    /// Multicast address listened to.
    pub multicast_address: Address,
}

impl ListenerKey {
    /// The address that is watched for the listener.
    pub fn managed(&self) -> ManagedKey {
        ManagedKey {
            vlan: self.vlan,
            pad: 0,
            multicast_address: self.multicast_address,
        }
    }
}

/// Value of `LISTENERS`: 40 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// When the address was first reported.
    pub first_report_ns: u64,
    /// When it was last reported, by any record.
    pub last_report_ns: u64,
    /// When it was last reported by a record that answers a Query (MODE_IS_INCLUDE,
    /// MODE_IS_EXCLUDE or an MLDv1 Report); 0 if never.
    pub last_answer_ns: u64,
    /// Generation of the source list; entries of `LISTENER_SOURCES` with another one are stale.
    pub generation: u32,
    /// Number of sources in the list.
    pub source_count: u32,
    /// [`FilterMode`].
    pub filter_mode: u8,
    /// MLD version of the last Report: 1 or 2.
    pub mld_version: u8,
    /// Ethernet source of the last Report. The guest chooses it, so it identifies nobody.
    pub guest_mac: [u8; 6],
}

impl Listener {
    /// All zero: no listener.
    pub const NONE: Self = Self {
        first_report_ns: 0,
        last_report_ns: 0,
        last_answer_ns: 0,
        generation: 0,
        source_count: 0,
        filter_mode: 0,
        mld_version: 0,
        guest_mac: [0; 6],
    };
}

/// Key of `LISTENER_SOURCES`: 40 bytes, align 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceKey {
    /// The listener that the source belongs to.
    pub listener: ListenerKey,
    /// Source address.
    pub source: Address,
}

/// Value of `LISTENER_SOURCES`: 16 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// When the source was last reported.
    pub last_report_ns: u64,
    /// Generation of the list it belongs to; see [`Listener::generation`].
    pub generation: u32,
    /// [`FilterMode`] of the list: whether the source is included or excluded.
    pub filter_mode: u8,
    /// Always zero.
    pub pad: [u8; 3],
}

impl Source {
    /// All zero: no source.
    pub const NONE: Self = Self {
        last_report_ns: 0,
        generation: 0,
        filter_mode: 0,
        pad: [0; 3],
    };
}

/// Key of `PORTS` and `PORT_USAGE`: the ifindex of a TAP.
pub type PortKey = u32;

/// Value of `PORTS`, written by the agent only: 32 bytes, align 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Port {
    /// Most listeners (multicast addresses, over all VLANs) that the port may have.
    pub max_listeners: u32,
    /// Most sources that the port may have over all its listeners.
    pub max_sources: u32,
    /// Most Reports that the port may send each second; also the burst.
    pub reports_per_second: u32,
    /// Listeners that the agent has removed for age, to be taken from
    /// [`PortUsage::listeners`]; wraps.
    pub expired_listeners: u32,
    /// Sources that the agent has removed for age or generation, likewise.
    pub expired_sources: u32,
    /// Most datagrams that the port may send to the agent each second; also the burst.
    pub datagrams_per_second: u32,
    /// Most flows in `DELIVERED`.
    pub max_flows: u32,
    /// Flows that the agent has removed from there, to be taken from [`PortUsage::flows`]; wraps.
    pub forgotten_flows: u32,
}

/// What a port may still send, a token bucket that holds what a second gives: 16 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowance {
    /// When it was last topped up.
    pub refill_ns: u64,
    /// What is left, in thousandths.
    pub milli: u64,
}

impl Allowance {
    const ONE: u64 = 1000;
    const SECOND_NS: u64 = 1_000_000_000;

    /// Takes one, of `per_second`; `false` when none is left. Two CPUs that take at the same moment
    /// may take one for two, which is harmless.
    #[inline(always)]
    pub fn take(&mut self, per_second: u32, at_ns: u64) -> bool {
        let rate = u64::from(per_second);
        let most = rate * Self::ONE;
        let since = at_ns.saturating_sub(self.refill_ns);
        let gained = if since >= Self::SECOND_NS {
            most
        } else {
            since * rate / (Self::SECOND_NS / Self::ONE)
        };
        let mut milli = self.milli;
        if gained > 0 {
            milli += gained;
            if milli > most {
                milli = most;
            }
            self.refill_ns = at_ns;
        }
        let has_one = milli >= Self::ONE;
        self.milli = if has_one { milli - Self::ONE } else { milli };
        has_one
    }
}

/// Value of `PORT_USAGE`, written by the kernel only: 120 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortUsage {
    /// Reports that may still be sent.
    pub report_allowance: Allowance,
    /// Datagrams to the agent that may still be sent.
    pub datagram_allowance: Allowance,
    /// Listeners added minus those removed by the kernel; wraps. Minus
    /// [`Port::expired_listeners`] it is the number of listeners.
    pub listeners: u32,
    /// Sources likewise.
    pub sources: u32,
    /// Reports and Dones taken in.
    pub reports: u64,
    /// Reports dropped because the port sent too many in a second.
    pub refused_reports: u64,
    /// Records dropped because the port has too many listeners or the map is full.
    pub refused_listeners: u64,
    /// Sources dropped because the port has too many or the map is full.
    pub refused_sources: u64,
    /// MLD frames that break a rule of the protocol.
    pub malformed: u64,
    /// Datagrams to the agent that were marked with the port.
    pub datagrams: u64,
    /// Datagrams to the agent dropped because the port sent too many in a second.
    pub refused_datagrams: u64,
    /// Datagrams dropped that would have been taken for an agent's, or hide what they are.
    pub forged_datagrams: u64,
    /// Signalling on its way to the port that is not from this host's agent; dropped.
    pub withheld_datagrams: u64,
    /// Flows added to `DELIVERED`; wraps. Minus [`Port::forgotten_flows`] it is their number.
    pub flows: u32,
    /// Always zero.
    pub pad: u32,
}

/// Key of `MANAGED`: 20 bytes, align 2. A multicast address whose streams are watched.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ManagedKey {
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Always zero.
    pub pad: u16,
    /// Multicast address.
    pub multicast_address: Address,
}

/// Value of `MANAGED`: 16 bytes, align 8. Written by the agent; the kernel counts in it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Managed {
    /// The first packet of each flow and origin after this moment raises an event.
    pub watch_since_ns: u64,
    /// [`Origins`].
    pub origins: u8,
    /// When the last flow without room has raised an event, as [`Managed::slot`] gives it. 0: none
    /// has yet.
    pub told: u8,
    /// Most flows in `STREAMS`.
    pub max_flows: u16,
    /// Flows there. What the kernel adds while the agent writes may be lost until the agent counts
    /// them again.
    pub flows: u32,
}

impl Managed {
    /// One without flows.
    pub fn new(watch_since_ns: u64, origins: Origins, max_flows: u16) -> Self {
        Self {
            watch_since_ns,
            origins: origins as u8,
            told: 0,
            max_flows,
            flows: 0,
        }
    }

    /// A moment by its slot of 134 ms, 1 to 255 and over again.
    #[inline(always)]
    pub fn slot(at_ns: u64) -> u8 {
        ((at_ns >> 27) % 255) as u8 + 1
    }
}

/// Key of `STREAMS`: 40 bytes, align 2. One flow, of which the value says what came natively.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamKey {
    /// Multicast address.
    pub multicast_address: Address,
    /// Source address.
    pub source: Address,
    /// UDP source port, host order; 0 where the packet has none.
    pub source_port: u16,
    /// UDP destination port, host order; 0 where the packet has none.
    pub destination_port: u16,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Always zero.
    pub pad: u16,
}

impl StreamKey {
    /// The address that the flow is watched under.
    pub fn managed(&self) -> ManagedKey {
        ManagedKey {
            vlan: self.vlan,
            pad: 0,
            multicast_address: self.multicast_address,
        }
    }
}

/// Value of `STREAMS`, and part of that of `RELAY_FLOWS`: 48 bytes, align 8. What came of one flow by
/// one origin.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamUsage {
    /// Packets that came.
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
    /// When the first of them came.
    pub first_ns: u64,
    /// When the last of them came.
    pub last_ns: u64,
    /// Moving average of the time between two of them (weight of the newest: 1/8).
    pub interarrival_ns: u64,
    /// Those of them that did not pass: second copies, and all while [`Managed::origins`] excludes
    /// their origin.
    pub dropped: u64,
}

impl StreamUsage {
    /// Adds what came of the same flow, by the same origin, at another place.
    pub fn add(&mut self, other: &Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
        self.dropped += other.dropped;
        if self.first_ns == 0 || other.first_ns != 0 && other.first_ns < self.first_ns {
            self.first_ns = other.first_ns;
        }
        if other.last_ns > self.last_ns {
            self.last_ns = other.last_ns;
            self.interarrival_ns = other.interarrival_ns;
        }
    }
}

/// Key of `QUERIER`: 8 bytes, align 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QuerierKey {
    /// The port that the Query came in by.
    pub ifindex: u32,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Always zero.
    pub pad: u16,
}

/// Value of `QUERIER`: 40 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Querier {
    /// When the last General Query came.
    pub last_query_ns: u64,
    /// Link-local address of the querier.
    pub address: Address,
    /// Querier's Query Interval in milliseconds (RFC 9777 §9.2; 125 s for MLDv1).
    pub query_interval_ms: u32,
    /// Query Response Interval in milliseconds (RFC 9777 §9.3).
    pub query_response_interval_ms: u32,
    /// Robustness Variable (RFC 9777 §9.1).
    pub robustness: u8,
    /// MLD version of the Query: 1 or 2.
    pub mld_version: u8,
    /// Always zero.
    pub pad: [u16; 3],
}

const _: () = {
    assert!(size_of::<ListenerKey>() == 24 && align_of::<ListenerKey>() == 4);
    assert!(size_of::<Listener>() == 40 && align_of::<Listener>() == 8);
    assert!(size_of::<SourceKey>() == 40 && align_of::<SourceKey>() == 4);
    assert!(size_of::<Source>() == 16 && align_of::<Source>() == 8);
    assert!(size_of::<Port>() == 32 && align_of::<Port>() == 4);
    assert!(size_of::<PortUsage>() == 120 && align_of::<PortUsage>() == 8);
    assert!(size_of::<ManagedKey>() == 20 && align_of::<ManagedKey>() == 2);
    assert!(size_of::<Managed>() == 16 && align_of::<Managed>() == 8);
    assert!(size_of::<StreamKey>() == 40 && align_of::<StreamKey>() == 2);
    assert!(size_of::<StreamUsage>() == 48 && align_of::<StreamUsage>() == 8);
    assert!(size_of::<QuerierKey>() == 8 && align_of::<QuerierKey>() == 4);
    assert!(size_of::<Querier>() == 40 && align_of::<Querier>() == 8);
};

#[cfg(feature = "pod")]
#[allow(
    unsafe_code,
    reason = "aya's marker for types that may be copied to and from the kernel"
)]
mod pod {
    use super::*;

    macro_rules! pod {
        ($($type:ty),*) => {
            // SAFETY: `#[repr(C)]`, `Copy`, no padding (asserted above), every bit pattern valid.
            $(unsafe impl aya::Pod for $type {})*
        };
    }
    pod!(
        ListenerKey,
        Listener,
        SourceKey,
        Source,
        Port,
        PortUsage,
        ManagedKey,
        Managed,
        StreamKey,
        StreamUsage,
        QuerierKey,
        Querier,
        RelayFlowKey,
        RelayFlow,
        RelayFlowEntry,
        RelayKey,
        RelayStream,
        SubscriberKey,
        Subscriber,
        SubscriberUsage,
        Copies,
        Gate,
        GateUsage,
        GateRecord,
        DeliveredKey,
        Delivered,
        ForwardKey,
        Forward,
        TranslationKey,
        Translation
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `tries` at one moment are allowed.
    fn take(allowance: &mut Allowance, at_ms: u64, tries: u32) -> usize {
        let at_ns = at_ms * 1_000_000;
        (0..tries).filter(|_| allowance.take(50, at_ns)).count()
    }

    #[test]
    fn first_flow_without_room_is_told_whatever_the_time() {
        let fresh = Managed::new(0, Origins::Native, 1);
        let slots = (0..1000_u64).map(|slot| Managed::slot(slot << 27));
        assert_eq!(slots.filter(|slot| *slot == fresh.told).count(), 0);
    }

    #[test]
    fn allowance_is_that_of_a_second_and_comes_back_evenly() {
        let mut allowance = Allowance::default();
        assert_eq!(take(&mut allowance, 5000, 500), 50);
        assert_eq!(take(&mut allowance, 5010, 500), 0);
        assert_eq!(take(&mut allowance, 5100, 500), 5);
        assert_eq!(take(&mut allowance, 60_000, 500), 50);
        assert_eq!(take(&mut allowance, 0, 500), 0, "a clock that goes back");
    }

    #[test]
    fn port_without_a_rate_has_no_allowance() {
        assert!(!Allowance::default().take(0, 5_000_000_000));
    }
}
