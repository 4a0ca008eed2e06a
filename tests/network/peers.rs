//! Connections between agents over real sockets: which peers are accepted, which are refused, and
//! that refused ones leave nothing behind.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "tests panic, so that they fail with a trace"
)]

use std::time::{Duration, Instant};

use common::signal::MAX_FRAME_BYTES;
use roamcast::net::peers::{Peers, PeersConfig, PeersError};
use roamcast::net::tls::Tls;
use roamcast::proto::PeerEvent;
use roamcast::role::Role;
use rustls::version;
use support::signalling::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

#[tokio::test]
async fn frames_pass_both_ways_in_order() {
    let pki = Pki::new();
    let mut destination = Agent::start(&pki, "vms2", &[], &["vms?"]);
    let mut source = Agent::start(&pki, "vms1", &[("vms2", destination.address())], &[]);
    source.peers.connect("vms2");
    source.up("vms2").await;
    destination.up("vms1").await;
    for i in 0..100 {
        source.peers.send("vms2", message(&i.to_string()));
    }
    for i in 0..100 {
        assert_eq!(destination.frame("vms1").await, message(&i.to_string()));
    }
    let mut longest = message("");
    longest.resize(MAX_FRAME_BYTES, 0);
    destination.peers.send("vms1", message("first"));
    destination.peers.send("vms1", longest.clone());
    assert_eq!(source.frame("vms2").await, message("first"));
    assert_eq!(source.frame("vms2").await, longest);
}

#[tokio::test]
async fn agents_that_dial_each_other_at_once_keep_one_connection_and_lose_no_frame() {
    let pki = Pki::new();
    let (one, two) = (pki.valid("vms1"), pki.valid("vms2"));
    for _ in 0..20 {
        // Both ports must be known before either agent starts.
        let ports = [0, 0].map(|_| {
            let listener = std::net::TcpListener::bind(localhost(0)).unwrap();
            listener.local_addr().unwrap()
        });
        let [a, b] = ports;
        let mut source = Agent::on(a, &one, "vms1", &[("vms2", b)], &[]);
        let mut destination = Agent::on(b, &two, "vms2", &[("vms1", a)], &[]);
        source.peers.connect("vms2");
        destination.peers.connect("vms1");
        source.up("vms2").await;
        source.peers.send("vms2", message("from vms1"));
        destination.up("vms1").await;
        destination.peers.send("vms1", message("from vms2"));
        assert_eq!(destination.frame("vms1").await, message("from vms1"));
        assert_eq!(source.frame("vms2").await, message("from vms2"));
        assert_eq!(source.counter("lost"), 0);
        assert_eq!(destination.counter("lost"), 0);
    }
}

#[tokio::test]
async fn peer_that_comes_back_is_up_again() {
    let pki = Pki::new();
    let files = pki.valid("vms2");
    let destination = Agent::on(localhost(0), &files, "vms2", &[], &["vms1"]);
    let address = destination.address();
    let mut source = Agent::start(&pki, "vms1", &[("vms2", address)], &[]);
    source.peers.connect("vms2");
    source.up("vms2").await;
    drop(destination);
    assert!(source.down("vms2").await.contains("`vms2`"));
    source.peers.connect("vms2");
    let reason = source.down("vms2").await;
    assert!(
        reason.contains("`vms2`") && reason.contains("reached"),
        "{reason}"
    );
    let mut destination = Agent::on(address, &files, "vms2", &[], &["vms1"]);
    source.peers.connect("vms2");
    source.up("vms2").await;
    destination.up("vms1").await;
}

#[tokio::test]
async fn connecting_twice_says_up_and_keeps_the_connection() {
    let pki = Pki::new();
    let destination = Agent::start(&pki, "vms2", &[], &["*"]);
    let mut source = Agent::start(&pki, "vms1", &[("vms2", destination.address())], &[]);
    source.peers.connect("vms2");
    source.up("vms2").await;
    source.peers.connect("vms2");
    source.up("vms2").await;
    assert_eq!(destination.counter("accepted"), 1);
}

