//! Many datagrams in one system call: `sendmmsg(2)` and `recvmmsg(2)`.
#![allow(unsafe_code, reason = "both calls take arrays of pointers")]

use std::io;
use std::net::SocketAddrV6;
use std::os::fd::{AsFd, AsRawFd as _};
use std::ptr;

use libc::{iovec, mmsghdr, sockaddr_in6};

/// Datagrams of one call.
pub const BATCH: usize = 64;

/// One payload, to be sent many times to where a socket is connected to.
pub struct Repeated {
    headers: Vec<mmsghdr>,
    /// What the headers point to, neither moved nor changed while they exist.
    _iovec: Box<iovec>,
    _payload: Box<[u8]>,
}

impl Repeated {
    pub fn new(payload: Vec<u8>) -> Self {
        let mut payload = payload.into_boxed_slice();
        let mut iovec = Box::new(vector(&mut payload));
        let header = header(&raw mut *iovec, None);
        Self {
            headers: vec![header; BATCH],
            _iovec: iovec,
            _payload: payload,
        }
    }

    /// Sends up to [`BATCH`] datagrams; returns how many were.
    pub fn send(&mut self, socket: &impl AsFd, count: usize) -> io::Result<usize> {
        send(socket, &mut self.headers, count)
    }
}

/// Datagrams that are received and sent on as they are.
pub struct Received {
    headers: Vec<mmsghdr>,
    iovecs: Vec<iovec>,
    buffers: Vec<u8>,
}

/// Longest datagram, bytes.
const LONGEST: usize = 2048;

impl Received {
    pub fn new() -> Self {
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

    /// Waits for the first datagram and takes what else is there; returns how many.
    pub fn receive(&mut self, socket: &impl AsFd) -> io::Result<usize> {
        for iovec in &mut self.iovecs {
            iovec.iov_len = LONGEST;
        }
        // SAFETY: the headers point to live vectors, and those to live buffers of their length.
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

    /// Sends the first ones to where a socket is connected to; returns how many were.
    pub fn send(&mut self, socket: &impl AsFd, count: usize) -> io::Result<usize> {
        send(socket, &mut self.headers, count)
    }

    /// The first ones.
    pub fn datagrams(&self, count: usize) -> impl Iterator<Item = &[u8]> {
        self.iovecs
            .iter()
            .zip(self.buffers.chunks(LONGEST))
            .take(count)
            .filter_map(|(iovec, buffer)| buffer.get(..iovec.iov_len))
    }
}

/// One payload, to be sent to many addresses.
pub struct FanOut {
    headers: Vec<mmsghdr>,
    iovec: Box<iovec>,
    /// What the headers point to.
    _names: Box<[sockaddr_in6]>,
}

impl FanOut {
    pub fn new(addresses: &[SocketAddrV6]) -> Self {
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

    /// Sends it to all.
    pub fn send(&mut self, socket: &impl AsFd, payload: &[u8]) -> io::Result<usize> {
        // The kernel reads what it is to send, and no more.
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
    // SAFETY: `count` headers are there, and what they point to lives as long as their owner.
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
