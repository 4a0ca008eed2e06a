//! The kernel programs and their maps, through aya. Nothing outside this module knows of aya.
//!
//! ```text
//!    TAP  --TC ingress---------> snoop     --> LISTENERS, LISTENER_SOURCES, PORT_USAGE
//!                                  ^ PORTS (limits), FORWARDING, TRANSLATIONS, FORWARDS
//!    TAP  --TC egress----------> gate      --> DELIVERED, GATE_USAGE, GATE_RECORDS, HELD
//!                                  ^ GATES
//!  uplink --XDP or TC ingress--> uplink    --> STREAMS, QUERIER, FINGERPRINTS
//!                                  ^ MANAGED, RELAY_FLOWS, RELAYS, FORWARDING, FORWARDS
//!  uplink --TC egress----------> leak
//!   relay --TC ingress---------> replicate --> STREAMS, RELAY_USAGE
//!   's NIC                         ^ MANAGED, RELAY_STREAMS, RELAY_SUBSCRIBERS
//!                                all of them --> COUNTERS, EVENTS
//! ```
//!
//! Maps and links are pinned (`pins`): without an agent the programs go on, and the next agent
//! adopts what is there and exchanges the programs in one step. Only `detach_*`, [`Datapath::retain`]
//! and [`Datapath::expire`] remove anything.
//!
//! # Ownership
//!
//! [`Datapath`] is a handle: clones share one data path, every method takes `&self`, and locks
//! inside are held for single system calls only. Methods that read one entry, or write, take
//! microseconds; those that read a whole map take tens of milliseconds when it is full and say so:
//! run them by [`Datapath::off_runtime`]. [`events::Events`] is the one asynchronous part.

mod attach;
mod capacity;
pub mod cleanup;
mod collect;
mod driver;
mod ethtool;
pub mod events;
mod feature;
mod filter;
mod forward;
mod gate;
mod hook;
mod link;
pub mod object;
mod offload;
mod pins;
pub mod reads;
mod relay;
mod state;
mod store;
mod sys;
mod table;
pub mod trace;
mod uplink;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::maps::{Map, MapData, PerCpuArray, RingBuf};
use aya::{Ebpf, EbpfLoader};
use common::counter::Counter;
use common::maps::{
    Delivered, DeliveredKey, Listener, ListenerKey, Managed, ManagedKey, Port, PortKey, PortUsage,
    Querier, QuerierKey, RelayStream, Source, SourceKey, StreamKey, StreamUsage, Subscriber,
    SubscriberKey, SubscriberUsage,
};
use linux::bpf::link::chain;
use linux::bpf::pins::PinError;

pub use capacity::Capacities;
pub use gate::{HOLD_LEASE, Held, RECORD_LEASE, REPLAY_LEASE, RecordLease};
pub use hook::{Attachment, Hook, Program, UplinkHook};
pub use state::Limits;
pub use view::HookView;

use capacity::load_maps;
use collect::Passed;
use filter::Filters;
use forward::Forwards;
use gate::Gates;
use pins::Pins;
use relay::RelayFlows;
use table::Table;
use trace::Traced;

use crate::net::tc::TcRefusal;

/// Where maps and links are pinned unless the config says otherwise.
pub const DEFAULT_PIN_ROOT: &str = "/sys/fs/bpf/roamcast";

/// Settings of the data path.
#[derive(Clone, Debug)]
pub struct DatapathConfig {
    /// Directory on a BPF file system to pin under.
    pub pin_root: PathBuf,
    /// The TC hook to use; `None` is TCX where the kernel has it, and filters where not.
    pub hook: Option<Hook>,
    /// Where relayed packets are restored; `None` chooses by the uplink's driver, or keeps what is
    /// pinned.
    pub uplink_hook: Option<UplinkHook>,
    /// Capacities of the maps.
    pub capacities: Capacities,
    /// Most flows of one address in `STREAMS`.
    pub flows_per_address: u16,
}

impl Default for DatapathConfig {
    fn default() -> Self {
        Self {
            pin_root: PathBuf::from(DEFAULT_PIN_ROOT),
            hook: None,
            uplink_hook: None,
            capacities: Capacities::default(),
            flows_per_address: 1024,
        }
    }
}

