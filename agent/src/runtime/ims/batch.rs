//! Batches of datagrams: one `recvmmsg(2)` or `sendmmsg(2)` call moves many datagrams. Each
//! datagram carries the address of this host to which it was, or from which it is, sent
//! (`IPV6_PKTINFO`, RFC 3542 §6).
#![allow(
    unsafe_code,
    reason = "both calls take arrays of pointers, and no crate sends control messages of their own with each datagram"
)]

use std::io;
use std::mem::zeroed;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use common::signal::MAX_DATAGRAM_BYTES;
use libc::{cmsghdr, in6_pktinfo, iovec, mmsghdr, sockaddr_in6};

use crate::proto::ims::{Path, Reply};

/// Most datagrams per call.
pub(super) const BATCH: usize = 64;
/// Size of a receive buffer: one byte more than the longest message, to detect longer datagrams.
const BUFFER_BYTES: usize = MAX_DATAGRAM_BYTES + 1;
/// Room for the control message, in words, which align it.
const CONTROL_WORDS: usize = 8;
const CONTROL_BYTES: usize = CONTROL_WORDS * size_of::<u64>();
const INFO_BYTES: u32 = size_of::<in6_pktinfo>() as u32;

// SAFETY: `CMSG_SPACE` only computes.
const _: () = assert!(unsafe { libc::CMSG_SPACE(INFO_BYTES) } as usize <= CONTROL_BYTES);

/// Buffers and headers of one call. Each call sets all pointers of the headers again, so the
/// vectors may move between calls.
pub(super) struct Batch {
    headers: Vec<mmsghdr>,
    names: Vec<sockaddr_in6>,
    vectors: Vec<iovec>,
    controls: Vec<[u64; CONTROL_WORDS]>,
    buffers: Vec<[u8; BUFFER_BYTES]>,
}

// SAFETY: pointers are dereferenced only in calls that have just set them.
unsafe impl Send for Batch {}

impl Batch {
    pub(super) fn new() -> Self {
        // SAFETY: all zeros are valid for these structures of numbers and pointers.
        let (header, name, vector) = unsafe { (zeroed(), zeroed(), zeroed()) };
        Self {
            headers: vec![header; BATCH],
            names: vec![name; BATCH],
            vectors: vec![vector; BATCH],
            controls: vec![[0; CONTROL_WORDS]; BATCH],
            buffers: vec![[0; BUFFER_BYTES]; BATCH],
        }
    }

    /// Points header `index` at its name, vector and control message.
    fn prepare(&mut self, index: usize, base: *mut u8, length: usize, control_bytes: usize) {
        self.vectors[index] = iovec {
            iov_base: base.cast(),
            iov_len: length,
        };
        let header = &mut self.headers[index].msg_hdr;
        header.msg_name = (&raw mut self.names[index]).cast();
        header.msg_namelen = size_of::<sockaddr_in6>() as u32;
        header.msg_iov = &raw mut self.vectors[index];
        header.msg_iovlen = 1;
        header.msg_control = self.controls[index].as_mut_ptr().cast();
        header.msg_controllen = control_bytes;
        header.msg_flags = 0;
    }

    /// Receives waiting datagrams, at most [`BATCH`], and calls `each` for each of them. Returns
    /// their number; fails with [`io::ErrorKind::WouldBlock`] if none waits.
    pub(super) fn receive(
        &mut self,
        socket: &impl AsFd,
        mut each: impl FnMut(Path, &[u8]),
    ) -> io::Result<usize> {
        for index in 0..BATCH {
            let base = self.buffers[index].as_mut_ptr();
            self.prepare(index, base, BUFFER_BYTES, CONTROL_BYTES);
        }
        // SAFETY: every header points at live memory of the length that it names, set just above;
        // nothing else uses the memory during the call.
        let result = unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        let count = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        for index in 0..count.min(BATCH) {
            let length = (self.headers[index].msg_len as usize).min(BUFFER_BYTES);
            let info = self.info(index);
            let local = Ipv6Addr::from(info.ipi6_addr.s6_addr);
            let path = Path {
                remote: address(&self.names[index]),
                // A multicast address cannot be the source of an answer.
                local: if local.is_multicast() {
                    Ipv6Addr::UNSPECIFIED
                } else {
                    local
                },
                ifindex: info.ipi6_ifindex,
            };
            each(path, &self.buffers[index][..length]);
        }
        Ok(count)
    }

