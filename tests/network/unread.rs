//! Packets that a VM has not read from its TAP when it stops reach the VM's new address before
//! later forwarded packets. The agent's gate thread does the work, on real kernels.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::fs::File;
use std::net::{Ipv6Addr, UdpSocket};
use std::thread;
use std::time::Duration;

use common::forward;
use common::handover::PROBE_MAC;
use common::maps::{BridgeNumber, Forward, ForwardKey};
use nix::poll::PollTimeout;
use roamcast::clock::now;
use roamcast::config::Handover;
use roamcast::datapath::Datapath;
use roamcast::net::neighbour::Neighbours;
use roamcast::proto::{GateCommand, GateEvent, Mac, mac_text};
use roamcast::runtime::agent::gates::Gates;
use roamcast::runtime::trace::Replays;
use support::host::{LIMITS, config};
use support::netns::{self, privileged, wait_for};
use support::tap;
use support::two_links::{Net, moa};

const VM_MAC: Mac = [0x52, 0x54, 0, 0, 0, 7];
const PORT: u16 = 5004;
/// Datagrams that the VM reads before it stops; enough to make its queue known to be empty.
const BEFORE: u32 = 200;
/// Datagrams that the VM does not read.
const UNREAD: u32 = 30;
/// Datagrams that arrive after the cut is known.
const LATER: u32 = 30;
/// Time between two datagrams.
const PACE: Duration = Duration::from_millis(1);

/// A sender's datagrams, numbered from 0.
struct Numbered {
    socket: UdpSocket,
    to: Ipv6Addr,
    next: u32,
}

impl Numbered {
    fn send(&mut self) {
        let payload = self.next.to_be_bytes();
        self.socket.send_to(&payload, (self.to, PORT)).unwrap();
        self.next += 1;
    }

    fn send_many(&mut self, count: u32) {
        for _ in 0..count {
            self.send();
            thread::sleep(PACE);
        }
    }
}

/// Reads one frame; `None` if none arrives for some time.
fn try_read_frame(tap: &File) -> Option<Vec<u8>> {
    tap::read(tap, PollTimeout::from(200_u16))
}

fn read_frame(tap: &File) -> Vec<u8> {
    wait_for("a frame in the TAP", || try_read_frame(tap))
}

/// Returns the number of a datagram for an address, or `None` for a probe, which is a copy of a
/// datagram.
fn number(frame: &[u8], address: Ipv6Addr) -> Option<u32> {
    let is_ours = frame.len() == 66 && frame[..6] != PROBE_MAC && frame[38..54] == address.octets();
    is_ours.then(|| u32::from_be_bytes(frame[62..66].try_into().unwrap()))
}

/// Reads up to the next datagram for an address. Returns its number.
fn read(tap: &File, address: Ipv6Addr) -> u32 {
    loop {
        if let Some(number) = number(&read_frame(tap), address) {
            return number;
        }
    }
}

#[test]
fn what_the_vm_has_not_read_is_sent_on_in_order_before_what_comes_later() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    let (old, new) = (moa(1), moa(2));
    let vm = net.host.run(|| tap::open("vnet0"));
    net.host.ip("link set vnet0 master br0 up");
    // Without TCX, the gate needs clsact for probes.
    net.host.tc("qdisc add dev vnet0 clsact");
    let entry = format!("neigh replace {old} lladdr {} dev r0", mac_text(&VM_MAC));
    net.router.ip(&entry);
    let receiver = net
        .destination
        .run(|| UdpSocket::bind((new, PORT)).unwrap());
    let ifindex = net.host.ifindex("vnet0");
    net.host.run_with_bpffs(|bpffs| {
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        datapath
            .attach_uplink(net.host.ifindex("up0"), "up0")
            .unwrap();
        datapath.attach_port(ifindex, "vnet0", &LIMITS).unwrap();
        let mut neighbours = Neighbours::open().unwrap();
        wait_for("the next hop", || {
            neighbours.resolve(new).ok().filter(|known| *known)
        });
        let key = ForwardKey {
            address: old.octets(),
            vlan: 0,
            bridge: BridgeNumber::FIRST,
        };
        let expected = Forward {
            destination: new.octets(),
            difference: forward::difference(&old.octets(), &new.octets()),
            bridge: net.host.ifindex("br0"),
            ifindex,
            ..Forward::default()
        };
        datapath.forward_set(&key, &expected).unwrap();
        let mut sender = Numbered {
            socket: net.router.run(|| UdpSocket::bind("[::]:0").unwrap()),
            to: old,
            next: 0,
        };
        // The bridge drops packets until its port forwards.
        wait_for("the bridge to forward", || {
            sender.send();
            let frame = try_read_frame(&vm)?;
            number(&frame, old)
        });
        while try_read_frame(&vm).is_some() {}
        sender.next = 0;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let mut gates = Gates::start(&datapath, &Handover::default(), Replays::untraced()).unwrap();
        let (mac, vhost) = (VM_MAC, false);
        gates.perform(GateCommand::Record {
            ifindex,
            mac,
            vhost,
        });
        wait_for("the recording", || datapath.gate(ifindex).unwrap());
        for number in 0..BEFORE {
            sender.send();
            assert_eq!(read(&vm, old), number);
            // The queue is empty, as most of the time for an idle guest.
            thread::sleep(PACE);
        }
        sender.send_many(UNREAD / 2);
        let stopped = now();
        let left = Forward {
            until_ns: u64::MAX,
            unread_until_ns: (stopped + netns::DEADLINE).0,
            ..expected
        };
        datapath.forward_set(&key, &left).unwrap();
        // All of these arrive before the cut, however slow this host is.
        sender.send_many(UNREAD / 2);
        let migration = 7;
        gates.perform(GateCommand::Cut {
            ifindex,
            migration,
            stopped,
        });
        // Reads as QEMU does: it discards the first frame and holds back the second.
        read_frame(&vm);
        read_frame(&vm);
        let cut = runtime.block_on(gates.next()).unwrap();
        assert!(matches!(cut, GateEvent::Cut { .. }), "{cut:?}");
        sender.send_many(LATER);
        receiver
            .set_read_timeout(Some(lab::wait::patience(Duration::from_secs(5))))
            .unwrap();
        let mut due = BEFORE;
        let mut receive_all = |sender: &Numbered| {
            while due < sender.next {
                let mut payload = [0; 4];
                receiver.recv(&mut payload).unwrap();
                assert_eq!(u32::from_be_bytes(payload), due);
                due += 1;
            }
        };
        receive_all(&sender);
        // The kernel takes over after the agent has sent the earlier packets, which takes the
        // agent's thread some time.
        wait_for("the kernel to send on", || {
            sender.send();
            receive_all(&sender);
            let (_, value) = datapath.forwards().unwrap()[0];
            (value.packets > 0).then_some(())
        });
        gates.perform(GateCommand::Clear { ifindex });
        let (_, value) = datapath.forwards().unwrap()[0];
        let mut sent_on = 0;
        while sent_on + value.packets < u64::from(sender.next - BEFORE) {
            match runtime.block_on(gates.next()).unwrap() {
                GateEvent::SentOn { migration, report } => {
                    assert_eq!((migration, report.dropped), (7, 0));
                    sent_on += report.packets;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(sent_on >= u64::from(UNREAD), "{sent_on}");
    });
}
