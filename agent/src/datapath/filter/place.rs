//! Chooses the filter list for a program on an interface without TCX, depending on the existing
//! qdiscs.
//!
//! | direction | existing qdisc | TAP | any other port |
//! |---|---|---|---|
//! | ingress | `clsact`, `ingress` | filter on this qdisc | filter on this qdisc |
//! | ingress | none | add `ingress` | add `clsact` |
//! | egress | `clsact` | filter on this qdisc | filter on this qdisc |
//! | egress | classful at the root | filter on this qdisc | filter on this qdisc |
//! | egress | only the kernel's default | add HTB at the root | add `clsact` |
//! | egress | another one at the root | refused | refused |
//!
//! The agent never adds `clsact` to a TAP. To set a domain's `<bandwidth>`, libvirt deletes the
//! qdisc `ingress` and the root qdisc, whoever added them, and adds its own. A `clsact` is not
//! deleted by that, and blocks the addition of `ingress`.

use super::super::hook::Program;
use crate::net::tc::{INGRESS, NewQdisc, Parent, Qdisc, ROOT, Side};

/// Handle of our root qdisc in place of the kernel's default one ("rc").
pub(super) const OWN_ROOT: u32 = 0x7263_0000;
/// Handle of our root qdisc in place of the `noqueue` that libvirt adds.
pub(super) const OWN_ROOT_NOQUEUE: u32 = 0x7264_0000;
/// Queue length of our root qdisc in packets; a TAP accepts each packet at once.
const QUEUE: u32 = 1000;
/// Qdiscs that pass a packet as without filters if no filter decides. Others (`fq_codel`, `sfq`)
/// drop the packet.
const CLASSFUL: [&str; 3] = ["htb", "hfsc", "prio"];

/// Ingress and root qdisc of one interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::datapath) struct Qdiscs {
    pub(in crate::datapath) root: Option<Qdisc>,
    pub(in crate::datapath) ingress: Option<Qdisc>,
}

impl Qdiscs {
    /// Selects the qdiscs of an interface from all qdiscs.
    pub(in crate::datapath) fn of(all: &[Qdisc], ifindex: u32) -> Self {
        let at = |parent| {
            let mut found = all.iter();
            found
                .find(|qdisc| qdisc.ifindex == ifindex && qdisc.parent == parent)
                .cloned()
        };
        Self {
            root: at(ROOT),
            ingress: at(INGRESS),
        }
    }

    /// Returns all filter lists of the interface.
    pub(super) fn parents(&self) -> Vec<Parent> {
        let ingress = match kind(self.ingress.as_ref()) {
            "clsact" => vec![Parent::Clsact(Side::Ingress), Parent::Clsact(Side::Egress)],
            "ingress" => vec![Parent::Ingress],
            _ => Vec::new(),
        };
        ingress.into_iter().chain(self.classful_root()).collect()
    }

    fn classful_root(&self) -> Option<Parent> {
        let root = self.root.as_ref()?;
        let is_one = root.handle != 0 && CLASSFUL.contains(&root.kind.as_str());
        is_one.then_some(Parent::Root {
            handle: root.handle,
        })
    }

    /// Returns the root qdisc if the agent added it.
    pub(super) fn own_root(&self) -> Option<&Qdisc> {
        let root = self.root.as_ref()?;
        let is_ours = root.kind == "htb" && [OWN_ROOT, OWN_ROOT_NOQUEUE].contains(&root.handle);
        is_ours.then_some(root)
    }
}

/// Decision about the filter of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The filter goes into this existing list.
    At(Parent),
    /// The filter needs this qdisc, to be added first.
    Make(NewQdisc),
    /// A qdisc of another owner has no room for the filter; the text says what to do.
    Taken(String),
}

/// Decides where the filter of a program belongs.
pub(super) fn place(program: Program, interface: &str, qdiscs: &Qdiscs) -> Place {
    let side = program.side();
    match (kind(qdiscs.ingress.as_ref()), side) {
        ("clsact", side) => Place::At(Parent::Clsact(side)),
        ("ingress", Side::Ingress) => Place::At(Parent::Ingress),
        ("", Side::Ingress) if program.is_for_taps() => Place::Make(NewQdisc::Ingress),
        ("", _) if !program.is_for_taps() => Place::Make(NewQdisc::Clsact),
        ("" | "ingress", Side::Egress) => at_root(program, interface, qdiscs),
        (kind, Side::Ingress | Side::Egress) => Place::Taken(format!(
            "its qdisc `{kind}` has no room for filters of others; delete it \
             (`tc qdisc del dev {interface} {kind}`)"
        )),
    }
}

