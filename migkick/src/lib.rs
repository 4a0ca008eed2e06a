//! What the program `migkick` stands on, and integration tests too.
//!
//! | module | holds |
//! |---|---|
//! | [`datapath`] | the kernel programs of MAT, their maps, and `mat0` |
//! | [`interface`] | the NICs |
//! | [`netlink`] | requests to the kernel |

pub mod datapath;
pub mod interface;
pub mod netlink;