/// Why the data path does not work.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The pin root is on another kind of file system.
    #[error(
        "{} is not on a BPF file system; run `mount -t bpf bpf /sys/fs/bpf` or correct pin_root",
        .0.display()
    )]
    NoBpfFs(PathBuf),
    /// Another agent holds the pins.
    #[error("Another agent uses the pins under {}; stop it or give this one another pin_root", .0.display())]
    InUse(PathBuf),
    /// Somebody else can put pins where this agent's are.
    #[error(
        "Others can change what is in {0} (owner {owner}, mode {mode:o}), and so what the kernel programs do; remove it, or run `chown 0 {0}` and `chmod 700 {0}`",
        path.display()
    )]
    PinsOfOthers {
        /// The directory.
        path: PathBuf,
        /// User that it belongs to.
        owner: u32,
        /// Its mode.
        mode: u32,
    },
    /// A pin could not be made, read or removed.
    #[error("Cannot use the pin {}: {error}; run the agent as root", path.display())]
    Pin {
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// The kernel lacks something that nothing works without.
    #[error("This kernel has no {feature}; use one that has, as Linux {version} and newer")]
    KernelLacks {
        /// What is missing.
        feature: &'static str,
        /// The version that has it.
        version: &'static str,
    },
    /// TCX was asked for and is not there.
    #[error("This kernel has no TCX; let the agent choose the hook, and it uses filters of qdiscs")]
    NoTcx,
    /// Qdiscs and filters cannot be read or changed.
    #[error("Cannot read or change qdiscs and filters by netlink: {0}; run the agent as root")]
    TrafficControl(#[source] io::Error),
    /// The kernel refused the programs or maps.
    #[error(
        "Cannot load the kernel programs: {0}; the agent needs root or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"
    )]
    Load(String),
    /// A map or program is not as expected.
    #[error("Map or program {name} is not of this version's layout; remove the pins and restart")]
    Layout {
        /// Its name.
        name: &'static str,
    },
    /// The size of a ring buffer is impossible.
    #[error("Capacity {bytes} of {name} is not a power of two of at least {least}; correct it")]
    RingCapacity {
        /// Its name in the config.
        name: &'static str,
        /// The value.
        bytes: u32,
        /// Least possible value.
        least: u32,
    },
    /// The number of slots for records is impossible.
    #[error("Capacity {slots} of record_slots is not between 1 and {most}; correct it")]
    RecordSlots {
        /// The value.
        slots: u32,
        /// Greatest possible value.
        most: u32,
    },
    /// As many VMs are moved away already as there are slots for.
    #[error(
        "No free slot to record the frames of port {ifindex}: {slots} VMs are being moved away; \
         wait until one has moved, or raise record_slots in the config"
    )]
    NoRecordSlot {
        /// The port.
        ifindex: u32,
        /// All slots.
        slots: u32,
    },
    /// A map operation failed.
    #[error("Map {name}: {error}; if it is full, raise its capacity in the config")]
    Map {
        /// The map.
        name: &'static str,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// A program could not be attached.
    #[error("Cannot attach {program} to {interface} (ifindex {ifindex}): {reason}")]
    Attach {
        /// The program.
        program: &'static str,
        /// Name of the interface.
        interface: String,
        /// Its index.
        ifindex: u32,
        /// What the kernel said.
        reason: String,
    },
    /// A setting of the kernel could not be changed.
    #[error("Cannot set net.ipv6.conf.lo.forwarding: {0}; programs need it to look up routes")]
    Forwarding(#[source] io::Error),
    /// The hook for programs on TAPs is not one of TC's.
    #[error("Programs cannot be attached by {0} here; use tcx or filter")]
    NotTc(&'static str),
    /// The port has no limits yet, so it is not attached.
    #[error("Port {0} is not attached; attach it first")]
    NoPort(u32),
    /// The ring buffer of held frames is read already.
    #[error("The held frames are read already; only one reader can have them")]
    HeldTaken,
    /// The ring buffer could not be watched, or is watched already.
    #[error("Cannot watch the events of the kernel programs: {0}")]
    Events(#[source] io::Error),
    /// The traced programs are attached already.
    #[error("The kernel programs are traced already; one reader serves all tracers")]
    TracedAlready,
    /// The work was cut off because the runtime shuts down.
    #[error("The agent is shutting down")]
    Shutdown,
}

impl From<PinError> for DatapathError {
    fn from(error: PinError) -> Self {
        match error {
            PinError::InUse(root) => Self::InUse(root),
            PinError::Pin { path, error } => Self::Pin { path, error },
        }
    }
}

impl DatapathError {
    fn from_refusal(refusal: TcRefusal) -> Self {
        let text = refusal.to_string();
        Self::TrafficControl(io::Error::new(refusal.error.kind(), text))
    }
}

/// Handle of the data path; see the [module documentation](self).
#[derive(Clone)]
pub struct Datapath {
    inner: Arc<Inner>,
}

struct Inner {
    pins: Pins,
    hook: Hook,
    uplink_hook: Option<UplinkHook>,
    loader: Mutex<EbpfLoader<'static>>,
    /// The set of programs that is attached.
    programs: Mutex<Ebpf>,
    /// Keeps programs from being attached, detached or looked for while they are exchanged.
    hooks: Mutex<()>,
    tracing: Mutex<Option<Traced>>,
    capacities: Capacities,
    attached: Mutex<BTreeMap<(Program, u32), Attachment>>,
    /// Attachments whose place behind others was said.
    warned: Mutex<BTreeSet<(Program, u32)>>,
    filters: Mutex<Filters>,
    listeners: Table<ListenerKey, Listener>,
    sources: Table<SourceKey, Source>,
    /// Written by the agent only; the lock keeps one read-change-write from another.
    ports: Mutex<Table<PortKey, Port>>,
    usage: Table<PortKey, PortUsage>,
    managed: Table<ManagedKey, Managed>,
    streams: Table<StreamKey, StreamUsage>,
    queriers: Table<QuerierKey, Querier>,
    relay_flows: Mutex<RelayFlows>,
    relay_streams: Table<StreamKey, RelayStream>,
    subscribers: Table<SubscriberKey, Subscriber>,
    subscriber_usage: Table<SubscriberKey, SubscriberUsage>,
    forwards: Mutex<Forwards>,
    gates: Mutex<Gates>,
    delivered: Table<DeliveredKey, Delivered>,
    /// Most flows of one address in `STREAMS`.
    flows_per_address: u16,
    /// What had passed into crowded TAPs when the maps were tidied last.
    crowded: Mutex<Passed>,
    held: Mutex<Option<RingBuf<MapData>>>,
    counters: PerCpuArray<MapData, u64>,
    events: Mutex<Option<RingBuf<MapData>>>,
    /// What was counted while finishing Reports here, by [`Counter`]: the maps are per CPU and
    /// written by the kernel.
    finished: Box<[AtomicU64]>,
}

impl Datapath {
    /// Loads the programs, and makes or adopts the maps. Attaches nothing: that is
    /// [`Datapath::attach_port`], [`Datapath::attach_uplink`] and [`Datapath::attach_replicate`],
    /// which adopt pinned links. Pins of interfaces that are gone are removed, with their state.
    ///
    /// # Errors
    ///
    /// See [`DatapathError`].
    pub fn load(config: &DatapathConfig) -> Result<Self, DatapathError> {
        let tcx = feature::tcx();
        let hook = match config.hook {
            Some(Hook::Tcx) if !tcx => return Err(DatapathError::NoTcx),
            Some(hook @ (Hook::XdpNative | Hook::XdpGeneric)) => {
                return Err(DatapathError::NotTc(hook.as_str()));
            }
            Some(hook) => hook,
            None if tcx => Hook::Tcx,
            None => Hook::Filter,
        };
        config.capacities.check()?;

        let pins = Pins::open(&config.pin_root)?;
        let mut loader = capacity::loader();
        let mut ebpf = load_maps(&mut loader, &pins, &config.capacities, object::HOST)?;
        for program in Program::ALL {
            link::classifier(&mut ebpf, program)?
                .load()
                .map_err(|error| feature::missing().unwrap_or_else(|| load_error(&error)))?;
        }
        let relay_flows = RelayFlows::adopt(
            Table::new("RELAY_FLOWS", ebpf.take_map("RELAY_FLOWS"))?,
            Table::new("RELAYS", ebpf.take_map("RELAYS"))?,
        )?;
        let forwards = Forwards::adopt(
            Table::new("FORWARDS", ebpf.take_map("FORWARDS"))?,
            Table::new("TRANSLATIONS", ebpf.take_map("TRANSLATIONS"))?,
            convert("FORWARDING", ebpf.take_map("FORWARDING"))?,
        )?;
        let gates = Gates::adopt(
            Table::new("GATES", ebpf.take_map("GATES"))?,
            Table::new("GATE_USAGE", ebpf.take_map("GATE_USAGE"))?,
            ebpf.take_map("GATE_RECORDS"),
        )?;
        let datapath = Self {
            inner: Arc::new(Inner {
                filters: Mutex::new(
                    Filters::open(&config.pin_root).map_err(DatapathError::TrafficControl)?,
                ),
                pins,
                hook,
                uplink_hook: config.uplink_hook,
                attached: Mutex::default(),
                hooks: Mutex::default(),
                tracing: Mutex::default(),
                capacities: config.capacities.clone(),
                warned: Mutex::default(),
                listeners: Table::new("LISTENERS", ebpf.take_map("LISTENERS"))?,
                sources: Table::new("LISTENER_SOURCES", ebpf.take_map("LISTENER_SOURCES"))?,
                ports: Mutex::new(Table::new("PORTS", ebpf.take_map("PORTS"))?),
                usage: Table::new("PORT_USAGE", ebpf.take_map("PORT_USAGE"))?,
                managed: Table::new("MANAGED", ebpf.take_map("MANAGED"))?,
                streams: Table::new("STREAMS", ebpf.take_map("STREAMS"))?,
                queriers: Table::new("QUERIER", ebpf.take_map("QUERIER"))?,
                relay_flows: Mutex::new(relay_flows),
                relay_streams: Table::new("RELAY_STREAMS", ebpf.take_map("RELAY_STREAMS"))?,
                subscribers: Table::new("RELAY_SUBSCRIBERS", ebpf.take_map("RELAY_SUBSCRIBERS"))?,
                subscriber_usage: Table::new("RELAY_USAGE", ebpf.take_map("RELAY_USAGE"))?,
                forwards: Mutex::new(forwards),
                gates: Mutex::new(gates),
                delivered: Table::new("DELIVERED", ebpf.take_map("DELIVERED"))?,
                flows_per_address: config.flows_per_address,
                crowded: Mutex::default(),
                held: Mutex::new(Some(convert("HELD", ebpf.take_map("HELD"))?)),
                counters: convert("COUNTERS", ebpf.take_map("COUNTERS"))?,
                events: Mutex::new(Some(convert("EVENTS", ebpf.take_map("EVENTS"))?)),
                finished: Counter::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
                loader: Mutex::new(loader),
                programs: Mutex::new(ebpf),
            }),
        };
        datapath.remove_vanished()?;
        if hook == Hook::Tcx {
            // An agent that did not use TCX may have left some, which would do the work twice.
            lock(&datapath.inner.filters)
                .remove_all()
                .map_err(DatapathError::from_refusal)?;
        }
        Ok(datapath)
    }

    /// Directory of the pinned maps, of the layout version.
    pub fn pin_path(&self) -> &Path {
        self.inner.pins.directory()
    }

    /// The TC hook that programs are attached to. On uplinks it may be another one:
    /// [`Attachment::hook`].
    pub fn hook(&self) -> Hook {
        self.inner.hook
    }

    /// Runs work that reads whole maps on a thread for blocking work.
    ///
    /// # Errors
    ///
    /// What the work returns, and [`DatapathError::Shutdown`].
    pub async fn off_runtime<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, DatapathError> + Send + 'static,
    ) -> Result<T, DatapathError> {
        let datapath = self.clone();
        tokio::task::spawn_blocking(move || work(&datapath))
            .await
            .map_err(|_| DatapathError::Shutdown)?
    }
}

fn convert<T: TryFrom<Map>>(name: &'static str, map: Option<Map>) -> Result<T, DatapathError> {
    map.and_then(|map| T::try_from(map).ok())
        .ok_or(DatapathError::Layout { name })
}

fn map_error(name: &'static str, error: aya::maps::MapError) -> DatapathError {
    DatapathError::Map {
        name,
        error: io::Error::other(error),
    }
}

/// The verifier's log may be megabytes; its end says why.
fn load_error(error: &dyn std::error::Error) -> DatapathError {
    const LOG_LINES: usize = 6;
    tracing::debug!(%error, "kernel programs refused");
    let text = chain(error);
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines.get(lines.len().saturating_sub(LOG_LINES)..);
    DatapathError::Load(match (lines.first(), tail) {
        (Some(first), Some(tail)) if lines.len() > LOG_LINES => {
            format!("{first} .. {}", tail.join(" "))
        }
        _ => text,
    })
}

/// Locks; what a panicking holder left is still the kernel's state.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
