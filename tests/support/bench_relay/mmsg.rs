//! Many datagrams in one system call: `sendmmsg(2)` and `recvmmsg(2)`.
#![allow(unsafe_code, reason = "both calls take arrays of pointers")]

use std::io;
use std::net::SocketAddrV6;
use std::os::fd::{AsFd, AsRawFd as _};
use std::ptr;

use libc::{iovec, mmsghdr, sockaddr_in6};

/// Limit of datagrams per system call.
pub(super) const BATCH: usize = 64;

/// One payload for many datagrams to the address that a socket is connected to.
pub(super) struct Repeated {
    headers: Vec<mmsghdr>,
    /// Targets of the pointers in `headers`; must neither move nor change while `headers` exists.
    _iovec: Box<iovec>,
    _payload: Box<[u8]>,
}

impl Repeated {
    pub(super) fn new(payload: Vec<u8>) -> Self {
        let mut payload = payload.into_boxed_slice();
        let mut iovec = Box::new(vector(&mut payload));
        let header = header(&raw mut *iovec, None);
        Self {
            headers: vec![header; BATCH],
            _iovec: iovec,
            _payload: payload,
        }
    }

    /// Sends up to [`BATCH`] datagrams. Returns the number sent.
    pub(super) fn send(&mut self, socket: &impl AsFd, count: usize) -> io::Result<usize> {
        send(socket, &mut self.headers, count)
    }
}

/// Buffers for received datagrams, which can be forwarded unchanged.
pub(super) struct Received {
    headers: Vec<mmsghdr>,
    iovecs: Vec<iovec>,
    buffers: Vec<u8>,
}

/// Size of the buffer for one datagram, bytes; a longer datagram is truncated.
const LONGEST: usize = 2048;

impl Received {
    pub(super) fn new() -> Self {
        let mut buffers = vec![0; BATCH * LONGEST];
        let mut iovecs: Vec<iovec> = buffers.chunks_mut(LONGEST).map(vector).collect();
        let headers = iovecs
            .iter_mut()
            .map(|iovec| header(&raw mut *iovec, None))
            .collect();
        Self {
            headers,
            iovecs,
            buffers,
        }
    }

    /// Waits for the first datagram and takes the other waiting datagrams. Returns the number
    /// received.
    pub(super) fn receive(&mut self, socket: &impl AsFd) -> io::Result<usize> {
        for iovec in &mut self.iovecs {
            iovec.iov_len = LONGEST;
        }
        // SAFETY: the headers point to live vectors, and the vectors point to live buffers of their
        // length.
        let result = unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_WAITFORONE,
                ptr::null_mut(),
            )
        };
        let count = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        for (iovec, header) in self.iovecs.iter_mut().zip(&self.headers).take(count) {
            iovec.iov_len = (header.msg_len as usize).min(LONGEST);
        }
        Ok(count)
    }

    /// Sends the first `count` datagrams to the address that the socket is connected to. Returns
    /// the number sent.
    pub(super) fn send(&mut self, socket: &impl AsFd, count: usize) -> io::Result<usize> {
        send(socket, &mut self.headers, count)
    }

    /// Returns the first `count` datagrams.
    pub(super) fn datagrams(&self, count: usize) -> impl Iterator<Item = &[u8]> {
        self.iovecs
            .iter()
            .zip(self.buffers.chunks(LONGEST))
            .take(count)
            .filter_map(|(iovec, buffer)| buffer.get(..iovec.iov_len))
    }
}

/// One payload for datagrams to many addresses.
pub(super) struct FanOut {
    headers: Vec<mmsghdr>,
    iovec: Box<iovec>,
    /// Targets of the address pointers in `headers`.
    _names: Box<[sockaddr_in6]>,
}

impl FanOut {
    pub(super) fn new(addresses: &[SocketAddrV6]) -> Self {
        let mut names: Box<[sockaddr_in6]> = addresses.iter().map(name).collect();
        let mut iovec = Box::new(vector(&mut []));
        let target = &raw mut *iovec;
        let headers = names
            .iter_mut()
            .map(|name| header(target, Some(name)))
            .collect();
        Self {
            headers,
            iovec,
            _names: names,
        }
    }

    /// Sends the payload to all addresses. Returns the number of datagrams sent.
    pub(super) fn send(&mut self, socket: &impl AsFd, payload: &[u8]) -> io::Result<usize> {
        // `sendmmsg` only reads the payload, so the cast to a mutable pointer is harmless.
        self.iovec.iov_base = payload.as_ptr().cast_mut().cast();
        self.iovec.iov_len = payload.len();
        let count = self.headers.len();
        let sent = send(socket, &mut self.headers, count);
        self.iovec.iov_len = 0;
        sent
    }
}

fn send(socket: &impl AsFd, headers: &mut [mmsghdr], count: usize) -> io::Result<usize> {
    let count = count.min(headers.len());
    // SAFETY: at least `count` headers exist, and their owner keeps the targets of their pointers
    // alive.
    let result = unsafe {
        libc::sendmmsg(
            socket.as_fd().as_raw_fd(),
            headers.as_mut_ptr(),
            count as u32,
            0,
        )
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn vector(bytes: &mut [u8]) -> iovec {
    iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

fn header(iovec: *mut iovec, name: Option<&mut sockaddr_in6>) -> mmsghdr {
    // SAFETY: an all-zero header is valid.
    let mut header: mmsghdr = unsafe { std::mem::zeroed() };
    header.msg_hdr.msg_iov = iovec;
    header.msg_hdr.msg_iovlen = 1;
    if let Some(name) = name {
        header.msg_hdr.msg_name = (&raw mut *name).cast();
        header.msg_hdr.msg_namelen = size_of::<sockaddr_in6>() as u32;
    }
    header
}

fn name(address: &SocketAddrV6) -> sockaddr_in6 {
    sockaddr_in6 {
        sin6_family: libc::AF_INET6 as libc::sa_family_t,
        sin6_port: address.port().to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr {
            s6_addr: address.ip().octets(),
        },
        sin6_scope_id: 0,
    }
}
