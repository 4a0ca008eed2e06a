//! Fuzz target: a VM that requests a migration, and agents that send anything.

use std::net::Ipv6Addr;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use common::signal::{
    AgentSearchReply, MAX_DATAGRAM_BYTES, MigrationAbort, MigrationProgress, MigrationReady,
    MigrationResponse, Phase, Reason, VmMessage,
};

use super::{Client, Event, Timing};

const SEARCH: u64 = 1;
const MOVE: u64 = 2;
/// Longer than any silence that the client tolerates.
const SILENCE: Duration = Duration::from_secs(600);

/// A migration ends exactly once, whatever the agents send.
pub(crate) fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let mut now = Duration::from_secs(1);
    let mut client = Client::new(now, Timing::default(), vec![2, 3], (SEARCH, MOVE));
    let mut over = false;
    while !input.is_empty() && next(&mut input, &mut client, &mut now).is_ok() {
        take(&mut client, now, &mut over);
    }
    let end = now + SILENCE;
    while let Some(due) = client.poll_timeout().filter(|due| *due <= end) {
        now = now.max(due);
        client.handle_timeout(now);
        take(&mut client, now, &mut over);
    }
    assert_eq!(client.poll_timeout(), None);
}

/// Drains the client's outputs, and continues where the client waits for its caller.
fn take(client: &mut Client, now: Duration, over: &mut bool) {
    for _ in 0..3 {
        while let Some(transmit) = client.poll_transmit() {
            assert!(transmit.bytes.len() <= MAX_DATAGRAM_BYTES);
            assert!(VmMessage::decode(&transmit.bytes).is_ok());
        }
        while let Some(event) = client.poll_event() {
            assert!(!*over, "{event:?} after the last event");
            match event {
                Event::Found(_) => client.request(now, "vms2".to_owned(), None),
                Event::Prepared(_) => client.ready(now, MigrationReady::default()),
                Event::Progress(_) => {}
                Event::Completed(_) | Event::Failed(_) => *over = true,
            }
        }
    }
}

fn next(input: &mut Unstructured<'_>, client: &mut Client, now: &mut Duration) -> Result<()> {
    let choice: u8 = input.int_in_range(0..=7)?;
    let ifindex = input.int_in_range(1..=3)?;
    let from = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, input.int_in_range(1..=2)?);
    let transaction = input.int_in_range(0..=3)?;
    let message: VmMessage = match choice {
        0 | 1 => AgentSearchReply {
            agent: "vms1".to_owned(),
            domain: "viewer".to_owned(),
            destinations: vec!["vms2".to_owned()],
        }
        .into(),
        2 => MigrationResponse {
            prefix: input.arbitrary::<[u8; 16]>()?.into(),
            prefix_length: input.arbitrary()?,
            agent_address: input.arbitrary::<[u8; 16]>()?.into(),
        }
        .into(),
        3 | 4 => MigrationProgress {
            phase: *input.choose(&Phase::ALL)?,
            processed_bytes: input.arbitrary()?,
            total_bytes: input.arbitrary()?,
            elapsed_ms: input.arbitrary()?,
            vm_pause_ms: input.arbitrary()?,
            clock_ns: input.arbitrary()?,
        }
        .into(),
        5 => MigrationAbort(Reason::unspecified("No".to_owned())).into(),
        6 => {
            let length = input.len().min(input.int_in_range(0..=60)?);
            let bytes = input.bytes(length)?;
            client.handle_datagram(*now, ifindex, from, bytes);
            return Ok(());
        }
        _ => {
            *now += Duration::from_millis(input.int_in_range(0..=5000)?);
            client.handle_timeout(*now);
            assert!(client.poll_timeout().is_none_or(|due| due > *now));
            return Ok(());
        }
    };
    client.handle_datagram(*now, ifindex, from, &message.encode(transaction));
    Ok(())
}
