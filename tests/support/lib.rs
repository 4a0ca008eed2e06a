//! What the tests and the benches share: hosts, guests and peers in namespaces, and the kernel
//! programs loaded alone. A function here panics where a test cannot go on.
//!
//! | module | contents |
//! |---|---|
//! | **programs** | |
//! | [`kernel`] | the host's programs and maps, loaded without an interface |
//! | [`gate`] | a TAP whose `gate` counts, records or holds, by program test-run |
//! | [`relay`] | relayed flows and their frames |
//! | [`told`] | decoded reports of the traced programs |
//! | [`test_run`] | program test-run with options that aya lacks |
//! | [`linked`] | instructions of a program, checked as old verifiers do |
//! | [`mat_world`], [`mat_frame`] | the node's programs with one peer, and their frames |
//! | **namespaces** | |
//! | [`netns`] | namespaces, commands in them, waiting |
//! | [`tap`] | TAPs, and a guest behind one |
//! | [`wire`] | raw frames on an interface |
//! | [`host`] | addresses and memberships of a host's guests |
//! | [`bridged`] | a TAP behind a bridge that a sender can reach |
//! | [`path`] | sender, relay and host on either side of a router |
//! | [`two_links`] | a host, and a destination behind a router |
//! | [`mat_net`], [`mat_app`] | two nodes and a router, and applications on them |
//! | [`vmm`], [`stops`] | a VMM that vhost-net serves, and its stops |
//! | **daemons** | |
//! | [`agent`] | the program `roamcast agent` |
//! | [`tended`], [`tracing`] | parts of an agent: its hooks, its tracing |
//! | [`relay_net`] | a relay with its networks and clients |
//! | [`ims`] | a mapping server and its nodes |
//! | [`signalling`] | both ends of the signalling |
//! | **foreign parties** | |
//! | [`certificate`], [`liar`], [`hostile`] | certificates, peers and frames of attackers |
//! | [`limits`] | libvirt's `tc` commands |
//! | [`capture`], [`mld`], [`tcpdump`] | captures by other parsers than Roamcast's |
//! | **benches** | |
//! | [`bench_relay`] | the cost of the relay, for a bench and for its test |

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]
#![allow(
    clippy::new_without_default,
    reason = "making namespaces is no default value"
)]

pub mod agent;
pub mod bench_relay;
pub mod bridged;
pub mod capture;
pub mod certificate;
pub mod gate;
pub mod host;
pub mod hostile;
pub mod ims;
pub mod kernel;
pub mod liar;
pub mod limits;
pub mod linked;
pub mod mat_app;
pub mod mat_frame;
pub mod mat_net;
pub mod mat_world;
pub mod mld;
pub mod netns;
pub mod path;
pub mod relay;
pub mod relay_net;
pub mod signalling;
pub mod stops;
pub mod tap;
pub mod tcpdump;
pub mod tended;
pub mod test_run;
pub mod told;
pub mod tracing;
pub mod two_links;
pub mod vmm;
pub mod wire;
