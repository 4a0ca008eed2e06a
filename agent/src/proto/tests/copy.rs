//! Tests of how memory is copied: encrypted, in the clear with a word, or not at all.

use common::signal::AgentResponse;

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

/// An operator has `viewer` moved to a destination that can encrypt, or not.
fn moved(copy: CopyConfig, here: CopyTls, there: bool) -> (Bench, Vec<Output>) {
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
        Output::Frame { bytes, .. } => Some(common::signal::PeerMessage::decode(&bytes).unwrap().0),
        _ => None,
    });
    let response = AgentResponse {
        prefix: [0; 16].into(),
        prefix_length: 64,
        agent_address: [1; 16].into(),
        receptions: vec![],
        copy_tls: there,
    };
    bench.frame(transaction.unwrap(), response);
    let outputs = bench.outputs();
    (bench, outputs)
}

/// Whether QEMU is asked to encrypt; `None` if nothing is copied.
fn is_encrypted(outputs: &[Output]) -> Option<bool> {
    outputs.iter().find_map(|output| match output {
        Output::StartMigration { tls, .. } => Some(*tls),
        _ => None,
    })
}

fn way(bench: &Bench) -> Option<CopyWay> {
    bench.agent.migrations().last().unwrap().way.clone()
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
