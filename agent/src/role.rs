//! Roles in the signalling (agent, relay, migration control server), and the messages that each
//! role may send.
//!
//! A certificate names its role by a URI in the Subject Alternative Name (RFC 5280 §4.2.1.6),
//! beside DNS names and addresses:
//!
//! ```text
//! $ openssl x509 -in cert.pem -noout -ext subjectAltName
//! X509v3 Subject Alternative Name:
//!     DNS:vms1, IP Address:2001:DB8:1:0:0:0:0:10, URI:urn:roamcast:role:agent
//! ```
//!
//! Every tool shows such a URI and every CA can write one, without a registered object identifier.
//! Alternatives: an organizational unit would depend on the CA, which sets the subject by its own
//! rules, and nothing else reads the subject; an extended key usage needs an object identifier.
//!
//! A certificate has exactly one role, in lower case. A certificate with another number of roles,
//! another spelling or an unknown role has no role, and agents, relays and servers refuse it.

use std::fmt;

use clap::ValueEnum;
use common::signal::{self, DirectoryMessage, PeerMessage};
use rustls_pki_types::CertificateDer;

/// Prefix of a URI that names a role.
const PREFIX: &str = "urn:roamcast:role:";
/// Most characters of an unknown role that an error shows.
const SHOWN: usize = 32;

/// Role in the signalling, as in the certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Role {
    /// The agent of a VM host.
    Agent,
    /// A relay, which sends streams to agents by unicast.
    Relay,
    /// A migration control server, with which agents and relays register.
    Mcs,
}

/// Why a certificate has no role.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoleError {
    /// The certificate names no role.
    #[error("names no role, as those made before there were roles")]
    Missing,
    /// The certificate names several roles.
    #[error("names more than one role")]
    Several,
    /// The certificate names an unknown role.
    #[error("names the role {0:?}, which is none of agent, relay and mcs")]
    Unknown(String),
}

/// A message that its sender's role may not send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forbidden {
    /// Name of the message.
    pub message: &'static str,
}

/// Sender and receiver of a message.
type Route = (Role, Role);

const AGENTS: &[Route] = &[(Role::Agent, Role::Agent)];
const TO_RELAY: &[Route] = &[(Role::Agent, Role::Relay)];
const FROM_RELAY: &[Route] = &[(Role::Relay, Role::Agent)];
const TO_MCS: &[Route] = &[(Role::Agent, Role::Mcs), (Role::Relay, Role::Mcs)];
const FROM_MCS: &[Route] = &[(Role::Mcs, Role::Agent), (Role::Mcs, Role::Relay)];

/// Allowed routes of each message, by the message's number. This version does not know other
/// numbers; the protocol answers their sender.
const MESSAGES: &[(u16, &[&[Route]])] = &[
    (5, &[AGENTS]),
    (6, &[AGENTS]),
    (7, &[TO_RELAY]),
    (8, &[FROM_RELAY]),
    (10, &[AGENTS]),
    (11, &[AGENTS]),
    (12, &[AGENTS]),
    (13, &[TO_RELAY, FROM_RELAY]),
    (14, &[AGENTS, TO_RELAY, FROM_RELAY, TO_MCS, FROM_MCS]),
    (REGISTER, &[TO_MCS]),
    (16, &[FROM_MCS]),
    (17, &[&[(Role::Agent, Role::Mcs)]]),
    (18, &[&[(Role::Mcs, Role::Agent)]]),
    (19, &[AGENTS]),
    (20, &[AGENTS]),
    (21, &[AGENTS]),
];
/// Number of `Register`, which names the role of its sender.
const REGISTER: u16 = 15;

impl Role {
    /// All roles.
    pub const ALL: [Self; 3] = [Self::Agent, Self::Relay, Self::Mcs];

