//! Connections of strangers that stay silent or arrive without end.

use std::collections::VecDeque;
use std::fs;
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use roamcast::proto::Mac;
use socket2::{Domain, Socket, Type};
use support::agent::{ADDRESS, Agent, domain};
use support::netns::{Namespace, privileged, wait_for};

const MAC: Mac = [0x52, 0x54, 0, 0, 0, 7];
/// The attacker's prefixes, and connections from each.
const PREFIXES: u16 = 25;
const OF_PREFIX: u16 = 8;
/// Limit of connections; a slow machine makes as many as the time allows.
const CONNECTIONS: usize = 100_000;
const LONGEST: Duration = Duration::from_secs(60);
/// Connections that the attacker keeps open.
const KEPT: usize = 400;
/// Limit of additional descriptors of the agent: the slots for strangers and for known addresses,
/// and connections that were just refused.
const DESCRIPTORS: usize = 150;
/// Limit of the agent's memory growth, KiB.
const GROWTH: u64 = 16 * 1024;

fn address(prefix: u16, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0xa, prefix, 0, 0, 0, host)
}

/// Adds all of the attacker's addresses.
fn add_addresses(host: &Namespace) {
    for prefix in 0..PREFIXES {
        for number in 1..=OF_PREFIX {
            let address = address(prefix, number);
            host.ip(&format!("addr add {address}/128 dev lo nodad"));
        }
    }
}

/// Returns the number of open descriptors of a process.
fn descriptors(process: u32) -> usize {
    fs::read_dir(format!("/proc/{process}/fd")).unwrap().count()
}

fn connect(from: Ipv6Addr) -> TcpStream {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    socket.connect(&SocketAddr::from(ADDRESS).into()).unwrap();
    socket.into()
}

/// Runs an attack on an agent on a host with the attacker's addresses.
fn with_agent(attack: impl FnOnce(&Agent) + Send) {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    add_addresses(&host);
    host.run_with_bpffs(|bpffs| {
        let agent = Agent::start(bpffs, &[domain("victim", 1, "tap0", MAC)], "");
        attack(&agent);
    });
}

#[test]
fn silent_connections_of_many_prefixes_do_not_lock_a_peer_out() {
    with_agent(|agent| {
        let silent: Vec<TcpStream> = (0..PREFIXES)
            .flat_map(|prefix| (1..=OF_PREFIX).map(move |host| connect(address(prefix, host))))
            .collect();
        // A known peer is accepted while the strangers are connected.
        agent.peer("vms2");
        wait_for("the refusals", || {
            (agent.counter("connections_too_many_handshakes") > 0).then_some(())
        });
        drop(silent);
    });
}

#[test]
fn a_hundred_thousand_connections_cost_little_and_lock_no_peer_out() {
    with_agent(|agent| {
        let process = agent.child.id();
        let (memory, before) = (agent.peak_memory(), descriptors(process));
        let (mut most, mut made) = (0, 0);
        let mut kept = VecDeque::new();
        let end = Instant::now() + LONGEST;
        while made < CONNECTIONS && Instant::now() < end {
            for prefix in 0..PREFIXES {
                for number in 1..=OF_PREFIX {
                    kept.push_back(connect(address(prefix, number)));
                    made += 1;
                }
                kept.drain(..kept.len().saturating_sub(KEPT));
            }
            most = most.max(descriptors(process));
            if made % 20_000 == 0 {
                let number = 2 + made / 20_000;
                agent.peer(&format!("vms{number}"));
            }
        }
        println!("{made} connections, at most {most} descriptors, {before} before");
        assert!(made >= 10_000, "{made}");
        assert!(most < before + DESCRIPTORS, "{most}, {before} before");
        agent.peer("vms2");
        drop(kept);
        wait_for("what strangers had open", || {
            (descriptors(process) <= before + 2).then_some(())
        });
        let grown = agent.peak_memory() - memory;
        println!("{grown} KiB");
        assert!(grown < GROWTH, "{grown} KiB");
    });
}
