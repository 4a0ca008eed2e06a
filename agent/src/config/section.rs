//! Sections of the agent's file, and their defaults.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use common::signal::PORT;

use super::value;
use crate::datapath::UplinkHook;
use crate::glob::Glob;
use crate::hypervisor::libvirt::{MigrateFlag, MigrateFlags, MigrateFlagsError};
use crate::net::tls::TlsFiles;
use crate::proto::{Carrier, CopyConfig, Encrypt};
use crate::value::{InterfaceName, Name, PeerAddress, Prefix};

/// Most entries of one map: 16 Mi, a bound against typing errors.
pub(super) const MAX_MAP_ENTRIES: u64 = 1 << 24;

/// Name, bridge and sockets of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    /// Name of this agent, as in its certificate.
    pub name: Name,
    /// Bridge whose ports are the VMs' TAPs.
    pub bridge: InterfaceName,
    /// Physical ports of the bridge; empty: every port that is not a TAP.
    #[serde(default)]
    pub uplinks: Vec<InterfaceName>,
    /// Hook for the program on the uplinks; `None`: the driver decides.
    #[serde(default)]
    pub uplink_hook: Option<UplinkHook>,
    /// Address and port to which peers connect.
    #[serde(default = "default_listen")]
    pub listen: SocketAddrV6,
    /// Path of the operator's socket.
    #[serde(default = "default_control_socket")]
    pub control_socket: PathBuf,
    /// Directory in a BPF file system for pinned maps and links.
    #[serde(default = "default_pin_root")]
    pub pin_root: PathBuf,
    /// Prefix from which arriving VMs take addresses; `None`: the prefix of the bridge's global
    /// address.
    #[serde(default)]
    pub prefix: Option<Prefix>,
    /// This host's address in that prefix; `None`: the bridge's global address.
    #[serde(default)]
    pub address: Option<Ipv6Addr>,
}

/// Path of the operator's socket if the configuration sets none.
pub(crate) const DEFAULT_CONTROL_SOCKET: &str = "/run/roamcast/agent.sock";

pub(super) fn default_listen() -> SocketAddrV6 {
    SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, PORT, 0, 0)
}

fn default_control_socket() -> PathBuf {
    PathBuf::from(DEFAULT_CONTROL_SOCKET)
}

fn default_pin_root() -> PathBuf {
    PathBuf::from("/sys/fs/bpf/roamcast")
}

/// Limits for each VM NIC (the first four) and for the host, and sizes of the maps.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Most multicast addresses to which the NIC listens, over all VLANs.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub listeners: u32,
    /// Most sources of these listeners, over all multicast addresses.
    #[serde(deserialize_with = "value::ranged::<0, MAX_MAP_ENTRIES, _, _>")]
    pub sources: u32,
    /// MLD Reports per second, and size of a burst.
    #[serde(deserialize_with = "value::ranged::<1, 1_000_000, _, _>")]
    pub reports_per_second: u32,
    /// Most flows to the NIC that the kernel counts.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub flows: u32,
    /// Most flows of one multicast address that the kernel counts on this host.
    #[serde(deserialize_with = "value::ranged::<1, 65_535, _, _>")]
    pub flows_per_address: u16,
    /// Entries of the map `LISTENERS`.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_listeners: u32,
    /// Entries of the map `LISTENER_SOURCES`.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_sources: u32,
    /// Entries of the map `STREAMS`: flows.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_streams: u32,
    /// Entries of the map `MANAGED`: multicast addresses on this host.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_managed: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            listeners: 1024,
            sources: 4096,
            reports_per_second: 2000,
            flows: 4096,
            flows_per_address: 1024,
            map_listeners: 131_072,
            map_sources: 131_072,
            map_streams: 65_536,
            map_managed: 16_384,
        }
    }
}

/// `[tls]`: certificates of the signalling.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// CA certificate (PEM).
    pub ca: PathBuf,
    /// This host's certificate (PEM), for servers and clients.
    pub cert: PathBuf,
    /// Private key of `cert` (PEM).
    pub key: PathBuf,
    /// Certificate revocation list of the CA (PEM); the file may be missing.
    pub crl: PathBuf,
    /// Names in certificates that may connect in addition to `[[peers]]`.
    pub admit: Vec<Glob>,
}

impl Default for Tls {
    fn default() -> Self {
        let files = TlsFiles::default();
        Self {
            ca: files.ca,
            cert: files.certificate,
            key: files.key,
            crl: files.crl,
            admit: Vec::new(),
        }
    }
}

/// An agent of another host, from `[[peers]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Name of the agent in its certificate, and argument of `migkick go`.
    pub name: Name,
    /// Address at which the agent listens.
    pub address: PeerAddress,
    /// libvirt URI of that host, for this host's libvirtd; `None`: derived from `address`.
    #[serde(default, deserialize_with = "value::optional_uri")]
    pub connect_uri: Option<String>,
    /// URI to which this host's QEMU sends memory; `None`: derived from `address`.
    #[serde(default, deserialize_with = "value::optional_uri")]
    pub migrate_uri: Option<String>,
}

