//! Inputs and outputs of the core.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use common::mat::key::Key;

/// Identity of this node, and its servers.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// HoA of the node.
    pub(crate) hoa: Ipv6Addr,
    /// Prefix that contains all HoAs.
    pub(crate) home: (Ipv6Addr, u8),
    /// Key between the node and the servers.
    pub(crate) key: Key,
    /// Addresses of the mapping servers.
    pub(crate) servers: Vec<SocketAddrV6>,
}

/// Intervals and deadlines of the core.
#[derive(Clone, Debug)]
pub(crate) struct Timing {
    /// Lifetime of the mapping, for updates.
    pub(crate) lifetime: Duration,
    /// First and longest interval between repetitions of an update.
    pub(crate) update: (Duration, Duration),
    /// Shortest and longest wait for a server before the next request.
    pub(crate) lookup: (Duration, Duration),
    /// Longest duration of a lookup over all servers.
    pub(crate) lookup_patience: Duration,
    /// First and longest interval between repetitions of an alert or an echo.
    pub(crate) alert: (Duration, Duration),
    /// Number of sends of an alert.
    pub(crate) alerts: u32,
    /// Number of sends of an echo.
    pub(crate) echoes: u32,
    /// Interval between echoes to a peer in use.
    pub(crate) keepalive: Duration,
    /// Longest time that a frame is held.
    pub(crate) hold: Duration,
    /// Longest lifetime of the answer "no such node".
    pub(crate) negative: Duration,
    /// Time that the node keeps a peer without traffic.
    pub(crate) idle: Duration,
    /// Duration of forwarding at the source of a migration.
    pub(crate) forward: Duration,
    /// Interval between checks for the arrival of the VM.
    pub(crate) check: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self {
            lifetime: Duration::from_secs(600),
            update: (ms(200), Duration::from_secs(30)),
            lookup: (ms(60), ms(1000)),
            lookup_patience: Duration::from_secs(3),
            alert: (ms(100), Duration::from_secs(5)),
            alerts: 12,
            echoes: 6,
            keepalive: Duration::from_secs(30),
            hold: Duration::from_secs(3),
            negative: Duration::from_secs(30),
            idle: Duration::from_secs(600),
            forward: Duration::from_secs(30),
            check: ms(50),
        }
    }
}

/// Limit of peers, known and unknown.
pub(crate) const MAX_PEERS: usize = 4096;
/// Limits of held frames: per peer, and in total.
pub(crate) const MAX_HELD: (usize, usize) = (32, 1024);
/// Limit of addresses that the node replaces because a mapping server refuses them. A server that
/// refuses all of them is not set up for this network.
pub(crate) const MAX_REPLACED: usize = 8;
/// Limit of held bytes per peer.
pub(crate) const MAX_HELD_BYTES: usize = 128 * 1024;

/// A NIC and its addresses that can be MoAs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NicState {
    /// Interface index of the NIC.
    pub(crate) ifindex: u32,
    /// Usable global addresses.
    pub(crate) addresses: Vec<Ipv6Addr>,
}

/// An address on a NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Interface index of the NIC.
    pub(crate) ifindex: u32,
    /// Address on the NIC.
    pub(crate) moa: Ipv6Addr,
}

/// A datagram on a socket of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    /// Own address, the destination.
    pub(crate) local: Ipv6Addr,
    /// Address and port of the sender.
    pub(crate) from: SocketAddrV6,
    /// Payload.
    pub(crate) bytes: Vec<u8>,
}

/// An action for the caller, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// Send a datagram from the own address `from`.
    Transmit {
        /// Own address, which determines the NIC.
        from: Ipv6Addr,
        /// Receiver.
        to: SocketAddrV6,
        /// Payload.
        bytes: Vec<u8>,
    },
    /// Send data from this place; one map update.
    SetActive(Place),
    /// Accept data for these own addresses, and open a socket for each.
    SetOwn(Vec<Place>),
    /// Set destination and sources of a peer's data.
    SetPeer {
        /// HoA of the peer.
        hoa: Ipv6Addr,
        /// MoA that data goes to.
        to: Ipv6Addr,
        /// MoAs that data may come from.
        from: Vec<Ipv6Addr>,
    },
    /// Hold data for a peer, and set the sources of its data.
    HoldPeer {
        /// HoA of the peer.
        hoa: Ipv6Addr,
        /// MoAs that data may come from.
        from: Vec<Ipv6Addr>,
    },
    /// Remove a peer from the data path.
    RemovePeer(Ipv6Addr),
    /// Send a held frame.
    Release(Vec<u8>),
    /// Answer a held frame with an ICMPv6 error.
    Refuse(Vec<u8>),
    /// The path of every flow has changed: adjust MTU and routes of `mat0`.
    PathChanged,
    /// The VM seems to have arrived: make the destination's network usable on the prepared NIC.
    Join,
    /// The VM has arrived: leave the old place, whose routes would mislead.
    Leave(Place),
    /// Remove an old address from its NIC.
    RemoveAddress(Place),
    /// A mapping server says that another node has this address: take another one.
    Replace(Place),
    /// Save the state for the next start.
    Save(Saved),
}

