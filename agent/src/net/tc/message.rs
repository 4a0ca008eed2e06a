//! Netlink messages of traffic control: encoding of requests, decoding of answers.
//!
//! Requests use the types of netlink-packet-route. Answers are parsed attribute by attribute,
//! because the agent must also see a filter whose options the crate cannot parse.

use linux::netlink::bytes::{HEADER_BYTES, Message};
use netlink_packet_core::{DefaultNla, NLA_F_NESTED, NlaBuffer, NlasIterator, Parseable};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage,
    TcOption,
};

use super::{BpfFilter, Filter, FilterProgram, NewQdisc, Parent, Qdisc};

pub(super) const RTM_NEWQDISC: u16 = 36;
pub(super) const RTM_DELQDISC: u16 = 37;
pub(super) const RTM_NEWTFILTER: u16 = 44;
pub(super) const RTM_DELTFILTER: u16 = 45;

/// Length of `struct tcmsg`, bytes.
const TC_HEADER_BYTES: usize = 20;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
/// `ETH_P_ALL` in network byte order, as in `tcm_info`.
const ALL_PROTOCOLS: u32 = 0x0003_u16.to_be() as u32;

const TCA_HTB_INIT: u16 = 2;
const TCA_HTB_DIRECT_QLEN: u16 = 5;
/// `struct tc_htb_glob`: version 3, `rate2quantum` 10, default class 0 (none), no debugging, no
/// count.
const HTB_INIT: [u32; 5] = [3, 10, 0, 0, 0];

fn header(ifindex: u32, parent: u32, handle: u32) -> TcHeader {
    TcHeader {
        index: ifindex.cast_signed(),
        parent: TcHandle::from(parent),
        handle: TcHandle::from(handle),
        ..TcHeader::default()
    }
}

/// Builds the dump request for the qdiscs of all interfaces.
pub(super) fn dump_qdiscs() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default())
}

/// Builds the request that creates a qdisc.
pub(super) fn new_qdisc(ifindex: u32, qdisc: NewQdisc) -> RouteNetlinkMessage {
    let mut attributes = vec![TcAttribute::Kind(qdisc.kind().to_owned())];
    if let NewQdisc::Htb { queue, .. } = qdisc {
        let init = HTB_INIT.iter().flat_map(|word| word.to_ne_bytes());
        attributes.push(TcAttribute::Options(vec![
            TcOption::Other(DefaultNla::new(TCA_HTB_INIT, init.collect())),
            TcOption::Other(DefaultNla::new(
                TCA_HTB_DIRECT_QLEN,
                queue.to_ne_bytes().to_vec(),
            )),
        ]));
    }
    let header = header(ifindex, qdisc.parent(), qdisc.handle());
    RouteNetlinkMessage::NewQueueDiscipline(TcMessage::from_parts(header, attributes))
}

/// Builds the request that deletes a qdisc; the kernel refuses it if kind or handle differ.
pub(super) fn delete_qdisc(qdisc: &Qdisc) -> RouteNetlinkMessage {
    let attributes = vec![TcAttribute::Kind(qdisc.kind.clone())];
    RouteNetlinkMessage::DelQueueDiscipline(TcMessage::from_parts(
        header(qdisc.ifindex, qdisc.parent, qdisc.handle),
        attributes,
    ))
}

/// Builds the dump request for the filters of one list.
pub(super) fn dump_filters(ifindex: u32, parent: Parent) -> RouteNetlinkMessage {
    let header = header(ifindex, parent.handle(), 0);
    RouteNetlinkMessage::GetTrafficFilter(TcMessage::from_parts(header, Vec::new()))
}

