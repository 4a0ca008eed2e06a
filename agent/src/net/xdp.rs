//! The XDP program of an interface, as its link tells.

use std::io;

use linux::netlink::Netlink;
use netlink_packet_route::link::{LinkAttribute, LinkXdp};

/// Identifier of the XDP program on an interface, in whatever mode; `None` if there is none.
///
/// # Errors
///
/// What the kernel says, for instance that the interface is gone.
pub fn program(ifindex: u32) -> io::Result<Option<u32>> {
    let link = Netlink::open()?.link(ifindex)?;
    let mut settings = link
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            LinkAttribute::Xdp(settings) => Some(settings),
            _ => None,
        })
        .flatten();
    Ok(settings.find_map(|setting| match setting {
        LinkXdp::ProgId(id) => Some(*id),
        _ => None,
    }))
}
