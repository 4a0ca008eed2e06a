//! The UDP socket on the bridge between the agent and its VMs.
//!
//! UDP over IPv6 link-local, joined to ff02::1. The eBPF program on a VM's TAP marks each
//! signalling datagram with the TAP's ifindex, and the socket delivers the mark as a control
//! message. The mark is the only attribute of a VM that the VM cannot forge. A datagram without a
//! mark did not arrive through a TAP; a socket filter in the kernel drops it. The agent marks its
//! own datagrams with [`AGENT_MARK`], and the program on the TAP's other direction passes
//! signalling only with that mark.

use std::io::{self, IoSliceMut};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsRawFd;

use common::signal::{MAX_DATAGRAM_BYTES, PORT};
use common::wire::signalling::AGENT_MARK;
use linux::socket_option;
use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// All nodes on the link (RFC 4291 §2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Hop limit of the agent's datagrams: 255 proves to a VM that the sender is on its link.
const HOP_LIMIT: u32 = 255;

/// Classic BPF opcodes: load a word, compare, return.
const LOAD_WORD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// `SKF_AD_OFF + SKF_AD_MARK`: offset that loads the packet's mark.
const MARK: u32 = (-0x1000_i32 + 20).cast_unsigned();

/// Why the socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum VmSocketError {
    /// The bridge does not exist.
    #[error(
        "There is no bridge `{bridge}` here; create it or correct `bridge` in the configuration"
    )]
    NoBridge {
        /// Name of the bridge as configured.
        bridge: String,
    },
    /// The kernel cannot report the mark of a datagram.
    #[error("The kernel does not know SO_RCVMARK ({error}); Linux 5.19 or newer is needed")]
    Mark {
        /// Error of `setsockopt(SO_RCVMARK)`.
        error: io::Error,
    },
    /// Another socket holds the port.
    #[error(
        "UDP port {port} is taken, on bridge `{bridge}` or for all interfaces, and who has it would get what VMs send to the agent; see who it is with `ss -ulpn sport = :{port}`, and stop it"
    )]
    Taken {
        /// Name of the bridge that the socket is bound to.
        bridge: String,
        /// UDP port that is taken, [`PORT`].
        port: u16,
    },
    /// A socket call failed.
    #[error("Cannot {action} on bridge `{bridge}`, UDP port {port}: {error}; run as root")]
    Socket {
        /// Call that failed, as an infinitive (`bind`).
        action: &'static str,
        /// Name of the bridge that the socket is for.
        bridge: String,
        /// UDP port of the signalling, [`PORT`].
        port: u16,
        /// Error of the kernel for that call.
        error: io::Error,
    },
}

/// A signalling datagram from a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDatagram {
    /// ifindex of the TAP through which the datagram arrived.
    pub mark: u32,
    /// Link-local sender address; the scope is the bridge.
    pub from: SocketAddrV6,
    /// Payload, at most [`MAX_DATAGRAM_BYTES`] bytes.
    pub bytes: Vec<u8>,
}

/// Socket for the signalling with the VMs of one bridge.
#[derive(Debug)]
pub struct VmSocket {
    socket: UdpSocket,
    ifindex: u32,
}

