//! Programs attached by filters of qdiscs, where the kernel has no TCX.
//!
//! A filter has no link to pin. Its name tells whose it is (`name`), and it outlives the agent; the
//! next one exchanges the program in it without a gap. Others may take the qdisc away, and the
//! filter with it: [`crate::net::tc::Notices`] tells.

mod name;
mod place;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;

use super::hook::Program;
use crate::net::tc::{BpfFilter, Filter, NewQdisc, Parent, Qdisc, Side, TcRefusal, TrafficControl};
use name::{Names, Owned};
use place::{OWN_ROOT_NOQUEUE, Place};

pub(super) use place::Qdiscs;

/// Handle of our filters ("rc").
const HANDLE: u32 = 0x7263;
/// The least preference that our filters ask for at the ingress and on `clsact`: before all others.
const FIRST: u16 = 1;
/// The same on a root qdisc: libvirt gives its own filters there 1 and 2, and the kernel refuses
/// them if another kind has those.
const FIRST_AT_ROOT: u16 = 3;
/// How often the qdiscs are looked at again because they have changed meanwhile.
const ATTEMPTS: usize = 5;

/// Why a filter could not be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilterError {
    /// A qdisc of somebody else is in the way.
    #[error("{0}")]
    Taken(String),
    /// The kernel refused it.
    #[error("{0}")]
    Refused(#[from] TcRefusal),
}

impl From<io::Error> for FilterError {
    fn from(error: io::Error) -> Self {
        Self::Refused(error.into())
    }
}

/// Whether qdiscs of ours may be made where they are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Make {
    /// They may.
    Qdiscs,
    /// Only qdiscs that are there are used: somebody may be about to add one.
    Nothing,
}

/// A filter that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Made {
    pub(super) parent: Parent,
    /// Whether there was a filter of the same program.
    pub(super) replaced: bool,
}

/// A filter of ours that was found.
pub(super) struct Found {
    pub(super) program: Program,
    parent: Parent,
    filter: Filter,
    is_old: bool,
}

/// The filters of one agent, in the network namespace that this was opened in.
pub(super) struct Filters {
    tc: TrafficControl,
    names: Names,
}

impl Filters {
    pub(super) fn open(pin_root: &Path) -> io::Result<Self> {
        Ok(Self {
            tc: TrafficControl::open()?,
            names: Names::new(pin_root),
        })
    }

    /// Makes the filter of a program, or exchanges the program in it; `None` if that takes a qdisc
    /// that may not be made. Other filters of the program on this interface are removed.
    pub(super) fn set(
        &mut self,
        program: Program,
        descriptor: RawFd,
        (ifindex, interface): (u32, &str),
        make: Make,
    ) -> Result<Option<Made>, FilterError> {
        let mut refusal = None;
        for _ in 0..ATTEMPTS {
            let qdiscs = self.qdiscs(ifindex)?;
            let found = self.found(ifindex, &qdiscs)?;
            if self.is_old_clsact(&qdiscs, &found)? {
                if make == Make::Nothing {
                    return Ok(None);
                }
                self.delete_ingress(&qdiscs)?;
                continue;
            }
            match place::place(program, interface, &qdiscs) {
                Place::Taken(reason) => return Err(FilterError::Taken(reason)),
                Place::Make(_) if make == Make::Nothing => return Ok(None),
                Place::Make(qdisc) => match self.make(ifindex, qdisc, &qdiscs) {
                    Ok(()) => {}
                    Err(error) if is(&error, libc::EEXIST) => refusal = Some(error),
                    Err(error) => return Err(error.into()),
                },
                Place::At(parent) => match self.put(program, descriptor, ifindex, parent, &found) {
                    Ok(made) => return Ok(Some(made)),
                    Err(error) if is(&error, libc::ENODEV) => return Err(error.into()),
                    Err(error) => refusal = Some(error),
                },
            }
        }
        let gave_up = || io::Error::other("its qdiscs do not stay as they are").into();
        Err(refusal.unwrap_or_else(gave_up).into())
    }

    /// Removes the filters of programs on an interface, and qdiscs of ours that nobody needs any
    /// more; returns whether there was one.
    pub(super) fn remove(
        &mut self,
        ifindex: u32,
        concerns: impl Fn(Program) -> bool,
    ) -> Result<bool, TcRefusal> {
        let qdiscs = self.qdiscs(ifindex)?;
        let found = self.found(ifindex, &qdiscs)?;
        let mut removed = false;
        for own in found.iter().filter(|own| concerns(own.program)) {
            unless_gone(self.tc.delete_filter(&own.filter))?;
            removed = true;
        }
        if removed {
            self.delete_unused(ifindex)?;
        }
        Ok(removed)
    }

