//! The XDP program of an interface, read by `RTM_GETLINK`.

use std::io;

use linux::netlink::Netlink;
use netlink_packet_route::link::{LinkAttribute, LinkXdp};

/// Returns the identifier of the XDP program on an interface, in any mode; `None` if there is none.
///
/// # Errors
///
/// The error of netlink, for instance that the interface does not exist.
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
