//! Certificates of the signalling over real sockets: which connections an agent accepts, and how
//! long they last.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "tests panic, so that they fail with a trace"
)]

use std::time::Duration;

use common::signal::{self, DirectoryMessage, Register};
use roamcast::net::peers::Endpoint;
use roamcast::pki::{self, Validity};
use roamcast::role::Role;
use rustls::version;
use support::certificate::certify;
use support::signalling::*;

/// Role URI in an agent's certificate, besides the name.
const AGENT: &str = "urn:roamcast:role:agent";

#[tokio::test]
async fn certificates_that_are_missing_expired_or_of_another_ca_are_refused_by_reason() {
    let (pki, other) = (Pki::new(), Pki::new());
    let agent = Agent::start(&pki, "vms1", &[], &["*"]);
    for (files, counter) in [
        (None, "no_certificate"),
        (
            Some(pki.issue("late", Role::Agent, yesterday())),
            "certificate_expired",
        ),
        (
            Some(pki.issue("early", Role::Agent, tomorrow())),
            "certificate_expired",
        ),
        (Some(other.valid("vms2")), "bad_certificate"),
    ] {
        let before = agent.counter(counter);
        let connector = client(&pki.ca(), files.as_ref(), &[&version::TLS13]);
        // In TLS 1.3, the client finishes before the server has seen the client's certificate.
        if let Ok(mut stream) = connect(&connector, &agent).await {
            assert!(read_to_end(&mut stream).await.is_empty());
        }
        agent.counted(counter, before + 1).await;
    }
    assert_eq!(agent.counter("accepted"), 0);
}

/// Validity of a certificate from an issuer whose clock is one day ahead.
fn tomorrow() -> Validity {
    let mut validity = Validity::days(3);
    validity.not_before += Duration::from_secs(86_400);
    validity
}

#[tokio::test]
async fn name_in_upper_case_is_the_same_name() {
    let pki = Pki::new();
    let files = certify(pki.directory.path(), &["VMS1"], &[AGENT]);
    let mut agent = Agent::on(localhost(0), &files, "vms1", &[], &["vms2"]);
    let files = certify(pki.directory.path(), &["VMS2"], &[AGENT]);
    let peers = [("vms1", agent.address())];
    let mut dialing = Agent::on(localhost(0), &files, "vms2", &peers, &[]);
    dialing.peers.connect("vms1");
    dialing.up("vms1").await;
    agent.up("vms2").await;
}

#[tokio::test]
async fn certificate_with_two_names_is_of_the_one_that_is_configured_and_not_of_this_agent() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[("vms2", localhost(9))], &["guest*"]);
    for names in [["guest1", "vms2"], ["vms2", "guest1"], ["x", "guest2"]] {
        let files = certify(pki.directory.path(), &names, &[AGENT]);
        let _stream = accepted(&pki, &files, &agent).await;
        let name = if names.contains(&"vms2") {
            "vms2"
        } else {
            "guest2"
        };
        agent.up(name).await;
        drop(_stream);
        agent.down(name).await;
    }
    for (names, counter) in [(["vms2", "vms1"], "own_name"), (["x", "y"], "not_admitted")] {
        let files = certify(pki.directory.path(), &names, &[AGENT]);
        let connector = client(&pki.ca(), Some(&files), &[&version::TLS13]);
        let mut stream = connect(&connector, &agent).await.unwrap();
        let verdict = read_to_end(&mut stream).await;
        assert_eq!(verdict.get(4), Some(&1), "{verdict:?}");
        agent.counted(counter, 1).await;
    }
}