#[tokio::test]
async fn unknown_and_unconnected_peers_are_named() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &[]);
    agent.peers.connect("vms9");
    assert!(
        agent
            .down("vms9")
            .await
            .contains("`vms9` is not among the peers")
    );
    agent.peers.send("vms9", message(""));
    assert!(agent.down("vms9").await.contains("`vms9` is not connected"));
}

#[tokio::test]
async fn stranger_is_refused_and_told_why() {
    let pki = Pki::new();
    let destination = Agent::start(&pki, "vms2", &[], &["edge-*"]);
    let mut source = Agent::start(&pki, "vms1", &[("vms2", destination.address())], &[]);
    source.peers.connect("vms2");
    let reason = source.down("vms2").await;
    assert!(reason.contains("does not admit `vms1`"), "{reason}");
    destination.counted("not_admitted", 1).await;
}

#[tokio::test]
async fn agent_under_this_agents_own_name_is_refused() {
    let pki = Pki::new();
    let files = pki.valid("vms1");
    let agent = Agent::on(localhost(0), &files, "vms1", &[], &["*"]);
    let connector = client(&pki.ca(), Some(&files), &[&version::TLS13]);
    let mut stream = connect(&connector, &agent).await.unwrap();
    let verdict = read_to_end(&mut stream).await;
    assert_eq!(verdict.get(4), Some(&1), "{verdict:?}");
    agent.counted("own_name", 1).await;

    let tls = Tls::load(&files, "vms1", Role::Agent).unwrap();
    let config = PeersConfig {
        name: "vms1".to_owned(),
        listen: localhost(0),
        peers: [("VMS1".to_owned(), endpoint(localhost(1)))].into(),
        ..PeersConfig::default()
    };
    let error = Peers::start(config, tls, mpsc::channel(1).0).unwrap_err();
    assert!(matches!(error, PeersError::OwnName { .. }));
}

#[tokio::test]
async fn other_tls_version_is_refused() {
    let pki = Pki::new();
    let agent = Agent::start(&pki, "vms1", &[], &["*"]);
    let files = pki.valid("vms2");
    let connector = client(&pki.ca(), Some(&files), &[&version::TLS12]);
    connect(&connector, &agent).await.unwrap_err();
    agent.counted("tls_version", 1).await;
}

#[tokio::test]
async fn plain_text_is_refused() {
    let pki = Pki::new();
    let agent = Agent::start(&pki, "vms1", &[], &["*"]);
    let mut stream = TcpStream::connect(agent.address()).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut bytes = Vec::new();
    let _ = timeout(DEADLINE, stream.read_to_end(&mut bytes))
        .await
        .unwrap();
    agent.counted("not_tls", 1).await;
}

#[tokio::test]
async fn garbage_as_first_frame_closes_the_connection_with_a_reason() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &["vms2"]);
    let mut stream = accepted(&pki, &pki.valid("vms2"), &agent).await;
    agent.up("vms2").await;
    stream.write_all(b"\0\0\0\x04junk").await.unwrap();
    let reason = agent.down("vms2").await;
    assert!(reason.contains("does not speak"), "{reason}");
    assert!(read_to_end(&mut stream).await.is_empty());
    agent.counted("malformed_frame", 1).await;
}

#[tokio::test]
async fn oversized_frame_closes_the_connection_with_a_reason() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &["vms2"]);
    let mut stream = accepted(&pki, &pki.valid("vms2"), &agent).await;
    agent.up("vms2").await;
    let length = u32::try_from(MAX_FRAME_BYTES + 1).unwrap();
    stream.write_all(&length.to_be_bytes()).await.unwrap();
    let reason = agent.down("vms2").await;
    assert!(reason.contains("too long"), "{reason}");
    agent.counted("oversized_frame", 1).await;
}

