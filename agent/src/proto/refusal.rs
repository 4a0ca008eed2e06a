//! Reasons for refusing or ending a migration. Each reason is one sentence that the VM's user, the
//! operator and the other agent read.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{Code, MAX_TEXT_BYTES, Reason};
use common::text::Escaped;
use thiserror::Error;

use super::copy::InTheClear;
use super::policy::{Asker, Share};

/// Scope of an exhausted limit on simultaneous migrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// The limit for one peer is reached.
    Peer,
    /// The limit for all peers together is reached.
    All,
}

impl Whose {
    pub(super) fn limit(self, share: Share) -> usize {
        match self {
            Self::Peer => share.of_peer,
            Self::All => share.of_all,
        }
    }

    /// Returns the words that follow "domains" in the refusal of an arrival.
    fn arriving(self) -> &'static str {
        match self {
            Self::Peer => " from this peer",
            Self::All => "",
        }
    }

    fn departing(self) -> &'static str {
        match self {
            Self::Peer => " to this destination",
            Self::All => "",
        }
    }
}

/// Reason why a migration does not happen. Most variants carry the names that the sentence
/// mentions.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum Refusal {
    #[error(
        "The copy of the VM's memory to {destination} cannot be encrypted: {why}; install QEMU's certificates, or set libvirt.encrypt to \"auto\""
    )]
    InTheClear {
        destination: String,
        why: InTheClear,
    },
    #[error("This VM is domain {domain:?}; it cannot move domain {named:?}")]
    OtherDomain { domain: String, named: String },
    #[error("Agent {agent} has no domain {named:?}")]
    UnknownDomain { agent: String, named: String },
    #[error("Domain {domain} does not run; start it before moving it")]
    NotRunning { domain: String },
    #[error(
        "The name of domain {domain} has characters that cannot be shown, and no agent takes it; rename it with `virsh domrename`"
    )]
    Name { domain: String },
    #[error("Agent {agent} knows no destination {named:?}; name one of its peers ({known})")]
    UnknownDestination {
        agent: String,
        named: String,
        known: String,
    },
    #[error("Domain {domain} is on {agent} already; name another destination")]
    SameHost { domain: String, agent: String },
    #[error(
        "The policy of {agent} does not let domain {domain} move to {destination} by \"{by}\"; a rule [[policy.depart]] has to allow it"
    )]
    Departure {
        agent: String,
        domain: String,
        destination: String,
        by: Asker,
    },
    #[error(
        "Domain {domain} has been moved just now; it may ask for another move in {} s",
        .wait.as_secs() + 1
    )]
    Pause { domain: String, wait: Duration },
    #[error("{asker} is moving domain {domain} instead")]
    Superseded { domain: String, asker: &'static str },
    #[error("Agent {agent} has had too many requests of {peer} within a minute; ask again later")]
    TooOften { agent: String, peer: String },
    #[error(
        "The domain with the UUID {uuid} is {known} on {agent}, not {named:?}; a domain keeps its name in a move"
    )]
    OtherName {
        agent: String,
        uuid: String,
        known: String,
        named: String,
    },
    #[error("Agent {agent} has another domain {domain:?}, with the UUID {uuid}")]
    OtherUuid {
        agent: String,
        domain: String,
        uuid: String,
    },
    #[error("Domain {domain} runs on {agent} already")]
    RunsHere { domain: String, agent: String },
    #[error(
        "Destination {destination} had no place for the domain within {} s; its policy bounds how many arrive at once",
        .waited.as_secs()
    )]
    NoPlace {
        destination: String,
        waited: Duration,
    },
    #[error("Domain {domain} is already being moved to {destination}; wait until that has ended")]
    AlreadyMigrating { domain: String, destination: String },
    #[error(
        "Agent {agent} moves {limit} domains{} already; ask again when one has ended",
        .whose.departing()
    )]
    TooManyOutgoing {
        agent: String,
        limit: usize,
        whose: Whose,
    },
    #[error("Agent {agent} has no connection to its hypervisor; check that libvirtd runs there")]
    NoHypervisor { agent: String },
    #[error("Destination {destination} is down: {reason}")]
    Down { destination: String, reason: String },
    #[error("Destination {destination} did not answer within {} s; check its agent's log", .waited.as_secs())]
    NoAnswer {
        destination: String,
        waited: Duration,
    },
    #[error("Destination {destination} refuses: {reason}")]
    Refused { destination: String, reason: Reason },
    #[error("The VM did not say within {} s that it is ready; run migkick again", .waited.as_secs())]
    NotReady { waited: Duration },
    #[error("Domain {domain} has left {agent} or was shut down before its migration began")]
    DomainGone { domain: String, agent: String },
    #[error("The migration of domain {domain} was cancelled by {by}")]
    Cancelled { domain: String, by: &'static str },
    #[error(
        "The migration of domain {domain} to {destination} failed and it stays on {agent}: {reason}"
    )]
    Hypervisor {
        domain: String,
        destination: String,
        agent: String,
        reason: String,
    },
    #[error("Domain {domain} is not being moved")]
    NothingToAbort { domain: String },
    #[error(
        "Agent {agent} knows of no such migration, perhaps because it was restarted; run migkick again"
    )]
    UnknownTransaction { agent: String },
    #[error(
        "The policy of {agent} does not let domain {domain} come from {peer}; a rule [[policy.arrive]] has to allow it"
    )]
    Arrival {
        agent: String,
        domain: String,
        peer: String,
    },
    #[error(
        "Agent {agent} takes in {limit} domains{} already, and {waiting} more wait; try again when one has arrived",
        .whose.arriving()
    )]
    TooManyIncoming {
        agent: String,
        limit: usize,
        whose: Whose,
        waiting: usize,
    },
    #[error("Domain {domain} already comes to {agent} from {peer}")]
    AlreadyArriving {
        domain: String,
        agent: String,
        peer: String,
    },
    #[error(
        "Agent {agent} knows no agent {source_agent:?}, where domain {domain} runs; add it to [[peers]]"
    )]
    UnknownSource {
        agent: String,
        domain: String,
        source_agent: String,
    },
    #[error(
        "Domain {domain} comes from a host whose agent has not left its name; start the agent there"
    )]
    StaleSource { domain: String },
    #[error(
        "Domain {domain} was not prepared for within {} s; its move goes on, with what is ready by then",
        .waited.as_secs()
    )]
    NotPrepared { domain: String, waited: Duration },
    #[error("Source {source_agent} is down: {reason}")]
    SourceDown {
        source_agent: String,
        reason: String,
    },
    #[error("Source {source_agent} refuses: {reason}")]
    RefusedBySource {
        source_agent: String,
        reason: Reason,
    },
    #[error("The request has a field that is out of range: {field}")]
    BadField { field: &'static str },
    #[error("Domain {domain} is gone from {agent} before it has arrived")]
    GoneBeforeArrival { domain: String, agent: String },
    #[error("Address {address} is taken by {mac}; run migkick again, which chooses another one")]
    AddressTaken { address: Ipv6Addr, mac: String },
    #[error(
        "Address {address} is that of another VM of {agent}; run migkick again, which chooses another one"
    )]
    AddressHeld { address: Ipv6Addr, agent: String },
    #[error(
        "Address {address} was left by another VM of {agent} just now; choose another one, or wait {} s",
        .wait.as_secs() + 1
    )]
    AddressLeft {
        address: Ipv6Addr,
        agent: String,
        wait: Duration,
    },
    #[error("Address {address} is that of {agent} itself; choose another one")]
    AddressOfHost { address: Ipv6Addr, agent: String },
    #[error("Address {address} is no VM's address in the prefix of {agent} ({prefix}/{length})")]
    AddressOffLink {
        address: Ipv6Addr,
        agent: String,
        prefix: Ipv6Addr,
        length: u8,
    },
    #[error("Destination {destination} refuses the VM's address: {reason}")]
    Address { destination: String, reason: Reason },
    #[error("Nothing was heard of domain {domain} for {} s", .waited.as_secs())]
    Unused { domain: String, waited: Duration },
    #[error("The connection to {peer} broke before domain {domain} began to come")]
    LostPeer { peer: String, domain: String },
}

