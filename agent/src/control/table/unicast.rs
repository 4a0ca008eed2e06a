//! Unicast addresses in `roamcast migrations`.

use crate::control::report::UnicastRow;

/// Renders the claim on the new address and the packets forwarded for the old ones, including
/// packets that the VM had not read at the stop: `spoken, 12 forwarded`.
pub(super) fn cell(row: Option<&UnicastRow>) -> String {
    let Some(row) = row else {
        return "-".to_owned();
    };
    let mut parts = vec![row.claim.as_str().to_owned()];
    let later: u64 = row.forwards.iter().map(|it| it.packets).sum();
    let packets = row.unread.packets + later;
    let translated: u64 = row.translations.iter().map(|it| it.packets).sum();
    let forwards = row.forwards.iter().map(|it| it.dropped);
    let translations = row.translations.iter().map(|it| it.dropped);
    let dropped = row.unread.dropped + forwards.chain(translations).sum::<u64>();
    if !row.forwards.is_empty() {
        parts.push(format!("{packets} forwarded"));
    }
    if !row.translations.is_empty() {
        parts.push(format!("{translated} translated"));
    }
    if dropped > 0 {
        parts.push(format!("{dropped} dropped"));
    }
    parts.join(", ")
}