#[tokio::test]
async fn new_connection_of_a_peer_replaces_the_one_it_lost() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &["vms2"]);
    let files = pki.valid("vms2");
    let mut first = accepted(&pki, &files, &agent).await;
    agent.up("vms2").await;
    let mut second = accepted(&pki, &files, &agent).await;
    assert!(agent.down("vms2").await.contains("anew"));
    agent.up("vms2").await;
    assert!(read_to_end(&mut first).await.is_empty());
    let bytes = message("still here");
    let length = u32::try_from(bytes.len()).unwrap();
    second.write_all(&length.to_be_bytes()).await.unwrap();
    second.write_all(&bytes).await.unwrap();
    assert_eq!(agent.frame("vms2").await, bytes);
}

#[tokio::test]
async fn peer_that_does_not_read_is_cut_off() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &["vms2"]);
    let _stream = accepted(&pki, &pki.valid("vms2"), &agent).await;
    agent.up("vms2").await;
    for _ in 0..16 {
        agent.peers.send("vms2", vec![0; MAX_FRAME_BYTES]);
    }
    let reason = agent.down("vms2").await;
    assert!(reason.contains("does not read"), "{reason}");
    agent.counted("not_reading", 1).await;
}

#[tokio::test]
async fn stranger_that_sends_a_byte_a_second_is_given_up() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &["*"]);
    let mut stream = TcpStream::connect(agent.address()).await.unwrap();
    // Header of a TLS handshake record, and header of the message inside.
    let mut hello = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3].into_iter();
    let begun = Instant::now();
    let refused = agent.counter("handshake_timeout");
    while agent.counter("handshake_timeout") == refused {
        assert!(begun.elapsed() < DEADLINE, "it is still there");
        // After the agent has closed the connection, the write fails.
        let _ = stream.write_all(&[hello.next().unwrap_or_default()]).await;
        sleep(Duration::from_secs(1)).await;
    }
    let files = pki.valid("vms2");
    let _peer = accepted(&pki, &files, &agent).await;
    agent.up("vms2").await;
}

#[tokio::test]
async fn peer_that_sends_a_byte_at_a_time_keeps_nobody_waiting() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &["vms?"]);
    let mut slow = accepted(&pki, &pki.valid("vms2"), &agent).await;
    agent.up("vms2").await;
    let mut other = accepted(&pki, &pki.valid("vms3"), &agent).await;
    agent.up("vms3").await;
    let framed = |text: &str| {
        let bytes = message(text);
        let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
        [&length, bytes.as_slice()].concat()
    };
    for byte in framed("slow") {
        slow.write_all(&[byte]).await.unwrap();
        slow.flush().await.unwrap();
        other.write_all(&framed("quick")).await.unwrap();
        sleep(Duration::from_millis(300)).await;
        let (peer, event) = agent.event().await;
        if peer == "vms2" {
            assert!(matches!(event, PeerEvent::Frame(_)), "{event:?}");
        } else {
            assert_eq!(peer, "vms3");
        }
    }
    assert_eq!(agent.counter("lost"), 0);
}

#[tokio::test]
async fn strangers_that_fail_on_and_on_have_to_wait() {
    let pki = Pki::new();
    let agent = Agent::start(&pki, "vms1", &[], &["*"]);
    for _ in 0..32 {
        if let Ok(mut stream) = TcpStream::connect(agent.address()).await {
            let _ = stream.write_all(b"nonsense, and no TLS").await;
            let _ = timeout(DEADLINE, stream.read_to_end(&mut Vec::new())).await;
        }
    }
    assert_eq!(agent.counter("not_tls"), 8);
    assert_eq!(agent.counter("backed_off"), 24);
}

#[tokio::test]
async fn silent_connections_of_a_prefix_are_bounded_and_given_up_and_leave_nothing_behind() {
    let pki = Pki::new();
    let agent = Agent::start(&pki, "vms1", &[], &["*"]);
    let before = descriptors();
    let mut silent = Vec::new();
    for _ in 0..80 {
        silent.push(TcpStream::connect(agent.address()).await.unwrap());
    }
    agent.counted("too_many_handshakes", 64).await;
    agent.counted("handshake_timeout", 16).await;
    drop(silent);
    let wait = async {
        while descriptors() > before {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, wait).await.expect("descriptors leaked");
}

/// Returns the number of TCP sockets of this process that the listening test agent could leave
/// open. Other tests in this process open and close sockets, so only lasting growth is a leak.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
