//! Ownership of filters by their names, which are free text and outlive the agent.

use std::collections::BTreeSet;
use std::path::Path;

use aya::maps::loaded_maps;
use aya::programs::loaded_programs;

use super::super::hook::Program;
use crate::net::tc::Filter;

/// Longest name of a filter in bytes (`CLS_BPF_NAME_LEN` less the final NUL).
const LONGEST: usize = 255;
/// A map that each of our programs uses; identifies our programs.
const COMMON_MAP: &str = "COUNTERS";

/// Names of the filters of an agent with one pin root: `roamcast/gate /sys/fs/bpf/roamcast`. Agents
/// with different roots ignore each other's filters.
#[derive(Clone, Debug)]
pub(super) struct Names(String);

/// Owner of a filter of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owned {
    pub(super) program: Program,
    /// Whether an earlier version added the filter, with the name of the program alone. That
    /// version added `clsact` to TAPs.
    pub(super) is_old: bool,
}

impl Names {
    pub(super) fn new(pin_root: &Path) -> Self {
        Self(pin_root.display().to_string())
    }

    pub(super) fn of(&self, program: Program) -> String {
        let mut name = format!("roamcast/{} {}", program.name(), self.0);
        while name.len() > LONGEST {
            name.pop();
        }
        name
    }

    /// Returns the program and version of a filter if it is ours.
    pub(super) fn owner(&self, filter: &Filter) -> Option<Owned> {
        let found = filter.program.as_ref()?;
        if let Some(program) = Program::ALL
            .into_iter()
            .find(|program| found.name == self.of(*program))
        {
            let is_old = false;
            return Some(Owned { program, is_old });
        }
        let program = Program::ALL
            .into_iter()
            .find(|program| found.name == program.name())?;
        // A bare program name may belong to any program.
        let is_old = true;
        is_of_roamcast(found.id?, program).then_some(Owned { program, is_old })
    }
}

/// Whether a loaded program is this program of an agent.
fn is_of_roamcast(id: u32, program: Program) -> bool {
    let mut programs = loaded_programs().flatten();
    let Some(info) = programs.find(|info| info.id() == id) else {
        return false;
    };
    let Ok(Some(maps)) = info.map_ids() else {
        return false;
    };
    let maps: BTreeSet<u32> = maps.into_iter().collect();
    info.name_as_str() == Some(program.name())
        && loaded_maps()
            .flatten()
            .any(|map| maps.contains(&map.id()) && map.name_as_str() == Some(COMMON_MAP))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::tc::FilterProgram;

    fn filter(kind: &str, name: Option<String>) -> Filter {
        Filter {
            ifindex: 7,
            parent: 0xffff_0000,
            kind: kind.to_owned(),
            preference: 1,
            protocol: 3,
            handle: 1,
            chain: 0,
            program: name.map(|name| FilterProgram { name, id: None }),
        }
    }

    #[test]
    fn only_filters_of_this_pin_root_are_ours() {
        let names = Names::new(Path::new("/sys/fs/bpf/roamcast"));
        let other = Names::new(Path::new("/sys/fs/bpf/other"));
        for program in Program::ALL {
            let named = filter("bpf", Some(names.of(program)));
            let is_old = false;
            assert_eq!(names.owner(&named), Some(Owned { program, is_old }));
            assert_eq!(other.owner(&named), None);
            let bare = filter("bpf", Some(program.name().to_owned()));
            assert_eq!(names.owner(&bare), None, "no program of ours runs");
        }
        assert_eq!(names.owner(&filter("u32", None)), None);
    }

    #[test]
    fn long_name_is_cut_to_what_the_kernel_takes() {
        let names = Names::new(Path::new(&format!("/{}", "ä".repeat(200))));
        let name = names.of(Program::Replicate);
        assert!(name.len() <= LONGEST && name.starts_with("roamcast/replicate /"));
    }
}
