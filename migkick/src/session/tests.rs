use super::*;
use std::net::{SocketAddr, UdpSocket};

use common::signal::{
    AgentSearchReply, MigrationAbort, MigrationProgress, PORT, Phase, Reason, VmMessage,
};

use crate::client::ALL_NODES;
use crate::identifier::Scheme;
use crate::testing::{Neighbour, in_namespace, ip, without_dad};

/// An agent on `agent0` and `agent1`. Returns after its last answer, with the address that the VM
/// named.
fn agent(refusal: Option<&'static str>) -> Option<Ipv6Addr> {
    let socket = UdpSocket::bind(("::", PORT)).unwrap();
    let deadline = Some(Duration::from_secs(30));
    socket.set_read_timeout(deadline).unwrap();
    for name in ["agent0", "agent1"] {
        ip(&format!("link set {name} up"));
        let ifindex = nix::net::if_::if_nametoindex(name).unwrap();
        socket.join_multicast_v6(&ALL_NODES, ifindex).unwrap();
    }
    let mut asked = 0;
    loop {
        let mut buffer = [0; 2048];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        let (transaction, message) = VmMessage::decode(&buffer[..length]).unwrap();
        let answer = |message: VmMessage| {
            let bytes = message.encode(transaction);
            assert!(matches!(from, SocketAddr::V6(from) if from.ip().is_unicast_link_local()));
            socket.send_to(&bytes, from).unwrap();
        };
        match (message, refusal) {
            (VmMessage::AgentSearch(_), _) => answer(
                AgentSearchReply {
                    agent: "vms1".to_owned(),
                    domain: "viewer".to_owned(),
                    destinations: vec!["vms2".to_owned()],
                }
                .into(),
            ),
            (VmMessage::MigrationRequest(_), Some(reason)) => {
                let reason = reason.to_owned();
                answer(MigrationAbort(Reason::unspecified(reason)).into());
                return None;
            }
            (VmMessage::MigrationRequest(_), None) => {
                let prefix: Ipv6Addr = "2001:db8:2::".parse().unwrap();
                let address: Ipv6Addr = "2001:db8:2::10".parse().unwrap();
                answer(
                    MigrationResponse {
                        prefix: prefix.octets().into(),
                        prefix_length: 64,
                        agent_address: address.octets().into(),
                    }
                    .into(),
                );
            }
            (VmMessage::MigrationReady(ready), _) => {
                asked += 1;
                let completed = asked == 3;
                answer(
                    MigrationProgress {
                        phase: if completed {
                            Phase::Completed
                        } else {
                            Phase::Copying
                        },
                        processed_bytes: asked,
                        total_bytes: 3,
                        elapsed_ms: 500,
                        vm_pause_ms: completed.then_some(40),
                        clock_ns: None,
                    }
                    .into(),
                );
                if completed {
                    return ready.address.map(|address| Ipv6Addr::from(*address));
                }
            }
            (other, _) => panic!("unexpected {other:?}"),
        }
    }
}

fn links(neighbour: i32) {
    without_dad();
    for n in 0..2 {
        ip(&format!("link add eth{n} type veth peer name agent{n}"));
        ip(&format!("link set agent{n} netns {neighbour}"));
        ip(&format!("link set eth{n} up"));
    }
}

fn arguments() -> GoArgs {
    GoArgs {
        destination: "vms2".to_owned(),
        domain: None,
        idle_interface: None,
        no_configure: false,
        interface_identifier: Scheme::StablePrivacy,
        secret: Some("00112233445566778899aabbccddeeff".to_owned()),
        json: true,
    }
}

#[test]
fn move_ends_with_an_address_of_the_destination_on_the_idle_nic() {
    in_namespace(|| {
        let neighbour = Neighbour::start(|| agent(None));
        links(neighbour.tid);
        neighbour.run();
        go(&arguments()).unwrap();
        let address = neighbour.result().expect("no address named");
        let addresses = ip("-6 -o address show dev eth1 scope global");
        assert!(addresses.contains(&format!("{address}/64")), "{addresses}");
        assert!(ip("-6 route show dev eth1").contains("2001:db8:2::/64"));
        assert_eq!(ip("-6 -o address show dev eth0 scope global"), "");
    });
}

#[test]
fn refusal_is_verbatim_and_leaves_the_nics_alone() {
    in_namespace(|| {
        let reason = "Domain \"viewer\" is already migrating to \"vms3\"";
        let neighbour = Neighbour::start(move || agent(Some(reason)));
        links(neighbour.tid);
        neighbour.run();
        let error = go(&arguments()).expect_err("moved");
        assert_eq!(format!("{error:#}"), reason);
        neighbour.result();
        assert_eq!(ip("-6 -o address show dev eth1 scope global"), "");
    });
}

#[test]
fn missing_idle_nic_is_named_before_anything_is_asked() {
    in_namespace(|| {
        let neighbour = Neighbour::start(|| agent(None));
        links(neighbour.tid);
        // The agent keeps waiting for a request that must not arrive.
        neighbour.run();
        let arguments = GoArgs {
            idle_interface: Some("eth7".to_owned()),
            ..arguments()
        };
        let error = go(&arguments).expect_err("moved");
        assert!(
            error
                .to_string()
                .starts_with("There is no Ethernet NIC eth7"),
            "{error}"
        );
    });
}

#[test]
fn namespace_without_nics_is_told_so() {
    in_namespace(|| {
        let error = go(&arguments()).expect_err("moved");
        assert!(
            error.to_string().starts_with("No Ethernet NIC is up"),
            "{error}"
        );
    });
}
