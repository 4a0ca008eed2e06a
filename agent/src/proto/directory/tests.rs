//! The directory on a virtual clock.

use proptest::prelude::*;

use super::client::{ClientOutput, DirectoryClient};
use super::*;
use crate::proto::PeerEvent;

const LEASE: Duration = Duration::from_secs(60);
const START: Timestamp = Timestamp(1_000_000_000);
const GROUP: Ipv6Addr = Ipv6Addr::new(0xff1e, 0, 0, 0, 0, 0, 0x4000, 1);

fn globs(patterns: &[&str]) -> Vec<Glob> {
    patterns
        .iter()
        .map(|text| Glob::try_from((*text).to_owned()).unwrap())
        .collect()
}

fn directory() -> Directory {
    Directory::new(DirectoryConfig {
        name: "mcs".to_owned(),
        lease: LEASE,
        capacity: 4,
        agents: globs(&["vms*"]),
        relays: globs(&["relay*"]),
    })
}

fn relay(last: u16, site: &str, serves: &[(Ipv6Addr, u8)]) -> Register {
    Register {
        role: Role::Relay,
        address: Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, last)
            .octets()
            .into(),
        site: site.to_owned(),
        serves: serves
            .iter()
            .map(|(address, length)| AddressRange {
                address: address.octets().into(),
                length: *length,
            })
            .collect(),
    }
}

fn ask(
    directory: &mut Directory,
    now: Timestamp,
    peer: &str,
    message: impl Into<DirectoryMessage>,
) -> DirectoryMessage {
    directory.handle_frame(now, peer, &message.into().encode(7));
    let output = directory.poll_output().unwrap();
    assert_eq!(output.peer, peer);
    let (transaction, answer) = DirectoryMessage::decode(&output.bytes).unwrap();
    assert_eq!(transaction, 7);
    answer
}

fn search(directory: &mut Directory, now: Timestamp, site: &str) -> Vec<String> {
    let body = RelaySearch {
        multicast_address: GROUP.octets().into(),
        site: site.to_owned(),
    };
    match ask(directory, now, "vms1", body) {
        DirectoryMessage::RelaySearchReply(reply) => {
            reply.relays.into_iter().map(|relay| relay.name).collect()
        }
        other => panic!("not found but {other:?}"),
    }
}

fn reason(answer: DirectoryMessage) -> String {
    match answer {
        DirectoryMessage::Error(error) => error.0.text,
        other => panic!("not refused but {other:?}"),
    }
}

#[test]
fn relays_of_the_site_come_first_and_take_turns() {
    let mut directory = directory();
    for (name, last, site) in [
        ("relay1", 1, "north"),
        ("relay2", 2, "south"),
        ("relay3", 3, "north"),
    ] {
        let answer = ask(&mut directory, START, name, relay(last, site, &[]));
        let registered = Registered { lease_ms: 60_000 };
        assert_eq!(answer, registered.into());
    }
    assert_eq!(
        search(&mut directory, START, "north"),
        ["relay1", "relay3", "relay2"]
    );
    assert_eq!(
        search(&mut directory, START, "north"),
        ["relay3", "relay1", "relay2"]
    );
    assert_eq!(
        search(&mut directory, START, "south").first().unwrap(),
        "relay2"
    );
}

#[test]
fn relay_is_named_only_for_what_it_serves() {
    let mut directory = directory();
    let other = (Ipv6Addr::new(0xff3e, 0, 0, 0, 0, 0, 0, 0), 32);
    let ours = (Ipv6Addr::new(0xff1e, 0, 0, 0, 0, 0, 0x4000, 0), 112);
    ask(&mut directory, START, "relay1", relay(1, "", &[other]));
    assert!(search(&mut directory, START, "").is_empty());
    ask(
        &mut directory,
        START,
        "relay1",
        relay(1, "", &[other, ours]),
    );
    assert_eq!(search(&mut directory, START, ""), ["relay1"]);
    assert_eq!(
        directory.counters(),
        DirectoryCounters {
            found: 1,
            not_found: 1,
            ..DirectoryCounters::default()
        }
    );
}

#[test]
fn registration_ends_with_its_lease_unless_renewed() {
    let mut directory = directory();
    ask(&mut directory, START, "relay1", relay(1, "", &[]));
    ask(&mut directory, START, "relay2", relay(2, "", &[]));
    let half = START + LEASE / 2;
    ask(&mut directory, half, "relay2", relay(2, "", &[]));
    assert_eq!(directory.poll_timeout(), Some(START + LEASE));
    assert_eq!(search(&mut directory, START + LEASE, ""), ["relay2"]);
    directory.handle_timeout(half + LEASE);
    assert_eq!(directory.registrations().count(), 0);
    assert_eq!(directory.poll_timeout(), None);
}

#[test]
fn certificate_decides_who_may_be_what() {
    let mut directory = directory();
    let said = reason(ask(&mut directory, START, "vms1", relay(1, "", &[])));
    assert_eq!(
        said,
        "The policy of mcs does not let vms1 register as a relay"
    );
    let body = RelaySearch {
        multicast_address: GROUP.octets().into(),
        site: String::new(),
    };
    let said = reason(ask(&mut directory, START, "relay1", body));
    assert_eq!(
        said,
        "The policy of mcs does not let relay1 search for relays"
    );
    assert_eq!(directory.counters().refused, 2);
}

