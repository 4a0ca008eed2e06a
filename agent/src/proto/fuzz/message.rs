//! Messages of a small world: few names, addresses and numbers, so that they collide.

use std::collections::VecDeque;
use std::net::Ipv6Addr;

use arbitrary::{Result, Unstructured};
use common::maps::ManagedKey;
use common::signal::Reason;
use common::signal::*;

use super::BRIDGE;
use crate::proto::{DomainUuid, Mac};

pub(super) const NAMES: [&str; 3] = ["viewer", "studio", "x"];
pub(super) const PEERS: [&str; 5] = ["vms2", "vms3", "relay1", "relay2", "nobody"];

pub(super) fn number(input: &mut Unstructured<'_>, most: u8) -> Result<u8> {
    input.int_in_range(0..=most)
}

pub(super) fn list<T>(
    input: &mut Unstructured<'_>,
    most: u8,
    mut one: impl FnMut(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let length = number(input, most)?;
    (0..length).map(|_| one(input)).collect()
}

pub(super) fn name(input: &mut Unstructured<'_>) -> Result<String> {
    Ok((*input.choose(&NAMES)?).to_owned())
}

pub(super) fn uuid(input: &mut Unstructured<'_>) -> Result<DomainUuid> {
    Ok(DomainUuid([7 + number(input, 2)?; 16]))
}

pub(super) fn mac(input: &mut Unstructured<'_>) -> Result<Mac> {
    Ok([0x52, 0x54, 0, 0, 0, number(input, 3)?])
}

/// Returns an address key, mostly a routable one.
pub(super) fn key(input: &mut Unstructured<'_>) -> Result<ManagedKey> {
    let choice = number(input, 7)?;
    let first = match choice {
        0 => 0xff02,
        1 => 0x2001,
        2 => 0xff1e,
        _ => 0xff3e,
    };
    Ok(ManagedKey {
        vlan: u16::from(choice == 3),
        bridge: BRIDGE,
        multicast_address: Ipv6Addr::new(first, 0, 0, 0, 0, 0, 1, (choice & 3).into()).octets(),
    })
}

/// Returns an address of this host, of a VM, of a relay or of a sender.
pub(super) fn unicast(input: &mut Unstructured<'_>) -> Result<Ipv6Addr> {
    let choice = number(input, 7)?;
    Ok(match choice {
        0 => Ipv6Addr::UNSPECIFIED,
        1 => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
        2 => Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10),
        3 => Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0, 1),
        4 | 5 => Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, choice.into()),
        _ => Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, choice.into()),
    })
}

fn address(input: &mut Unstructured<'_>) -> Result<Address> {
    Ok(unicast(input)?.octets().into())
}

fn flow(input: &mut Unstructured<'_>) -> Result<Flow> {
    Ok(Flow {
        source: address(input)?,
        source_port: 5004,
        destination_port: number(input, 1)?.into(),
        rate_mpps: input.arbitrary()?,
        silent_ms: input.arbitrary::<u16>()?.into(),
    })
}

fn listener(input: &mut Unstructured<'_>) -> Result<Listener> {
    let key = key(input)?;
    Ok(Listener {
        vlan: key.vlan,
        multicast_address: key.multicast_address.into(),
        filter_mode: number(input, 3)?,
        sources: list(input, 4, address)?,
        mld_version: number(input, 2)?,
        mac: mac(input)?.into(),
        flows: list(input, 2, flow)?,
    })
}

fn reception(input: &mut Unstructured<'_>) -> Result<Reception> {
    let key = key(input)?;
    let modes = [
        ReceptionMode::Native,
        ReceptionMode::Idle,
        ReceptionMode::Unreachable,
        ReceptionMode::Refused,
        ReceptionMode::Relay,
    ];
    Ok(Reception {
        vlan: key.vlan,
        multicast_address: key.multicast_address.into(),
        mode: *input.choose(&modes)?,
        waited_ms: input.arbitrary()?,
    })
}

pub(super) fn nic_cut(input: &mut Unstructured<'_>) -> Result<NicCut> {
    let bases = [CutBasis::Count, CutBasis::Overflow, CutBasis::Time];
    Ok(NicCut {
        mac: mac(input)?.into(),
        basis: *input.choose(&bases)?,
        flows: list(input, 2, |input| {
            let key = key(input)?;
            Ok(FlowCut {
                vlan: key.vlan,
                multicast_address: key.multicast_address.into(),
                source: address(input)?,
                source_port: 5004,
                destination_port: 5004,
                delivered: input.arbitrary()?,
                last_ns: input.arbitrary()?,
                fingerprints: input.arbitrary::<[u8; 9]>()?.to_vec().into(),
            })
        })?,
        tap_full: input.arbitrary()?,
    })
}

