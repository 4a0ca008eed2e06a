//! Keys and values of the BPF maps under `/sys/fs/bpf/roamcast/`.
//!
//! Every type is `#[repr(C)]` without implicit padding, so BTF shows every field, and keys compare
//! byte for byte. Addresses are 16 bytes in network order (a future IPv4 address is v4-mapped); all
//! other numbers are in host order. Times are `CLOCK_MONOTONIC` nanoseconds (`bpf_ktime_get_ns`).

mod bridge;
mod forward;
mod gate;
mod relay;
mod stream;

pub use bridge::*;
pub use forward::*;
pub use gate::*;
pub use relay::*;
pub use stream::*;

/// Version of the layouts in this module and in [`crate::event`]. The pin path contains the
/// version, so an agent with other layouts starts with empty maps and never misreads pinned maps.
pub const LAYOUT_VERSION: u32 = 9;

/// IPv6 address in network order, 16 bytes.
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
    /// Decodes [`Listener::filter_mode`]; `None` for any other byte.
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
    /// TAP that received the Report; identifies the VM.
    pub ifindex: u32,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Bridge of the TAP.
    pub bridge: BridgeNumber,
    /// Multicast address that the VM listens to, network order.
    pub multicast_address: Address,
}

impl ListenerKey {
    /// Network of the listener.
    pub fn network(&self) -> Network {
        self.managed().network()
    }

    /// Key of `MANAGED` for the listener's address.
    pub fn managed(&self) -> ManagedKey {
        ManagedKey {
            vlan: self.vlan,
            bridge: self.bridge,
            multicast_address: self.multicast_address,
        }
    }
}

/// Value of `LISTENERS`: 40 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Time of the first Report of the address.
    pub first_report_ns: u64,
    /// Time of the last Report of the address, any record type.
    pub last_report_ns: u64,
    /// Time of the last record that answers a Query (MODE_IS_INCLUDE, MODE_IS_EXCLUDE or an MLDv1
    /// Report); 0 for never.
    pub last_answer_ns: u64,
    /// Generation of the source list. Entries of `LISTENER_SOURCES` of another generation are
    /// stale.
    pub generation: u32,
    /// Number of sources in the list.
    pub source_count: u32,
    /// [`FilterMode`].
    pub filter_mode: u8,
    /// MLD version of the last Report: 1 or 2.
    pub mld_version: u8,
    /// Ethernet source of the last Report. The guest chooses the address, so it identifies nobody.
    pub guest_mac: [u8; 6],
}

impl Listener {
    /// A listener of zeros, for no listener.
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
    /// Listener whose list has the source.
    pub listener: ListenerKey,
    /// Source address, network order.
    pub source: Address,
}

/// Value of `LISTENER_SOURCES`: 16 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Time of the last Report of the source.
    pub last_report_ns: u64,
    /// Generation of the list that has the source; see [`Listener::generation`].
    pub generation: u32,
    /// [`FilterMode`] of the list: INCLUDE or EXCLUDE the source.
    pub filter_mode: u8,
    /// Padding, always zero.
    pub pad: [u8; 3],
}

impl Source {
    /// A source of zeros, for no source.
    pub const NONE: Self = Self {
        last_report_ns: 0,
        generation: 0,
        filter_mode: 0,
        pad: [0; 3],
    };
}

/// Key of `PORTS` and `PORT_USAGE`: the ifindex of a TAP.
pub type PortKey = u32;

/// Value of `PORTS`: 32 bytes, align 4. Only the agent writes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Port {
    /// Limit of listeners (multicast addresses over all VLANs).
    pub max_listeners: u32,
    /// Limit of sources over all listeners.
    pub max_sources: u32,
    /// Limit of Reports per second; also the burst.
    pub reports_per_second: u32,
    /// Listeners that the agent removed by age; wraps. The kernel subtracts the number from
    /// [`PortUsage::listeners`].
    pub expired_listeners: u32,
    /// Sources that the agent removed by age or generation; wraps. See [`PortUsage::sources`].
    pub expired_sources: u32,
    /// Limit of datagrams to the agent per second; also the burst.
    pub datagrams_per_second: u32,
    /// Limit of flows in `DELIVERED`.
    pub max_flows: u32,
    /// Flows that the agent removed from `DELIVERED`; wraps. See [`PortUsage::flows`].
    pub forgotten_flows: u32,
}

/// Token bucket that holds the tokens of one second: 16 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowance {
    /// Time of the last refill.
    pub refill_ns: u64,
    /// Tokens left, in thousandths.
    pub milli: u64,
}

impl Allowance {
    const ONE: u64 = 1000;
    const SECOND_NS: u64 = 1_000_000_000;

    /// Takes one token at a rate of `per_second`; `false` when the bucket is empty. Two CPUs at the
    /// same moment may take one token for two, which does no harm.
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

/// Value of `PORT_USAGE`: 120 bytes, align 8. Only the kernel writes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortUsage {
    /// Bucket of [`Port::reports_per_second`].
    pub report_allowance: Allowance,
    /// Bucket of [`Port::datagrams_per_second`].
    pub datagram_allowance: Allowance,
    /// Listeners that the kernel added minus those that it removed; wraps. The port has `listeners`
    /// minus [`Port::expired_listeners`] listeners.
    pub listeners: u32,
    /// Sources that the kernel added minus those that it removed; wraps. The port has `sources`
    /// minus [`Port::expired_sources`] sources.
    pub sources: u32,
    /// Accepted Reports and Dones.
    pub reports: u64,
    /// Reports dropped by the rate limit.
    pub refused_reports: u64,
    /// Records refused by the limit of listeners or a full map.
    pub refused_listeners: u64,
    /// Sources refused by the limit of sources or a full map.
    pub refused_sources: u64,
    /// MLD frames that violate RFC 9777.
    pub malformed: u64,
    /// Datagrams to the agent that `snoop` marked with the port.
    pub datagrams: u64,
    /// Datagrams to the agent dropped by the rate limit.
    pub refused_datagrams: u64,
    /// Dropped datagrams of the VM that pose as an agent's, or hide their headers.
    pub forged_datagrams: u64,
    /// Dropped signalling for the VM that this host's agent did not send.
    pub withheld_datagrams: u64,
    /// Flows that the kernel added to `DELIVERED`; wraps. The port has `flows` minus
    /// [`Port::forgotten_flows`] flows.
    pub flows: u32,
    /// Padding, always zero.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<ListenerKey>() == 24 && align_of::<ListenerKey>() == 4);
    assert!(size_of::<Listener>() == 40 && align_of::<Listener>() == 8);
    assert!(size_of::<SourceKey>() == 40 && align_of::<SourceKey>() == 4);
    assert!(size_of::<Source>() == 16 && align_of::<Source>() == 8);
    assert!(size_of::<Port>() == 32 && align_of::<Port>() == 4);
    assert!(size_of::<PortUsage>() == 120 && align_of::<PortUsage>() == 8);
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
        BridgeNumber,
        Bridge,
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

    /// Counts how many of `tries` attempts at one moment get a token.
    fn take(allowance: &mut Allowance, at_ms: u64, tries: u32) -> usize {
        let at_ns = at_ms * 1_000_000;
        (0..tries).filter(|_| allowance.take(50, at_ns)).count()
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
