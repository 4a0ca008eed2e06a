//! Connections of strangers that say nothing.

use std::net::{Ipv6Addr, SocketAddr, TcpStream};

use roamcast::proto::Mac;
use socket2::{Domain, Socket, Type};

use super::agent::{ADDRESS, Agent, domain};
use super::netns::{Namespace, privileged, wait_for};

const MAC: Mac = [0x52, 0x54, 0, 0, 0, 7];
/// Prefixes of the attacker, and connections from each.
const PREFIXES: u16 = 25;
const OF_PREFIX: u16 = 8;

fn address(prefix: u16, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0xa, prefix, 0, 0, 0, host)
}

fn connect(from: Ipv6Addr) -> TcpStream {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    socket.connect(&SocketAddr::from(ADDRESS).into()).unwrap();
    socket.into()
}

#[test]
fn silent_connections_of_many_prefixes_do_not_lock_a_peer_out() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    for prefix in 0..PREFIXES {
        for number in 1..=OF_PREFIX {
            let address = address(prefix, number);
            host.ip(&format!("addr add {address}/128 dev lo nodad"));
        }
    }
    host.run_with_bpffs(|bpffs| {
        let agent = Agent::start(bpffs, &[domain("victim", 1, "tap0", MAC)], "");
        let silent: Vec<TcpStream> = (0..PREFIXES)
            .flat_map(|prefix| (1..=OF_PREFIX).map(move |host| connect(address(prefix, host))))
            .collect();
        // It has its verdict while they are there.
        agent.peer("vms2");
        wait_for("the refusals", || {
            (agent.counter("connections_too_many_handshakes") > 0).then_some(())
        });
        drop(silent);
    });
}