/// State of a node that survives restarts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    /// Sequence number of the last update.
    pub(crate) sequence: u64,
    /// Active MoA.
    pub(crate) moa: Option<Ipv6Addr>,
}

/// Stage of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MoveStage {
    /// The new MoA stands by.
    Prepared,
    /// The agents may migrate the VM at any time.
    Ready,
    /// The VM seems to have arrived; a server or a peer must confirm the arrival.
    Checking,
}

impl fmt::Display for MoveStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepared => "prepared",
            Self::Ready => "ready",
            Self::Checking => "checking",
        })
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters for the status.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: u64),*
        }

        impl Counters {
            /// Iterates over the counters with their names.
            pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }
    };
}

counters! {
    /// Datagrams that are not MAT messages.
    malformed,
    /// Datagrams sealed with another key, or modified.
    forged,
    /// Messages that answer no request, or come from a wrong address.
    unexpected,
    /// Alerts without news.
    old_alerts,
    /// Messages above a rate limit.
    limited,
    /// Frames held for a lookup.
    held,
    /// Held frames sent.
    released,
    /// Frames answered with an error, because no such node exists.
    refused,
    /// Frames dropped, because too many were held or for too long.
    hold_overflow,
    /// Frames to an address that is no peer's.
    not_peers,
    /// Lookups sent.
    lookups,
    /// Lookups that no server answered.
    lookups_failed,
    /// Mappings older than a known one.
    stale_mappings,
    /// Alerts sent.
    alerts,
    /// Alerts that no peer acknowledged.
    alerts_failed,
    /// Echoes sent.
    echoes,
    /// MoAs of peers that did not answer.
    echoes_failed,
    /// Updates refused by a server.
    updates_refused,
    /// Messages not sent, because the kernel gave no random numbers.
    no_random_numbers,
    /// Migrations with an arrival.
    moves,
    /// Migrations aborted.
    moves_aborted,
}

/// Result of the node's updates at a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ServerState {
    /// The server has accepted the newest update.
    Registered,
    /// The server has not answered yet.
    Waiting,
    /// The server has not answered several requests.
    Silent,
    /// The server refuses the addresses.
    BadAddresses,
    /// The server cannot store the update.
    Failed,
    /// The server has a newer update.
    OldSequence,
    /// The server's clock differs.
    WrongTime,
}

impl fmt::Display for ServerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Registered => "registered",
            Self::Waiting => "waiting",
            Self::Silent => "does not answer",
            Self::BadAddresses => "refuses the addresses",
            Self::Failed => "cannot store the update",
            Self::OldSequence => "knows a newer update; is the key used twice?",
            Self::WrongTime => "finds the time wrong",
        })
    }
}

/// State of one mapping server in [`Status`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ServerStatus {
    /// IP address and port of the server.
    pub(crate) address: SocketAddrV6,
    /// Result of the updates.
    pub(crate) state: ServerState,
    /// Smoothed round-trip time, milliseconds.
    pub(crate) round_trip_ms: Option<f64>,
    /// Sequence number of the server's mapping.
    pub(crate) sequence: u64,
}

/// State of a peer in the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PeerState {
    /// The peer has answered at the MoA that data goes to.
    Known,
    /// The peer has a MoA that has not answered yet.
    Verifying,
    /// A lookup is in progress.
    LookingUp,
    /// No server knows the peer.
    Unknown,
}

impl fmt::Display for PeerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Known => "known",
            Self::Verifying => "verifying",
            Self::LookingUp => "looking up",
            Self::Unknown => "unknown",
        })
    }
}

/// State of one peer in [`Status`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeerStatus {
    /// HoA of the peer.
    pub(crate) hoa: Ipv6Addr,
    /// Known, verifying, looking up or unknown.
    pub(crate) state: PeerState,
    /// MoA that data goes to.
    pub(crate) to: Option<Ipv6Addr>,
    /// MoAs of the peer with their priorities.
    pub(crate) moas: Vec<(Ipv6Addr, u8)>,
    /// Age of the mapping, seconds.
    pub(crate) age_s: Option<u64>,
    /// Packets sent to the peer.
    pub(crate) packets: u64,
    /// Bytes sent to the peer.
    pub(crate) bytes: u64,
}

/// Status of the node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// HoA of the node.
    pub(crate) hoa: Ipv6Addr,
    /// Index of the active NIC.
    pub(crate) ifindex: Option<u32>,
    /// Active MoA.
    pub(crate) moa: Option<Ipv6Addr>,
    /// MoA prepared for a migration.
    pub(crate) standby: Option<Ipv6Addr>,
    /// Former MoAs that still receive.
    pub(crate) left: Vec<Ipv6Addr>,
    /// Stage of the migration.
    pub(crate) stage: Option<MoveStage>,
    /// Sequence number of the mapping.
    pub(crate) sequence: u64,
    /// Whether any server has the current MoAs.
    pub(crate) registered: bool,
    /// Results of the updates, one per server.
    pub(crate) servers: Vec<ServerStatus>,
    /// Known and unknown peers of the node.
    pub(crate) peers: Vec<PeerStatus>,
    /// Counters since the start.
    pub(crate) counters: Counters,
}
