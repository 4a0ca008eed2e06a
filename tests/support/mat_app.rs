//! Applications in namespaces, and the view of the kernel and tcpdump on their packets.
#![allow(unsafe_code, reason = "some socket options have no safe form")]

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::netns::{DEADLINE, Namespace, command, wait_for};

/// Timeout for a packet.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Socket buffer for all packets of a test, bytes.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Packets sent back to back before each pause, so that no queue overflows.
const BURST: u32 = 10;
const PAUSE: Duration = Duration::from_millis(1);

/// Sends an Echo Request. Returns the address that answered.
pub fn echo(namespace: &Namespace, to: Ipv6Addr, number: u16) -> Ipv6Addr {
    namespace.run(|| {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let [high, low] = number.to_be_bytes();
        let request = [128, 0, 0, 0, 0x77, 0x66, high, low, 1, 2, 3];
        let to = SocketAddrV6::new(to, 0, 0, 0);
        socket.send_to(&request, &to.into()).unwrap();
        let deadline = lab::wait::end_after(PATIENCE);
        let socket = UdpSocket::from(socket);
        let mut answer = [0; 64];
        while Instant::now() < deadline {
            if let Ok((length, SocketAddr::V6(from))) = socket.recv_from(&mut answer)
                && length == request.len()
                && answer[0] == 129
                && answer[4..length] == request[4..]
            {
                return *from.ip();
            }
        }
        panic!("no answer from {}", to.ip());
    })
}

/// Opens a UDP socket in a namespace.
pub fn udp(namespace: &Namespace, address: (Ipv6Addr, u16)) -> UdpSocket {
    namespace.run(|| {
        // A just closed socket may live on in a child process that another thread is starting.
        let socket = wait_for("a free port", || match UdpSocket::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => None,
            result => Some(result.unwrap()),
        });
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    })
}

/// Opens a UDP socket bound to an interface.
pub fn listen_on(interface: &str, (address, port): (Ipv6Addr, u16)) -> UdpSocket {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)).unwrap();
    socket.bind_device(Some(interface.as_bytes())).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
        .bind(&SocketAddrV6::new(address, port, 0, 0).into())
        .unwrap();
    socket.into()
}

/// Receives one datagram.
pub fn receive(socket: &UdpSocket) -> io::Result<(Vec<u8>, SocketAddrV6)> {
    let mut buffer = vec![0; 65_536];
    let (length, from) = socket.recv_from(&mut buffer)?;
    buffer.truncate(length);
    match from {
        SocketAddr::V6(from) => Ok((buffer, from)),
        SocketAddr::V4(_) => panic!("IPv4"),
    }
}

/// Sends a datagram. Returns its source address as the receiver sees it.
pub fn exchange(from: &UdpSocket, to: &UdpSocket, bytes: usize) -> Ipv6Addr {
    let payload: Vec<u8> = (0..bytes).map(|index| index as u8).collect();
    from.send_to(&payload, to.local_addr().unwrap()).unwrap();
    let (received, from) = receive(to).unwrap();
    assert_eq!(received, payload);
    *from.ip()
}

/// Sends numbered datagrams on a connected socket.
pub fn send_all(socket: &UdpSocket, count: u32) {
    for number in 0..count {
        socket.send(&number.to_be_bytes()).unwrap();
        if number % BURST == 0 {
            thread::sleep(PAUSE);
        }
    }
}

/// Receives numbered datagrams; asserts that each arrives once.
pub fn expect_all(socket: &UdpSocket, count: u32) {
    let mut missing: BTreeSet<u32> = (0..count).collect();
    while !missing.is_empty() {
        let Ok((payload, _)) = receive(socket) else {
            break;
        };
        let number = u32::from_be_bytes(payload[..4].try_into().unwrap());
        assert!(missing.remove(&number), "{number} came twice");
    }
    let first = missing.first();
    assert!(missing.is_empty(), "{} lost, from {first:?}", missing.len());
}

/// Transfers that many bytes over TCP, there and back.
pub fn transfer(from: &Namespace, to: &Namespace, address: Ipv6Addr, bytes: usize) {
    let listener = to.run(|| TcpListener::bind((address, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let data: Vec<u8> = (0..bytes).map(|index| (index % 251) as u8).collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream
                .set_read_timeout(Some(lab::wait::patience(DEADLINE)))
                .unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            stream.write_all(&received).unwrap();
        });
        let mut stream = from.run(|| TcpStream::connect(address).unwrap());
        stream
            .set_read_timeout(Some(lab::wait::patience(DEADLINE)))
            .unwrap();
        stream.write_all(&data).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut echoed = Vec::new();
        stream.read_to_end(&mut echoed).unwrap();
        assert!(echoed == data, "{} of {bytes} bytes", echoed.len());
    });
}

/// Returns a connected socket's path MTU.
pub fn path_mtu(socket: &UdpSocket) -> i32 {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is live, and its size is given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    value
}

/// Makes the socket refuse datagrams longer than the path MTU.
pub fn never_fragment(socket: &UdpSocket) {
    let value = libc::IPV6_PMTUDISC_DO;
    // SAFETY: the value is live, and its size is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Selects the interface for outgoing multicast.
pub fn multicast_by(socket: &UdpSocket, ifindex: u32) {
    let socket = socket2::SockRef::from(socket);
    socket.set_multicast_if_v6(ifindex).unwrap();
    socket.set_multicast_hops_v6(8).unwrap();
}

/// Switches an interface's checksum offload on or off.
pub fn offload(namespace: &Namespace, interface: &str, on: bool) {
    let state = if on { "on" } else { "off" };
    namespace.run(|| command("ethtool", &["-K", interface, "tx", state]));
}

/// Returns the link-local address of an interface.
pub fn link_local(namespace: &Namespace, interface: &str) -> String {
    let arguments = ["-n", namespace.name(), "-6", "-o", "addr", "show", "dev"];
    let mut arguments = arguments.to_vec();
    arguments.extend([interface, "scope", "link"]);
    let text = command("ip", &arguments);
    let mut words = text.split_whitespace().skip_while(|word| *word != "inet6");
    let address = words.nth(1).unwrap();
    address.split_once('/').unwrap().0.to_owned()
}

/// Returns a kernel counter from `snmp6`, or from `netstat` if the name starts with a group.
pub fn snmp(namespace: &Namespace, name: &str) -> u64 {
    let read = |file: &str| {
        namespace.run(|| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap())
    };
    if let Some((group, name)) = name.split_once(' ') {
        let text = read("netstat");
        let prefix = format!("{group}:");
        let mut lines = text.lines().filter(|line| line.starts_with(&prefix));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let at = names.split_whitespace().position(|it| it == name);
        return at.map_or(0, |at| {
            values.split_whitespace().nth(at).unwrap().parse().unwrap()
        });
    }
    read("snmp6")
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        .unwrap_or_else(|| panic!("no {name}"))
}
