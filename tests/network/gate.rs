//! `gate` on a real TAP behind a bridge, through the agent's data path: held frames do not come
//! out, replayed frames do, and a restarted agent finds everything.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use common::counter::Counter;
use common::handover::{fingerprint, flow_hash_of};
use common::maps::{
    DeliveredKey, Gate, GateMode, GateRecord, GateUsage, HeldFrame, RECORDS_PER_SLOT,
};
use common::testing::frame::Frame;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use roamcast::clock::now;
use roamcast::datapath::{Datapath, DatapathConfig, DatapathError, Held, Program};
use support::bridged::{Bridged, GROUP, SOURCE, stream, udp};
use support::host::{LIMITS, config, pins, tc_hooks};
use support::netns::{DEADLINE, Namespace, privileged, wait_for};
use support::tap;
use support::wire::Wire;

/// Waits for a number of held frames, as the agent's thread does.
fn held(held: &mut Held, count: usize) -> Vec<(HeldFrame, Vec<u8>)> {
    let deadline = lab::wait::end_after(DEADLINE);
    let mut frames = Vec::new();
    while frames.len() < count {
        while let Some(frame) = held.next(|head, bytes| (*head, bytes.to_vec())) {
            frames.push(frame);
        }
        if frames.len() < count {
            assert!(Instant::now() < deadline, "{} of {count}", frames.len());
            let mut fds = [PollFd::new(held.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(1000_u16)).unwrap();
        }
    }
    frames
}

#[test]
fn held_frames_do_not_come_out_and_those_past_the_gate_do() {
    if !privileged() {
        return;
    }
    for hook in tc_hooks() {
        let setup = Bridged::new();
        setup.host.run_with_bpffs(|bpffs| {
            let datapath = setup.attach(&DatapathConfig {
                hook: Some(hook),
                ..config(bpffs)
            });
            let ifindex = setup.ifindex;
            let mut ring = datapath.held().unwrap();
            assert!(matches!(datapath.held(), Err(DatapathError::HeldTaken)));
            datapath.gate_hold(ifindex).unwrap();
            let frames: Vec<_> = (0..5).map(|number| udp(&[number; 1000])).collect();
            for frame in &frames {
                setup.sender.send(frame);
            }
            let waiting = held(&mut ring, frames.len());
            for ((number, frame), (head, bytes)) in (1..).zip(&frames).zip(&waiting) {
                assert_eq!((head.number, head.ifindex), (number, ifindex));
                assert_eq!(bytes, frame);
            }
            let replay = Wire::past_programs(ifindex);
            replay.send(&waiting[4].1);
            assert_eq!(setup.received_up_to(&frames[4]), [frames[4].clone()]);

            assert!(datapath.gate_replayed(ifindex, 4).unwrap());
            setup.sender.send(&frames[0]);
            assert_eq!(held(&mut ring, 1)[0].0.number, 6);
            assert!(datapath.gate_replayed(ifindex, 6).unwrap());
            setup.sender.send(&frames[1]);
            assert_eq!(setup.received_up_to(&frames[1]), [frames[1].clone()]);
            let (gate, usage) = datapath.gate(ifindex).unwrap().unwrap();
            assert_eq!((gate.mode, gate.replayed), (GateMode::Hold as u32, 6));
            assert_eq!(usage.held, 6 | GateUsage::OPEN);
            let key = DeliveredKey {
                ifindex,
                stream: stream(0),
            };
            let delivered = datapath.delivered_of(&key).unwrap().unwrap();
            assert_eq!(delivered.packets, 1, "the agent counts what it replays");
            assert_eq!(datapath.counter(Counter::HeldFrames).unwrap(), 6);

            datapath.gate_clear(ifindex).unwrap();
            assert_eq!(datapath.gate(ifindex).unwrap(), None);
            assert!(!datapath.gate_replayed(ifindex, 7).unwrap());
            setup.sender.send(&frames[2]);
            assert_eq!(setup.received_up_to(&frames[2]), [frames[2].clone()]);
            assert_eq!(datapath.delivered_of(&key).unwrap().unwrap().packets, 2);
        });
    }
}

#[test]
fn tag_that_the_kernel_took_out_of_the_frame_is_kept() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let ifindex = setup.ifindex;
        let tagged = Frame::udp(SOURCE, GROUP, (5000, 5004), b"hello")
            .with(|frame| frame.vlan = Some(7))
            .bytes();
        let key = DeliveredKey {
            ifindex,
            stream: stream(7),
        };
        setup.sender.send(&tagged);
        wait_for("the tagged flow", || datapath.delivered_of(&key).unwrap());
        let mut ring = datapath.held().unwrap();
        datapath.gate_hold(ifindex).unwrap();
        setup.sender.send(&tagged);
        let (head, bytes) = held(&mut ring, 1).remove(0);
        assert_eq!(head.vlan, 7);
        assert_eq!(bytes, udp(b"hello"), "without the tag");
    });
}

