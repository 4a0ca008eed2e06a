//! The eBPF programs and their maps, through aya. No other module of the agent uses aya.
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
//!
//! BRIDGES: the number that names a bridge in the keys
//! ```
//!
//! Maps and links are pinned (`pins`): the programs keep running without an agent, and the next
//! agent adopts them and replaces each program atomically. Only `detach_*`, [`Datapath::retain`]
//! and [`Datapath::expire`] remove anything.
//!
//! # Ownership
//!
//! [`Datapath`] is a handle: clones share one data path, every method takes `&self`, and internal
//! locks are held for single system calls only. Methods that read one entry, or write, take
//! microseconds. Methods that read a whole map say so, because a full map takes tens of
//! milliseconds; call them through [`Datapath::off_runtime`]. [`events::Events`] is the only
//! asynchronous part.

mod attach;
mod bridges;
mod capacity;
pub mod cleanup;
mod collect;
mod driver;
mod error;
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
    Bridge, BridgeNumber, Delivered, DeliveredKey, Listener, ListenerKey, Managed, ManagedKey,
    NO_BRIDGE, Port, PortKey, PortUsage, Querier, QuerierKey, RelayStream, Source, SourceKey,
    StreamKey, StreamUsage, Subscriber, SubscriberKey, SubscriberUsage,
};
use linux::bpf::refusal::refusal;

pub use bridges::BridgeLink;
pub use capacity::Capacities;
pub use error::DatapathError;
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

/// Default directory of the pinned maps and links.
pub const DEFAULT_PIN_ROOT: &str = "/sys/fs/bpf/roamcast";

/// Settings of the data path.
#[derive(Clone, Debug)]
pub struct DatapathConfig {
    /// Directory on a BPF file system (bpffs) for the pins.
    pub pin_root: PathBuf,
    /// Bridge of the programs; `None` for a relay, which has none.
    pub bridge: Option<BridgeLink>,
    /// TC hook to use; `None` selects TCX if the kernel has TCX, otherwise filters.
    pub hook: Option<Hook>,
    /// Hook of `uplink`, which restores relayed packets; `None` keeps the hook of a pinned link, or
    /// chooses by the uplink's driver.
    pub uplink_hook: Option<UplinkHook>,
    /// Capacities of the maps created by this agent.
    pub capacities: Capacities,
    /// Most flows of one address in `STREAMS`.
    pub flows_per_address: u16,
}

impl Default for DatapathConfig {
    fn default() -> Self {
        Self {
            pin_root: PathBuf::from(DEFAULT_PIN_ROOT),
            bridge: None,
            hook: None,
            uplink_hook: None,
            capacities: Capacities::default(),
            flows_per_address: 1024,
        }
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
    /// The set of programs attached now: the usual one or the traced one.
    programs: Mutex<Ebpf>,
    /// Excludes attaching, detaching and surveying programs while a set is exchanged for another.
    hooks: Mutex<()>,
    tracing: Mutex<Option<Traced>>,
    capacities: Capacities,
    /// Number of the bridge in the keys of the maps.
    bridge: BridgeNumber,
    bridges: Table<BridgeNumber, Bridge>,
    attached: Mutex<BTreeMap<(Program, u32), Attachment>>,
    /// Attachments for which the log already names the programs in front of them.
    warned: Mutex<BTreeSet<(Program, u32)>>,
    filters: Mutex<Filters>,
    listeners: Table<ListenerKey, Listener>,
    sources: Table<SourceKey, Source>,
    /// Only the agent writes these entries; the lock makes each read-modify-write atomic.
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
    /// Packets per flow into crowded TAPs, as of the last [`Datapath::collect`].
    crowded: Mutex<Passed>,
    held: Mutex<Option<RingBuf<MapData>>>,
    counters: PerCpuArray<MapData, u64>,
    events: Mutex<Option<RingBuf<MapData>>>,
    /// Counts of Reports that userspace finished, by [`Counter`]. They are separate because the
    /// maps are per CPU and the kernel writes them.
    finished: Box<[AtomicU64]>,
}

impl Datapath {
    /// Loads the programs, and creates or adopts the maps. Attaches no program:
    /// [`Datapath::attach_port`], [`Datapath::attach_uplink`] and [`Datapath::attach_replicate`]
    /// do, and adopt pinned links. Removes the pins and the state of interfaces that no longer
    /// exist.
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
        let bridge = match &config.bridge {
            Some(bridge) => bridges::choose(&pins, bridge)?,
            None => &NO_BRIDGE,
        };
        let mut loader = capacity::loader(bridge);
        let mut ebpf = load_maps(&mut loader, &pins, &config.capacities, object::HOST)?;
        for program in Program::ALL {
            link::classifier(&mut ebpf, program)?
                .load()
                .map_err(|error| {
                    feature::missing().unwrap_or_else(|| load_error(program.name(), &error))
                })?;
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
                bridge: *bridge,
                bridges: bridges::table(ebpf.take_map(bridges::BRIDGES))?,
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
        if let Some(bridge) = &config.bridge {
            datapath.settle_bridges(bridge)?;
        }
        if hook == Hook::Tcx {
            // An earlier agent without TCX may have left filters, which would process each packet a
            // second time.
            lock(&datapath.inner.filters)
                .remove_all()
                .map_err(DatapathError::from_refusal)?;
        }
        Ok(datapath)
    }

    /// Returns the directory of the pinned maps, named after the layout version.
    pub fn pin_path(&self) -> &Path {
        self.inner.pins.directory()
    }

    /// Returns the TC hook for programs. `uplink` may use another hook, see [`Attachment::hook`].
    pub fn hook(&self) -> Hook {
        self.inner.hook
    }

    /// Runs work that reads whole maps on a thread for blocking work.
    ///
    /// # Errors
    ///
    /// The error of the work, or [`DatapathError::Shutdown`].
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

fn load_error(name: &str, error: &dyn std::error::Error) -> DatapathError {
    tracing::debug!(name, %error, "kernel programs refused");
    DatapathError::Load(refusal(name, error))
}

/// Locks a mutex. A holder that panicked leaves the kernel's state intact, so poisoning is ignored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
