//! How a bridge snoops MLD, and what of it a VM must not change.
//!
//! A VM can do two things to a bridge that change what *other* VMs get:
//! - A bridge with more groups than `mcast_hash_max` stops snooping and floods all multicast to
//!   everybody. The agent raises the bound to what its own maps hold, and the limits of `snoop` keep
//!   the VMs below it. `mcast_max_groups` of a port (Linux 6.3) is left alone: the bridge counts there also
//!   the sources that *others* have listed for an address which this VM receives from any source, so a
//!   VM could use up its neighbour's number.
//! - A port from which a Query, a PIM Hello or a Multicast Router Advertisement (RFC 4286) comes is
//!   taken for a multicast router's, and gets every stream. `snoop` drops Queries of VMs; against the
//!   others the bridge is told not to learn (`mcast_router` 0).

use std::io;

use linux::interface;
use linux::netlink::{Netlink, Refusal, RequestError};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    BridgeMulticastRouterType, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData,
    InfoPortKind, LinkAttribute, LinkInfo, LinkMessage,
};

use super::links::Bridge;

/// `mcast_hash_max` of a bridge that nobody has set.
const DEFAULT_HASH_MAX: u32 = 4096;

/// Why a setting of the bridge or of one of its ports cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SnoopingError {
    /// Netlink does not work.
    #[error("Cannot reach the bridge by netlink: {0}; run the agent as root")]
    Netlink(#[from] io::Error),
    /// The kernel refuses.
    #[error("The kernel refuses to set {setting} of interface {ifindex}: {refusal}")]
    Refused {
        /// As iproute2 calls it.
        setting: &'static str,
        /// The interface.
        ifindex: u32,
        /// What it said.
        #[source]
        refusal: Refusal,
    },
}

/// How a bridge is set for MLD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snooping {
    /// Whether it snoops at all (`mcast_snooping`).
    pub enabled: bool,
    /// The MLD version it follows (`mcast_mld_version`): 1 or 2.
    pub mld_version: u8,
    /// Whether it is a querier itself (`mcast_querier`).
    pub querier: bool,
    /// Most groups; with more, it stops snooping (`mcast_hash_max`).
    pub hash_max: u32,
}

impl Snooping {
    /// Reads the settings of a bridge.
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

    /// What an operator should change on the bridge, one sentence each.
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

/// Sentence for a bridge that does not snoop.
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

/// Has the bridge learn no multicast router at one of its ports, unless the operator has said that
/// there is one (`mcast_router` 2). Returns whether something was changed.
///
/// # Errors
///
/// [`SnoopingError`]; a port that is gone is refused.
pub fn learn_no_router(ifindex: u32) -> Result<bool, SnoopingError> {
    let learns = match Netlink::open()?.link(ifindex) {
        Ok(link) => learns_routers(&link),
        // The kernel learns by default.
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