    /// Returns the name in certificates and options.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Relay => "relay",
            Self::Mcs => "mcs",
        }
    }

    /// Returns the name for the beginning of a sentence.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Agent => "Agent",
            Self::Relay => "Relay",
            Self::Mcs => "Migration control server",
        }
    }

    /// Returns the URI for the Subject Alternative Name of a certificate.
    pub fn uri(self) -> String {
        format!("{PREFIX}{}", self.as_str())
    }

    /// Returns the roles whose connections this role accepts.
    pub const fn admitted(self) -> &'static [Self] {
        match self {
            Self::Agent | Self::Relay => &[Self::Agent],
            Self::Mcs => &[Self::Agent, Self::Relay],
        }
    }

    /// Returns the role that a certificate names.
    ///
    /// # Errors
    ///
    /// See [`RoleError`].
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, RoleError> {
        match webpki::EndEntityCert::try_from(certificate) {
            Ok(certificate) => Self::of_uris(certificate.valid_uri_names()),
            Err(_) => Err(RoleError::Missing),
        }
    }

    /// Returns the single role among the URIs of a certificate.
    fn of_uris<'a>(uris: impl Iterator<Item = &'a str>) -> Result<Self, RoleError> {
        let mut named = uris.filter_map(|uri| {
            // RFC 8141: `urn` and the namespace identifier compare without case.
            let (prefix, role) = uri.split_at_checked(PREFIX.len())?;
            prefix
                .eq_ignore_ascii_case(PREFIX)
                .then_some((prefix, role))
        });
        let (prefix, role) = named.next().ok_or(RoleError::Missing)?;
        if named.next().is_some() {
            return Err(RoleError::Several);
        }
        Self::ALL
            .into_iter()
            .find(|known| prefix == PREFIX && known.as_str() == role)
            .ok_or_else(|| RoleError::Unknown(role.chars().take(SHOWN).collect()))
    }

    /// Checks that this role may send a frame to the role `to`.
    ///
    /// # Errors
    ///
    /// The message in the frame, if its route is not allowed.
    pub fn may_send(self, to: Self, frame: &[u8]) -> Result<(), Forbidden> {
        let Some(kind) = signal::kind(frame) else {
            return Ok(());
        };
        let Some((_, routes)) = MESSAGES.iter().find(|(number, _)| *number == kind) else {
            return Ok(());
        };
        let may = routes.iter().any(|routes| routes.contains(&(self, to)));
        if may && (kind != REGISTER || self.is_registered_by(frame)) {
            return Ok(());
        }
        let message = PeerMessage::KINDS
            .iter()
            .chain(DirectoryMessage::KINDS)
            .find(|(number, _)| *number == kind)
            .map_or("?", |(_, name)| name);
        Err(Forbidden { message })
    }

    /// Returns true if a `Register` names this role, or does not decode: the protocol then answers
    /// it.
    fn is_registered_by(self, frame: &[u8]) -> bool {
        match DirectoryMessage::decode(frame) {
            Ok((_, DirectoryMessage::Register(body))) => match body.role {
                signal::Role::Agent => self == Self::Agent,
                signal::Role::Relay => self == Self::Relay,
            },
            _ => true,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use common::signal::{ErrorMessage, Register, RelayRelease};

    use super::*;

    fn of(uris: &[&str]) -> Result<Role, RoleError> {
        Role::of_uris(uris.iter().copied())
    }

    #[test]
    fn role_is_read_as_it_was_written_among_other_uris() {
        for role in Role::ALL {
            let uri = role.uri();
            let uris = ["spiffe://example/vms1", uri.as_str(), "urn:roamcast:rol"];
            assert_eq!(of(&uris), Ok(role));
            assert_eq!(Role::from_str(role.as_str(), false), Ok(role));
        }
    }

    #[test]
    fn anything_but_one_known_role_in_lower_case_is_none() {
        assert_eq!(of(&[]), Err(RoleError::Missing));
        assert_eq!(
            of(&["", "urn:roamcast:role", "urn:\u{e9}"]),
            Err(RoleError::Missing)
        );
        for two in [
            ["urn:roamcast:role:agent", "urn:roamcast:role:relay"],
            ["urn:roamcast:role:agent", "urn:roamcast:role:agent"],
            ["urn:roamcast:role:agent", "urn:roamcast:role:root"],
            ["urn:roamcast:role:agent", "URN:Roamcast:role:"],
        ] {
            assert_eq!(of(&two), Err(RoleError::Several), "{two:?}");
        }
        for unknown in [
            "urn:roamcast:role:",
            "urn:roamcast:role:root",
            "urn:roamcast:role:Agent",
            "URN:ROAMCAST:ROLE:AGENT",
            "URN:roamcast:role:agent",
            "urn:roamcast:role:agent ",
            "urn:roamcast:role:agent\0",
            "urn:roamcast:role:agents",
            "urn:roamcast:role:agent,relay",
            "urn:roamcast:role:agent#relay",
        ] {
            let found = of(&[unknown]);
            assert!(matches!(found, Err(RoleError::Unknown(_))), "{unknown}");
        }
    }

    #[test]
    fn unknown_role_is_shown_short_and_on_one_line() {
        let uri = format!("{PREFIX}\n{}", "\u{e9}".repeat(10_000));
        let shown = of(&[&uri]).unwrap_err().to_string();
        assert!(shown.len() < 200 && !shown.contains('\n'), "{shown}");
    }

    #[test]
    fn certificate_that_is_none_has_no_role() {
        for bytes in [&[][..], &[0x30, 0x80], &[0xff; 300]] {
            let certificate = CertificateDer::from(bytes);
            assert_eq!(Role::of_certificate(&certificate), Err(RoleError::Missing));
        }
    }

    #[test]
    fn every_message_has_its_senders() {
        for (kind, name) in PeerMessage::KINDS.iter().chain(DirectoryMessage::KINDS) {
            let routes = MESSAGES.iter().filter(|(number, _)| number == kind);
            assert_eq!(routes.count(), 1, "{name}");
        }
    }

    #[test]
    fn nobody_sends_what_is_for_another_role() {
        let release = PeerMessage::from(RelayRelease(common::signal::Reason::default())).encode(1);
        assert_eq!(Role::Relay.may_send(Role::Agent, &release), Ok(()));
        assert_eq!(Role::Agent.may_send(Role::Relay, &release), Ok(()));
        let message = "RelayRelease";
        for (from, to) in [(Role::Agent, Role::Agent), (Role::Mcs, Role::Agent)] {
            assert_eq!(from.may_send(to, &release), Err(Forbidden { message }));
        }
        let error = PeerMessage::from(ErrorMessage(common::signal::Reason::default())).encode(1);
        for to in Role::ALL {
            for &from in to.admitted() {
                assert_eq!(from.may_send(to, &error), Ok(()), "{from} {to}");
                assert_eq!(to.may_send(from, &error), Ok(()), "{to} {from}");
            }
        }
        assert!(Role::Relay.may_send(Role::Relay, &error).is_err());
    }

    #[test]
    fn nobody_registers_as_what_the_certificate_does_not_say() {
        let register = |role| {
            let body = Register {
                role,
                address: [1; 16].into(),
                site: String::new(),
                serves: Vec::new(),
            };
            DirectoryMessage::from(body).encode(1)
        };
        let [agent, relay] = [signal::Role::Agent, signal::Role::Relay].map(register);
        assert_eq!(Role::Agent.may_send(Role::Mcs, &agent), Ok(()));
        assert_eq!(Role::Relay.may_send(Role::Mcs, &relay), Ok(()));
        assert!(Role::Agent.may_send(Role::Mcs, &relay).is_err());
        assert!(Role::Relay.may_send(Role::Mcs, &agent).is_err());
        assert!(Role::Mcs.may_send(Role::Mcs, &agent).is_err());
    }

    #[test]
    fn what_is_no_message_of_this_version_is_left_to_the_protocol() {
        for frame in [&[][..], b"junk", &signal_of(999)] {
            assert_eq!(Role::Mcs.may_send(Role::Agent, frame), Ok(()));
        }
    }

    /// Returns a frame with a message of that number.
    fn signal_of(kind: u16) -> Vec<u8> {
        let [high, low] = kind.to_be_bytes();
        vec![0x84, 1, 1, 0x19, high, low, 0x80]
    }
}
