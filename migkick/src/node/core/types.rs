//! What the core is given and what it gives.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use common::mat::key::Key;

/// Who this node is, and who knows it.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// Its permanent address.
    pub(crate) hoa: Ipv6Addr,
    /// Prefix of all HoAs.
    pub(crate) home: (Ipv6Addr, u8),
    /// Key between it and the servers.
    pub(crate) key: Key,
    /// The servers.
    pub(crate) servers: Vec<SocketAddrV6>,
}

/// When to repeat and when to give up.
#[derive(Clone, Debug)]
pub(crate) struct Timing {
    /// Lifetime asked for at the servers.
    pub(crate) lifetime: Duration,
    /// First and longest distance of two sends of an update.
    pub(crate) update: (Duration, Duration),
    /// Shortest and longest time to wait for a server before the next one is asked.
    pub(crate) lookup: (Duration, Duration),
    /// How long the servers in all are tried for a lookup.
    pub(crate) lookup_patience: Duration,
    /// First and longest distance of two sends of an alert or an echo.
    pub(crate) alert: (Duration, Duration),
    /// How often an alert is sent.
    pub(crate) alerts: u32,
    /// How often an echo is sent.
    pub(crate) echoes: u32,
    /// Distance of two echoes to a peer in use.
    pub(crate) keepalive: Duration,
    /// How long a frame is held.
    pub(crate) hold: Duration,
    /// Longest time that "no such node" is believed.
    pub(crate) negative: Duration,
    /// How long a peer is kept that nothing is sent to.
    pub(crate) idle: Duration,
    /// How long the source of a move forwards what comes to the old MoA.
    pub(crate) forward: Duration,
    /// Distance of two checks whether the VM has arrived.
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

/// Most peers, known and unknown ones.
pub(crate) const MAX_PEERS: usize = 4096;
/// Most frames held for one peer, and for all.
pub(crate) const MAX_HELD: (usize, usize) = (32, 1024);
/// Most addresses that are replaced because a server refuses them. A server that refuses all of them is
/// not set up for this network.
pub(crate) const MAX_REPLACED: usize = 8;
/// Most bytes held for one peer.
pub(crate) const MAX_HELD_BYTES: usize = 128 * 1024;

/// A NIC with the addresses that can be used as MoAs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NicState {
    /// Its index.
    pub(crate) ifindex: u32,
    /// Its global addresses, usable ones only.
    pub(crate) addresses: Vec<Ipv6Addr>,
}

/// An address on a NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The NIC.
    pub(crate) ifindex: u32,
    /// The address.
    pub(crate) moa: Ipv6Addr,
}

/// A datagram that came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    /// Own address that it was sent to.
    pub(crate) local: Ipv6Addr,
    /// Its sender.
    pub(crate) from: SocketAddrV6,
    /// Payload.
    pub(crate) bytes: Vec<u8>,
}

/// What the shell has to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// Send a datagram from the own address `from`.
    Transmit {
        /// Own address, which says the NIC too.
        from: Ipv6Addr,
        /// Receiver.
        to: SocketAddrV6,
        /// Payload.
        bytes: Vec<u8>,
    },
    /// Send data from here; one map update.
    SetActive(Place),
    /// Own addresses: taken inbound, and each with a socket.
    SetOwn(Vec<Place>),
    /// Where data for a peer goes, and where it may come from.
    SetPeer {
        /// The peer.
        hoa: Ipv6Addr,
        /// Where data goes.
        to: Ipv6Addr,
        /// Where it may come from.
        from: Vec<Ipv6Addr>,
    },
    /// Data for a peer is to be held, and taken from where it may come from.
    HoldPeer {
        /// The peer.
        hoa: Ipv6Addr,
        /// Where its data may come from.
        from: Vec<Ipv6Addr>,
    },
    /// Nothing is known of a peer any more.
    RemovePeer(Ipv6Addr),
    /// Send a held frame after all.
    Release(Vec<u8>),
    /// Tell the application that a held frame has no way.
    Refuse(Vec<u8>),
    /// The paths of all flows are others now.
    PathChanged,
    /// The VM seems to be at its destination: make the network there usable on the prepared NIC.
    Join,
    /// The VM has arrived: the old place is left, its routes would mislead.
    Leave(Place),
    /// The old address is of no use any more.
    RemoveAddress(Place),
    /// A server says that another node has this address: another one is to be taken.
    Replace(Place),
    /// To be read at the next start.
    Save(Saved),
}