#[test]
fn longest_frame_is_held() {
    if !privileged() {
        return;
    }
    /// Payload that the largest MTU of a TAP allows, bytes.
    const PAYLOAD_BYTES: usize = 65_521 - 48;
    let setup = Bridged::new();
    setup.host.ip("link set vnet0 mtu 65521");
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let mut ring = datapath.held().unwrap();
        datapath.gate_hold(setup.ifindex).unwrap();
        let sender = Wire::new(setup.ifindex);
        let longest = udp(&vec![7; PAYLOAD_BYTES]);
        // TCX reports the drop to the sender, a qdisc filter does not.
        if let Err(refused) = sender.try_send(&longest) {
            assert_eq!(refused.raw_os_error(), Some(libc::ENOBUFS), "{refused}");
        }
        let (head, bytes) = held(&mut ring, 1).remove(0);
        assert_eq!((head.number, head.length as usize), (1, longest.len()));
        assert_eq!(bytes, longest);
        assert_eq!(datapath.counter(Counter::HeldOversized).unwrap(), 0);
    });
}

#[test]
fn frames_are_held_while_the_agent_is_away() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let ifindex = setup.ifindex;
        let datapath = setup.attach(&config(bpffs));
        datapath.gate_hold(ifindex).unwrap();
        drop(datapath);
        let frames = [udp(b"one"), udp(b"two")];
        for frame in &frames {
            setup.sender.send(frame);
        }
        let datapath = setup.attach(&config(bpffs));
        let mut ring = datapath.held().unwrap();
        let waiting: Vec<_> = held(&mut ring, 2).into_iter().map(|held| held.1).collect();
        assert_eq!(waiting, frames);
        let attachments = datapath.attachments();
        assert!(attachments.iter().all(|attachment| attachment.adopted));
        let usage = GateUsage {
            held: 2,
            ..GateUsage::default()
        };
        let gates = datapath.gates().unwrap();
        assert_eq!(gates.len(), 1);
        assert_eq!(gates[0], (ifindex, Gate::hold(gates[0].1.until_ns), usage));
    });
}

#[test]
fn each_recording_has_a_slot_of_its_own_as_long_as_there_are_some() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    let taps: Vec<File> = (0..3)
        .map(|number| host.run(|| tap::open(&format!("vnet{number}"))))
        .collect();
    host.run_with_bpffs(|bpffs| {
        let mut config = config(bpffs);
        config.capacities.record_slots = 2;
        let ports = [0, 1, 2].map(|number| host.ifindex(&format!("vnet{number}")));
        let attach = |datapath: &Datapath| {
            for (number, port) in ports.into_iter().enumerate() {
                let name = format!("vnet{number}");
                datapath.attach_port(port, &name, &LIMITS).unwrap();
            }
        };
        let datapath = Datapath::load(&config).unwrap();
        let early = datapath.gate_record(ports[0], false).unwrap_err();
        assert!(matches!(early, DatapathError::NoPort(_)), "{early}");
        let early = datapath.gate_hold(ports[0]).unwrap_err();
        assert!(matches!(early, DatapathError::NoPort(_)), "{early}");
        attach(&datapath);
        assert_eq!(datapath.gate_record(ports[0], false).unwrap(), 0);
        datapath.gate_hold(ports[2]).unwrap();
        assert_eq!(datapath.gate_record(ports[1], false).unwrap(), 1);
        assert_eq!(
            datapath.gate_record(ports[0], false).unwrap(),
            0,
            "begun anew"
        );
        drop(datapath);

        // The slots in use follow from the existing gates, not from the config.
        config.capacities.record_slots = 8;
        let datapath = Datapath::load(&config).unwrap();
        attach(&datapath);
        assert_eq!(datapath.gates().unwrap().len(), 3);
        let full = datapath.gate_record(ports[2], false).unwrap_err();
        assert!(matches!(full, DatapathError::NoRecordSlot { slots: 2, .. }));
        assert!(full.to_string().contains("record_slots"), "{full}");
        let (gate, _) = datapath.gate(ports[2]).unwrap().unwrap();
        assert_eq!(gate.mode, GateMode::Hold as u32, "as it was");
        datapath.gate_clear(ports[0]).unwrap();
        assert_eq!(datapath.gate_record(ports[2], false).unwrap(), 0);
    });
    drop(taps);
}

