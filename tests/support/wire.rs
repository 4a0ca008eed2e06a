//! Raw frames on an interface.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several test files, each of which uses a part"
)]
#![allow(clippy::expect_used, reason = "a test that cannot go on panics")]

use std::io;

use linux::packet_socket::PacketSocket;

/// A packet socket on one interface, in the namespace of the thread that opened it.
pub(crate) struct Wire(PacketSocket);

impl Wire {
    /// Opens a wire whose frames pass the egress programs, as usual.
    pub(crate) fn new(ifindex: u32) -> Self {
        Self(PacketSocket::sending(ifindex).expect("AF_PACKET socket"))
    }

    /// Opens a wire whose frames bypass the egress programs.
    pub(crate) fn past_programs(ifindex: u32) -> Self {
        let socket = PacketSocket::past_qdisc(ifindex).expect("AF_PACKET socket");
        socket.set_nonblocking(false).expect("blocking socket");
        Self(socket)
    }

    /// Opens a wire that also receives.
    pub(crate) fn listening(ifindex: u32) -> Self {
        Self(PacketSocket::listening(ifindex).expect("AF_PACKET socket"))
    }

    /// Returns the frames that arrived or left since the last call.
    pub(crate) fn received(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut frame = vec![0; 65_536];
        while let Ok(length) = self.0.receive(&mut frame) {
            frames.push(frame[..length].to_vec());
        }
        frames
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        let sent = self.0.send(frame).expect("frame sent");
        assert_eq!(sent, frame.len());
    }

    /// Sends a frame. Returns the error if the device has no room or a program reports the drop.
    pub(crate) fn try_send(&self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame).map(drop)
    }
}
