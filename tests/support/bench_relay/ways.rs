//! The paths from the network to the TAPs.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use common::group;
use common::maps::{Origins, RelayFlow, RelayFlowKey, StreamKey};
use common::relay::{self, Endpoints};
use roamcast::datapath::{Datapath, DatapathConfig, Hook, UplinkHook};
use roamcast::proto::Timestamp;

use super::forward::{Forwarder, RECEIVE_BUFFER};
use super::world::{self, DESTINATION_PORT, MULTICAST_ADDRESS, SOURCE, SOURCE_PORT, STREAM};

/// Interfaces in the host's namespace: the uplink and the bridge.
pub(super) const UPLINK: &str = "eth0";
pub(super) const BRIDGE: &str = "br0";

/// Path of the stream to the TAPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    /// Native multicast, with the agent's programs at the uplink: the reference of a relayed
    /// stream.
    Native,
    /// Native multicast, without an agent.
    Bridge,
    /// Relayed; `uplink` at TC ingress restores the stream.
    Tc,
    /// Relayed; `uplink` at generic XDP restores the stream.
    XdpGeneric,
    /// Relayed; `uplink` at native XDP restores the stream.
    XdpNative,
    /// Relayed; one static nftables rule at netdev ingress rewrites the packets. The rule serves
    /// one flow, knows neither leases nor modes and passes every packet of the flow, and nothing
    /// prevents the rewritten packets from leaving this host.
    Nftables,
    /// Relayed; one socket receives, and another socket sends to the bridge.
    Userspace,
    /// Relayed; socat receives and sends to the bridge.
    Socat,
}

impl Way {
    pub(super) const ALL: [Self; 8] = [
        Self::Native,
        Self::Bridge,
        Self::Tc,
        Self::XdpGeneric,
        Self::XdpNative,
        Self::Nftables,
        Self::Userspace,
        Self::Socat,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Bridge => "native, no agent",
            Self::Tc => "roamcast tc",
            Self::XdpGeneric => "roamcast xdp-generic",
            Self::XdpNative => "roamcast xdp-native",
            Self::Nftables => "nftables rule",
            Self::Userspace => "recvmmsg/sendmmsg",
            Self::Socat => "socat",
        }
    }

    /// Returns true if the sender sends unicast.
    pub(super) fn is_relayed(self) -> bool {
        !matches!(self, Self::Native | Self::Bridge)
    }
}

/// State that is loaded once for all paths.
pub(super) struct Ways {
    ifindex: u32,
    endpoints: Endpoints,
    /// Each datapath has its own pins, as if each belonged to an agent of its own.
    native: Datapath,
    tc: Datapath,
    generic: Datapath,
    driver: Datapath,
}

impl Ways {
    /// Loads the programs for a stream that arrives from `endpoints` or natively.
    pub(super) fn load(endpoints: Endpoints) -> Result<Self> {
        let load = |name: &str, hook, origins| -> Result<Datapath> {
            let datapath = Datapath::load(&DatapathConfig {
                pin_root: Path::new(world::BPF_FS).join(name),
                uplink_hook: Some(hook),
                ..DatapathConfig::default()
            })?;
            datapath.manage(&STREAM.managed(), Timestamp(0), origins)?;
            let (key, flow) = relay_flow(&STREAM, &endpoints);
            datapath.relay_flow_set(&key, &flow)?;
            Ok(datapath)
        };
        Ok(Self {
            ifindex: nix::net::if_::if_nametoindex(UPLINK).context("Failed to find the uplink")?,
            endpoints,
            native: load("native", UplinkHook::Tc, Origins::Native)?,
            tc: load("tc", UplinkHook::Tc, Origins::Relay)?,
            generic: load("generic", UplinkHook::XdpGeneric, Origins::Relay)?,
            driver: load("driver", UplinkHook::XdpNative, Origins::Relay)?,
        })
    }

