//! The XDP program of an interface, as its link tells.

use std::io;

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};

use super::netlink::{Requests, serialized};

/// Identifier of the XDP program on an interface, in whatever mode; `None` if there is none.
///
/// # Errors
///
/// What the kernel says, for instance that the interface is gone.
pub fn program(ifindex: u32) -> io::Result<Option<u32>> {
    let mut request = LinkMessage::default();
    request.header.index = ifindex;
    let request = serialized(RouteNetlinkMessage::GetLink(request), 0);
    let answer = Requests::open()?
        .get(request)?
        .map_err(|refusal| refusal.error)?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) = answer.payload else {
        return Ok(None);
    };
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