impl Peer {
    /// Returns the libvirt URI by which this host's libvirtd reaches that host.
    pub fn connect_uri(&self) -> String {
        self.connect_uri
            .clone()
            .unwrap_or_else(|| format!("qemu+tls://{}/system", self.address.bracketed_host()))
    }

    /// Returns the URI to which this host's QEMU sends memory.
    pub fn migrate_uri(&self) -> String {
        self.migrate_uri
            .clone()
            .unwrap_or_else(|| format!("tcp://{}", self.address.bracketed_host()))
    }
}

/// Timers of the joins for arriving domains.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Destination {
    /// Time that a multicast tree may take to grow; then the address counts as unreachable. The VM
    /// still receives at the source meanwhile, so waiting costs time but no packets. At most two
    /// thirds of the time for which the source waits for the answer.
    #[serde(
        rename = "tree_budget_ms",
        deserialize_with = "value::milliseconds::<10, 10_000, _>"
    )]
    pub tree_budget: Duration,
    /// Time for which a proxy join waits for a domain that does not arrive.
    #[serde(
        rename = "join_expiry_s",
        deserialize_with = "value::seconds::<10, 86_400, _>"
    )]
    pub join_expiry: Duration,
}

impl Default for Destination {
    fn default() -> Self {
        Self {
            tree_budget: Duration::from_millis(2500),
            join_expiry: Duration::from_secs(600),
        }
    }
}

/// Connection to libvirt, and parameters of the migrations that it runs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Libvirt {
    /// URI of this host's libvirtd.
    #[serde(deserialize_with = "value::uri")]
    pub uri: String,
    /// Migration flags.
    pub flags: Vec<MigrateFlag>,
    /// When QEMU or libvirt encrypts the copied memory.
    pub encrypt: Encrypt,
    /// Highest bandwidth of a migration, MiB/s; 0: the agent sets no limit.
    #[serde(deserialize_with = "value::ranged::<0, 1_000_000, _, _>")]
    pub bandwidth_mib: u64,
    /// Pause of the VM that QEMU aims at first.
    #[serde(
        rename = "downtime_ms",
        deserialize_with = "value::milliseconds::<1, 60_000, _>"
    )]
    pub downtime: Duration,
    /// Limit for that pause, which grows while the copy does not converge.
    #[serde(
        rename = "max_downtime_ms",
        deserialize_with = "value::milliseconds::<1, 60_000, _>"
    )]
    pub max_downtime: Duration,
    /// Parallel connections for the memory; 0: one connection, without `VIR_MIGRATE_PARALLEL`.
    #[serde(deserialize_with = "value::ranged::<0, 255, _, _>")]
    pub parallel_connections: u32,
    /// True: the agent writes its name to the metadata of this host's domains. A destination then
    /// finds the source's agent when somebody else migrates a domain.
    pub metadata: bool,
}

impl Default for Libvirt {
    fn default() -> Self {
        Self {
            uri: "qemu:///system".to_owned(),
            flags: MigrateFlag::DEFAULT.to_vec(),
            encrypt: Encrypt::Auto,
            bandwidth_mib: 0,
            downtime: Duration::from_millis(50),
            max_downtime: Duration::from_millis(300),
            parallel_connections: 0,
            metadata: true,
        }
    }
}

impl Libvirt {
    /// Combines the flags, with `VIR_MIGRATE_PARALLEL` if `parallel_connections` is set.
    ///
    /// # Errors
    ///
    /// [`MigrateFlagsError`] if the flags contradict each other; in a [`super::Config`] they never
    /// do.
    pub fn migrate_flags(&self) -> Result<MigrateFlags, MigrateFlagsError> {
        MigrateFlags::new(&self.flags, self.parallel_connections > 0)
    }

    /// Returns the settings that concern the copy of memory.
    pub fn copy(&self) -> CopyConfig {
        let flags = self.migrate_flags().unwrap_or_default();
        CopyConfig {
            encrypt: self.encrypt,
            carrier: flags.carrier(),
        }
    }

    /// Returns why `encrypt` and the flags contradict each other, if they do.
    pub(super) fn encrypt_conflict(&self) -> Option<&'static str> {
        match (self.encrypt, self.copy().carrier) {
            (Encrypt::Never, Carrier::Tls) => {
                Some("\"never\" contradicts VIR_MIGRATE_TLS in libvirt.flags; drop one")
            }
            (Encrypt::Always, Carrier::Zerocopy) => Some(
                "\"always\" contradicts VIR_MIGRATE_ZEROCOPY in libvirt.flags, which does not go with TLS; drop one",
            ),
            _ => None,
        }
    }
}

/// Level and format of the log.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Filter of `tracing` (`info`, `warn,roamcast::proto=debug`).
    pub level: String,
    /// Format of the lines.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text for people and the journal.
    Text,
    /// One JSON object per line.
    Json,
}

impl From<&Tls> for TlsFiles {
    fn from(tls: &Tls) -> Self {
        Self {
            ca: tls.ca.clone(),
            certificate: tls.cert.clone(),
            key: tls.key.clone(),
            crl: tls.crl.clone(),
        }
    }
}