fn at_root(program: Program, interface: &str, qdiscs: &Qdiscs) -> Place {
    if let Some(parent) = qdiscs.classful_root() {
        return Place::At(parent);
    }
    if !program.is_for_taps() {
        return Place::Taken(format!(
            "it has a qdisc `ingress` of somebody else, and without TCX only `clsact` has a place \
             for {name} on its way out; replace it (`tc qdisc del dev {interface} ingress; \
             tc qdisc add dev {interface} clsact`)",
            name = program.name()
        ));
    }
    let handle = match qdiscs.root.as_ref() {
        Some(root) if root.handle != 0 && root.kind == "noqueue" => OWN_ROOT_NOQUEUE,
        Some(root) if root.handle != 0 => {
            return Place::Taken(format!(
                "without TCX its place is the root qdisc, and `{}` of somebody else there has none \
                 for it; delete that (`tc qdisc del dev {interface} root`)",
                root.kind
            ));
        }
        _ => OWN_ROOT,
    };
    Place::Make(NewQdisc::Htb {
        handle,
        queue: QUEUE,
    })
}

fn kind(qdisc: Option<&Qdisc>) -> &str {
    qdisc.map_or("", |qdisc| &qdisc.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qdisc(parent: u32, kind: &str, handle: u32) -> Qdisc {
        Qdisc {
            ifindex: 7,
            kind: kind.to_owned(),
            handle,
            parent,
        }
    }

    fn decide(program: Program, ingress: Option<&str>, root: Option<(&str, u32)>) -> Place {
        let mut all = vec![qdisc(INGRESS, "clsact", 0xffff_0000)];
        all[0].ifindex = 8;
        all.extend(ingress.map(|kind| qdisc(INGRESS, kind, 0xffff_0000)));
        all.extend(root.map(|(kind, handle)| qdisc(ROOT, kind, handle)));
        place(program, "vnet0", &Qdiscs::of(&all, 7))
    }

    #[test]
    fn tap_gets_qdiscs_that_libvirt_takes_away_and_never_clsact() {
        assert_eq!(
            decide(Program::Snoop, None, Some(("noqueue", 0x8001_0000))),
            Place::Make(NewQdisc::Ingress)
        );
        for (root, handle) in [
            (None, OWN_ROOT),
            (Some(("pfifo_fast", 0)), OWN_ROOT),
            (Some(("mq", 0)), OWN_ROOT),
            (Some(("noqueue", 0x8001_0000)), OWN_ROOT_NOQUEUE),
        ] {
            let queue = QUEUE;
            assert_eq!(
                decide(Program::Gate, Some("ingress"), root),
                Place::Make(NewQdisc::Htb { handle, queue })
            );
        }
    }

    #[test]
    fn egress_program_is_never_put_on_a_qdisc_ingress() {
        for program in Program::ALL {
            for root in [None, Some(("htb", 0x1_0000)), Some(("fq_codel", 0x1_0000))] {
                let place = decide(program, Some("ingress"), root);
                let is_ingress = place == Place::At(Parent::Ingress);
                assert_eq!(is_ingress, program.side() == Side::Ingress, "{place:?}");
            }
        }
    }

    #[test]
    fn qdiscs_of_others_that_have_room_are_used() {
        for program in Program::ALL {
            assert_eq!(
                decide(program, Some("clsact"), Some(("fq_codel", 0x1_0000))),
                Place::At(Parent::Clsact(program.side()))
            );
        }
        for kind in CLASSFUL {
            let root = Parent::Root { handle: 0x1_0000 };
            let root_of = |program| decide(program, Some("ingress"), Some((kind, 0x1_0000)));
            assert_eq!(root_of(Program::Gate), Place::At(root));
            assert_eq!(root_of(Program::Leak), Place::At(root));
        }
        assert_eq!(
            decide(Program::Leak, None, Some(("htb", 0x1_0000))),
            Place::Make(NewQdisc::Clsact)
        );
    }

    #[test]
    fn refusal_says_what_to_do() {
        for (program, ingress, root, command) in [
            (
                Program::Gate,
                None,
                "fq_codel",
                "tc qdisc del dev vnet0 root",
            ),
            (
                Program::Leak,
                Some("ingress"),
                "mq",
                "tc qdisc add dev vnet0 clsact",
            ),
        ] {
            let Place::Taken(reason) = decide(program, ingress, Some((root, 0x1_0000))) else {
                panic!("{root} has no room");
            };
            assert!(reason.contains(command), "{reason}");
        }
    }
}
