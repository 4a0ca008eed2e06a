use super::*;
use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::vec;

use crate::mat::MAX_MOAS;
use proptest::prelude::*;

fn request() -> AgentRequest {
    AgentRequest {
        domain_uuid: [7; 16].into(),
        domain_name: "viewer".to_string(),
        macs: vec![[0x52, 0x54, 0, 1, 2, 3].into()],
        listeners: vec![Listener {
            vlan: 0,
            multicast_address: [0xff; 16].into(),
            filter_mode: 2,
            sources: vec![[1; 16].into()],
            mld_version: 2,
            mac: [0x52, 0x54, 0, 1, 2, 3].into(),
            flows: vec![Flow {
                source: [1; 16].into(),
                source_port: 5004,
                destination_port: 5004,
                rate_mpps: 1_725_000,
                silent_ms: 1,
            }],
        }],
        vm_transaction: Some(u64::MAX),
    }
}

#[test]
fn agent_request_survives_the_wire() {
    let bytes = PeerMessage::from(request()).encode(9);
    assert_eq!(PeerMessage::decode(&bytes), Ok((9, request().into())));
}

#[test]
fn uris_that_a_destination_names_are_not_read() {
    let response = AgentResponse {
        prefix: [1; 16].into(),
        prefix_length: 64,
        agent_address: [2; 16].into(),
        receptions: vec![],
        copy_tls: false,
    };
    let body = (
        response.prefix,
        response.prefix_length,
        response.agent_address,
        "qemu+ext://vms2/system?command=/tmp/x",
        "exec:/tmp/x",
        (),
    );
    let bytes = minicbor::to_vec((VERSION, 9_u64, 6_u16, body)).unwrap();
    // No receptions is an empty array.
    let bytes = [&bytes[..bytes.len() - 1], &[0x80]].concat();
    assert_eq!(PeerMessage::decode(&bytes), Ok((9, response.into())));
}

#[test]
fn arrival_notice_survives_the_wire_between_agents_only() {
    let notice = ArrivalNotice {
        domain_uuid: [7; 16].into(),
        domain_name: "viewer".to_string(),
    };
    let bytes = PeerMessage::from(notice.clone()).encode(9);
    assert_eq!(PeerMessage::decode(&bytes), Ok((9, notice.into())));
    let unknown = DecodeError::UnknownKind {
        kind: 19,
        transaction: 9,
    };
    assert_eq!(VmMessage::decode(&bytes), Err(unknown));
}

#[test]
fn ready_of_an_older_vm_has_nothing_to_forward() {
    let older = [0x84, 0x01, 0x05, 0x09, 0x81, 0xf6];
    let ready = MigrationReady::default();
    assert!(!ready.translate);
    assert_eq!(VmMessage::decode(&older), Ok((5, ready.into())));
}

#[test]
fn ready_with_all_fields_survives_the_wire() {
    let ready = MigrationReady {
        address: Some([1; 16].into()),
        mac: Some([2; 6].into()),
        forward: vec![[3; 16].into(); MAX_MOAS],
        forward_s: 60,
        translate: true,
    };
    let bytes = VmMessage::from(ready.clone()).encode(9);
    assert_eq!(VmMessage::decode(&bytes), Ok((9, ready.into())));
}

#[test]
fn claim_and_its_reply_survive_the_wire_between_agents_only() {
    let claim = AddressClaim {
        migration: 3,
        address: [1; 16].into(),
        mac: [2; 6].into(),
        quarantine_s: 60,
        translate: vec![[3; 16].into(); MAX_MOAS],
        translate_s: 60,
    };
    let bytes = PeerMessage::from(claim.clone()).encode(9);
    assert_eq!(PeerMessage::decode(&bytes), Ok((9, claim.into())));
    let reply = AddressClaimReply {
        address: [1; 16].into(),
        state: ClaimState::Refused,
        reason: "taken".to_string(),
        code: Code::ADDRESS_TAKEN,
    };
    let bytes = PeerMessage::from(reply.clone()).encode(9);
    assert_eq!(PeerMessage::decode(&bytes), Ok((9, reply.into())));
    assert!(VmMessage::decode(&bytes).is_err());
}

#[test]
fn claim_of_an_older_source_has_nothing_to_translate() {
    let mut older = vec![0x84, 0x01, 0x09, 0x14, 0x84, 0x03, 0x50];
    older.extend([1; 16]);
    older.push(0x46);
    older.extend([2; 6]);
    older.extend([0x18, 60]);
    let claim = AddressClaim {
        migration: 3,
        address: [1; 16].into(),
        mac: [2; 6].into(),
        quarantine_s: 60,
        translate: vec![],
        translate_s: 0,
    };
    assert_eq!(PeerMessage::decode(&older), Ok((9, claim.into())));
}

fn response(receptions: usize) -> AgentResponse {
    let reception = Reception {
        vlan: 0,
        multicast_address: [0xff; 16].into(),
        mode: ReceptionMode::Native,
        waited_ms: 0,
    };
    AgentResponse {
        prefix: [1; 16].into(),
        prefix_length: 64,
        agent_address: [2; 16].into(),
        receptions: vec![reception; receptions],
        copy_tls: true,
    }
}

