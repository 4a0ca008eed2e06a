//! Frames put on an interface as they are.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several test files, each of which uses a part"
)]
#![allow(clippy::expect_used, reason = "a test that cannot go on panics")]

use std::io;

use linux::packet_socket::PacketSocket;

/// A packet socket on one interface, in the namespace of the thread that made it.
pub(crate) struct Wire(PacketSocket);

impl Wire {
    /// Frames go the usual way out, past the programs at egress.
    pub(crate) fn new(ifindex: u32) -> Self {
        Self(PacketSocket::sending(ifindex).expect("AF_PACKET socket"))
    }

    /// Frames go straight to the device.
    pub(crate) fn past_programs(ifindex: u32) -> Self {
        let socket = PacketSocket::past_qdisc(ifindex).expect("AF_PACKET socket");
        socket.set_nonblocking(false).expect("blocking socket");
        Self(socket)
    }

    /// Takes frames in, too.
    pub(crate) fn listening(ifindex: u32) -> Self {
        Self(PacketSocket::listening(ifindex).expect("AF_PACKET socket"))
    }

    /// Frames that have come in or gone out since the last call.
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

    /// The same where the device may have no room, or a program may drop the frame, which is told.
    pub(crate) fn try_send(&self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame).map(drop)
    }
}