fn progress(input: &mut Unstructured<'_>) -> Result<MigrationProgress> {
    Ok(MigrationProgress {
        phase: *input.choose(&Phase::ALL)?,
        processed_bytes: input.arbitrary()?,
        total_bytes: input.arbitrary()?,
        elapsed_ms: input.arbitrary()?,
        vm_pause_ms: input.arbitrary()?,
        clock_ns: input.arbitrary()?,
    })
}

/// Returns a transaction, mostly one of the agent's own or a repeated one.
pub(super) fn transaction(input: &mut Unstructured<'_>, own: &VecDeque<u64>) -> Result<u64> {
    let choice = number(input, 11)?;
    let index = usize::from(choice);
    Ok(own.get(index).copied().unwrap_or(choice.into()))
}

fn reason() -> String {
    "That is how it is".to_owned()
}

/// Returns a message of another agent or of a relay.
pub(super) fn of_peer(input: &mut Unstructured<'_>) -> Result<PeerMessage> {
    Ok(match number(input, 11)? {
        0 | 1 => AgentRequest {
            domain_uuid: uuid(input)?.0.into(),
            domain_name: name(input)?,
            macs: list(input, 2, |input| Ok(mac(input)?.into()))?,
            listeners: list(input, 3, listener)?,
            vm_transaction: input.arbitrary::<Option<u8>>()?.map(Into::into),
        }
        .into(),
        2 => AgentResponse {
            prefix: address(input)?,
            prefix_length: input.arbitrary()?,
            agent_address: address(input)?,
            receptions: list(input, 3, reception)?,
            copy_tls: input.arbitrary()?,
        }
        .into(),
        3 => progress(input)?.into(),
        4 => MigrationAbort(Reason::unspecified(reason())).into(),
        5 => HandoverCut {
            clock_ns: input.arbitrary()?,
            nics: list(input, 2, nic_cut)?,
        }
        .into(),
        6 => RelayResponse {
            relay_address: address(input)?,
            lease_ms: input.arbitrary::<u16>()?.into(),
            flows: list(input, 2, |input| {
                Ok(AnnouncedFlow {
                    source: address(input)?,
                    source_port: 5004,
                    destination_port: number(input, 1)?.into(),
                    relay_port: input.arbitrary()?,
                    agent_port: input.arbitrary()?,
                })
            })?,
        }
        .into(),
        7 => RelayRelease(Reason::unspecified(reason())).into(),
        8 => ErrorMessage(Reason::unspecified(reason())).into(),
        9 => ArrivalNotice {
            domain_uuid: uuid(input)?.0.into(),
            domain_name: name(input)?,
        }
        .into(),
        10 => AddressClaim {
            migration: number(input, 3)?.into(),
            address: address(input)?,
            mac: mac(input)?.into(),
            quarantine_s: input.arbitrary()?,
            translate: list(input, 2, address)?,
            translate_s: input.arbitrary()?,
        }
        .into(),
        _ => AddressClaimReply {
            address: address(input)?,
            state: *input.choose(&[
                ClaimState::Unique,
                ClaimState::Refused,
                ClaimState::Disputed,
            ])?,
            reason: reason(),
            code: Code(input.arbitrary()?),
        }
        .into(),
    })
}

/// Returns a message of a VM.
pub(super) fn of_vm(input: &mut Unstructured<'_>) -> Result<VmMessage> {
    Ok(match number(input, 4)? {
        0 => AgentSearch {}.into(),
        1 | 2 => MigrationRequest {
            destination: (*input.choose(&PEERS)?).to_owned(),
            domain: input.arbitrary::<bool>()?.then(reason),
        }
        .into(),
        3 => MigrationReady {
            address: Some(address(input)?),
            mac: Some(mac(input)?.into()),
            forward: list(input, 2, address)?,
            forward_s: input.arbitrary()?,
            translate: input.arbitrary()?,
        }
        .into(),
        _ => MigrationAbort(Reason::unspecified(reason())).into(),
    })
}
