//! Attachment of programs by filters of qdiscs, for kernels without TCX.
//!
//! A filter has no link to pin. Its name identifies the owner (`name`), and the filter outlives the
//! agent; the next agent replaces the program in the filter without a gap. Other programs may
//! delete the qdisc together with the filter; [`crate::net::tc::Notices`] reports that.

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

/// Handle of our filters ("rc" in ASCII).
const HANDLE: u32 = 0x7263;
/// Lowest preference of our filters at the ingress and on `clsact`: before all other filters.
const FIRST: u16 = 1;
/// Lowest preference of our filters on a root qdisc. libvirt's own filters use 1 and 2 there, and
/// the kernel refuses them if a filter of another kind has these preferences.
const FIRST_AT_ROOT: u16 = 3;
/// Attempts to add a filter while other programs change the qdiscs.
const ATTEMPTS: usize = 5;

/// Why a filter cannot be added.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilterError {
    /// A qdisc of another owner blocks the filter; the text says what to do.
    #[error("{0}")]
    Taken(String),
    /// The kernel refused a request.
    #[error("{0}")]
    Refused(#[from] TcRefusal),
}

impl From<io::Error> for FilterError {
    fn from(error: io::Error) -> Self {
        Self::Refused(error.into())
    }
}

/// Whether the agent may add qdiscs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Make {
    /// The agent adds the qdiscs that it needs.
    Qdiscs,
    /// The agent uses existing qdiscs only, because libvirt may be about to add one.
    Nothing,
}

/// Result of [`Filters::set`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Made {
    pub(super) parent: Parent,
    /// Whether a filter of the same program existed before.
    pub(super) replaced: bool,
}

/// A filter of ours on an interface.
pub(super) struct Found {
    pub(super) program: Program,
    parent: Parent,
    filter: Filter,
    is_old: bool,
}

/// The filters of one agent in one network namespace.
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

    /// Adds the filter of a program, or replaces the program in it. Returns `None` if that needs a
    /// qdisc that may not be added. Removes other filters of the same program on this interface.
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

    /// Removes the filters of the programs selected by `concerns` from an interface, and our qdiscs
    /// that no filter uses any more. Returns true if there was a filter.
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

    /// Returns (program, interface) of all our filters.
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

    /// Removes all our filters and qdiscs on all interfaces; returns the number of filters.
    pub(super) fn remove_all(&mut self) -> Result<usize, TcRefusal> {
        let filters = self.all()?;
        let interfaces: BTreeSet<u32> = filters.iter().map(|(_, ifindex)| *ifindex).collect();
        for ifindex in interfaces {
            self.remove(ifindex, |_| true)?;
        }
        self.delete_empty_roots(&[])?;
        Ok(filters.len())
    }

    /// Deletes our root qdiscs without filters on all interfaces except these.
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
            // A root qdisc of another agent still has its filter.
            if self.tc.filters(root.ifindex, parent)?.is_empty() {
                self.delete_root(root)?;
                deleted += 1;
            }
        }
        Ok(deleted)
    }

    /// Returns the filters that see packets before the filter of a program; `None` if that filter
    /// does not exist.
    pub(super) fn before(
        &mut self,
        program: Program,
        ifindex: u32,
        parent: Parent,
        qdiscs: &Qdiscs,
    ) -> io::Result<Option<Vec<Filter>>> {
        // Without `clsact` the kernel takes an egress parent as the ingress direction.
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
        // Packets enter other chains only through filters of chain 0.
        let before = filters.into_iter().take(place);
        Ok(Some(before.filter(|filter| filter.chain == 0).collect()))
    }

    /// Returns the qdiscs of all interfaces.
    pub(super) fn all_qdiscs(&mut self) -> io::Result<Vec<Qdisc>> {
        self.tc.all_qdiscs()
    }

    fn qdiscs(&mut self, ifindex: u32) -> io::Result<Qdiscs> {
        Ok(Qdiscs::of(&self.tc.all_qdiscs()?, ifindex))
    }

    /// Returns our filters on an interface.
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

    /// Whether a TAP has the `clsact` that earlier versions added, without filters of other owners.
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

    /// Deletes our root qdisc if it has no filter, and an ingress qdisc without any filter, which
    /// has no effect.
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

    /// Deletes our root qdisc, and restores the `noqueue` that it replaced.
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

/// Lowest free preference.
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

/// Treats a missing object as removed.
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