/// Builds the request that creates a bpf filter, or replaces the program of the filter with this
/// preference and handle.
pub(super) fn set_filter(
    ifindex: u32,
    parent: Parent,
    filter: &BpfFilter<'_>,
) -> RouteNetlinkMessage {
    let mut header = header(ifindex, parent.handle(), filter.handle);
    header.info = info(filter.preference);
    let attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(vec![
            TcOption::Bpf(TcFilterBpfOption::ProgFd(filter.program.cast_unsigned())),
            TcOption::Bpf(TcFilterBpfOption::ProgName(filter.name.to_owned())),
            TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
        ]),
    ];
    RouteNetlinkMessage::NewTrafficFilter(TcMessage::from_parts(header, attributes))
}

/// Builds the request that deletes one filter.
pub(super) fn delete_filter(ifindex: u32, filter: &Filter) -> RouteNetlinkMessage {
    let mut header = header(ifindex, filter.parent, filter.handle);
    header.info = u32::from(filter.preference) << 16 | u32::from(filter.protocol.to_be());
    let attributes = vec![
        TcAttribute::Kind(filter.kind.clone()),
        TcAttribute::Chain(filter.chain),
    ];
    RouteNetlinkMessage::DelTrafficFilter(TcMessage::from_parts(header, attributes))
}

fn info(preference: u16) -> u32 {
    u32::from(preference) << 16 | ALL_PROTOCOLS
}

/// The interface of a traffic control notice.
pub(super) fn ifindex(message: &Message<'_>) -> Option<u32> {
    let is_one = matches!(
        message.kind,
        RTM_NEWQDISC | RTM_DELQDISC | RTM_NEWTFILTER | RTM_DELTFILTER
    );
    is_one
        .then(|| parts(message))?
        .map(|(header, _)| header.index.cast_unsigned())
}

/// Decodes a qdisc.
pub(super) fn qdisc(message: &Message<'_>) -> Option<Qdisc> {
    if message.kind != RTM_NEWQDISC {
        return None;
    }
    let (header, attributes) = parts(message)?;
    Some(Qdisc {
        ifindex: header.index.cast_unsigned(),
        kind: kind(attributes)?,
        handle: header.handle.into(),
        parent: header.parent.into(),
    })
}

/// Decodes a filter. Skips the entry with handle 0 that precedes the filters and stands for a whole
/// preference.
pub(super) fn filter(message: &Message<'_>) -> Option<Filter> {
    const TCA_CHAIN: u16 = 11;
    if message.kind != RTM_NEWTFILTER {
        return None;
    }
    let (header, attributes) = parts(message)?;
    let handle: u32 = header.handle.into();
    if handle == 0 {
        return None;
    }
    let kind = kind(attributes)?;
    let program = (kind == TcFilterBpf::KIND)
        .then(|| program(&value(attributes, TCA_OPTIONS).unwrap_or_default()));
    let [a, b, ..] = header.info.to_ne_bytes();
    Some(Filter {
        ifindex: header.index.cast_unsigned(),
        parent: header.parent.into(),
        preference: u16::try_from(header.info >> 16).unwrap_or(0),
        protocol: u16::from_be_bytes([a, b]),
        handle,
        chain: value(attributes, TCA_CHAIN)
            .and_then(|bytes| Some(u32::from_ne_bytes(bytes.try_into().ok()?)))
            .unwrap_or(0),
        kind,
        program,
    })
}

fn parts<'a>(message: &Message<'a>) -> Option<(TcHeader, &'a [u8])> {
    let body = message.bytes.get(HEADER_BYTES..)?;
    Some((TcHeader::parse(body).ok()?, body.get(TC_HEADER_BYTES..)?))
}

fn value(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    let mut found = NlasIterator::new(attributes).flatten();
    found
        .find(|nla: &NlaBuffer<&[u8]>| nla.kind() & !NLA_F_NESTED == kind)
        .map(|nla| nla.value().to_vec())
}

fn kind(attributes: &[u8]) -> Option<String> {
    let value = value(attributes, TCA_KIND)?;
    Some(
        String::from_utf8_lossy(&value)
            .trim_end_matches('\0')
            .to_owned(),
    )
}