impl VmSocket {
    /// Opens the socket on a bridge, on the signalling port. Must be called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// See [`VmSocketError`].
    ///
    /// # Minimum kernel version
    ///
    /// 5.19
    pub fn open(bridge: &str) -> Result<Self, VmSocketError> {
        let ifindex =
            nix::net::if_::if_nametoindex(bridge).map_err(|_| VmSocketError::NoBridge {
                bridge: bridge.to_owned(),
            })?;
        let failed = |action| {
            move |error| VmSocketError::Socket {
                action,
                bridge: bridge.to_owned(),
                port: PORT,
                error,
            }
        };
        let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))
            .map_err(failed("open a socket"))?;
        socket
            .set_nonblocking(true)
            .and_then(|()| socket.set_only_v6(true))
            .and_then(|()| socket.bind_device(Some(bridge.as_bytes())))
            .and_then(|()| socket.set_unicast_hops_v6(HOP_LIMIT))
            .and_then(|()| socket.set_multicast_hops_v6(HOP_LIMIT))
            .and_then(|()| socket.set_multicast_loop_v6(false))
            .and_then(|()| socket.set_mark(AGENT_MARK))
            .and_then(|()| socket.attach_filter(&marked_only()))
            .map_err(failed("set socket options"))?;
        socket_option::receive_mark(&socket).map_err(|error| VmSocketError::Mark { error })?;
        // Without SO_REUSEADDR, which would let any other user of the host bind the same port.
        socket
            .bind(&SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, PORT, 0, 0).into())
            .map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => VmSocketError::Taken {
                    bridge: bridge.to_owned(),
                    port: PORT,
                },
                _ => failed("bind")(error),
            })?;
        socket
            .join_multicast_v6(&ALL_NODES, ifindex)
            .map_err(failed("join ff02::1"))?;
        let socket = UdpSocket::from_std(socket.into()).map_err(failed("watch the socket"))?;
        Ok(Self { socket, ifindex })
    }

    /// Receives the next datagram from a link-local sender. Skips a datagram from any other sender,
    /// and one longer than a message can be.
    ///
    /// # Errors
    ///
    /// The error of the socket, for instance that the bridge no longer exists.
    pub async fn recv(&self) -> io::Result<VmDatagram> {
        loop {
            let datagram = self
                .socket
                .async_io(Interest::READABLE, || recv_now(&self.socket))
                .await?;
            if let Some(datagram) = datagram {
                return Ok(datagram);
            }
        }
    }

    /// Datagrams that the kernel has dropped: those without a mark, and those that found the buffer
    /// full.
    pub fn dropped(&self) -> u64 {
        socket_option::drops(&self.socket).map_or(0, u64::from)
    }

    /// Sends a datagram out of the bridge.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if the destination is not link-local; otherwise the error of the kernel.
    pub async fn send(&self, to: SocketAddrV6, bytes: &[u8]) -> io::Result<()> {
        if !to.ip().is_unicast_link_local() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is not a link-local address", to.ip()),
            ));
        }
        let to = SocketAddrV6::new(*to.ip(), to.port(), 0, self.ifindex);
        self.socket.send_to(bytes, to).await.map(drop)
    }
}

/// Socket filter that accepts only packets with a mark.
fn marked_only() -> [SockFilter; 4] {
    [
        SockFilter::new(LOAD_WORD, 0, 0, MARK),
        SockFilter::new(JUMP_EQUAL, 0, 1, 0),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ]
}

/// Receives one datagram; `None` if it is to be skipped.
fn recv_now(socket: &UdpSocket) -> io::Result<Option<VmDatagram>> {
    // One byte longer than a message, so that a longer datagram is not taken for a complete
    // message.
    let mut buffer = [0; MAX_DATAGRAM_BYTES + 1];
    let mut control = cmsg_space!(u32);
    let mut iov = [IoSliceMut::new(&mut buffer)];
    let (length, from, mark) = {
        let message = recvmsg::<SockaddrIn6>(
            socket.as_raw_fd(),
            &mut iov,
            Some(&mut control),
            MsgFlags::MSG_DONTWAIT,
        )?;
        let mark = message.cmsgs()?.find_map(|control| mark_of(&control));
        (message.bytes, message.address, mark)
    };
    let (Some(from), Some(mark), Some(bytes)) = (from, mark, buffer.get(..length)) else {
        return Ok(None);
    };
    let from = SocketAddrV6::from(from);
    if length > MAX_DATAGRAM_BYTES || !from.ip().is_unicast_link_local() {
        tracing::debug!(%from, length, "Skipped a datagram that no VM of this link can have sent");
        return Ok(None);
    }
    Ok(Some(VmDatagram {
        mark,
        from,
        bytes: bytes.to_vec(),
    }))
}

