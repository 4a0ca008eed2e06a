//! The temporary entries of a bridge's multicast database, with their remaining time.
//!
//! ```text
//! RTM_GETMDB, answered by messages for each bridge:
//!   struct br_port_msg             { u8 family, pad[3], u32 ifindex of the bridge }
//!   MDBA_MDB (1), nested
//!     MDBA_MDB_ENTRY (1), nested, one for each address
//!       MDBA_MDB_ENTRY_INFO (1)    struct br_mdb_entry, then the attributes
//!         MDBA_MDB_EATTR_TIMER (1)        u32, hundredths of a second
//!         MDBA_MDB_EATTR_GROUP_MODE (3)   u8: 0 EXCLUDE, 1 INCLUDE
//!         MDBA_MDB_EATTR_SOURCE (4)       16 bytes, of an entry for one source
//! ```

use std::collections::HashMap;
use std::time::Duration;

use common::maps::{BridgeNumber, ManagedKey};
use linux::netlink::bytes::{HEADER_BYTES, Message, RequestBytes, values};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};

use super::{ETH_P_IPV6, MDB_TEMPORARY};

const RTM_GETMDB: u16 = 86;
/// `struct br_port_msg`, bytes.
const PORT_MESSAGE_BYTES: usize = 8;
/// `struct br_mdb_entry`, bytes.
const ENTRY_BYTES: usize = 28;
const MDBA_MDB: u16 = 1;
const MDBA_MDB_ENTRY: u16 = 1;
const MDBA_MDB_ENTRY_INFO: u16 = 1;
const EATTR_TIMER: u16 = 1;
const EATTR_GROUP_MODE: u16 = 3;
const EATTR_SOURCE: u16 = 4;
const EXCLUDE: u8 = 0;

/// Builds the dump request for the entries of all bridges.
pub(super) fn dump() -> Vec<u8> {
    let mut request = RequestBytes::new(RTM_GETMDB, NLM_F_REQUEST | NLM_F_DUMP);
    request.push(&[libc::AF_BRIDGE as u8, 0, 0, 0]);
    request.push(&[0; 4]);
    request.finish()
}

/// Reads one message of the answer, for the bridge with an ifindex and a number. Skips entries of
/// mode INCLUDE: these last as long as their sources, and a VM has reported them.
pub(super) fn read(
    message: &Message<'_>,
    bridge: u32,
    number: BridgeNumber,
    left: &mut HashMap<(u32, ManagedKey), Duration>,
) {
    let Some((head, attributes)) = message
        .bytes
        .get(HEADER_BYTES..)
        .and_then(|bytes| bytes.split_at_checked(PORT_MESSAGE_BYTES))
    else {
        return;
    };
    if head.get(4..) != Some(&bridge.to_ne_bytes()) {
        return;
    }
    let infos = values(attributes, MDBA_MDB)
        .flat_map(|database| values(database, MDBA_MDB_ENTRY))
        .flat_map(|of_address| values(of_address, MDBA_MDB_ENTRY_INFO));
    left.extend(infos.filter_map(|info| entry(info, number)));
}

fn entry(info: &[u8], number: BridgeNumber) -> Option<((u32, ManagedKey), Duration)> {
    let (entry, attributes) = info.split_at_checked(ENTRY_BYTES)?;
    let ifindex = u32::from_ne_bytes(*entry.first_chunk()?);
    let vlan = u16::from_ne_bytes(*entry.get(6..)?.first_chunk()?);
    let multicast_address = *entry.get(8..)?.first_chunk()?;
    if entry.get(4) != Some(&MDB_TEMPORARY) || entry.get(24..26) != Some(&ETH_P_IPV6.to_be_bytes())
    {
        return None;
    }
    let timer = values(attributes, EATTR_TIMER).next()?;
    let hundredths = u32::from_ne_bytes(*timer.first_chunk()?);
    let mut modes = values(attributes, EATTR_GROUP_MODE);
    let is_for_any_source = modes.all(|mode| mode.first() == Some(&EXCLUDE))
        && values(attributes, EATTR_SOURCE).next().is_none();
    let key = ManagedKey {
        vlan,
        bridge: number,
        multicast_address,
    };
    let left = Duration::from_millis(u64::from(hundredths) * 10);
    is_for_any_source.then_some(((ifindex, key), left))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use linux::netlink::bytes::messages;

    const BRIDGE: u32 = 9;
    const NUMBER: BridgeNumber = BridgeNumber(2);
    const KEY: ManagedKey = ManagedKey {
        vlan: 7,
        bridge: NUMBER,
        multicast_address: [0xff; 16],
    };

    /// An answer with one entry of port 3.
    fn answer(bridge: u32, state: u8, attributes: impl FnOnce(&mut RequestBytes)) -> Vec<u8> {
        let mut entry = super::super::entry(3, &KEY);
        entry[4] = state;
        let mut answer = RequestBytes::new(84, 0);
        answer.push(&[libc::AF_BRIDGE as u8, 0, 0, 0]);
        answer.push(&bridge.to_ne_bytes());
        answer.nest(MDBA_MDB, |answer| {
            answer.nest(MDBA_MDB_ENTRY, |answer| {
                answer.nest(MDBA_MDB_ENTRY_INFO, |answer| {
                    answer.push(&entry);
                    attributes(answer);
                });
            });
        });
        answer.finish()
    }

    fn found(answer: &[u8]) -> Vec<((u32, ManagedKey), Duration)> {
        let mut left = HashMap::new();
        for message in messages(answer) {
            read(&message, BRIDGE, NUMBER, &mut left);
        }
        left.into_iter().collect()
    }

    #[test]
    fn temporary_entry_for_any_source_is_found_with_the_time_it_has_left() {
        let timer = |answer: &mut RequestBytes| {
            answer.attribute(EATTR_TIMER, &25_970_u32.to_ne_bytes());
        };
        let expected = [((3, KEY), Duration::from_millis(259_700))];
        assert_eq!(found(&answer(BRIDGE, 0, timer)), expected);
        let exclude = |answer: &mut RequestBytes| {
            timer(answer);
            answer.attribute(EATTR_GROUP_MODE, &[EXCLUDE]);
        };
        assert_eq!(found(&answer(BRIDGE, 0, exclude)), expected);
        assert_eq!(found(&answer(BRIDGE, 1, timer)), [], "permanent");
        assert_eq!(found(&answer(8, 0, timer)), [], "of another bridge");
        let include = |answer: &mut RequestBytes| {
            timer(answer);
            answer.attribute(EATTR_GROUP_MODE, &[1]);
        };
        assert_eq!(found(&answer(BRIDGE, 0, include)), []);
        let source = |answer: &mut RequestBytes| {
            timer(answer);
            answer.attribute(EATTR_SOURCE, &[1; 16]);
        };
        assert_eq!(found(&answer(BRIDGE, 0, source)), []);
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            found(&bytes);
        }
    }
}