/// Builds a message with a list or text of a given length.
type Message = Box<dyn Fn(usize) -> PeerMessage>;

#[test]
fn lists_are_read_up_to_their_bounds_and_refused_beyond() {
    let flow = request().listeners[0].flows[0].clone();
    let with = |change: &dyn Fn(&mut AgentRequest)| {
        let mut body = request();
        change(&mut body);
        PeerMessage::from(body)
    };
    let nic = |flows: usize, bytes: usize| NicCut {
        mac: [2; 6].into(),
        basis: CutBasis::Count,
        flows: vec![
            FlowCut {
                vlan: 0,
                multicast_address: [0xff; 16].into(),
                source: [1; 16].into(),
                source_port: 1,
                destination_port: 2,
                delivered: 3,
                last_ns: 4,
                fingerprints: vec![0; bytes].into(),
            };
            flows
        ],
        tap_full: Some(5),
    };
    let cut = |nics| PeerMessage::from(HandoverCut { clock_ns: 1, nics });
    let relay = |flows: usize| {
        let flow = AnnouncedFlow {
            source: [1; 16].into(),
            source_port: 1,
            destination_port: 2,
            relay_port: 3,
            agent_port: 4,
        };
        PeerMessage::from(RelayResponse {
            relay_address: [1; 16].into(),
            lease_ms: 1,
            flows: vec![flow; flows],
        })
    };
    let reason = |length| {
        let reason = "x".repeat(length);
        PeerMessage::from(MigrationAbort(Reason::unspecified(reason)))
    };
    let subscription = |sources: usize, flows: usize| {
        let flow = KnownFlow {
            source: [1; 16].into(),
            source_port: 1,
            destination_port: 2,
        };
        PeerMessage::from(RelayRequest {
            multicast_address: [0xff; 16].into(),
            filter_mode: 1,
            sources: vec![[1; 16].into(); sources],
            agent_address: [2; 16].into(),
            flows: vec![flow; flows],
        })
    };
    let claim = |moas: usize| {
        PeerMessage::from(AddressClaim {
            migration: 3,
            address: [1; 16].into(),
            mac: [2; 6].into(),
            quarantine_s: 60,
            translate: vec![[3; 16].into(); moas],
            translate_s: 60,
        })
    };
    let listener = request().listeners[0].clone();
    let cases: Vec<(usize, Message)> = vec![
        (MAX_LISTENERS, Box::new(move |n| response(n).into())),
        (
            MAX_LISTENERS,
            Box::new(move |n| with(&|it| it.listeners = vec![listener.clone(); n])),
        ),
        (
            MAX_NICS,
            Box::new(move |n| with(&|it| it.macs = vec![[2; 6].into(); n])),
        ),
        (
            MAX_SOURCES,
            Box::new(move |n| with(&|it| it.listeners[0].sources = vec![[1; 16].into(); n])),
        ),
        (
            MAX_FLOWS,
            Box::new(move |n| with(&|it| it.listeners[0].flows = vec![flow.clone(); n])),
        ),
        (
            MAX_TEXT_BYTES,
            Box::new(move |n| with(&|it| it.domain_name = "x".repeat(n))),
        ),
        (MAX_TEXT_BYTES, Box::new(reason)),
        (MAX_NICS, Box::new(move |n| cut(vec![nic(0, 0); n]))),
        (MAX_CUT_FLOWS, Box::new(move |n| cut(vec![nic(n, 0)]))),
        (
            MAX_FINGERPRINT_BYTES,
            Box::new(move |n| cut(vec![nic(1, n)])),
        ),
        (MAX_RELAY_FLOWS, Box::new(relay)),
        (MAX_SOURCES, Box::new(move |n| subscription(n, 0))),
        (MAX_RELAY_FLOWS, Box::new(move |n| subscription(0, n))),
        (MAX_MOAS, Box::new(claim)),
    ];
    for (number, (most, message)) in cases.iter().enumerate() {
        let (fits, exceeds) = (message(*most), message(most + 1).encode(9));
        assert_eq!(
            PeerMessage::decode(&fits.encode(9)),
            Ok((9, fits)),
            "case {number}"
        );
        assert_eq!(
            PeerMessage::decode(&exceeds),
            Err(DecodeError::Malformed),
            "case {number}"
        );
    }
}

/// Checks that a message with a list of the maximum length is read, and one with a longer list refused.
macro_rules! assert_bounded {
    ($messages:ty, $most:expr, $message:expr) => {{
        let fits = <$messages>::from($message($most));
        let exceeds = <$messages>::from($message($most + 1));
        assert_eq!(<$messages>::decode(&fits.encode(9)), Ok((9, fits)));
        let refused = <$messages>::decode(&exceeds.encode(9));
        assert_eq!(refused, Err(DecodeError::Malformed));
    }};
}