fn mark_of(control: &ControlMessageOwned) -> Option<u32> {
    let ControlMessageOwned::Unknown(control) = control else {
        return None;
    };
    if control.cmsg_header.cmsg_level != libc::SOL_SOCKET
        || control.cmsg_header.cmsg_type != libc::SO_MARK
    {
        return None;
    }
    let bytes = control.data_bytes.get(..4)?.try_into().ok()?;
    Some(u32::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread;
    use std::time::Duration;

    use nix::sched::{CloneFlags, unshare};
    use socket2::Socket;
    use tokio::time::timeout;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// Runs a test in its own network namespace with a bridge `br0`. One port of the bridge is a
    /// veth whose peer is `guest`. Within one namespace a veth keeps the mark of a packet, so the
    /// sender's SO_MARK stands for the mark of the eBPF program.
    fn on_bridge<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
        thread::spawn(|| {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
                assert!(std::env::var_os("CI").is_none(), "no namespace: {error}");
                eprintln!("Skipped: no network namespace without root ({error})");
                return;
            }
            std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
            for arguments in [
                "link set lo up",
                "link add br0 type bridge mcast_snooping 0",
                "link add port type veth peer name guest",
                "link set port master br0",
                "link set port up",
                "link set guest up",
                "link set br0 up",
            ] {
                let status = Command::new("ip").args(arguments.split(' ')).status();
                assert!(status.unwrap().success(), "ip {arguments}");
            }
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(test());
        })
        .join()
        .unwrap();
    }

    fn guest_socket(mark: u32) -> Socket {
        let socket = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
        socket.bind_device(Some(b"guest")).unwrap();
        socket.set_mark(mark).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket
    }

    fn to_all_nodes() -> socket2::SockAddr {
        let guest = nix::net::if_::if_nametoindex("guest").unwrap();
        SocketAddrV6::new(ALL_NODES, PORT, 0, guest).into()
    }

    /// Sends until the socket receives: the bridge's port needs a moment to forward.
    async fn deliver(socket: &VmSocket, guest: &Socket, bytes: &[u8]) -> VmDatagram {
        let sending = async {
            loop {
                let _ = guest.send_to(bytes, &to_all_nodes());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let receiving = async {
            loop {
                let datagram = socket.recv().await.unwrap();
                if datagram.bytes == bytes {
                    return datagram;
                }
            }
        };
        tokio::select! {
            datagram = receiving => datagram,
            () = sending => unreachable!(),
            () = tokio::time::sleep(DEADLINE) => panic!("nothing was received"),
        }
    }

    #[test]
    fn datagram_comes_with_its_mark_and_the_bridge_as_scope() {
        on_bridge(|| async {
            let socket = VmSocket::open("br0").unwrap();
            let guest = guest_socket(1234);
            let datagram = deliver(&socket, &guest, b"search").await;
            assert_eq!(datagram.mark, 1234);
            assert!(datagram.from.ip().is_unicast_link_local());
            let bridge = nix::net::if_::if_nametoindex("br0").unwrap();
            assert_eq!(datagram.from.scope_id(), bridge);
        });
    }

    #[test]
    fn datagram_without_mark_is_kept_out_and_counted() {
        on_bridge(|| async {
            let socket = VmSocket::open("br0").unwrap();
            let marked = guest_socket(1234);
            deliver(&socket, &marked, b"before").await;
            guest_socket(0)
                .send_to(b"from nowhere", &to_all_nodes())
                .unwrap();
            let next = loop {
                marked.send_to(b"after", &to_all_nodes()).unwrap();
                let datagram = socket.recv().await.unwrap();
                if datagram.bytes != b"before" {
                    break datagram;
                }
            };
            assert_eq!(next.bytes, b"after");
            assert_eq!(socket.dropped(), 1);
        });
    }

    #[test]
    fn port_that_is_taken_is_named() {
        on_bridge(|| async {
            let reused = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
            reused.set_reuse_address(true).unwrap();
            let any = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, PORT, 0, 0);
            reused.bind(&any.into()).unwrap();
            let error = VmSocket::open("br0").unwrap_err().to_string();
            assert!(error.contains("port 47411 is taken"), "{error}");
            drop(reused);
            VmSocket::open("br0").unwrap();
        });
    }

    #[test]
    fn datagram_that_is_too_long_is_skipped() {
        on_bridge(|| async {
            let socket = VmSocket::open("br0").unwrap();
            let guest = guest_socket(1);
            deliver(&socket, &guest, b"before").await;
            guest
                .send_to(&[0; MAX_DATAGRAM_BYTES + 1], &to_all_nodes())
                .unwrap();
            let longest = [1; MAX_DATAGRAM_BYTES];
            assert_eq!(deliver(&socket, &guest, &longest).await.bytes, longest);
            let late = timeout(Duration::from_millis(1), async {
                while socket.recv().await.unwrap().bytes == longest {}
            });
            assert!(late.await.is_err());
        });
    }

    #[test]
    fn datagram_is_sent_to_link_local_addresses_only() {
        on_bridge(|| async {
            let socket = VmSocket::open("br0").unwrap();
            let to = SocketAddrV6::new("2001:db8::1".parse().unwrap(), PORT, 0, 0);
            let error = socket.send(to, b"x").await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            // Whatever scope the caller names, the datagram leaves by the bridge.
            let datagram = deliver(&socket, &guest_socket(1), b"search").await;
            let mut to = datagram.from;
            to.set_scope_id(0);
            socket.send(to, b"reply").await.unwrap();
        });
    }

    #[test]
    fn missing_bridge_is_named() {
        on_bridge(|| async {
            let error = VmSocket::open("br9").unwrap_err();
            assert!(error.to_string().contains("`br9`"), "{error}");
        });
    }
}
