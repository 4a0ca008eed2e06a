use super::*;
use crate::interface;
use crate::testing::{in_namespace, ip};

const PLAN: Plan = Plan {
    address: Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x99),
    prefix_length: 64,
    agent_address: Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x10),
    router: None,
};

fn sysctl(name: &str) -> String {
    let path = format!("/proc/sys/net/ipv6/conf/idle/{name}");
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

fn idle() -> Interface {
    let mut netlink = Netlink::open().unwrap();
    let interfaces = interface::list(&mut netlink).unwrap();
    interfaces.into_iter().find(|i| i.name == "idle").unwrap()
}

fn prepare() -> Result<IdleNic, NicError> {
    IdleNic::prepare(Netlink::open().unwrap(), idle(), PLAN)
}

fn addresses() -> String {
    ip("-6 -o address show dev idle scope global")
}

fn routes() -> String {
    ip("-6 route show dev idle")
}

#[test]
fn prepared_nic_has_the_address_and_a_route_to_the_agent_only() {
    in_namespace(|| {
        ip("link add idle type veth peer name other");
        ip("link set other up");
        let nic = prepare().unwrap();
        assert_eq!(sysctl("accept_ra"), "0");
        assert_eq!(sysctl("autoconf"), "0");
        let addresses = addresses();
        assert!(addresses.contains("2001:db8:2::99/64"), "{addresses}");
        assert!(
            addresses.contains("nodad") && addresses.contains("noprefixroute"),
            "{addresses}"
        );
        assert!(!addresses.contains("tentative"), "{addresses}");
        let routes = routes();
        assert!(routes.contains("2001:db8:2::10"), "{routes}");
        assert!(!routes.contains("2001:db8:2::/64"), "{routes}");
        assert!(idle().up);
        drop(nic);
    });
}

#[test]
fn dropped_nic_is_as_it_was() {
    in_namespace(|| {
        ip("link add idle type veth peer name other");
        ip("link set other up");
        std::fs::write("/proc/sys/net/ipv6/conf/idle/accept_ra", "2").unwrap();
        drop(prepare().unwrap());
        assert_eq!(sysctl("accept_ra"), "2");
        assert_eq!(sysctl("autoconf"), "1");
        assert_eq!(addresses(), "");
        assert!(!routes().contains("2001:db8:2"), "{}", routes());
        assert!(!idle().up);
    });
}

#[test]
fn settled_nic_is_on_the_prefix_and_takes_advertisements() {
    in_namespace(|| {
        ip("link add idle type veth peer name other");
        ip("link set other up");
        let errors = prepare().unwrap().settle();
        // The solicitation needs a link-local address, which may still be tentative here.
        let errors: Vec<_> = errors
            .iter()
            .filter(|e| e.step != "ask for routers")
            .collect();
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!(sysctl("accept_ra"), "1");
        let routes = routes();
        assert!(routes.contains("2001:db8:2::/64"), "{routes}");
        assert!(!routes.contains("2001:db8:2::10 "), "{routes}");
        assert!(addresses().contains("2001:db8:2::99/64"));
    });
}

#[test]
fn network_that_was_left_may_be_come_back_to() {
    in_namespace(|| {
        ip("link add idle type veth peer name other");
        ip("link set other up");
        prepare().unwrap().settle();
        let elsewhere = Plan {
            address: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x99),
            prefix_length: 64,
            agent_address: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10),
            router: None,
        };
        let nic = IdleNic::prepare(Netlink::open().unwrap(), idle(), elsewhere).unwrap();
        assert!(routes().contains("2001:db8:2::/64"), "{}", routes());
        nic.settle();
        assert!(!routes().contains("2001:db8:2::"), "{}", routes());
        assert!(routes().contains("2001:db8:1::/64"), "{}", routes());
        // Here the address is known already, and an aborted move leaves it alone.
        drop(prepare().unwrap());
        assert!(addresses().contains("2001:db8:2::99/64"));
        prepare().unwrap().settle();
        assert!(routes().contains("2001:db8:2::/64"), "{}", routes());
        assert!(!routes().contains("2001:db8:1::/64"), "{}", routes());
    });
}

#[test]
fn failed_preparation_leaves_nothing_behind() {
    in_namespace(|| {
        ip("link add idle type veth peer name other");
        // Less than IPv6 needs, so that it has no addresses.
        ip("link set idle mtu 1200");
        let error = prepare().map(drop).expect_err("prepared");
        assert!(error.to_string().contains(" on idle"), "{error}");
        assert_eq!(addresses(), "");
        assert!(!routes().contains("2001:db8:2::10"), "{}", routes());
    });
}

#[test]
fn joined_nic_goes_back_to_what_it_was() {
    in_namespace(|| {
        ip("link add idle type veth peer name other");
        ip("link set other up");
        ip("link set idle up");
        let plan = Plan {
            router: Some(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1)),
            ..PLAN
        };
        let netlink = || Netlink::open().unwrap();
        let mut nic = IdleNic::prepare(netlink(), idle(), plan).unwrap();
        nic.join();
        assert!(routes().contains("2001:db8:2::/64"), "{}", routes());
        assert!(
            routes().contains("default via 2001:db8:2::1"),
            "{}",
            routes()
        );
        drop(nic);
        assert!(!routes().contains("2001:db8:2"), "{}", routes());
        let nic = IdleNic::prepare(netlink(), idle(), plan).unwrap();
        nic.settle();
        assert!(
            routes().contains("default via 2001:db8:2::1"),
            "{}",
            routes()
        );
        assert!(!routes().contains("2001:db8:2::10 "), "{}", routes());
        // And elsewhere again.
        leave(&mut netlink(), idle().ifindex, plan.address).unwrap();
        assert!(!routes().contains("2001:db8:2"), "{}", routes());
        assert!(routes().contains("fe80::/64"), "{}", routes());
    });
}

#[test]
fn nic_with_the_default_route_is_the_likeliest() {
    in_namespace(|| {
        ip("link add nic0 type veth peer name nic1");
        ip("link add nic2 type veth peer name idle");
        for name in ["nic0", "nic1", "nic2", "idle"] {
            ip(&format!("link set {name} up"));
        }
        ip("address add 2001:db8:2::99/64 dev nic2 nodad");
        ip("address add 2001:db8:3::99/64 dev idle nodad");
        ip("-6 route add default via 2001:db8:3::1 dev idle");
        let mut netlink = Netlink::open().unwrap();
        let names: Vec<String> = interface::list(&mut netlink)
            .unwrap()
            .into_iter()
            .map(|interface| interface.name)
            .collect();
        assert_eq!(
            names.get(..2),
            Some(&["idle".to_owned(), "nic2".to_owned()][..]),
            "{names:?}"
        );
        assert!(!names.contains(&"lo".to_owned()), "{names:?}");
    });
}
