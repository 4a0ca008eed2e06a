//! Two nodes of MAT on either side of a router, each with a data path, and a host without MAT.
//!
//! ```text
//!  a --eth0------ router ----eth0-- b      b has two NICs, on two links
//!                 |  '----eth1--'
//!                 '-------eth0-- c      a correspondent without MAT
//! ```

use std::net::Ipv6Addr;
use std::sync::mpsc;
use std::thread;

use common::mat::counter::Counter;
use common::mat::neutral::neutral;
use linux::netlink::Netlink;
use migkick::datapath::Datapath;
use migkick::interface::{self, Interface};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::netns::{Namespace, privileged};

/// Home prefix of both nodes: address and length.
pub const HOME: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfd5e, 0x6d61, 0x74, 0, 0, 0, 0, 0), 48);
/// Permanent address of node `a`.
pub const HOA_A: Ipv6Addr = Ipv6Addr::new(0xfd5e, 0x6d61, 0x74, 0, 0, 0, 0, 0xa);
/// Permanent address of node `b`.
pub const HOA_B: Ipv6Addr = Ipv6Addr::new(0xfd5e, 0x6d61, 0x74, 0, 0x1234, 0, 0, 0xb);
/// Address of the correspondent without MAT.
pub const C: &str = "2001:db8:c::c";

/// Returns true if the test may make nodes; prints the reason otherwise.
pub fn possible() -> bool {
    if !privileged() {
        return false;
    }
    let has_tcx = migkick::datapath::has_tcx();
    if !has_tcx {
        println!("skipped: this kernel has no TCX, which nodes need");
    }
    has_tcx
}

/// Choice of a node's MoAs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moas {
    /// Addresses that leave checksums as they are.
    Neutral,
    /// Addresses as the network assigned them, so that checksums change.
    Given,
}

/// Job for a node's thread.
type Job = Box<dyn FnOnce(&mut Option<Datapath>) + Send>;