#[test]
fn unacceptable_registrations_are_refused() {
    let mut directory = directory();
    let mut body = relay(1, "", &[]);
    body.address = GROUP.octets().into();
    let said = reason(ask(&mut directory, START, "relay1", body));
    assert_eq!(said, "Field address of the registration is not acceptable");
    let many = vec![(GROUP, 128); MAX_RANGES + 1];
    let said = reason(ask(&mut directory, START, "relay1", relay(1, "", &many)));
    assert_eq!(said, "Field serves of the registration is not acceptable");
    for number in 1..=4 {
        let name = format!("relay{number}");
        ask(&mut directory, START, &name, relay(number, "", &[]));
    }
    let said = reason(ask(&mut directory, START, "relay5", relay(5, "", &[])));
    assert_eq!(said, "mcs has no room for more than 4 registrations");
    // A known peer may still renew.
    ask(&mut directory, START, "relay4", relay(4, "", &[]));
}

proptest! {
    #[test]
    fn any_frame_is_answered_at_most_once(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut directory = directory();
        directory.handle_frame(START, "relay1", &bytes);
        let first = directory.poll_output();
        prop_assert!(directory.poll_output().is_none());
        prop_assert!(first.is_some() || directory.counters().malformed == 1);
    }
}

/// A client and its server, connected without loss.
struct Pair {
    server: Directory,
    client: DirectoryClient,
    name: &'static str,
    now: Timestamp,
    reachable: bool,
    found: Vec<([u8; 16], Vec<String>)>,
}

impl Pair {
    fn new(name: &'static str, register: Register) -> Self {
        Self {
            server: directory(),
            client: DirectoryClient::new(register, ["mcs".to_owned()]),
            name,
            now: START,
            reachable: true,
            found: Vec::new(),
        }
    }

    /// Runs both for the given time.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.client.poll_timeout().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.client.handle_timeout(self.now);
            self.exchange();
        }
        self.now = end;
        self.server.handle_timeout(end);
    }

    fn exchange(&mut self) {
        while let Some(output) = self.client.poll_output() {
            match output {
                ClientOutput::Connect { peer } => {
                    let event = if self.reachable {
                        PeerEvent::Up { from: None }
                    } else {
                        let reason = "Nobody is there".to_owned();
                        PeerEvent::Down { reason }
                    };
                    self.client.handle_peer(self.now, &peer, event);
                }
                ClientOutput::Frame { peer, bytes } => {
                    self.server.handle_frame(self.now, self.name, &bytes);
                    while let Some(output) = self.server.poll_output() {
                        let frame = PeerEvent::Frame(output.bytes.into());
                        self.client.handle_peer(self.now, &peer, frame);
                    }
                }
                ClientOutput::Found {
                    multicast_address,
                    relays,
                } => {
                    let names = relays.into_iter().map(|relay| relay.name).collect();
                    self.found.push((multicast_address, names));
                }
            }
        }
    }
}

#[test]
fn client_stays_registered_and_comes_back_after_an_outage() {
    let mut pair = Pair::new("relay1", relay(1, "north", &[]));
    pair.run(LEASE * 10);
    assert_eq!(pair.client.servers().collect::<Vec<_>>(), [("mcs", true)]);
    assert_eq!(pair.server.registrations().count(), 1);
    pair.reachable = false;
    let reason = "Lost".to_owned();
    pair.client
        .handle_peer(pair.now, "mcs", PeerEvent::Down { reason });
    pair.run(LEASE * 2);
    assert_eq!(pair.server.registrations().count(), 0);
    assert_eq!(pair.client.servers().collect::<Vec<_>>(), [("mcs", false)]);
    pair.reachable = true;
    pair.run(Duration::from_secs(10));
    assert_eq!(pair.server.registrations().count(), 1);
}

#[test]
fn search_waits_for_a_server_and_is_answered_once() {
    let mut agent = relay(9, "", &[]);
    agent.role = Role::Agent;
    let mut pair = Pair::new("vms1", agent);
    ask(&mut pair.server, START, "relay1", relay(1, "", &[]));
    pair.client.search(GROUP.octets());
    assert!(pair.found.is_empty());
    pair.run(Duration::from_secs(1));
    assert_eq!(pair.found, [(GROUP.octets(), vec!["relay1".to_owned()])]);
    pair.client.search(GROUP.octets());
    pair.exchange();
    assert_eq!(pair.found.len(), 2);
}

#[test]
fn refused_client_asks_again_but_seldom() {
    let mut pair = Pair::new("stranger", relay(1, "", &[]));
    pair.run(LEASE);
    assert_eq!(pair.client.servers().collect::<Vec<_>>(), [("mcs", false)]);
    let refused = pair.server.counters().refused;
    assert!((2..=40).contains(&refused), "{refused}");
}