fn program(options: &[u8]) -> FilterProgram {
    let mut program = FilterProgram::default();
    for nla in NlasIterator::new(options).flatten() {
        match TcFilterBpfOption::parse(&nla) {
            Ok(TcFilterBpfOption::ProgName(name)) => program.name = name,
            Ok(TcFilterBpfOption::ProgId(id)) => program.id = Some(id),
            _ => {}
        }
    }
    program
}

#[cfg(test)]
mod tests {
    use linux::netlink::bytes::{RequestBytes, messages};
    use linux::netlink::serialized;
    use proptest::prelude::*;

    use super::*;

    fn bytes(message: RouteNetlinkMessage) -> Vec<u8> {
        serialized(message, 0)
    }

    fn read<T>(bytes: &[u8], read: impl Fn(&Message<'_>) -> Option<T>) -> Vec<T> {
        messages(bytes)
            .filter_map(|message| read(&message))
            .collect()
    }

    #[test]
    fn root_qdisc_has_the_options_that_htb_asks_for() {
        let qdisc = NewQdisc::Htb {
            handle: 0x7263_0000,
            queue: 1000,
        };
        let bytes = bytes(new_qdisc(7, qdisc));
        let options = bytes.get(HEADER_BYTES + TC_HEADER_BYTES + 8..).unwrap();
        let expected: Vec<u8> = [[36, 0, 2, 0], [24, 0, 2, 0]]
            .into_iter()
            .chain(HTB_INIT.map(u32::to_ne_bytes))
            .chain([[8, 0, 5, 0], 1000_u32.to_ne_bytes()])
            .flatten()
            .collect();
        assert_eq!(options, expected);
        assert_eq!(
            read(&bytes, qdisc_of),
            [(7, "htb".to_owned(), 0x7263_0000, u32::MAX)]
        );
    }

    fn qdisc_of(message: &Message<'_>) -> Option<(u32, String, u32, u32)> {
        let qdisc = qdisc(message)?;
        Some((qdisc.ifindex, qdisc.kind, qdisc.handle, qdisc.parent))
    }

    #[test]
    fn filter_that_is_set_is_read_as_it_was_written() {
        let set = BpfFilter {
            name: "roamcast/gate /sys/fs/bpf/roamcast",
            program: 9,
            preference: 3,
            handle: 0x7263,
        };
        let parent = Parent::Root { handle: 0x1_0000 };
        let found = read(&bytes(set_filter(7, parent, &set)), filter);
        let expected = Filter {
            ifindex: 7,
            parent: 0x1_0000,
            kind: "bpf".to_owned(),
            preference: 3,
            protocol: 3,
            handle: 0x7263,
            chain: 0,
            program: Some(FilterProgram {
                name: set.name.to_owned(),
                id: None,
            }),
        };
        assert_eq!(found, [expected]);
    }

    #[test]
    fn filter_of_a_kind_that_is_not_known_is_read() {
        let mut request = RequestBytes::new(RTM_NEWTFILTER, 0);
        request.push(&[0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 3, 1, 0]);
        request.attribute(TCA_KIND, b"strange\0");
        request.nest(TCA_OPTIONS, |request| request.attribute(1, &[1, 2, 3]));
        let bytes = request.finish();
        let found = read(&bytes, filter);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].kind.as_str(), found[0].preference),
            ("strange", 1)
        );
        assert_eq!(found[0].program, None);
        assert_eq!(read(&bytes, ifindex), [7]);
    }

    proptest! {
        #[test]
        fn any_message_is_read_without_panic(
            kind in 36_u16..46, body in prop::collection::vec(any::<u8>(), 0..128),
        ) {
            let mut request = RequestBytes::new(kind, 0);
            request.push(&body);
            let bytes = request.finish();
            for message in messages(&bytes) {
                let _ = (qdisc(&message), filter(&message), ifindex(&message));
            }
        }
    }
}
