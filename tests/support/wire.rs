//! Raw frames on an interface.

use std::io;

use linux::packet_socket::PacketSocket;

/// A packet socket on one interface, in the namespace of the thread that opened it.
pub struct Wire(PacketSocket);

impl Wire {
    /// Opens a wire whose frames pass the egress programs, as usual.
    pub fn new(ifindex: u32) -> Self {
        Self(PacketSocket::sending(ifindex).expect("AF_PACKET socket"))
    }

    /// Opens a wire whose frames bypass the egress programs.
    pub fn past_programs(ifindex: u32) -> Self {
        let socket = PacketSocket::past_qdisc(ifindex).expect("AF_PACKET socket");
        socket.set_nonblocking(false).expect("blocking socket");
        Self(socket)
    }

    /// Opens a wire that also receives.
    pub fn listening(ifindex: u32) -> Self {
        Self(PacketSocket::listening(ifindex).expect("AF_PACKET socket"))
    }

    /// Returns the frames that arrived or left since the last call.
    pub fn received(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut frame = vec![0; 65_536];
        while let Ok(length) = self.0.receive(&mut frame) {
            frames.push(frame[..length].to_vec());
        }
        frames
    }

    /// Sends a frame; the device must take it.
    pub fn send(&self, frame: &[u8]) {
        let sent = self.0.send(frame).expect("frame sent");
        assert_eq!(sent, frame.len());
    }

    /// Sends a frame. Returns the error if the device has no room or a program reports the drop.
    pub fn try_send(&self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame).map(drop)
    }
}
