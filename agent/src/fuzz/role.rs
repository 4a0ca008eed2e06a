//! What is looked at before the protocol reads anything: who somebody is, and what may come from there.

use common::signal::{DirectoryMessage, PeerMessage};
use rustls_pki_types::CertificateDer;

use crate::role::Role;

/// A certificate, or a frame.
pub(super) fn role(bytes: &[u8]) {
    if let Ok(role) = Role::of_certificate(&CertificateDer::from(bytes)) {
        let uri = role.uri();
        let mut words = bytes.windows(uri.len());
        assert!(
            words.any(|word| word == uri.as_bytes()),
            "{role} by nothing"
        );
    }
    let is_known = PeerMessage::decode(bytes).is_ok() || DirectoryMessage::decode(bytes).is_ok();
    for (from, to) in Role::ALL
        .iter()
        .flat_map(|from| Role::ALL.map(|to| (*from, to)))
    {
        let connects = to.admitted().contains(&from) || from.admitted().contains(&to);
        let may = from.may_send(to, bytes).is_ok();
        assert!(connects || !may || !is_known, "{from} sends to {to}");
    }
}
