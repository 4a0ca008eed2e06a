//! Counters of the connections, and the named reasons of refusals.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! refusals {
    ($($(#[$doc:meta])* $variant:ident => $name:literal),* $(,)?) => {
        /// Reason for which a connection was refused or closed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Refusal {
            $($(#[$doc])* $variant),*
        }

        impl Refusal {
            const ALL: &[Self] = &[$(Self::$variant),*];

            /// Returns the name of the counter.
            pub(super) fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),*
                }
            }
        }
    };
}

refusals! {
    /// The peer presented no certificate.
    NoCertificate => "no_certificate",
    /// The certificate is expired or not yet valid.
    Expired => "certificate_expired",
    /// The certificate was revoked.
    Revoked => "certificate_revoked",
    /// The certificate is not issued by our CA, or is malformed.
    BadCertificate => "bad_certificate",
    /// The certificate names no role, several roles, or an unknown role.
    NoRole => "no_role",
    /// The certificate's role does not belong on this connection.
    WrongRole => "wrong_role",
    /// The peer sent a message type that its role may not send.
    ForbiddenMessage => "forbidden_message",
    /// The peer refused our certificate.
    RefusedByPeer => "refused_by_peer",
    /// The name is neither configured nor admitted by a pattern.
    NotAdmitted => "not_admitted",
    /// The certificate contains this agent's own name.
    OwnName => "own_name",
    /// The peer offered no TLS 1.3.
    TlsVersion => "tls_version",
    /// The first bytes are not TLS.
    NotTls => "not_tls",
    /// The handshake exceeded its time limit.
    HandshakeTimeout => "handshake_timeout",
    /// The peer closed the connection during the handshake.
    HungUp => "hung_up",
    /// No place was left for another unauthenticated connection.
    TooMany => "too_many_handshakes",
    /// The source address is in backoff after repeated failures.
    BackedOff => "backed_off",
    /// A frame exceeded the longest length.
    OversizedFrame => "oversized_frame",
    /// The first frame is not a message.
    MalformedFrame => "malformed_frame",
    /// The send queue overflowed because the peer does not read.
    NotReading => "not_reading",
}

/// Counters of [`super::Peers`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Connections that peers dialed and that were accepted.
    pub(super) accepted: AtomicU64,
    /// Connections that this agent dialed and the peer accepted.
    pub(super) dialed: AtomicU64,
    /// Connections that were up and have ended.
    pub(super) lost: AtomicU64,
    /// Certificates replaced by a reload.
    pub(super) reloaded: AtomicU64,
    /// Reloads that failed because the new files are unusable.
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
