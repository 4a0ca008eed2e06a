//! Roamcast in network namespaces: real kernel listeners, bridges, routers and daemons, without VMs.
//! Needs root.

mod aggregates;
mod attacks;
mod bench_smoke;
mod cuts;
mod forwarding;
mod gate;
mod gate_probes;
mod hooks;
mod ims;
mod lab_hosts;
mod lab_network;
mod lab_removal;
mod machine;
mod mat_path;
mod membership;
mod peer_certificates;
mod peers;
mod relay_path;
mod relay_server;
mod restart;
mod snoop;
mod tap_queue;
mod trace;
mod units;
mod unread;
mod vhost;