#[tokio::test]
async fn role_that_has_no_reason_to_connect_is_refused_and_told_why() {
    let pki = Pki::new();
    for own in Role::ALL {
        let files = pki.of_role(&format!("to-{own}"), own);
        let agent = Agent::of_role(own, localhost(0), &files, &format!("to-{own}"), &[], &["*"]);
        for role in Role::ALL {
            let name = format!("{role}-to-{own}");
            let files = pki.of_role(&name, role);
            let endpoint = Endpoint {
                role: own,
                address: agent.address().to_string(),
            };
            let peers = [(format!("to-{own}"), endpoint)];
            let mut dialing = Agent::new(role, localhost(0), &files, &name, peers, &[]);
            dialing.peers.connect(&format!("to-{own}"));
            if own.admitted().contains(&role) {
                dialing.up(&format!("to-{own}")).await;
            } else {
                let reason = dialing.down(&format!("to-{own}")).await;
                let why =
                    format!("`{name}` is of the role {role}, which {own} `to-{own}` takes no");
                assert!(reason.contains(&why), "{reason}");
            }
        }
        let admitted = own.admitted().len();
        agent
            .counted("accepted", u64::try_from(admitted).unwrap())
            .await;
        let refused = Role::ALL.len() - admitted;
        agent
            .counted("wrong_role", u64::try_from(refused).unwrap())
            .await;
    }
}

#[tokio::test]
async fn peer_of_another_role_than_was_dialed_for_is_not_talked_to() {
    let pki = Pki::new();
    let destination = Agent::start(&pki, "vms2", &[], &["*"]);
    let files = pki.valid("vms1");
    let endpoint = Endpoint {
        role: Role::Mcs,
        address: destination.address().to_string(),
    };
    let peers = [("vms2".to_owned(), endpoint)];
    let mut source = Agent::new(Role::Agent, localhost(0), &files, "vms1", peers, &[]);
    source.peers.connect("vms2");
    let reason = source.down("vms2").await;
    assert!(
        reason.contains("its certificate is of the role agent") && reason.contains("--role mcs"),
        "{reason}"
    );
    source.counted("wrong_role", 1).await;
}

#[tokio::test]
async fn message_that_the_role_may_not_send_closes_the_connection_with_a_reason() {
    let pki = Pki::new();
    let files = pki.of_role("mcs1", Role::Mcs);
    let mut server = Agent::of_role(Role::Mcs, localhost(0), &files, "mcs1", &[], &["*"]);
    let endpoint = Endpoint {
        role: Role::Mcs,
        address: server.address().to_string(),
    };
    let register = |role| {
        DirectoryMessage::from(Register {
            role,
            address: [1; 16].into(),
            site: String::new(),
            serves: Vec::new(),
        })
        .encode(1)
    };
    let [agent, relay] = [signal::Role::Agent, signal::Role::Relay].map(register);
    let files = pki.of_role("relay1", Role::Relay);
    let peers = [("mcs1".to_owned(), endpoint)];
    let mut client = Agent::new(Role::Relay, localhost(0), &files, "relay1", peers, &[]);
    client.peers.connect("mcs1");
    client.up("mcs1").await;
    server.up("relay1").await;
    client.peers.send("mcs1", relay.clone());
    assert_eq!(server.frame("relay1").await, relay);
    client.peers.send("mcs1", agent);
    let reason = server.down("relay1").await;
    assert!(reason.contains("`relay1` sent Register"), "{reason}");
    client.down("mcs1").await;
    server.counted("forbidden_message", 1).await;
}

#[tokio::test]
async fn peer_whose_certificate_bears_another_name_is_not_talked_to() {
    let pki = Pki::new();
    let wrong = Agent::start(&pki, "vms3", &[], &["*"]);
    let mut source = Agent::start(&pki, "vms1", &[("vms2", wrong.address())], &[]);
    source.peers.connect("vms2");
    let reason = source.down("vms2").await;
    assert!(reason.contains("`vms2`"), "{reason}");
    assert_eq!(wrong.counter("accepted"), 0);
}

