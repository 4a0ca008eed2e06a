//! Tests of the memory copy: encrypted, unencrypted with a note, or refused; and of its destination.

use common::signal::{AgentResponse, PeerMessage};

use super::*;
use crate::proto::tests::fixture::{Bench, config};
use crate::proto::{Command, CommandReply, Output, PeerEvent};

const BOTH: CopyTls = CopyTls {
    client: Ok(()),
    server: Ok(()),
};

fn plain(encrypt: Encrypt) -> CopyConfig {
    CopyConfig {
        encrypt,
        carrier: Carrier::Plain,
    }
}

/// Lets an operator migrate `viewer`, whose destination host is asked; returns the transaction.
fn asked(copy: CopyConfig, here: CopyTls) -> (Bench, u64) {
    let mut config = config(0);
    config.copy = copy;
    let mut bench = Bench::with(config);
    bench.house();
    bench.agent.handle_copy_tls(bench.now, here);
    bench.peer(PeerEvent::Up { from: None });
    let command = Command::Migrate {
        domain: "viewer".to_owned(),
        destination: "vms2".to_owned(),
    };
    bench.agent.handle_command(bench.now, 1, command);
    let transaction = bench.outputs().into_iter().find_map(|output| match output {
        Output::Frame { bytes, .. } => Some(PeerMessage::decode(&bytes).unwrap().0),
        _ => None,
    });
    (bench, transaction.unwrap())
}

/// Like `asked`, with the destination host's answer whether that host can decrypt.
fn moved(copy: CopyConfig, here: CopyTls, there: bool) -> (Bench, Vec<Output>) {
    let (mut bench, transaction) = asked(copy, here);
    bench.frame(transaction, response(there));
    let outputs = bench.outputs();
    (bench, outputs)
}

fn response(copy_tls: bool) -> AgentResponse {
    AgentResponse {
        prefix: [0; 16].into(),
        prefix_length: 64,
        agent_address: [1; 16].into(),
        receptions: vec![],
        copy_tls,
    }
}

/// Returns a frame of a version that told the source host which URIs to open.
fn with_uris(transaction: u64, connect_uri: &str, migrate_uri: &str) -> Vec<u8> {
    let mut frame = PeerMessage::from(response(false)).encode(transaction);
    // In place of two null URIs; then no verdict, and no certificate (RFC 8949 §3).
    let tail = [0xf6, 0xf6, 0x80, 0xf4];
    let end = frame.len() - tail.len();
    assert_eq!(frame.split_off(end), tail);
    for uri in [connect_uri, migrate_uri] {
        frame.extend([0x78, u8::try_from(uri.len()).unwrap()]);
        frame.extend(uri.as_bytes());
    }
    frame.extend([0x80, 0xf4]);
    frame
}

/// Returns whether QEMU is told to encrypt; `None` without a copy.
fn is_encrypted(outputs: &[Output]) -> Option<bool> {
    outputs.iter().find_map(|output| match output {
        Output::StartMigration { tls, .. } => Some(*tls),
        _ => None,
    })
}

fn way(bench: &Bench) -> Option<CopyWay> {
    bench.agent.view().migrations().last().unwrap().way.clone()
}

#[test]
fn memory_is_encrypted_where_both_ends_have_certificates() {
    for encrypt in [Encrypt::Auto, Encrypt::Always] {
        let (bench, outputs) = moved(plain(encrypt), BOTH, true);
        assert_eq!(is_encrypted(&outputs), Some(true));
        assert_eq!(way(&bench), Some(CopyWay::Tls));
    }
}

#[test]
fn memory_goes_in_the_clear_with_a_word_where_one_end_has_no_certificate() {
    let why = NoCopyTls::Missing("/etc/pki/qemu/client-key.pem".into());
    let without = CopyTls {
        client: Err(why.clone()),
        server: Ok(()),
    };
    let (bench, outputs) = moved(plain(Encrypt::Auto), without, true);
    assert_eq!(is_encrypted(&outputs), Some(false));
    let agent = "vms1".to_owned();
    assert_eq!(
        way(&bench),
        Some(CopyWay::Clear(InTheClear::Source { agent, why }))
    );

    let (bench, outputs) = moved(plain(Encrypt::Auto), BOTH, false);
    assert_eq!(is_encrypted(&outputs), Some(false));
    let agent = "vms2".to_owned();
    assert_eq!(
        way(&bench),
        Some(CopyWay::Clear(InTheClear::Destination { agent }))
    );
}

#[test]
fn memory_that_must_be_encrypted_and_cannot_be_is_not_copied() {
    let unknown = CopyTls::default();
    for (here, there, said) in [
        (unknown, true, "on vms1 QEMU's certificates"),
        (BOTH, false, "vms2 has no certificate"),
    ] {
        let (_, outputs) = moved(plain(Encrypt::Always), here, there);
        assert_eq!(is_encrypted(&outputs), None);
        let reply = outputs.iter().find_map(|output| match output {
            Output::Reply {
                reply: CommandReply::Failed(reason),
                ..
            } => Some(reason),
            _ => None,
        });
        assert!(reply.unwrap().contains(said), "{reply:?}");
    }
}

#[test]
fn configuration_that_wants_none_gets_none() {
    let (bench, outputs) = moved(plain(Encrypt::Never), BOTH, true);
    assert_eq!(is_encrypted(&outputs), Some(false));
    assert_eq!(way(&bench), Some(CopyWay::Clear(InTheClear::Never)));
}

#[test]
fn flags_decide_where_they_say_something() {
    let ways = [
        (Carrier::Tls, Some(true), CopyWay::Tls),
        (Carrier::Tunnel, Some(false), CopyWay::Tunnel),
        (
            Carrier::Zerocopy,
            Some(false),
            CopyWay::Clear(InTheClear::Zerocopy),
        ),
    ];
    for (carrier, tls, expected) in ways {
        let copy = CopyConfig {
            encrypt: Encrypt::Auto,
            carrier,
        };
        let (bench, outputs) = moved(copy, BOTH, true);
        assert_eq!(is_encrypted(&outputs), tls, "{carrier:?}");
        assert_eq!(way(&bench), Some(expected));
    }
}

/// libvirt executes commands from some URIs, as root.
#[test]
fn uris_that_a_destination_names_are_not_opened() {
    let (mut bench, transaction) = asked(plain(Encrypt::Never), BOTH);
    let (connect, migrate) = (
        "qemu+ext://vms2/system?command=/tmp/x.sh",
        "exec:/tmp/x.sh < in",
    );
    let frame = with_uris(transaction, connect, migrate);
    bench.peer(PeerEvent::Frame(frame.into()));
    let started = bench.outputs().into_iter().find_map(|output| match output {
        Output::StartMigration {
            connect_uri,
            migrate_uri,
            ..
        } => Some((connect_uri, migrate_uri)),
        _ => None,
    });
    let peer = bench.agent.config().peer("vms2").unwrap();
    let own = (peer.connect_uri.clone(), peer.migrate_uri.clone());
    assert_eq!(started, Some(own));
}
