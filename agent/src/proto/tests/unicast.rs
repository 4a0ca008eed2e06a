//! Tests of addresses over complete migrations.

use std::net::Ipv6Addr;

use common::maps::Forward;

use super::migration::LONG;
use super::pair::{MOAS, OTHER_MAC, Pair, Setup, VmState, ms};
use crate::proto::{ClaimOutcome, Dispute, MigrationRecord, Outcome};

fn record(pair: &Pair, host: usize) -> MigrationRecord {
    let agent = pair.hosts[host].agent.as_ref().unwrap();
    agent.view().migrations().last().unwrap().clone()
}

#[test]
fn vm_gets_its_address_and_what_comes_for_the_old_one_is_sent_on() {
    let mut pair = Pair::new(Setup::default());
    let is_sent_on = |it: &Forward| it.until_ns != 0;
    pair.run(LONG, |pair| {
        pair.hosts[0].kernel.forwards.values().any(is_sent_on)
    });
    assert!(pair.vm_paused, "sent on before the VM stands still");
    pair.run(LONG, |_| false);
    assert_eq!(pair.vm, VmState::Over(Ok(())));
    pair.assert_clean("after a move");
    let (source, destination) = (record(&pair, 0), record(&pair, 1));
    let unicast = source.unicast.unwrap();
    assert_eq!(unicast.address, MOAS[1]);
    let [forward] = unicast.forwards.as_slice() else {
        panic!("not one address: {unicast:?}");
    };
    assert_eq!((forward.address, forward.to), (MOAS[0], MOAS[1]));
    assert_eq!(forward.packets, 7, "the last count is kept");
    let unicast = destination.unicast.unwrap();
    assert_eq!(unicast.claim, ClaimOutcome::Spoken);
    assert_eq!(unicast.forwards, []);
    let [translation] = unicast.translations.as_slice() else {
        panic!("not one address: {unicast:?}");
    };
    assert_eq!((translation.address, translation.packets), (MOAS[0], 5));
}

#[test]
fn what_the_vm_still_sends_from_the_old_address_is_translated_before_it_runs() {
    let mut pair = Pair::new(Setup::default());
    pair.run(LONG, |pair| !pair.hosts[1].kernel.translations.is_empty());
    assert_eq!(pair.vm_host, 0, "translated only after the switch");
    let translations = &pair.hosts[1].kernel.translations;
    let (key, value) = translations.first_key_value().unwrap();
    assert_eq!(translations.len(), 1);
    assert_eq!(Ipv6Addr::from(key.address), MOAS[0]);
    assert_eq!(Ipv6Addr::from(value.source), MOAS[1]);
    let port = &pair.hosts[1].kernel.ports[&key.ifindex];
    assert_eq!(port.mac[5], 1, "at the NIC of the new address");
}

#[test]
fn address_of_somebody_else_stops_the_move_with_a_sentence_where_that_is_wanted() {
    for delay in [0, 200, 290] {
        let mut pair = Pair::new(Setup {
            taken: Some(ms(delay)),
            disputed: Dispute::Refuse,
            ..Setup::default()
        });
        pair.run(LONG, |_| false);
        let VmState::Over(Err(reason)) = &pair.vm else {
            panic!("moved to an address that was taken after {delay} ms");
        };
        assert_eq!(
            reason,
            &format!(
                "Destination vms2 refuses the VM's address: Address {} is taken by {}; run migkick \
                 again, which chooses another one",
                MOAS[1],
                crate::proto::mac_text(&OTHER_MAC)
            )
        );
        assert_eq!(pair.vm_host, 0);
        pair.assert_clean("after an address that was taken");
        for host in 0..2 {
            let record = record(&pair, host);
            assert!(matches!(record.outcome, Some(Outcome::Failed(_))));
            assert_eq!(record.unicast.unwrap().claim, ClaimOutcome::Refused);
        }
    }
}

#[test]
fn address_that_somebody_says_he_has_is_disputed_and_the_move_stands() {
    for (delay, disputed) in [
        (0, Dispute::GoOn),
        (200, Dispute::GoOn),
        (290, Dispute::GoOn),
        (330, Dispute::GoOn),
        (330, Dispute::Refuse),
    ] {
        let mut pair = Pair::new(Setup {
            taken: Some(ms(delay)),
            disputed,
            ..Setup::default()
        });
        pair.run(LONG, |_| false);
        assert_eq!((&pair.vm, pair.vm_host), (&VmState::Over(Ok(())), 1));
        pair.assert_clean("after a dispute");
        assert_eq!(
            record(&pair, 1).unicast.unwrap().claim,
            ClaimOutcome::Disputed,
            "after {delay} ms"
        );
        let agent = pair.hosts[1].agent.as_ref().unwrap();
        assert_eq!(agent.view().counters().addresses_disputed, 1);
    }
}
