//! The bridge's link goes down and up while the agent listens for neighbour messages.

use common::wire::neighbour::probe;
use roamcast::net::link_addresses::LinkAddresses;
use roamcast::proto::{AddressCommand, AddressEvent, Said};
use support::netns::{DEADLINE, Namespace, privileged};
use support::wire::Wire;

const ADDRESS: &str = "2001:db8:1::77";
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x77];

#[test]
fn neighbours_are_heard_again_after_the_link_was_down() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let neighbour = Namespace::new("neighbour");
    host.add_peer("br0", "up0", &neighbour, "eth0");
    let eth0 = neighbour.ifindex("eth0");
    let wire = neighbour.run(|| Wire::new(eth0));
    let bridge = host.ifindex("br0");
    host.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut addresses = LinkAddresses::open("br0", bridge).unwrap();
            let address = ADDRESS.parse().unwrap();
            addresses.perform(&AddressCommand::Watch { address });
            hear(&mut addresses, &wire).await;
            for state in ["down", "up"] {
                host.ip(&format!("link set br0 {state}"));
            }
            hear(&mut addresses, &wire).await;
        });
    });
}

/// Solicits the address until the agent reports a Solicitation.
async fn hear(addresses: &mut LinkAddresses, wire: &Wire) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    let mut sent = 0_u8;
    loop {
        assert!(tokio::time::Instant::now() < deadline, "nothing is heard");
        sent = sent.wrapping_add(1);
        let target = common::testing::frame::address(ADDRESS);
        wire.send(&probe(&target, MAC, [sent; 6]));
        let wait = std::time::Duration::from_millis(50);
        let heard = tokio::time::timeout(wait, addresses.next()).await;
        if let Ok(Some(AddressEvent::Heard { said, .. })) = heard {
            assert_eq!(said, Said::Wants);
            break;
        }
    }
    // Discard the reports of earlier Solicitations.
    let wait = std::time::Duration::from_millis(50);
    while tokio::time::timeout(wait, addresses.next()).await.is_ok() {}
}