    /// Opens a path. Dropping the result closes the path.
    pub(super) fn open(&self, way: Way) -> Result<Open<'_>> {
        let host = |address: [u8; 16], port| SocketAddrV6::new(address.into(), port, 0, 0);
        let at = host(self.endpoints.agent_address, self.endpoints.agent_port);
        let to = SocketAddrV6::new(MULTICAST_ADDRESS, DESTINATION_PORT, 0, 0);
        Ok(match way {
            Way::Bridge => Open::Nothing,
            Way::Native => self.attach(&self.native, self.native.hook())?,
            Way::Tc => self.attach(&self.tc, self.tc.hook())?,
            Way::XdpGeneric => self.attach(&self.generic, Hook::XdpGeneric)?,
            Way::XdpNative => self.attach(&self.driver, Hook::XdpNative)?,
            Way::Nftables => {
                nft(&self.rules())?;
                Open::Rules
            }
            Way::Userspace => Open::Thread(Forwarder::to_one(at, to, BRIDGE)?),
            Way::Socat => Open::Process(socat(at, to)?),
        })
    }

    fn attach<'a>(&'a self, datapath: &'a Datapath, wanted: Hook) -> Result<Open<'a>> {
        let attachment = datapath.attach_uplink(self.ifindex, UPLINK)?;
        let open = Open::Programs(datapath, self.ifindex);
        ensure!(
            attachment.hook == wanted,
            "The uplink takes {} instead of {}",
            attachment.hook.as_str(),
            wanted.as_str()
        );
        Ok(open)
    }

    fn rules(&self) -> String {
        let Endpoints {
            relay_address,
            relay_port,
            agent_address,
            agent_port,
        } = self.endpoints;
        let (relay, agent) = (Ipv6Addr::from(relay_address), Ipv6Addr::from(agent_address));
        let mac = group::mac(&MULTICAST_ADDRESS.octets()).map(|byte| format!("{byte:02x}"));
        format!(
            "table netdev relay {{ chain ingress {{ \
             type filter hook ingress device \"{UPLINK}\" priority 0; \
             ip6 saddr {relay} ip6 daddr {agent} udp sport {relay_port} udp dport {agent_port} \
             ether daddr set {} ip6 hoplimit set 1 \
             ip6 saddr set {SOURCE} ip6 daddr set {MULTICAST_ADDRESS} \
             udp sport set {SOURCE_PORT} udp dport set {DESTINATION_PORT}\n}}\n}}\n",
            mac.join(":")
        )
    }
}

/// Returns the entry of `RELAY_FLOWS` for the stream.
fn relay_flow(stream: &StreamKey, endpoints: &Endpoints) -> (RelayFlowKey, RelayFlow) {
    let address_difference = relay::to_multicast(stream, endpoints);
    let key = RelayFlowKey {
        relay_address: endpoints.relay_address,
        relay_port: endpoints.relay_port,
        agent_port: endpoints.agent_port,
    };
    let flow = RelayFlow {
        session: 1,
        stream: *stream,
        agent_address: endpoints.agent_address,
        address_difference,
        pad: 0,
    };
    (key, flow)
}

/// An open path. Dropping the value closes the path.
pub(super) enum Open<'a> {
    Nothing,
    Programs(&'a Datapath, u32),
    Rules,
    Thread(Forwarder),
    Process(Child),
}

impl Open<'_> {
    /// Returns the number of packets that a relay in this process has forwarded; `None` without
    /// such a relay.
    pub(super) fn forwarded(&self) -> Option<u64> {
        match self {
            Self::Thread(forwarder) => Some(forwarder.forwarded()),
            _ => None,
        }
    }

    /// Returns the process id of a relay outside this process; `None` without such a relay.
    pub(super) fn process(&self) -> Option<u32> {
        match self {
            Self::Process(child) => Some(child.id()),
            _ => None,
        }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        // Errors are ignored: remains of this path make the next path fail, which reports them.
        match self {
            Self::Nothing | Self::Thread(_) => {}
            Self::Programs(datapath, ifindex) => {
                let _ = datapath.detach_uplink(*ifindex);
            }
            Self::Rules => {
                let _ = nft("delete table netdev relay\n");
            }
            Self::Process(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

fn nft(rules: &str) -> Result<()> {
    world::with_input("nft", ["-f", "-"], rules)
}

fn socat(at: SocketAddrV6, to: SocketAddrV6) -> Result<Child> {
    let from = format!(
        "UDP6-RECV:{},bind=[{}],rcvbuf={RECEIVE_BUFFER}",
        at.port(),
        at.ip()
    );
    let to = format!("UDP6-SENDTO:[{}]:{}", to.ip(), to.port());
    Command::new("socat")
        .args(["-u", "-b2048", &from, &to])
        .stdin(Stdio::null())
        .spawn()
        .context("Failed to start socat: run `cargo xtask setup`")
}