#[tokio::test]
async fn certificate_that_is_replaced_is_used_and_ends_no_connection() {
    let pki = Pki::new();
    let own = pki.valid("vms1");
    let mut agent = Agent::on(localhost(0), &own, "vms1", &[], &["*"]);
    let _up = accepted(&pki, &pki.valid("vms2"), &agent).await;
    agent.up("vms2").await;

    // Unusable files change nothing.
    let key = std::fs::read(&own.key).unwrap();
    std::fs::write(&own.key, "no key").unwrap();
    agent.counted("certificates_unusable", 1).await;
    let files = pki.valid("vms3");
    let connector = client(&pki.ca(), Some(&files), &[&version::TLS13]);
    connect(&connector, &agent).await.unwrap();
    agent.up("vms3").await;
    agent.down("vms3").await;
    std::fs::write(&own.key, key).unwrap();
    agent.counted("certificates_replaced", 1).await;

    // The files of another CA replace the old ones, one after the other.
    let other = Pki::new();
    let new = other.valid("vms1");
    for (from, to) in [
        (&new.ca, &own.ca),
        (&new.certificate, &own.certificate),
        (&new.key, &own.key),
    ] {
        std::fs::copy(from, to).unwrap();
    }
    agent.counted("certificates_replaced", 2).await;
    let _new = accepted(&other, &other.valid("vms4"), &agent).await;
    agent.up("vms4").await;
    let files = pki.valid("vms5");
    let old = client(&other.ca(), Some(&files), &[&version::TLS13]);
    if let Ok(mut stream) = connect(&old, &agent).await {
        assert!(read_to_end(&mut stream).await.is_empty());
    }
    agent.counted("bad_certificate", 1).await;
    // Only `vms3` disconnected.
    assert_eq!(agent.counter("lost"), 1);
    agent.peers.connect("vms2");
    agent.up("vms2").await;
}

/// Validity of a few seconds from now.
fn seconds(seconds: u64) -> Validity {
    let mut validity = Validity::days(0);
    validity.not_after += Duration::from_secs(seconds);
    validity
}

#[tokio::test]
async fn connection_ends_with_the_certificate_of_the_peer() {
    let pki = Pki::new();
    let mut destination = Agent::start(&pki, "vms2", &[], &["vms1"]);
    let files = pki.issue("vms1", Role::Agent, seconds(6));
    let peers = [("vms2", destination.address())];
    let mut source = Agent::on(localhost(0), &files, "vms1", &peers, &[]);
    source.peers.connect("vms2");
    source.up("vms2").await;
    destination.up("vms1").await;
    let reason = destination.down("vms1").await;
    assert!(reason.contains("`vms1` has expired"), "{reason}");
    destination.counted("certificate_expired", 1).await;
    source.down("vms2").await;
    source.peers.connect("vms2");
    source.down("vms2").await;
    assert_eq!(destination.counter("accepted"), 1, "it cannot come back");
}

#[tokio::test]
async fn connections_of_a_revoked_certificate_end_on_both_sides_and_others_stay() {
    let pki = Pki::new();
    let own = pki.valid("vms1");
    let mut destination = Agent::start(&pki, "vms2", &[], &["vms1"]);
    let mut other = Agent::start(&pki, "vms3", &[], &["vms1"]);
    let peers = [("vms2", destination.address()), ("vms3", other.address())];
    let mut source = Agent::on(localhost(0), &own, "vms1", &peers, &[]);
    for (peer, agent) in [("vms2", &mut destination), ("vms3", &mut other)] {
        source.peers.connect(peer);
        source.up(peer).await;
        agent.up("vms1").await;
    }
    let revoked = pki::revoke(pki.directory.path(), "vms2").unwrap();
    std::fs::copy(&revoked.lists[0], &own.crl).unwrap();
    let reason = source.down("vms2").await;
    assert!(reason.contains("`vms2` was revoked"), "{reason}");
    destination.down("vms1").await;
    source.peers.connect("vms2");
    let reason = source.down("vms2").await;
    assert!(reason.contains("evoked"), "{reason}");
    source.peers.send("vms3", message("still here"));
    assert_eq!(other.frame("vms1").await, message("still here"));
}