    /// Filters of ours, on all interfaces.
    pub(super) fn all(&mut self) -> io::Result<BTreeSet<(Program, u32)>> {
        let all = self.tc.all_qdiscs()?;
        let interfaces: BTreeSet<u32> = all.iter().map(|qdisc| qdisc.ifindex).collect();
        let mut filters = BTreeSet::new();
        for ifindex in interfaces {
            let found = self.found(ifindex, &Qdiscs::of(&all, ifindex))?;
            filters.extend(found.iter().map(|own| (own.program, ifindex)));
        }
        Ok(filters)
    }

    /// Removes all filters and qdiscs of ours, from all interfaces; returns the number of filters.
    pub(super) fn remove_all(&mut self) -> Result<usize, TcRefusal> {
        let filters = self.all()?;
        let interfaces: BTreeSet<u32> = filters.iter().map(|(_, ifindex)| *ifindex).collect();
        for ifindex in interfaces {
            self.remove(ifindex, |_| true)?;
        }
        self.delete_empty_roots(&[])?;
        Ok(filters.len())
    }

    /// Removes root qdiscs of ours that have no filter, from all interfaces but these.
    pub(super) fn delete_empty_roots(&mut self, except: &[u32]) -> Result<usize, TcRefusal> {
        let all = self.tc.all_qdiscs()?;
        let mut deleted = 0;
        for root in &all {
            let qdiscs = Qdiscs::of(&all, root.ifindex);
            if qdiscs.own_root() != Some(root) || except.contains(&root.ifindex) {
                continue;
            }
            let parent = Parent::Root {
                handle: root.handle,
            };
            // That of another agent has its filter.
            if self.tc.filters(root.ifindex, parent)?.is_empty() {
                self.delete_root(root)?;
                deleted += 1;
            }
        }
        Ok(deleted)
    }

    /// The filters that see packets before that of a program does; `None` if that is not at its place.
    pub(super) fn before(
        &mut self,
        program: Program,
        ifindex: u32,
        parent: Parent,
        qdiscs: &Qdiscs,
    ) -> io::Result<Option<Vec<Filter>>> {
        // The kernel takes an egress parent for the ingress side if the qdisc there is not `clsact`.
        if !qdiscs.parents().contains(&parent) {
            return Ok(None);
        }
        let filters = self.tc.filters(ifindex, parent)?;
        let is_it = |filter: &Filter| {
            let owner = self.names.owner(filter);
            owner.is_some_and(|owner| owner.program == program)
        };
        let Some(place) = filters.iter().position(is_it) else {
            return Ok(None);
        };
        // Other chains are gone to by filters of this one.
        let before = filters.into_iter().take(place);
        Ok(Some(before.filter(|filter| filter.chain == 0).collect()))
    }

    /// The qdiscs of all interfaces.
    pub(super) fn all_qdiscs(&mut self) -> io::Result<Vec<Qdisc>> {
        self.tc.all_qdiscs()
    }

    fn qdiscs(&mut self, ifindex: u32) -> io::Result<Qdiscs> {
        Ok(Qdiscs::of(&self.tc.all_qdiscs()?, ifindex))
    }