    /// Returns the destination address of a received datagram; unspecified if the kernel does not
    /// say.
    fn info(&self, index: usize) -> in6_pktinfo {
        let header = &self.headers[index].msg_hdr;
        // SAFETY: an all-zero structure of numbers is valid. The kernel has filled the control
        // buffer with well-formed messages and set its length, and `msg_control` still points at
        // the buffer; the read assumes no alignment of the data.
        unsafe {
            let mut message = libc::CMSG_FIRSTHDR(header);
            while let Some(&cmsghdr {
                cmsg_level,
                cmsg_type,
                cmsg_len,
            }) = message.as_ref()
            {
                let long_enough = cmsg_len >= libc::CMSG_LEN(INFO_BYTES) as usize;
                if (cmsg_level, cmsg_type) == (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO)
                    && long_enough
                {
                    return libc::CMSG_DATA(message)
                        .cast::<in6_pktinfo>()
                        .read_unaligned();
                }
                message = libc::CMSG_NXTHDR(header, message);
            }
            zeroed()
        }
    }

    /// Sends replies, at most [`BATCH`], without blocking. Returns the number sent, or the error of
    /// the first reply.
    pub(super) fn send(&mut self, socket: &impl AsFd, replies: &[Reply]) -> io::Result<usize> {
        let count = replies.len().min(BATCH);
        for (index, reply) in replies.iter().take(count).enumerate() {
            self.names[index] = name(&reply.path.remote);
            // SAFETY: `CMSG_SPACE` only computes.
            let space = unsafe { libc::CMSG_SPACE(INFO_BYTES) } as usize;
            // The kernel only reads these bytes.
            let base = reply.bytes.as_ptr().cast_mut();
            self.prepare(index, base, reply.bytes.len(), space);
            self.set_info(index, &reply.path);
        }
        // SAFETY: `count` headers point at live memory of the length that they name, set just
        // above.
        let result = unsafe {
            libc::sendmmsg(
                socket.as_fd().as_raw_fd(),
                self.headers.as_mut_ptr(),
                count as u32,
                libc::MSG_DONTWAIT,
            )
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Sets the source of a reply to the destination address of its request.
    fn set_info(&mut self, index: usize, path: &Path) {
        let on_link = path.remote.ip().is_unicast_link_local();
        let info = in6_pktinfo {
            ipi6_addr: libc::in6_addr {
                s6_addr: path.local.octets(),
            },
            // For other addresses the route decides; it may use another interface than the request.
            ipi6_ifindex: if on_link { path.ifindex } else { 0 },
        };
        let header = &self.headers[index].msg_hdr;
        // SAFETY: the control buffer has room for this one message (asserted above) and is aligned
        // for its header.
        unsafe {
            let message = libc::CMSG_FIRSTHDR(header);
            if let Some(fields) = message.as_mut() {
                fields.cmsg_level = libc::IPPROTO_IPV6;
                fields.cmsg_type = libc::IPV6_PKTINFO;
                fields.cmsg_len = libc::CMSG_LEN(INFO_BYTES) as usize;
                libc::CMSG_DATA(message)
                    .cast::<in6_pktinfo>()
                    .write_unaligned(info);
            }
        }
    }
}

fn address(name: &sockaddr_in6) -> SocketAddrV6 {
    SocketAddrV6::new(
        name.sin6_addr.s6_addr.into(),
        u16::from_be(name.sin6_port),
        0,
        name.sin6_scope_id,
    )
}

fn name(address: &SocketAddrV6) -> sockaddr_in6 {
    sockaddr_in6 {
        sin6_family: libc::AF_INET6 as libc::sa_family_t,
        sin6_port: address.port().to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr {
            s6_addr: address.ip().octets(),
        },
        sin6_scope_id: address.scope_id(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::ims::socket;
    use std::net::UdpSocket;
    use std::time::{Duration, Instant};

    #[test]
    fn datagrams_are_answered_from_where_they_were_sent_to() {
        let server = socket::bind("[::]:0".parse().unwrap()).unwrap();
        let port = server
            .local_addr()
            .unwrap()
            .as_socket_ipv6()
            .unwrap()
            .port();
        let client = UdpSocket::bind("[::1]:0").unwrap();
        // A connected socket accepts no answer from another address.
        client.connect(("::1", port)).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        for number in 0..3_u8 {
            client.send(&[number; 9]).unwrap();
        }
        client.send(&[7; 3000]).unwrap();
        let mut batch = Batch::new();
        let mut replies = Vec::new();
        let mut longest = 0;
        let deadline = Instant::now() + Duration::from_secs(5);
        while replies.len() < 4 && Instant::now() < deadline {
            let result = batch.receive(&server, |path, bytes| {
                assert_eq!(path.local, Ipv6Addr::LOCALHOST);
                longest = longest.max(bytes.len());
                let bytes = bytes.iter().take(9).copied().collect();
                replies.push(Reply { path, bytes });
            });
            let would_block = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
            assert!(result.is_ok() || result.is_err_and(|it| would_block(&it)));
        }
        assert_eq!(longest, BUFFER_BYTES);
        assert_eq!(batch.send(&server, &replies).unwrap(), 4);
        let mut buffer = [0; 16];
        for number in [0, 1, 2, 7] {
            let length = client.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..length], [number; 9]);
        }
    }
}
