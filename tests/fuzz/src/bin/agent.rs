//! The targets of the agent, the relay and the servers.

#![no_main]

roamcast_fuzz::binary!(roamcast::fuzz::TARGETS);
