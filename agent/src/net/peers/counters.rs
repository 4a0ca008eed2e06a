//! Named reasons behind every refused connection.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! refusals {
    ($($(#[$doc:meta])* $variant:ident => $name:literal),* $(,)?) => {
        /// Why a connection was refused or cut.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Refusal {
            $($(#[$doc])* $variant),*
        }

        impl Refusal {
            const ALL: &[Self] = &[$(Self::$variant),*];

            /// Name of its counter.
            pub(super) fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),*
                }
            }
        }
    };
}

refusals! {
    /// No certificate was presented.
    NoCertificate => "no_certificate",
    /// The certificate is expired or not yet valid.
    Expired => "certificate_expired",
    /// The certificate was revoked.
    Revoked => "certificate_revoked",
    /// The certificate is not of our CA, or broken.
    BadCertificate => "bad_certificate",
    /// The certificate names no role, several, or one that is not known.
    NoRole => "no_role",
    /// The certificate is of a role that this connection is not for.
    WrongRole => "wrong_role",
    /// It sent a message that is not for its role to send.
    ForbiddenMessage => "forbidden_message",
    /// The other side refused our certificate.
    RefusedByPeer => "refused_by_peer",
    /// Neither in the configuration nor admitted by a pattern.
    NotAdmitted => "not_admitted",
    /// It claims to be this agent.
    OwnName => "own_name",
    /// Another version of TLS.
    TlsVersion => "tls_version",
    /// Not TLS at all.
    NotTls => "not_tls",
    /// The handshake took too long.
    HandshakeTimeout => "handshake_timeout",
    /// It hung up during the handshake.
    HungUp => "hung_up",
    /// Too many connections were in their handshake.
    TooMany => "too_many_handshakes",
    /// The source address failed too often and has to wait.
    BackedOff => "backed_off",
    /// A frame was too long.
    OversizedFrame => "oversized_frame",
    /// The first frame was no message.
    MalformedFrame => "malformed_frame",
    /// It did not read what was sent to it.
    NotReading => "not_reading",
}

/// Counters of [`super::Peers`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Connections that peers dialed and that were accepted.
    pub(super) accepted: AtomicU64,
    /// Connections dialed and accepted by the peer.
    pub(super) dialed: AtomicU64,
    /// Connections that were up and no longer are.
    pub(super) lost: AtomicU64,
    /// Certificates that were replaced.
    pub(super) reloaded: AtomicU64,
    /// Those that should have been, by some that cannot be used.
    pub(super) unusable: AtomicU64,
    refused: [AtomicU64; Refusal::ALL.len()],
}

impl Counters {
    pub(super) fn add(&self, refusal: Refusal) {
        if let Some(counter) = self.refused.get(refusal as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn read(&self) -> Vec<(&'static str, u64)> {
        [
            ("accepted", &self.accepted),
            ("dialed", &self.dialed),
            ("lost", &self.lost),
            ("certificates_replaced", &self.reloaded),
            ("certificates_unusable", &self.unusable),
        ]
        .into_iter()
        .chain(
            Refusal::ALL
                .iter()
                .map(|refusal| refusal.as_str())
                .zip(&self.refused),
        )
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .collect()
    }
}