impl Refusal {
    /// Returns the reason as a message carries it: the code for programs, and the sentence as
    /// [`bounded`] makes it.
    pub(super) fn reason(&self) -> Reason {
        bounded_reason(&self.whole_reason())
    }

    /// Returns the reason with the whole sentence, for records and operators.
    pub(super) fn whole_reason(&self) -> Reason {
        Reason::new(self.code(), self.to_string())
    }

    fn code(&self) -> Code {
        match self {
            Self::InTheClear { .. } => Code::NOT_ENCRYPTED,
            Self::OtherDomain { .. }
            | Self::UnknownDomain { .. }
            | Self::Name { .. }
            | Self::OtherName { .. }
            | Self::OtherUuid { .. } => Code::UNKNOWN_DOMAIN,
            Self::NotRunning { .. }
            | Self::RunsHere { .. }
            | Self::DomainGone { .. }
            | Self::NothingToAbort { .. }
            | Self::GoneBeforeArrival { .. } => Code::DOMAIN_STATE,
            Self::UnknownDestination { .. }
            | Self::SameHost { .. }
            | Self::UnknownSource { .. }
            | Self::StaleSource { .. } => Code::UNKNOWN_HOST,
            Self::Departure { .. } | Self::Arrival { .. } => Code::NOT_PERMITTED,
            Self::Pause { .. } | Self::TooOften { .. } => Code::TOO_OFTEN,
            Self::Superseded { .. }
            | Self::AlreadyMigrating { .. }
            | Self::AlreadyArriving { .. } => Code::OTHER_MIGRATION,
            Self::NoPlace { .. } | Self::TooManyOutgoing { .. } | Self::TooManyIncoming { .. } => {
                Code::LIMIT
            }
            Self::NoHypervisor { .. }
            | Self::Down { .. }
            | Self::SourceDown { .. }
            | Self::LostPeer { .. } => Code::UNREACHABLE,
            Self::NoAnswer { .. }
            | Self::NotReady { .. }
            | Self::NotPrepared { .. }
            | Self::Unused { .. } => Code::TIMED_OUT,
            Self::Cancelled { .. } => Code::CANCELLED,
            Self::Hypervisor { .. } => Code::HYPERVISOR,
            Self::UnknownTransaction { .. } => Code::UNKNOWN_TRANSACTION,
            Self::BadField { .. } => Code::MALFORMED,
            Self::AddressTaken { .. }
            | Self::AddressHeld { .. }
            | Self::AddressLeft { .. }
            | Self::AddressOfHost { .. } => Code::ADDRESS_TAKEN,
            Self::AddressOffLink { .. } => Code::ADDRESS_OFF_LINK,
            Self::Refused { reason, .. }
            | Self::RefusedBySource { reason, .. }
            | Self::Address { reason, .. } => reason.code,
        }
    }
}

/// Returns a reason that fits into a message: the sentence passes through [`bounded`].
pub(super) fn bounded_reason(reason: &Reason) -> Reason {
    Reason::new(reason.code, bounded(&reason.text))
}

/// Cuts a text to [`MAX_TEXT_BYTES`] and escapes unprintable characters, which errors of other
/// programs may contain.
pub(super) fn bounded(text: &str) -> String {
    let text = Escaped(text).to_string();
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use common::text::is_plain_text;

    use super::*;

    #[test]
    fn text_is_cut_between_characters() {
        let text = "ä".repeat(MAX_TEXT_BYTES);
        let cut = bounded(&text);
        assert_eq!(cut.len(), MAX_TEXT_BYTES - 1);
        assert!(text.starts_with(&cut));
    }

    #[test]
    fn error_of_several_lines_becomes_one() {
        let text = bounded("internal error:\n\tQEMU ended");
        assert_eq!(text, r"internal error:\n\tQEMU ended");
        assert!(is_plain_text(&text));
    }
}
