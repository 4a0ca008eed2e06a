//! MLD snooping settings of a bridge, and protection of these settings against VMs.
//!
//! A VM can affect in two ways what *other* VMs receive from a bridge:
//! - A bridge with more groups than `mcast_hash_max` stops snooping and floods all multicast to all
//!   ports. The agent raises the bound to the capacity of its own maps, and the limits of `snoop` keep
//!   the VMs below the bound. The agent leaves `mcast_max_groups` of a port (Linux 6.3) alone: the
//!   bridge also counts there the sources that *other* VMs have listed for an address that this VM
//!   receives from any source. A VM could therefore use up its neighbour's number.
//! - The bridge takes a port for a multicast router's, and sends every stream to it, when a Query, a
//!   PIM Hello or a Multicast Router Advertisement (RFC 4286) arrives there. `snoop` drops the Queries
//!   of VMs; against the other messages the agent disables learning on the port (`mcast_router` 0).

use std::io;

use linux::interface;
use linux::netlink::{Netlink, Refusal, RequestError};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    BridgeMulticastRouterType, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData,
    InfoPortKind, LinkAttribute, LinkInfo, LinkMessage,
};

use super::links::Bridge;

/// Kernel default of `mcast_hash_max`.
const DEFAULT_HASH_MAX: u32 = 4096;

/// Why a setting of the bridge or of one of its ports cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SnoopingError {
    /// The netlink socket failed.
    #[error("Cannot reach the bridge by netlink: {0}; run the agent as root")]
    Netlink(#[from] io::Error),
    /// The kernel refused a setting.
    #[error("The kernel refuses to set {setting} of interface {ifindex}: {refusal}")]
    Refused {
        /// Name of the setting in iproute2.
        setting: &'static str,
        /// Index of the bridge or port.
        ifindex: u32,
        /// Error of the kernel for the change.
        #[source]
        refusal: Refusal,
    },
}

/// MLD settings of a bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snooping {
    /// Whether the bridge snoops (`mcast_snooping`).
    pub enabled: bool,
    /// MLD version of the bridge (`mcast_mld_version`): 1 or 2.
    pub mld_version: u8,
    /// Whether the bridge is a querier (`mcast_querier`).
    pub querier: bool,
    /// Most groups; with more, the bridge stops snooping (`mcast_hash_max`).
    pub hash_max: u32,
}

impl Snooping {
    /// Extracts the settings from the attributes of a bridge.
    pub(super) fn of(bridge: &Bridge) -> Self {
        let mut snooping = Self {
            enabled: false,
            mld_version: 1,
            querier: false,
            hash_max: DEFAULT_HASH_MAX,
        };
        for setting in &bridge.settings {
            match setting {
                InfoBridge::MulticastSnooping(enabled) => snooping.enabled = *enabled,
                InfoBridge::MulticastMldVersion(version) => snooping.mld_version = *version,
                InfoBridge::MulticastQuerier(querier) => snooping.querier = *querier,
                InfoBridge::MulticastHashMax(groups) => snooping.hash_max = *groups,
                _ => {}
            }
        }
        snooping
    }

    /// Returns what an operator should change on the bridge, one sentence each.
    pub fn advice(&self, bridge: &str) -> Vec<String> {
        let mut advice = Vec::new();
        if !self.enabled {
            advice.push(no_snooping(bridge));
        }
        if self.mld_version < 2 {
            advice.push(format!(
                "Bridge {bridge} follows MLDv1 only, so source lists of VMs are not honoured; \
                 run `ip link set {bridge} type bridge mcast_mld_version 2`"
            ));
        }
        advice
    }
}

/// Returns the advice for a bridge that does not snoop.
pub(super) fn no_snooping(bridge: &str) -> String {
    format!(
        "Bridge {bridge} does not snoop multicast, so every VM gets every stream; \
         run `ip link set {bridge} type bridge mcast_snooping 1`"
    )
}

/// Sets `mcast_hash_max` of a bridge.
///
/// # Errors
///
/// [`SnoopingError`].
pub fn set_hash_max(ifindex: u32, groups: u32) -> Result<(), SnoopingError> {
    set(
        ifindex,
        "mcast_hash_max",
        vec![
            LinkInfo::Kind(InfoKind::Bridge),
            LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::MulticastHashMax(groups)])),
        ],
    )
}

/// Stops the bridge from learning a multicast router at one of its ports, unless the operator
/// declared one there (`mcast_router` 2). Returns true if the setting changed.
///
/// # Errors
///
/// [`SnoopingError`]; for a port that no longer exists, `Refused`.
pub fn learn_no_router(ifindex: u32) -> Result<bool, SnoopingError> {
    let learns = match Netlink::open()?.link(ifindex) {
        Ok(link) => learns_routers(&link),
        // A kernel that does not report the setting uses its default: it learns.
        Err(RequestError::Answer) => true,
        Err(RequestError::Socket(error)) => return Err(error.into()),
        Err(RequestError::Refused(refusal)) => {
            return Err(SnoopingError::Refused {
                setting: "mcast_router",
                ifindex,
                refusal,
            });
        }
    };
    if learns {
        let router = InfoBridgePort::MulticastRouter(BridgeMulticastRouterType::Disabled);
        set(
            ifindex,
            "mcast_router",
            vec![
                LinkInfo::PortKind(InfoPortKind::Bridge),
                LinkInfo::PortData(InfoPortData::BridgePort(vec![router])),
            ],
        )?;
    }
    Ok(learns)
}

fn learns_routers(port: &LinkMessage) -> bool {
    interface::info(port).any(|info| {
        matches!(info, LinkInfo::PortData(InfoPortData::BridgePort(settings))
        if settings.iter().any(|setting| matches!(
            setting,
            InfoBridgePort::MulticastRouter(
                BridgeMulticastRouterType::TempQuery | BridgeMulticastRouterType::Temp
            )
        )))
    })
}

fn set(ifindex: u32, setting: &'static str, info: Vec<LinkInfo>) -> Result<(), SnoopingError> {
    let mut link = LinkMessage::default();
    link.header.index = ifindex;
    link.attributes.push(LinkAttribute::LinkInfo(info));
    let changed = Netlink::open()?.change(RouteNetlinkMessage::NewLink(link), 0);
    changed.map_err(|error| match error {
        RequestError::Socket(error) => error.into(),
        error => SnoopingError::Refused {
            setting,
            ifindex,
            refusal: error.into(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_the_command() {
        let snooping = Snooping {
            enabled: false,
            mld_version: 1,
            querier: false,
            hash_max: DEFAULT_HASH_MAX,
        };
        let advice = snooping.advice("br0");
        assert!(
            advice
                .iter()
                .any(|line| line.contains("br0 type bridge mcast_snooping 1"))
        );
        assert!(
            advice
                .iter()
                .any(|line| line.contains("mcast_mld_version 2"))
        );
    }
}