/// A node: a namespace, and a thread in it that owns the data path.
pub struct Node {
    /// Namespace with the node's NICs.
    pub namespace: Namespace,
    /// Permanent address of the node.
    pub hoa: Ipv6Addr,
    /// MoA of each NIC.
    pub moas: Vec<Ipv6Addr>,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Node {
    fn new(namespace: Namespace, hoa: Ipv6Addr, networks: &[&str], moas: Moas) -> Self {
        let moas: Vec<Ipv6Addr> = networks
            .iter()
            .map(|network| {
                let address: Ipv6Addr = format!("{network}:1:2:3:4").parse().unwrap();
                match moas {
                    Moas::Neutral => neutral(address.octets(), hoa.octets()).into(),
                    Moas::Given => address,
                }
            })
            .collect();
        for (index, moa) in moas.iter().enumerate() {
            namespace.ip(&format!("addr add {moa}/64 dev eth{index} nodad"));
            let router = format!("{}::ff", networks[index].trim_end_matches(":0"));
            namespace.ip(&format!(
                "-6 route append default via {router} dev eth{index}"
            ));
        }
        let (jobs, todo) = mpsc::channel::<Job>();
        let name = namespace.name().to_owned();
        let thread = thread::spawn(move || {
            enter(&name);
            let mut datapath = None;
            for job in todo {
                job(&mut datapath);
            }
        });
        let node = Self {
            namespace,
            hoa,
            moas,
            jobs: Some(jobs),
            thread: Some(thread),
        };
        node.attach();
        node
    }

    /// Attaches the data path, with the first NIC active.
    pub fn attach(&self) {
        let (hoa, moas) = (self.hoa, self.moas.clone());
        self.slot(move |slot| {
            let nics = nics();
            let mut datapath = Datapath::attach(hoa, HOME, &nics).unwrap();
            datapath.set_own(&moas).unwrap();
            datapath.set_active(&nics[0], moas[0]).unwrap();
            *slot = Some(datapath);
        });
    }

    /// Runs a closure on the slot of the data path, which may be empty.
    pub fn slot<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Option<Datapath>) -> T + Send + 'static,
    ) -> T {
        let (done, result) = mpsc::channel();
        let job: Job = Box::new(move |slot| drop(done.send(work(slot))));
        self.jobs.as_ref().unwrap().send(job).unwrap();
        result.recv().expect("job of the node")
    }

    /// Runs a closure on the data path.
    pub fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Datapath) -> T + Send + 'static,
    ) -> T {
        self.slot(|slot| work(slot.as_mut().expect("data path")))
    }

    /// Maps another node's HoA to the MoA of one of its NICs; accepts all of its MoAs.
    pub fn knows(&self, peer: &Self, nic: usize) {
        let (hoa, to, from) = (peer.hoa, peer.moas[nic], peer.moas.clone());
        self.with(move |it| it.set_peer(hoa, to, &from)).unwrap();
    }

    /// Switches sending to another NIC.
    pub fn switch(&self, nic: usize) {
        let moa = self.moas[nic];
        self.with(move |it| it.set_active(&nics()[nic], moa))
            .unwrap();
    }

    /// Returns one counter of the data path.
    pub fn counter(&self, counter: Counter) -> u64 {
        let counters = self.with(|it| it.counters()).unwrap();
        counters
            .into_iter()
            .find_map(|(it, value)| (it == counter).then_some(value))
            .unwrap()
    }

    /// Returns all counters that are not zero.
    pub fn counted(&self) -> Vec<(&'static str, u64)> {
        let counters = self.with(|it| it.counters()).unwrap();
        counters
            .into_iter()
            .filter(|(_, value)| *value != 0)
            .map(|(counter, value)| (counter.as_str(), value))
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Returns the NICs of this thread's namespace, by name.
pub fn nics() -> Vec<Interface> {
    let mut nics = interface::list(&mut Netlink::open().unwrap()).unwrap();
    nics.sort_by(|one, other| one.name.cmp(&other.name));
    nics
}

/// Moves this thread into a namespace, with its own mounts, so that the data path mounts a separate
/// BPF file system.
fn enter(name: &str) {
    let file = std::fs::File::open(format!("/run/netns/{name}")).unwrap();
    nix::sched::setns(file, CloneFlags::CLONE_NEWNET).unwrap();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    // All nodes would share a BPF file system that the host has mounted. Without it, each node
    // mounts its own.
    let _ = umount2("/sys/fs/bpf", MntFlags::MNT_DETACH);
}

/// Both nodes, the correspondent and the router.
pub struct Net {
    /// Node with one NIC.
    pub a: Node,
    /// Node with two NICs.
    pub b: Node,
    /// Correspondent without MAT.
    pub c: Namespace,
    /// Router between all links.
    pub router: Namespace,
}

impl Net {
    /// Makes two nodes that know each other.
    pub fn new(moas: Moas) -> Self {
        let net = Self::strangers(moas);
        net.a.knows(&net.b, 0);
        net.b.knows(&net.a, 0);
        net
    }

    /// Makes two nodes that do not know each other.
    pub fn strangers(moas: Moas) -> Self {
        let [a, b, c, router] = ["a", "b", "c", "router"].map(Namespace::new);
        for (node, nic, port, network) in [
            (&a, "eth0", "to-a", "2001:db8:a"),
            (&b, "eth0", "to-b0", "2001:db8:b0"),
            (&b, "eth1", "to-b1", "2001:db8:b1"),
            (&c, "eth0", "to-c", "2001:db8:c"),
        ] {
            node.ip(&format!(
                "link add {nic} type veth peer name {port} netns {}",
                router.name()
            ));
            node.ip(&format!("link set {nic} up"));
            router.ip(&format!("link set {port} up"));
            router.ip(&format!("addr add {network}::ff/64 dev {port} nodad"));
        }
        router.run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap());
        c.ip(&format!("addr add {C}/64 dev eth0 nodad"));
        c.ip("-6 route add default via 2001:db8:c::ff");
        Self {
            a: Node::new(a, HOA_A, &["2001:db8:a:0"], moas),
            b: Node::new(b, HOA_B, &["2001:db8:b0:0", "2001:db8:b1:0"], moas),
            c,
            router,
        }
    }
}