#[test]
fn lists_of_vms_are_read_up_to_their_bounds_and_refused_beyond() {
    assert_bounded!(VmMessage, MAX_MOAS, |moas| MigrationReady {
        forward: vec![[3; 16].into(); moas],
        ..MigrationReady::default()
    });
    assert_bounded!(VmMessage, MAX_NAMED, |hosts| AgentSearchReply {
        agent: "a".to_string(),
        domain: "d".to_string(),
        destinations: vec!["h".to_string(); hosts],
    });
}

#[test]
fn lists_of_directories_end_with_the_datagram() {
    let range = AddressRange {
        address: [0xff; 16].into(),
        length: 8,
    };
    let relay = KnownRelay {
        name: "r".to_string(),
        address: [1; 16].into(),
    };
    let register = Register {
        role: Role::Relay,
        address: [1; 16].into(),
        site: "a".to_string(),
        serves: vec![range; MAX_NAMED],
    };
    let found = RelaySearchReply {
        relays: vec![relay; MAX_NAMED],
    };
    for message in [
        DirectoryMessage::from(register),
        DirectoryMessage::from(found),
    ] {
        let refused = DirectoryMessage::decode(&message.encode(9));
        assert!(
            matches!(refused, Err(DecodeError::TooLong { .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn list_that_claims_to_be_long_is_refused_at_its_head() {
    // A response that announces 2^32 receptions, and one with a list of indefinite length.
    let whole = PeerMessage::from(response(0)).encode(9);
    let head = &whole[..whole.len() - 1];
    for list in [&[0x9b, 0, 0, 0, 1, 0, 0, 0, 0][..], &[0x9f, 0xff]] {
        let bytes = [head, list].concat();
        assert_eq!(PeerMessage::decode(&bytes), Err(DecodeError::Malformed));
    }
}

#[test]
fn truncated_message_is_malformed_at_every_length() {
    let bytes = PeerMessage::from(request()).encode(9);
    for length in 0..bytes.len() {
        assert!(
            PeerMessage::decode(&bytes[..length]).is_err(),
            "accepted {length} bytes"
        );
    }
}

#[test]
fn bytes_after_the_message_are_malformed() {
    let mut bytes = VmMessage::from(AgentSearch {}).encode(1);
    bytes.push(0);
    assert_eq!(VmMessage::decode(&bytes), Err(DecodeError::Malformed));
}

#[test]
fn other_version_is_named_with_its_transaction() {
    let bytes = [0x84, 0x02, 0x18, 77, 0x01, 0x80];
    assert_eq!(
        VmMessage::decode(&bytes),
        Err(DecodeError::Version {
            theirs: 2,
            transaction: 77
        })
    );
}

#[test]
fn unknown_kind_is_named_with_its_transaction() {
    let bytes = [0x84, 0x01, 0x05, 0x18, 99, 0x80];
    assert_eq!(
        VmMessage::decode(&bytes),
        Err(DecodeError::UnknownKind {
            kind: 99,
            transaction: 5
        })
    );
}

#[test]
fn text_that_cannot_be_shown_is_refused_with_its_transaction() {
    for text in ["a\nb", "a\tb", "\u{1b}[2J", "a\u{202e}b"] {
        let abort = MigrationAbort(Reason::unspecified(text.to_string()));
        let bytes = PeerMessage::from(abort).encode(7);
        let refused = Err(DecodeError::Text { transaction: 7 });
        assert_eq!(PeerMessage::decode(&bytes), refused, "{text:?}");
        // A text deep in the message, behind numbers, bytes and omitted fields.
        let mut named = request();
        named.domain_name = text.to_string();
        let bytes = PeerMessage::from(named).encode(7);
        assert_eq!(PeerMessage::decode(&bytes), refused, "{text:?}");
        let reply = AgentSearchReply {
            agent: "vms1".to_string(),
            domain: "viewer".to_string(),
            destinations: vec!["vms2".to_string(), text.to_string()],
        };
        let bytes = VmMessage::from(reply).encode(7);
        assert_eq!(
            VmMessage::decode(&bytes),
            Err(DecodeError::Text { transaction: 7 })
        );
    }
}

#[test]
fn unknown_fields_are_ignored() {
    let bytes = [0x84, 0x01, 0x05, 0x0b, 0x83, 0x61, b'x', 0x00, 0x18, 42];
    let abort = MigrationAbort(Reason::unspecified("x".to_string()));
    assert_eq!(VmMessage::decode(&bytes), Ok((5, abort.into())));
}

#[test]
fn datagram_over_the_limit_is_refused_by_length() {
    let abort = MigrationAbort(Reason::unspecified("x".repeat(MAX_DATAGRAM_BYTES)));
    let bytes = VmMessage::from(abort).encode(1);
    assert_eq!(
        VmMessage::decode(&bytes),
        Err(DecodeError::TooLong {
            length: bytes.len()
        })
    );
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let _ = VmMessage::decode(&bytes);
        let _ = PeerMessage::decode(&bytes);
    }

    #[test]
    fn mutated_message_never_panics(at in 0_usize..200, byte: u8) {
        let mut bytes = PeerMessage::from(request()).encode(9);
        let at = at % bytes.len();
        bytes[at] = byte;
        let _ = PeerMessage::decode(&bytes);
    }
}