/// What a node remembers over restarts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    /// Sequence of the last update.
    pub(crate) sequence: u64,
    /// Active MoA.
    pub(crate) moa: Option<Ipv6Addr>,
}

/// How far a move is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MoveStage {
    /// The new MoA stands by.
    Prepared,
    /// The VM may be moved at any time.
    Ready,
    /// It seems to have been moved; a server or a peer has to confirm it.
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
        /// What happened, for a person who looks.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: u64),*
        }

        impl Counters {
            /// Every counter with its name.
            pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }
    };
}

counters! {
    /// Datagrams that are no MAT messages.
    malformed,
    /// Datagrams sealed with another key, or changed on their way.
    forged,
    /// Messages that answer nothing that was asked, or come from where they may not.
    unexpected,
    /// Alerts that say nothing new.
    old_alerts,
    /// Messages beyond the limits.
    limited,
    /// Frames that are held for a lookup.
    held,
    /// Held frames that were sent.
    released,
    /// Frames that were refused, because there is no such node.
    refused,
    /// Frames that were dropped, because too much was held or for too long.
    hold_overflow,
    /// Frames to what is no peer.
    not_peers,
    /// Lookups sent.
    lookups,
    /// Lookups that no server answered.
    lookups_failed,
    /// Mappings older than one that is known.
    stale_mappings,
    /// Alerts sent.
    alerts,
    /// Alerts that no peer acknowledged.
    alerts_failed,
    /// Echoes sent.
    echoes,
    /// Addresses of peers that have not answered.
    echoes_failed,
    /// Updates that a server refused.
    updates_refused,
    /// Messages that were not sent, because the kernel gave no random numbers for them.
    no_random_numbers,
    /// Moves that arrived.
    moves,
    /// Moves that were given up.
    moves_aborted,
}

/// What a server has made of the node's updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ServerState {
    /// It has the newest one.
    Registered,
    /// It has not answered yet.
    Waiting,
    /// It has not answered several times.
    Silent,
    /// It refuses the addresses.
    BadAddresses,
    /// It cannot store the update.
    Failed,
    /// It knows a newer one.
    OldSequence,
    /// It has another time.
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

/// A server, for a person.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ServerStatus {
    /// Its address.
    pub(crate) address: SocketAddrV6,
    /// What it has made of the updates.
    pub(crate) state: ServerState,
    /// Round trip, milliseconds.
    pub(crate) round_trip_ms: Option<f64>,
    /// Sequence that it has.
    pub(crate) sequence: u64,
}

/// What is known of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PeerState {
    /// It has answered at the address that data goes to.
    Known,
    /// An address is known and has not answered yet.
    Verifying,
    /// The servers are asked.
    LookingUp,
    /// No server knows it.
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

/// A peer, for a person.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeerStatus {
    /// Its permanent address.
    pub(crate) hoa: Ipv6Addr,
    /// What is known of it.
    pub(crate) state: PeerState,
    /// Where data goes.
    pub(crate) to: Option<Ipv6Addr>,
    /// Its MoAs with their priorities.
    pub(crate) moas: Vec<(Ipv6Addr, u8)>,
    /// Age of what is known, seconds.
    pub(crate) age_s: Option<u64>,
    /// Packets sent to it.
    pub(crate) packets: u64,
    /// Bytes sent to it.
    pub(crate) bytes: u64,
}

/// The node, for a person.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// Its permanent address.
    pub(crate) hoa: Ipv6Addr,
    /// Index of the active NIC.
    pub(crate) ifindex: Option<u32>,
    /// Active MoA.
    pub(crate) moa: Option<Ipv6Addr>,
    /// MoA that stands by for a move.
    pub(crate) standby: Option<Ipv6Addr>,
    /// MoAs that were left and are still taken inbound.
    pub(crate) left: Vec<Ipv6Addr>,
    /// How far a move is.
    pub(crate) stage: Option<MoveStage>,
    /// Sequence of the mapping.
    pub(crate) sequence: u64,
    /// Whether any server knows the MoAs as they are.
    pub(crate) registered: bool,
    /// The servers.
    pub(crate) servers: Vec<ServerStatus>,
    /// The peers.
    pub(crate) peers: Vec<PeerStatus>,
    /// What happened.
    pub(crate) counters: Counters,
}
