//! What the programs of Roamcast ask of a Linux host.
//!
//! | module | does |
//! |---|---|
//! | [`netlink`] | requests to the kernel's routing tables and links, and notices of changes |

pub mod netlink;
