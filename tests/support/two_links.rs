//! A host whose bridge is on one link, and a destination on another behind a router.
//!
//! ```text
//!   TAPs -- br0 (host) -- up0 -- r0 (router) r1 -- d0 (destination)
//! ```

use std::fs;
use std::net::Ipv6Addr;

use common::mat::neutral::neutral;

use super::netns::Namespace;

/// The router on the host's link.
pub const ROUTER: &str = "2001:db8:1::fe";

/// Returns an address in the prefix of a link: 1 is the host's link, 2 the destination's.
pub fn moa(prefix: u16) -> Ipv6Addr {
    let hoa: Ipv6Addr = "fd5e:6d61:74::1".parse().unwrap();
    let any = Ipv6Addr::new(0x2001, 0xdb8, prefix, 0, 0x1234, 0x5678, 0x9abc, 0);
    neutral(any.octets(), hoa.octets()).into()
}

/// The namespaces of host, router and destination.
pub struct Net {
    /// Host with the bridge.
    pub host: Namespace,
    /// Router between both links.
    pub router: Namespace,
    /// Host on the other link.
    pub destination: Namespace,
}

impl Net {
    /// Makes the namespaces with all routes; the destination has the address [`moa`] of link 2.
    pub fn new() -> Self {
        let net = Self {
            host: Namespace::new("host"),
            router: Namespace::new("router"),
            destination: Namespace::new("dest"),
        };
        net.host.add_bridge("br0");
        net.host.add_peer("br0", "up0", &net.router, "r0");
        net.host
            .ip(&format!("route add default via {ROUTER} dev br0"));
        let peer = net.destination.name();
        net.router
            .ip(&format!("link add r1 type veth peer name d0 netns {peer}"));
        net.router.ip("link set r1 up");
        net.destination.ip("link set d0 up");
        net.router.run(|| {
            fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        });
        net.router.ip(&format!("addr add {ROUTER}/64 dev r0 nodad"));
        net.router.ip("addr add 2001:db8:2::fe/64 dev r1 nodad");
        let new = moa(2);
        net.destination
            .ip(&format!("addr add {new}/64 dev d0 nodad"));
        net.destination.ip("route add default via 2001:db8:2::fe");
        net
    }
}
