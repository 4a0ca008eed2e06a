//! Stops of a VM that vhost-net serves: their parameters, their outcome, and the check of the
//! agent's cuts.

use std::collections::BTreeMap;
use std::fmt;

use common::signal::{CutBasis, FlowCut, NicCut};
use common::testing::frame::address;
use lab::main_loop::HeldUp;
use proptest::prelude::*;

use super::bridged::GROUP;
use super::vmm::Ring;

/// Stops between two progress messages.
const PRINTED: u32 = 250;
/// Longest time until QEMU's main loop runs, microseconds, if the agent cannot see the loop.
/// Sometimes this exceeds the agent's wait for the loop, but not the agent's last look.
const UNSEEN_US: u64 = 50_000;
/// Longest time if the agent sees the loop and the cut must be exact, microseconds.
const SEEN_US: u64 = 150_000;
/// Longest time if the agent sees the loop and gives up, microseconds.
const TOO_LATE_US: u64 = 1_100_000;
/// Limit of the frames that QEMU reads per queue.
const MOST_READS: u8 = 2;
/// Payload of a datagram, bytes.
pub const PAYLOAD_BYTES: usize = 1000;
/// Offset of the payload in a frame, bytes.
pub const PAYLOAD_AT: usize = 62;
/// Offset of the UDP destination port in a frame, bytes.
const PORT_AT: usize = 56;
/// Destination port of the first flow.
pub const PORT: u16 = 5004;
/// Position of the IPv6 destination in a frame.
const DESTINATION: std::ops::Range<usize> = 38..54;

/// Parameters of one stop; times in microseconds.
#[derive(Clone, Debug)]
pub struct Stop {
    /// Receive ring of each queue.
    pub ring: Ring,
    /// Length of each of the TAP's queues, frames.
    pub room: u32,
    /// Traffic before and during the stop.
    pub load: Load,
    /// Shortest time for which the stream runs before the stop.
    pub before_us: u64,
    /// Interval at which the guest polls its rings.
    pub look_us: u64,
    /// Most frames that the guest takes per poll.
    pub most: usize,
    /// Whether the agent sees the main loop.
    pub is_seen: bool,
    /// What keeps the main loop from its work.
    pub held_up: HeldUp,
    /// Time for which the main loop is held up.
    pub main_loop_us: u64,
    /// Frames that the main loop reads from each queue.
    pub reads: u8,
    /// Time from the stop until the agent learns of it.
    pub agent_us: u64,
}

/// Traffic to the VM.
#[derive(Clone, Debug)]
pub struct Load {
    /// Number of flows of the stream.
    pub flows: u16,
    /// One in this many frames belongs to no stream; 0 for none.
    pub other_every: u32,
    /// Number of frames per burst.
    pub burst: u32,
    /// Time between two bursts, microseconds.
    pub pause_us: u64,
}

fn rings() -> impl Strategy<Value = Ring> {
    let entries = prop_oneof![Just(64_u16), Just(256), Just(1024)];
    let buffers = prop_oneof![
        Just((false, 2048_u32)),
        Just((true, 2048)),
        Just((true, 400)),
    ];
    (entries, buffers).prop_map(|(entries, (is_mergeable, buffer_bytes))| Ring {
        entries,
        is_mergeable,
        buffer_bytes,
    })
}

fn main_loops() -> impl Strategy<Value = (bool, HeldUp, u64)> {
    let held_up = prop_oneof![Just(HeldUp::Busy), Just(HeldUp::Locked), Just(HeldUp::Both),];
    let times = prop_oneof![
        8 => (Just(false), 0..UNSEEN_US),
        16 => (Just(true), 0..20_000_u64),
        7 => (Just(true), 0..SEEN_US),
        1 => (Just(true), TOO_LATE_US..TOO_LATE_US + 100_000),
    ];
    (times, held_up).prop_map(|((is_seen, time), held_up)| (is_seen, held_up, time))
}

/// Generates loads, mostly of few frames, so that the queues are empty most of the time.
fn loads() -> impl Strategy<Value = Load> {
    let flows = prop_oneof![Just(1_u16), 2_u16..12];
    let others = prop_oneof![Just(0_u32), 2_u32..9];
    let frames = prop_oneof![
        4 => (1_u32..8, 1_000_u64..15_000),
        1 => (8_u32..80, 200_u64..20_000),
    ];
    (flows, others, frames).prop_map(|(flows, other_every, (burst, pause_us))| Load {
        flows,
        other_every,
        burst,
        pause_us,
    })
}

/// Generates poll intervals and frame counts of guests; most guests keep up.
fn guests() -> impl Strategy<Value = (u64, usize)> {
    prop_oneof![
        4 => (500_u64..2_000, 8_usize..64),
        1 => (2_000_u64..20_000, 1_usize..16),
    ]
}