    /// Filters of ours on an interface.
    fn found(&mut self, ifindex: u32, qdiscs: &Qdiscs) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for parent in qdiscs.parents() {
            for filter in self.tc.filters(ifindex, parent)? {
                if let Some(Owned { program, is_old }) = self.names.owner(&filter) {
                    found.push(Found {
                        program,
                        parent,
                        filter,
                        is_old,
                    });
                }
            }
        }
        Ok(found)
    }

    /// Whether a TAP has the `clsact` that earlier versions gave it, and nobody else uses that.
    fn is_old_clsact(&mut self, qdiscs: &Qdiscs, found: &[Found]) -> io::Result<bool> {
        let Some(clsact) = qdiscs.ingress.as_ref().filter(|it| it.kind == "clsact") else {
            return Ok(false);
        };
        let is_old = |own: &Found| own.is_old && own.program.is_for_taps();
        if !found.iter().any(is_old) {
            return Ok(false);
        }
        let of_all: usize = [Side::Ingress, Side::Egress]
            .into_iter()
            .map(|side| Ok(self.tc.filters(clsact.ifindex, Parent::Clsact(side))?.len()))
            .sum::<io::Result<usize>>()?;
        Ok(found.iter().filter(|own| is_old(own)).count() == of_all)
    }

    fn make(&mut self, ifindex: u32, qdisc: NewQdisc, there: &Qdiscs) -> Result<(), TcRefusal> {
        if let (NewQdisc::Htb { handle, .. }, Some(root)) = (qdisc, &there.root)
            && handle == OWN_ROOT_NOQUEUE
        {
            unless_gone(self.tc.delete_qdisc(root))?;
        }
        self.tc.add_qdisc(ifindex, qdisc)
    }

    fn put(
        &mut self,
        program: Program,
        descriptor: RawFd,
        ifindex: u32,
        parent: Parent,
        found: &[Found],
    ) -> Result<Made, TcRefusal> {
        let here = self.tc.filters(ifindex, parent)?;
        let own: Vec<&Found> = found.iter().filter(|own| own.program == program).collect();
        let same = own.iter().find(|own| own.parent == parent && !own.is_old);
        let (preference, handle) = match same {
            Some(own) => (own.filter.preference, own.filter.handle),
            None => (free_preference(parent, &here), HANDLE),
        };
        let name = self.names.of(program);
        let filter = BpfFilter {
            name: &name,
            program: descriptor,
            preference,
            handle,
        };
        self.tc.set_filter(ifindex, parent, &filter)?;
        for other in &own {
            let is_it = same.is_some_and(|same| same.filter == other.filter);
            if !is_it {
                unless_gone(self.tc.delete_filter(&other.filter))?;
            }
        }
        Ok(Made {
            parent,
            replaced: !own.is_empty(),
        })
    }

    /// Removes a root qdisc of ours without filters of ours, and a qdisc at the ingress that has no
    /// filter at all: it does nothing.
    fn delete_unused(&mut self, ifindex: u32) -> Result<(), TcRefusal> {
        let qdiscs = self.qdiscs(ifindex)?;
        let mut at_ingress = 0;
        for parent in qdiscs.parents() {
            match parent {
                Parent::Root { .. } => {
                    if let Some(root) = qdiscs.own_root()
                        && self.tc.filters(ifindex, parent)?.is_empty()
                    {
                        self.delete_root(root)?;
                    }
                }
                Parent::Ingress | Parent::Clsact(_) => {
                    at_ingress += self.tc.filters(ifindex, parent)?.len();
                }
            }
        }
        if at_ingress == 0 {
            self.delete_ingress(&qdiscs)?;
        }
        Ok(())
    }

    fn delete_ingress(&mut self, qdiscs: &Qdiscs) -> Result<(), TcRefusal> {
        match &qdiscs.ingress {
            Some(ingress) => unless_gone(self.tc.delete_qdisc(ingress)),
            None => Ok(()),
        }
    }

    /// Removes a root qdisc of ours, and makes that again which it took the place of.
    fn delete_root(&mut self, root: &Qdisc) -> Result<(), TcRefusal> {
        unless_gone(self.tc.delete_qdisc(root))?;
        if root.handle == OWN_ROOT_NOQUEUE {
            let again = self.tc.add_qdisc(root.ifindex, NewQdisc::NoQueue);
            return again.or_else(|refusal| {
                let is_taken = is(&refusal, libc::EEXIST);
                if is_taken {
                    Ok(())
                } else {
                    unless_gone(Err(refusal))
                }
            });
        }
        Ok(())
    }
}

/// The least preference that nobody has.
fn free_preference(parent: Parent, filters: &[Filter]) -> u16 {
    let first = match parent {
        Parent::Root { .. } => FIRST_AT_ROOT,
        Parent::Ingress | Parent::Clsact(_) => FIRST,
    };
    let taken: BTreeSet<u16> = filters.iter().map(|filter| filter.preference).collect();
    (first..=u16::MAX)
        .find(|preference| !taken.contains(preference))
        .unwrap_or(first)
}

fn is(refusal: &TcRefusal, code: i32) -> bool {
    refusal.error.raw_os_error() == Some(code)
}

/// What is not there any more does not have to be removed.
fn unless_gone(outcome: Result<(), TcRefusal>) -> Result<(), TcRefusal> {
    match outcome {
        Err(refusal)
            if [libc::ENOENT, libc::ENODEV, libc::EINVAL]
                .iter()
                .any(|code| is(&refusal, *code)) =>
        {
            tracing::debug!(%refusal, "it was gone already");
            Ok(())
        }
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(preferences: &[u16]) -> Vec<Filter> {
        let filter = |preference: &u16| Filter {
            ifindex: 7,
            parent: 0,
            kind: "u32".to_owned(),
            preference: *preference,
            protocol: 3,
            handle: 1,
            chain: 0,
            program: None,
        };
        preferences.iter().map(filter).collect()
    }

    #[test]
    fn filter_is_first_unless_somebody_is_and_leaves_libvirt_its_preferences() {
        let root = Parent::Root { handle: 0x1_0000 };
        assert_eq!(free_preference(Parent::Ingress, &filters(&[49152])), 1);
        assert_eq!(
            free_preference(Parent::Ingress, &filters(&[1, 2, 49152])),
            3
        );
        assert_eq!(free_preference(root, &filters(&[])), 3);
        assert_eq!(free_preference(root, &filters(&[1, 3])), 4);
    }
}
