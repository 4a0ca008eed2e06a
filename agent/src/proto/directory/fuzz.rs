//! Agents, relays and strangers at a migration control server.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what fails here is what is looked for"
)]

use std::time::Duration;

use arbitrary::{Result, Unstructured};
use common::signal::{
    AddressRange, DirectoryMessage, MAX_DATAGRAM_BYTES, Register, RelaySearch, Role,
};

use super::{Directory, DirectoryConfig};
use crate::glob::Glob;
use crate::proto::Timestamp;

const LEASE: Duration = Duration::from_secs(60);
const CAPACITY: usize = 3;

/// Runs a server on fuzzed inputs, and checks that nothing is left after all peers fall silent.
pub(in crate::proto) fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let pattern = |text: &str| vec![Glob::try_from(text).unwrap()];
    let mut directory = Directory::new(DirectoryConfig {
        name: "mcs1".to_owned(),
        lease: LEASE,
        capacity: CAPACITY,
        agents: pattern("vms*"),
        relays: pattern("relay*"),
    });
    let mut now = Timestamp(1_000_000_000_000);
    while !input.is_empty() && next(&mut input, &mut directory, &mut now).is_ok() {
        let mut answers = 0;
        while let Some(output) = directory.poll_output() {
            answers += 1;
            assert!(output.bytes.len() <= MAX_DATAGRAM_BYTES);
            DirectoryMessage::decode(&output.bytes).expect("a message");
        }
        assert!(answers <= 1);
        assert!(directory.registrations().count() <= CAPACITY);
        assert!(directory.poll_timeout().is_none_or(|due| due > now));
    }
    directory.handle_timeout(now + LEASE);
    assert_eq!(directory.registrations().count(), 0);
    assert_eq!(directory.poll_timeout(), None);
}

fn next(
    input: &mut Unstructured<'_>,
    directory: &mut Directory,
    now: &mut Timestamp,
) -> Result<()> {
    let peers = ["vms1", "vms2", "relay1", "relay2", "relay3", "stranger"];
    let peer = *input.choose(&peers)?;
    let site = |input: &mut Unstructured<'_>| -> Result<String> {
        Ok((*input.choose(&["", "a", "b"])?).to_owned())
    };
    let bytes = match input.int_in_range(0..=4)? {
        0 => {
            let serves = input.int_in_range(0..=3)?;
            let register = Register {
                role: *input.choose(&[Role::Agent, Role::Relay])?,
                address: input.arbitrary::<[u8; 16]>()?.into(),
                site: site(input)?,
                serves: (0..serves)
                    .map(|_| {
                        Ok(AddressRange {
                            address: [input.arbitrary::<u8>()?; 16].into(),
                            length: input.arbitrary()?,
                        })
                    })
                    .collect::<Result<_>>()?,
            };
            DirectoryMessage::from(register).encode(1)
        }
        1 => {
            let search = RelaySearch {
                multicast_address: [input.arbitrary::<u8>()?; 16].into(),
                site: site(input)?,
            };
            DirectoryMessage::from(search).encode(2)
        }
        2 => {
            let length = input.len().min(input.int_in_range(0..=60)?);
            input.bytes(length)?.to_vec()
        }
        _ => {
            *now = *now + Duration::from_secs(input.int_in_range(0..=70)?);
            directory.handle_timeout(*now);
            return Ok(());
        }
    };
    directory.handle_frame(*now, peer, &bytes);
    Ok(())
}