prop_compose! {
    /// Generates stops.
    pub fn stops()(
        ring in rings(),
        room in prop_oneof![1 => Just(80_u32), 2 => Just(1000)],
        load in loads(),
        before_us in 80_000_u64..220_000,
        (look_us, most) in guests(),
        (is_seen, held_up, main_loop_us) in main_loops(),
        reads in 1..=MOST_READS,
        agent_us in 0_u64..8_000,
    ) -> Stop {
        Stop {
            ring,
            room,
            load,
            before_us,
            look_us,
            most,
            is_seen,
            held_up,
            main_loop_us,
            reads,
            agent_us,
        }
    }
}

/// A datagram of a stream: the number of its flow, and the number within the flow.
pub type Datagram = (u16, u32);

/// Returns the datagram of a frame, if the frame belongs to a stream.
pub fn datagram(frame: &[u8]) -> Option<Datagram> {
    let number = frame.get(PAYLOAD_AT..PAYLOAD_AT + 4)?;
    if frame[DESTINATION] != address(GROUP) {
        return None;
    }
    let port = u16::from_be_bytes(frame[PORT_AT..PORT_AT + 2].try_into().unwrap());
    let flow = port.checked_sub(PORT)?;
    Some((flow, u32::from_be_bytes(number.try_into().unwrap())))
}

/// Outcome of one stop.
pub struct Outcome {
    /// The agent's cuts, including the revision.
    pub cuts: Vec<NicCut>,
    /// Datagrams that the VM received.
    pub had: Vec<Datagram>,
    /// Datagrams that were left in the TAP.
    pub left: Vec<Datagram>,
}

impl Outcome {
    /// Returns the cut that counts, which is the last one.
    pub fn cut(&self) -> &NicCut {
        self.cuts.last().expect("a cut")
    }

    /// Returns a description of the error in the agent's cuts: packets that the VM would lose or
    /// receive twice. If the agent says that the cut may be too early, the cut must not be too
    /// late.
    pub fn fault(&self, stop: &Stop) -> Option<String> {
        let mut last = BTreeMap::<u16, u32>::new();
        let mut is_in_order =
            |(flow, number): &Datagram| last.insert(*flow, *number) < Some(*number);
        if !self.had.iter().all(&mut is_in_order) {
            return Some(format!("a flow is out of order: {:?}", self.had));
        }
        let is_revised = self.cuts.len() > 1 && self.cuts[0].basis == CutBasis::Count;
        if stop.is_seen && is_revised {
            return Some("the main loop read more than the agent saw it leave".to_owned());
        }
        let basis = self.cut().basis;
        if basis == CutBasis::Time {
            return None;
        }
        let mut flows = BTreeMap::<u16, (u64, u64)>::new();
        for (flow, number) in &self.had {
            let (had, _) = flows.entry(*flow).or_insert((0, u64::MAX));
            *had = u64::from(*number) + 1;
        }
        for (flow, number) in &self.left {
            let (_, left) = flows.entry(*flow).or_insert((0, u64::MAX));
            *left = u64::from(*number).min(*left);
        }
        let faults: Vec<String> = flows
            .into_iter()
            .filter_map(|(flow, (had, left))| {
                let of_flow = |it: &&FlowCut| it.destination_port == PORT + flow;
                let said = self.cut().flows.iter().find(of_flow);
                let said = said.map_or(0, |it| it.delivered);
                let is_late = said > left;
                let is_early = said < had && basis == CutBasis::Count;
                (is_late || is_early).then(|| {
                    format!("flow {flow}: {had} had, {said} said, {left} is the first one left")
                })
            })
            .collect();
        (!faults.is_empty()).then(|| faults.join("; "))
    }
}

/// Counts of cuts by their basis.
#[derive(Default)]
pub struct Tally {
    /// All stops.
    pub stops: u32,
    /// Cuts by the kernel's count.
    pub exact: u32,
    /// Cuts by the overflow of a queue.
    pub overflow: u32,
    /// Cuts by time.
    pub time: u32,
    /// Stops whose cut the agent revised.
    pub revised: u32,
    /// Exact cuts among those with a visible main loop.
    pub seen: u32,
    /// Descriptions of wrong cuts.
    pub faults: Vec<String>,
}

impl Tally {
    /// Counts a stop, and prints the counts now and then.
    pub fn take(&mut self, stop: &Stop, outcome: &Outcome) {
        self.stops += 1;
        self.revised += u32::from(outcome.cuts.len() > 1);
        match outcome.cut().basis {
            CutBasis::Count => {
                self.exact += 1;
                self.seen += u32::from(stop.is_seen);
            }
            CutBasis::Overflow => self.overflow += 1,
            CutBasis::Time => self.time += 1,
        }
        if let Some(fault) = outcome.fault(stop) {
            let fault = format!("{:?}: {fault}\n{stop:?}", outcome.cut().basis);
            println!("{fault}");
            self.faults.push(fault);
        }
        if self.stops.is_multiple_of(PRINTED) {
            println!("{self}");
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} stops: {} by the count ({} with the main loop seen), {} by an overflow, {} by the time; \
             {} revised",
            self.stops, self.exact, self.seen, self.overflow, self.time, self.revised
        )
    }
}