#[test]
fn records_are_read_in_order_while_frames_come() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let ifindex = setup.ifindex;
        let slot = datapath.gate_record(ifindex, false).unwrap();
        let read = || {
            let (_, usage) = datapath.gate(ifindex).unwrap().unwrap();
            datapath.gate_records(slot, &usage).unwrap()
        };
        assert_eq!(read(), []);
        // All frames differ. Nobody reads the TAP, so most frames are dropped behind the gate.
        let count = 3 * RECORDS_PER_SLOT;
        let sender = Wire::new(ifindex);
        let payload = |number: u32| number.to_be_bytes().repeat(20);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..count {
                    // `EAGAIN` of a full queue is expected.
                    let _ = sender.try_send(&udp(&payload(number)));
                }
                done.store(true, Ordering::Release);
            });
            let print = |number| fingerprint(&udp(&payload(number))[..], 62, 80).unwrap();
            let prints: Vec<u64> = (0..count).map(print).collect();
            let flow = flow_hash_of(&stream(0));
            loop {
                let last = done.load(Ordering::Acquire);
                let records = read();
                check(&records, flow, &prints);
                if last {
                    assert_eq!(records.len(), RECORDS_PER_SLOT as usize);
                    assert_eq!(records.last().unwrap().fingerprint, *prints.last().unwrap());
                    break;
                }
            }
        });
        let (_, usage) = datapath.gate(ifindex).unwrap().unwrap();
        assert_eq!(usage.recorded, u64::from(count));
        let started = Instant::now();
        let records = datapath.gate_records(slot, &usage).unwrap();
        println!("read {} records in {:?}", records.len(), started.elapsed());
        let started = Instant::now();
        assert_eq!(datapath.gate_record(ifindex, false).unwrap(), slot);
        println!("began anew in {:?}", started.elapsed());
        assert_eq!(read(), []);
        sender.try_send(&udp(&payload(0))).ok();
        assert_eq!(read().len(), 1, "nothing of the recording before");
    });
}

/// Asserts that all records belong to sent packets, are complete, and are in sending order.
fn check(records: &[GateRecord], flow: u64, prints: &[u64]) {
    let mut at = 0;
    let mut before = 0;
    for record in records {
        assert_eq!(record.flow, flow);
        assert!(record.number > before, "{record:?}");
        before = record.number;
        let found = prints[at..]
            .iter()
            .position(|print| *print == record.fingerprint);
        at += found.unwrap_or_else(|| panic!("{record:?} is of no later packet")) + 1;
    }
}

#[test]
fn port_that_goes_is_forgotten() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let ifindex = setup.ifindex;
        let sender = Wire::new(ifindex);
        sender.send(&udp(b"hello"));
        assert_eq!(datapath.delivered(Some(ifindex)).unwrap().len(), 1);
        assert_eq!(datapath.delivered(Some(ifindex + 1)).unwrap().len(), 0);
        datapath.gate_hold(ifindex).unwrap();
        datapath.detach_port(ifindex).unwrap();
        assert_eq!(datapath.gates().unwrap(), []);
        assert_eq!(datapath.delivered(None).unwrap(), []);
        assert_eq!(datapath.attachments(), []);

        // The agent reads counts of later packets from the pinned map.
        let map = pins(&config(bpffs)).join("DELIVERED");
        let map = aya::maps::Map::HashMap(aya::maps::MapData::from_pin(map).unwrap());
        let mut map: aya::maps::HashMap<_, DeliveredKey, common::maps::Delivered> =
            map.try_into().unwrap();
        let key = DeliveredKey {
            ifindex,
            stream: stream(0),
        };
        map.insert(key, common::maps::Delivered::default(), 0)
            .unwrap();
        let collected = datapath.collect(now(), DEADLINE).unwrap();
        assert_eq!(collected.delivered, 1);
        assert_eq!(datapath.delivered(None).unwrap(), []);
    });
}

#[test]
fn port_without_its_gate_is_not_attached() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let ifindex = setup.ifindex;
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        // Another object occupies the path of the link's pin.
        let pin = pins(&config(bpffs)).join(format!("links/gate-{ifindex}"));
        fs::create_dir(&pin).unwrap();
        datapath
            .attach_port(ifindex, "vnet0", &LIMITS)
            .expect_err("no gate");
        assert_eq!(datapath.attachments(), []);
        assert!(matches!(
            datapath.usage(ifindex),
            Err(DatapathError::NoPort(_))
        ));
        fs::remove_dir(&pin).unwrap();
        datapath.attach_port(ifindex, "vnet0", &LIMITS).unwrap();
        let programs: Vec<Program> = datapath
            .attachments()
            .iter()
            .map(|attachment| attachment.program)
            .collect();
        assert_eq!(programs, [Program::Snoop, Program::Gate]);
    });
}

#[test]
fn impossible_capacities_are_one_clear_sentence() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.run_with_bpffs(|bpffs| {
        for (held_bytes, record_slots, named) in [
            (32_768, 8, "held_bytes"),
            (100_000, 8, "held_bytes"),
            (65_536, 0, "record_slots"),
            (65_536, 1 << 18, "record_slots"),
        ] {
            let mut config = config(bpffs);
            config.capacities.held_bytes = held_bytes;
            config.capacities.record_slots = record_slots;
            let error = Datapath::load(&config).err().expect("refused");
            assert!(error.to_string().contains(named), "{error}");
        }
        let mut config = config(bpffs);
        config.capacities.held_bytes = 65_536;
        drop(Datapath::load(&config).unwrap());
        config.capacities.held_bytes = 1 << 20;
        let datapath = Datapath::load(&config).unwrap();
        assert!(datapath.held().unwrap().next(|_, _| ()).is_none());
    });
}
