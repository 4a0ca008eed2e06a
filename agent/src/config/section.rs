//! The sections of the file and their defaults.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use common::signal::PORT;

use super::value::{self, InterfaceName, Name, PeerAddress, Prefix};
use crate::datapath::UplinkHook;
use crate::glob::Glob;
use crate::hypervisor::libvirt::{MigrateFlag, MigrateFlags, MigrateFlagsError};
use crate::net::tls::TlsFiles;
use crate::proto::{Carrier, CopyConfig, Encrypt};

/// Most entries of one map, a bound against typing errors: 16 Mi.
pub(super) const MAX_MAP_ENTRIES: u64 = 1 << 24;

/// `[agent]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    /// Name of this agent, as in its certificate.
    pub name: Name,
    /// Bridge whose ports are the VMs' TAPs.
    pub bridge: InterfaceName,
    /// Physical ports of the bridge; empty: every port that is no TAP.
    #[serde(default)]
    pub uplinks: Vec<InterfaceName>,
    /// Hook of the program on the uplinks; none: chosen by the driver.
    #[serde(default)]
    pub uplink_hook: Option<UplinkHook>,
    /// Where peers connect to.
    #[serde(default = "default_listen")]
    pub listen: SocketAddrV6,
    /// The operator's socket.
    #[serde(default = "default_control_socket")]
    pub control_socket: PathBuf,
    /// Directory in a BPF file system for maps and links.
    #[serde(default = "default_pin_root")]
    pub pin_root: PathBuf,
    /// Prefix that arriving VMs take addresses from; none: that of the bridge's global address.
    #[serde(default)]
    pub prefix: Option<Prefix>,
    /// This host's address in that prefix; none: the bridge's global address.
    #[serde(default)]
    pub address: Option<Ipv6Addr>,
}

/// Where the operator's socket is unless the configuration says otherwise.
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

/// `[limits]`. The first four hold for each VM NIC.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Multicast addresses, over all VLANs.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub listeners: u32,
    /// Sources, over all multicast addresses.
    #[serde(deserialize_with = "value::ranged::<0, MAX_MAP_ENTRIES, _, _>")]
    pub sources: u32,
    /// MLD Reports each second; also the burst.
    #[serde(deserialize_with = "value::ranged::<1, 1_000_000, _, _>")]
    pub reports_per_second: u32,
    /// Flows that are counted on their way to it.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub flows: u32,
    /// Flows of one multicast address that are counted on this host.
    #[serde(deserialize_with = "value::ranged::<1, 65_535, _, _>")]
    pub flows_per_address: u16,
    /// Capacity of `LISTENERS`.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_listeners: u32,
    /// Capacity of `LISTENER_SOURCES`.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_sources: u32,
    /// Capacity of `STREAMS`: flows.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_streams: u32,
    /// Capacity of `MANAGED`: multicast addresses on this host.
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
    /// Certificate of the CA (PEM).
    pub ca: PathBuf,
    /// This host's certificate (PEM), for servers and clients.
    pub cert: PathBuf,
    /// Its private key (PEM).
    pub key: PathBuf,
    /// Revoked certificates of the CA (PEM), if there is such a file.
    pub crl: PathBuf,
    /// Certificate names that may connect besides `[[peers]]`.
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

/// One of `[[peers]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its name: that of its certificate, and that of `migkick go NAME`.
    pub name: Name,
    /// Where it listens.
    pub address: PeerAddress,
    /// libvirt URI of that host, for this host's libvirtd; none: from the address.
    #[serde(default, deserialize_with = "value::optional_uri")]
    pub connect_uri: Option<String>,
    /// Where this host's QEMU sends memory to; none: from the address.
    #[serde(default, deserialize_with = "value::optional_uri")]
    pub migrate_uri: Option<String>,
}

impl Peer {
    /// libvirt URI by which this host's libvirtd reaches that host.
    pub fn connect_uri(&self) -> String {
        self.connect_uri
            .clone()
            .unwrap_or_else(|| format!("qemu+tls://{}/system", self.address.bracketed_host()))
    }

    /// Where this host's QEMU sends memory to.
    pub fn migrate_uri(&self) -> String {
        self.migrate_uri
            .clone()
            .unwrap_or_else(|| format!("tcp://{}", self.address.bracketed_host()))
    }
}

/// `[destination]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Destination {
    /// How long a multicast tree may take to grow before an address counts as unreachable. The VM
    /// still receives at the source meanwhile, so that it costs time but no packets. At most two
    /// thirds of what the source waits for the answer.
    #[serde(
        rename = "tree_budget_ms",
        deserialize_with = "value::milliseconds::<10, 10_000, _>"
    )]
    pub tree_budget: Duration,
    /// How long a proxy join waits for a domain that does not come.
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

/// `[libvirt]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Libvirt {
    /// URI of this host's libvirtd.
    #[serde(deserialize_with = "value::uri")]
    pub uri: String,
    /// Migration flags.
    pub flags: Vec<MigrateFlag>,
    /// When the copy of memory is encrypted.
    pub encrypt: Encrypt,
    /// Most bandwidth of a migration, MiB/s; 0: no limit of ours.
    #[serde(deserialize_with = "value::ranged::<0, 1_000_000, _, _>")]
    pub bandwidth_mib: u64,
    /// Longest pause of the VM that QEMU aims at first.
    #[serde(
        rename = "downtime_ms",
        deserialize_with = "value::milliseconds::<1, 60_000, _>"
    )]
    pub downtime: Duration,
    /// What that may grow to while the copy does not converge.
    #[serde(
        rename = "max_downtime_ms",
        deserialize_with = "value::milliseconds::<1, 60_000, _>"
    )]
    pub max_downtime: Duration,
    /// Connections that memory is copied over; 0: a single one, without `VIR_MIGRATE_PARALLEL`.
    #[serde(deserialize_with = "value::ranged::<0, 255, _, _>")]
    pub parallel_connections: u32,
    /// Whether this agent's name is left with the domains of its host, so that a destination finds it
    /// when somebody else moves them.
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
    /// The flags together, `VIR_MIGRATE_PARALLEL` included where connections are set.
    ///
    /// # Errors
    ///
    /// [`MigrateFlagsError`] where they do not go together; a [`super::Config`] has none such.
    pub fn migrate_flags(&self) -> Result<MigrateFlags, MigrateFlagsError> {
        MigrateFlags::new(&self.flags, self.parallel_connections > 0)
    }

    /// What is said of copies.
    pub fn copy(&self) -> CopyConfig {
        let flags = self.migrate_flags().unwrap_or_default();
        CopyConfig {
            encrypt: self.encrypt,
            carrier: flags.carrier(),
        }
    }

    /// Why `encrypt` and the flags contradict each other, if they do.
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

/// `[log]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Filter of `tracing` (`info`, `warn,roamcast::proto=debug`).
    pub level: String,
    /// How lines look.
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

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people and the journal.
    Text,
    /// One JSON object a line.
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
