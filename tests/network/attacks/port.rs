//! An unprivileged user of the host tries to take the UDP port to which VMs send.
#![allow(
    unsafe_code,
    reason = "one thread alone becomes another user by a bare system call"
)]

use std::io::{self, Read as _};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::Path;
use std::process::Stdio;

use common::signal::PORT;
use socket2::{Domain, Socket, Type};
use support::agent::{Agent, Files};
use support::netns::{Namespace, privileged, wait_for};

const NOBODY: libc::uid_t = 65_534;

/// Runs `work` on a thread that permanently switches to an unprivileged user.
fn as_nobody<T: Send>(host: &Namespace, work: impl FnOnce() -> T + Send) -> T {
    host.run(|| {
        // SAFETY: the call takes three numbers. Made without the C library it changes this thread
        // only, which ends with `work`.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
        assert_eq!(changed, 0, "{}", io::Error::last_os_error());
        work()
    })
}

/// Binds the port in a mode that shares it.
fn steal(address: Ipv6Addr, scope: u32, device: Option<&str>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_only_v6(true)?;
    socket.bind_device(device.map(str::as_bytes))?;
    socket.bind(&SocketAddrV6::new(address, PORT, 0, scope).into())?;
    Ok(socket)
}

/// Tries every way to bind the port.
fn attempts(host: &Namespace) -> Vec<io::Result<Socket>> {
    let bridge = host.ifindex("br0");
    let found = host.run(|| roamcast::net::addresses::addresses("br0").unwrap());
    let link_local = found.link_local.unwrap();
    as_nobody(host, || {
        vec![
            steal(Ipv6Addr::UNSPECIFIED, 0, None),
            steal(Ipv6Addr::UNSPECIFIED, 0, Some("br0")),
            steal(link_local, bridge, None),
            steal(link_local, bridge, Some("br0")),
        ]
    })
}

#[test]
fn user_cannot_take_the_port_of_a_running_agent() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let stolen = attempts(&host);
    assert!(stolen.iter().any(Result::is_ok), "no attack: {stolen:?}");
    drop(stolen);
    host.run_with_bpffs(|bpffs: &Path| {
        let files = Files::new(bpffs, &[], "");
        let _agent = Agent::start_with(&files, Stdio::null());
        for stolen in attempts(&host) {
            let error = stolen.expect_err("the port is shared");
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{error}");
        }
    });
}

#[test]
fn agent_whose_port_somebody_has_says_so_and_ends() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let stolen = as_nobody(&host, || steal(Ipv6Addr::UNSPECIFIED, 0, None).unwrap());
    host.run_with_bpffs(|bpffs: &Path| {
        let files = Files::new(bpffs, &[], "");
        let mut agent = files.spawn(Stdio::piped());
        let status = wait_for("the end of the agent", || agent.child.try_wait().unwrap());
        let mut said = String::new();
        let stderr = agent.child.stderr.as_mut().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        assert!(!status.success(), "{said}");
        assert!(said.contains("UDP port 47411 is taken"), "{said}");
    });
    drop(stolen);
}
